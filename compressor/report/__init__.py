"""What a benchmark measured, for readers: report.json for programs, report.md, report.html and plots for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import artifacts
from ..artifacts import Provenance
from ..benchmark import Report
from . import markdown, page, pictures
from .content import Content, content
from .figures import Gaps
from .layout import Table
from .story import Story

# All that `write` may leave in a folder.
FILES = ("report.json", "report.md", "report.html", *pictures.FILES)


def write(folder: Path, report: Report, stories: Sequence[Story] = ()) -> None:
    """Write report.json, report.md, report.html and the plots that there are figures for into `folder`.

    stories: of the run folders whose models the report is about. Plots of an earlier report that this one has not are
    removed. Raises UserError when the disk refuses; then nothing has changed.
    """
    publish(Path(folder), content(report, stories), "report", report.to_dict(), report.origin, instead_of=FILES)


def publish(
    folder: Path, told: Content, kind: str, body: Mapping[str, Any], origin: Provenance, *, instead_of: Sequence[str]
) -> None:
    """Write what is told as report.md, report.html and plots, and `body` as report.json of this kind, all together.

    instead_of: files that go where they are not written anew. Raises UserError as `write`.
    """
    files = {picture.file: picture.png() for picture in told.pictures}
    files["report.md"] = markdown.document(told).encode()
    files["report.html"] = page.document(told).encode()
    with artifacts.new_files(folder, instead_of=instead_of) as temporary:
        artifacts.write_json(temporary / "report.json", kind, body, origin)
        for name, made in files.items():
            artifacts.write_bytes(temporary / name, made)


def read(folder: Path) -> Report:
    """The report that `write` left in a folder. Raises UserError where there is none."""
    return Report.from_dict(artifacts.read_json(Path(folder) / "report.json", "report", "benchmark"))


def table(report: Report) -> str:
    """What a terminal shows: the main table, further ways of measuring, tasks, and why anything is missing."""
    return markdown.terminal(report, Gaps(report))


def text(tables: Sequence[Table], findings: Sequence[str]) -> str:
    """What a terminal shows of tables that belong to no benchmark."""
    return "\n\n".join([*map(markdown.headed, tables), "\n".join(f"- {line}" for line in findings)])
