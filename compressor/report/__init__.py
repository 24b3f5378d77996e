"""Tables and a plot of what a benchmark measured."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import artifacts
from .benchmark import Report, Row
from .metrics import MetricResult

PLOT = "perplexity_by_parameters.png"
FILES = ("report.json", "report.md", PLOT)  # what `write` may leave
MISSING = "-"
_NAMED, _LONG = 10, 40  # points that the plot names (more are numbered); characters of a name it shows


def write(folder: Path, report: Report) -> None:
    """Write report.json, report.md and, where perplexity and parameters were measured, the plot into `folder`."""
    folder = Path(folder)
    artifacts.write_json(folder / "report.json", "report", report.to_dict(), report.origin)
    picture = plot(report)
    if picture is not None:
        artifacts.write_bytes(folder / PLOT, picture)
    artifacts.write_bytes(folder / "report.md", document(report, picture=PLOT if picture else None).encode())


def read(folder: Path) -> Report:
    """The report that `write` left in a folder. Raises UserError where there is none."""
    return Report.from_dict(artifacts.read_json(Path(folder) / "report.json", "report", "benchmark"))


def table(report: Report, *, markdown: bool = False) -> str:
    """The before/after table, and one more table for every protocol of perplexity after the first."""
    protocols = _protocols(report)
    parts = [_layout(*_overview(report, protocols[0] if protocols else None, markdown), markdown)]
    for protocol in protocols:
        head = _how(report, protocol)
        if protocol == protocols[0] and not markdown:
            parts.append(head)  # the terminal's main table has its perplexity already
        else:
            parts.append(f"{head}\n\n{_layout(*_perplexities(report, protocol), markdown)}")
    latencies = _latencies(report)
    if latencies and (markdown or _several_kinds(report)):  # the main table has the first kind
        how = "models interleaved in one process; rows of one structure (an original, its control) differ by noise."
        parts.append(f"Latency, {how}\n\n{_layout(*latencies, markdown)}")
    return "\n\n".join(parts)


def document(report: Report, *, picture: str | None = None) -> str:
    """report.md."""
    origin = report.origin
    parts = [
        f"# Benchmark\n\nRatios are to {_code(report.rows[0].name)}. Parameters are counted once where they are "
        "shared; bytes are those of the weight files; FLOPs are those of a forward pass with the LM head.",
        table(report, markdown=True),
    ]
    if picture:
        parts.append(f"![Perplexity ratio against parameters]({picture})")
    parts.append(
        "| model | from |\n| --- | --- |\n"
        + "\n".join(f"| {_cell(row.name)} | {_code(row.source)} |" for row in report.rows)
    )
    commit = f" ({origin.commit})" if origin.commit else ""
    parts.append(
        f"Made by gpt2-compress {origin.version}{commit}: {_code(origin.command)}\n\ntorch {origin.torch}, "
        f"transformers {origin.transformers}, {origin.device}, {origin.dtype}, {origin.threads} threads, "
        f"seed {origin.seed}."
    )
    return "\n\n".join(parts) + "\n"


# ---------------------------------------------------------------- what stands in the tables


def _protocols(report: Report) -> list[str]:
    found = [
        result.settings["protocol"] for row in report.rows for result in row.results if result.metric == "perplexity"
    ]
    return list(dict.fromkeys(found))


def _overview(report: Report, protocol: str | None, markdown: bool) -> tuple[list[str], list[list[str]]]:
    """The main table; a terminal gets the columns that one looks at first."""
    columns: dict[str, list[str]] = {"model": [row.name for row in report.rows]}

    def add(header: str, cells: Sequence[str], wanted: bool = True) -> None:
        if wanted and any(cell != MISSING for cell in cells):
            columns[header] = list(cells)

    counts = [row.find("parameters") for row in report.rows]
    sizes = [row.find("bytes") for row in report.rows]
    flops = [row.find("flops_per_token") for row in report.rows]
    scores = [row.find("perplexity", protocol) if protocol else None for row in report.rows]
    add("parameters", [f"{count.value:,}" if count else MISSING for count in counts])
    add("ratio", _ratios(report, counts))
    shares = [f"{count.settings['non_zero'] / count.value:.1%}" if count else MISSING for count in counts]
    add("non-zero", shares, markdown)
    add("embeddings", [f"{count.settings['embedding_share']:.1%}" if count else MISSING for count in counts], markdown)
    add("bytes", [f"{scaled(size.value)}B" if size else MISSING for size in sizes])
    add("FLOPs/token", [scaled(item.value) if item else MISSING for item in flops])
    add("perplexity", [_number(score) for score in scores])
    add("perplexity ratio", _ratios(report, scores))
    for regime in ("prefill", "decode"):
        times = [row.find(f"{regime}_latency") for row in report.rows]
        add(f"{regime} ms", [f"{item.value:.2f}" if item else MISSING for item in times])
        add(f"{regime} ratio", _ratios(report, times))
    return list(columns), [list(cells) for cells in zip(*columns.values(), strict=True)]


def _ratios(report: Report, results: Sequence[MetricResult | None]) -> list[str]:
    return [_ratio(report, row, result) for row, result in zip(report.rows, results, strict=True)]


def _perplexities(report: Report, protocol: str) -> tuple[list[str], list[list[str]]]:
    header = ["model", "perplexity", "standard error", "ratio", "word perplexity", "ratio", "scored tokens"]
    body = []
    for row in report.rows:
        token, word = row.find("perplexity", protocol), row.find("word_perplexity", protocol)
        error = f"{token.spread['standard_error']:.2f}" if token and token.spread else MISSING
        body.append(
            [
                row.name,
                _number(token),
                error,
                _ratio(report, row, token),
                _number(word),
                _ratio(report, row, word),
                f"{token.count:,}" if token else MISSING,
            ]
        )
    return header, body


def _several_kinds(report: Report) -> bool:
    return sum(result.metric == "prefill_latency" for result in report.rows[0].results) > 1


def _latencies(report: Report) -> tuple[list[str], list[list[str]]] | None:
    """Median, 90th percentile and ratio of every prefill and decode; None where none was measured."""
    header = ["model", "regime", "batch", "prompt", "median ms", "p90 ms", "ratio"]
    body = []
    for row in report.rows:
        for result in row.results:
            if result.metric in ("prefill_latency", "decode_latency"):
                settings, spread = result.settings, result.spread or {}
                regime = result.metric.removesuffix("_latency")
                shape = [str(settings["batch"]), str(settings["prompt_tokens"])]
                figures = [f"{result.value:.2f}", f"{spread.get('p90', math.nan):.2f}", _ratio(report, row, result)]
                body.append([row.name, regime, *shape, *figures])
    return (header, body) if body else None


def _how(report: Report, protocol: str) -> str:
    """How a perplexity was taken, in one line."""
    result = next(found for row in report.rows if (found := row.find("perplexity", protocol)))
    settings = result.settings
    part = f", {settings['part']} data" if settings["part"] else ""
    return (
        f"Perplexity {protocol}: context {settings['context']}, stride {settings['stride']}, "
        f"{settings['tokens']:,} tokens of {settings['source']}{part}, fingerprint {settings['fingerprint'][:12]}."
    )


def _ratio(report: Report, row: Row, result: MetricResult | None) -> str:
    ratio = report.ratio(row, result) if result else None
    return MISSING if ratio is None else f"{ratio:,.3f}"


def _number(result: MetricResult | None) -> str:
    if result is None:
        return MISSING
    return f"{result.value:,.2f}" if math.isfinite(result.value) else "not finite"


def scaled(value: float) -> str:
    """A count in thousands, millions or billions, one decimal: 497759232 -> "497.8 M"."""
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= factor:
            return f"{value / factor:.1f} {unit}"
    return f"{value:.0f} "


# ---------------------------------------------------------------- layout


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _code(text: str) -> str:
    return f"`{_cell(text).replace('`', '')}`"


def _layout(header: Sequence[str], body: Sequence[Sequence[str]], markdown: bool) -> str:
    """A table with aligned columns, the first to the left and numbers to the right; Markdown or plain text."""
    lines = [list(header), *[[_cell(text) if markdown else text for text in line] for line in body]]
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(header))]
    aligned = [
        [
            text.ljust(width) if column == 0 else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in lines
    ]
    if markdown:
        rule = ["-" * width if column == 0 else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
        return "\n".join("| " + " | ".join(line) + " |" for line in [aligned[0], rule, *aligned[1:]])
    return "\n".join("  ".join(line).rstrip() for line in [aligned[0], ["-" * width for width in widths], *aligned[1:]])


# ---------------------------------------------------------------- plot


def plot(report: Report) -> bytes | None:
    """Perplexity ratio against parameters, under the first protocol, as a PNG; None without two models to show.

    Many models are numbered, with the key beside the plot; few carry their names.
    """
    protocols, base = _protocols(report), report.rows[0].name
    points = []
    for row in report.rows:
        count, score = row.find("parameters"), row.find("perplexity", protocols[0]) if protocols else None
        ratio = report.ratio(row, score) if score else None
        if count and ratio is not None:
            name = row.name if len(row.name) <= _LONG else "…" + row.name[1 - _LONG :]
            points.append((f"{name} (baseline)" if row.name == base else name, count.value / 1e6, ratio))
    if len(points) < 2:  # else the first is the baseline: nothing has a ratio without it
        return None

    from matplotlib.backends.backend_agg import FigureCanvasAgg  # takes a second to import, and only a plot needs it
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    numbered = len(points) > _NAMED
    figure = Figure(figsize=(9, max(5.5, 0.18 * len(points))), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.axhline(1, color="tab:orange", linewidth=1, linestyle="--", zorder=1)
    for index, (_, x, y) in enumerate(points):
        axes.plot(
            x,
            y,
            marker="o" if index else "D",
            markersize=6 if index else 8,
            linestyle="none",
            zorder=3,
            color="tab:blue" if index else "tab:orange",
        )
    ratios = [y for _, _, y in points]
    if max(ratios) > 4 * min(ratios):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.margins(0.1)
    axes.grid(color="0.93")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("parameters, millions (shared ones counted once)")
    axes.set_ylabel(f"perplexity / perplexity of {base}" + (", log scale" if axes.get_yscale() == "log" else ""))
    axes.set_title(f"What the saved parameters cost ({protocols[0]} perplexity)", loc="left")
    if numbered:
        key = "\n".join(f"{number:>2}  {name}" for number, (name, _, _) in enumerate(points, start=1))
        axes.annotate(
            key,
            (1, 1),
            xytext=(10, 0),
            xycoords="axes fraction",
            textcoords="offset points",
            va="top",
            fontsize=8,
            family="monospace",
            linespacing=1.35,
            annotation_clip=False,
        )
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the labels are placed in this layout; it must stay
    _label(axes, [(str(number) if numbered else name, x, y) for number, (name, x, y) in enumerate(points, start=1)])
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})  # the same report, the same bytes
    return content.getvalue()


def _label(axes: Any, points: Sequence[tuple[str, float, float]]) -> None:
    """Name every point where its name covers no point, no other name and not the line at 1; a name set far off gets a
    thin line to its point."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    renderer, area = axes.figure.canvas.get_renderer(), axes.get_window_extent()
    pixel = axes.figure.dpi / 72  # offsets are in points, boxes in pixels
    places = axes.transData.transform([(x, y) for _, x, y in points])
    taken = [Bbox.from_bounds(x - 4 * pixel, y - 4 * pixel, 8 * pixel, 8 * pixel) for x, y in places]
    taken.append(Bbox.from_bounds(area.x0, axes.transData.transform((0, 1))[1] - pixel, area.width, 2 * pixel))
    for name, x, y in sorted(points, key=lambda point: -point[2]):
        note = None
        for distance, across, up in _around():
            if note is not None:
                note.remove()
            line = dict(arrowstyle="-", color="0.6", linewidth=0.6, shrinkA=0, shrinkB=3) if distance > 10 else None
            note = axes.annotate(
                name,
                (x, y),
                xytext=(distance * across, distance * up),
                textcoords="offset points",
                fontsize=8,
                ha="left" if across > 0.3 else "right" if across < -0.3 else "center",
                va="center",
                zorder=4,
                arrowprops=line,
                bbox=dict(facecolor="white", alpha=0.7, linewidth=0, pad=0.3),
            )
            note.update_positions(renderer)
            box = Text.get_window_extent(note, renderer)  # the name alone, without its line
            if area.contains(box.x0, box.y0) and area.contains(box.x1, box.y1) and not box.count_overlaps(taken):
                break
        taken.append(box.padded(3 * pixel, 0))


def _around() -> Iterator[tuple[float, float, float]]:
    """Places for a label, near ones first: distance in typographic points and direction (across, up)."""
    for distance in (8, 16, 26, 38, 52, 70, 96):
        for angle in (0, 180, 30, 150, 330, 210, 60, 120, 300, 240, 90, 270):
            yield distance, math.cos(math.radians(angle)), math.sin(math.radians(angle))
