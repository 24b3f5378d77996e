"""One function a command: files in, files out. The mathematics is in the stages; the printing is in cli.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from . import alignment, artifacts, benchmark, data, models, report, verify
from .alignment import Alignments
from .artifacts import Provenance
from .errors import UserError
from .metrics.size import flops_per_token, parameters, predicted_bytes, weight_bytes
from .models import OpenModel
from .recipe import Align, Recipe
from .rewrites import Rewrite, from_record
from .rewrites.compose import apply, check, layer_map, structure
from .windows import Window

Notice = Callable[[str], None]
FIT_TOKENS = 16384  # calibration tokens that a fit takes its statistics from, where the part has as many


@dataclasses.dataclass(frozen=True)
class Session:
    """What every command shares."""

    device: str | None = None
    dtype: str | None = None
    seed: int = 0
    force: bool = False
    quiet: bool = False
    notice: Notice = lambda message: None

    def open(self, name: str) -> OpenModel:
        return models.open_model(name, device=self.device, dtype=self.dtype)

    def origin(self, base: OpenModel, texts: Mapping[str, Any]) -> Provenance:
        return artifacts.provenance(
            seed=self.seed,
            base_model=base.name,
            base_hash=base.hash,
            data=texts,
            device=str(next(base.model.parameters()).device),
            dtype=str(base.model.dtype).removeprefix("torch."),
        )

    def bar(self, title: str, total: int | None = None) -> tqdm:
        return tqdm(desc=title, total=total, unit="token", disable=True if self.quiet else None, leave=False)


@dataclasses.dataclass(frozen=True)
class Columns:
    """Where the text of a data source is."""

    text_column: str | None = None
    split: str | None = None


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
    columns: Columns = Columns(),
) -> Alignments:
    """Steps 1 and 2: write alignment.safetensors and alignment.json into the run folder."""
    run = Path(run)
    if (run / "alignment.json").exists() and not session.force:
        raise UserError(f"{run} has an alignment already; give another --run, or --force to replace it")
    alignment.layer_pairs(1 << 16, settings.pairs, n=n, anchor=anchor)  # refuse bad words before opening anything
    opened = session.open(model)
    _must_be_plain(opened)
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
        "specs": data.specs(source) if isinstance(source, Mapping) else source,
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
    artifacts.sweep(run)
    alignment.save(run, solved, session.origin(opened, {"calibration": facts}))
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
    solved, origin = alignment.load(run)
    config = models.read_config(origin["base_model"], models.locate(origin["base_model"]))
    check(rewrites, config)
    for item in rewrites:
        if getattr(item, "start", 0) is None and getattr(item, "scope", "") == "window":
            session.notice(f"{item.name}: no --start given; taking the middle window")
    resolved = [item.resolved(config) for item in rewrites]
    base = session.open(origin["base_model"])
    if base.hash != origin["base_hash"]:
        raise UserError(
            f"the alignment in {run} is of another model than {base.name} is now (its weights differ); "
            "make it anew with `gpt2-compress align --force`"
        )
    facts = origin["data"]["calibration"]
    calibration = _calibration(base, facts, origin["seed"])
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
            "probe": models.probe(model.float() if session.dtype is None else model),
        }
        artifacts.write_json(
            folder / "report.json",
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


# ---------------------------------------------------------------- plan and inspect


def plan(recipe: Recipe) -> dict[str, Any]:
    """What would come out, from the model's config alone: nothing is trained, fitted or written."""
    folder = models.locate(recipe.model)
    config = models.read_config(recipe.model, folder)
    files = models.weight_files(recipe.model, folder)
    stored = models.stored_dtype(recipe.model, files)
    check(recipe.rewrites, config)
    resolved = [item.resolved(config) for item in recipe.rewrites]
    result = structure(resolved, config)
    before, after = parameters(models.build(config)), parameters(models.build(result))
    tokens = min(recipe.align.max_tokens, 1 << 30)
    width = config.n_inner or 4 * config.n_embd
    work = (
        2 * tokens * width * width * (config.n_layer - 1) if recipe.align.method == "activation" else 0
    ) + flops_per_token(config) * (tokens + FIT_TOKENS)
    left = layer_map(resolved, config)
    return {
        "model": recipe.model,
        "model_type": result.model_type,
        "rewrites": [item.record() for item in resolved],
        "windows": [
            {"rewrite": item.name, "layers": list(window.layers), "anchor": window.anchor}
            for item in resolved
            if hasattr(item, "windows")
            for window in item.windows(config)
        ],
        "layers": result.n_layer,
        "layers_before": config.n_layer,
        "layers_kept": sorted(left),
        "parameters": after,
        "parameters_before": before,
        "ratio": after / before,
        "bytes": predicted_bytes(after, stored),
        "bytes_before": sum(file.stat().st_size for file in files),
        "flops_per_token": flops_per_token(result),
        "flops_per_token_before": flops_per_token(config),
        "flops_to_make": work,
        "seconds_to_make": round(work / _measured_flops(), 1),
    }


