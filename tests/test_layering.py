"""The house of docs/design: three storeys, imports go down only; GPT-2's names in few rooms; files of one job."""

from __future__ import annotations

import ast
import configparser
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent / "compressor"

# From the top. A module may import what stands on its own line or below, never above.
STOREYS = [
    {"__main__"},
    {"cli", "options", "commands", "arguments", "show"},
    {"studies"},
    {"pipeline"},
    {"steps"},
    {"session", "facts", "run_folder", "recipe", "suite"},  # what the steps share
    {"verify", "benchmark", "report", "metrics", "plans", "search", "rewrites", "alignment", "assignment",
     "capture", "correlation", "finetune", "lora", "training_loop", "training_loss", "training_mode",
     "training_rows", "training_schedule", "training_state", "nested_training", "group_loss", "fractal_training",
     "embedding_clusters", "slicing", "slice_choice", "classification",
     "tversky_gpt", "token_factored_gpt"},  # stages
    {"models", "checkpoint", "checkpoint_attention", "checkpoint_config", "checkpoint_nesting", "gpt2",
     "artifacts", "data", "examples", "sources", "tokens", "token_groups", "fields", "windows", "errors", "processes",
     "demo", "modeling"},  # ground
]  # fmt: skip
# reopen runs in a process of its own, where the package is not; __init__ is the package's face
APART = {"reopen", "__init__"}
FROM_REWRITES = {"alignment", "assignment", "capture", "correlation", "embedding_clusters", *STOREYS[-1]}

FILES = sorted(path for path in ROOT.rglob("*.py"))


