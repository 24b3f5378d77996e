"""Perplexity against the context in both kinds of windows, and the loss by position in the longest one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..benchmark import Report
from .drawing import GREY, INK, Look, log_scale, looks, panels, short
from .figures import Gaps
from .reach import WINDOWS, Reach, positions, reaches

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LINES = ("-", "--")  # of WINDOWS
TITLE = "Perplexity against context"
CAPTION = (
    "Left: the same tokens in windows of growing length, sliding ones (solid) and ones that do not overlap (dashed). "
    "Right: how much more a token costs than in sliding windows of the trained length, by how many tokens stand before "
    "it in the longest window that its model takes. The upright line is the trained length."
)


def plot(report: Report, gaps: Gaps) -> Figure | None:
    """Of the first trained length that was measured around. None without two lengths. Draw it within `drawing.look`."""
    reach = next((one for one in reaches(report, gaps) if len(one.across) > 1), None)
    if reach is None:
        return None
    placed = any(positions(reach, row) for row in reach.rows)
    figure, axes = panels(1 + placed, 3.8)
    known = looks(report)
    _lengths(axes[0], reach, known)
    if placed:
        _positions(axes[1], reach, known)
    handles, labels = axes[0].get_legend_handles_labels()
    for windows, line in zip(WINDOWS, _LINES, strict=True):
        handles += axes[0].plot([], [], line, color=GREY, linewidth=1.4)
        labels.append(windows)
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(handles)))
    return figure


def _lengths(axes: Axes, reach: Reach, known: dict[str, Look]) -> None:
    values = []
    for row in reach.rows:
        style: dict[str, Any] = {**known[row.name].marks, "linewidth": 1.4, "markersize": 5.5}
        for windows, line in zip(WINDOWS, _LINES, strict=True):
            found = [(length, item) for length in reach.across if (item := reach.perplexity(row, windows, length))]
            values += [item.value for _, item in found]
            label = short(row.name) if windows == WINDOWS[0] else "_"
            if found:
                axes.plot([at for at, _ in found], [item.value for _, item in found], line, label=label, **style)
    axes.set_xscale("log", base=2)
    _across(axes, reach.across, reach.trained)
    if max(values, default=1) > 3 * min(values, default=1):
        log_scale(axes)
    axes.set_xlabel("tokens of the context")
    axes.set_ylabel("perplexity")


def _positions(axes: Axes, reach: Reach, known: dict[str, Look]) -> None:
    for row in reach.rows:
        bins = positions(reach, row)
        style: dict[str, Any] = {**known[row.name].marks, "linewidth": 1.4, "markersize": 4}
        axes.plot([item["last"] for item in bins], [item["nll"] - item["others"] for item in bins], **style)
    axes.axhline(0, color=INK, linewidth=0.8, zorder=1)
    _across(axes, [length for length in reach.across if length >= reach.trained], reach.trained)
    axes.set_xlim(0, 1.03 * reach.across[-1])
    axes.set_xlabel("tokens before it in the window, up to")
    axes.set_ylabel("nats more than in sliding windows")


def _across(axes: Axes, lengths: list[int], trained: int) -> None:
    from matplotlib.ticker import NullFormatter

    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.axvline(trained, color=INK, linewidth=0.8, linestyle=(0, (1, 2)), zorder=1)
