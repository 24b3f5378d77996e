"""How a run went: the search for its window, its recovery, the match of its layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..windows import Candidate
from .drawing import GREY, INK, PAPER, Look, canvas, log_scale, panels, short
from .story import Alignment, Curve, Search, Story

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ANNOTATED = 16  # columns of a heat map whose cells have room for numbers


def _told(axes: Axes, story: Story, text: str) -> None:
    axes.set_title(f"{short(story.run)}: {text}" if story.run else text)


def _upright(axes: Axes, text: str) -> None:
    """What is measured, once in a line of panels."""
    place = axes.get_subplotspec()
    if place is None or place.is_first_col():
        axes.set_ylabel(text)


# ---------------------------------------------------------------- the search


def windows(stories: Sequence[Story], known: Mapping[str, Look]) -> Figure | None:
    """Perplexity right after the rewrite by the window's first layer, a panel a run; None without a search."""
    told = [(story, story.search) for story in stories if story.search is not None and _single(story.search)]
    if not told:
        return None
    figure, axes = panels(len(told), 3)
    for panel, (story, search) in zip(axes, told, strict=True):
        _windows(panel, search, known[story.run].colour)
        _upright(panel, "perplexity")
        _told(panel, story, search.rewrite)
    return figure


def _single(search: Search) -> list[Candidate]:
    """The candidates of one window that have a finite score."""
    return [item for item in search.candidates if len(item.windows) == 1 and math.isfinite(item.nll + item.behind)]


