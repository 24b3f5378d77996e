"""Step 5: rewritten/ and training text in, recovered/ out; with a control also control/, the original tuned alike."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import artifacts, models, run_folder, training_state, verify
from ..errors import UserError
from ..finetune import Recovery, StateFolder, control_train, resolve_train
from ..finetune import finetune as recover
from ..metrics.size import flops_per_token, parameters, weight_bytes
from ..models import OpenModel
from ..recipe import Finetune
from ..rewrites import Rewrite, from_record
from ..run_folder import Aligned
from ..session import ANYWHERE, Columns, Session
from .inputs import Part, open_base, part

CHECKPOINTS = "checkpoints"


def finetune(
    run: Path,
    settings: Finetune,
    session: Session,
    *,
    source: str | Mapping[str, str] | None = None,
    columns: Columns = ANYWHERE,
    resume: bool = False,
) -> dict[str, dict[str, Any]]:
    """Train the rewritten model and, with settings.control, the original; returns name -> body of its report.json.

    source: training and selection text, by default those of the run. resume: what is finished stays, what was
    interrupted goes on exactly. Several processes share each batch. Raises UserError, before any training, for
    settings that this model cannot take and for results that are there already.
    """
    run = Path(run)
    made = run_folder.steps(run)
    aligned = run_folder.aligned(run)
    if "rewritten" not in made:
        raise UserError(f"{run} has no rewritten model yet; `gpt2-compress rewrite --run {run}` makes one")
    rewritten = session.open(str(made["rewritten"]))
    rewrites = [from_record(record) for record in rewritten.model.config.compression]
    mode = resolve_train(settings.train, rewritten.model, rewrites)
    context = rewritten.model.config.n_positions if settings.context is None else settings.context
    tokens = {"training": settings.steps * settings.batch_tokens, "selection": settings.selection_tokens}
    parts = {
        name: part(
            name, rewritten, aligned, source, columns, context=context, max_tokens=tokens[name], seed=session.seed
        )
        for name in tokens
    }
    base = open_base(run, aligned, session) if settings.distill or settings.control else None
    jobs = [Job("recovered", rewritten, rewrites, mode, base if settings.distill else None)]
    if settings.control:
        assert base is not None
        jobs.append(Job("control", base, [], control_train(settings.train), None))
    asked = dataclasses.asdict(settings)
    given = {job.name: made_from(job.opened.hash, asked, parts, session.seed) for job in jobs}
    if not resume:
        _refuse_what_is_there(run, jobs, session)
    done = {job.name: finished(run, job.name, given[job.name]) if resume else None for job in jobs}
    if session.main:
        artifacts.sweep(run)
    bodies = {}
    for job in jobs:
        kept = done[job.name]
        if kept is not None and session.main:  # killed between the result and this
            artifacts.remove(run / CHECKPOINTS / job.name)
            _remove_empty(run / CHECKPOINTS)
        bodies[job.name] = (
            _train(run, job, asked, given[job.name], parts, aligned, session, resume) if kept is None else kept
        )
    return bodies


@dataclass(frozen=True)
class Job:
    """One model to train."""

    name: str  # of the folder it goes to
    opened: OpenModel
    rewrites: list[Rewrite]
    train: str
    teacher: OpenModel | None


def _refuse_what_is_there(run: Path, jobs: list[Job], session: Session) -> None:
    for job in jobs:
        if (run / job.name).exists() and not session.force:
            raise UserError(f"{run / job.name} exists already; --force replaces it, --resume keeps it")
        if (run / CHECKPOINTS / job.name).exists() and not session.force:
            raise UserError(
                f"{run} has the checkpoint of an interrupted recovery; --resume goes on from it, --force begins anew"
            )


# What decides neither where a training ends nor what is in its folder.
_WITHOUT_EFFECT = ("control", "checkpoint_every")


def made_from(start: str, asked: Mapping[str, Any], parts: Mapping[str, Part], seed: int) -> dict[str, Any]:
    """Everything that decides what comes out of a recovery of the weights `start`."""
    settings = {name: value for name, value in asked.items() if name not in _WITHOUT_EFFECT}
    return {
        "start": start,
        **settings,
        "seed": seed,
        **{name: item.blocks.fingerprint for name, item in parts.items()},
    }


def finished(run: Path, name: str, given: Mapping[str, Any]) -> dict[str, Any] | None:
    """The body of the report of a recovery that was made from what is given; None where there is none.

    Raises UserError for one that was made otherwise.
    """
    folder = run_folder.steps(run).get(name)
    if folder is None:
        return None
    body = run_folder.made(models.find(str(folder)))
    if body is None or body["kind"] != verify.RECOVERY:
        raise UserError(f"{folder} was not made by `gpt2-compress finetune`; give another --run, or --force")
    for key, value in given.items():
        if body["made_from"].get(key) != value:
            then = body["made_from"].get(key)
            raise UserError(f"{folder} was made with {key}={then}, now it is {value}; --force makes it anew")
    return {key: value for key, value in body.items() if key not in ("kind", "schema", "provenance")}


def _train(
    run: Path,
    job: Job,
    asked: Mapping[str, Any],
    given: Mapping[str, Any],
    parts: Mapping[str, Part],
    aligned: Aligned,
    session: Session,
    resume: bool,
) -> dict[str, Any]:
    opened, target = job.opened, run / job.name
    origin = dataclasses.replace(
        session.origin(
            opened, {"calibration": aligned.calibration, **{name: item.facts for name, item in parts.items()}}
        ),
        base_model=aligned.base_model,
        base_hash=aligned.base_hash,
    )
    state = StateFolder(run / CHECKPOINTS / job.name, dataclasses.replace(origin, base_hash=opened.hash))
    if not resume and session.main:
        training_state.remove(state)
    session.processes.wait()
    with session.bar(job.name, asked["steps"], "step") as bar:

        def show(step: Any) -> None:
            bar.update(step.step - bar.n)
            terms = {"loss": step.nll, "KL": step.divergence, "penalty": step.penalty}
            bar.set_postfix({name: f"{value:.3f}" for name, value in terms.items() if value is not None}, refresh=False)

        result = recover(
            opened.model,
            parts["training"].blocks,
            parts["selection"].blocks,
            rewrites=job.rewrites,
            train=job.train,
            teacher=None if job.teacher is None else job.teacher.model,
            seed=session.seed,
            rank=asked["lora_rank"],
            alpha=asked["lora_alpha"],
            state_folder=state,
            resume=resume,
            progress=show,
            **{name: asked[name] for name in _PASSED_ON},
        )
    body: dict[str, Any] = {}
    with session.alone() as here:
        if here:
            body = _save(target, job, result, given, origin)
            training_state.remove(state)
            _remove_empty(run / CHECKPOINTS)
    return body


_PASSED_ON = ("steps", "batch_tokens", "learning_rate", "penalty", "mix", "warm_up", "weight_decay", "clip", "dropout",
              "evaluate_every", "checkpoint_every", "autocast")  # fmt: skip


def _remove_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _save(
    target: Path,
    job: Job,
    result: Recovery,
    given: Mapping[str, Any],
    origin: artifacts.Provenance,
) -> dict[str, Any]:
    opened = job.opened
    earlier = verify.made(opened.folder, opened.model.config)
    with artifacts.new_folder(target, force=True) as folder:
        models.save(opened.model, folder, opened.tokenizer, opened.stored_dtype)
        count = parameters(opened.model)
        best = next(row for row in result.evaluations if row.step == result.best_step)
        body = {
            "made_from": dict(given),
            "rewrites": [item.record() for item in job.rewrites],
            "layers": opened.model.config.n_layer,
            "parameters": count,
            "parameters_before": earlier["parameters_before"] if earlier else count,
            "bytes": weight_bytes(folder),
            "flops_per_token": flops_per_token(opened.model),
            "weights": artifacts.hash_files(models.weight_files(str(target), folder)),
            "probe": models.probe(opened.model.float()),
            "selection_perplexity": {
                "before": _perplexity(result.evaluations[0].nll),
                "after": _perplexity(best.nll),
            },
            "recovery": dataclasses.asdict(result),
        }
        artifacts.write_json(folder / verify.REPORT, verify.RECOVERY, body, origin)
    return body


def _perplexity(nll: float) -> float | None:
    """None for a model so broken that its perplexity is beyond a float."""
    return math.exp(nll) if nll < 700 else None
