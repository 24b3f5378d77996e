"""Quality against cost: perplexity over the original's, against parameters, decode or prefill time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ..benchmark import Report, Row
from .drawing import GREY, INK, Look, canvas, label, log_scale, looks, short
from .figures import Way, number, ways
from .rows import chains, pairs, part, untrained
from .tables import first, sparse

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COSTS = ("parameters", "decode_latency", "prefill_latency")
_NAMED = 10  # points that a plot names; more are numbered, with a key beside


@dataclass(frozen=True)
class Point:
    """A model in the plane; both coordinates are better when they are less."""

    name: str
    x: float
    y: float
    look: Look


def points(report: Report, cost: str) -> list[Point]:
    """The models whose quality and cost were measured, in the order of the report."""
    perplexity = first(ways(report, "perplexity"))
    speed = first(ways(report, "latency"))
    known = looks(report)
    found = []
    for row in report.rows:
        score = perplexity.find(row, "perplexity") if perplexity else None
        y = report.ratio(row, score) if score else None
        x = _parameters(row) if cost == "parameters" else _time(report, row, cost, speed)
        if x is not None and y is not None:
            found.append(Point(row.name, x, y, known[row.name]))
    return found


def _parameters(row: Row) -> float | None:
    """In millions. Of a pruned model those that are not zero: what its pruning is about, though its file stores all."""
    count = row.find("parameters")
    if count is None:
        return None
    return (count.settings["non_zero"] if sparse(row) else count.value) / 1e6


def _time(report: Report, row: Row, cost: str, way: Way | None) -> float | None:
    """As a share of the original's in the same process."""
    item = way.find(row, cost) if way else None
    return report.ratio(row, item) if item else None


def frontier(found: Sequence[Point]) -> list[Point]:
    """The points than which no other is at least as good in both and better in one, by ascending cost."""
    best = [
        point
        for point in found
        if not any(
            other.x <= point.x and other.y <= point.y and (other.x, other.y) != (point.x, point.y) for other in found
        )
    ]
    return sorted(best, key=lambda point: (point.x, point.y))


