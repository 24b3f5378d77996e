"""A recipe: how a model is made. Strict YAML, key=value overrides, a dump of what was resolved."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from . import benchmark, data, fields, run_folder, slicing
from .errors import UserError, unknown
from .fields import parameter_count
from .rewrites import REWRITES, Rewrite, from_record
from .rewrites.base import WindowRewrite

T = TypeVar("T")
_SOURCE_TREE = Path(__file__).resolve().parent.parent / "recipes"


@dataclass(frozen=True)
class Align:
    method: Literal["activation", "weight", "none"] = "activation"
    site: Literal["pre", "post"] = "pre"
    pairs: Literal["chain", "direct"] = "chain"
    max_tokens: int = 4000


@dataclass(frozen=True)
class Search:
    """Step 3. Used where a rewrite has start=best."""

    strategy: Literal["all", "middle", "random"] = "all"
    count: int = 1  # windows to draw, for strategy=random
    race: bool = False  # drop windows that are clearly behind
    max_tokens: int = 16384  # of selection text
    context: int | None = None  # null: 256, less where the model has fewer positions
    target_parameters: int | float | str | None = None  # such as 100M: several windows jointly
    sizes: list | None = None  # the n that these may have; null: the rewrite's

    def __post_init__(self) -> None:
        if self.count < 1 or self.max_tokens < 2:
            raise UserError(f"search: count is {self.count}, max_tokens {self.max_tokens}; allowed: 1, 2 or more")
        if self.count != 1 and self.strategy != "random":
            raise UserError(f"search: count={self.count} is for strategy=random; strategy is {self.strategy}")
        if self.target_parameters is not None:
            parameter_count("target_parameters", self.target_parameters)
            if self.strategy != "all":
                raise UserError(f"search: strategy={self.strategy} is for single windows; leave target_parameters out")
        if self.sizes is not None:
            if self.target_parameters is None:
                raise UserError("search: sizes are for target_parameters; give both")
            if not self.sizes or not all(type(size) is int and size >= 1 for size in self.sizes):
                raise UserError(f"search: sizes is {self.sizes!r}; allowed: a list of whole numbers from 1")


@dataclass(frozen=True)
class Finetune:
    """Step 5, recovery."""

    train: Literal["auto", "deltas", "lora", "full"] = "auto"
    steps: int = 100
    batch_tokens: int = 4096  # of a step, over all processes
    learning_rate: float = 1e-3
    penalty: float = 1e-4
    distill: bool = False  # learn from the original as well
    mix: float = 1.0  # the teacher's share of the loss where it does
    control: bool = True  # also tune the untouched original on the same budget
    context: int | None = None  # null: the model's positions
    selection_tokens: int = 16384  # the best state is chosen on
    evaluate_every: int | None = None  # steps; null: a fifth of them
    checkpoint_every: int = 25  # steps
    warm_up: int | None = None  # steps; null: a twentieth of them
    weight_decay: float = 0.01
    clip: float = 1.0  # norm of the gradient; 0: not clipped
    dropout: bool = False
    lora_rank: int = 8
    lora_alpha: float = 16.0
    autocast: Literal["auto", "bfloat16", "none"] = "auto"
    forward_tokens: int | None = None  # of one forward pass, for little memory; null: 2048 on a CPU, else 16384

    def __post_init__(self) -> None:
        for name in ("steps", "batch_tokens", "selection_tokens", "checkpoint_every", "lora_rank"):
            least = 2 if name == "selection_tokens" else 1  # the first token of a block is not predicted
            if getattr(self, name) < least:
                raise UserError(f"finetune: {name} is {getattr(self, name)}; allowed: {least} or more")
        for name in ("learning_rate", "penalty", "weight_decay", "clip"):
            if getattr(self, name) < 0:
                raise UserError(f"finetune: {name} is {getattr(self, name)}; allowed: 0 or more")
        if not 0 <= self.mix <= 1:
            raise UserError(f"finetune: mix is {self.mix}; allowed: 0 to 1")
        if self.mix != 1 and not self.distill:
            raise UserError(f"finetune: mix={self.mix} is the teacher's share; it needs distill=true")
        if self.lora_alpha <= 0:
            raise UserError(f"finetune: lora_alpha is {self.lora_alpha}; allowed: above 0")
        for name, least in {"context": 2, "evaluate_every": 1, "warm_up": 0, "forward_tokens": 1}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"finetune: {name} is {value}; allowed: {least} or more")


@dataclass(frozen=True)
class Benchmark:
    metrics: list = field(default_factory=lambda: ["perplexity", "latency", "size"])
    baselines: list = field(default_factory=list)  # rows to compare with: pruned, dropped, or a MODEL
    data: dict = field(default_factory=dict)  # metric -> D, where it is not the recipe's or the metric's own

    def __post_init__(self) -> None:
        run_folder.check_baselines(self.baselines)
        measured = [metric for metric, _ in benchmark.check_metrics(self.metrics)]
        for metric, source in self.data.items():
            if metric not in measured or benchmark.METRICS[metric].data is None:
                raise UserError(f"benchmark.data: {metric!r} is not measured here or needs none")
            if not isinstance(source, str):
                raise UserError(f"benchmark.data.{metric} is {source!r}; allowed: a D as a string")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what comes out of a run."""

    model: str
    data: str | dict[str, str]
    seed: int
    align: Align
    search: Search | None
    rewrites: tuple[Rewrite, ...]
    finetune: Finetune | None
    slices: str | list | None  # smaller models to cut out of a nested one, before and after recovery: all, or which
    benchmark: Benchmark

    def record(self) -> dict[str, Any]:
        """As plain values, in the order of the contract."""
        return {
            "model": self.model,
            "data": self.data,
            "seed": self.seed,
            "align": dataclasses.asdict(self.align),
            "search": None if self.search is None else dataclasses.asdict(self.search),
            "rewrites": [rewrite.record() for rewrite in self.rewrites],
            "finetune": None if self.finetune is None else dataclasses.asdict(self.finetune),
            "slices": self.slices,
            "benchmark": dataclasses.asdict(self.benchmark),
        }

    def dump(self) -> str:
        """YAML that `load` reads back to the same recipe."""
        return yaml.dump(self.record(), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


# ---------------------------------------------------------------- YAML 1.2 numbers and words

_TAG = "tag:yaml.org,2002:"
_CORE = [  # what is no string in YAML 1.2's core schema, as (tag, pattern, first characters)
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
]


class _Loader(yaml.SafeLoader):
    """PyYAML reads 1e-4 as a string and `no` as false (YAML 1.1); this reads them as YAML 1.2 does. A key that stands
    twice in a mapping is an error."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's convention)
        letter: [(tag, pattern) for tag, pattern in resolvers if tag in (_TAG + "null", _TAG + "merge")]
        for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for index, key in enumerate(keys) if key in keys[:index]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """Puts quotes around every string that YAML 1.1 or 1.2 would read as something else."""


def _whole_number(loader: yaml.SafeLoader, node: Any) -> int:
    text = str(loader.construct_scalar(node))
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


for _name, _pattern, _first in _CORE:
    for _side in (_Loader, _Dumper):
        _side.add_implicit_resolver(_TAG + _name, re.compile(f"^(?:{_pattern})$"), list(_first))
_Loader.add_constructor(_TAG + "int", _whole_number)
_Loader.yaml_constructors.pop(_TAG + "timestamp")  # else a broken `!!timestamp` is no YAMLError


def parse_yaml(text: str, where: str) -> Any:
    """YAML as plain values. Raises UserError, one line, naming `where`."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: `!!int x`
        raise UserError(f"{where} is not readable YAML: {' '.join(str(error).split())}") from error


# ---------------------------------------------------------------- load


def names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(Path(str(entry)).stem for entry in _folder().iterdir() if str(entry).endswith(".yaml"))


def _folder() -> Any:
    try:
        return resources.files("compressor.recipes")
    except ModuleNotFoundError:  # run from a source tree that is not installed
        return _SOURCE_TREE


def load(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe by name or from a .yaml file, with `key=value` overrides. Raises UserError for what it cannot read."""
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"recipe {name_or_path} cannot be read ({error})") from error
    elif name_or_path in names():
        text = (_folder() / f"{name_or_path}.yaml").read_text(encoding="utf-8")
    else:
        raise unknown("recipe", name_or_path, [*names(), "FILE.yaml"])
    record = parse_yaml(text, f"recipe {name_or_path}")
    if not isinstance(record, dict):
        raise UserError(f"recipe {name_or_path} is no mapping of keys; see `gpt2-compress plan --help`")
    return from_plain(overridden(record, overrides))


def overridden(record: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The record with `key=value` put in, in place. Raises UserError for keys that there are not."""
    for override in overrides:
        _override(record, override)
    return record


def from_plain(record: Mapping[str, Any]) -> Recipe:
    """A recipe from plain values; missing keys take their defaults."""
    known = [item.name for item in dataclasses.fields(Recipe)]
    for key in record:
        if key not in known:
            raise unknown("recipe key", str(key), known)
    rewrites = record.get("rewrites")
    if not isinstance(rewrites, list) or not rewrites or not all(isinstance(item, dict) for item in rewrites):
        raise UserError(f"rewrites is {rewrites!r}; allowed: a list of rewrites such as [{{rewrite: soft_shared}}]")
    metrics = fields.from_record(Benchmark, _section(record, "benchmark"), "benchmark")
    sources = record.get("data", "demo")
    data.specs(sources)
    slicing.check_chosen(record.get("slices"))
    seed = fields.typed("recipe", "seed", record.get("seed", 0), int)
    if not 0 <= seed < 1 << 63:
        raise UserError(f"recipe: seed is {seed}; allowed: whole numbers from 0 to 2^63 - 1")
    align = fields.from_record(Align, _section(record, "align"), "align")
    if align.max_tokens < 2:
        raise UserError(f"align: max_tokens is {align.max_tokens}; allowed: 2 or more")
    search = _optional(Search, record, "search")
    chosen = [from_record(item) for item in rewrites]
    if len(chosen) == 1 and search is not None and "start" not in rewrites[0]:
        (only,) = chosen
        if isinstance(only, WindowRewrite) and only.scope == "window":
            chosen = [dataclasses.replace(only, start="best")]
    searched = [index for index, item in enumerate(chosen) if getattr(item, "start", None) == "best"]
    if searched and search is None:
        raise UserError(f"rewrites.{searched[0]}: start=best needs a search, which is null; give a layer")
    if len(searched) > 1:
        raise UserError(
            f"rewrites.{searched[0]} and rewrites.{searched[1]} both have start=best; one can be searched for, "
            "give the others a layer"
        )
    waiting = [index for index, item in enumerate(chosen) if item.undecided and index not in searched]
    if searched and waiting:
        raise UserError(
            f"rewrites.{waiting[0]}: {chosen[waiting[0]].name} chooses its layers on calibration text, which is after "
            f"the search for rewrites.{searched[0]}; give its layers"
        )
    return Recipe(
        model=fields.typed("recipe", "model", record.get("model", "demo"), str),
        data=sources,
        seed=seed,
        align=align,
        search=search,
        rewrites=tuple(chosen),
        finetune=_optional(Finetune, record, "finetune"),
        slices=record.get("slices"),
        benchmark=metrics,
    )


def _optional(cls: type[T], record: Mapping[str, Any], name: str) -> T | None:
    """A section that null switches off; its defaults where it is not given."""
    return None if name in record and record[name] is None else fields.from_record(cls, _section(record, name), name)


def _section(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = record.get(name, {})
    if not isinstance(section, dict):
        raise UserError(f"{name} is {section!r}; allowed: a mapping of its keys")
    return section


def _override(record: dict[str, Any], override: str) -> None:
    """Set a dotted path; a bare key that is no root key is a field of the rewrite when there is exactly one."""
    path, _, text = override.partition("=")
    value = parse_yaml(text, override)
    parts = path.split(".")
    roots = [item.name for item in dataclasses.fields(Recipe)]
    if len(parts) == 1 and path not in roots:
        rewrites = record.get("rewrites") or []
        fields_of = {item.name for kind in REWRITES.values() for item in dataclasses.fields(kind)}
        if path not in fields_of:
            raise unknown("key", path, [*roots, *fields_of])
        if len(rewrites) != 1:
            if not rewrites:
                raise UserError(f"{override}: {path} is a field of a rewrite, and these are given already")
            dotted = ", ".join(f"rewrites.{index}.{path}" for index in range(len(rewrites)))
            raise UserError(f"{override}: the recipe has {len(rewrites)} rewrites; say which: {dotted}")
        parts = ["rewrites", "0", path]
    if parts[0] not in roots:
        raise unknown("recipe key", parts[0], roots)
    place: Any = record
    for depth, part in enumerate(parts[:-1]):
        if isinstance(place, list):
            if not part.isdecimal() or int(part) >= len(place):
                raise UserError(
                    f"{override}: {'.'.join(parts[: depth + 1])} does not exist; allowed: 0 to {len(place) - 1}"
                )
            place = place[int(part)]
        else:
            place = place.setdefault(part, {})
        if not isinstance(place, dict | list):
            raise UserError(f"{override}: {'.'.join(parts[: depth + 1])} is {place!r} and has no keys")
    if isinstance(place, list):
        raise UserError(f"{override}: name a key of {'.'.join(parts[:-1])}")
    place[parts[-1]] = value
