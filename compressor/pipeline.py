"""One function a command: files in, files out. The mathematics is in the stages; the printing is in cli.py.

`plan` and `inspect`, which write nothing, are in facts.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from . import alignment, artifacts, benchmark, data, models, report, run_folder, verify
from .alignment import Alignments
from .errors import UserError
from .facts import FIT_TOKENS, inspect, plan
from .metrics.size import flops_per_token, parameters, weight_bytes
from .models import OpenModel
from .recipe import Align, Recipe
from .rewrites import Rewrite, from_record
from .rewrites.compose import apply, check
from .session import ANYWHERE, Columns, Session, lasting_data, must_be_folder
from .windows import Window

__all__ = [
    "Columns",
    "Session",
    "align",
    "demo",
    "export",
    "inspect",
    "plan",
    "rewrite",
    "run_benchmark",
    "verify_model",
]

# ---------------------------------------------------------------- align


def align(
    run: Path,
    model: str,
    source: str | Mapping[str, str],
    settings: Align,
    session: Session,
    *,
    n: int | None = None,
    anchor: str | int = "middle",
    columns: Columns = ANYWHERE,
) -> Alignments:
    """Steps 1 and 2: write alignment.safetensors and alignment.json into the run folder."""
    run = Path(run)
    must_be_folder(run)
    if (run / "config.json").is_file():
        raise UserError(f"{run} is a model's folder; give another --run")
    if (run / "alignment.json").exists() and not session.force:
        raise UserError(f"{run} has an alignment already; give another --run, or --force to replace it")
    alignment.layer_pairs(models.find(model).config.n_layer, settings.pairs, n=n, anchor=anchor)  # before the work
    opened = session.open(model)
    _must_be_plain(opened)
    specs = (
        lasting_data(source)
        if isinstance(source, str)
        else {part: lasting_data(spec) for part, spec in data.specs(source).items()}
    )
    text = data.recipe_text(source, "calibration", text_column=columns.text_column, split=columns.split)
    config = opened.model.config
    blocks = data.token_blocks(
        text,
        opened.tokenizer,
        context=config.n_positions,
        max_tokens=settings.max_tokens,
        seed=session.seed,
        evenly=True,
    )
    facts = {
        **data.describe(text),
        "specs": specs,
        "named": data.specs(source),
        "tokens": blocks.tokens,
        "block_fingerprint": blocks.fingerprint,
        "text_column": columns.text_column,
        "split_given": columns.split,
    }
    if settings.method == "none":
        solved = alignment.identity(config)
    elif settings.method == "weight":
        solved = alignment.align_weights(opened.model, pairs=settings.pairs, n=n, anchor=anchor, seed=session.seed)
    else:
        with session.bar("align", blocks.tokens) as bar:
            solved = alignment.align_activations(
                opened.model,
                blocks.batches(),
                site=settings.site,
                pairs=settings.pairs,
                n=n,
                anchor=anchor,
                seed=session.seed,
                progress=bar.update,
            )
    if run.is_dir():
        artifacts.sweep(run)
    with artifacts.new_files(run) as folder:
        alignment.save(folder, solved, session.origin(opened, {"calibration": facts}))
    return solved


def _must_be_plain(opened: OpenModel) -> None:
    if not opened.plain:
        raise UserError(
            f"{opened.name} is a compressed GPT-2 already; `gpt2-compress export {opened.name} --dense OUT` "
            "makes a plain one to start from"
        )


# ---------------------------------------------------------------- rewrite


def rewrite(run: Path, rewrites: Sequence[Rewrite], session: Session) -> dict[str, Any]:
    """Step 4: write rewritten/ into the run folder; returns the body of its report.json."""
    run = Path(run)
    target = run / "rewritten"
    if target.exists() and not session.force:
        raise UserError(f"{target} exists already; give another --run, or --force to replace it")
    aligned = run_folder.aligned(run)
    solved = aligned.alignments
    config = models.find(aligned.base_model).config
    check(rewrites, config)
    resolved = [item.resolved(config) for item in rewrites]
    for given, item in zip(rewrites, resolved, strict=True):
        if getattr(given, "start", 0) is None and getattr(item, "start", None) is not None:
            session.notice(f"{item.name}: no --start given; taking the middle window, from layer {item.start}")  # type: ignore[attr-defined]
    base = session.open(aligned.base_model)
    if base.hash != aligned.base_hash:
        raise UserError(
            f"the alignment in {run} is of another model than {base.name} is now (its weights differ); "
            "make it anew with `gpt2-compress align --force`"
        )
    facts = aligned.calibration
    calibration = _calibration(base, facts, aligned.seed)
    with session.bar("rewrite") as bar:
        model = apply(
            resolved,
            base.model,
            solved,
            calibration=calibration,
            seed=session.seed,
            progress=lambda message: bar.set_postfix_str(message),
        )
    before = parameters(base.model)
    artifacts.sweep(run)
    with artifacts.new_folder(target, force=session.force) as folder:
        models.save(model, folder, base.tokenizer, base.stored_dtype)
        body = {
            "rewrites": [item.record() for item in resolved],
            "alignment": {
                "method": solved.method,
                "site": solved.site,
                "tokens": solved.tokens,
                "routes": _routes(resolved, base, solved),
            },
            "fit_tokens": calibration.tokens,
            "layers": model.config.n_layer,
            "layers_before": base.model.config.n_layer,
            "parameters": parameters(model),
            "parameters_before": before,
            "bytes": weight_bytes(folder),
            "bytes_before": weight_bytes(base.folder),
            "flops_per_token": flops_per_token(model),
            "flops_per_token_before": flops_per_token(base.model),
            "weights": artifacts.hash_files(models.weight_files(str(target), folder)),
            "probe": models.probe(model.float()),  # of the saved numbers: `model` has become the files' dtype
        }
        artifacts.write_json(
            folder / verify.REPORT,
            "rewrite",
            body,
            session.origin(base, {"calibration": {**facts, "tokens": calibration.tokens}}),
        )
    return body


def _calibration(base: OpenModel, facts: Mapping[str, Any], seed: int) -> data.TokenBlocks:
    """The calibration text that the alignment was made on, more of it where the part has more."""
    text = data.recipe_text(facts["specs"], "calibration", text_column=facts["text_column"], split=facts["split_given"])
    if text.fingerprint != facts["fingerprint"]:
        raise UserError(
            f"the calibration text of {text.source} has changed since the alignment was made; "
            "make it anew with `gpt2-compress align --force`"
        )
    return data.token_blocks(
        text, base.tokenizer, context=base.model.config.n_positions, max_tokens=FIT_TOKENS, seed=seed, evenly=True
    )


def _routes(rewrites: Sequence[Rewrite], base: OpenModel, solved: Alignments) -> list[dict[str, Any]]:
    """Which permutation each layer of each window took: direct, composed along the chain, or none."""
    windows: list[Window] = [
        window for item in rewrites if hasattr(item, "windows") for window in item.windows(base.model.config)
    ]
    return [
        {"layer": layer, "anchor": window.anchor, "route": solved.route(layer, window.anchor)}
        for window in windows
        for layer in window.layers
        if layer != window.anchor
    ]


# ---------------------------------------------------------------- verify and export


def verify_model(path: str, session: Session) -> list[verify.Check]:
    """Reopen a model in a fresh process and compare."""
    if models.parse_dtype(session.dtype) != torch.float32:
        raise UserError(f"verify computes in float32, in both processes; --dtype {session.dtype} is not allowed")
    return verify.verify(session.open(path), trust=session.force)


def export(path: str, out: Path, session: Session) -> dict[str, Any]:
    """Fold a model to dense plain GPT-2 and save it. Replaces a model's folder only, whatever `session.force` says."""
    out = Path(out)
    if session.force and out.exists() and not (out.is_dir() and ((out / "config.json").is_file() or _empty(out))):
        raise UserError(f"{out} is no model's folder and is not replaced; give another folder")
    if out.exists() and not session.force:
        raise UserError(f"{out} exists already; give another folder or --force to replace it")
    opened = session.open(path)
    model = opened.model
    for record in getattr(model.config, "compression", None) or []:
        model = from_record(record).fold(model) or model
    if model.config.model_type != "gpt2":
        raise UserError(f"{path} cannot be expressed as plain GPT-2")
    with artifacts.new_folder(out, force=session.force) as folder:
        models.save(model, folder, opened.tokenizer, opened.stored_dtype)
        size = weight_bytes(folder)
    return {
        "path": str(out),
        "layers": model.config.n_layer,
        "parameters": parameters(model),
        "parameters_before": parameters(opened.model),
        "bytes": size,
        "flops_per_token": flops_per_token(model),
    }