def _measured_flops() -> float:
    """Floating-point operations a second of a float32 matrix product here and now."""
    import time

    import torch

    side = 1024
    a = torch.randn(side, side)
    a @ a
    start = time.perf_counter()
    for _ in range(3):
        a @ a
    return 3 * 2 * side**3 / (time.perf_counter() - start)


def inspect(path: str) -> dict[str, Any]:
    """What a model or a run is."""
    folder = models.locate(path)
    config = models.read_config(path, folder)
    files = models.weight_files(path, folder)
    count = parameters(models.build(config))
    body: dict[str, Any] = {
        "path": path,
        "folder": str(folder),
        "model_type": config.model_type,
        "layers": config.n_layer,
        "width": config.n_embd,
        "heads": config.n_head,
        "context": config.n_positions,
        "vocabulary": config.vocab_size,
        "compression": getattr(config, "compression", None) or [],
        "ffn_groups": getattr(config, "ffn_groups", None) or [],
        "parameters": count,
        "parameters_before": count,
        "dtype": str(models.stored_dtype(path, files)).removeprefix("torch."),
        "bytes": sum(file.stat().st_size for file in files),
        "flops_per_token": flops_per_token(config),
    }
    if (folder / "report.json").is_file():
        made = artifacts.read_json(folder / "report.json", "rewrite", "rewrite")
        body["parameters_before"] = made["parameters_before"]
        body["made_by"] = made["provenance"]
    if folder != Path(path).expanduser() and (Path(path) / "alignment.json").is_file():
        solved, _ = alignment.load(Path(path))
        body["alignment"] = [
            {"anchor": item.anchor, "layer": item.layer, **dataclasses.asdict(item.quality)} for item in solved.solved
        ]
    return body


# ---------------------------------------------------------------- verify and export


def verify_model(path: str, session: Session) -> list[verify.Check]:
    """Reopen a model in a fresh process and compare."""
    return verify.verify(models.open_model(path))


def export(path: str, out: Path, session: Session) -> dict[str, Any]:
    """Fold a model to dense plain GPT-2 and save it."""
    opened = session.open(path)
    model = opened.model
    for record in getattr(model.config, "compression", None) or []:
        model = from_record(record).fold(model) or model
    if model.config.model_type != "gpt2":
        raise UserError(f"{path} cannot be expressed as plain GPT-2")
    with artifacts.new_folder(Path(out), force=session.force) as folder:
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


