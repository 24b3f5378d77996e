"""plan says what comes out; inspect says what is there."""

from __future__ import annotations

import json

import pytest
from conftest import make_config, make_model

from compressor import facts, pipeline, show
from compressor.errors import UserError
from compressor.facts import inspect, plan
from compressor.metrics.flops import flops_per_token
from compressor.metrics.size import parameters
from compressor.models import build, find
from compressor.recipe import load
from compressor.rewrites import from_record
from compressor.rewrites.compose import structure

KEYS = {"layers", "parameters", "parameters_before", "bytes", "flops_per_token"}  # of the contract
CASES = [
    ("soft_shared", ["n=3", "rank=4", "search=null"]),
    ("soft_shared", ["n=2", "rank=0", "scope=tile", "bias=shared", "delta_init=svd", "base=mean"]),
    ("merged_4", ["n=3", "start=2"]),
    ("merged_4", ["n=3", "tie=false", "search=null"]),
    ("compressed_4", ["n=4", "search=null"]),
    ("compressed_4", ["n=2", "start=4", "collapse=mean"]),
    ("compressed_4", ["rewrites=[{rewrite: dropped_n, layers: [4, 1]}]"]),
    ("compressed_4", ["rewrites=[{rewrite: pruned, parameters: 60k}]"]),
]


@pytest.fixture(autouse=True)
def _no_stopwatch(monkeypatch):
    monkeypatch.setattr(facts, "_measured_flops", lambda: 1e9)


@pytest.mark.parametrize(("name", "keys"), CASES)
def test_the_plan_is_what_comes_out(name, keys, tiny_folder, aligned_run):
    chosen = load(name, [f"model={tiny_folder}", *keys])
    planned = plan(chosen)
    made = pipeline.rewrite(aligned_run, chosen.rewrites, pipeline.Session(device="cpu", quiet=True))
    for key in ("layers", "parameters", "parameters_before", "flops_per_token", "flops_per_token_before"):
        assert planned[key] == made[key], key
    assert made["bytes"] - 64 * 1024 < planned["bytes"] < made["bytes"]  # but for the file's header
    assert planned["bytes_before"] == made["bytes_before"]
    assert planned["rewrites"] == made["rewrites"]
    there = inspect(str(aligned_run))
    for key in ("layers", "parameters", "parameters_before", "flops_per_token", "structure", "model_type"):
        assert planned[key] == there[key], key
    assert there["bytes"] == made["bytes"] == (aligned_run / "rewritten" / "model.safetensors").stat().st_size
    assert set(planned) >= KEYS and set(there) >= KEYS
    json.dumps([planned, there], allow_nan=False)


def test_the_plan_with_a_recovery_is_what_is_left_after_it(tiny_folder):
    whole = plan(load("alibi", [f"model={tiny_folder}"]))
    positions = inspect(str(tiny_folder))["context"] * inspect(str(tiny_folder))["width"]
    assert whole["parameters"] < whole["parameters_before"]
    before = plan(load("alibi", [f"model={tiny_folder}", "finetune=null"]))
    assert before["parameters"] - whole["parameters"] == positions + inspect(str(tiny_folder))["width"]
    assert whole["structure"] == plan(load("alibi", [f"model={tiny_folder}", "rewrites.0.anneal=0"]))["structure"]


def test_windows_of_a_plan(tiny_folder):
    body = plan(load("soft_shared", [f"model={tiny_folder}", "n=3"]))
    assert body["windows"] == [{"rewrite": "soft_shared", "layers": [1, 2, 3], "anchor": 2}]
    body = plan(load("compressed_4", [f"model={tiny_folder}", "n=3", "scope=tile"]))
    assert [window["layers"] for window in body["windows"]] == [[0, 1, 2], [3, 4, 5]] and body["layers"] == 2
    assert body["layers_kept"] == [1, 4]


def test_a_window_that_is_to_be_searched_for_stands_in_the_middle_or_where_there_is_room(tiny_folder):
    body = plan(load("soft_shared", [f"model={tiny_folder}", "n=3"]))
    assert body["searched"] == [True] and "the search chooses the window" in show.plan(body)
    two = "rewrites=[{rewrite: compressed_n, n: 2, start: 2}, {rewrite: soft_shared, n: 2, start: best}]"
    body = plan(load("soft_shared", [f"model={tiny_folder}", two]))
    assert body["searched"] == [False, True]
    layers = [window["layers"] for window in body["windows"]]
    assert layers[0] == [2, 3] and layers[1] in ([0, 1], [4, 5])


def test_the_work_grows_with_baselines_and_the_control(tiny_folder):
    def work(*keys):
        return plan(load("compressed_4", [f"model={tiny_folder}", "n=4", "finetune.steps=9", *keys]))["flops_to_make"]

    alone, control = work("finetune.control=false"), work("finetune.control=true")
    fit = facts.FIT_TOKENS * plan(load("compressed_4", [f"model={tiny_folder}", "n=4"]))["flops_per_token_before"]
    two = work("finetune.control=false", "benchmark.baselines=[pruned, dropped, gpt2]")
    assert two - alone == 2 * (control - alone + fit) > 0


