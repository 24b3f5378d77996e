"""Perplexity against context: which lines there are, where they end, when there is no plot."""

from __future__ import annotations

import planted
import pytest
from planted import extrapolation, report, row

from compressor.report import extrapolation_plot
from compressor.report.content import content
from compressor.report.drawing import INK, look
from compressor.report.figures import Gaps

WHOLE = report(
    row("original", extrapolation(20, {64: 1.1}, takes=256)),
    row("a: recovered", extrapolation(25, {64: 1.05, 512: 1.012, 1024: 0.98})),
)


def drawn(whole):
    with look():
        return extrapolation_plot.plot(whole, Gaps(whole))


def lines(axes, style: str):
    return [line for line in axes.lines if line.get_linestyle() == style and len(line.get_xdata()) > 1]


def test_sliding_is_solid_and_the_other_dashed_and_a_line_ends_with_what_its_model_takes():
    left, _ = drawn(WHOLE).axes
    for style, factor in (("-", 1.0), ("--", 1.1)):
        found = [line.get_xydata().tolist() for line in lines(left, style)]
        assert found[0] == [[64, pytest.approx(factor * 22)], [256, pytest.approx(factor * 20)]]
        assert [at for at, _ in found[1]] == [64, 256, 512, 1024]
        assert [value for _, value in found[1]] == pytest.approx([factor * v for v in (26.25, 25, 25.3, 24.5)])
    assert [tick.get_text() for tick in left.get_xticklabels()] == ["64", "256", "512", "1,024"]
    assert lines(left, "-")[0].get_color() == INK


def test_the_trained_length_is_marked_in_both():
    for axes in drawn(WHOLE).axes:
        assert any(list(line.get_xdata()) == [256, 256] for line in axes.lines)


def test_losses_by_position():
    _, right = drawn(WHOLE).axes
    found = [line.get_xydata().tolist() for line in right.lines[:2]]
    assert [at for at, _ in found[0]] == [128, 256]
    assert found[1] == [[first + 127, pytest.approx(first / 1024)] for first in range(1, 1024, 128)]


def test_every_model_has_one_name_in_the_legend():
    (legend,) = drawn(WHOLE).legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["original", "a: recovered", "sliding", "non-overlapping"]


def test_one_length_is_no_plot():
    assert drawn(report(row("original", extrapolation(20, {}, takes=256)))) is None
    assert drawn(report(row("original", planted.size(10)))) is None


def test_it_is_among_the_pictures_of_the_report():
    assert "extrapolation.png" in [picture.file for picture in content(WHOLE).pictures]
