"""Slices as files: what they are, that finished ones stay, whatever interrupts or damages them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import NESTED, forced, largest_file, tree
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from compressor import artifacts, pipeline, run_folder, slicing, verify
from compressor.errors import UserError
from compressor.metrics.size import parameters
from compressor.models import find, open_model
from compressor.recipe import Finetune
from compressor.rewrites import from_record
from compressor.rewrites.matryoshka import chosen_by
from compressor.session import Columns
from compressor.steps import slice as step

NAMES = ["depth-4", "ffn-64", "ffn-32", "head-16", "width-16"]


def body(folder):
    return json.loads((folder / "report.json").read_text())


# ---------------------------------------------------------------- one


def test_a_slice_is_the_nested_models_and_says_where_it_comes_from(recovered_run, tiny_folder, tmp_path, session):
    out = tmp_path / "half"
    said = pipeline.slice_model(str(recovered_run), out, session, choice={"ffn": 0.5, "depth": 4})
    whole = open_model(str(recovered_run))
    cut = open_model(str(out))
    wanted = whole.model.slice(ffn=64, depth=4).state_dict()
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in cut.model.state_dict().items())
    report = body(out)
    assert {key: report[key] for key in said} == said and report["kind"] == "slice"
    assert report["slice"] == "ffn-64_depth-4" and report["made_from"]["start"] == whole.hash
    assert report["made_from"]["size"] == {"ffn": 64, "width": 32, "depth": 4, "head": 32}
    assert report["parameters"] == parameters(cut.model) < report["parameters_whole"] == parameters(whole.model)
    assert report["parameters_before"] == parameters(open_model(str(tiny_folder)).model)
    origin = report["provenance"]
    assert origin["base_hash"] == open_model(str(tiny_folder)).hash
    assert set(origin["data"]) == {"calibration", "training", "selection"}  # what the nested model was made with
    assert all(check.passed for check in verify.verify(cut))
    assert "slice" in (out / "README.md").read_text()


@pytest.mark.parametrize("choice", [{"ffn": 64}, {"ffn": 32, "width": 16}])
def test_a_uniform_slice_is_plain(choice, nested_run, tmp_path, session):
    """Of a nested model in GPT-2's own basis, or narrower than a rotated one."""
    if "width" not in choice:
        shutil.rmtree(nested_run / "rewritten")
        pipeline.rewrite(nested_run, [from_record({"rewrite": "matryoshka", "ffn": [0.5]})], session)
    pipeline.slice_model(str(nested_run), tmp_path / "cut", session, choice=choice)
    assert not list((tmp_path / "cut").glob("*.py"))
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "cut"), GPT2LMHeadModel)


def test_what_comes_after_a_slice(nested_run, tmp_path, session):
    """inspect, benchmark, export and, as a run's rewritten model, recovery."""
    mixed = {"ffn": [64, 64, 64, 32], "depth": 4}
    run = tmp_path / "run"
    run.mkdir()
    for file in nested_run.glob("alignment.*"):
        shutil.copy(file, run)
    pipeline.slice_model(str(nested_run), run / "rewritten", session, choice=mixed)
    told = pipeline.inspect(str(run / "rewritten"))
    assert told["layers"] == 4 and told["compression"][0]["only"]["ffn"] == [64, 64, 64, 32]
    dense = pipeline.export(str(run / "rewritten"), tmp_path / "dense", session)
    assert dense["layers"] == 4
    ids = torch.arange(1, 30)[None]
    models = [open_model(str(folder)).model for folder in (run / "rewritten", tmp_path / "dense")]
    with torch.no_grad():
        assert (models[0](ids).logits - models[1](ids).logits).abs().max() <= 1e-4
    settings = Finetune(steps=1, batch_tokens=64, context=32, selection_tokens=64, train="lora", control=False)
    recovered = pipeline.finetune(run, settings, session)["recovered"]
    assert recovered["parameters"] == parameters(models[0]) and recovered["rewrites"] == told["compression"]
    result = pipeline.compare([str(run)], tmp_path / "out", ["size"], {}, session)
    assert [row.name for row in result.rows] == ["original", "rewritten", "recovered"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "give a size (--ffn, --width, --depth, --head) or a budget"),
        ({"choice": {"ffn": 0.5}, "max_parameters": "70k"}, "a budget chooses the size, and ffn is given as well"),
        ({"choice": {"ffn": 0.5}, "source": "demo"}, "--split and --max-tokens are for a budget"),
        ({"choice": {"ffn": 0.5}, "columns": Columns(split="test")}, "--split and --max-tokens are for a budget"),
        ({"choice": {"ffn": 0.3}}, "ffn is 0.3; allowed: 128, 64, 32, or as a share of 128"),
        ({"choice": {"width": 16, "head": 16}}, "head=16 with width=16: a narrower model's logits"),
        ({"max_parameters": "none"}, "max_parameters='none' is no number of parameters"),
        (
            {"max_parameters": 10},
            "max_parameters=10 is out of reach; the smallest slice, ffn-32_width-16_depth-4",
        ),
        ({"max_parameters": "70k", "source": "none.txt"}, "there is no such file"),
    ],
)
def test_slices_that_cannot_be(given, said, nested_run, tmp_path, session):
    before = tree(tmp_path)
    with pytest.raises(UserError) as error:
        pipeline.slice_model(str(nested_run), tmp_path / "out", session, **given)
    assert said in str(error.value) and "\n" not in str(error.value) and tree(tmp_path) == before


