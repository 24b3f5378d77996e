"""Which rows belong together, by their names."""

from __future__ import annotations

import pytest
from planted import report, row

from compressor import run_folder
from compressor.report.rows import (
    BASELINES,
    RECOVERED,
    SLICE,
    UNTRAINED,
    chains,
    counterparts,
    listed,
    member,
    named,
    pairs,
    part,
    results,
    runs,
)


def of(*names: str):
    return report(*(row(name, []) for name in names))


def test_the_names_are_those_that_benchmark_gives():
    assert (BASELINES, RECOVERED) == (run_folder.BASELINE_KINDS, run_folder.RECOVERED)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("recovered", ("", "recovered")),
        ("mine: control", ("mine", "control")),
        ("mine: pruned-recovered", ("mine", "pruned-recovered")),
        ("dropped", ("", "dropped")),
        ("a: b: rewritten", ("a: b", "rewritten")),
        ("original", ("original", "")),
        ("gpt2: large", ("gpt2: large", "")),
        ("my recovered", ("my recovered", "")),
        (": control", ("", "control")),
    ],
)
def test_the_run_and_the_step_of_a_row(name, expected):
    assert part(name) == expected


def test_a_runs_own_control_comes_before_a_shared_one():
    rows = [row("original", []), row("control", []), row("a: control", []), row("a: recovered", [])]
    assert member(report(*rows), "a", "control").name == "a: control"
    assert member(report(*rows), "b", "control").name == "control"
    assert member(report(*rows), "b", "recovered") is None


def test_what_was_measured_before_and_after_recovery():
    whole = of("original", "control", "rewritten", "recovered", "pruned", "pruned-recovered", "dropped-recovered")
    assert [(pair.name, pair.before.name, pair.after.name) for pair in pairs(whole)] == [
        ("", "rewritten", "recovered"), ("pruned", "pruned", "pruned-recovered"),
    ]  # fmt: skip
    several = of("original", "a: rewritten", "a: recovered", "b: dropped", "b: dropped-recovered")
    assert [(pair.name, pair.run) for pair in pairs(several)] == [("a", "a"), ("b: dropped", "b")]
    assert runs(several) == ["a"]


def test_what_a_report_is_about():
    whole = of(
        "original", "a: control", "a: rewritten", "b: rewritten", "b: recovered", "b: pruned", "b: pruned-recovered",
        "distilgpt2",
    )  # fmt: skip
    assert [item.name for item in results(whole)] == ["a: rewritten", "b: recovered", "distilgpt2"]
    assert [item.name for item in counterparts(whole, whole.rows[4])] == ["b: pruned-recovered"]
    assert [item.name for item in counterparts(whole, whole.rows[3])] == ["b: pruned"]
    assert counterparts(whole, whole.rows[2]) == counterparts(whole, whole.rows[-1]) == []


def test_models_in_a_sentence():
    assert [listed(words) for words in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]
    assert named(["a", "b"]) == "a and b" and named("abcd") == "4 models"


def test_slices_belong_to_the_run_that_they_are_of():
    assert SLICE == run_folder.SLICE and UNTRAINED == run_folder.UNTRAINED
    assert part("slice ffn-8") == ("", "slice ffn-8") and part("mine: slice a (rewritten)")[0] == "mine"
    whole = of(
        "original", "control", "rewritten", "recovered", "slice ffn-8 (rewritten)", "slice ffn-4 (rewritten)",
        "slice depth-2 (rewritten)", "slice ffn-8", "slice ffn-4", "slice depth-2",
    )  # fmt: skip
    assert [(pair.name, pair.before.name, pair.after.name) for pair in pairs(whole)][1:] == [
        (name, f"{name} (rewritten)", name) for name in ("slice ffn-8", "slice ffn-4", "slice depth-2")
    ]
    assert [item.name for item in results(whole)] == ["recovered", "slice ffn-8", "slice ffn-4", "slice depth-2"]
    assert [[item.name for item in chain] for chain in chains(whole)] == [
        ["rewritten", "slice ffn-8 (rewritten)", "slice ffn-4 (rewritten)"],
        ["rewritten", "slice depth-2 (rewritten)"],
        ["recovered", "slice ffn-8", "slice ffn-4"],
        ["recovered", "slice depth-2"],
    ]
    before = of("original", "a: rewritten", "a: slice ffn-8 (rewritten)", "b: slice ffn-8")
    assert [item.name for item in results(before)] == ["a: rewritten", "a: slice ffn-8 (rewritten)", "b: slice ffn-8"]
    assert len(chains(before)) == 2 and pairs(before) == []
