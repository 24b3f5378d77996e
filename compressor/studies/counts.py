"""A study that counts: structures on the meta device instead of runs. It needs no data, no training and seconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import artifacts, report
from ..artifacts import Provenance
from ..errors import UserError
from ..report.content import Content, made_by
from ..report.layout import Table
from ..report.pictures import Picture
from ..report.tasks import Prompt
from ..session import ANYWHERE, Columns, Session, must_be_folder


@dataclass(frozen=True)
class Outcome:
    """What a study counted or measured."""

    body: dict[str, Any]  # of report.json
    tables: tuple[Table, ...]  # the main one first
    findings: tuple[str, ...]
    pictures: tuple[Picture, ...]
    prompts: tuple[Prompt, ...] = ()  # what models wrote


@dataclass(frozen=True)
class CountStudy:
    """Structures that are compared by their counts."""

    name: str
    title: str
    count: Callable[[], Outcome]


def run_counts(
    study: CountStudy,
    folder: Path,
    overrides: Sequence[str],
    session: Session,
    *,
    columns: Columns = ANYWHERE,
) -> Outcome:
    """Count, and write report.json, report.md, report.html and the plots into `folder`.

    Raises UserError for a folder that has something in it, unless session.force, which replaces the report there, and
    for overrides, columns or a seed: nothing that a study of counts does depends on them.
    """
    given = [*overrides, *(f"--{name.replace('_', '-')}" for name, value in vars(columns).items() if value is not None)]
    if given:
        raise UserError(f"{study.name} counts fixed structures and takes no settings; given: {given[0]}")
    folder = Path(folder)
    must_be_folder(folder)
    with session.alone() as here:
        if here and folder.is_dir():
            artifacts.sweep(folder)
            if any(folder.iterdir()) and not session.force:
                raise UserError(f"{folder} exists already; give another --run, or --force to replace its report")
    counted = study.count()
    with session.alone() as here:
        if here:
            origin = artifacts.provenance(
                seed=session.seed,
                base_model="none: structures of configs",
                base_hash="",
                device="meta",
                dtype="float32",
            )
            publish(study.name, study.title, folder, counted, origin)
    return counted


def joined(parts: Sequence[Outcome]) -> Outcome:
    """One report of several parts, in their order."""
    return Outcome(
        body={name: value for part in parts for name, value in part.body.items()},
        tables=tuple(table for part in parts for table in part.tables),
        findings=tuple(line for part in parts for line in part.findings),
        pictures=tuple(picture for part in parts for picture in part.pictures),
        prompts=tuple(prompt for part in parts for prompt in part.prompts),
    )


def publish(name: str, title: str, folder: Path, counted: Outcome, origin: Provenance) -> None:
    """Write report.json, report.md, report.html and the plots of a study."""
    main, *tables = counted.tables
    told = Content(
        title=title,
        tiles=(),
        findings=counted.findings,
        workflow=(),
        main=main,
        tables=tuple(tables),
        missing=None,
        pictures=counted.pictures,
        prompts=counted.prompts,
        origin=(),
        made=made_by(origin),
        command=origin.command,
    )
    files = [*report.FILES, *(picture.file for picture in counted.pictures)]
    report.publish(folder, told, "counts", {"study": name, **counted.body}, origin, instead_of=files)
