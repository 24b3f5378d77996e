"""The tables, cell by cell, against figures worked out by hand."""

from __future__ import annotations

import dataclasses
import math

import planted
import pytest
from planted import latency, perplexity, report, row, size

from compressor.benchmark import Gap, Report, Row
from compressor.report import table
from compressor.report.figures import Gaps
from compressor.report.layout import Table
from compressor.report.tables import latencies, overview, perplexities, recoveries, sizes

THREE = report(
    row("gpt2", [*size(planted.SMALL), *perplexity(25.1678)]),
    row("soft_shared", [*size(110_529_792), *perplexity(28.0)]),
    row("control", [*size(planted.SMALL), *perplexity(22.1)]),
)


def columns(table: Table) -> dict[str, tuple[str, ...]]:
    return dict(zip(table.header, zip(*table.body, strict=True), strict=True))


def test_the_main_table_says_before_and_after():
    assert columns(overview(THREE, Gaps(THREE))) == {
        "model": ("gpt2", "soft_shared", "control"),
        "parameters": ("124,439,808", "110,529,792", "124,439,808"),
        "ratio": ("1.000", "0.888", "1.000"),
        "bytes": ("497.8 MB", "442.1 MB", "497.8 MB"),
        "FLOPs/token": ("247.1 M",) * 3,
        "perplexity": ("25.17", "28.00", "22.10"),
        "perplexity ratio": ("1.000", "1.113", "0.878"),
    }


