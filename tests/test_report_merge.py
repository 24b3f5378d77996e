"""Several reports as one: nothing is lost, nothing is compared that was not measured alike."""

from __future__ import annotations

import dataclasses

import planted
from planted import imdb, latency, perplexity, row, size

from compressor.benchmark import Gap, Report
from compressor.report.figures import Gaps
from compressor.report.merge import data, merge
from compressor.report.tables import latencies, perplexities

METRICS = ({"metric": "size"}, {"metric": "perplexity"}, {"metric": "latency"})


def run(after: float, decode: float = 5.0, *, original: float = 10.0, control: str = "same", **changed) -> Report:
    rows = (
        row("original", [*size(100), *perplexity(20.0, **changed), *latency(100, original)], weights="0"),
        row("control", [*size(100), *perplexity(16.0, **changed), *latency(100, original)], weights=control),
        row("rewritten", [*size(80), *perplexity(50.0, **changed), *latency(80, decode)], weights=f"w{after}"),
        row("recovered", [*size(80), *perplexity(after, **changed), *latency(80, decode)], weights=f"r{after}"),
    )
    return Report(rows, planted.ORIGIN, METRICS)


def names(whole: Report) -> list[str]:
    return [item.name for item in whole.rows]


def test_one_report_stays_as_it_is():
    assert merge({"a": run(22.0)}, planted.ORIGIN) == run(22.0)


def test_the_original_and_a_shared_control_are_one_row():
    whole = merge({"a": run(22.0), "b": run(24.0)}, planted.ORIGIN)
    assert names(whole) == ["original", "control", "a: rewritten", "a: recovered", "b: rewritten", "b: recovered"]
    assert [whole.ratio(item, item.find("perplexity")) for item in whole.rows] == [1, 0.8, 2.5, 1.1, 2.5, 1.2]
    assert whole.metrics == METRICS


def test_controls_that_differ_stay_with_their_runs():
    whole = merge({"a": run(22.0), "b": run(24.0, control="other")}, planted.ORIGIN)
    assert names(whole)[1:] == [
        "a: control",
        "a: rewritten",
        "a: recovered",
        "b: control",
        "b: rewritten",
        "b: recovered",
    ]
    without = Report(run(24.0).rows[:1] + run(24.0).rows[2:], planted.ORIGIN, METRICS)
    whole = merge({"a": run(22.0), "b": without}, planted.ORIGIN)
    assert "a: control" in names(whole) and "control" not in names(whole)  # b has none


def test_originals_of_other_weights_are_rows_of_their_own():
    other = run(24.0)
    other = dataclasses.replace(other, rows=(dataclasses.replace(other.rows[0], weights="1"), *other.rows[1:]))
    whole = merge({"a": run(22.0), "b": other}, planted.ORIGIN)
    assert names(whole)[0] == "a: original" and "b: original" in names(whole)


def test_speed_is_compared_within_a_process_only():
    whole = merge({"quiet": run(22.0, 5.0, original=10.0), "busy": run(24.0, 15.0, original=30.0)}, planted.ORIGIN)
    _, decode = latencies(whole, Gaps(whole))
    shown = {line[0]: line[2] for line in decode.body}
    # 10 / 5 and 30 / 15; against the quiet original the second would be 0.67x
    assert shown["quiet: recovered (with quiet)"] == shown["busy: recovered (with busy)"] == "2.00x"
    assert shown["original (with quiet)"] == shown["original (with busy)"] == "1.00x"


def test_figures_on_other_text_have_no_ratio():
    whole = merge({"a": run(22.0), "b": run(24.0, fingerprint="77" * 32)}, planted.ORIGIN)
    first, second = perplexities(whole, Gaps(whole))
    assert {line[0]: line[3] for line in first.body}["a: recovered"] == "1.100"
    assert {line[0]: line[3] for line in second.body} == {
        "original": "1.000", "control": "0.800", "b: rewritten": "2.500", "b: recovered": "1.200",
    }  # fmt: skip


def test_what_a_run_did_not_ask_for_is_a_gap_of_its_rows():
    more = run(22.0)
    more = Report(
        tuple(dataclasses.replace(item, results=(*item.results, *imdb(0.8))) for item in more.rows),
        planted.ORIGIN, (*METRICS, {"metric": "imdb"}), planted.references(),
    )  # fmt: skip
    whole = merge({"a": more, "b": run(24.0)}, planted.ORIGIN)
    gaps = {item.name: [gap.reason for gap in item.gaps] for item in whole.rows}
    assert gaps["b: recovered"] == ["not asked for in the benchmark of b"]
    assert gaps["original"] == gaps["a: recovered"] == []
    assert [item.name for item in whole.references] == [item.name for item in planted.references()]
    assert whole.rows[0].find("imdb_accuracy").value == 0.8


def test_a_gap_that_another_report_fills_is_none():
    gap = Gap("imdb", {}, "no data")
    one, two = run(22.0), run(24.0)
    one = dataclasses.replace(one, rows=tuple(dataclasses.replace(item, gaps=(gap,)) for item in one.rows))
    two = dataclasses.replace(
        two, rows=tuple(dataclasses.replace(i, results=(*i.results, *imdb(0.8))) for i in two.rows)
    )
    whole = merge({"a": one, "b": two}, planted.ORIGIN)
    assert whole.rows[0].gaps == () and whole.rows[2].gaps == (gap,)


def test_a_model_that_several_name_alike_is_one_row():
    plain = row("distilgpt2", [*size(60), *perplexity(30.0)], weights="d")
    one, two = (dataclasses.replace(item, rows=(*item.rows, plain)) for item in (run(22.0), run(24.0)))
    assert names(merge({"a": one, "b": two}, planted.ORIGIN)).count("distilgpt2") == 1


def test_data_that_differ_are_told_apart():
    other = dataclasses.replace(planted.ORIGIN, data={"perplexity": {"source": "mine", "fingerprint": "77"}})
    found = data({"a": run(22.0), "b": dataclasses.replace(run(24.0), origin=other), "c": run(26.0)})
    assert {name: facts["source"] for name, facts in found.items()} == {
        "perplexity": "wikitext",
        "b: perplexity": "mine",
    }


def test_a_merged_report_survives_the_disk(tmp_path):
    from compressor.report import read, write

    whole = merge({"a": run(22.0), "b": run(24.0)}, planted.ORIGIN)
    write(tmp_path, whole, [planted.story("a"), planted.story("b")])
    assert read(tmp_path) == whole
