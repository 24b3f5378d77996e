"""The plots: what is in them, that their labels can be read, that they are the same each time."""

from __future__ import annotations

import dataclasses
import io
import math
import re
import warnings
import xml.etree.ElementTree as ET

import matplotlib
import planted
import pytest
from matplotlib.image import imread
from matplotlib.text import Text
from planted import imdb, latency, perplexity, report, row, size

from compressor.benchmark import Gap, Report
from compressor.report import bars, course, scatter
from compressor.report.drawing import DEFAULT, GREY, INK, look, looks, png, svg
from compressor.report.figures import Gaps
from compressor.report.pictures import FILES, pictures
from compressor.report.scatter import Point, frontier, points
from compressor.report.tasks import tasks

SMALL = report(
    row("gpt2", [*size(planted.SMALL), *perplexity(25.0), *latency(100, 10)]),
    row("control", [*size(planted.SMALL), *perplexity(22.0), *latency(100, 10)]),
    row("rewritten", [*size(110_529_792), *perplexity(40.0), *latency(90, 8)]),
    row("recovered", [*size(110_529_792), *perplexity(27.5), *latency(90, 8)]),
)


def drawn(draw, *given):
    with look(), warnings.catch_warnings():
        warnings.simplefilter("error")
        return draw(*given)


def words(figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(Text))


# ---------------------------------------------------------------- quality against cost


def test_what_stands_where():
    assert [(item.name, item.x, item.y) for item in points(SMALL, "parameters")] == [
        ("gpt2", 124.439808, 1.0), ("control", 124.439808, 0.88),
        ("rewritten", 110.529792, 1.6), ("recovered", 110.529792, 1.1),
    ]  # fmt: skip
    assert [item.x for item in points(SMALL, "decode_latency")] == [1, 1, 0.8, 0.8]
    assert [item.x for item in points(SMALL, "prefill_latency")] == [1, 1, 0.9, 0.9]


def test_a_pruned_model_stands_at_what_is_not_zero_and_the_plot_says_so():
    own = [*size(planted.SMALL, non_zero=100_000_000), *perplexity(30.0)]
    whole = report(*SMALL.rows, row("rewritten", own), row("pruned", own))
    assert [point.x for point in points(whole, "parameters")][-2:] == [124.439808, 100.0]  # deltas begin at 0
    assert "of pruned models those that are not zero" in words(drawn(scatter.plot, whole, "parameters"))
    assert "its file stores the zeros too" in scatter.caption(whole, "parameters")
    assert "not zero" not in scatter.caption(SMALL, "parameters")


def test_the_frontier_against_brute_force():
    coordinates = [(1, 5), (2, 3), (2, 4), (3, 3), (4, 1), (5, 1), (0.5, 9), (4, 0.9)]
    found = [Point(str(index), x, y, DEFAULT) for index, (x, y) in enumerate(coordinates)]
    expected = {
        name.name
        for name in found
        if all(other is name or other.x > name.x or other.y > name.y for other in found)
    }  # fmt: skip
    best = frontier(found)
    assert {item.name for item in best} == expected == {"6", "0", "1", "7"}
    assert [item.x for item in best] == sorted(item.x for item in best)
    assert [item.y for item in best] == sorted((item.y for item in best), reverse=True)


def test_recovered_models_are_joined_to_the_rewritten_by_an_arrow():
    figure = drawn(scatter.plot, SMALL, "parameters")
    arrows = [note for note in figure.axes[0].texts if note.arrow_patch is not None and not note.get_text()]
    assert [(note.xyann, note.xy) for note in arrows] == [((110.529792, 1.6), (110.529792, 1.1))]