def name_of(path: Path) -> str:
    """ "rewrites.base" for compressor/rewrites/base.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def runtime_nodes(tree: ast.AST):
    """All nodes but those under `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node
        yield from runtime_nodes(node)


def imports(path: Path) -> list[tuple[str, ast.stmt]]:
    """What a file of the package imports of the package ("rewrites.base"), and the statement."""
    package = path.relative_to(ROOT).parent.parts
    found: list[tuple[str, ast.stmt]] = []
    for node in runtime_nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [
                (alias.name.removeprefix("compressor."), node)
                for alias in node.names
                if alias.name.startswith("compressor.")
            ]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = [*package[: len(package) - (node.level - 1)]]
                base += node.module.split(".") if node.module else []
            elif node.module and node.module.split(".")[0] == "compressor":
                base = node.module.split(".")[1:]
            else:
                continue
            for alias in node.names:
                place = ROOT.joinpath(*base, alias.name)
                inner = place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()
                found.append((".".join([*base, alias.name] if inner else base), node))
    return [(name, node) for name, node in found if name]


def storey(module: str) -> int:
    return next(index for index, names in enumerate(STOREYS) if module.split(".")[0] in names)


def test_every_file_has_a_place():
    placed = set().union(*STOREYS) | APART
    there = {name_of(path).split(".")[0] for path in FILES}
    assert there - placed == set(), "give it a storey"
    assert {name for name in placed if name != "__init__"} <= there, "gone: take it off the list"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_down_only(path):
    module = name_of(path)
    if module in APART:
        return
    for imported, node in imports(path):
        assert imported.split(".")[0] not in APART, f"{module}:{node.lineno} imports {imported}"
        assert storey(imported) >= storey(module), f"{module}:{node.lineno} imports {imported}, which is above it"


def test_the_imports_have_no_cycle():
    graph: dict[str, set[str]] = {}
    for path in FILES:
        module = name_of(path)
        if module not in APART:
            graph[module] = {name for name, _ in imports(path) if name != module}
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError, which names the cycle


def test_rewrites_take_what_they_need_from_ground_and_statistics():
    for path in (ROOT / "rewrites").glob("*.py"):
        for imported, _ in imports(path):
            assert imported.split(".")[0] in FROM_REWRITES | {"rewrites"}, f"{path.name} imports {imported}"


def test_modeling_travels_alone():
    """Its files are copied flat into a checkpoint: torch, transformers and siblings only, found by a regular expression
    that reads one line and one dot."""
    allowed = {"__future__", "abc", "collections", "math", "typing", "torch", "transformers"}
    siblings = {path.stem for path in (ROOT / "modeling").glob("*.py")}
    for path in (ROOT / "modeling").glob("*.py"):
        source = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, ast.unparse(node)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module.split(".")[0] in allowed, ast.unparse(node)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1 and node.module in siblings, ast.unparse(node)
                if path.stem != "__init__":  # which stays at home
                    assert node.lineno == node.end_lineno, f"{path.name}: {ast.unparse(node)} stands on several lines"


def test_reopen_imports_nothing_of_the_package():
    assert imports(ROOT / "reopen.py") == []
    assert "compressor" not in {
        alias.name.split(".")[0]
        for node in ast.walk(ast.parse((ROOT / "reopen.py").read_text()))
        if isinstance(node, ast.Import)
        for alias in node.names
    }


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_file_is_long(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 350, "what second job crept in?"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_style(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert path.stem not in {"utils", "helpers", "common", "misc"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            # tokenizers raises Exception itself: these two look at the type and raise the rest again
            if name_of(path) not in ("artifacts", "checkpoint"):
                assert caught not in ("Exception", "everything"), f"line {node.lineno}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "breakpoint"
            printing = {"cli", "reopen", "demo.pretrain", "demo.ablation", "token_factored_gpt"}  # whose name says so
            assert node.func.id != "print" or name_of(path) in printing, f"line {node.lineno} prints"


# ---------------------------------------------------------------- GPT-2's attribute names

NAMES = {"c_fc", "c_proj", "c_attn", "ln_1", "ln_2", "ln_f", "wte", "wpe", "mlp", "attn", "lm_head", "transformer", "h"}
# where else, and why
SPELLED = {
    "gpt2": NAMES,
    "checkpoint": {"attn"},  # buffers of old checkpoints that are not this package's
    "capture": {"c_fc", "c_proj", "c_attn"},  # where the hooks sit
    "rewrites.alibi": {"wpe", "lm_head"},  # sites are GPT-2's own paths
    "rewrites.fractal": {"wpe", "lm_head"},  # sites are GPT-2's own paths
    "rewrites.matryoshka": {"wpe", "lm_head"},  # sites are GPT-2's own paths
    "rewrites.base": {"h", "ln_1", "ln_2", "mlp", "attn"},  # sites are GPT-2's own paths
    "rewrites.combine": {"wpe", "lm_head"},  # sites are GPT-2's own paths
    "rewrites.compressed_n": {"c_fc", "c_proj", "c_attn", "mlp", "attn", "ln_1", "ln_2"},  # combines whole blocks
    "rewrites.efficient": {"attn"},  # a site is GPT-2's own path
    "rewrites.merged_n": {"c_fc", "c_proj"},  # both linears in turn
    "rewrites.sasp": {"attn", "ln_2"},  # sites are GPT-2's own paths
    "rewrites.soft_shared": {"c_fc", "c_proj"},
    "rewrites.token_factored": {"attn"},  # sites and a block's tensors are GPT-2's own paths
    "rewrites.token_factored_fit": {"attn"},
    "rewrites.tversky": {"c_fc", "lm_head", "h"},  # a recipe's words for what projections stand for
    "rewrites.tversky_fit": {"c_fc", "c_proj", "c_attn", "mlp", "attn", "lm_head"},  # those words and the leaves
    "token_factored_gpt": {"attn"},  # a leaf of gpt2.linear
    "tversky_gpt": {"c_fc", "lm_head"},  # a recipe's words for what projections stand for
}


def spelled(path: Path) -> dict[str, int]:
    """GPT-2's names in a file's code, not in what explains it: as attributes, and as parts of paths in strings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    explaining = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    found: dict[str, int] = {}
    for node in ast.walk(tree):
        words: list[str] = []
        if isinstance(node, ast.Attribute):
            words = [node.attr]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in explaining:
            text = node.value if " " not in node.value else ""
            words = [word for word in re.split(r"\W+", text) if word != "h" or "h." in text]
        for word in NAMES.intersection(words):
            found.setdefault(word, node.lineno)
    return found


@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name not in ("modeling", "demo")], ids=name_of)
def test_gpt2s_attribute_names_have_few_rooms(path):
    allowed = SPELLED.get(name_of(path), set())
    for word, line in spelled(path).items():
        assert word in allowed, f"line {line} spells {word}: ask gpt2.py for it"


def test_every_package_is_installed():
    setup = configparser.ConfigParser()
    setup.read(ROOT.parent / "setup.cfg")
    named = set(setup["options"]["packages"].split())
    here = {".".join(file.parent.relative_to(ROOT.parent).parts) for file in ROOT.rglob("__init__.py")}
    assert named == here | {"compressor.recipes", "compressor.suites"}  # the last two are data from other folders
