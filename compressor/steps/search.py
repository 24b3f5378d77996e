"""Step 3: which windows a rewrite should take: a run folder with an alignment in, windows.json out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import GPT2Config

from .. import artifacts, fields, models, run_folder
from ..errors import UserError
from ..fields import parameter_count
from ..plans import PlanResult, search_plan
from ..recipe import Search
from ..report import story
from ..rewrites import Rewrite, from_record
from ..rewrites.base import WindowRewrite
from ..rewrites.compose import check
from ..run_folder import Aligned
from ..search import allowed_windows, score_original, search_windows
from ..session import ANYWHERE, Columns, Session
from ..windows import Candidate, Plan, Race, SearchResult, Window, compared
from .inputs import calibration_blocks, open_base, part

KIND = "windows"
CONTEXT = 256  # of the selection blocks: short ones are many, so that differences between windows have an error


def search_context(settings: Search, config: GPT2Config) -> int:
    """Tokens in a selection block."""
    return min(CONTEXT, config.n_positions) if settings.context is None else settings.context


def windows_file(run: Path) -> Path:
    """Where a run folder keeps its scores."""
    return Path(run) / run_folder.WINDOWS


def search(
    run: Path,
    rewrite: Rewrite,
    settings: Search,
    session: Session,
    *,
    others: Sequence[Rewrite] = (),
    source: str | Mapping[str, str] | None = None,
    columns: Columns = ANYWHERE,
) -> dict[str, Any]:
    """Score the windows that the rewrite may take; returns the body of windows.json.

    The file is replaced after each candidate. An unfinished search of the same rewrite on the same text goes on; scores
    that were taken are not taken again. others: what else the recipe does, with its starts. source: the selection
    text, by default that of the run. Several processes share the candidates.
    """
    run = Path(run)
    aligned = run_folder.aligned(run)
    config = models.find(aligned.base_model).config
    wanted = _without_start(rewrite)
    check([*others, wanted], config)
    others = [item.resolved(config) for item in others]
    if settings.target_parameters is not None:
        parameter_count("target_parameters", settings.target_parameters)  # before the work
    base = open_base(run, aligned, session)
    context = search_context(settings, config)
    selection = part(
        "selection",
        config,
        base.tokenizer,
        aligned,
        source,
        columns,
        context=context,
        max_tokens=settings.max_tokens,
        seed=session.seed,
    )
    calibration = calibration_blocks(base, aligned)
    scored = {
        "rewrite": wanted.record(),
        "others": [item.record() for item in others],
        "base": base.hash,
        "alignment": aligned.tensors,
        "calibration": calibration.fingerprint,
        "selection": selection.blocks.fingerprint,
        "context": context,
        "seed": session.seed,
        "dtype": str(base.model.dtype).removeprefix("torch."),
    }
    path = windows_file(run)
    earlier = None if session.force or not path.is_file() else _read(path)
    if earlier is not None and earlier["scored"] != scored:
        different = ", ".join(key for key, value in scored.items() if earlier["scored"].get(key) != value)
        raise UserError(f"{path} is of another search ({different} differ); give another --run, or --force")
    known = [] if earlier is None else [Candidate.from_dict(item) for item in earlier["candidates"]]
    if earlier is not None and settings.target_parameters is None:
        wide = allowed_windows(
            wanted, config, others, strategy=settings.strategy, count=settings.count, seed=session.seed
        )
        if lost := sum(item.windows not in {(window,) for window in wide} for item in known):
            raise UserError(
                f"{path} has {lost} windows or plans that this search would not look at; give another --run, or --force"
            )
    session.processes.wait()  # all have read it
    if session.main:
        artifacts.sweep(run)
    origin = session.origin(base, {"calibration": aligned.calibration, "selection": selection.facts})
    asked = dataclasses.asdict(settings)

    def body(result: SearchResult, complete: bool, plans: PlanResult | None = None) -> dict[str, Any]:
        made = {
            "scored": scored,
            "settings": asked,
            "complete": complete,
            "block_tokens": list(result.block_tokens),
            "candidates": [item.to_dict() for item in result.candidates],
            "winner": [dataclasses.asdict(item) for item in result.winner.windows] if complete else None,
        }
        if plans is not None:
            ranked = plans.verified
            made["winner"] = [dataclasses.asdict(item) for item in ranked.winner.windows]
            made["plans"] = [
                {
                    **dataclasses.asdict(item),
                    "windows": [dataclasses.asdict(window) for window in item.windows],
                    "measured": next(row.to_dict()["nll"] for row in ranked.candidates if row.windows == item.windows),
                }
                for item in plans.estimates
            ]
        return made

    def keep(result: SearchResult) -> None:
        bar.update()
        if session.main:
            artifacts.write_json(path, KIND, body(result, False), origin)

    with session.bar("search", unit="window") as bar:
        shared = {
            "race": Race() if settings.race else None,
            "calibration": calibration,
            "others": others,
            "seed": session.seed,
            "known": known,
            "keep": keep,
            "rank": session.processes.rank,
            "world": session.processes.world,
            "all_gather": session.processes.all_gather if session.processes.world > 1 else None,
            "progress": lambda message: bar.set_postfix_str(message),
        }
        if settings.target_parameters is None:
            found = search_windows(
                wanted, base.model, aligned.alignments, selection.blocks,
                strategy=settings.strategy, count=settings.count, **shared,  # type: ignore[arg-type]
            )  # fmt: skip
            result = body(found, True)
            if session.main:
                if earlier is not None and "original" in earlier:
                    whole = Candidate.from_dict(earlier["original"])
                else:
                    same = {name: shared[name] for name in ("calibration", "others", "seed")}
                    whole = score_original(wanted, base.model, aligned.alignments, selection.blocks, **same)  # type: ignore[arg-type]
                (whole,) = compared([whole], found.winner, found.block_tokens)
                result["original"] = whole.to_dict()
        else:
            plans = search_plan(
                wanted, base.model, aligned.alignments, selection.blocks, settings.target_parameters,
                sizes=settings.sizes, **shared,  # type: ignore[arg-type]
            )  # fmt: skip
            result = body(SearchResult(plans.candidates, plans.singles.block_tokens), True, plans)
    with session.alone() as here:
        if here:
            artifacts.write_json(path, KIND, result, origin)
    near = sum(item["indistinguishable"] for item in result["candidates"] if item["windows"])
    if near and session.main:
        session.notice(f"search: windows within the noise of the best on this selection text: {near}; see {path}")
    return result


def _without_start(rewrite: Rewrite) -> Rewrite:
    """What is searched for: the rewrite wherever it may stand. Raises UserError for one that has no window."""
    if not isinstance(rewrite, WindowRewrite) or rewrite.scope != "window":
        raise UserError(f"{rewrite.name} as given has no window to search for; leave the search out")
    return dataclasses.replace(rewrite, start="best")


def found_windows(run: Path, rewrite: Rewrite, aligned: Aligned) -> Plan | None:
    """The windows that a finished search in the run folder found for this very rewrite; None where there is none."""
    path = windows_file(run)
    if not path.is_file():
        return None
    document = _read(path)
    scored = document["scored"]
    fits = (
        document["complete"]
        and scored["rewrite"] == _without_start(rewrite).record()
        and scored["alignment"] == aligned.tensors
        and scored["base"] == aligned.base_hash
    )
    return winner(document) if fits else None


def told(run: Path) -> story.Search | None:
    """The finished search in a run folder as a report tells it; None where there is none."""
    path = windows_file(run)
    document = _read(path) if path.is_file() else None
    if document is None or not document["complete"]:
        return None
    whole = [document["original"]] if "original" in document else []
    candidates = tuple(_candidate(item) for item in (*document["candidates"], *whole))
    return story.Search(document["scored"]["rewrite"]["rewrite"], candidates, winner(document))


def searched_with(run: Path) -> dict[str, Any]:
    """The settings, seed, dtype and other rewrites of the search in a run folder."""
    document = _read(windows_file(run))
    scored = document["scored"]
    return {
        "settings": document["settings"],
        "seed": scored["seed"],
        "others": scored["others"],
        "dtype": scored["dtype"],
    }


def winner(document: Mapping[str, Any]) -> Plan:
    """The best windows of a finished windows.json."""
    return tuple(fields.from_record(Window, item, "winner") for item in document["winner"])


_SCORED: dict[str, Any] = {  # what two searches must have in common to be one: key -> type
    "rewrite": dict,
    "others": list,
    "base": str,
    "alignment": str,
    "calibration": str,
    "selection": str,
    "context": int,
    "seed": int,
    "dtype": str,
}
_CANDIDATE: dict[str, Any] = {
    "windows": list,
    "block_nll": list,
    "tokens": int,
    "dropped": bool,
    "behind": float | None,
    "error": float | None,
    "indistinguishable": bool,
}


def _read(path: Path) -> dict[str, Any]:
    document = artifacts.read_json(path, KIND, "search --force")
    try:
        for key, kind in {
            "scored": dict,
            "settings": dict,
            "complete": bool,
            "candidates": list,
            "block_tokens": list,
        }.items():
            fields.typed("windows", key, document[key], kind)
        for key, kind in _SCORED.items():
            fields.typed("scored", key, document["scored"][key], kind)
        from_record(document["scored"]["rewrite"])
        plans = [_candidate(item).windows for item in document["candidates"]]
        if "original" in document:
            _candidate(document["original"])
        if document["complete"] and winner(document) not in plans:
            raise UserError("the winner is none of the candidates")
    except (KeyError, TypeError, AttributeError, UserError) as error:
        raise UserError(f"{path} is damaged ({error!r}); make it anew with `gpt2-compress search --force`") from error
    return document


def _candidate(record: Mapping[str, Any]) -> Candidate:
    for key, kind in _CANDIDATE.items():
        fields.typed("candidate", key, record[key], kind)
    for value in record["block_nll"]:
        fields.typed("candidate", "block_nll", value, float | None)
    for item in record["windows"]:
        fields.from_record(Window, item, "window")
    return Candidate.from_dict(record)
