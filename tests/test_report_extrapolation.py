"""Perplexity by length: the tables, what stands where a model takes no more, the sentences."""

from __future__ import annotations

import dataclasses

import planted
import pytest
from planted import extrapolation, report, row, size

from compressor.benchmark import Gap
from compressor.report import extrapolation as told
from compressor.report.content import content
from compressor.report.figures import Gaps
from compressor.report.layout import Table
from compressor.report.markdown import document, terminal
from compressor.report.reach import positions, reaches
from compressor.report.tables import sizes

RATIOS = {64: 1.05, 512: 1.012, 1024: 0.98}
WHOLE = report(
    row("original", extrapolation(20, {64: 1.1}, takes=256)),
    row("control", extrapolation(19, {64: 1.1}, takes=256)),
    row("a: rewritten", planted.perplexity(20)),
    row("a: recovered", extrapolation(25, RATIOS)),
)


def tables(whole) -> dict[str, Table]:
    return {table.title: table for table in told.tables(whole, Gaps(whole))}


def sentences(whole) -> list[str]:
    return list(told.findings(whole, Gaps(whole)))


def test_lengths_stand_beside_each_other_in_both_kinds_of_windows():
    shown = tables(WHOLE)["Perplexity by length"]
    assert shown.header == ("model", "windows", "64 (0.25x)", "256 (1x)", "512 (2x)", "1,024 (4x)")
    beyond = ("takes 256 tokens",) * 2
    assert shown.body == (
        ("original", "sliding", "22.00 (1.100 ± 0.004)", "20.00", *beyond),
        ("original", "non-overlapping", "24.20 (1.100 ± 0.004)", "22.00", *beyond),
        ("control", "sliding", "20.90 (1.100 ± 0.004)", "19.00", *beyond),
        ("control", "non-overlapping", "22.99 (1.100 ± 0.004)", "20.90", *beyond),
        ("a: recovered", "sliding", "26.25 (1.050 ± 0.004)", "25.00", "25.30 (1.012 ± 0.004)", "24.50 (0.980 ± 0.004)"),
        ("a: recovered", "non-overlapping", "28.88 (1.050 ± 0.004)", "27.50", "27.83 (1.012 ± 0.004)",
         "26.95 (0.980 ± 0.004)"),
    )  # fmt: skip
    assert "same 4,095 tokens of wikitext" in shown.note and "advance by 0.5 of their length" in shown.note


def test_losses_by_position_are_what_they_are_above_the_same_tokens_elsewhere():
    shown = tables(WHOLE)["Loss by position in the window"]
    assert shown.header[1:3] == ("1 to 128", "129 to 256") and shown.header[-1] == "897 to 1,024"
    assert shown.body[0] == ("original", "+0.001", "+0.126", *["takes 256 tokens"] * 6)
    assert shown.body[2] == ("a: recovered", *(f"+{first / 1024:.3f}" for first in range(1, 1024, 128)))


def test_text_past_the_trained_length_has_the_text_itself_beside_it():
    shown = tables(WHOLE)["Text past the trained length"]
    assert shown.header == (
        "model", "decoding", "tokens 129 to 256: repeated", "tokens 385 to 512: repeated", "tokens 129 to 256: loss",
        "tokens 385 to 512: loss", "cache off by",
    )  # fmt: skip
    no = "takes 256 tokens"
    assert shown.body == (
        ("original", "greedy", "25.6%", no, "0.500", no, no),
        ("control", "greedy", "25.6%", no, "0.500", no, no),
        ("a: recovered", "greedy", "25.6%", "51.2%", "0.500", "0.500", "2e-06"),
        ("the text itself", "-", "2.0%", "2.0%", "-", "-", "-"),
    )
    assert shown.apart == 1


def test_sentences_say_what_was_found():
    assert sentences(WHOLE) == [
        "a: recovered, perplexity beyond the 256 tokens it was trained at against its own there: 2x +1.2 ± 0.4 %, 4x "
        "-2.0 ± 0.4 % (sliding); 2x +1.2 ± 0.4 %, 4x -2.0 ± 0.4 % (non-overlapping).",
        "original and control take no more than 256 tokens.",
        "Written greedily, tokens 385 to 512 repeat runs of four: a: recovered 51%; the text itself 2%.",
        "With the cache and without it the models choose the same tokens up to 512.",
    ]


