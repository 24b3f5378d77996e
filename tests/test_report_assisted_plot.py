"""Drafts as bars: their lengths, their names, the line of the model without a draft, when there is no plot."""

from __future__ import annotations

import dataclasses

import pytest
from planted import assisted, report, row, size

from compressor.report import assisted_plot
from compressor.report.content import content
from compressor.report.drawing import look

DRAFTS = {"ffn-64": (0.8, 4.25, 1.31), "ffn-32": (0.5, 2.75, 0.9)}
WHOLE = report(row("original", size(10)), row("a: recovered", assisted(DRAFTS)))


def drawn(whole):
    with look():
        return assisted_plot.plot(whole)


def test_bars_are_as_long_as_the_figures():
    panels = drawn(WHOLE).axes
    found = [[bar.get_width() for bar in axes.patches] for axes in panels]
    assert found == [[0.8, 0.5], [4.25, 2.75], [1.31, 0.9]]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["ffn-64", "ffn-32"]
    ends = [segment[:, 0].tolist() for segment in panels[2].collections[0].get_segments()]
    assert ends == [pytest.approx([1.26, 1.36])]
    assert all(any(list(line.get_xdata()) == [1, 1] for line in axes.lines) for axes in panels[1:])


def test_whiskers_reach_from_the_least_to_the_most():
    one = {"ffn-64": (0.8, 4.25, 1.31)}
    results = [
        dataclasses.replace(item, spread={**item.spread, "least": 1.2, "most": 2.5}) if item.spread else item
        for item in assisted(one)
    ]
    panel = drawn(report(row("a: recovered", results))).axes[2]
    ends = [segment[:, 0].tolist() for segment in panel.collections[0].get_segments()]
    assert ends == [pytest.approx([1.2, 2.5])] and panel.get_xlim()[1] > 2.5


def test_drafts_of_several_models_have_their_names():
    both = report(row("a: rewritten", assisted(DRAFTS)), row("a: recovered", assisted(DRAFTS)))
    names = [label.get_text() for label in drawn(both).axes[0].get_yticklabels()]
    assert names == [f"a: {step}, {draft}" for step in ("rewritten", "recovered") for draft in DRAFTS]


def test_without_drafts_there_is_no_plot():
    assert drawn(report(row("original", size(10)))) is None
    assert "assisted.png" in [picture.file for picture in content(WHOLE).pictures]
