"""`run`: every step of a recipe, whatever interrupts it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import make_text, tree
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

import compressor
from compressor import artifacts, pipeline, run_folder
from compressor.cli import main
from compressor.errors import UserError
from compressor.metrics.size import parameters
from compressor.models import open_model
from compressor.recipe import load
from compressor.session import Columns, Session

SHORT = ["search=null", "finetune=null", "benchmark.metrics=[size]"]
METRICS = "[{metric: perplexity, max_tokens: 300}, size]"


def keys(tiny_folder, text_file, *more: str) -> list[str]:
    """A recipe of seconds: three windows of 4 to search, six steps, a checkpoint every second step."""
    return [
        f"model={tiny_folder}",
        f"data={text_file}",
        "rank=4",
        "align.max_tokens=600",
        "search.max_tokens=512",
        "search.context=32",
        "search.race=false",
        "finetune.steps=6",
        "finetune.batch_tokens=256",
        "finetune.selection_tokens=256",
        "finetune.checkpoint_every=2",
        "finetune.learning_rate=1e-2",
        f"benchmark.metrics={METRICS}",
        *more,
    ]


def lasting(folder: Path) -> dict[str, bytes | None]:
    """What two runs of one recipe have in common to the bit: tensors, scores, configurations; names of the rest."""
    wanted = (".safetensors", "config.json", "windows.json", "recipe.yaml")
    return {name: content if name.endswith(wanted) else None for name, content in tree(folder).items()}


def test_every_step_of_a_recipe(tmp_path, tiny_folder, text_file, session):
    chosen = load("soft_shared", keys(tiny_folder, text_file, "seed=5"))
    run = tmp_path / "run"
    result = pipeline.run(run, chosen, session)
    assert [row.name for row in result.rows] == ["original", "control", "rewritten", "recovered"]
    assert load(str(run / "recipe.yaml")) == chosen
    files = {"recipe.yaml", "alignment.json", "alignment.safetensors", "windows.json", "rewritten", "control",
             "recovered", "report.json", "report.md", "report.html", "perplexity_by_parameters.png", "windows.png",
             "recovery.png", "alignment.png"}  # fmt: skip
    assert {path.name for path in run.iterdir()} == files
    windows = json.loads((run / "windows.json").read_text())
    assert windows["complete"] and len(windows["candidates"]) == 3
    made = json.loads((run / "rewritten" / "report.json").read_text())
    assert made["rewrites"][0]["start"] == windows["winner"][0]["start"]
    rows = {row.name: row for row in result.rows}
    for row, model in run_folder.rows([str(run)]).items():
        assert rows[row].weights == open_model(model).hash
    assert isinstance(AutoModelForCausalLM.from_pretrained(run / "control"), GPT2LMHeadModel)
    for file in ("alignment.json", "windows.json", "rewritten/report.json", "recovered/report.json", "report.json"):
        assert json.loads((run / file).read_text())["provenance"]["seed"] == 5, file


def test_a_finished_run_is_kept_to_the_byte_and_another_recipe_is_refused(tmp_path, tiny_folder, text_file, session):
    run = tmp_path / "run"
    few = keys(tiny_folder, text_file, "finetune.steps=2", "finetune.control=false", "start=1")
    first = pipeline.run(run, load("soft_shared", few), session)
    before = tree(run)
    assert pipeline.run(run, load("soft_shared", few), session) == first and tree(run) == before
    with pytest.raises(UserError, match=r"another recipe \(finetune differ\); give another --run, or --force"):
        pipeline.run(run, load("soft_shared", [*few, "finetune.steps=3"]), session)
    assert tree(run) == before
    stored = run / "recipe.yaml"
    older = re.sub(r"^slices: null\n", "", stored.read_text(), flags=re.M)  # begun before recipes had this key
    assert older != stored.read_text()
    stored.write_text(older)
    assert pipeline.run(run, load("soft_shared", few), session) == first
    forced = Session(device="cpu", quiet=True, force=True)
    (run / "my notes.txt").write_text("mine")
    pipeline.run(run, load("soft_shared", [*few, "finetune.steps=3"]), forced)
    assert json.loads((run / "recovered" / "report.json").read_text())["recovery"]["steps"] == 3
    assert (run / "my notes.txt").read_text() == "mine"


@pytest.mark.parametrize("missing", ["recovered", "rewritten/model.safetensors", "report.json", "windows.json"])
def test_what_is_missing_is_made_again(tmp_path, tiny_folder, text_file, session, missing):
    run = tmp_path / "run"
    chosen = load("soft_shared", keys(tiny_folder, text_file, "finetune.steps=2", "finetune.control=false"))
    pipeline.run(run, chosen, session)
    before = lasting(run)
    pipeline.artifacts.remove(run / missing)
    if missing.endswith("model.safetensors"):  # damaged, not missing: said, and kept
        with pytest.raises(UserError, match="has no weights"):
            pipeline.run(run, chosen, session)
        return
    pipeline.run(run, chosen, session)
    assert lasting(run) == before


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("align --model {model} --data {text} --run {run} --max-tokens 300 --force", "alignment.json"),
        ("rewrite --run {run} --rewrite soft_shared n=4 rank=2 start=0 --force", "rewritten is not what this recipe"),
        ("finetune --run {run} --steps 1 --train lora --force", "was made with steps=1, now it is 2"),
        ("benchmark {run} --out {run} --metrics size --force", "another report than this recipe's; move it away"),
        ("benchmark {run} --out {run} --data {run}/recipe.yaml.txt --force", "another report"),
        ("search --run {run} --rewrite soft_shared n=4 rank=4 base=lsq --force --strategy middle", "settings"),
    ],
)
def test_a_step_that_was_made_otherwise_is_neither_replaced_nor_built_upon(
    tmp_path, tiny_folder, text_file, session, command, said
):
    run = tmp_path / "run"
    chosen = load("soft_shared", keys(tiny_folder, text_file, "finetune.steps=2", "finetune.control=false"))
    pipeline.run(run, chosen, session)
    (run / "recipe.yaml.txt").write_text(text_file.read_text()[:3000])
    assert main([*command.format(model=tiny_folder, text=text_file, run=run).split(), "--quiet"]) == 0
    before = tree(run)
    with pytest.raises(UserError, match=said):
        pipeline.run(run, chosen, session)
    assert tree(run) == before


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["n=9"], "n 9 is out of range"),
        (["rank=99"], "rank"),
        (["data=none.txt"], "none.txt"),
        (["model=./none"], "does not exist"),
        (["finetune.context=65"], "text is 65; allowed: 2 to 64"),
        (["search.context=65"], "selection text is 65; allowed: 2 to 64"),
        (["search.strategy=random", "search.count=4"], "count 4 is out of range for 3 windows"),
        (["rank=0", "finetune.train=deltas"], "train is 'deltas', and this model has none"),
    ],
)
def test_a_run_that_cannot_work_writes_nothing(tmp_path, tiny_folder, text_file, session, more, said):
    with pytest.raises(UserError, match=said):
        pipeline.run(tmp_path / "runs" / "x", load("soft_shared", keys(tiny_folder, text_file, *more)), session)
    assert not (tmp_path / "runs").exists()


def test_a_part_with_too_little_text_is_found_before_the_first_step(tmp_path, tiny_folder, text_file, session):
    short = tmp_path / "short.txt"
    short.write_text("Too short to train on. " * 2)
    parts = f"{{calibration: {text_file}, selection: {text_file}, training: {short}, test: {text_file}}}"
    with pytest.raises(UserError, match=r"training part of .*short.txt.* tokens, one block needs 64"):
        pipeline.run(tmp_path / "run", load("soft_shared", [*keys(tiny_folder, text_file), f"data={parts}"]), session)
    assert not (tmp_path / "run").exists()


def test_settings_of_the_session_are_checked_before_anything_is_written(tmp_path, tiny_folder, text_file, session):
    chosen = load("soft_shared", keys(tiny_folder, text_file))
    for settings, said in (
        ({"dtype": "bfloat16"}, "recovery trains float32 weights; leave --dtype bfloat16 out"),
        ({"dtype": "half"}, "unknown dtype"),
        ({"device": "nonsense"}, "cannot be used here"),
    ):
        with pytest.raises(UserError, match=said):
            pipeline.run(tmp_path / "run", chosen, dataclasses.replace(session, **settings))
    assert not (tmp_path / "run").exists()


def test_steps_of_another_dtype_are_not_built_upon(tmp_path, tiny_folder, text_file, session):
    few = load("soft_shared", keys(tiny_folder, text_file, "finetune=null", "start=1"))
    pipeline.run(tmp_path / "run", few, dataclasses.replace(session, dtype="float64"))
    with pytest.raises(UserError, match=r"alignment\.json is not what this recipe makes \(dtype differ\)"):
        pipeline.run(tmp_path / "run", few, session)


def test_parts_that_are_one_text_under_two_names_are_refused(tmp_path, tiny_folder, text_file, session):
    for name in ("one.txt", "two.txt"):
        (tmp_path / name).write_text(make_text(300, seed=4))
    parts = (
        f"{{calibration: {text_file}, selection: {text_file}, training: {tmp_path}/one.txt, test: {tmp_path}/two.txt}}"
    )
    with pytest.raises(UserError, match=r"data\.\w+ and data\.\w+ share text"):
        pipeline.run(tmp_path / "run", load("soft_shared", [*keys(tiny_folder, text_file), f"data={parts}"]), session)
    assert not (tmp_path / "run").exists()


def test_a_kill_while_the_recipe_is_written(tmp_path, tiny_folder, text_file, session):
    run = tmp_path / "run"
    run.mkdir()
    (run / ".gpt2-compress-partial-recipe.yaml").write_text("half")
    off = load("soft_shared", [*keys(tiny_folder, text_file)[:4], *SHORT])
    pipeline.run(run, off, session)
    assert {path.name for path in run.iterdir() if path.name.startswith(".")} == set()


def test_what_a_killed_replacement_left_does_not_come_back_after_force(tmp_path, tiny_folder, text_file, session):
    run = tmp_path / "run"
    off = load("soft_shared", [*keys(tiny_folder, text_file)[:4], *SHORT])
    pipeline.run(run, off, session)
    (run / "rewritten").rename(run / ".gpt2-compress-replaced-rewritten")
    other = load("soft_shared", ["rank=2", *keys(tiny_folder, text_file)[:2], *SHORT])
    pipeline.run(run, other, dataclasses.replace(session, force=True))
    assert json.loads((run / "rewritten" / "report.json").read_text())["rewrites"][0]["rank"] == 2


def test_a_column_may_be_named(tmp_path, tiny_folder, session):
    rows = make_text(400).splitlines()
    source = tmp_path / "two.csv"
    source.write_text("title,body\n" + "".join(f"x,{line.replace(',', '')}\n" for line in rows))
    off = load("soft_shared", [*keys(tiny_folder, source)[:4], *SHORT])
    run = tmp_path / "run"
    with pytest.raises(UserError, match="--text-column"):
        pipeline.run(run, off, session)
    columns = Columns(text_column="body")
    first = pipeline.run(run, off, session, columns=columns)
    assert pipeline.run(run, off, session, columns=columns) == first
    with pytest.raises(UserError, match="text column or split differ"):
        pipeline.run(run, off, session, columns=Columns("title"))


def test_folders_that_are_something_else(tmp_path, tiny_folder, text_file, session, aligned_run):
    chosen = load("soft_shared", keys(tiny_folder, text_file))
    with pytest.raises(UserError, match="is no run of a recipe"):
        pipeline.run(aligned_run, chosen, session)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        pipeline.run(tmp_path / "file", chosen, session)
    with pytest.raises(UserError, match="is a model's folder"):
        pipeline.run(tiny_folder, chosen, Session(device="cpu", quiet=True, force=True))


def test_recipes_without_search_or_recovery(tmp_path, tiny_folder, text_file, session):
    off = [*keys(tiny_folder, text_file)[:4], "search=null", "finetune=null", f"benchmark.metrics={METRICS}"]
    result = pipeline.run(tmp_path / "run", load("soft_shared", off), session)
    assert [row.name for row in result.rows] == ["original", "rewritten"]
    assert not (tmp_path / "run" / "windows.json").exists()
    assert json.loads((tmp_path / "run" / "rewritten" / "report.json").read_text())["rewrites"][0]["start"] == 1


def test_a_run_for_a_size(tmp_path, tiny_folder, text_file, session):
    """Several windows jointly; started again, it finds all of them done."""
    run, few = tmp_path / "run", keys(tiny_folder, text_file)[:6]
    whole = parameters(open_model(str(tiny_folder)).model)
    ffn = 32 * 128 * 2 + 128 + 32
    given = [item for item in few if not item.startswith("rank")] + [
        "n=2",
        f"search.target_parameters={whole - 2 * ffn}",
    ]
    chosen = load("merged_4", [*given, "finetune=null", "benchmark.metrics=[size]"])
    result = pipeline.run(run, chosen, session)
    made = json.loads((run / "rewritten" / "report.json").read_text())
    assert made["parameters"] == whole - 2 * ffn and len(made["rewrites"]) == 2
    before = tree(run)
    assert pipeline.run(run, chosen, session) == result and tree(run) == before


# ---------------------------------------------------------------- killed and started again

SOURCE = str(Path(compressor.__file__).parent.parent)
# What appears first in each stage: right then the process gets SIGKILL.
STAGES = [
    "recipe.yaml",
    "alignment.json",
    "windows.json",
    "rewritten/config.json",
    "checkpoints/recovered/state/state.json",
    "recovered/config.json",
    "checkpoints/control/state/state.json",
    "control/config.json",
    "report.json",
]


def command(words: list[str], folder: Path, *launch: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, *launch, "-m", "compressor", *words],
        cwd=folder,
        env={**environment, "ACCELERATE_USE_CPU": "true"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_run_killed_in_every_stage_ends_in_the_same_bytes(tmp_path, tiny_folder, text_file):
    words = ["run", "soft_shared", "--run", "here", *keys(tiny_folder, text_file)]
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole = command(words, tmp_path / "whole")
    for stage in STAGES:
        started = command(words, tmp_path / "killed")
        appeared = tmp_path / "killed" / "here" / stage
        while not appeared.exists() and started.poll() is None:
            time.sleep(0.0005)
        started.send_signal(signal.SIGKILL)
        _, said = started.communicate()
        assert started.returncode == -signal.SIGKILL, f"{stage}: ended before it was killed: {said}"
        assert appeared.exists(), stage
    last = command(words, tmp_path / "killed")
    assert last.wait() == 0, last.stderr.read()
    assert whole.wait() == 0, whole.stderr.read()
    expected, found = lasting(tmp_path / "whole"), lasting(tmp_path / "killed")
    assert set(found) == set(expected)
    for name, content in expected.items():
        assert found[name] == content, name
    recovered, rewritten = (load_file(tmp_path / "killed/here" / step / "model.safetensors")
                            for step in ("recovered", "rewritten"))  # fmt: skip
    assert any((recovered[name] != tensor).any() for name, tensor in rewritten.items())  # there was something to lose


def test_two_processes_make_the_run_of_one(tmp_path, tiny_folder, text_file):
    words = ["run", "soft_shared", "--run", "here", *keys(tiny_folder, text_file, "finetune.autocast=none")]
    again = ["finetune", "--run", "here", "--steps", "2", "batch_tokens=256", "selection_tokens=64", "--force"]
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one = command(words, tmp_path / "one")
    # --cpu would start one process only: accelerate leaves several on CPUs to MPI, or to torchrun as --multi_gpu does
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]  # fmt: skip
    two = command(words, tmp_path / "two", *launch)
    out, said = two.communicate()
    assert two.returncode == 0, said[-3000:]
    alone, _ = one.communicate()
    assert one.returncode == 0
    assert out.count("recovered") == alone.count("recovered")  # one process prints
    runs = [tmp_path / name / "here" for name in ("one", "two")]
    first, second = (load_file(run / "alignment.safetensors") for run in runs)
    for name, tensor in first.items():
        if name.startswith("permutation"):
            assert tensor.equal(second[name])
    scores = [json.loads((run / "windows.json").read_text()) for run in runs]
    assert scores[0]["winner"] == scores[1]["winner"]
    for ours, theirs in zip(scores[0]["candidates"], scores[1]["candidates"], strict=True):
        assert ours["nll"] == pytest.approx(theirs["nll"], rel=1e-6)
    for step in ("recovered", "control"):
        curves = [json.loads((run / step / "report.json").read_text())["recovery"] for run in runs]
        assert curves[1]["settings"]["processes"] == 2
        for ours, theirs in zip(curves[0]["curve"], curves[1]["curve"], strict=True):
            assert ours["nll"] == pytest.approx(theirs["nll"], abs=1e-3)
    measured = [json.loads((run / "report.json").read_text())["results"] for run in runs]
    for ours, theirs in zip(*measured, strict=True):
        assert ours["value"] == pytest.approx(theirs["value"], rel=1e-3)
    assert set(lasting(runs[0])) == set(lasting(runs[1]))
    # a step by itself, and a command that one process does while the other goes
    for words in (again, ["benchmark", "here", "--out", "bench", "--metrics", "size"]):
        out, said = command(words, tmp_path / "two", *launch).communicate(timeout=120)
        assert "Traceback" not in said and "recovered" in out, said[-2000:]


def test_slices_of_a_run_are_made_measured_kept_and_forced(tmp_path, tiny_folder, text_file, session):
    given = [key for key in keys(tiny_folder, text_file) if not key.startswith(("rank", "search"))]
    given += ["ffn=[0.5]", "depth=[2]", "finetune.steps=1", "finetune.control=false"]
    chosen, run = load("matryoshka", given), tmp_path / "run"
    result = pipeline.run(run, chosen, session)
    names = ["slice depth-2 (rewritten)", "slice ffn-64 (rewritten)", "slice depth-2", "slice ffn-64"]
    assert [row.name for row in result.rows] == ["original", "rewritten", "recovered", *names]
    assert all(row.find("perplexity") and row.find("parameters") for row in result.rows)
    assert "Figures" in (run / "slices" / "after" / "ffn-64" / "README.md").read_text()
    kept = lasting(run)
    for place in ("report.json", "slices/after/ffn-64"):  # as a kill leaves it
        artifacts.remove(run / place)
    assert pipeline.run(run, chosen, session).rows == result.rows and lasting(run) == kept
    fewer = load("matryoshka", [*given, "slices=[{ffn: 0.5}]"])
    with pytest.raises(UserError, match="holds a run of another recipe"):
        pipeline.run(run, fewer, session)
    assert len(pipeline.run(run, fewer, dataclasses.replace(session, force=True)).rows) == 5
    wrong = load("matryoshka", [*given, "slices=[{ffn: 0.25}]"])
    with pytest.raises(UserError, match=r"slices: ffn is 0.25; allowed: 128, 64, or as a share of 128"):
        pipeline.run(tmp_path / "other", wrong, session)
    assert not (tmp_path / "other").exists()
