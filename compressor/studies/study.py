"""What a study is, and how it is run: its members share a model, its data, alignments and one control."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import GPT2Config

from .. import artifacts, models, pipeline, recipe, report, run_folder
from ..benchmark import Report, check_metrics
from ..errors import UserError
from ..recipe import Recipe, parse_yaml
from ..session import ANYWHERE, Columns, Session, must_be_folder
from ..steps.measure import MEASURED

STUDY = "study.yaml"


@dataclass(frozen=True)
class Member:
    """One recipe of a study."""

    name: str
    rewrite: Mapping[str, Any]
    changes: Sequence[str] = ()  # key=value on the study's recipe


@dataclass(frozen=True)
class Study:
    """Members that are compared, and what they share."""

    name: str
    title: str
    recipe: Mapping[str, Any]  # of every member but for its rewrites
    members: tuple[Member, ...] | Callable[[Mapping[str, Any], GPT2Config], tuple[Member, ...]]  # of recipe and model
    before: Collection[str]  # the metrics that the models get right after the rewrite; recovered ones get all
    workflow: tuple[str, ...] = ()  # its steps, and where the report has what came of each

    def of(self, shared: Mapping[str, Any]) -> tuple[Member, ...]:
        """The members for the recipe that they share."""
        if not callable(self.members):
            return self.members
        return self.members(shared, models.find(str(shared["model"])).config)


def run_study(
    study: Study,
    folder: Path,
    overrides: Sequence[str],
    session: Session,
    *,
    columns: Columns = ANYWHERE,
    tell: Callable[[str], None] = lambda message: None,
) -> Report:
    """Make every member in a run folder of its own below `folder`, measure all of them side by side, write one report.

    The members' alignments are made once for each way of aligning, the control (the original, tuned on the same
    budget) once. What is finished stays, so that an interrupted study goes on. overrides: key=value on the recipe that
    the members share. tell: is called with the name of each thing that is begun. Raises UserError as `pipeline.run`.
    """
    shared = recipe.overridden(copy.deepcopy(dict(study.recipe)), overrides)
    members = study.of(shared)
    recipes = {member.name: _recipe(shared, member, index == 0) for index, member in enumerate(members)}
    folder = Path(folder)
    must_be_folder(folder)
    with session.alone() as here:
        if here:
            _claim(folder, study, members, shared, session)
    lenders: dict[Any, Path] = {}
    for name, own in recipes.items():
        tell(name)
        run = folder / name
        lender = lenders.setdefault(own.align, run)
        pipeline.make(run, own, session, columns=columns, lender=None if lender == run else lender)
    with session.alone() as here:
        if here:
            tell("benchmark")
            _benchmark(study, folder, recipes, session)
    return report.read(folder)


def _recipe(shared: Mapping[str, Any], member: Member, first: bool) -> Recipe:
    """The recipe of a member; the first one makes the control for all."""
    record = {**copy.deepcopy(dict(shared)), "rewrites": [dict(member.rewrite)]}
    made = recipe.from_plain(recipe.overridden(record, member.changes))
    if made.finetune is None:
        return made
    return dataclasses.replace(made, finetune=dataclasses.replace(made.finetune, control=first))


def _claim(folder: Path, study: Study, members: Sequence[Member], shared: Mapping[str, Any], session: Session) -> None:
    """Write study.yaml, or find the same one there."""
    stored = folder / STUDY
    wanted = {"study": study.name, "recipe": dict(shared), "members": [member.name for member in members]}
    if session.force:
        for name in (STUDY, *report.FILES):
            artifacts.remove(folder / name)
    elif stored.is_file():
        if parse_yaml(stored.read_text(encoding="utf-8"), str(stored)) != wanted:
            raise UserError(
                f"{folder} holds another study, or this one of another recipe; give another --run or --force"
            )
    elif folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} exists already and is no study; give another --run, or --force")
    if not stored.is_file():
        artifacts.write_bytes(stored, yaml.safe_dump(wanted, sort_keys=False).encode())


def rows(folder: Path, recipes: Mapping[str, Recipe]) -> dict[str, str]:
    """Row -> MODEL: the original, the control, and each member as rewritten and as recovered, with its slices and
    baselines."""
    first, own = next(iter(recipes.items()))
    found = {"original": own.model}
    if own.finetune is not None:
        found["control"] = str(folder / first / "control")
    for name, own in recipes.items():
        found[f"{name}: rewritten"] = str(folder / name / "rewritten")
        if own.finetune is not None:
            found[f"{name}: recovered"] = str(folder / name / "recovered")
        more = run_folder.slices(folder / name) | run_folder.baselines(folder / name)
        found |= {f"{name}: {row}": str(model) for row, model in more.items()}
    return found


def _benchmark(study: Study, folder: Path, recipes: Mapping[str, Recipe], session: Session) -> None:
    if (folder / "report.json").is_file() and not session.force:
        artifacts.remove(folder / MEASURED)  # killed between the report and this
        return
    shared, found = next(iter(recipes.values())), rows(folder, recipes)
    pipeline.run_benchmark(
        [str(folder / name) for name in recipes],
        folder,
        shared.benchmark.metrics,
        shared.benchmark.data,
        session,
        rows=found,
        only=_only(study, list(found), shared),
        baselines=shared.benchmark.baselines,
        title=study.title,
        workflow=study.workflow,
    )


def _only(study: Study, found: Sequence[str], shared: Recipe) -> dict[str, set[str]]:
    """The metrics of the rows that do not get all of them."""
    untrained = ("rewritten", run_folder.UNTRAINED, *run_folder.BASELINE_KINDS)
    asked = {metric for metric, _ in check_metrics(shared.benchmark.metrics)}
    early = [row for row in found if shared.finetune is not None and ": " in row and row.endswith(untrained)]
    return {row: set(study.before) for row in early if set(study.before) != asked}
