"""The command lines of search, rewrite --best and finetune: a mistake is one line, nothing is lost, JSON is JSON."""

from __future__ import annotations

import json
import shutil

import pytest
from conftest import largest_file, make_config, make_model, tree
from safetensors.torch import load_file

from compressor import artifacts
from compressor.metrics.size import parameters
from compressor.models import open_model

FFN = 2 * 32 * 128 + 32 + 128  # what merged_n stores once of the tiny model
SEARCH = ["--max-tokens", 600, "--context", 32]
KEYS = ["batch_tokens=128", "context=32", "selection_tokens=128", "checkpoint_every=1", "learning_rate=1e-2"]


def search(run, *words):
    return ["search", "--run", run, "--rewrite", *words]


def finetune(run, *words):
    return ["finetune", "--run", run, *words]


def stored(path):
    """A JSON file without what every file has."""
    document = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    return {key: value for key, value in document.items() if key not in ("kind", "schema", "provenance")}


# ---------------------------------------------------------------- the user's mistakes


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("softshared", "unknown rewrite 'softshared' (did you mean 'soft_shared'?)"),
        ("soft_shared rnak=4", "(did you mean 'rank'?)"),
        ("soft_shared --rnak 4", "(did you mean 'rank'?)"),
        ("soft_shared --strategi all", "unknown key of soft_shared 'strategi'"),
        ("soft_shared n=9", "n 9 is out of range for a model of 6 layers; allowed: 1 to 6"),
        ("soft_shared start=2", "start is 'best' already"),
        ("soft_shared scope=tile", "soft_shared as given has no window to search for"),
        ("tversky share=window n=2", "tversky as given has no window to search for"),
        ("pruned sparsity=0.5", "pruned as given has no window to search for"),
        ("soft_shared --strategy best", "invalid choice: 'best'"),
        ("soft_shared --strategy random --count 9", "count 9 is out of range for 3 windows; allowed: 1 to 3"),
        ("soft_shared --count 0", "argument --count: '0'; allowed: whole numbers from 1"),
        ("soft_shared --max-tokens 1", "argument --max-tokens: '1'; allowed: whole numbers from 2"),
        ("soft_shared --context 65", "context is 65; allowed: 2 to 64, the positions of the model"),
        ("soft_shared --context 1", "argument --context: '1'; allowed: whole numbers from 2"),
        ("soft_shared --sizes 2", "sizes are for target_parameters; give both"),
        ("soft_shared --sizes 2,x --target-parameters 80k", "argument --sizes: 'x'"),
        ("soft_shared --sizes 2,0 --target-parameters 80k", "argument --sizes: '0'"),
        ("soft_shared --sizes 2,9 --target-parameters 80k", "n 9 is out of range for a model of 6 layers"),
        ("soft_shared --target-parameters 10", "target_parameters=10 is out of reach for soft_shared"),
        ("soft_shared --target-parameters 1G", "target_parameters=1,000,000,000 is no reduction; the model has"),
        ("soft_shared --target-parameters many", "target_parameters='many' is no number of parameters"),
        ("soft_shared --target-parameters 1e999", "target_parameters='1e999' is no number of parameters"),
        ("soft_shared --target-parameters", "argument --target-parameters: expected one argument"),
        ("soft_shared --data none.txt", "there is no such file"),
        ("soft_shared --split nowhere", "unknown split"),
        ("soft_shared --dtype half", "unknown dtype 'half'"),
    ],
)
def test_searches_that_cannot_be(line, said, aligned_run, refused):
    assert said in refused(*search(aligned_run, *line.split()))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("lerning_rate=1e-4", "unknown key of finetune 'lerning_rate' (did you mean 'learning_rate'?)"),
        ("--lerning-rate 1e-4", "(did you mean 'learning_rate'?)"),
        ("--steps 0", "argument --steps: '0'; allowed: whole numbers from 1"),
        ("steps=0", "steps is 0; allowed: 1 or more"),
        ("steps=2.5", "steps is 2.5; allowed: a whole number"),
        ("--steps 2 steps=3", "steps=3: steps is 2 already; give it once"),
        ("steps=2 steps=3", "give it once"),
        ("learning_rate=abc", "learning_rate is 'abc'; allowed: a number"),
        ("learning_rate=.nan", "learning_rate is nan; allowed: a number"),
        ("--learning-rate -1", "learning_rate is -1.0; allowed: 0 or more"),
        ("--learning-rate", "--learning-rate needs a value"),
        ("mix=2", "mix is 2.0; allowed: 0 to 1"),
        ("batch_tokens=0", "batch_tokens is 0; allowed: 1 or more"),
        ("selection_tokens=1", "selection_tokens is 1; allowed: 2 or more"),
        ("evaluate_every=0", "evaluate_every is 0; allowed: 1 or more"),
        ("checkpoint_every=0", "checkpoint_every is 0; allowed: 1 or more"),
        ("context=65", "context is 65; allowed: 2 to 64, the positions of the model"),
        ("context=1", "context is 1; allowed: 2 or more"),
        ("--train delta", "invalid choice: 'delta'"),
        ("train=delta", "train is 'delta'; allowed: auto, deltas, lora, full"),
        ("distill=maybe", "distill is 'maybe'; allowed: true or false"),
        ("autocast=float8", "autocast is 'float8'; allowed: auto, bfloat16, none"),
        ("seed=3", "unknown key of finetune 'seed'"),
        ("--force --resume", "--force begins anew and --resume goes on; give one"),
        ("--dtype bfloat16", "recovery trains float32 weights, these are bfloat16"),
        ("--data none.txt", "there is no such file"),
    ],
)
def test_recoveries_that_cannot_be(line, said, made_run, refused):
    assert said in refused(*finetune(made_run, *line.split()))


