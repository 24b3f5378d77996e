"""Step 5: rewritten/ and training text in, recovered/ out; with a control also control/, the original tuned alike."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import artifacts, data, models, run_folder, training_state, verify
from ..errors import UserError
from ..finetune import Recovery, StateFolder, control_train, resolve_train
from ..finetune import finetune as recover
from ..metrics.cache import cache_bytes
from ..metrics.flops import flops_per_token
from ..metrics.size import parameters, weight_bytes
from ..models import Checkpoint, OpenModel
from ..recipe import Finetune
from ..rewrites import Rewrite, from_record
from ..run_folder import Aligned
from ..session import ANYWHERE, Columns, Notice, Session
from ..token_groups import token_strings
from . import cards
from .diagnose import diagnostics
from .inputs import Part, calibration_blocks, open_base, part

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
    if session.main and run.is_dir():
        artifacts.sweep(run)
    session.processes.wait()
    made = run_folder.steps(run)
    aligned = run_folder.aligned(run)
    if "rewritten" not in made:
        raise UserError(f"{run} has no rewritten model yet; `gpt2-compress rewrite --run {run}` makes one")
    found = models.find(str(made["rewritten"]))
    rewrites = [from_record(record) for record in found.config.compression]
    mode = resolve_train(settings.train, models.build(found.config), rewrites)
    jobs = [Job("recovered", str(found.folder), artifacts.hash_files(list(found.files)), tuple(rewrites), mode)]
    if settings.control:
        jobs.append(Job("control", None, aligned.base_hash, (), control_mode(settings.train)))
    parts = texts(found, settings, aligned, session, source, columns)
    if not resume:
        _refuse_what_is_there(run, jobs, session)
    return carry_out(run, run, jobs, settings, parts, aligned, session, resume)


def texts(
    found: Checkpoint,
    settings: Finetune,
    aligned: Aligned,
    session: Session,
    source: str | Mapping[str, str] | None = None,
    columns: Columns = ANYWHERE,
) -> dict[str, Part]:
    """The training and the selection text of a recovery, in blocks for the model `found`. Raises UserError where they
    share text with each other or with the calibration."""
    context = found.config.n_positions if settings.context is None else settings.context
    tokenizer = models.open_tokenizer(found.name, found.folder, found.config)
    tokens = {"training": settings.steps * settings.batch_tokens, "selection": settings.selection_tokens}
    parts = {
        name: part(
            name, found.config, tokenizer, aligned, source, columns,
            context=context, max_tokens=tokens[name], seed=session.seed,
        )
        for name in tokens
    }  # fmt: skip
    if data.overlap(parts["training"].facts, parts["selection"].facts):
        raise UserError(
            f"the training text ({parts['training'].facts['source']}) and the selection text "
            f"({parts['selection'].facts['source']}) share text; the best state would be chosen on what was trained on"
        )
    if context < found.config.n_positions:
        session.notice(
            f"finetune: context={context} trains that many of the {found.config.n_positions} positions, and the "
            f"others may get worse; measure at context={context} then, or leave context out"
        )
    if settings.batch_tokens < context:
        session.notice(f"finetune: batch_tokens={settings.batch_tokens} is less than one block; a step takes {context}")
    return parts


def carry_out(
    run: Path,
    place: Path,
    jobs: Sequence[Job],
    settings: Finetune,
    parts: Mapping[str, Part],
    aligned: Aligned,
    session: Session,
    resume: bool,
) -> dict[str, dict[str, Any]]:
    """Train each model of `jobs` alike, into the folders of their names in `place`; returns name -> body of its report.

    resume: a result that was made from the same things stays, an interrupted training goes on. Raises UserError for a
    result that was made otherwise.
    """
    asked = dataclasses.asdict(settings)
    given = {job.name: made_from(job, asked, parts, session.seed) for job in jobs}
    # A stored state is gone on from even where a result lies beside it, which may be an older one.
    resumed = [job.name for job in jobs if resume and not (place / CHECKPOINTS / job.name / "state").exists()]
    done = {
        job.name: finished(place / job.name, given[job.name], job.rewrites) if job.name in resumed else None
        for job in jobs
    }
    bodies = {}
    for job in jobs:
        body = done[job.name]
        if body is not None and session.main:  # killed between the result and this
            artifacts.remove(place / CHECKPOINTS / job.name)
            _remove_empty(place / CHECKPOINTS)
        if body is None:
            body = _train(run, place, job, asked, given[job.name], parts, aligned, session, resume)
        bodies[job.name] = body
    return bodies


def control_mode(train: str) -> str:
    """How the original is tuned beside a recovery in mode `train`."""
    return "full" if control_train(train) == "full" else "lora"


@dataclass(frozen=True)
class Job:
    """One model to train; it is opened when its turn comes."""

    name: str  # of the folder it goes to
    model: str | None  # what is opened; None: the original
    hash: str  # of its weight files
    rewrites: tuple[Rewrite, ...]
    train: str  # deltas | lora | full


def _refuse_what_is_there(run: Path, jobs: Sequence[Job], session: Session) -> None:
    for job in jobs:
        if (run / job.name).exists() and not session.force:
            raise UserError(f"{run / job.name} exists already; --force replaces it, --resume keeps it")
    if (run / CHECKPOINTS).exists() and not session.force:
        raise UserError(
            f"{run} has the checkpoint of an interrupted recovery; --resume with the same options goes on from it, "
            "--force begins anew"
        )
    if session.main:
        artifacts.remove(run / CHECKPOINTS)


# What decides neither where a training ends nor what is in its folder; and what a control has not.
_WITHOUT_EFFECT = ("control", "checkpoint_every", "forward_tokens")
_NOT_THE_CONTROLS = ("distill", "mix", "penalty")


def made_from(job: Job, asked: Mapping[str, Any], parts: Mapping[str, Part], seed: int) -> dict[str, Any]:
    """Everything that decides what comes out of a recovery."""
    without = _WITHOUT_EFFECT if job.rewrites else (*_WITHOUT_EFFECT, *_NOT_THE_CONTROLS)
    settings = {name: value for name, value in asked.items() if name not in without}
    return {
        "start": job.hash,
        **settings,
        "train": job.train,
        "seed": seed,
        **{name: item.blocks.fingerprint for name, item in parts.items()},
    }


def finished(folder: Path, given: Mapping[str, Any], rewrites: Sequence[Rewrite]) -> dict[str, Any] | None:
    """The body of the report of a recovery that was made from what is given; None where there is none.

    Raises UserError for one that was made otherwise.
    """
    if not (folder / "config.json").is_file():
        return None
    body = run_folder.made(models.find(str(folder)))
    if body is None or body["kind"] != verify.RECOVERY:
        raise UserError(f"{folder} was not made by `gpt2-compress finetune`; give another --run, or --force")
    for key, value in given.items():
        if body["made_from"].get(key) != value:
            then = body["made_from"].get(key)
            raise UserError(f"{folder} was made with {key}={then}, now it is {value}; --force makes it anew")
    if list(map(from_record, body["rewrites"])) != list(rewrites):  # which may change how it trains, not what it is
        now = [item.record() for item in rewrites]
        raise UserError(f"{folder} was made with rewrites {body['rewrites']}, now it is {now}; --force makes it anew")
    return {key: value for key, value in body.items() if key not in ("kind", "schema", "provenance")}


def _train(
    run: Path,
    place: Path,
    job: Job,
    asked: Mapping[str, Any],
    given: Mapping[str, Any],
    parts: Mapping[str, Part],
    aligned: Aligned,
    session: Session,
    resume: bool,
) -> dict[str, Any]:
    opened = open_base(run, aligned, session) if job.model is None else session.open(job.model)
    teacher = open_base(run, aligned, session) if asked["distill"] and job.model is not None else None
    origin = dataclasses.replace(
        session.origin(
            opened, {"calibration": aligned.calibration, **{name: item.facts for name, item in parts.items()}}
        ),
        base_model=aligned.base_model,
        base_hash=aligned.base_hash,
    )
    state = StateFolder(place / CHECKPOINTS / job.name, dataclasses.replace(origin, base_hash=opened.hash))
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
            teacher=None if teacher is None else teacher.model,
            strings=token_strings(opened.tokenizer, opened.model.config.vocab_size),
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
            body = _save(place / job.name, opened, job, result, given, origin, aligned, session.notice)
            training_state.remove(state)
            _remove_empty(place / CHECKPOINTS)
    return session.processes.all_gather(body)[0]


_PASSED_ON = ("steps", "batch_tokens", "learning_rate", "penalty", "mix", "warm_up", "weight_decay", "clip", "dropout",
              "evaluate_every", "checkpoint_every", "autocast", "forward_tokens")  # fmt: skip


def _remove_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _save(
    target: Path,
    opened: OpenModel,
    job: Job,
    result: Recovery,
    given: Mapping[str, Any],
    origin: artifacts.Provenance,
    aligned: Aligned,
    notice: Notice,
) -> dict[str, Any]:
    earlier = verify.made(opened.folder, opened.model.config)
    with artifacts.new_folder(target, force=True) as folder:
        models.save(opened.model, folder, opened.tokenizer, opened.stored_dtype)
        count = parameters(opened.model)
        best = next(row for row in result.evaluations if row.step == result.best_step)
        sizes = {
            "layers": opened.model.config.n_layer,
            "parameters": count,
            "bytes": weight_bytes(folder),
            "flops_per_token": flops_per_token(opened.model),
            "cache_bytes": cache_bytes(opened.model.config),
        }
        original = {**sizes, "bytes": weight_bytes(opened.folder)}  # the control's; a rewritten model's report tells
        body = {
            "made_from": dict(given),
            "rewrites": [item.record() for item in job.rewrites],
            **sizes,
            **{f"{name}_before": (earlier or {}).get(f"{name}_before", original[name]) for name in sizes},
            "weights": artifacts.hash_files(models.weight_files(str(target), folder)),
            "probe": models.probe(opened.model.float()),
            "selection_perplexity": {
                "before": _perplexity(result.evaluations[0].nll),
                "after": _perplexity(best.nll),
            },
            "recovery": dataclasses.asdict(result),
        }
        body |= diagnostics(
            job.rewrites, opened.model, opened.tokenizer, lambda: calibration_blocks(opened, aligned), notice
        )
        artifacts.write_json(folder / verify.REPORT, verify.RECOVERY, body, origin)
        cards.leave(folder, opened.model.config, target, notice)
    return body


def _perplexity(nll: float) -> float | None:
    """None for a model so broken that its perplexity is beyond a float."""
    return math.exp(nll) if nll < 700 else None
