"""Baselines of a run: what one gets for as many parameters, or for as few blocks, by something simpler, tuned alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import GPT2Config

from .. import artifacts, fields, models, run_folder, verify
from ..errors import UserError, unknown
from ..metrics.size import parameters
from ..models import Checkpoint
from ..recipe import Finetune
from ..rewrites import Rewrite, from_record
from ..rewrites.compose import structure
from ..rewrites.dropped_n import DroppedN
from ..rewrites.pruned import Pruned
from ..run_folder import BASELINE_KINDS, RECOVERED, Aligned
from ..session import ANYWHERE, Columns, Session
from .inputs import calibration_blocks, open_base
from .recover import Job, carry_out, control_mode, texts
from .rewrite import write_model


def make(
    run: Path,
    kinds: Sequence[str],
    session: Session,
    *,
    recovery: Finetune | None = None,
    source: str | Mapping[str, str] | None = None,
    columns: Columns = ANYWHERE,
) -> dict[str, Path]:
    """Write RUN/baselines/KIND and, with a recovery, KIND-recovered; returns name -> folder of those there are.

    pruned: the original pruned by magnitude to the number of parameters of the rewritten model. dropped: the original
    without as many blocks as the rewritten model lacks, those of least influence; where it lacks none, without as many
    as save about what it saves. A rewritten model that saves nothing has no such counterpart: a notice says so.
    recovery: that of the run; each baseline is trained in the mode of its control. source, columns: its text, by
    default the run's; on other text than recovered/ was trained on, none is recovered.

    What was made from the same things stays and what was interrupted goes on, unless session.force. Raises UserError
    for an unknown kind, a run without a rewritten model, and a baseline that was made otherwise.
    """
    run = Path(run)
    for kind in kinds:
        if kind not in BASELINE_KINDS:
            raise unknown("baseline", kind, BASELINE_KINDS)
    aligned = run_folder.aligned(run)
    made = run_folder.steps(run)
    if "rewritten" not in made:
        raise UserError(f"{run} has no rewritten model yet; `gpt2-compress rewrite --run {run}` makes one")
    found, place = models.find(str(made["rewritten"])), run / run_folder.BASELINES
    base = models.find(aligned.base_model).config
    wanted = {kind: rewrite for kind in kinds if (rewrite := _counterpart(kind, base, found.config, session))}
    with session.alone() as here:
        if here:
            if place.is_dir():
                artifacts.sweep(place)
            for kind, rewrite in wanted.items():
                _make(run, kind, rewrite.resolved(base), aligned, found.config, session)
    if recovery is not None and wanted:
        _recover(run, list(wanted), recovery, found, aligned, session, source, columns)
    return run_folder.baselines(run, list(wanted))


def budget(run: Path) -> tuple[Finetune, int] | None:
    """The settings and the seed that the recovered model of a run was trained with; None where there is none."""
    folder = run_folder.steps(run).get("recovered")
    body = None if folder is None else run_folder.made(models.find(str(folder)))
    if body is None:
        return None
    known = [field.name for field in dataclasses.fields(Finetune)]
    given = {key: value for key, value in body["made_from"].items() if key in known}
    return fields.from_record(Finetune, given, f"{folder}: made_from"), body["made_from"]["seed"]


# ---------------------------------------------------------------- which rewrite


def _counterpart(kind: str, base: GPT2Config, rewritten: GPT2Config, session: Session) -> Rewrite | None:
    """The baseline of a kind for a rewritten model; None, with a notice, where there is none."""
    before, after = (parameters(models.build(config)) for config in (base, rewritten))
    lacking = base.n_layer - rewritten.n_layer
    if kind == "dropped" and not lacking:
        block = before - parameters(models.build(structure([DroppedN(layers=[0])], base)))
        lacking = min(round((before - after) / block), base.n_layer - 1)
    if after >= before or (kind == "dropped" and lacking < 1):
        why = "saves no parameters" if after >= before else "has all blocks and saves less than half of one"
        session.notice(f"no baseline {kind}: the rewritten model {why}")
        return None
    return Pruned(parameters=after) if kind == "pruned" else DroppedN(n=lacking + 1)


def _make(run: Path, kind: str, rewrite: Rewrite, aligned: Aligned, rewritten: GPT2Config, session: Session) -> None:
    target = run / run_folder.BASELINES / kind
    made_from: dict[str, Any] = {
        "base": aligned.base_hash,
        "rewrite": rewrite.record(),
        "dtype": str(models.parse_dtype(session.dtype)).removeprefix("torch."),
    }
    if rewrite.undecided:
        made_from |= {"calibration": aligned.calibration["fingerprint"], "calibration_seed": aligned.seed}
    if (target / "config.json").is_file() and not session.force:
        body = run_folder.made(models.find(str(target))) or {}
        then = body.get("made_from", {})
        different = [key for key in (*made_from, *then) if then.get(key) != made_from.get(key)]
        if body.get("kind") != verify.BASELINE or different:
            raise UserError(
                f"{target} was made otherwise ({', '.join(dict.fromkeys(different)) or 'by something else'} differ); "
                "--force makes it anew"
            )
        return
    opened = open_base(run, aligned, session)
    counterpart = {"layers": rewritten.n_layer, "parameters": parameters(models.build(rewritten))}
    facts = {"made_from": made_from, "counterpart": counterpart}
    calibration = calibration_blocks(opened, aligned)
    body = write_model(target, verify.BASELINE, [rewrite], opened, aligned, calibration, session, facts)
    if kind == "dropped" and body["layers"] != rewritten.n_layer:
        session.notice(
            f"baseline dropped: the rewritten model has all {rewritten.n_layer} blocks and "
            f"{counterpart['parameters']:,} parameters; the original without {body['layers_before'] - body['layers']} "
            f"comes nearest, with {body['parameters']:,}"
        )


# ---------------------------------------------------------------- recovery


def _recover(
    run: Path,
    kinds: Sequence[str],
    recovery: Finetune,
    found: Checkpoint,
    aligned: Aligned,
    session: Session,
    source: str | Mapping[str, str] | None,
    columns: Columns,
) -> None:
    parts = texts(found, recovery, aligned, session, source, columns)
    recovered = run_folder.steps(run).get("recovered")
    body = None if recovered is None else run_folder.made(models.find(str(recovered)))
    then = {} if body is None else body["provenance"]["data"]
    other = [name for name in parts if name in then and then[name]["fingerprint"] != parts[name].facts["fingerprint"]]
    if other:
        session.notice(
            f"warning: no baseline is recovered, for {recovered} was on other {' and '.join(other)} text than this"
        )
        return
    place = run / run_folder.BASELINES
    jobs = []
    for kind in kinds:
        start = models.find(str(place / kind))
        rewrites = tuple(from_record(record) for record in start.config.compression)
        mode = control_mode(recovery.train)
        jobs.append(Job(kind + RECOVERED, str(start.folder), artifacts.hash_files(list(start.files)), rewrites, mode))
    carry_out(run, place, jobs, recovery, parts, aligned, session, resume=not session.force)
