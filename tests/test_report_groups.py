"""Bars of counts: as high as their figures, named, with room for what stands over them."""

from __future__ import annotations

from itertools import pairwise

import pytest

from compressor.report import drawing
from compressor.report.groups import KINDS, Bar, Group, plot

GROUPS = [
    Group("one", (Bar("a", 7.36, "7.36", "original"), Bar("b", 8.47, "8.47\n+15.1 %", "own"))),
    Group("two", (Bar("a", 51.5, "51.5", "original"), Bar("b", 87.1, "87.1\n+69.3 %", "beside"))),
]


def _drawn(**given):
    with drawing.look():
        figure = plot(GROUPS, "millions", **given)
        drawing.png(figure)
    return figure


def test_bars_are_their_figures():
    figure = _drawn()
    for axes, group in zip(figure.axes, GROUPS, strict=True):
        assert axes.get_title(loc="left") == group.title
        found = {(round(bar.get_x() + bar.get_width() / 2), bar.get_height()) for bar in axes.patches}
        assert found == {(place, bar.value) for place, bar in enumerate(group.bars)}
        assert [text.get_text() for text in axes.texts] == [bar.label for bar in group.bars]
        assert [tick.get_text() for tick in axes.get_xticklabels()] == [bar.name for bar in group.bars]
        assert axes.get_ylim()[0] == 0
    assert figure.axes[0].get_ylabel() == "millions" and not figure.axes[1].get_ylabel()


def test_one_scale_or_each_its_own():
    assert len({axes.get_ylim() for axes in _drawn(one_scale=True).axes}) == 1
    one, two = (axes.get_ylim()[1] for axes in _drawn().axes)
    assert 8.47 < one < 12 and two > 87.1


@pytest.mark.parametrize("one_scale", [False, True])
def test_no_text_is_cut_or_covered(one_scale):
    figure = _drawn(one_scale=one_scale)
    whole = figure.bbox
    for axes in figure.axes:
        boxes = [text.get_window_extent() for text in axes.texts]
        ticks = [tick.get_window_extent() for tick in axes.get_xticklabels()]
        title = axes.title.get_window_extent()
        for box in (*boxes, *ticks):
            assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1
        for row in (boxes, ticks):
            assert not any(one.overlaps(other) for one, other in pairwise(row))
        assert all(box.y1 <= axes.bbox.y1 + 1 and not box.overlaps(title) for box in boxes)


def test_the_original_the_own_and_the_others_differ():
    assert len(set(KINDS.values())) == 3