def rows_of(names: Sequence[str]) -> dict[str, str]:
    """Row name -> MODEL. A run folder gives its original and its rewritten model."""
    rows: dict[str, str] = {}
    for name in names:
        folder = Path(name).expanduser()
        if folder.is_dir() and (folder / "alignment.json").is_file() and not (folder / "config.json").is_file():
            _, origin = alignment.load(folder)
            prefix = "" if len(names) == 1 else f"{folder.name}: "
            if origin["base_model"] not in rows.values():
                rows["original" if len(names) == 1 else origin["base_model"]] = origin["base_model"]
            for step in ("rewritten", "recovered"):
                if (folder / step).is_dir():
                    rows[prefix + step] = str(folder / step)
        elif name in rows:
            raise UserError(f"model {name} is named twice")
        else:
            rows[name] = name
    return rows


def run_benchmark(
    names: Sequence[str],
    out: Path,
    metrics: Sequence[Any],
    sources: Mapping[str, str],
    session: Session,
    *,
    columns: Columns = Columns(),
) -> benchmark.Report:
    """Step 6: measure models side by side; write report.json, report.md and plots into `out`.

    sources: metric -> D; the empty key is for every metric that has none of its own.
    """
    out = Path(out)
    if (out / "report.json").exists() and not session.force:
        raise UserError(f"{out} has a report already; give another --out, or --force to replace it")
    chosen = benchmark.check_metrics(metrics)
    rows = rows_of(names)
    texts: dict[str, Any] = {}
    for metric, _ in chosen:
        if benchmark.METRICS[metric].needs_data and metric not in texts:
            texts[metric] = _test_text(metric, names, sources, columns)
    for text in texts.values():
        _warn_of_overlap(rows, text, session)
    first = session.open(next(iter(rows.values())))
    origin = session.origin(first, {metric: data.describe(text) for metric, text in texts.items()})
    del first
    result = benchmark.benchmark(_Opened(rows, session), metrics, texts, origin=origin, quiet=session.quiet)
    if out.is_dir():
        artifacts.sweep(out)
    report.write(out, result)
    return result


def _test_text(metric: str, names: Sequence[str], sources: Mapping[str, str], columns: Columns) -> data.Text:
    spec = sources.get(metric) or sources.get("")
    if spec is not None:
        return data.text(spec, "all", text_column=columns.text_column, split=columns.split)
    runs = [Path(name) for name in names if (Path(name) / "alignment.json").is_file()]
    if runs:
        _, origin = alignment.load(runs[0])
        facts = origin["data"]["calibration"]
        return data.recipe_text(facts["specs"], "test", text_column=facts["text_column"], split=facts["split_given"])
    if all(name == "demo" for name in names):
        return data.text("demo", "test")
    raise UserError(f"metric {metric!r} needs data; give --data D or --data {metric}=D")


def _warn_of_overlap(rows: Mapping[str, str], text: data.Text, session: Session) -> None:
    """Say so when a model was made with the text it is now measured on."""
    for name, model in rows.items():
        file = models.locate(model) / "report.json"
        if not file.is_file():
            continue
        made = artifacts.read_json(file, "rewrite", "rewrite")["provenance"]["data"]
        for part, facts in made.items():
            if data.overlap(facts, data.describe(text)):
                session.notice(f"warning: {name} was made with this text as its {part} data; its figures flatter it")


# ---------------------------------------------------------------- demo


def demo(run: Path, recipe: Recipe, session: Session) -> benchmark.Report:
    """The whole pipeline in one go: align, rewrite, benchmark of the original and the result."""
    run = Path(run)
    stored = run / "recipe.yaml"
    if run.exists() and any(run.iterdir()) and not session.force:
        raise UserError(f"{run} exists already; give another --run, or --force to replace it")
    config = models.read_config(recipe.model, models.locate(recipe.model))
    check(recipe.rewrites, config)
    session = dataclasses.replace(session, seed=recipe.seed)
    artifacts.write_bytes(stored, recipe.dump().encode())
    align(run, recipe.model, recipe.data, recipe.align, session)
    rewrite(run, recipe.rewrites, session)
    return run_benchmark([str(run)], run, recipe.benchmark.metrics, {}, session)
