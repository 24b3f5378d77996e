"""Drafts as bars: what is accepted, how many tokens come of a pass, how much faster it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..benchmark import Report
from .assisted import Drafted, drafted
from .drawing import INK, looks, panels, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE = "Slices as drafts"
CAPTION = (
    "Each slice of a nested model drafts for the whole. The upright line in the last two panels is the model without a "
    "draft, one token a pass; whiskers are the least and the most of the repeats."
)


def plot(report: Report) -> Figure | None:
    """Of the first set of settings. None where nothing was measured. Draw it within `drawing.look`."""
    group = next(iter(drafted(report)), None)
    if group is None:
        return None
    figure, axes = panels(3, 1.0 + 0.28 * len(group))
    known = looks(report)
    several = len({item.row.name for item in group}) > 1
    names = [f"{short(item.row.name)}, {item.draft}" if several else item.draft for item in group]
    colours = [known[item.row.name].colour for item in group]
    _panel(axes[0], "share of drafted tokens accepted", [item.accepted.value for item in group], colours)
    _panel(axes[1], "tokens a pass", [item.tokens.value for item in group], colours)
    _panel(axes[2], "times as fast as without", [item.speed.value for item in group], colours)
    _whiskers(axes[2], group)
    for index, panel in enumerate(axes):
        panel.set_yticks(range(len(group)), names if index == 0 else [])
        if index:
            panel.axvline(1, color=INK, linewidth=0.8, linestyle=(0, (1, 2)), zorder=3)
    return figure


def _panel(axes: Axes, title: str, values: list[float], colours: list[str]) -> None:
    axes.barh(range(len(values)), values, height=0.66, color=colours, alpha=0.85, zorder=2)
    axes.set_title(title)
    axes.set_ylim(len(values) - 0.4, -0.6)
    axes.set_xlim(0, 1.12 * max(1.0, *values))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)


def _whiskers(axes: Axes, group: list[Drafted]) -> None:
    for place, item in enumerate(group):
        spread = item.speed.spread or {}
        error = [[item.speed.value - spread["least"]], [spread["most"] - item.speed.value]]
        axes.errorbar(item.speed.value, place, xerr=error, color=INK, linewidth=1.1, capsize=2.5, zorder=4)
    axes.set_xlim(0, 1.12 * max(1.0, *((item.speed.spread or {})["most"] for item in group)))
