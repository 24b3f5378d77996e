"""The contract of the command line: results to stdout, a mistake is one line on stderr, nothing is half-written."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import largest_file, make_config, make_model, make_text, tree
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from compressor.cli import main
from compressor.verify import Check

TWO = "rewrites: [{rewrite: soft_shared, n: 2, start: 0}, {rewrite: compressed_n, n: 2, start: %d}]\n"


def rewrite(run, *words):
    return ["rewrite", "--run", run, "--rewrite", *words]


# ---------------------------------------------------------------- the user's mistakes: the model


@pytest.fixture
def spoilt(tmp_path, tiny_folder):
    """A copy of the tiny checkpoint, to be spoilt."""
    return shutil.copytree(tiny_folder, tmp_path / "spoilt")


def _config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _weights(folder, name, value):
    tensors = load_file(folder / "model.safetensors")
    tensors[name].flatten()[0] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _misspell(folder):
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"n_embd"', '"n_embed"'))


def _truncate(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def _pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _no_tokenizer(folder):
    for file in folder.glob("token*"):
        file.unlink()


BAD_MODELS = {
    "not a GPT-2": (lambda f: _config(f, model_type="llama"), "is not a GPT-2: its model_type is 'llama'"),
    "no config": (lambda f: (f / "config.json").unlink(), "without config.json"),
    "invalid config": (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
    "a wrong type": (lambda f: _config(f, n_layer="six"), "not a valid GPT-2 configuration"),
    "a misspelt key": (_misspell, "which GPT-2 does not know (did you mean 'n_embd'?)"),
    "another depth": (lambda f: _config(f, n_layer=8), "the weight files lack"),
    "cross-attention": (lambda f: _config(f, add_cross_attention=True), "cross-attention"),
    "quantised": (lambda f: _config(f, quantization_config={"bits": 4}), "quantised"),
    "no tokenizer": (_no_tokenizer, "has no tokenizer"),
    "a damaged tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer cannot be read"),
    "truncated": (_truncate, "is damaged or truncated"),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "is damaged or truncated"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
    "pickle only": (_pickle, "pickle"),
    "NaN": (lambda f: _weights(f, "transformer.h.3.mlp.c_fc.weight", float("nan")), "holds NaN or infinite numbers"),
    "infinity": (lambda f: _weights(f, "transformer.wte.weight", float("inf")), "holds NaN or infinite numbers"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_models_that_cannot_be_used(case, spoilt, tmp_path, text_file, refused):
    spoil, said = BAD_MODELS[case]
    spoil(spoilt)
    message = refused("align", "--model", spoilt, "--data", text_file, "--run", tmp_path / "new" / "run")
    assert str(spoilt) in message and said in message


@pytest.mark.parametrize("command", ["inspect", "verify", "export", "benchmark", "plan"])
def test_every_command_refuses_a_bad_model(command, spoilt, tmp_path, refused):
    _truncate(spoilt)
    words = {
        "inspect": [spoilt],
        "verify": [spoilt],
        "export": [spoilt, "--dense", tmp_path / "out"],
        "benchmark": [spoilt, "--metrics", "size", "--out", tmp_path / "out"],
        "plan": ["soft_shared", f"model={spoilt}"],
    }
    assert "is damaged or truncated" in refused(command, *words[command])


def test_models_that_are_not_there(tmp_path, refused, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert "does not exist" in refused("inspect", tmp_path / "none")
    assert "could not be had from the hub" in refused("align", "--model", "someone/none", "--run", tmp_path / "run")
    assert "cannot be used here" in refused("verify", "demo", "--device", "gpu")
    assert "unknown dtype 'half'" in refused("verify", "demo", "--dtype", "half")


# ---------------------------------------------------------------- the text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "has no text"),
        (" \n\t\n ", "has no text"),
        ("A short text, of no use to anybody.", "tokens, one block needs 64"),
        (make_text(20), "tokens, one block needs 64"),  # some 700 tokens: calibration is 8 % of a single file
        (b"\xff\xfe\x00", "must be UTF-8 text"),
        (None, "there is no such file"),
    ],
)
def test_texts_that_cannot_be_used(content, said, tiny_folder, tmp_path, refused):
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert said in refused("align", "--model", tiny_folder, "--data", text, "--run", tmp_path / "run")


# ---------------------------------------------------------------- the rewrite


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["soft-shared"], "unknown rewrite 'soft-shared' (did you mean 'soft_shared'?)"),
        (["soft_shared", "rnak=4"], "(did you mean 'rank'?)"),
        (["soft_shared", "--rnak", "4"], "(did you mean 'rank'?)"),
        (["soft_shared", "--strat", "4"], "(did you mean 'start'?)"),
        (["soft_shared", "collapse=fit"], "unknown key of soft_shared 'collapse'"),
        (["soft_shared", "n=3", "--start", "4"], "start 4 with n 3 is out of range for 6 layers; allowed: 0 to 3"),
        (["soft_shared", "n=3", "--start", "-1"], "allowed: 0 to 3"),
        (["soft_shared", "n=7"], "n 7 is out of range for a model of 6 layers; allowed: 1 to 6"),
        (["soft_shared", "n=0"], "allowed: 1 to 6"),
        (["soft_shared", "n=three"], "n is 'three'; allowed: a whole number"),
        (["soft_shared", "n=3", "start=1", "anchor=4"], "anchor 4 is outside the window; allowed: 1 to 3"),
        (["soft_shared", "n=3", "anchor=midle"], "anchor is 'midle'"),
        (["soft_shared", "n=3", "rank=33"], "rank 33 is out of range; allowed: 0 to 32"),
        (["soft_shared", "n=3", "--rank", "-1"], "allowed: 0 to 32"),
        (["soft_shared", "n=3", "scope=tile", "--start", "0"], "start=0 with scope=tile"),
        (["soft_shared", "n=3", "--start", "1", "start=2"], "give it once"),
        (["soft_shared", "n=3", "start=best"], "search"),
        (["compressed_n", "n=3", "collapse=mode"], "collapse is 'mode'; allowed: mean, keep, sum, laco, fit"),
    ],
)
def test_rewrites_that_cannot_be(words, said, aligned_run, refused):
    assert said in refused(*rewrite(aligned_run, *words))


def test_overlapping_sites_and_bare_keys_of_several_rewrites(tmp_path, tiny_folder, refused, run):
    recipe = tmp_path / "two.yaml"
    recipe.write_text(TWO % 1)
    words = ["plan", recipe, f"model={tiny_folder}"]
    assert "both take over h.1.ln_2" in refused(*words)
    assert "rewrites.0.n, rewrites.1.n" in refused(*words, "n=3")
    assert "rewrites.0.n, rewrites.1.n" in refused(*words, "--n", "3")
    said = run(*words, "rewrites.1.start=4", "--json")
    assert said.code == 0 and said.json["layers"] == 5


def test_an_alignment_that_does_not_belong(tmp_path, tiny_folder, text_file, refused, run):
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    here = tmp_path / "run"
    assert run("align", "--model", model, "--data", text_file, "--run", here, "--max-tokens", 300).code == 0
    make_model(make_config(), seed=3).save_pretrained(model)
    assert "is of another model" in refused(*rewrite(here, "soft_shared", "n=3"))
    tensors = load_file(here / "alignment.safetensors")
    save_file(dict(list(tensors.items())[1:]), here / "alignment.safetensors")
    assert "does not belong to the alignment.json" in refused(*rewrite(here, "soft_shared", "n=3"))
    (here / "alignment.json").write_text("{")
    assert "is not readable JSON" in refused(*rewrite(here, "soft_shared", "n=3"))
    (here / "alignment.json").unlink()
    assert "`gpt2-compress align` makes it" in refused(*rewrite(here, "soft_shared", "n=3"))
    assert "`gpt2-compress align` makes it" in refused(*rewrite(tmp_path / "none", "soft_shared"))


def test_what_is_there_is_not_overwritten(made_run, tiny_folder, text_file, tmp_path, refused, run):
    assert "--force" in refused("align", "--model", tiny_folder, "--data", text_file, "--run", made_run)
    assert "--force" in refused(*rewrite(made_run, "soft_shared", "n=3"))
    assert "--force" in refused("export", made_run, "--dense", made_run / "rewritten")
    assert "is not replaced" in refused("export", made_run, "--dense", made_run, "--force")
    assert run("benchmark", made_run, "--out", made_run, "--metrics", "size").code == 0
    assert "--force" in refused("benchmark", made_run, "--out", made_run, "--metrics", "size")
    assert run(*rewrite(made_run, "soft_shared", "n=2", "rank=3", "--force")).code == 0
    assert json.loads((made_run / "rewritten" / "config.json").read_text())["ffn_groups"][0]["rank"] == 3
    (tmp_path / "file").write_text("x")
    assert "is a file" in refused("align", "--model", tiny_folder, "--data", text_file, "--run", tmp_path / "file")


# ---------------------------------------------------------------- usage


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "required: COMMAND"),
        ("plna soft_shared", "unknown command 'plna' (did you mean 'plan'?)"),
        ("plan", "required: RECIPE"),
        ("plan soft_sharde", "unknown recipe 'soft_sharde' (did you mean 'soft_shared'?)"),
        ("plan none.yaml", "recipe none.yaml cannot be read"),
        ("plan soft_shared rnak=4", "unknown key 'rnak' (did you mean 'rank'?)"),
        ("plan soft_shared n=40", "allowed: 1 to 12"),
        ("plan soft_shared --rank 4000", "rank 4000 is out of range"),
        ("plan soft_shared align.sit=pre", "(did you mean 'site'?)"),
        ("align --model demo --run r --n 4", "are for --pairs direct"),
        ("align --model demo --run r --pairs direct", "give --n"),
        ("align --model demo --run r --pairs direct --n 4 --anchor 99", "anchor 99"),
        ("align --model demo --run r rank=4", "unrecognized arguments: rank=4"),
        ("align --model demo --run r --max-tokens none", "--max-tokens"),
        ("align --model demo --run r --data wikitxt:", "names nothing"),
        ("rewrite --rewrite soft_shared", "required: --run"),
        ("benchmark demo", "required: --out"),
        ("benchmark demo --out o --metrics perplexty", "unknown metric 'perplexty' (did you mean 'perplexity'?)"),
        ("benchmark demo --out o --metrics size,size", "stands twice"),
        ("benchmark demo --out o --metrics ", "unknown metric ''"),
        ("benchmark demo --out o --suite quik", "unknown suite 'quik' (did you mean 'quick'?)"),
        ("benchmark demo --out o --data a.txt b.txt", "one D is given already (a.txt)"),
        ("benchmark demo --out o --data perplexity=a.txt perplexity=b.txt", "one D is given already"),
        ("benchmark demo demo --out o", "is named twice"),
        ("benchmark demo --out o --metrics size --data perplexity=demo", "which is not measured here"),
        ("benchmark demo --out o --data size=demo", "'size', which is not measured here or needs none"),
        ("benchmark demo --out ", "is no folder"),
        ("align --model demo --run ", "is no folder"),
        (f"align --model demo --run {'x' * 300}", "File name too long"),
        (f"inspect {'x' * 5000}", "File name too long"),
        ("verify demo --dtype float16", "verify computes in float32"),
        ("inspect", "required: PATH"),
        ("verify a b", "unrecognized arguments: b"),
        ("demo --recipe soft_shared n=99 --run r", "allowed: 1 to 12"),
    ],
)
def test_usage(line, said, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    assert said in refused(*line.split(" ") if line else ())


def test_an_interrupt_is_no_traceback(monkeypatch, run, tmp_path, tiny_folder):
    monkeypatch.setattr("compressor.facts.inspect", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.setattr("compressor.pipeline.inspect", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    said = run("inspect", tiny_folder)
    assert (said.code, said.out, said.err) == (130, "", "gpt2-compress: interrupted\n")


# ---------------------------------------------------------------- a full disk


# bytes: from where only the smallest files are written to where only the largest is not
@pytest.mark.parametrize("room", [600, 1500, 2600, 5000, 12_000, 100_000])
def test_no_room_for_one_of_a_steps_files(room, made_run, tiny_folder, text_file, tmp_path, refused):
    steps = {
        "alignment": ["align", "--model", tiny_folder, "--data", text_file, "--run", made_run, "--max-tokens", "200"],
        "new run": ["align", "--model", tiny_folder, "--data", text_file, "--run", tmp_path / "a" / "b"],
        "rewritten": rewrite(made_run, "soft_shared", "n=3", "rank=2"),
        "report": ["benchmark", made_run, "--out", tmp_path / "new" / "out", "--metrics", "size"],
        "dense": ["export", made_run, "--dense", tmp_path / "dense"],
    }
    largest = {"alignment": 9000, "new run": 9000, "report": 2000}  # all files of the step are smaller than this
    with largest_file(room):
        for step, words in steps.items():
            if room < largest.get(step, 300_000):
                message = refused(*words, "--force")
                assert "cannot write" in message and "File too large" in message and "partial" not in message


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a file system with so many pages of 4 KiB left, or skips."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = []

    def small_disk(content: Path, pages: int) -> Path:
        if mounted:
            subprocess.run(["umount", place], check=True)
            mounted.clear()
        answer = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", place], capture_output=True)
        if answer.returncode:
            pytest.skip("mounting is not allowed here")
        mounted.append(place)
        shutil.copytree(content, place / "run")
        left = os.statvfs(place)
        (place / "ballast").write_bytes(bytes(max(0, left.f_bavail * left.f_frsize - pages * 4096)))
        return place / "run"

    yield small_disk
    if mounted:
        subprocess.run(["umount", place], check=True)


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="mounting needs root")
@pytest.mark.parametrize("pages", [0, 1, 2, 30, 78, 80, 83, 86])
def test_a_disk_that_fills_up(pages, made_run, tiny_folder, text_file, tmp_path, run, small_disk):
    """A real one: what is written fails wherever it happens to, and what was there is still there."""
    steps = {
        "align": ["--model", tiny_folder, "--data", text_file, "--max-tokens", 200],
        "rewrite": ["--rewrite", "soft_shared", "n=3", "rank=4"],
    }
    for step, words in steps.items():
        here = small_disk(made_run, pages)
        before = tree(here.parent)
        said = run(step, "--run", here, *words, "--force")
        if said.code == 0 and step == "align" and pages > 5:
            continue
        assert said.code == 2 and said.out == "" and said.err.count("\n") == 1, (said.code, said.out, said.err)
        assert "No space left on device" in said.err and tree(here.parent) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(made_run, tiny_folder, text_file, refused):
    made_run.chmod(0o500)
    try:
        assert "cannot write" in refused("align", "--model", tiny_folder, "--data", text_file, "--run", made_run / "x")
        assert "cannot write" in refused(*rewrite(made_run, "soft_shared", "n=3"), "--force")
    finally:
        made_run.chmod(0o700)


# ---------------------------------------------------------------- results


def test_the_whole_pipeline_offline_on_a_local_model_and_text(tmp_path, tiny_folder, text_file, run, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *arguments: pytest.fail("the network was asked"))
    monkeypatch.chdir(tmp_path)
    common = ["--device", "cpu"]

    said = run("plan", "soft_shared", f"model={tiny_folder}", "n=3", "rank=4", "--json", *common)
    assert (said.code, said.err) == (0, "")
    planned = said.json
    assert {"layers", "parameters", "parameters_before", "bytes", "flops_per_token"} <= set(planned)

    said = run("align", "--model", tiny_folder, "--data", text_file, "--run", "r", "--max-tokens", 500, "--json")
    assert (said.code, said.err) == (0, "") and said.json["tokens"] == 500 and len(said.json["pairs"]) == 5

    said = run("rewrite", "--run", "r", "--rewrite", "soft_shared", "--n", 3, "--rank", 4, "base=lsq", "--json")
    assert said.code == 0 and "no --start given" in said.err and said.err.count("\n") == 1
    assert said.json["parameters"] == planned["parameters"] and 0 < said.json["bytes"] - planned["bytes"] < 65536

    said = run("benchmark", "r", "--out", "r", "--max-tokens", 300, "--json")
    assert (said.code, said.err) == (0, "")
    results = said.json["results"]
    assert {(row["model"], row["metric"]) for row in results} == {
        (model, metric)
        for model in ("original", "rewritten")
        for metric in ("perplexity", "word_perplexity", "parameters", "bytes", "flops_per_token", "cache_bytes")
    }
    for row in results:
        assert {
            "model",
            "protocol",
            "metric",
            "value",
            "unit",
            "higher_is_better",
            "count",
            "spread",
            "settings",
        } <= set(row)
    values = {(row["model"], row["metric"]): row for row in results}
    assert values["rewritten", "parameters"]["value"] == planned["parameters"]
    assert values["original", "parameters"]["value"] == planned["parameters_before"]
    assert values["original", "perplexity"]["settings"]["context"] == 64
    assert values["original", "perplexity"]["settings"]["stride"] == 32
    assert values["original", "perplexity"]["protocol"] == "strided"
    assert json.loads(Path("r/report.json").read_text())["results"] == results

    said = run("inspect", "r", "--json")
    assert (said.code, said.err) == (0, "")
    for key in ("layers", "parameters", "parameters_before", "flops_per_token", "cache_bytes"):
        assert said.json[key] == planned[key]
    assert said.json["bytes"] == Path("r/rewritten/model.safetensors").stat().st_size

    said = run("verify", "r", "--json")
    assert (said.code, said.err) == (0, "") and said.json["ok"] is True
    assert len(said.json["checks"]) == 14 and all(check["passed"] for check in said.json["checks"])

    said = run("export", "r", "--dense", "dense", "--json")
    assert (said.code, said.err) == (0, "") and said.json["parameters"] == planned["parameters_before"]
    dense, shared = (AutoModelForCausalLM.from_pretrained(folder) for folder in ("dense", "r/rewritten"))
    ids = torch.arange(40)[None]
    assert type(dense) is GPT2LMHeadModel
    torch.testing.assert_close(dense(ids).logits, shared(ids).logits, rtol=1e-4, atol=1e-4)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".pth", ".npy", ".npz")]
    assert not list(tmp_path.rglob(".gpt2*"))


def test_text_for_people(made_run, tiny_folder, text_file, tmp_path, run):
    said = run("plan", "compressed_4", "scope=tile", f"model={tiny_folder}")
    assert (
        said.code == 0
        and "layers           6 -> 2" in said.out
        and "n=3, n=5 would give the same structure" in said.out
    )
    said = run("plan", "merged_4", "tie=false", f"model={tiny_folder}")
    assert "the same structure as before: no smaller and no faster" in said.out
    said = run("align", "--model", tiny_folder, "--data", text_file, "--run", tmp_path / "r", "--max-tokens", 200)
    assert said.code == 0 and said.out.count("->") == 6 and said.err == ""
    said = run("align", "--model", tiny_folder, "--data", text_file, "--run", tmp_path / "s", "--method", "none")
    assert "every neuron stays where it is" in said.out
    said = run("inspect", made_run)
    assert "soft_shared: " in said.out and "rank=4" in said.out and "matched" in said.out
    said = run("benchmark", made_run, "--out", tmp_path / "out", "--metrics", "size")
    assert said.code == 0 and "rewritten" in said.out and f"written to {tmp_path / 'out'}" in said.out


def test_several_runs_and_models_side_by_side(made_run, tiny_folder, tmp_path, run):
    other = shutil.copytree(made_run, tmp_path / "other")
    said = run("benchmark", tiny_folder, made_run, other, "--out", tmp_path / "out", "--metrics", "size", "--json")
    assert [model["name"] for model in said.json["models"]] == [str(tiny_folder), "made: rewritten", "other: rewritten"]


def test_notices_go_to_stderr_unless_quiet(aligned_run, made_run, tmp_path, text_file, run):
    words = rewrite(aligned_run, "compressed_n", "n=2", "collapse=keep", "--json", "--force")
    assert "middle window" in run(*words).err
    said = run(*words, "--quiet")
    assert said.err == "" and said.json["layers"] == 5
    bench = ["benchmark", made_run, "--max-tokens", 200, "--data", text_file, "--json"]
    said = run(*bench, "--out", tmp_path / "a")
    assert said.code == 0 and "made with this text as its calibration data" in said.err and said.err.count("\n") == 1
    assert run(*bench, "--out", tmp_path / "b", "--quiet").err == ""


def test_a_recipe_from_a_file_with_keys_anywhere(tmp_path, tiny_folder, run):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"model: {tiny_folder}\nrewrites: [{{rewrite: soft_shared, n: 3}}]\n")
    plans = [
        run("plan", recipe, "rank=4", "--json"),
        run("plan", "rank=4", recipe, "--json"),
        run("plan", "--json", "--rank", "4", recipe),
        run("plan", "--rank=4", "--json", recipe, "seed=3"),
    ]
    assert {said.code for said in plans} == {0} and len({said.json["parameters"] for said in plans}) == 1
    assert plans[0].json["rewrites"][0]["rank"] == 4
    assert run("plan", recipe, "--json").json["rewrites"][0]["rank"] == 8


def test_the_seed_option_is_the_recipes_seed(tmp_path, tiny_folder, text_file, run):
    keys = [
        f"model={tiny_folder}",
        f"data={text_file}",
        "align.max_tokens=300",
        "benchmark.metrics=[size]",
        "n=3",
        "start=1",
        "finetune=null",
    ]
    said = run("demo", *keys, "--seed", 7, "--run", tmp_path / "r", "--json")
    assert said.code == 0 and {row["model"] for row in said.json["results"]} == {"original", "rewritten"}
    assert "seed: 7" in (tmp_path / "r" / "recipe.yaml").read_text()
    assert json.loads((tmp_path / "r" / "alignment.json").read_text())["provenance"]["seed"] == 7


def test_a_verification_that_fails_is_exit_code_1(tiny_folder, run, monkeypatch):
    checks = [Check("one", True, "well"), Check("two", False, "not well")]
    monkeypatch.setattr("compressor.verify.verify", lambda opened, trust: checks)
    said = run("verify", tiny_folder)
    assert (said.code, said.out, said.err) == (1, "ok    one: well\nFAIL  two: not well\n", "")
    said = run("verify", tiny_folder, "--json")
    assert (
        said.code == 1 and said.json["ok"] is False and [row["passed"] for row in said.json["checks"]] == [True, False]
    )


def test_a_reader_that_goes_away_is_no_traceback(tiny_folder, run, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        assert main(["inspect", str(tiny_folder)]) == 0  # and closing the file raises nothing


# ---------------------------------------------------------------- processes of their own


def process(*words, **options):
    return subprocess.run(
        [sys.executable, "-m", "compressor", *map(str, words)], capture_output=True, text=True, **options
    )


def test_help_needs_no_torch():
    script = """
import sys
from compressor.cli import main
try:
    main(["plan", "--help"])
finally:
    print([name for name in ("torch", "transformers", "datasets", "yaml", "numpy") if name in sys.modules])
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.returncode == 0 and "RECIPE" in ran.stdout and ran.stdout.endswith("[]\n"), ran.stderr
    ran = process("--version")
    assert ran.returncode == 0 and ran.stdout.startswith("gpt2-compress ")
    ran = process("plan", "soft_shared", "--seed", "x")
    assert ran.returncode == 2 and ran.stdout == "" and ran.stderr.count("\n") == 1


def test_no_bars_where_stderr_is_no_terminal(tmp_path, tiny_folder, text_file):
    ran = process("align", "--model", tiny_folder, "--data", text_file, "--run", tmp_path / "r", "--max-tokens", 200)
    assert ran.returncode == 0 and ran.stderr == "" and "matched" in ran.stdout
