"""What run folders tell a report besides the figures of their models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from .. import models, run_folder, verify
from ..errors import UserError
from ..report.hierarchy import hierarchy
from ..report.story import Alignment, Curve, Pair, Story
from ..report.tversky import diagnosis
from ..session import Notice
from .search import told

T = TypeVar("T")


def stories(names: Sequence[str], notice: Notice) -> list[Story]:
    """Of the run folders among some MODELs. What cannot be read is said, and has no plot."""
    prefixes = run_folder.prefixes(names)
    return [_story(Path(name).expanduser(), prefix, notice) for name, prefix in prefixes.items()]


def _story(run: Path, prefix: str, notice: Notice) -> Story:
    def read(what: Callable[[Path], T], nothing: T) -> T:
        try:
            return what(run)
        except UserError as error:
            notice(f"warning: the report has no plot of this: {error}")
            return nothing

    return Story(
        prefix,
        rewrites=read(_rewrites, ()),
        search=read(told, None),
        curves=read(_curves, ()),
        alignment=read(_alignment, None),
        diagnoses=read(partial(_told, diagnosis), ()),
        hierarchies=read(partial(_told, hierarchy), ()),
    )


def _rewrites(run: Path) -> tuple[dict[str, Any], ...]:
    found = run_folder.steps(run).get("rewritten")
    made = None if found is None else run_folder.made(models.find(str(found)))
    return tuple(made.get("rewrites", ())) if made else ()


def _curves(run: Path) -> tuple[Curve, ...]:
    there = run_folder.steps(run)
    found = [
        (step, run_folder.made(models.find(str(there[step])))) for step in ("recovered", "control") if step in there
    ]
    return tuple(_curve(step, made, there[step]) for step, made in found if made and made["kind"] == verify.RECOVERY)


def _curve(step: str, made: dict[str, Any], folder: Path) -> Curve:
    done = made["recovery"]
    try:
        return Curve(
            step,
            str(done["train"]),
            tuple((int(row["step"]), float(row["nll"])) for row in done["curve"]),
            tuple((int(row["step"]), float(row["nll"])) for row in done["evaluations"]),
            int(done["best_step"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder / verify.REPORT} is damaged ({error!r}); make it anew with `gpt2-compress finetune --force`"
        ) from error


def _told(read: Callable[[dict[str, Any], str, str], T | None], run: Path) -> tuple[T, ...]:
    """Of a run's models, what their diagnostics tell."""
    there = run_folder.steps(run)
    found = (
        read(run_folder.made(models.find(str(there[step]))) or {}, step, str(there[step] / verify.REPORT))
        for step in ("rewritten", "recovered")
        if step in there
    )
    return tuple(item for item in found if item is not None)


def _alignment(run: Path) -> Alignment | None:
    aligned = run_folder.aligned(run)
    solved = aligned.alignments
    pairs = tuple(
        Pair(item.anchor, item.layer, item.quality.matched, item.quality.identity, item.quality.random)
        for item in solved.solved
    )
    measure = "correlation" if solved.method == "activation" else "cosine"
    return Alignment(measure, solved.n_layer, pairs, aligned.tensors)
