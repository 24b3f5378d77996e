"""Which rows of a report belong together, by the names that benchmark gives them: "RUN: STEP", or a step alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..benchmark import Report, Row

BASELINES = ("pruned", "dropped")  # models of a run that are there to be compared with
RECOVERED = "-recovered"  # what the name of one ends in that got the run's recovery
STEPS = ("control", "rewritten", "recovered", *BASELINES, *(kind + RECOVERED for kind in BASELINES))
BEFORE = ("rewritten", *BASELINES)  # steps that a recovery may follow
SLICE, UNTRAINED = "slice ", " (rewritten)"  # of models cut out of a run's own, before recovery the latter too


def part(name: str) -> tuple[str, str]:
    """(run, step) of a row's name: "mine: control" is ("mine", "control"), "control" ("", "control"); any other row
    is itself, without a step."""
    run, colon, step = name.rpartition(": ")
    own = step in STEPS or step.startswith(SLICE)
    return (run, step) if own and (colon or not run) else (name, "")


def is_slice(step: str) -> bool:
    return step.startswith(SLICE)


def untrained(step: str) -> bool:
    """Whether a step stands before a recovery."""
    return step in BEFORE or (is_slice(step) and step.endswith(UNTRAINED))


def runs(report: Report) -> list[str]:
    """The runs of which a rewritten or a recovered model was measured."""
    parts = [part(row.name) for row in report.rows]
    return list(dict.fromkeys(run for run, step in parts if step in ("rewritten", "recovered")))


def member(report: Report, run: str, step: str) -> Row | None:
    """A step of a run; a control that several runs have in common belongs to each of them."""
    rows = {part(row.name): row for row in report.rows}
    return rows.get((run, step)) or (rows.get(("", step)) if step == "control" else None)


def recovered_from(step: str) -> str | None:
    """The step that a recovered model comes from: "rewritten" of "recovered", "pruned" of "pruned-recovered"."""
    if step == "recovered":
        return "rewritten"
    if is_slice(step):
        return None if untrained(step) else step + UNTRAINED
    return step.removesuffix(RECOVERED) if step.endswith(RECOVERED) else None


@dataclass(frozen=True)
class Pair:
    """A model before and after its recovery."""

    name: str  # of the run, of the baseline, or of the slice
    run: str
    before: Row
    after: Row


def pairs(report: Report) -> list[Pair]:
    """What was measured both before and after a recovery, the runs' own models and their baselines."""
    found = []
    for row in report.rows:
        run, step = part(row.name)
        start = recovered_from(step)
        before = member(report, run, start) if start else None
        if before is not None and start is not None:
            name = row.name if is_slice(step) else before.name
            found.append(Pair(run if start == "rewritten" else name, run, before, row))
    return found


def chains(report: Report) -> list[list[Row]]:
    """Models out of one file, those before recovery and those after it apart: the whole one where it was measured, and
    its slices that are smaller in the same parts."""
    found: dict[tuple[str, bool, tuple[str, ...]], list[Row]] = {}
    for row in report.rows:
        run, step = part(row.name)
        if is_slice(step):
            before = untrained(step)
            parts = tuple(word.partition("-")[0] for word in step.removeprefix(SLICE).split("_"))
            whole = member(report, run, "rewritten" if before else "recovered")
            found.setdefault((run, before, parts), [] if whole is None else [whole]).append(row)
    return list(found.values())


def results(report: Report) -> list[Row]:
    """The models that the report is about: what came out of a run, or was given by itself; neither the original, nor
    what is there to be compared with, nor a stage on the way."""
    whole = [run for run in runs(report) if member(report, run, "recovered")]
    kept = []
    for row in report.rows[1:]:
        run, step = part(row.name)
        own = step in ("", "rewritten", "recovered") or is_slice(step)
        if own and not (untrained(step) and run in whole):
            kept.append(row)
    return kept


def counterparts(report: Report, row: Row) -> list[Row]:
    """The baselines of a run that got as much training as this model of it."""
    run, step = part(row.name)
    wanted = {"recovered": [kind + RECOVERED for kind in BASELINES], "rewritten": list(BASELINES)}.get(step, [])
    return [found for name in wanted if (found := member(report, run, name)) is not None]


# ---------------------------------------------------------------- in a sentence


def listed(words: Sequence[str]) -> str:
    """ "a, b and c" """
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def named(models: Sequence[str], most: int = 3) -> str:
    """Some models by name, many by their number."""
    return listed(models) if len(models) <= most else f"{len(models)} models"