def test_what_has_no_deltas(aligned_run, run, refused):
    words = ["rewrite", "--run", aligned_run, "--rewrite", "compressed_n", "n=3", "start=1", "collapse=keep"]
    assert run(*words).code == 0
    for word in ("train=deltas", "--train=deltas"):
        assert "train is 'deltas', and this model has none; allowed for it: auto, lora, full" in refused(
            *finetune(aligned_run, word)
        )


def test_steps_out_of_order(aligned_run, tmp_path, refused):
    assert f"`gpt2-compress rewrite --run {aligned_run}` makes one" in refused(*finetune(aligned_run))
    assert "`gpt2-compress align` makes it" in refused(*finetune(tmp_path / "none"))
    assert "`gpt2-compress align` makes it" in refused(*search(tmp_path / "none", "soft_shared"))
    words = ["rewrite", "--run", aligned_run, "--rewrite", "soft_shared", "n=3", "--best"]
    assert f"`gpt2-compress search --run {aligned_run} --rewrite soft_shared` makes one" in refused(*words)
    assert "--best and --start 1 say two things" in refused(*words, "--start", 1)
    assert "start=1: start is 'best' already; give it once" in refused(*words, "start=1")
    assert "required: --run" in refused("search", "--rewrite", "soft_shared")
    assert "required: --rewrite" in refused("search", "--run", aligned_run)


# ---------------------------------------------------------------- results


def test_from_a_search_to_a_recovered_model(aligned_run, run, refused):
    said = run(*search(aligned_run, "soft_shared", "n=3", "--rank", 4, *SEARCH, "--json"))
    near = sum(row["indistinguishable"] for row in said.json["candidates"])
    assert said.code == 0 and said.err.count("\n") == bool(near) == (
        f"best on this selection text: {near};" in said.err
    )
    assert said.json == {**stored(aligned_run / "windows.json"), "run": str(aligned_run)}
    best = said.json["winner"][0]["start"]

    said = run("rewrite", "--run", aligned_run, "--rewrite", "soft_shared", "n=3", "rank=4", "--best", "--json")
    assert (said.code, said.err) == (0, "") and said.json["rewrites"][0]["start"] == best
    assert "is of another search (rewrite differ)" in refused(*search(aligned_run, "soft_shared", "n=2", *SEARCH))

    said = run(*finetune(aligned_run, "--steps", 2, "--control", *KEYS, "--seed", 5, "--json"))
    assert (said.code, said.err.count("\n")) == (0, 1) and said.err.startswith("finetune: context=32")
    reports = {name: stored(aligned_run / name / "report.json") for name in ("recovered", "control")}
    assert said.json == {"run": str(aligned_run), **reports}
    assert [len(body["recovery"]["curve"]) for body in reports.values()] == [2, 2]
    assert {body["made_from"]["seed"] for body in reports.values()} == {5}
    assert "--force replaces it, --resume keeps it" in refused(*finetune(aligned_run, "--steps", 2, *KEYS))
    again = run(*finetune(aligned_run, "--steps", 2, "--control", *KEYS, "--seed", 5, "--resume", "--json"))
    assert again.code == 0 and again.json == said.json


