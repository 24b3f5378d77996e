"""The plots of study attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ...report import drawing
from ...report.drawing import COLOURS, GREY, INK, PAPER
from ...report.pictures import Picture
from .figures import MIB, Cost, Measured
from .kinds import BLOCK, KNOBS, SDPA, VANILLA, Kind

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The same colour, mark and stroke for a line in every plot; what is left out or not exact is hollow.
_LOOKS = {
    "vanilla": (INK, "s", (0, (4, 2))),
    "sdpa": (INK, "D", "-"),
    "linformer": (COLOURS[0], "o", "-"),
    "nystromformer": (COLOURS[1], "^", "-"),
    "nystromformer newton": (COLOURS[1], "v", (0, (4, 2))),
    "performer favor+": (COLOURS[2], "P", "-"),
    "performer favor_hyp": (COLOURS[2], "X", (0, (4, 2))),
    "performer relu": (COLOURS[3], "h", "-"),
    "performer elu": (COLOURS[4], "p", "-"),
}


def pictures(measured: Measured) -> list[Picture]:
    settings = measured.settings
    shape = f"batch 1, {settings['heads']} heads of {settings['head_dim']}"
    shown = _shown(measured)
    with drawing.look():
        return [
            Picture(
                "attention_time.png",
                "Time against length",
                f"A forward pass of the attention alone, {shape}; median, bars from quartile to quartile. Below the "
                "line of sdpa an attention is faster than PyTorch's own kernel.",
                _lengths(measured, lambda cost: cost.median_ms, "ms", spread=True),
            ),
            Picture(
                "attention_memory.png",
                "Memory against length",
                f"The most that a forward pass holds beyond its inputs, {shape}.",
                _lengths(measured, lambda cost: cost.peak_bytes / MIB, "MiB"),
            ),
            Picture(
                "attention_cache.png",
                "Cache against length",
                f"What is kept for the next token, over the tokens so far, {shape}. Vanilla and sdpa keep the same.",
                _lengths(measured, lambda cost: cost.cache_per_token, "bytes per token"),
            ),
            Picture(
                "attention_knobs.png",
                "Cost against knobs",
                f"At {settings['knob_length']:,} tokens, {shape}; sdpa and vanilla, which have none, as lines across.",
                _costs(measured),
            ),
            Picture(
                "attention_likeness.png",
                "Error against knobs",
                "Frobenius norm of the difference to the exact matrix, over that of the exact one, nothing trained. "
                "Dotted: the exact block alone, with no far part. Lower is nearer.",
                _errors(measured, shown),
            ),
            Picture(
                "attention_error_by_cache.png",
                "Error against cache",
                "The same errors against what a cache holds for these tokens. Lower and further left is better; the "
                "upright line is the cache of exact attention.",
                _by_cache(measured, shown),
            ),
        ]


def _shown(measured: Measured) -> list[str]:
    """Random heads of the middle norm, and those of the model's middle layer."""
    random = [heads for heads in measured.heads if heads.startswith("random") and "correlation" not in heads]
    layers = [heads for heads in measured.heads if not heads.startswith("random")]
    return [random[len(random) // 2], layers[len(layers) // 2]]


def _style(kind: Kind) -> dict[str, Any]:
    colour, marker, stroke = _LOOKS[Kind(kind.family, form=kind.form).line]
    return {"color": colour, "marker": marker, "linestyle": stroke, "linewidth": 1.4, "markersize": 5.5}


def _powers(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic x axis that names the values that there are."""
    from matplotlib.ticker import NullFormatter, NullLocator

    axes.set_xscale("log", base=2)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(values, [f"{value:,}" for value in values])


def _legend(figure: Figure, axes: Sequence[Axes], columns: int) -> None:
    """Every line once, above the panels."""
    named: dict[str, Any] = {}
    for panel in axes:
        for handle, name in zip(*panel.get_legend_handles_labels(), strict=True):
            named.setdefault(name, handle)
    figure.legend(list(named.values()), list(named), loc="outside upper left", ncols=columns)


def _lengths(measured: Measured, figure_of: Callable[[Cost], float], unit: str, *, spread: bool = False) -> Figure:
    figure = drawing.canvas(5.2)
    axes = figure.add_subplot()
    for kind in measured.main:
        course = measured.course(kind)
        x = [cost.length for cost in course]
        y = [figure_of(cost) for cost in course]
        quartiles = [[cost.median_ms - cost.low_ms, cost.high_ms - cost.median_ms] for cost in course]
        errors = list(zip(*quartiles, strict=True)) if spread else None
        axes.errorbar(x, y, yerr=errors, capsize=3, elinewidth=0.9, label=kind.name, zorder=3, **_style(kind))
    _powers(axes, measured.lengths)
    drawing.log_scale(axes)
    axes.set_xlabel("tokens")
    axes.set_ylabel(unit)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), labelspacing=0.7)
    return figure


def _costs(measured: Measured) -> Figure:
    """Time above, memory below, a column a knob."""
    length = measured.settings["knob_length"]
    found = measured.at(length)
    rows = [(lambda cost: cost.median_ms, "ms"), (lambda cost: cost.peak_bytes / MIB, "MiB")]
    figure = drawing.canvas(6.2)
    grid = figure.subplots(len(rows), len(KNOBS), squeeze=False, sharey="row")
    for line, (figure_of, unit) in zip(grid, rows, strict=True):
        for axes, family in zip(line, KNOBS, strict=True):
            _by_knob(axes, {kind: figure_of(cost) for kind, cost in found.items()}, family)
            for kind in (VANILLA, SDPA):
                colour, _, stroke = _LOOKS[kind.line]
                axes.axhline(
                    figure_of(found[kind]), color=colour, linestyle=stroke, linewidth=1.2, label=kind.name, zorder=2
                )
            drawing.log_scale(axes)
        line[0].set_ylabel(unit)
    _legend(figure, list(grid.flatten()), 5)
    return figure


def _errors(measured: Measured, shown: Sequence[str]) -> Figure:
    """A row of panels for each of the heads, a column a knob."""
    figure = drawing.canvas(3.1 * len(shown))
    grid = figure.subplots(len(shown), len(KNOBS), squeeze=False, sharey="row")
    for line, heads in zip(grid, shown, strict=True):
        found = measured.on(heads)
        for axes, family in zip(line, KNOBS, strict=True):
            _by_knob(axes, {kind: match.frobenius for kind, match in found.items()}, family)
            axes.axhline(found[BLOCK].frobenius, color=GREY, linestyle=":", linewidth=1.6, label=BLOCK.name, zorder=2)
        line[0].set_ylim(0, 1.08 * max(match.frobenius for match in found.values()))
        line[0].set_ylabel(f"matrix error\n{_heads(measured, heads)}")
    _legend(figure, list(grid.flatten()), 5)
    return figure


def _by_knob(axes: Axes, values: dict[Kind, float], family: str) -> None:
    """The lines of a family over the sizes of its knob; those that lack something hollow."""
    lines: dict[str, list[Kind]] = {}
    for kind in values:
        if kind.family == family:
            lines.setdefault(kind.line, []).append(kind)
    for name, kinds in lines.items():
        style = _style(kinds[0])
        if not kinds[0].size:
            axes.axhline(values[kinds[0]], label=name, zorder=2, **{**style, "marker": ""})
            continue
        if kinds[0].lacking:
            style |= {"markerfacecolor": PAPER, "linestyle": (0, (1, 1.5))}
        axes.plot([kind.size for kind in kinds], [values[kind] for kind in kinds], label=name, zorder=3, **style)
    _powers(axes, sorted({kind.size for kinds in lines.values() for kind in kinds if kind.size}))
    axes.margins(x=0.1)
    axes.set_xlabel(KNOBS[family])
    axes.set_title(family)


def _by_cache(measured: Measured, shown: Sequence[str]) -> Figure:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = drawing.canvas(4.4)
    panels = figure.subplots(1, len(shown), squeeze=False).flatten().tolist()
    for axes, heads in zip(panels, shown, strict=True):
        found = measured.on(heads)
        lines: dict[str, list[Kind]] = {}
        for kind in found:
            if kind.family in KNOBS and not kind.lacking:
                lines.setdefault(kind.line, []).append(kind)
        for name, kinds in lines.items():
            x = [found[kind].cache_bytes / 1024 for kind in kinds]
            axes.plot(x, [found[kind].frobenius for kind in kinds], label=name, zorder=3, **_style(kinds[0]))
        exact = found[SDPA].cache_bytes / 1024
        axes.axvline(exact, color=INK, linewidth=1, linestyle=(0, (4, 3)), label="exact attention", zorder=2)
        axes.axhline(found[BLOCK].frobenius, color=GREY, linestyle=":", linewidth=1.6, label=BLOCK.name, zorder=2)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(LogLocator(base=2))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(bottom=0)
        axes.set_xlabel("cache, KiB")
        axes.set_title(_heads(measured, heads))
    panels[0].set_ylabel("matrix error")
    _legend(figure, panels, 5)
    return figure


def _heads(measured: Measured, heads: str) -> str:
    return heads if heads.startswith("random") else f"{drawing.short(measured.settings['model'])}, {heads}"