def test_layers_that_calibration_text_is_to_choose(tiny_folder):
    """The plan is made without the text, and without taking layers that another rewrite takes."""
    records = "rewrites=[{rewrite: dropped_n, n: 3}, {rewrite: soft_shared, n: 2, start: 2}]"
    body = plan(load("soft_shared", [f"model={tiny_folder}", records]))
    assert body["layers"] == 4 and body["calibrated"] == [True, False]
    assert body["rewrites"][0]["layers"] == [1, 4] and set(body["layers_kept"]) == {0, 2, 3, 5}
    assert "calibration text will choose which layers go" in show.plan(body)
    body = plan(load("compressed_4", [f"model={tiny_folder}", "rewrites=[{rewrite: dropped_n, layers: [0]}]"]))
    assert body["calibrated"] == [False] and "calibration text" not in show.plan(body)


def test_a_shared_model_is_smaller_and_a_plain_average_is_not(tiny_folder):
    shared = plan(load("merged_4", [f"model={tiny_folder}", "n=4"]))
    ffn = 32 * 128 * 2 + 128 + 32
    assert shared["parameters"] == shared["parameters_before"] - 3 * ffn and shared["ratio"] < 1
    assert shared["flops_per_token"] == shared["flops_per_token_before"]
    plain = plan(load("merged_4", [f"model={tiny_folder}", "n=4", "tie=false"]))
    assert plain["ratio"] == 1.0 and plain["structure"] == plain["structure_before"]


def test_two_plans_with_one_structure_are_flagged(tiny_folder):
    """As compressed_6, 8 and 10 of the source: two groups of a small model each."""
    bodies = {
        n: plan(load("compressed_4", [f"model={tiny_folder}", f"n={n}", "scope=tile"])) for n in (1, 2, 3, 4, 5, 6)
    }
    groups = {n: -(-6 // n) for n in bodies}
    for n, body in bodies.items():
        assert body["layers"] == groups[n]
        alike = [f"n={m}" for m in groups if m != n and groups[m] == groups[n]]
        assert body["same_structure_as"] == (alike if n > 1 else [])  # n=1 is the original
        assert (body["structure"] == bodies[3]["structure"]) == (groups[n] == 2)
    assert bodies[3]["same_structure_as"] == ["n=4", "n=5"]


def test_plan_costs_nothing_and_writes_nothing(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("compressor.models.open_model", lambda *a, **k: pytest.fail("weights were read"))
    plan(load("soft_shared", [f"model={tiny_folder}", "n=3"]))
    inspect(str(tiny_folder))
    assert list(tmp_path.iterdir()) == []


def test_half_precision_counts_two_bytes(tmp_path, tiny_tokenizer):
    make_model(make_config()).half().save_pretrained(tmp_path)
    body = plan(load("compressed_4", [f"model={tmp_path}", "n=3"]))
    assert body["bytes"] == 2 * body["parameters"]
    assert inspect(str(tmp_path))["dtype"] == "float16"


def test_inspect_shows_a_model_a_run_and_a_run_without_a_model(tiny_folder, tiny_model, made_run, aligned_run):
    body = inspect(str(tiny_folder))
    assert body["parameters"] == body["parameters_before"] == parameters(tiny_model)
    assert (body["layers"], body["width"], body["heads"], body["context"], body["vocabulary"]) == (6, 32, 4, 64, 320)
    assert "alignment" not in body and body["compression"] == []
    body = inspect(str(made_run))
    assert body["compression"][0]["rewrite"] == "soft_shared" and body["parameters"] < body["parameters_before"]
    assert [(row["anchor"], row["layer"]) for row in body["alignment"]] == [(i, i + 1) for i in range(5)]
    assert body["made_by"]["base_model"] == str(tiny_folder)
    body = inspect(str(aligned_run))
    assert body["folder"] == str(tiny_folder) and len(body["alignment"]) == 5


def test_rewrites_of_a_recipe_are_resolved(tiny_folder):
    body = plan(load("compressed_4", [f"model={tiny_folder}", "n=3", "anchor=last"]))
    assert from_record(body["rewrites"][0]) == from_record(
        {"rewrite": "compressed_n", "n": 3, "start": 1, "anchor": 3, "collapse": "fit"}
    )


def test_the_plan_of_a_nested_model_lists_its_slices(tiny_folder):
    given = [f"model={tiny_folder}", "search=null"]
    body = plan(load("matryoshka", [*given, "ffn=[0.5]", "depth=[2]"]))
    assert [(row["slice"], row["layers"], row["model_type"]) for row in body["slices"]] == [
        ("ffn-64", 6, "gpt2"), ("depth-2", 2, "gpt2")
    ]  # fmt: skip
    rewrite = from_record({"rewrite": "matryoshka", "ffn": [0.5], "only": {"ffn": 0.5}})
    cut = build(structure([rewrite], find(str(tiny_folder)).config))
    first = body["slices"][0]
    assert (first["parameters"], first["flops_per_token"]) == (parameters(cut), flops_per_token(cut))
    assert "slice            ffn-64   6 layers, " in show.plan(body)
    body = plan(load("matryoshka", [*given, "ffn=[0.5]", "slices=[{ffn: [64, 64, 64, 128, 128, 128]}]"]))
    assert [row["slice"] for row in body["slices"]] == ["ffn-64x3-128x3"]
    assert len(plan(load("matryoshka", [*given, "slices=null"]))["slices"]) == 3
    assert plan(load("compressed_4", [f"model={tiny_folder}", "n=3"]))["slices"] == []
    with pytest.raises(UserError, match="slices: no smaller models are nested in this one"):
        plan(load("compressed_4", [f"model={tiny_folder}", "n=3", "slices=all"]))