def test_every_setting_of_a_recovery_is_also_a_key(made_run, run):
    said = run(*finetune(made_run, "steps=3", "train=lora", "distill=true", "control=true", *KEYS, "--json"))
    assert said.code == 0 and set(said.json) == {"run", "recovered", "control"}
    body = said.json["recovered"]
    assert (body["recovery"]["steps"], body["recovery"]["train"], body["made_from"]["distill"]) == (3, "lora", True)


def test_text_for_people(aligned_run, tiny_folder, run):
    words = search(aligned_run, "merged_n", "n=2", "tie=true", *SEARCH)
    said = run(*words)
    rows = stored(aligned_run / "windows.json")
    (winner,) = rows["winner"]
    first = said.out.splitlines()[3].split()
    assert said.code == 0 and first[0] == f"{winner['start']}-{winner['start'] + 1}"
    assert first[1] == f"{min(row['perplexity'] for row in rows['candidates']):.2f}" and first[2] == "best"
    assert f"{aligned_run}/windows.json: best is {first[0]}" in said.out
    whole = parameters(open_model(str(tiny_folder), device="cpu").model)
    said = run(*words, "--target-parameters", whole - 3 * FFN, "--sizes", "2", "--force")
    assert said.code == 0 and "the original" in said.out and " + " in said.out.splitlines()[3]
    assert run("rewrite", "--run", aligned_run, "--rewrite", "merged_n", "n=2", "tie=true").code == 0
    said = run(*finetune(aligned_run, "--steps", 1, *KEYS))
    report = stored(aligned_run / "recovered" / "report.json")
    assert said.code == 0 and said.err.startswith("finetune: context=32") and said.out.count("\n") == 1
    assert f"{aligned_run}/recovered: lora, " in said.out
    assert f"selection perplexity {report['selection_perplexity']['before']:.2f} -> " in said.out


def test_a_model_so_broken_that_its_perplexity_is_no_number(tmp_path, tiny_tokenizer, text_file, run):
    model = make_model(make_config())
    model.transformer.wte.weight.data *= 5000
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    here = tmp_path / "run"
    assert (
        run("align", "--model", tmp_path / "model", "--data", text_file, "--run", here, "--max-tokens", 200).code == 0
    )
    said = run(*search(here, "soft_shared", "n=3", *SEARCH, "--json"))
    assert said.code == 0 and {row["perplexity"] for row in said.json["candidates"]} == {None}
    assert run("rewrite", "--run", here, "--rewrite", "soft_shared", "n=3", "--best").code == 0
    said = run(*finetune(here, "--steps", 1, *KEYS, "--json"))
    assert said.code == 0 and said.json["recovered"]["selection_perplexity"]["before"] is None
    said = run(*finetune(here, "--steps", 1, *KEYS, "--force"))
    assert said.code == 0 and "selection perplexity beyond numbers -> " in said.out


# ---------------------------------------------------------------- slices


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "give a size (--ffn, --width, --depth, --head) or a budget (--max-parameters, --max-latency)"),
        ("--ffn 0.3", "ffn is 0.3; allowed: 128, 64, 32, or as a share of 128"),
        ("--ffn half", "argument --ffn: 'half'; allowed: a whole number, or with a dot a share of the whole"),
        ("--ffn 64,", "argument --ffn: ''; allowed"),
        ("--ffn 64,64", "ffn has 2 numbers; allowed: one, or one for each of 6 layers"),
        ("--depth 0", "argument --depth: '0'; allowed"),
        ("--width nan.", "argument --width: 'nan.'; allowed"),
        ("--max-latency 2", "argument --max-latency: '2'; allowed: a number above 0, up to 1"),
        ("--max-parameters 70k --ffn 0.5", "a budget chooses the size, and ffn is given as well"),
        ("--max-parameters 1", "max_parameters=1 is out of reach; the smallest slice, "),
        ("--ffn 0.5 --max-tokens 99", "--split and --max-tokens are for a budget"),
        ("--ffn 0.5 --text-column body", "--split and --max-tokens are for a budget"),
        ("--ffn 0.5 --dtype half", "unknown dtype 'half'"),
        ("--fnn 0.5", "unknown option --fnn (did you mean '--ffn'?)"),
    ],
)
def test_slices_that_cannot_be(line, said, nested_run, tmp_path, refused):
    assert said in refused("slice", nested_run, "--out", tmp_path / "out", *line.split())


