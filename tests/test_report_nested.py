"""Slices in a report beside models of their size: who stands beside whom, the ratio, the sentences."""

from __future__ import annotations

from planted import perplexity, report, row, size

from compressor.report import nested
from compressor.report.content import content
from compressor.report.figures import Gaps
from compressor.report.layout import Table
from compressor.report.markdown import document, terminal


def whole(*, quarter: float = 30.0, **changed):
    return report(
        row("original", [*size(1000), *perplexity(20)]),
        row("control", [*size(1000), *perplexity(19)]),
        row("a: rewritten", [*size(1010), *perplexity(20)]),
        row("a: recovered", [*size(1010), *perplexity(21)]),
        row("a: slice ffn-64 (rewritten)", [*size(800), *perplexity(90)]),
        row("a: slice ffn-32 (rewritten)", [*size(700), *perplexity(200)]),
        row("a: slice ffn-64", [*size(800), *perplexity(25)]),
        row("a: slice ffn-32", [*size(700), *perplexity(quarter)]),
        row("one: rewritten", [*size(800), *perplexity(95)]),
        row("one: recovered", [*size(800), *perplexity(24, **changed)]),
        row("shared: recovered", [*size(712), *perplexity(32)]),
        row("far: recovered", [*size(400), *perplexity(99)]),
    )


def the_table(made) -> Table:
    (found,) = nested.tables(made)
    return found


def test_every_model_stands_beside_the_slice_that_is_nearest_in_parameters():
    assert the_table(whole()).body == (
        ("a: slice ffn-64", "800", "90.00", "25.00", "one: recovered", "1.000", "24.00", "1.042"),
        ("a: slice ffn-32", "700", "200.00", "30.00", "shared: recovered", "1.017", "32.00", "0.938"),
    )


def test_what_was_measured_otherwise_is_not_compared():
    body = the_table(whole(stride=256)).body
    assert body[0] == ("a: slice ffn-64", "800", "90.00", "25.00", "-", "-", "-", "-")


def test_sentences():
    assert list(nested.findings(whole())) == [
        "a: slice ffn-64, perplexity 25.00, against models of its size: one: recovered 24.00 (+4.2%).",
        "a: slice ffn-32, perplexity 30.00, against models of its size: shared: recovered 32.00 (-6.2%).",
        "a from its largest to its smallest size, perplexity 21.00, 25.00, 30.00: a larger one is never worse.",
    ]
    assert list(nested.findings(whole(quarter=24.0)))[-1].endswith("21.00, 25.00, 24.00: not in order.")


def test_it_stands_in_the_report_and_on_the_terminal_where_something_is_nested():
    made = whole()
    assert nested.TITLE in document(content(made)) and nested.TITLE in terminal(made, Gaps(made))
    alone = report(row("original", [*size(10), *perplexity(20)]), row("one: recovered", [*size(8), *perplexity(21)]))
    assert list(nested.tables(alone)) == [] and list(nested.findings(alone)) == []
    lonely = report(*(row for row in made.rows if row.name.startswith(("original", "a: "))))
    assert list(nested.tables(lonely)) == [], "nothing stands beside a slice"
    assert list(nested.findings(lonely)) == [
        "a from its largest to its smallest size, perplexity 21.00, 25.00, 30.00: a larger one is never worse."
    ]
