"""Counts as bars: a panel each group, its figure and a note over every bar."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .drawing import DEFAULT, GREY, INK, PAPER, canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_HEIGHT = 3.3  # inches
_PAPER = {"facecolor": PAPER, "linewidth": 0, "pad": 0.6}
# What bars of one kind look like in all panels: the original, what is looked at, what is there to be compared with.
KINDS = {"original": (INK, 0.8), "own": (DEFAULT.colour, 0.85), "beside": (GREY, 0.45)}


@dataclass(frozen=True)
class Bar:
    """kind: of KINDS. label: what stands over it, lines of text."""

    name: str
    value: float
    label: str
    kind: str


@dataclass(frozen=True)
class Group:
    """The bars of a panel."""

    title: str
    bars: tuple[Bar, ...]


def plot(groups: Sequence[Group], unit: str, *, one_scale: bool = False) -> Figure:
    """The panels in a line, each from 0 to its own largest figure, or (one_scale) to that of all. Draw it within
    `drawing.look`."""
    figure = canvas(_HEIGHT)
    panels = figure.subplots(1, len(groups), squeeze=False, sharey=one_scale).flatten().tolist()
    most = max(bar.value for group in groups for bar in group.bars)
    for panel, group in zip(panels, groups, strict=True):
        _panel(panel, group, most if one_scale else max(bar.value for bar in group.bars))
    panels[0].set_ylabel(unit)
    return figure


def _panel(axes: Axes, group: Group, most: float) -> None:
    for place, bar in enumerate(group.bars):
        colour, alpha = KINDS[bar.kind]
        axes.bar(place, bar.value, width=0.68, color=PAPER, zorder=2)  # no grid shows through
        axes.bar(place, bar.value, width=0.68, color=colour, alpha=alpha, zorder=2)
        over: dict[str, Any] = {"ha": "center", "va": "bottom", "fontsize": 8, "bbox": _PAPER}
        axes.annotate(bar.label, (place, bar.value), (0, 3), textcoords="offset points", **over)
    lines = max(bar.label.count("\n") for bar in group.bars) + 1
    axes.set_ylim(0, most * (1.04 + 0.08 * lines))  # room for what stands over the highest
    axes.set_xlim(-0.6, len(group.bars) - 0.4)
    axes.set_xticks(range(len(group.bars)), [bar.name for bar in group.bars])
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="x", visible=False)
    axes.set_title(group.title)
