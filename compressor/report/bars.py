"""Tasks as bars with their 95 % intervals; what is no model is a grey bar and a line through all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..benchmark import Report
from .drawing import GREY, INK, PAPER, Look, looks, panels, short
from .figures import decimals, interval, number, title
from .tasks import Figure as Measured
from .tasks import Task

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot(report: Report, found: Sequence[Task]) -> Figure | None:
    """One panel a metric and way of one family. None where nothing was measured. Draw it within `drawing.look`."""
    shown = [
        (task, metric, column)
        for task in found
        for metric, column in task.columns.items()
        if any(item.result for item in column if item.model)
    ]
    if not shown:
        return None
    rows = max(len(column) for _, _, column in shown)
    figure, axes = panels(len(shown), 0.9 + 0.25 * rows)
    known = looks(report)
    for index, (panel, (task, metric, column)) in enumerate(zip(axes, shown, strict=True)):
        _panel(panel, column, known, report.rows[0].name)
        protocol = task.way.settings.get("protocol")
        several = len({item.way.key for item in found}) > 1
        panel.set_title(title(metric) + (f", {protocol}" if several and protocol else ""))
        if index % 3 and [item.name for item in column] == [item.name for item in shown[index - 1][2]]:
            panel.set_yticklabels([])
    return figure


def _panel(axes: Axes, column: Sequence[Measured], known: dict[str, Look], original: str) -> None:
    values = [item.result.value for item in column if item.result]
    digits = decimals(values)
    for place, item in enumerate(column):
        look = known[item.name] if item.model else Look(GREY, "s")
        if item.result is None:
            _beside(axes, item.mark, 0, place, GREY)
            continue
        value, found = item.result.value, interval(item.result)
        alpha = 0.35 if look.hollow else 0.55 if look.colour == INK else 0.85  # a whisker must show on its bar
        hatch = None if item.model else "////"
        axes.barh(place, value, height=0.66, color=look.colour, hatch=hatch, zorder=2, alpha=alpha)
        end = value
        if found is not None:
            error = [[max(0.0, value - found[0])], [max(0.0, found[1] - value)]]
            axes.errorbar(value, place, xerr=error, color=INK, linewidth=1.1, capsize=2.5, zorder=4)
            end = max(value, found[1])
        _beside(axes, number(value, digits), end, place, INK)
        if not item.model:
            axes.axvline(value, color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        elif item.name == original:
            axes.axvline(value, color=INK, linewidth=0.8, linestyle=(0, (1, 2)), zorder=1)
    ends = [max(item.result.value, *(interval(item.result) or (0,))) for item in column if item.result]
    axes.set_xlim(min(0, *values), 1.18 * max(*ends, 1e-9))
    axes.set_yticks(range(len(column)), [short(item.name) + ("" if item.model else " *") for item in column])
    axes.set_ylim(len(column) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    if any(item.result and not item.result.higher_is_better for item in column):
        axes.set_xlabel("lower is better")


def _beside(axes: Axes, text: str, x: float, place: int, colour: str) -> None:
    """Text to the right of a bar, over the lines that go through it."""
    paper = {"facecolor": PAPER, "alpha": 0.75, "linewidth": 0, "pad": 0.6}
    style: dict[str, Any] = {"va": "center", "fontsize": 8, "color": colour, "bbox": paper, "zorder": 5}
    axes.annotate(text, (x, place), (5, 0), textcoords="offset points", **style)


def caption(found: Sequence[Task]) -> str:
    """How to read the bars."""
    figures = [item for task in found for column in task.columns.values() for item in column]
    text = "The dotted line is the original; pale bars are models before recovery."
    if any(item.result and interval(item.result) for item in figures):
        text += " Whiskers are 95 % intervals."
    if not all(item.model for item in figures):
        text += " Hatched, with a star and a dashed line: baselines that are no model."
    return text
