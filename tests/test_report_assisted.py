"""Drafts in a report: the table, the marks of models that have none, the sentences, no table without them."""

from __future__ import annotations

import planted
import pytest
from planted import assisted, report, row, size

from compressor.benchmark import Gap
from compressor.report import assisted as told
from compressor.report.content import content
from compressor.report.figures import Gaps
from compressor.report.markdown import document, terminal
from compressor.report.tasks import tasks

GAP = Gap("assisted", {}, "no smaller models are nested in it that could draft")
SLOW = {"ffn-64": (0.6, 3.5, 0.94), "ffn-32": (0.4, 2.5, 0.8)}
WHOLE = report(
    row("original", size(10), GAP),
    row("a: rewritten", assisted(SLOW)),
    row("a: recovered", assisted({"ffn-64": (0.8, 4.25, 1.31), "ffn-32": (0.5, 2.75, 1.1)}, same=0.75)),
)


def test_a_line_a_draft_and_a_mark_for_models_without():
    (shown,) = told.tables(WHOLE, Gaps(WHOLE))
    assert shown.header == (
        "model", "draft", "accepted", "tokens a pass", "speed-up (least to most)", "ms a token", "without a draft",
        "same text",
    )  # fmt: skip
    near = "75% (apart by 2e-06 nats)"
    assert shown.body == (
        ("a: rewritten", "ffn-64", "60.0%", "3.50", "0.94x (0.89 to 0.99)", "21.28", "20.00", "100%"),
        ("a: rewritten", "ffn-32", "40.0%", "2.50", "0.80x (0.75 to 0.85)", "25.00", "20.00", "100%"),
        ("a: recovered", "ffn-64", "80.0%", "4.25", "1.31x (1.26 to 1.36)", "15.27", "20.00", near),
        ("a: recovered", "ffn-32", "50.0%", "2.75", "1.10x (1.05 to 1.15)", "18.18", "20.00", near),
        ("original", "-", "gap [1]", *["-"] * 5),
    )
    assert "drafts 5 tokens at a time (constant)" in shown.note and "none may end the text" in shown.note


def test_sentences_name_the_draft_that_pays_or_that_none_does():
    assert list(told.findings(WHOLE)) == [
        "a: rewritten writes no faster with any of its slices as the draft; nearest is ffn-64: 60% of its tokens are "
        "accepted, 3.50 tokens a pass of the whole model, 0.94x as fast as without a draft.",
        "a: recovered writes fastest with its slice ffn-64 as the draft: 80% of its tokens are accepted, 4.25 tokens a "
        "pass of the whole model, 1.31x as fast as without a draft.",
        "a: recovered with a draft does not always write the same tokens as without (ffn-64 75%, ffn-32 75%): where "
        "they first differ the two are at most 2e-06 nats apart.",
    ]


def test_it_stands_once_in_the_report_and_on_the_terminal():
    for shown in (document(content(WHOLE)), terminal(WHOLE, Gaps(WHOLE))):
        assert shown.count(told.TITLE) == 1 and "1.31x (1.26 to 1.36)" in shown
        assert "no smaller models are nested" in shown
    assert tasks(WHOLE, Gaps(WHOLE)) == [], "it is no task"


def test_other_settings_have_a_table_of_their_own():
    more = [
        planted.dataclasses.replace(item, settings={**item.settings, "protocol": "greedy, 9 drafted tokens, constant"})
        for item in assisted(SLOW)
    ]
    both = report(row("a", [*assisted(SLOW), *more]))
    assert [len(table.body) for table in told.tables(both, Gaps(both))] == [2, 2]


@pytest.mark.parametrize("whole", [report(row("original", size(10))), report(row("original", size(10), GAP))])
def test_nothing_is_said_where_no_model_has_drafts(whole):
    assert list(told.tables(whole, Gaps(whole))) == [] and list(told.findings(whole)) == []
