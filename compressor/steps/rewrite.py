"""Step 4: a run folder with an alignment in, rewritten/ out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import artifacts, models, run_folder, verify
from ..data import TokenBlocks
from ..errors import UserError
from ..metrics.cache import cache_bytes
from ..metrics.flops import flops_per_token
from ..metrics.size import non_zero, parameters, weight_bytes
from ..models import OpenModel
from ..rewrites import Rewrite
from ..rewrites.base import WindowRewrite
from ..rewrites.compose import apply, check, choose
from ..run_folder import Aligned
from ..session import Session
from ..windows import Window
from . import cards
from .diagnose import diagnostics
from .inputs import calibration_blocks, open_base
from .search import found_windows, windows_file


def rewrite(run: Path, rewrites: Sequence[Rewrite], session: Session) -> dict[str, Any]:
    """Write rewritten/ into the run folder; returns the body of its report.json.

    A rewrite with start=best takes the windows that the search found; one without a start takes them where they are
    there and fit, else the middle window, and says which.
    """
    run = Path(run)
    if run.is_dir():
        artifacts.sweep(run)
    target = run / "rewritten"
    if target.exists() and not session.force:
        raise UserError(f"{target} exists already; give another --run, or --force to replace it")
    aligned = run_folder.aligned(run)
    config = models.find(aligned.base_model).config
    check(rewrites, config)
    placed = [item for given in rewrites for item in _placed(run, given, aligned, session)]
    check(placed, config)
    resolved = [item.resolved(config) for item in placed]
    base = open_base(run, aligned, session)
    calibration = calibration_blocks(base, aligned)
    alignment = {
        "method": aligned.alignments.method,
        "site": aligned.alignments.site,
        "tokens": aligned.alignments.tokens,
        "tensors": aligned.tensors,
        "routes": _routes(resolved, base, aligned),
    }
    body = write_model(target, "rewrite", resolved, base, aligned, calibration, session, {"alignment": alignment})
    recovered = run_folder.steps(run).get("recovered")
    earlier = None if recovered is None else run_folder.made(models.find(str(recovered)))
    if earlier is not None and earlier.get("made_from", {}).get("start") != body["weights"]:
        session.notice(
            f"warning: {run / 'recovered'} is of the rewritten model that was here before; "
            f"`gpt2-compress finetune --run {run} --force` makes it anew"
        )
    return body


def write_model(
    target: Path,
    kind: str,
    rewrites: Sequence[Rewrite],
    base: OpenModel,
    aligned: Aligned,
    calibration: TokenBlocks,
    session: Session,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Rewrite `base` into a model's folder at `target`, over what is there; returns the body of its report.json.

    rewrites: resolved; what calibration text decides is decided here. kind: of the report, one of verify.MADE_BY.
    facts: what else stands in the body.
    """
    with session.bar(kind) as bar:
        of = base.model, aligned.alignments
        say = bar.set_postfix_str
        chosen = choose(rewrites, *of, calibration=calibration, seed=session.seed, progress=say)
        model = apply(chosen, *of, calibration=calibration, seed=session.seed, progress=say)
    before = parameters(base.model)
    with artifacts.new_folder(target, force=True) as folder:
        models.save(model, folder, base.tokenizer, base.stored_dtype)
        body = {
            "rewrites": [item.record() for item in chosen],
            "asked": [item.record() for item in rewrites],  # before calibration text chose
            **facts,
            "fit_tokens": calibration.tokens,
            "layers": model.config.n_layer,
            "layers_before": base.model.config.n_layer,
            "parameters": parameters(model),
            "parameters_before": before,
            "non_zero": non_zero(model),
            "bytes": weight_bytes(folder),
            "bytes_before": weight_bytes(base.folder),
            "flops_per_token": flops_per_token(model),
            "flops_per_token_before": flops_per_token(base.model),
            "cache_bytes": cache_bytes(model.config),
            "cache_bytes_before": cache_bytes(base.model.config),
            "weights": artifacts.hash_files(models.weight_files(str(target), folder)),
            "probe": models.probe(model.float()),  # of the saved numbers: `model` has become the files' dtype
        }
        body |= diagnostics(chosen, model, base.tokenizer, lambda: calibration, session.notice)
        texts = {"calibration": {**aligned.calibration, "tokens": calibration.tokens}}
        artifacts.write_json(folder / verify.REPORT, kind, body, session.origin(base, texts))
        cards.leave(folder, model.config, target, session.notice)
    return body


def _placed(run: Path, given: Rewrite, aligned: Aligned, session: Session) -> list[Rewrite]:
    """The rewrite where its start says, one for each window of a plan."""
    if not isinstance(given, WindowRewrite) or given.scope == "tile" or isinstance(given.start, int):
        return [given]
    found = found_windows(run, given, aligned)
    if found is None and given.start == "best":
        raise UserError(
            f"{given.name}: start=best, but {windows_file(run)} has no finished search for this rewrite and this "
            f"alignment; `gpt2-compress search --run {run} --rewrite {given.name}` makes one"
        )
    if found is None:
        middle = given.resolved(models.find(aligned.base_model).config)
        session.notice(f"{given.name}: no --start given; taking the middle window, from layer {middle.start}")  # type: ignore[attr-defined]
        return [middle]
    if given.start is None:
        session.notice(f"{given.name}: no --start given; taking the best of {windows_file(run)}: {_layers(found)}")
    return [dataclasses.replace(given, start=item.start, n=item.n, anchor=item.anchor) for item in found]


def _layers(plan: Sequence[Window]) -> str:
    return ", ".join(f"layers {item.start} to {item.layers[-1]}" for item in plan)


def _routes(rewrites: Sequence[Rewrite], base: OpenModel, aligned: Aligned) -> list[dict[str, Any]]:
    """Which permutation each layer of each window took: direct, composed along the chain, or none."""
    windows: list[Window] = [
        window for item in rewrites if hasattr(item, "windows") for window in item.windows(base.model.config)
    ]
    return [
        {"layer": layer, "anchor": window.anchor, "route": aligned.alignments.route(layer, window.anchor)}
        for window in windows
        for layer in window.layers
        if layer != window.anchor
    ]
