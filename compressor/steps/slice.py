"""Slices of a nested model as models of their own: one by one, and those of a recipe in its run folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .. import artifacts, models, run_folder, slicing, verify
from ..errors import UserError
from ..fields import parameter_count
from ..metrics.cache import cache_bytes
from ..metrics.flops import flops_per_token
from ..metrics.size import parameters, weight_bytes
from ..modeling.nesting import Size, size_of
from ..models import Checkpoint, OpenModel
from ..rewrites.matryoshka import chosen_by
from ..session import ANYWHERE, Columns, Session, may_be_replaced
from ..slice_choice import Budget
from . import cards
from .slice_plan import TOKENS, choose, selection_text


def slice_model(
    path: str,
    out: Path,
    session: Session,
    *,
    choice: Mapping[str, Any] = MappingProxyType({}),
    max_parameters: int | str | None = None,
    max_latency: float | None = None,
    source: str | None = None,
    columns: Columns = ANYWHERE,
    max_tokens: int | None = None,
) -> dict[str, Any]:
    """Cut a smaller model out of a nested one and save it; returns the body of its report.json.

    choice: of `nesting.size_of`. max_parameters, such as 100M, max_latency, a share of the whole model's time: of what
    is within both, the slice with the lowest perplexity is taken, on `max_tokens` (default 16384) of selection text, of
    `source` or of the data that the nested model was made with. Raises UserError, before anything is measured, for a
    model without smaller ones and a size that it has not.
    """
    out = Path(out)
    budget = _budget(choice, max_parameters, max_latency, source, columns, max_tokens)
    found = models.find(path)
    config: Any = found.config
    if getattr(config, "matryoshka", None) is None:
        raise UserError(
            f"{path} has no smaller models nested in it; `gpt2-compress rewrite --rewrite matryoshka` makes one that "
            "has"
        )
    if not slicing.is_nested(config):
        raise UserError(f"{path} is a slice already; cut the nested model that it came from")
    try:
        size = None if budget is not None else size_of(config, **choice)
    except ValueError as error:
        raise UserError(str(error)) from error
    if out.resolve() == found.folder.resolve():
        raise UserError(f"{out} is the model to cut from; give another --out")
    may_be_replaced(out, session.force)
    facts: dict[str, Any] = {}
    texts: dict[str, Any] = {}
    text = None
    if budget is not None:
        text, texts = selection_text(path, run_folder.made(found), source, columns)
    opened = session.open(path)
    with artifacts.new_folder(out, force=session.force) as folder:
        if budget is not None and text is not None:
            size, facts = choose(opened, budget, text, session, max_tokens=max_tokens or TOKENS)
        assert size is not None
        return write(folder, out, opened, size, session, {"plan": facts} if facts else {}, texts)


def _budget(
    choice: Mapping[str, Any],
    max_parameters: int | str | None,
    max_latency: float | None,
    source: str | None,
    columns: Columns,
    max_tokens: int | None,
) -> Budget | None:
    """None where a size is chosen. Raises UserError for both, for neither, and for text that nothing is measured on."""
    if max_parameters is None and max_latency is None:
        if not choice:
            raise UserError(
                "give a size (--ffn, --width, --depth, --head) or a budget (--max-parameters, --max-latency)"
            )
        if source is not None or max_tokens is not None or columns != ANYWHERE:
            raise UserError(
                "--data, --text-column, --split and --max-tokens are for a budget (--max-parameters, --max-latency)"
            )
        return None
    if choice:
        raise UserError(f"a budget chooses the size, and {', '.join(choice)} is given as well; give one of them")
    count = None if max_parameters is None else parameter_count("max_parameters", max_parameters)
    return Budget(count, max_latency)


def make(run: Path, chosen: str | Sequence[Mapping[str, Any]], session: Session) -> dict[str, Path]:
    """Write RUN/slices/before/NAME, of the rewritten model, and RUN/slices/after/NAME, of the recovered one where there
    is one; returns row -> folder of those there are.

    chosen: as `slicing.sizes`. A slice of the same weights stays, unless session.force. Raises UserError for a run
    without a rewritten model and for a slice that was made otherwise.
    """
    run = Path(run)
    steps = run_folder.steps(run)
    if "rewritten" not in steps:
        raise UserError(f"{run} has no rewritten model yet; `gpt2-compress rewrite --run {run}` makes one")
    for state, step in run_folder.SLICED.items():
        place = run / run_folder.SLICES / state
        if place.is_dir():
            artifacts.sweep(place)
        if step in steps:
            _make(place, models.find(str(steps[step])), chosen, session)
    return run_folder.slices(run)


def _make(place: Path, found: Checkpoint, chosen: str | Sequence[Mapping[str, Any]], session: Session) -> None:
    digest = artifacts.hash_files(list(found.files))
    opened: OpenModel | None = None
    with session.bar("slices", unit="slice") as bar:
        for name, size in slicing.sizes(found.config, chosen).items():
            bar.set_postfix_str(name)
            target = place / name
            if (target / "config.json").is_file() and not session.force:
                _same(target, _made_from(digest, found, size, session))
                continue
            opened = opened or session.open(str(found.folder))
            with artifacts.new_folder(target, force=True) as folder:
                write(folder, target, opened, size, session)


def _made_from(digest: str, found: Checkpoint, size: Size, session: Session) -> dict[str, Any]:
    return {
        "start": digest,
        "size": chosen_by(size, found.config.n_embd),
        "dtype": str(models.parse_dtype(session.dtype)).removeprefix("torch."),
    }


def _same(target: Path, made_from: Mapping[str, Any]) -> None:
    body = run_folder.made(models.find(str(target))) or {}
    then = body.get("made_from", {})
    different = [key for key in made_from if then.get(key) != made_from[key]]
    if body.get("kind") != verify.SLICE or different:
        raise UserError(
            f"{target} was made otherwise ({', '.join(different) or 'by something else'} differ); --force makes it anew"
        )


def write(
    folder: Path,
    target: Path,
    opened: OpenModel,
    size: Size,
    session: Session,
    facts: Mapping[str, Any] | None = None,
    texts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Cut a size out of a nested model into `folder`, which is to become `target`; returns the body of its report.json.

    facts: what else stands in the body. texts: what text it was chosen on, for its provenance.
    """
    whole = models.find(str(opened.folder))
    earlier = run_folder.made(whole)
    made_from = _made_from(opened.hash, whole, size, session)
    model = slicing.cut(opened.model, size)
    models.save(model, folder, opened.tokenizer, opened.stored_dtype)
    before = {
        "layers": whole.config.n_layer,
        "parameters": parameters(opened.model),
        "bytes": whole.bytes,
        "flops_per_token": flops_per_token(opened.model),
        "cache_bytes": cache_bytes(whole.config),
    }
    body = {
        "rewrites": model.config.compression,
        "made_from": made_from,
        "slice": slicing.name(whole.config, size),
        **(facts or {}),
        "layers": model.config.n_layer,
        "parameters": parameters(model),
        "bytes": weight_bytes(folder),
        "flops_per_token": flops_per_token(model),
        "cache_bytes": cache_bytes(model.config),
        **{f"{key}_before": (earlier or {}).get(f"{key}_before", value) for key, value in before.items()},
        **{f"{key}_whole": value for key, value in before.items()},
        "weights": artifacts.hash_files(models.weight_files(str(target), folder)),
        "probe": models.probe(model.float()),  # of the saved numbers: `model` has become the files' dtype
    }
    artifacts.write_json(folder / verify.REPORT, verify.SLICE, body, _origin(opened, earlier, texts or {}, session))
    cards.leave(folder, model.config, target, session.notice, "slice")
    return body


def _origin(
    opened: OpenModel, earlier: Mapping[str, Any] | None, texts: Mapping[str, Any], session: Session
) -> artifacts.Provenance:
    """Of the original, with the text that the nested model was made on, where its report tells."""
    own = session.origin(opened, texts)
    if earlier is None:
        return own
    then = earlier["provenance"]
    return dataclasses.replace(
        own, base_model=then["base_model"], base_hash=then["base_hash"], data={**then["data"], **own.data}
    )
