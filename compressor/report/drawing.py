"""What all plots share: one look a model, labels that cover nothing, a figure as PNG or as SVG in a page's colours."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ..benchmark import Report
from .rows import BASELINES, is_slice, part, untrained

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# matplotlib takes a second to import, and only a plot needs it: the functions below do.

INK, GREY, GRID, PAPER = "#1f2328", "#6e7782", "#e4e7ec", "#fffffe"  # the page's own colours in an SVG
# Okabe and Ito's, which colour-blind readers tell apart, without the black and the yellow.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_PAGE = {INK: "ink", GREY: "grey", GRID: "grid", PAPER: "paper", COLOURS[0]: "blue"}
_MARKERS = "o^PXh*"
_BESIDE = {"pruned": "v", "dropped": "<"}
_WIDTH = 10.5
_LONG = 40  # characters of a name that a plot shows
_LOOK: Any = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "gpt2-compress",  # the same report, the same bytes
    "text.parse_math": False,  # a name may hold a $
    "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"],
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "legend.frameon": False,
    "legend.fontsize": 8,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), PAPER),
}


@dataclass(frozen=True)
class Look:
    """How a model appears in every plot; hollow: not recovered yet."""

    colour: str
    marker: str
    hollow: bool = False

    @property
    def marks(self) -> dict[str, Any]:
        face = PAPER if self.hollow else self.colour
        return {"marker": self.marker, "color": self.colour, "markerfacecolor": face, "markeredgewidth": 1.4}


DEFAULT = Look(COLOURS[0], _MARKERS[0])  # of a run that has no row


def looks(report: Report) -> dict[str, Look]:
    """The look of each row: the original is ink, what is there to be compared with grey, each run or model has a colour
    and a shape."""
    found: dict[str, Look] = {}
    kinds: dict[str, tuple[str, str]] = {}
    for index, row in enumerate(report.rows):
        run, step = part(row.name)
        if index == 0:
            found[row.name] = Look(INK, "D")
        elif step not in ("", "rewritten", "recovered") and not is_slice(step):
            kind = next((kind for kind in BASELINES if step.startswith(kind)), "")
            found[row.name] = Look(GREY, _BESIDE.get(kind, "s"), hollow=untrained(step))
        else:
            place = len(kinds)
            kinds.setdefault(run, (COLOURS[place % 6], _MARKERS[place // 6 % 6]))
            found[row.name] = Look(*kinds[run], hollow=untrained(step))
    return found


def short(name: str) -> str:
    name = " ".join(name.split())
    return name if len(name) <= _LONG else "…" + name[1 - _LONG :]


# ---------------------------------------------------------------- figures


@contextmanager
def look() -> Iterator[None]:
    """matplotlib's own defaults and ours, whatever the user has set; then as it was."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_LOOK)
        yield


def canvas(height: float) -> Figure:
    """A figure of so many inches that is drawn by itself, without pyplot; all have one width, so one size of text."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(_WIDTH, height), dpi=120, layout=ConstrainedLayoutEngine(w_pad=0.09, h_pad=0.06))
    FigureCanvasAgg(figure)
    return figure


def panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """So many panels of so many inches, three in a line."""
    columns = min(3, count)
    lines = math.ceil(count / columns)
    figure = canvas(height * lines)
    axes = figure.subplots(lines, columns, squeeze=False).flatten().tolist()
    for unused in axes[count:]:
        unused.set_visible(False)
    return figure, axes[:count]


def log_scale(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def png(figure: Figure) -> bytes:
    with look():
        content = io.BytesIO()
        figure.savefig(content, format="png", metadata={"Software": None})
        return content.getvalue()


def svg(figure: Figure, name: str) -> str:
    """An <svg> element to stand in a page: text as text, ink and paper in the page's colours."""
    with look():
        content = io.StringIO()
        figure.savefig(content, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = content.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(#|href="#)([\w.-]+)', text))
    text = re.sub(r' id="([\w.-]+)"', lambda found: found[0] if found[1] in used else "", text)
    for identity in sorted(used):  # ids of one page must differ
        text = re.sub(rf'(id="|url\(#|href="#){re.escape(identity)}(?=["\)])', rf"\g<1>{name}-{identity}", text)
    for colour, word in _PAGE.items():
        text = text.replace(colour, f"var(--{word})")
    return re.sub(r">\s+<", ">\n<", text).strip()


# ---------------------------------------------------------------- labels


def label(
    axes: Axes, points: Sequence[tuple[str, float, float]], lines: Sequence[Sequence[tuple[float, float]]]
) -> None:
    """Name every point where its name covers no point, no other name and none of the lines; a name set far off gets a
    thin line to its point. The figure must be laid out; what is set here does not move."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    drawn: Any = axes.figure.canvas  # that of `canvas`
    renderer, area = drawn.get_renderer(), axes.get_window_extent()
    pixel = axes.figure.dpi / 72  # offsets are in points, boxes in pixels
    taken = [_box(Bbox, place, 4 * pixel) for place in axes.transData.transform([(x, y) for _, x, y in points])]
    for line in lines:
        taken += [_box(Bbox, place, pixel) for place in _along(axes.transData.transform(line), 5 * pixel)]
    for name, x, y in sorted(points, key=lambda point: -point[2]):
        note = None
        for distance, across, up in _around():
            if note is not None:
                note.remove()
            thin = dict(arrowstyle="-", color=GREY, linewidth=0.6, shrinkA=0, shrinkB=3) if distance > 10 else None
            note = axes.annotate(
                name,
                (x, y),
                xytext=(distance * across, distance * up),
                textcoords="offset points",
                fontsize=8,
                ha="left" if across > 0.3 else "right" if across < -0.3 else "center",
                va="center",
                zorder=4,
                arrowprops=thin,
                bbox=dict(facecolor=PAPER, alpha=0.7, linewidth=0, pad=0.3),
            )
            note.update_positions(renderer)
            box = Text.get_window_extent(note, renderer)  # the name alone, without its line
            if area.contains(box.x0, box.y0) and area.contains(box.x1, box.y1) and not box.count_overlaps(taken):
                break
        taken.append(box.padded(3 * pixel, 0))


def _box(kind: Any, place: Sequence[float], half: float) -> Any:
    return kind.from_bounds(place[0] - half, place[1] - half, 2 * half, 2 * half)


def _along(corners: Any, step: float) -> Iterator[tuple[float, float]]:
    """Points of a line through some corners, one every so many pixels."""
    for (x0, y0), (x1, y1) in pairwise(corners):
        count = max(1, int(math.hypot(x1 - x0, y1 - y0) / step))
        for index in range(count + 1):
            yield x0 + (x1 - x0) * index / count, y0 + (y1 - y0) * index / count


def _around() -> Iterator[tuple[float, float, float]]:
    """Places for a label, near ones first: distance in typographic points and direction (across, up)."""
    for distance in (8, 16, 26, 38, 52, 70, 96):
        for angle in (0, 180, 30, 150, 330, 210, 60, 120, 300, 240, 90, 270):
            yield distance, math.cos(math.radians(angle)), math.sin(math.radians(angle))