def test_a_slice_and_what_it_prints(nested_run, made_run, tmp_path, run, refused):
    out = tmp_path / "out"
    assert "has no smaller models nested in it" in refused("slice", made_run, "--out", out, "--ffn", "0.5")
    said = run("slice", nested_run, "--ffn", "64,64,0.25,0.25", "--depth", 4, "--out", out, "--json")
    assert said.code == 0 and said.json == {**stored(out / "report.json"), "path": str(out)}
    assert said.json["slice"] == "ffn-64x2-32x2_depth-4"
    assert "exists already" in refused("slice", nested_run, "--ffn", "0.5", "--out", out)
    said = run("slice", nested_run, "--ffn", "0.5", "--out", out, "--force")
    assert said.code == 0 and said.out.startswith(f"{out}: ffn-64\nlayers           6 -> 6\n")
    said = run("slice", nested_run, "--max-parameters", "75k", "--max-tokens", 200, "--out", tmp_path / "best")
    rows = stored(tmp_path / "best" / "report.json")["plan"]["candidates"]
    lines = said.out.splitlines()
    assert said.code == 0 and lines[0].startswith("perplexity on 200 tokens of ")
    for line, row in zip(lines[3:], rows, strict=False):
        assert line.startswith(row["slice"]) and f"{row['parameters']:,}" in line
        assert line.endswith("taken") == row["picked"] and f"{row['perplexity']:.2f}" in line


# ---------------------------------------------------------------- interrupted, and a full disk


def test_an_interrupt_is_one_line_and_gone_on_from(aligned_run, tmp_path, run, monkeypatch):
    other = shutil.copytree(aligned_run, tmp_path / "other")
    words = ["soft_shared", "n=3", "rank=4", *SEARCH, "--json"]
    whole = run(*search(other, *words))
    real = artifacts.write_json

    def write(*arguments):
        real(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "write_json", write)
        said = run(*search(aligned_run, *words))
    assert (said.code, said.out, said.err) == (130, "", "gpt2-compress: interrupted\n")
    best = ["rewrite", "--run", aligned_run, "--rewrite", "soft_shared", "n=3", "rank=4"]
    assert "has no finished search" in run(*best, "--best").err
    said = run(*search(aligned_run, *words))
    assert said.code == 0 and {**said.json, "run": str(other)} == whole.json
    assert (aligned_run / "windows.json").read_bytes() == (other / "windows.json").read_bytes()


def test_a_disk_that_fills_up_during_a_search(aligned_run, tmp_path, run, refused):
    other = shutil.copytree(aligned_run, tmp_path / "other")
    words = ["soft_shared", "n=3", "rank=4", *SEARCH]
    assert run(*search(other, *words)).code == 0
    size = (other / "windows.json").stat().st_size
    with largest_file(1000):  # not even the first score
        message = refused(*search(aligned_run, *words))
    assert "cannot write" in message and "windows.json: File too large" in message and "partial" not in message
    with largest_file(int(size * 0.8)):  # some of them
        said = run(*search(aligned_run, *words))
        assert said.code == 2 and said.out == "" and said.err.count("\n") == 1 and "File too large" in said.err
        document = stored(aligned_run / "windows.json")
        taken = sum(row["blocks"] > 0 for row in document["candidates"])
        assert 0 < taken < 4 and not document["complete"]
        refused(*search(aligned_run, *words))  # and again: what is there stays
    assert run(*search(aligned_run, *words)).code == 0
    assert (aligned_run / "windows.json").read_bytes() == (other / "windows.json").read_bytes()


def test_a_disk_that_fills_up_during_a_recovery(made_run, tmp_path, run, refused):
    other = shutil.copytree(made_run, tmp_path / "other")
    words = ["--steps", 2, *KEYS]
    assert run(*finetune(other, *words)).code == 0
    with largest_file(20_000):  # no checkpoint
        message = refused(*finetune(made_run, *words))
    assert "cannot write" in message and "File too large" in message and "partial" not in message
    before = tree(made_run)
    with largest_file(100_000):  # checkpoints, but no model
        said = run(*finetune(made_run, *words))
        assert said.code == 2 and said.out == "" and said.err.count("\n") == 1
        assert f"cannot write {made_run / 'recovered'}: " in said.err and "File too large" in said.err
    after = tree(made_run)
    assert {name: after[name] for name in before} == before and not (made_run / "recovered").exists()
    assert "checkpoints/recovered/state/state.safetensors" in after
    assert run(*finetune(made_run, *words, "--resume")).code == 0 and not (made_run / "checkpoints").exists()
    first, second = (load_file(folder / "recovered" / "model.safetensors") for folder in (made_run, other))
    assert all((first[name] == second[name]).all() for name in second)
    with largest_file(100_000):  # and what was recovered before stays
        kept = tree(made_run / "recovered")
        assert run(*finetune(made_run, *words, "--force")).code == 2 and tree(made_run / "recovered") == kept
