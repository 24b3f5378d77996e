"""What a benchmark measured, for readers: report.json for programs, report.md, report.html and plots for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .. import artifacts
from ..benchmark import Report
from . import markdown, page, pictures
from .content import content
from .figures import Gaps
from .story import Story

# All that `write` may leave in a folder.
FILES = ("report.json", "report.md", "report.html", *pictures.FILES)


def write(folder: Path, report: Report, stories: Sequence[Story] = ()) -> None:
    """Write report.json, report.md, report.html and the plots that there are figures for into `folder`.

    stories: of the run folders whose models the report is about. Plots of an earlier report that this one has not are
    removed. Raises UserError when the disk refuses; then nothing has changed.
    """
    folder = Path(folder)
    told = content(report, stories)
    files = {picture.file: picture.png() for picture in told.pictures}
    files["report.md"] = markdown.document(told).encode()
    files["report.html"] = page.document(told).encode()
    with artifacts.new_files(folder, instead_of=FILES) as temporary:
        artifacts.write_json(temporary / "report.json", "report", report.to_dict(), report.origin)
        for name, made in files.items():
            artifacts.write_bytes(temporary / name, made)


def read(folder: Path) -> Report:
    """The report that `write` left in a folder. Raises UserError where there is none."""
    return Report.from_dict(artifacts.read_json(Path(folder) / "report.json", "report", "benchmark"))


def table(report: Report) -> str:
    """What a terminal shows: the main table, further ways of measuring, tasks, and why anything is missing."""
    return markdown.terminal(report, Gaps(report))