def test_slices_of_one_model_are_joined_by_a_line_before_and_after():
    slices = [
        row(f"slice ffn-{ff}{ending}", [*size(count), *perplexity(score)])
        for ending, worse in ((" (rewritten)", 20), ("", 0))
        for ff, count, score in ((2, 100_000_000, 31.0 + worse), (1, 90_000_000, 36.0 + worse))
    ]
    whole = report(*SMALL.rows, *slices)
    figure = drawn(scatter.plot, whole, "parameters")
    corners = {(item.name, "rewritten" in item.name): (item.x, item.y) for item in points(whole, "parameters")[2:]}
    expected = [
        (":", [place for (_, before), place in corners.items() if before]),
        ("-", [place for (_, before), place in corners.items() if not before]),
    ]
    assert len(expected[0][1]) == 3
    lines = [(line.get_linestyle(), list(zip(*line.get_data(), strict=True))) for line in figure.axes[0].lines]
    for style, places in expected:
        assert any(kind == style and path == places for kind, path in lines), style
    assert "joined by a line, dotted before recovery" in scatter.caption(whole, "parameters")
    assert "joined by a line" not in scatter.caption(SMALL, "parameters")
    known = looks(whole)
    assert {known[item.name].colour for item in slices} == {known["recovered"].colour}
    assert [known[item.name].hollow for item in slices] == [True, True, False, False]


def test_what_has_no_comparable_figure_is_named_and_two_models_are_needed():
    other = row("elsewhere", [*size(100_000_000), *perplexity(9.0, fingerprint="77" * 32)])
    whole = report(*SMALL.rows, other)
    assert "elsewhere" not in [item.name for item in points(whole, "parameters")]
    assert "for want of a comparable figure: elsewhere." in scatter.caption(whole, "parameters")
    assert drawn(scatter.plot, report(SMALL.rows[0]), "parameters") is None
    assert drawn(scatter.plot, report(SMALL.rows[0], other), "parameters") is None
    broken = row("broken", [*size(100), *perplexity(math.nan)])
    assert drawn(scatter.plot, report(SMALL.rows[0], broken), "parameters") is None


def crowd(count: int) -> Report:
    rows = [row(f"start={index}", [*size(110_529_792), *perplexity(27.0 + index / 4)]) for index in range(count - 1)]
    return report(SMALL.rows[0], *rows)


@pytest.mark.parametrize("whole", [SMALL, crowd(10), crowd(24)], ids=["run", "10", "24"])
def test_labels_overlap_with_nothing(whole):
    figure = drawn(scatter.plot, whole, "parameters")
    (axes,) = figure.axes
    inside = axes.get_window_extent()
    names = [note for note in axes.texts if note.get_text()]
    boxes = [Text.get_window_extent(note, figure.canvas.get_renderer()) for note in names]
    assert len(boxes) == len(whole.rows)
    assert all(inside.contains(box.x0, box.y0) and inside.contains(box.x1, box.y1) for box in boxes)
    assert not any(one.overlaps(other) for index, one in enumerate(boxes) for other in boxes[:index])
    assert {row.name for row in whole.rows} <= {
        re.sub(r"^\d+ +| \(baseline\)$", "", text) for text in words(figure).splitlines()
    }


def test_wide_ratios_are_on_a_log_scale_with_plain_numbers_and_long_names_are_cut():
    rows = report(SMALL.rows[0], row("p" * 80, [*size(100_000_000), *perplexity(25_000.0)]))
    figure = drawn(scatter.plot, rows, "parameters")
    assert figure.axes[0].get_yscale() == "log"
    assert any(text.startswith("…") and len(text) == 40 for text in words(figure).splitlines())
    assert "mathdefault" not in words(figure) and "1000" in svg(figure, "x")


# ---------------------------------------------------------------- looks


def test_a_model_looks_the_same_everywhere_and_no_two_alike():
    whole = planted.study()
    known = looks(whole)
    assert len({(item.colour, item.marker, item.hollow) for item in known.values()}) == len(whole.rows) == 21
    assert known["original"].colour == INK
    assert known["merged_4: rewritten"].colour == known["merged_4: recovered"].colour
    assert known["merged_4: rewritten"].hollow and not known["merged_4: recovered"].hollow
    beside = [known[f"compressed_6: pruned{tail}"] for tail in ("", "-recovered")]
    assert [item.hollow for item in beside] == [True, False] and {item.colour for item in beside} == {GREY}


