"""The plots of a report: which there are, what their files are called, how they are to be read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from ..benchmark import Report
from . import assisted_plot, bars, course, drawing, extrapolation_plot, hierarchy, lengths, scatter, tversky
from .figures import Gaps, title
from .rows import part
from .story import Story
from .tasks import tasks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COSTS = {
    "parameters": ("perplexity_by_parameters.png", "Quality against parameters"),
    "decode_latency": ("perplexity_by_decode_time.png", "Quality against decode time"),
    "prefill_latency": ("perplexity_by_prefill_time.png", "Quality against prefill time"),
}
_TASKS = {"imdb": "task_imdb.png", "rouge": "task_rouge.png", "generation": "task_generation.png"}
_OTHER = "task_other.png"
_RUNS = {
    "windows": "windows.png",
    "curves": "recovery.png",
    "alignment": "alignment.png",
    "tversky": "tversky.png",
    "hierarchy": "hierarchy.png",
}

_EXTRAPOLATION, _LENGTHS, _ASSISTED = "extrapolation.png", "lengths.png", "assisted.png"

# Every plot that a report may have; one that it has not is removed where an earlier report left it.
FILES = (
    *(file for file, _ in _COSTS.values()),
    _EXTRAPOLATION,
    _LENGTHS,
    _ASSISTED,
    *_TASKS.values(),
    _OTHER,
    *_RUNS.values(),
)


@dataclass(frozen=True)
class Picture:
    """A plot, and how to read it."""

    file: str
    title: str
    caption: str
    figure: Figure

    def png(self) -> bytes:
        return drawing.png(self.figure)

    def svg(self) -> str:
        """An <svg> element for a page."""
        return drawing.svg(self.figure, self.file.removesuffix(".png"))


def pictures(report: Report, gaps: Gaps, stories: Sequence[Story]) -> list[Picture]:
    """The plots that the report has figures for, in the order in which they are shown."""
    offered: list[tuple[str, str, str, Callable[[], Figure | None]]] = [
        (file, head, scatter.caption(report, cost), partial(scatter.plot, report, cost))
        for cost, (file, head) in _COSTS.items()
    ]
    reach = partial(extrapolation_plot.plot, report, gaps)
    offered.append((_EXTRAPOLATION, extrapolation_plot.TITLE, extrapolation_plot.CAPTION, reach))
    offered.append((_LENGTHS, lengths.TITLE, lengths.CAPTION, partial(lengths.plot, report)))
    offered.append((_ASSISTED, assisted_plot.TITLE, assisted_plot.CAPTION, partial(assisted_plot.plot, report)))
    found = tasks(report, gaps)
    families = list(dict.fromkeys(task.family for task in found))
    for family in [name for name in families if name in _TASKS]:
        own = [task for task in found if task.family == family]
        offered.append((_TASKS[family], title(family), bars.caption(own), partial(bars.plot, report, own)))
    others = [task for task in found if task.family not in _TASKS]
    offered.append((_OTHER, "Other tasks", bars.caption(others), partial(bars.plot, report, others)))
    colours = _by_run(report, stories)
    offered += [
        (_RUNS["windows"], "Search for the window", course.WINDOWS, partial(course.windows, stories, colours)),
        (_RUNS["curves"], "Recovery", course.CURVES, partial(course.curves, stories, colours)),
        (_RUNS["alignment"], "Alignment", course.ALIGNMENT, partial(course.alignment, stories)),
        (_RUNS["tversky"], tversky.TITLE, tversky.CAPTION, partial(tversky.plot, stories)),
        (_RUNS["hierarchy"], hierarchy.TITLE, hierarchy.CAPTION, partial(hierarchy.plot, stories)),
    ]
    with drawing.look():
        drawn = [(file, head, text, draw()) for file, head, text, draw in offered]
    return [Picture(file, head, text, figure) for file, head, text, figure in drawn if figure is not None]


def _by_run(report: Report, stories: Sequence[Story]) -> dict[str, drawing.Look]:
    """The colour that the rows of a run have in the other plots."""
    known = drawing.looks(report)
    own = {part(row.name)[0]: known[row.name] for row in report.rows if part(row.name)[1] in ("rewritten", "recovered")}
    return {story.run: own.get(story.run, drawing.DEFAULT) for story in stories}
