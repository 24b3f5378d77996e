"""Which figures belong together, and how gaps are numbered."""

from __future__ import annotations

import planted
import pytest
from planted import imdb, perplexity, report, row

from compressor.benchmark import Gap
from compressor.metrics import METRICS
from compressor.report.figures import (
    GIVES,
    TASKLESS,
    Gaps,
    family,
    interval,
    scaled,
    way_of,
    ways,
)


def test_every_metric_says_what_it_gives():
    assert set(TASKLESS) <= set(GIVES)
    assert family("rougeL") == "rouge" and family("word_perplexity") == "perplexity" and family("other") == "other"
    assert set(METRICS) <= set(GIVES), "a metric whose figures have no place in the report"


def test_ways_come_in_order_and_take_in_gaps_of_their_own():
    rows = (
        row("a", [*perplexity(2.0), *perplexity(3.0, "lm-eval")]),
        row("b", perplexity(3.0, "lm-eval"), Gap("perplexity", {"protocol": "strided"}, "why")),
        row("c", [], Gap("perplexity", {"context": 17}, "why not")),
    )
    found = ways(report(*rows), "perplexity")
    assert [way.settings.get("protocol") for way in found] == ["strided", "lm-eval", None]
    gaps = Gaps(report(*rows))
    assert [gaps.mark(rows[1], way) for way in found] == ["gap [1]", "-", "-"]
    assert [gaps.mark(rows[2], way) for way in found] == ["-", "-", "gap [2]"]


def test_of_one_protocol_what_most_rows_have_comes_first():
    rows = [row("a", [*perplexity(2.0, max_tokens=9), *perplexity(2.0)]), row("b", perplexity(2.0))]
    found = ways(report(*rows, row("c", perplexity(3.0, "lm-eval"))), "perplexity")
    assert [(way.settings["protocol"], way.settings.get("max_tokens")) for way in found] == [
        ("strided", None), ("strided", 9), ("lm-eval", None),
    ]  # fmt: skip
    assert way_of(report(*rows), rows[1], "perplexity").settings.get("max_tokens") is None
    assert way_of(report(rows[0], row("c", perplexity(3.0, "lm-eval"))), row("c", []), "perplexity") is None


def test_gaps_are_numbered_by_reason_and_name_their_models():
    rows = [row(name, imdb(0.8) if name == "b" else [], Gap("rouge", {}, "no data")) for name in "abc"]
    rows.append(row("d", [], Gap("rouge", {"count": 5}, "no data"), Gap("imdb", {}, "too long")))
    found = Gaps(report(*rows)).reasons
    assert [(item.number, item.what, item.models) for item in found] == [
        (1, "rouge", ("a", "b", "c")),
        (2, "rouge (count=5)", ("d",)),
        (3, "imdb", ("d",)),
    ]


def test_intervals_need_both_ends():
    (figure,) = imdb(0.8)
    assert interval(figure) == (0.78, pytest.approx(0.82))
    for spread in (
        None,
        {"standard_error": 1.0},
        {"low": 0.1},
        {"low": None, "high": 1.0},
        {"low": 0, "high": float("inf")},
    ):
        assert interval(type(figure)(**{**vars(figure), "spread": spread})) is None
    assert planted.perplexity(2.0)[0].spread and interval(planted.perplexity(2.0)[0]) is None


@pytest.mark.parametrize(
    ("value", "shown"), [(497_759_232, "497.8 M"), (1_557_611_200, "1.6 G"), (9_990, "10.0 k"), (12, "12 ")]
)
def test_scaled(value, shown):
    assert scaled(value) == shown
