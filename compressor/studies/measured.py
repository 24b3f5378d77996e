"""A study that measures with settings. What is finished stays in its folder, so that an interrupted one goes on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import artifacts, fields, report
from ..artifacts import Provenance
from ..errors import UserError
from ..recipe import parse_yaml
from ..session import ANYWHERE, Columns, Session, must_be_folder
from .outcome import Outcome, publish

STATE = "measured.json"


@dataclass(frozen=True)
class Kept:
    """Measurements of a study by name, each a JSON record, in a file that is written anew with every one."""

    file: Path
    study: str
    settings: dict[str, Any]
    origin: Provenance
    records: dict[str, Any]

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        """The record of this name: from an earlier start, or measured now."""
        if name not in self.records:
            self.records[name] = measure()
            body = {"study": self.study, "settings": self.settings, "records": self.records}
            artifacts.write_json(self.file, "measurements", body, self.origin)
        return self.records[name]


@dataclass(frozen=True)
class MeasuredStudy:
    """settings: a frozen dataclass whose every field has a default. begin: opens what is measured, and says where the
    figures will come from; measure: takes the settings, what was opened, what is kept, and where to compute."""

    name: str
    title: str
    settings: type
    begin: Callable[[Any, Session, Columns], tuple[Any, Provenance]]
    measure: Callable[[Any, Any, Kept, Session], Outcome]
    folders: tuple[str, ...] = ()  # of its own within the study's


def run_measured(
    study: MeasuredStudy, folder: Path, overrides: Sequence[str], session: Session, *, columns: Columns = ANYWHERE
) -> Outcome:
    """Measure, and write report.json, report.md, report.html and the plots into `folder`; going on where an
    interrupted start with the same settings stopped.

    overrides: key=value of the study's settings. Raises UserError for settings that there are not, for a folder that
    has something else in it, unless session.force, and for more than one process: they would be in each other's way.
    """
    if session.processes.world > 1:
        raise UserError(f"{study.name} measures times and runs in one process; given: {session.processes.world}")
    settings = settings_of(study, overrides)
    folder = Path(folder)
    must_be_folder(folder)
    subject, origin = study.begin(settings, session, columns)
    kept = _kept(study, folder, dataclasses.asdict(settings), origin, session)
    counted = study.measure(settings, subject, kept, session)
    publish(study.name, study.title, folder, counted, origin)
    return counted


def settings_of(study: MeasuredStudy, overrides: Sequence[str]) -> Any:
    """The settings with key=value put in. Raises UserError naming what is allowed."""
    record: dict[str, Any] = {}
    for override in overrides:
        key, _, text = override.partition("=")
        record[key] = parse_yaml(text, override)
    return fields.from_record(study.settings, record, study.name)


def _kept(study: MeasuredStudy, folder: Path, settings: dict[str, Any], origin: Provenance, session: Session) -> Kept:
    file = folder / STATE
    kept = Kept(file, study.name, settings, origin, {})
    if folder.is_dir():
        artifacts.sweep(folder)
        if session.force:
            for name in (STATE, *study.folders, *report.FILES):
                artifacts.remove(folder / name)
        elif file.is_file():
            kept.records.update(_found(kept))
        elif any(folder.iterdir()):
            raise UserError(f"{folder} exists already and is no {study.name}; give another --run, or --force")
    return kept


def _found(kept: Kept) -> dict[str, Any]:
    """The records of an earlier start. Raises UserError where they are of something else."""
    body = artifacts.read_json(kept.file, "measurements", f"study {kept.study}")
    wanted, there = {"study": kept.study, **kept.settings}, {"study": body["study"], **body["settings"]}
    for name in ("seed", "base_hash", "device", "dtype", "threads", "torch"):
        wanted[name], there[name] = getattr(kept.origin, name), body["provenance"][name]
    changed = [name for name in wanted if wanted[name] != there.get(name)]
    if changed:
        raise UserError(
            f"{kept.file.parent} was begun with another {', '.join(changed)}; give another --run, or --force to begin "
            "anew"
        )
    return body["records"]
