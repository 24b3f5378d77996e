"""A budget buys the slice that measures best within it, on text that it was not made with."""

from __future__ import annotations

import dataclasses
import json

import pytest
from conftest import forced, make_text

from compressor import pipeline, slicing
from compressor.errors import UserError
from compressor.metrics.perplexity import perplexity
from compressor.metrics.size import parameters
from compressor.models import open_model
from compressor.rewrites.matryoshka import chosen_by
from compressor.steps import slice_plan


def body(folder):
    return json.loads((folder / "report.json").read_text())


def test_a_budget_of_parameters_buys_the_best_measured(recovered_run, text_file, tmp_path, session):
    most = parameters(open_model(str(recovered_run)).model.slice(ffn=0.5)) + 5000  # room for some layers of 128
    said = pipeline.slice_model(str(recovered_run), tmp_path / "out", session, max_parameters=most, max_tokens=300)
    plan = said["plan"]
    rows = {row["slice"]: row for row in plan["candidates"]}
    whole = open_model(str(recovered_run))
    text, _ = slice_plan.selection_text("run", None, str(text_file), pipeline.Columns())
    assert plan["perplexity_of"]["tokens"] == 300 and text.part == "selection"
    sizes = slicing.sizes(whole.model.config, slicing.ALL)
    for name in sizes:
        within = parameters(whole.model.slice(**chosen_by(sizes[name], 32))) <= most
        assert (name in rows) == within  # what is over the budget was not measured
        if within:
            cut = slicing.cut(whole.model, sizes[name])
            own = perplexity(cut, whole.tokenizer, text, max_tokens=300)[0].value
            assert rows[name]["perplexity"] == pytest.approx(own, rel=1e-5)
            assert rows[name]["parameters"] == parameters(cut)
    mixed = [name for name in rows if "x" in name]
    assert len(mixed) >= 2 and all(rows[name]["parameters"] <= most for name in mixed)
    assert not rows["whole"]["within"] and rows["whole"]["latency"] is None
    (taken,) = [row for row in rows.values() if row["picked"]]
    assert taken["perplexity"] == min(row["perplexity"] for row in rows.values() if row["within"])
    costs = {name: (row["perplexity"], row["parameters"]) for name, row in rows.items()}
    for name, (loss, count) in costs.items():
        beaten = any(a <= loss and b <= count and (a, b) != (loss, count) for a, b in costs.values())
        assert rows[name]["front"] is not beaten
    counts = [row["parameters"] for row in plan["candidates"]]
    assert counts == sorted(counts, reverse=True) and {row["front"] for row in rows.values()} == {True, False}
    assert said["slice"] == taken["slice"] and said["parameters"] == taken["parameters"] <= most
    assert body(tmp_path / "out")["provenance"]["data"]["selection"]["fingerprint"] == text.fingerprint


def test_below_all_that_were_trained_there_are_smaller_ones(recovered_run, tmp_path, session):
    whole = open_model(str(recovered_run)).model
    sizes = slicing.sizes(whole.config, slicing.ALL)
    least = min(parameters(slicing.cut(whole, size)) for size in sizes.values())
    said = pipeline.slice_model(str(recovered_run), tmp_path / "out", session, max_parameters=least - 1, max_tokens=200)
    assert said["slice"] not in sizes and said["parameters"] == parameters(open_model(str(tmp_path / "out")).model)
    assert said["parameters"] < least


def test_a_budget_of_time(recovered_run, tmp_path, session, monkeypatch):
    """With a clock by which a prompt takes as long for all, and each of 3 tokens by parameters."""

    whole = parameters(open_model(str(recovered_run)).model)
    result = dataclasses.make_dataclass("Result", ["value", "settings"])

    def measure(subjects, **settings):
        counts = [parameters(subject.model) for subject in subjects]
        assert counts[0] == whole  # which takes turns with the others
        return [[result(whole, {"new_tokens": 3, "models": 1}), result(count, {})] for count in counts]

    monkeypatch.setattr(slice_plan.latency, "measure", measure)
    out = tmp_path / "out"
    said = pipeline.slice_model(str(recovered_run), out, session, max_latency=0.7, max_tokens=200)
    for row in said["plan"]["candidates"]:
        if row["slice"] != "whole":
            assert row["latency"] == pytest.approx((1 + 3 * row["parameters"] / whole) / 4) and row["within"]
            assert row["latency"] <= 0.7
    assert any("x" in row["slice"] for row in said["plan"]["candidates"])
    assert said["plan"]["latency_of"] == {"new_tokens": 3}
    with pytest.raises(UserError, match=r"max_latency=0.01 is out of reach; the fastest slice of \d+, \S+, takes 0\."):
        pipeline.slice_model(str(recovered_run), tmp_path / "other", session, max_latency=0.01)
    both = pipeline.slice_model(
        str(recovered_run), out, forced(session), max_latency=0.7, max_parameters=int(0.5 * whole), max_tokens=200
    )
    assert both["parameters"] <= 0.5 * whole


def test_a_mix_that_is_slower_than_its_layers_say_leaves_the_one_with_a_layer_less(
    recovered_run, tmp_path, session, monkeypatch
):
    """The budget is what three layers of 128 neurons and three of 64 would take, and mixes take a little more."""
    result = dataclasses.make_dataclass("Result", ["value", "settings"])

    def measure(subjects, **settings):
        times = []
        for subject in subjects:
            neurons = [block.mlp.c_fc.nf for block in subject.model.transformer.h]
            times.append(sum(100 + own for own in neurons) + 20 * (len(set(neurons)) > 1))
        return [[result(0, {"new_tokens": 1}), result(time, {})] for time in times]

    monkeypatch.setattr(slice_plan.latency, "measure", measure)
    most = (3 * 228 + 3 * 164) / (6 * 228)
    said = pipeline.slice_model(str(recovered_run), tmp_path / "out", session, max_latency=most, max_tokens=200)
    mixed = {row["slice"] for row in said["plan"]["candidates"] if "128x" in row["slice"] and "64x" in row["slice"]}
    assert mixed == {"ffn-128x2-64x4", "ffn-64x4-128x2"}


def test_it_is_not_chosen_on_what_it_was_trained_on(recovered_run, text_file, tmp_path, session):
    other = tmp_path / "other.txt"
    other.write_text(make_text(300, seed=9))
    given = {"max_parameters": "70k", "max_tokens": 200}
    said = pipeline.slice_model(str(recovered_run), tmp_path / "a", session, source=str(other), **given)
    assert said["plan"]["perplexity_of"]["source"] == str(other)
    path = recovered_run / "recovered" / "report.json"
    report = json.loads(path.read_text())
    texts = report["provenance"]["data"]
    texts["training"] = texts["selection"]
    path.write_text(json.dumps(report))
    with pytest.raises(UserError, match=r"shares text with the training text that .* was made with"):
        pipeline.slice_model(str(recovered_run), tmp_path / "b", session, **given)
    path.unlink()
    with pytest.raises(UserError, match="does not say what it was made with; a budget needs text"):
        pipeline.slice_model(str(recovered_run / "recovered"), tmp_path / "b", session, **given)
