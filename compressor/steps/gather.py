"""The reports of several runs in, one report out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from .. import artifacts, report
from ..benchmark import Report
from ..errors import UserError
from ..report.merge import data, merge
from ..session import Session, must_be_folder
from .story import stories


def gather(runs: Sequence[str], out: Path, session: Session) -> Report:
    """Write one report about several runs, or other folders that `benchmark` wrote a report into, to `out`.

    Nothing is measured anew: their report.json are read. Raises UserError for a folder without one, for one that is
    named twice, and where `out` has a report already, unless session.force.
    """
    out = Path(out)
    must_be_folder(out)
    folders = {name: Path(name).expanduser() for name in runs}
    places = [folder.resolve() for folder in folders.values()]
    if len(set(places)) < len(runs):
        raise UserError("a RUN is named twice")
    if out.resolve() in places:
        raise UserError(f"{out} is one of the runs, whose own report would be lost; give another --out")
    if (out / "config.json").is_file():
        raise UserError(f"{out} is a model's folder; give another --out")
    if (out / "report.json").exists() and not session.force:
        raise UserError(f"{out} has a report already; give another --out, or --force to replace it")
    named = _names(folders)
    found = {named[name]: _read(name, folder) for name, folder in folders.items()}
    first = next(iter(found.values())).origin
    origin = dataclasses.replace(first, command=artifacts.command_line(), data=data(found))
    result = merge(found, origin)
    _warn(found, session)
    told = [dataclasses.replace(story, run=named[name] if len(runs) > 1 else "")
            for name in runs for story in stories([name], session.notice)]  # fmt: skip
    report.write(out, result, told)
    return result


def _read(name: str, folder: Path) -> Report:
    if not folder.is_dir():
        raise UserError(f"{name} is no folder; allowed: run folders, and what `benchmark --out` wrote")
    if not (folder / "report.json").is_file():
        raise UserError(f"{name} has no report.json; `gpt2-compress benchmark {name} --out {name}` makes it")
    return report.read(folder)


def _names(folders: Mapping[str, Path]) -> dict[str, str]:
    """RUN -> what stands before its rows: its folder's name, or all of it where two have one name."""
    found: dict[str, str] = {}
    for name, folder in folders.items():
        short = folder.resolve().name
        found[name] = name if short in found.values() else short
    return found


def _warn(found: Mapping[str, Report], session: Session) -> None:
    base = next(iter(found.values())).rows[0]
    others = [run for run, report in found.items() if report.rows[0].weights != base.weights]
    if others:
        session.notice(
            f"warning: {', '.join(others)} began from another original; ratios are to {base.name} of the first"
        )
    prints = {run: {m: f.get("fingerprint") for m, f in report.origin.data.items()} for run, report in found.items()}
    metrics = {metric for own in prints.values() for metric in own}
    for metric in sorted(m for m in metrics if len({own[m] for own in prints.values() if m in own}) > 1):
        session.notice(f"warning: {metric} was taken on different text by these runs; only equal text is compared")
    versions = {(report.origin.version, report.origin.torch, report.origin.device) for report in found.values()}
    if len(versions) > 1:
        session.notice("warning: these runs were measured by other versions or on other devices")