def plot(report: Report, cost: str) -> Figure | None:
    """None without two models to show. Draw it within `drawing.look`."""
    found = points(report, cost)
    if len(found) < 2 or found[0].name != report.rows[0].name:
        return None
    numbered = len(found) > _NAMED
    figure = canvas(max(4.8, 0.2 * len(found) + 1))
    axes = figure.add_subplot()
    lines = [*_frontier(axes, frontier(found)), *_slices(axes, report, found), *_recoveries(axes, report, found)]
    for point in found:
        size = 8 if point.look.marker == "D" else 7
        axes.plot(point.x, point.y, linestyle="none", markersize=size, zorder=3, **point.look.marks)
    if max(point.y for point in found) > 4 * min(point.y for point in found):
        log_scale(axes)
    axes.margins(0.12)
    axes.axhline(1, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    axes.set_xlabel(_across(report, cost))
    base = short(report.rows[0].name)
    axes.set_ylabel(f"perplexity / {base}'s" + (", log scale" if axes.get_yscale() == "log" else ""))
    _key(axes, found, numbered)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the labels are placed in this layout; it must stay
    names = [str(place) if numbered else _name(report, point) for place, point in enumerate(found, start=1)]
    ends = axes.get_xlim()
    label(
        axes,
        [(name, point.x, point.y) for name, point in zip(names, found, strict=True)],
        [*lines, [(ends[0], 1), (ends[1], 1)]],
    )
    return figure


def _name(report: Report, point: Point) -> str:
    return short(point.name) + (" (baseline)" if point.name == report.rows[0].name else "")


def _frontier(axes: Axes, best: Sequence[Point]) -> list[list[tuple[float, float]]]:
    """A staircase: what lies above it and to its right is beaten by one of its corners."""
    corners = [(best[0].x, best[0].y)]
    for before, point in pairwise(best):
        corners += [(point.x, before.y), (point.x, point.y)]
    axes.plot(*zip(*corners, strict=True), color=GREY, linewidth=1.2, alpha=0.7, zorder=1, label="frontier")
    return [corners]


def _recoveries(axes: Axes, report: Report, found: Sequence[Point]) -> list[list[tuple[float, float]]]:
    """An arrow from each model before its recovery to the same one after it."""
    places = {point.name: point for point in found}
    lines = []
    for pair in pairs(report):
        before, after = places.get(pair.before.name), places.get(pair.after.name)
        if before is not None and after is not None:
            lines.append([(before.x, before.y), (after.x, after.y)])
            style: dict[str, Any] = dict(arrowstyle="-|>", color=after.look.colour, linewidth=1.1, alpha=0.8)
            axes.annotate(
                "", (after.x, after.y), (before.x, before.y), arrowprops=dict(**style, shrinkA=5, shrinkB=5), zorder=2
            )
    return lines


def _slices(axes: Axes, report: Report, found: Sequence[Point]) -> list[list[tuple[float, float]]]:
    """A line through the slices of one nested model, the larger ones first, dotted before recovery."""
    places = {point.name: point for point in found}
    lines = []
    for chain in chains(report):
        known = [places[row.name] for row in chain if row.name in places]
        if len(known) > 1:
            lines.append([(point.x, point.y) for point in known])
            style = ":" if untrained(part(chain[-1].name)[1]) else "-"
            look = known[-1].look
            axes.plot(
                *zip(*lines[-1], strict=True), color=look.colour, linestyle=style, linewidth=1.4, alpha=0.6, zorder=1
            )
    return lines


def _across(report: Report, cost: str) -> str:
    base = short(report.rows[0].name)
    if cost == "parameters":
        pruned = any(sparse(row) for row in report.rows)
        return "parameters, millions (shared ones counted once" + (
            "; of pruned models those that are not zero)" if pruned else ")"
        )
    way = first(ways(report, "latency"))
    item = way.find(report.rows[0], cost) if way else None
    word = {"decode_latency": "decode", "prefill_latency": "prefill"}[cost]
    if item is None:
        return f"{word} time / {base}'s"
    where = ", ".join(f"{what} {item.settings[key]}" for key, what in (("batch", "batch"), ("prompt_tokens", "prompt")))
    return f"{word} time / {base}'s ({number(item.value)} {item.unit}, {where})"


def _key(axes: Axes, found: Sequence[Point], numbered: bool) -> None:
    """What the marks mean; beside the plot also which number is which model."""
    from matplotlib.lines import Line2D

    frontier_line = Line2D([], [], color=GREY, linewidth=1.2, label="frontier")
    if numbered:
        marks = [
            Line2D([], [], linestyle="none", markersize=6, label=f"{place}  {short(point.name)}", **point.look.marks)
            for place, point in enumerate(found, start=1)
        ]
        axes.legend(
            handles=[*marks, frontier_line], loc="upper left", bbox_to_anchor=(1.01, 1.01), handletextpad=0.4,
            labelspacing=0.45,
        )  # fmt: skip
    elif any(point.look.hollow for point in found):
        run = next(point for point in found if point.look.hollow)
        mark = Line2D([], [], linestyle="none", markersize=6, label="before recovery", **run.look.marks)
        axes.figure.legend(handles=[mark, frontier_line], loc="outside upper right", ncols=2)


def caption(report: Report, cost: str) -> str:
    """How to read the plot, and what it leaves out."""
    found = {point.name for point in points(report, cost)}
    left = [row.name for row in report.rows if row.name not in found]
    text = (
        "Lower and further left is better. The line is the frontier, models that no other beats in both; dashed is the "
        "original's perplexity."
    )
    if any({pair.before.name, pair.after.name} <= found for pair in pairs(report)):
        text += " Arrows go from a model before its recovery to the same one after it."
    if any(len({row.name for row in chain} & found) > 1 for chain in chains(report)):
        text += " Slices of one nested model are joined by a line, dotted before recovery."
    if cost == "parameters" and any(sparse(row) for row in report.rows):
        text += " A pruned model stands at its parameters that are not zero; its file stores the zeros too."
    if left:
        text += f" Not shown, for want of a comparable figure: {', '.join(left)}."
    return text