def test_nothing_of_matplotlib_is_changed():
    before = dict(matplotlib.rcParams)
    png(drawn(scatter.plot, SMALL, "parameters"))
    assert dict(matplotlib.rcParams) == before
    with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 30, "svg.fonttype": "path"}):
        own = svg(drawn(scatter.plot, SMALL, "parameters"), "x")
    assert own == svg(drawn(scatter.plot, SMALL, "parameters"), "x")


@pytest.mark.parametrize("name", ["a$b$c", "$\\frac$", "日本語", "<script>alert(1)</script>", "a & b"])
def test_any_name_can_be_drawn(name):
    rows = [SMALL.rows[0], row(name, [*size(100_000_000), *perplexity(30.0), *imdb(0.5)])]
    for picture in pictures(report(*rows), Gaps(report(*rows)), [planted.story(name)]):
        tree = ET.fromstring(picture.svg())
        shown = {" ".join("".join(node.itertext()).split()) for node in tree.iter() if node.tag.endswith("}text")}
        assert any(name in text for text in shown) or picture.file in ("recovery.png", "windows.png", "alignment.png")
        assert not [node for node in tree.iter() if node.tag.endswith("script")]


# ---------------------------------------------------------------- tasks


def test_bars_have_the_values_the_intervals_and_the_baselines():
    gap = Gap("imdb", {}, "too long")
    whole = report(
        row("original", imdb(0.86)),
        row("small", imdb(0.75)),
        row("short", [], gap),
        references=planted.references()[:2],
    )
    (axes,) = drawn(bars.plot, whole, tasks(whole, Gaps(whole))).axes
    assert [patch.get_width() for patch in axes.patches] == [0.86, 0.75, 0.5, 0.82]
    spans = sorted(
        (round(segment[0][0], 3), round(segment[1][0], 3))
        for bar in axes.containers
        if getattr(bar, "has_xerr", False)
        for segment in bar[2][0].get_segments()
    )
    assert spans == [(0.73, 0.77), (0.8, 0.84), (0.84, 0.88)]
    assert [text.get_text() for text in axes.get_yticklabels()] == [
        "original",
        "small",
        "short",
        "majority class *",
        "tf-idf *",
    ]
    assert "gap [1]" in words(axes) and "0.860" in words(axes)
    lines = [
        line.get_xdata()[0] for line in axes.lines if len(set(line.get_xdata())) == 1 and len(line.get_xdata()) == 2
    ]
    assert sorted(lines) == [0.5, 0.82, 0.86]  # through all bars: the baselines and the original
    assert axes.get_xlim()[0] == 0


def test_a_family_of_gaps_has_no_plot():
    whole = report(row("original", [], Gap("imdb", {}, "why")))
    assert drawn(bars.plot, whole, tasks(whole, Gaps(whole))) is None


# ---------------------------------------------------------------- the course of a run


def test_the_window_search_is_drawn_from_paired_distances():
    story = planted.story(search=planted.search(4, 12, original=True))
    (axes,) = drawn(course.windows, [story], {"": DEFAULT}).axes
    best = next(item for item in story.search.candidates if item.windows == story.search.winner)
    singles = [item for item in story.search.candidates if item.windows]
    curve = axes.containers[0]
    assert list(curve[0].get_xdata()) == list(range(9))
    assert list(curve[0].get_ydata()) == pytest.approx([math.exp(best.nll + item.behind) for item in singles])
    (segments,) = (collection.get_segments() for collection in curve[2])
    scores = [math.exp(best.nll + item.behind) for item in singles]
    assert [high[1] - low[1] for low, high in segments] == pytest.approx([2 * score * 0.01 for score in scores])
    marks = [line.get_marker() for line in axes.lines if len(line.get_xdata()) == 1]
    assert marks.count("x") == 2 and marks.count("D") == 1 and marks.count("o") == 6
    level = next(line for line in axes.lines if line.get_label() == "original")
    assert level.get_ydata()[0] == pytest.approx(math.exp(best.nll - 0.3))


