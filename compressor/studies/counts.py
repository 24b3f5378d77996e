"""A study that counts: structures on the meta device instead of runs. It needs no data, no training and seconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import artifacts
from ..errors import UserError
from ..session import ANYWHERE, Columns, Session, must_be_folder
from .outcome import Outcome, publish


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