def test_of_many_models_the_best_and_the_worst_are_named():
    rows = [row(f"m{place}: recovered", extrapolation(25, {1024: 1 + place / 100})) for place in range(5)]
    whole = report(row("original", extrapolation(20, {}, takes=256)), *rows)
    assert sentences(whole)[:3] == [
        "Of 5 models, m0: recovered loses least at 1,024 tokens: +0.0% (sliding) against its own at 256.",
        "Of 5 models, m4: recovered loses most at 1,024 tokens: +4.0% (sliding) against its own at 256.",
        "original takes no more than 256 tokens.",
    ]


def test_a_cache_that_computes_something_else_is_said():
    own = extrapolation(25, RATIOS)
    own[-1] = dataclasses.replace(own[-1], settings={**own[-1].settings, "cache_gap": 0.25})
    whole = report(row("original", extrapolation(20, {}, takes=256)), row("a", own))
    assert sentences(whole)[-1] == "The cache does not compute what the model does without it: a is off by 0.25 nats."


def test_where_nothing_was_measured_beyond_there_is_nothing_to_say():
    assert sentences(report(row("original", extrapolation(20, {64: 1.1}, takes=256)), row("a", planted.size(9)))) == []
    nothing = report(row("original", planted.size(10)))
    assert tables(nothing) == {} and sentences(nothing) == []


def test_a_gap_of_the_whole_metric_is_marked():
    gap = Gap("extrapolation", {"multiples": [2, 4]}, "takes 64 tokens; asked for 512, 1024")
    whole = report(row("original", extrapolation(20, {512: 1.0})), row("short", [], gap))
    assert tables(whole)["Perplexity by length"].body[2][1:] == ("sliding", "gap [1]", "gap [1]")
    assert "takes 64 tokens; asked for 512, 1024" in document(content(whole))


def test_two_texts_are_two_tables():
    other = extrapolation(30, RATIOS, fingerprint="cd" * 32)
    whole = report(row("original", [*extrapolation(20, RATIOS), *other]))
    assert [len(reach.rows) for reach in reaches(whole, Gaps(whole))] == [1, 1]
    values = [table.body[0][3] for table in told.tables(whole, Gaps(whole)) if table.title == "Perplexity by length"]
    assert values == ["20.00", "30.00"]


def test_windows_of_other_strides_are_two_tables():
    whole = report(row("original", [*extrapolation(20, RATIOS), *extrapolation(30, RATIOS, stride_share=0.25)]))
    assert len(reaches(whole, Gaps(whole))) == 2


def test_other_trained_lengths_are_not_mixed():
    short = extrapolation(30, {512: 2.0}, takes=None, trained=128)
    whole = report(row("original", extrapolation(20, RATIOS)), row("other", short))
    one, other = reaches(whole, Gaps(whole))
    assert [(reach.trained, [item.name for item in reach.rows]) for reach in (one, other)] == [
        (256, ["original"]), (128, ["other"]),
    ]  # fmt: skip
    assert other.change(whole.rows[1], "sliding", 512) is None, "nothing was measured at 128"
    assert positions(one, whole.rows[1]) == []


@pytest.mark.parametrize("show", [lambda whole: document(content(whole)), lambda whole: terminal(whole, Gaps(whole))])
def test_the_tables_stand_in_the_report_and_on_the_terminal(show):
    shown = show(WHOLE)
    assert "Perplexity by length" in shown and "takes 256 tokens" in shown and "385 to 512" in shown


def test_samples_say_who_cannot():
    shown = document(content(WHOLE))
    assert "greedy, from token 257 on" in shown and "(cannot: takes 256 tokens)" in shown and "and so on" in shown


def test_positions_stand_in_the_table_of_sizes_where_they_differ():
    def counted(total: int, held: int):
        (first, *others) = size(total)
        return [dataclasses.replace(first, settings={**first.settings, "positions": held}), *others]

    whole = report(row("original", counted(124_439_808, 786_432)), row("alibi", counted(123_654_288, 768)))
    shown = sizes(whole, Gaps(whole))
    place = shown.header.index("positions")
    assert [line[place] for line in shown.body] == ["786,432 (0.63%)", "768 (0.00%)"]
    same = report(row("original", counted(10, 4)), row("other", counted(8, 4)), row("older", size(9)))
    assert "positions" not in sizes(same, Gaps(same)).header