def test_windows_without_a_score_are_left_out_and_a_huge_range_is_a_log_scale():
    search = planted.search()
    broken = dataclasses.replace(search.candidates[0], block_nll=(math.inf,) * 4, behind=math.inf)
    far = dataclasses.replace(search.candidates[1], behind=9.0)
    story = planted.story(search=dataclasses.replace(search, candidates=(broken, far, *search.candidates[2:])))
    (axes,) = drawn(course.windows, [story], {"": DEFAULT}).axes
    assert list(axes.containers[0][0].get_xdata()) == list(range(1, 9)) and axes.get_yscale() == "log"


def test_loss_curves_of_the_model_and_its_control():
    story = planted.story("mine")
    (axes,) = drawn(course.curves, [story], {"mine": DEFAULT}).axes
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines["recovered, training"].get_ydata()) == [loss for _, loss in story.curves[0].steps]
    assert list(lines["control, selection text"].get_xdata()) == [0, 20, 40, 60, 80, 100]
    assert axes.get_title(loc="left") == "mine: recovery (lora)"


@pytest.mark.parametrize("layers", [2, 12, 48])
def test_the_alignment_map_holds_every_pair(layers):
    item = planted.alignment(layers, direct=4 if layers > 8 else 0)
    axes = drawn(course.alignment, [planted.story(alignment=item)]).axes[0]
    (image,) = axes.images
    rows = [text.get_text() for text in axes.get_yticklabels()]
    table = dict(zip(rows, image.get_array().filled(math.nan).tolist(), strict=True))
    for pair in item.pairs:
        far = pair.layer - pair.anchor
        assert table["matched" + (f", {far} apart" if far > 1 else "")][pair.anchor] == pair.matched
        if far == 1:
            assert (table["same index"][pair.anchor], table["at random"][pair.anchor]) == (pair.identity, pair.random)
    assert sum(math.isfinite(value) for name in rows if "matched" in name for value in table[name]) == len(item.pairs)
    assert len([note for note in axes.texts]) == (0 if layers == 48 else len(item.pairs) + 2 * (layers - 1))


def test_runs_that_share_an_alignment_share_its_map():
    one, two = planted.alignment(tensors="same"), planted.alignment(tensors="other")
    told = [planted.story(name, alignment=item) for name, item in (("a", one), ("b", one), ("c", two))]
    assert [name for name, _ in course.distinct(told)] == ["a, b", "c"]
    nothing = planted.story(search=None, curves=(), alignment=None)
    assert (
        drawn(course.windows, [nothing], {})
        is drawn(course.curves, [nothing], {})
        is drawn(course.alignment, [nothing])
    )


# ---------------------------------------------------------------- pictures


def test_the_plots_of_a_run_are_pictures_and_the_same_each_time():
    whole = pictures(SMALL, Gaps(SMALL), [planted.story()])
    assert [item.file for item in whole] == [
        "perplexity_by_parameters.png", "perplexity_by_decode_time.png", "perplexity_by_prefill_time.png",
        "windows.png", "recovery.png", "alignment.png",
    ]  # fmt: skip
    assert {item.file for item in whole} <= set(FILES)
    again = pictures(SMALL, Gaps(SMALL), [planted.story()])
    for one, other in zip(whole, again, strict=True):
        content = one.png()
        picture = imread(io.BytesIO(content))
        assert picture.shape[1] == 1260 and 200 < picture.shape[0] < 900 and picture[..., :3].std() > 0.05
        assert (content, one.svg()) == (other.png(), other.svg())
        assert one.title and one.caption


def test_an_svg_stands_in_a_page_and_takes_its_colours():
    (picture, *_) = pictures(SMALL, Gaps(SMALL), [])
    text = picture.svg()
    root = ET.fromstring(text)
    assert root.tag.endswith("}svg") and text.startswith("<svg") and len(text) < 60_000
    assert "var(--ink)" in text and INK not in text and "<metadata" not in text and "<!--" not in text
    assert "gpt2 (baseline)" in "".join(root.itertext())  # text, not shapes
    ids = re.findall(r' id="([^"]+)"', text)
    assert ids and len(ids) == len(set(ids)) and all(name.startswith("perplexity_by_parameters-") for name in ids)
    used = re.findall(r'(?:href="#|url\(#)([^")]+)', text)
    assert set(used) == set(ids)