def test_models_and_places_that_cannot_be(nested_run, tiny_folder, tmp_path, session):
    def refused(path, out, session=session, **given):
        with pytest.raises(UserError) as error:
            pipeline.slice_model(str(path), out, session, **(given or {"choice": {"ffn": 0.5}}))
        return str(error.value)

    out = tmp_path / "out"
    assert "`gpt2-compress rewrite --rewrite matryoshka` makes one" in refused(tiny_folder, out)
    pipeline.slice_model(str(nested_run), out, session, choice={"head": 16})
    assert "is a slice already; cut the nested model that it came from" in refused(out, tmp_path / "more")
    kept = tree(out)
    assert "exists already" in refused(nested_run, out)
    assert "is the model to cut from" in refused(nested_run, nested_run / "rewritten", forced(session))
    assert "is no model's folder and is not replaced" in refused(nested_run, nested_run, forced(session))
    with largest_file(20_000):
        assert "File too large" in refused(nested_run, out, forced(session))
    assert tree(out) == kept
    said = pipeline.slice_model(str(nested_run), out, forced(session), choice={"ffn": 0.5})
    assert body(out)["slice"] == said["slice"] == "ffn-64"


# ---------------------------------------------------------------- of a run


def test_every_slice_of_a_run_before_and_after(recovered_run, session):
    made = step.make(recovered_run, "all", session)
    before, after = ([f"slice {name}{ending}" for name in NAMES] for ending in (" (rewritten)", ""))
    assert list(made) == [*before, *after] and run_folder.slices(recovered_run) == made
    assert list(run_folder.rows([str(recovered_run)])) == ["original", "rewritten", "recovered", *before, *after]
    twin = shutil.copytree(recovered_run, recovered_run.parent / "twin")
    assert "twin: slice ffn-64 (rewritten)" in run_folder.rows([str(recovered_run), str(twin)])
    for state, source in (("before", "rewritten"), ("after", "recovered")):
        whole = open_model(str(recovered_run / source))
        for name, size in slicing.sizes(whole.model.config, "all").items():
            own = load_file(recovered_run / "slices" / state / name / "model.safetensors")
            wanted = whole.model.slice(**chosen_by(size, 32)).state_dict()
            assert all(torch.equal(tensor, wanted[key]) for key, tensor in own.items()), name
    first, second = (recovered_run / "slices" / state / "ffn-64" for state in ("before", "after"))
    assert (first / "model.safetensors").read_bytes() != (second / "model.safetensors").read_bytes()


def test_finished_slices_stay_and_others_are_refused(nested_run, session, notices):
    made = step.make(nested_run, [{"ffn": 0.5}], session)
    assert list(made) == ["slice ffn-64 (rewritten)"]
    kept = tree(nested_run)
    assert step.make(nested_run, [{"ffn": 64}], session) == made and tree(nested_run) == kept
    more = step.make(nested_run, [{"ffn": 0.5}, {"depth": 4}], session)
    assert list(more) == ["slice depth-4 (rewritten)", "slice ffn-64 (rewritten)"]
    assert {name: content for name, content in tree(nested_run).items() if name in kept} == kept
    pipeline.rewrite(nested_run, [from_record({**NESTED, "importance": "energy"})], forced(session))
    run_folder.warn_of_strangers([str(nested_run)], notices.append)
    assert sum("was cut out of another rewritten model than" in notice for notice in notices) == 2
    with pytest.raises(UserError, match=r"ffn-64 was made otherwise \(start differ\); --force makes it anew"):
        step.make(nested_run, [{"ffn": 0.5}], session)
    step.make(nested_run, [{"ffn": 0.5}], forced(session))
    digest = artifacts.hash_files(list(find(str(nested_run / "rewritten")).files))
    assert body(nested_run / "slices" / "before" / "ffn-64")["made_from"]["start"] == digest


def test_what_an_interrupt_and_damage_leave(nested_run, session, monkeypatch):
    real, count = step.write, 0

    def write(*arguments):
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(step, "write", write)
        with pytest.raises(KeyboardInterrupt):
            step.make(nested_run, "all", session)
    place = nested_run / "slices" / "before"
    there = tree(place)
    assert len(run_folder.slices(nested_run)) == 2 and not list(place.glob(".*"))
    (place / ".gpt2-compress-partial-ffn-32").mkdir()  # a kill leaves it
    assert len(step.make(nested_run, "all", session)) == 5 and not list(place.glob(".*"))
    assert {name: content for name, content in tree(place).items() if name in there} == there
    (place / "ffn-64" / "report.json").write_text("{")
    with pytest.raises(UserError, match=r"is damaged|not readable JSON|was made otherwise") as error:
        step.make(nested_run, "all", session)
    assert "\n" not in str(error.value)
    step.make(nested_run, "all", forced(session))
    assert body(place / "ffn-64")["slice"] == "ffn-64"


def test_a_run_without_smaller_models(made_run, aligned_run, session):
    with pytest.raises(UserError, match="no smaller models are nested in this one"):
        step.make(made_run, "all", session)
    with pytest.raises(UserError, match="has no rewritten model yet"):
        step.make(aligned_run, "all", session)