def test_zeros_of_a_pruned_model_are_seen_in_the_main_table():
    pruned = report(THREE.rows[0], row("pruned", size(planted.SMALL, non_zero=planted.SMALL // 2)))
    shown = columns(overview(pruned, Gaps(pruned)))
    assert shown["non-zero"] == ("100.0%", "50.0%") and shown["ratio"] == ("1.000", "1.000")
    assert columns(sizes(pruned, Gaps(pruned)))["bytes ratio"] == ("1.000", "1.000")


def test_word_perplexity_and_error_stand_beside():
    (only,) = perplexities(THREE, Gaps(THREE))
    assert only.body[1] == ("soft_shared", "28.00", "0.28", "1.113", "42,000.00", "1.113", "16,383")
    assert only.note == "Context 1024, stride 512, 16,384 tokens of wikitext, test data, fingerprint abababababab."


def test_each_way_of_measuring_has_its_table_and_no_ratio_across():
    rows = (
        row("a", [*perplexity(20.0), *perplexity(30.0, "lm-eval")]),
        row("b", perplexity(44.0, fingerprint="99" * 32)),
        row("c", perplexity(33.0, "lm-eval")),
    )
    both = report(*rows)
    first, third, second = perplexities(both, Gaps(both))  # protocol by protocol
    assert [line[0] for line in first.body] == ["a"] and [line[0] for line in second.body] == ["a", "c"]
    assert third.body[0][:4] == ("b", "44.00", "0.44", "-")  # other text: nothing to compare with
    assert second.body[1][3] == "1.100"
    main = columns(overview(both, Gaps(both)))
    assert main["perplexity"] == ("20.00", "see below", "see below")


def test_what_was_not_measured_is_never_empty():
    gap = Gap("perplexity", {}, "no text")
    rows = (THREE.rows[0], row("mute", size(110_000_000), gap), row("bare", []))
    shown = report(*rows)
    main = columns(overview(shown, Gaps(shown)))
    assert main["perplexity"] == ("25.17", "gap [1]", "-") and main["perplexity ratio"][1:] == ("gap [1]", "-")
    assert all(cell.strip() for line in overview(shown, Gaps(shown)).body for cell in line)
    text = table(shown)
    assert "[1] perplexity of mute: no text" in text


def test_a_gap_of_all_models_still_has_its_table():
    rows = [row(name, perplexity(20.0), Gap("perplexity", {"protocol": "lm-eval"}, "no EOT")) for name in "ab"]
    both = report(*rows)
    strided, rolling = perplexities(both, Gaps(both))
    assert rolling.title == "Perplexity lm-eval" and rolling.note == "Not measured."
    assert columns(rolling)["perplexity"] == ("gap [1]", "gap [1]")
    assert "gap" not in str(strided.body)


def test_not_finite_is_said():
    broken = report(THREE.rows[0], row("broken", [*size(110_000_000), *perplexity(math.nan)]))
    main = columns(overview(broken, Gaps(broken)))
    assert main["perplexity"][1] == "not finite" and main["perplexity ratio"][1] == "-"


# ---------------------------------------------------------------- speed


def timed(name: str, *kinds: tuple[float, float, int, int]) -> Row:
    return row(name, [item for kind in kinds for item in latency(*kind)])


def test_speed_ups_by_batch_and_prompt():
    both = report(
        timed("original", (100.0, 13.1, 1, 256), (400.0, 20.0, 8, 256), (50.0, 12.0, 1, 64)),
        timed("shallow", (80.0, 10.0, 1, 256), (160.0, 25.0, 8, 256), (40.0, 8.0, 1, 64)),
    )
    prefill, decode = latencies(both, Gaps(both))
    assert decode.header == (
        "model",
        "batch 1, prompt 256: ms (p90)",
        "batch 1, prompt 256: speed-up",
        "batch 8, prompt 256: ms (p90)",
        "batch 8, prompt 256: speed-up",
        "batch 1, prompt 64: ms (p90)",
        "batch 1, prompt 64: speed-up",
    )
    # base median / own median: 13.1 / 10, 20 / 25, 12 / 8
    assert decode.body[1] == ("shallow", "10.00 (11.00)", "1.31x", "25.00 (27.50)", "0.80x", "8.00 (8.80)", "1.50x")
    assert prefill.body[1][2::2] == ("1.25x", "2.50x", "1.25x")  # 100/80, 400/160, 50/40
    assert [line[0] for line in decode.body] == ["original", "shallow"]  # one row a model
    main = columns(overview(both, Gaps(both)))
    assert main["decode speed-up"] == ("1.00x", "1.31x") and main["prefill ms"] == ("100.00", "80.00")


def test_the_terminal_has_a_latency_table_for_several_kinds_only():
    one = report(timed("a", (10.0, 1.0, 1, 64)), timed("b", (5.0, 1.0, 1, 64)))
    two = report(timed("a", (10.0, 1.0, 1, 64), (20.0, 2.0, 8, 64)), timed("b", (5.0, 1.0, 1, 64)))
    assert "latency" not in table(one) and "Prefill latency" in table(two)
    assert "-" in [cell.strip() for cell in latencies(two, Gaps(two))[0].body[1]]


def test_latencies_of_two_processes_are_compared_within_each():
    def of(process: str, *results):
        return tuple(
            dataclasses.replace(item, settings={**item.settings, "process": process}) for item in results
        )  # fmt: skip

    original = row("original", [*of("A", *latency(100, 10)), *of("B", *latency(300, 30))])
    rows = (original, row("A: x", list(of("A", *latency(50, 5)))), row("B: y", list(of("B", *latency(200, 20)))))
    both = report(*rows)
    prefill = latencies(both, Gaps(both))[0]
    assert [line[0] for line in prefill.body] == [
        "original (with A)", "original (with B)", "A: x (with A)", "B: y (with B)",
    ]  # fmt: skip
    assert [line[2] for line in prefill.body] == ["1.00x", "1.00x", "2.00x", "1.50x"]  # y: 300 / 200, not 100 / 200


def test_a_latency_gap_is_marked():
    gap = Gap("latency", {"batch": [1, 8]}, "out of memory")
    both = report(*(row(name, size(100), gap) for name in "ab"))
    for found in latencies(both, Gaps(both)):
        assert {line[1] for line in found.body} == {"gap [1]"}
    assert columns(overview(both, Gaps(both)))["prefill ms"] == ("gap [1]", "gap [1]")


# ---------------------------------------------------------------- recovery


def test_recovery_is_set_against_the_original_and_the_control():
    rows = [row("original", perplexity(20.0)), row("control", perplexity(16.0))]
    rows += [row("rewritten", perplexity(50.0)), row("recovered", perplexity(24.0))]
    whole = report(*rows)
    shown = columns(recoveries(whole, Gaps(whole)))
    assert shown["before / original"] == ("2.500",) and shown["after / original"] == ("1.200",)
    assert shown["after / control"] == ("1.500",) and shown[""] == ("this run",)
    beside = report(*rows, row("pruned", perplexity(80.0)), row("pruned-recovered", perplexity(40.0)))
    shown = columns(recoveries(beside, Gaps(beside)))
    assert shown[""] == ("this run", "pruned") and shown["after / control"] == ("1.500", "2.500")


def test_a_run_that_was_measured_in_another_way_has_its_own_original_there():
    values = {"original": 20.0, "control": 16.0}
    rows = [row(name, [*perplexity(value), *perplexity(value / 2, max_tokens=100)]) for name, value in values.items()]
    rows += [row(f"a: {step}", perplexity(30.0)) for step in ("rewritten", "recovered")]
    rows += [row(f"b: {step}", perplexity(15.0, max_tokens=100)) for step in ("rewritten", "recovered")]
    whole = report(*rows)
    shown = columns(recoveries(whole, Gaps(whole)))
    assert shown["original"] == ("20.00", "10.00") and shown["after / original"] == ("1.500", "1.500")


def test_a_shared_control_belongs_to_each_run_and_a_missing_one_is_said():
    rows = [row("original", perplexity(20.0)), row("control", perplexity(16.0))]
    for run, after in (("a", 24.0), ("b", 32.0)):
        rows += [row(f"{run}: rewritten", perplexity(50.0)), row(f"{run}: recovered", perplexity(after))]
    shown = columns(recoveries(report(*rows), Gaps(report(*rows))))
    assert shown[""] == ("a", "b") and shown["after / control"] == ("1.500", "2.000")
    without = report(rows[0], *rows[2:])
    assert columns(recoveries(without, Gaps(without)))["control"] == ("none", "none")
    assert recoveries(report(*rows[:3]), Gaps(report(*rows[:3]))) is None


# ---------------------------------------------------------------- layout


def many(count: int) -> Report:
    return report(
        *(
            row(
                f"variant {'x' * (index % 17)} {index}",
                [*size(planted.SMALL - index * 10 ** (index % 7)), *perplexity(25 + 3.0 ** (index % 9))],
            )
            for index in range(count)
        )
    )


def test_thirty_rows_stay_aligned():
    lines = table(many(30)).split("\n\n")[0].splitlines()
    assert len(lines) == 32
    assert len({len(line) for line in lines}) == 1 and len(lines[0]) < 130  # numbers end in one column


@pytest.mark.parametrize("name", ["a|b", "two\nlines", "<b>", "`x`"])
def test_a_name_is_one_cell(name):
    text = table(report(row(name, [*size(100), *perplexity(2.0)])))
    assert text.splitlines()[2].startswith(" ".join(name.split()))
