"""What a study found that made no run folders, and its report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import report
from ..artifacts import Provenance
from ..report.content import Content, made_by
from ..report.layout import Table
from ..report.pictures import Picture
from ..report.tasks import Prompt


@dataclass(frozen=True)
class Outcome:
    """What a study counted or measured."""

    body: dict[str, Any]  # of report.json
    tables: tuple[Table, ...]  # the main one first
    findings: tuple[str, ...]
    pictures: tuple[Picture, ...]
    prompts: tuple[Prompt, ...] = ()  # what models wrote


def joined(parts: Sequence[Outcome]) -> Outcome:
    """One report of several parts, in their order."""
    return Outcome(
        body={name: value for part in parts for name, value in part.body.items()},
        tables=tuple(table for part in parts for table in part.tables),
        findings=tuple(line for part in parts for line in part.findings),
        pictures=tuple(picture for part in parts for picture in part.pictures),
        prompts=tuple(prompt for part in parts for prompt in part.prompts),
    )


def publish(name: str, title: str, folder: Path, found: Outcome, origin: Provenance) -> None:
    """Write report.json, report.md, report.html and the plots of a study."""
    main, *tables = found.tables
    told = Content(
        title=title,
        tiles=(),
        findings=found.findings,
        workflow=(),
        main=main,
        tables=tuple(tables),
        missing=None,
        pictures=found.pictures,
        prompts=found.prompts,
        origin=(),
        made=made_by(origin),
        command=origin.command,
    )
    files = [*report.FILES, *(picture.file for picture in found.pictures)]
    report.publish(folder, told, "study", {"study": name, **found.body}, origin, instead_of=files)
