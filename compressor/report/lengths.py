"""Time of a token and memory of the cache against the length of the prompt, where several lengths were measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..benchmark import Report
from ..metrics import MetricResult
from .drawing import log_scale, looks, panels, short
from .figures import ways

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Decode time and cache against length"
CAPTION = (
    "A step of one token behind prompts of several lengths, and what the cache then holds for each token of a "
    "sequence. Both axes are logarithmic."
)


def plot(report: Report) -> Figure | None:
    """A line a model, of the batch with most lengths. None where no model has two. Draw it within `drawing.look`."""
    lines = _lines(report)
    if not lines:
        return None
    memory = any(len(_held(found)) > 1 for found in lines.values())
    figure, axes = panels(1 + memory, 3.4)
    known = looks(report)
    for name, found in lines.items():
        style: dict[str, Any] = {**known[name].marks, "linewidth": 1.4, "markersize": 5.5, "label": short(name)}
        axes[0].plot([_prompt(item) for item in found], [item.value for item in found], **style)
        if memory and (held := _held(found)):
            axes[1].plot(list(held), list(held.values()), **style)
    _axis(axes[0], lines, "ms a step")
    if memory:
        _axis(axes[1], lines, "bytes a token")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(lines)))
    return figure


def _axis(axes: Any, lines: dict[str, list[MetricResult]], unit: str) -> None:
    from matplotlib.ticker import NullFormatter

    lengths = sorted({_prompt(item) for found in lines.values() for item in found})
    axes.set_xscale("log", base=2)
    log_scale(axes)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("tokens of the prompt")
    axes.set_ylabel(unit)


def _lines(report: Report) -> dict[str, list[MetricResult]]:
    batches: dict[int, dict[str, list[MetricResult]]] = {}
    for way in ways(report, "latency"):
        if "prompt_tokens" in way.settings:
            for row in report.rows:
                item = way.find(row, "decode_latency")
                if item is not None:
                    batches.setdefault(way.settings.get("batch", 1), {}).setdefault(row.name, []).append(item)
    sorted_lines = [
        {name: sorted(found, key=_prompt) for name, found in lines.items() if len(found) > 1}
        for lines in batches.values()
    ]
    return max(sorted_lines, key=lambda lines: sum(map(len, lines.values())), default={})


def _prompt(item: MetricResult) -> int:
    return item.settings["prompt_tokens"]


def _held(found: list[MetricResult]) -> dict[int, float]:
    return {
        _prompt(item): item.settings["cache_bytes_per_token"]
        for item in found
        if "cache_bytes_per_token" in item.settings
    }