def _empty(folder: Path) -> bool:
    return not any(folder.iterdir())


# ---------------------------------------------------------------- benchmark


class _Opened(Mapping[str, OpenModel]):
    """Rows that are opened one after the other, so that only one model is in memory."""

    def __init__(self, rows: Mapping[str, str], session: Session):
        self._rows, self._session = dict(rows), session

    def __getitem__(self, name: str) -> OpenModel:
        return self._session.open(self._rows[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


def run_benchmark(
    names: Sequence[str],
    out: Path,
    metrics: Sequence[Any],
    sources: Mapping[str, str],
    session: Session,
    *,
    columns: Columns = ANYWHERE,
) -> benchmark.Report:
    """Step 6: measure models side by side; write report.json, report.md and plots into `out`.

    sources: metric -> D; the empty key is for every metric that has none of its own.
    """
    out = Path(out)
    must_be_folder(out)
    if (out / "config.json").is_file():
        raise UserError(f"{out} is a model's folder; give another --out")
    if (out / "report.json").exists() and not session.force:
        raise UserError(f"{out} has a report already; give another --out, or --force to replace it")
    chosen = benchmark.check_metrics(metrics)
    for metric in sources:
        if metric and (metric not in dict(chosen) or not benchmark.METRICS[metric].needs_data):
            raise UserError(
                f"data for {metric!r}, which is not measured here or needs none; measured: {_names(chosen)}"
            )
    rows = run_folder.rows(names)
    found = {row: models.find(model) for row, model in rows.items()}  # every mistake before the first figure
    texts: dict[str, data.Text] = {}
    for metric, _ in chosen:
        if benchmark.METRICS[metric].needs_data and metric not in texts:
            texts[metric] = _text(metric, names, sources, columns)
    for text in {text.fingerprint: text for text in texts.values()}.values():
        run_folder.warn_of_overlap(found, text, session.notice)
    run_folder.warn_of_twins(found, session.notice)
    first = session.open(next(iter(rows.values())))
    origin = session.origin(first, {metric: data.describe(text) for metric, text in texts.items()})
    del first
    result = benchmark.benchmark(_Opened(rows, session), metrics, texts, origin=origin, quiet=session.silent)
    if out.is_dir():
        artifacts.sweep(out)
    with artifacts.new_files(out) as folder:
        report.write(folder, result)
    return result


def _names(chosen: Sequence[tuple[str, Any]]) -> str:
    return ", ".join(dict.fromkeys(name for name, _ in chosen))


def _text(metric: str, names: Sequence[str], sources: Mapping[str, str], columns: Columns) -> data.Text:
    spec = sources.get(metric) or sources.get("")
    if spec is None:
        return run_folder.test_text(metric, names, columns.text_column, columns.split)
    return data.text(spec, "all", text_column=columns.text_column, split=columns.split)


# ---------------------------------------------------------------- demo


def demo(run: Path, recipe: Recipe, session: Session) -> benchmark.Report:
    """The whole pipeline in one go: align, rewrite, benchmark of the original and the result."""
    run = Path(run)
    must_be_folder(run)
    if run.exists() and not _empty(run) and not session.force:
        raise UserError(f"{run} exists already; give another --run, or --force to replace it")
    check(recipe.rewrites, models.find(recipe.model).config)
    data.recipe_text(recipe.data, "calibration")
    session = dataclasses.replace(session, seed=recipe.seed)
    artifacts.write_bytes(run / "recipe.yaml", recipe.dump().encode())
    align(run, recipe.model, recipe.data, recipe.align, session)
    rewrite(run, recipe.rewrites, session)
    return run_benchmark([str(run)], run, recipe.benchmark.metrics, {}, session)