def _windows(axes: Axes, search: Search, colour: str) -> None:
    """Scores are those on the winner's blocks: its own and what each other is behind it on the blocks both have seen;
    a race drops windows early, and their plain perplexities are of other text."""
    best = next(item for item in search.candidates if item.windows == search.winner)
    lengths = sorted({item.window.n for item in _single(search)})
    for place, n in enumerate(lengths):
        line = sorted((item for item in _single(search) if item.window.n == n), key=lambda item: item.window.start)
        x = [item.window.start + 0.12 * (place - (len(lengths) - 1) / 2) for item in line]
        y = [math.exp(best.nll + item.behind) for item in line]
        errors = [score * (item.error or 0) for score, item in zip(y, line, strict=True)]
        tint = colour if len(lengths) == 1 else INK
        style = ("-", "--", ":", "-.")[place % 4]
        name = f"n = {n}" if len(lengths) > 1 else None
        axes.errorbar(x, y, yerr=errors, color=tint, ecolor=GREY, linewidth=1.1, linestyle=style, capsize=2, label=name)
        for across, score, item in zip(x, y, line, strict=True):
            axes.plot(across, score, color=tint, zorder=3, **_mark(search, item, tint))
    original = next((item for item in search.candidates if not item.windows and math.isfinite(item.behind)), None)
    if original is not None:
        score = math.exp(best.nll + original.behind)
        axes.axhline(score, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), label="original")
    if len(lengths) > 1 or original is not None:
        axes.legend()
    scores = [math.exp(best.nll + item.behind) for item in _single(search)]
    if max(scores) > 10 * min(scores):
        log_scale(axes)
    starts = sorted({item.window.start for item in _single(search)})
    axes.set_xticks(starts[:: 1 + len(starts) // 16])
    axes.set_xlabel("first layer of the window")


def _mark(search: Search, item: Candidate, colour: str) -> dict[str, Any]:
    if item.windows == search.winner:
        return {"marker": "D", "markersize": 8}
    if item.dropped:
        return {"marker": "x", "markersize": 7, "markeredgewidth": 2}
    return {"marker": "o", "markersize": 6, "markerfacecolor": colour if item.indistinguishable else PAPER}


WINDOWS = (
    "Perplexity of the selection text right after the rewrite, for every window. Bars are one paired standard error of "
    "the distance to the best (diamond); crosses were dropped by the race, filled circles are within the noise of the "
    "best."
)


# ---------------------------------------------------------------- recovery


def curves(stories: Sequence[Story], known: Mapping[str, Look]) -> Figure | None:
    """Loss by step of the recovered model and its control, a panel a run; None where nothing was trained."""
    told = [story for story in stories if story.curves]
    if not told:
        return None
    figure, axes = panels(len(told), 3)
    for panel, story in zip(axes, told, strict=True):
        for curve in story.curves:
            _curve(panel, curve, known[story.run].colour if curve.name == "recovered" else GREY)
        modes = dict.fromkeys(curve.train for curve in story.curves)
        _told(panel, story, f"recovery ({', '.join(modes)})")
        panel.set_xlabel("step")
        _upright(panel, "nats per token")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper right", ncols=4)
    return figure


def _curve(axes: Axes, curve: Curve, colour: str) -> None:
    finite = [(step, loss) for step, loss in curve.steps if math.isfinite(loss)]
    if finite:
        axes.plot(*zip(*finite, strict=True), color=colour, linewidth=0.8, alpha=0.45, label=f"{curve.name}, training")
    looked = [(step, loss) for step, loss in curve.evaluations if math.isfinite(loss)]
    if looked:
        axes.plot(
            *zip(*looked, strict=True), color=colour, linewidth=1.6, marker="o", markersize=4,
            label=f"{curve.name}, selection text",
        )  # fmt: skip
    kept = [point for point in looked if point[0] == curve.best]
    if kept:
        axes.plot(*kept[0], marker="D", markersize=8, color=colour, zorder=4)


CURVES = (
    "Thin: loss of the training batches. Thick: loss on the selection text, by which the kept step (diamond) was "
    "chosen. Grey is the control, the original tuned on the same budget."
)


# ---------------------------------------------------------------- alignment


def distinct(stories: Sequence[Story]) -> list[tuple[str, Alignment]]:
    """Each alignment once, with the runs that share it."""
    found: dict[object, tuple[list[str], Alignment]] = {}
    for story in stories:
        if story.alignment is not None and story.alignment.pairs:
            key = story.alignment.tensors or id(story)
            found.setdefault(key, ([], story.alignment))[0].append(story.run)
    return [(", ".join(filter(None, names[:3])) + (" …" if names[3:] else ""), item) for names, item in found.values()]


def alignment(stories: Sequence[Story]) -> Figure | None:
    """Similarity of matched neurons by pair of layers, beside what no matching gives; None without an alignment."""
    told = distinct(stories)
    if not told:
        return None
    tables = [_similarities(item) for _, item in told]
    heights = [1.2 + 0.36 * len(table) for table in tables]
    figure = canvas(sum(heights))
    panels = figure.subplots(len(told), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axes, (names, item), table in zip(panels, told, tables, strict=True):
        _map(axes, table)
        axes.set_title((f"{short(names)}: " if names else "") + f"mean {item.measure} of two layers' neurons")
    return figure


def _similarities(item: Alignment) -> dict[str, list[float]]:
    """Rows of the map, an entry for each layer but the last: its match with a higher one, then what no matching gives
    for the next layer."""
    pairs = {(min(pair.anchor, pair.layer), abs(pair.layer - pair.anchor)): pair for pair in item.pairs}

    def line(kind: str, apart: int) -> list[float]:
        found = (pairs.get((lower, apart)) for lower in range(item.n_layer - 1))
        return [math.nan if pair is None else getattr(pair, kind) for pair in found]

    apart = sorted({distance for _, distance in pairs})
    rows = {"matched" + (f", {far} apart" if far > 1 else ""): line("matched", far) for far in apart}
    return {**rows, "same index": line("identity", 1), "at random": line("random", 1)}


def _map(axes: Axes, table: Mapping[str, Sequence[float]]) -> None:
    finite = [value for line in table.values() for value in line if math.isfinite(value)]
    low, high = min(0.0, *finite), max(1e-9, *finite)
    image = axes.imshow(list(table.values()), cmap="cividis", vmin=low, vmax=high, interpolation="none", aspect="auto")
    axes.grid(visible=False)
    axes.figure.colorbar(image, ax=axes, pad=0.02)
    axes.set_yticks(range(len(table)), list(table))
    width = len(next(iter(table.values())))
    axes.set_xticks(range(0, width, 1 + width // 32))
    axes.set_xlabel("lower layer of the pair")
    for down, line in enumerate(table.values()) if width <= _ANNOTATED else ():
        for across, value in enumerate(line):
            if math.isfinite(value):
                ink = "#ffffff" if value < (low + high) / 2 else "#000000"  # on the map's own colours
                axes.annotate(f"{value:.2f}", (across, down), ha="center", va="center", fontsize=8, color=ink)


ALIGNMENT = (
    "How alike the neurons of two layers are on the calibration text: after matching, at the same index, and for a "
    "random matching. Where matched is hardly above the others there was little to align."
)
