"""What a model is and what a recipe would make of it, from configs and file headers: no weight is read or written."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import GPT2Config

from . import gpt2, models, run_folder, slicing
from .checkpoint import shared_layers, structure_hash
from .errors import UserError
from .metrics.cache import cache_bytes
from .metrics.flops import flops_per_token
from .metrics.size import parameters, predicted_bytes, stored_besides
from .modeling.nesting import sliced_config
from .modeling.tversky_layers import tversky_places
from .recipe import Recipe
from .rewrites import Rewrite
from .rewrites.compose import check, layer_map, structure
from .search import allowed_windows
from .search import placed as place
from .windows import middle_start

FIT_TOKENS = 16384  # calibration tokens that a fit takes its statistics from, where the part has as many


def plan(recipe: Recipe) -> dict[str, Any]:
    """What would come out: nothing is trained, fitted or written."""
    found = models.find(recipe.model)
    config = found.config
    check(recipe.rewrites, config)
    resolved = placed_somewhere(recipe.rewrites, config)
    result = structure(resolved, config)
    for item in resolved if recipe.finetune is not None else []:
        result = item.finished(result)
    made = models.build(result)
    before, after = parameters(models.build(config)), parameters(made)
    work = _work(recipe, config)
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
        "searched": [getattr(item, "start", None) == "best" for item in recipe.rewrites],
        "calibrated": [item.undecided and getattr(item, "start", None) != "best" for item in recipe.rewrites],
        "layers": result.n_layer,
        "layers_before": config.n_layer,
        "layers_kept": sorted(layer_map(resolved, config)),
        "structure": structure_hash(result),
        "structure_before": structure_hash(config),
        "same_structure_as": _twins(resolved, config, result),
        "parameters": after,
        "parameters_before": before,
        "ratio": after / before,
        "bytes": predicted_bytes(after + stored_besides(made), found.dtype),
        "bytes_before": found.bytes,
        "flops_per_token": flops_per_token(result),
        "flops_per_token_before": flops_per_token(config),
        "cache_bytes": cache_bytes(result),
        "cache_bytes_before": cache_bytes(config),
        "slices": _slices(result, recipe.slices),
        "flops_to_make": work,
        "seconds_to_make": round(work / _measured_flops(), 1),
    }


def _slices(config: GPT2Config, chosen: str | list | None) -> list[dict[str, Any]]:
    """The smaller models that a recipe cuts out of the one it makes, or may."""
    if chosen is None and not slicing.is_nested(config):
        return []
    found = []
    for name, size in slicing.sizes(config, chosen or slicing.ALL).items():
        own = sliced_config(config, size)
        found.append(
            {
                "slice": name,
                "model_type": own.model_type,
                "layers": own.n_layer,
                "parameters": parameters(models.build(own)),
                "flops_per_token": flops_per_token(own),
                "cache_bytes": cache_bytes(own),
                "written": chosen is not None,
            }
        )
    return found


def placed_somewhere(rewrites: Sequence[Rewrite], config: GPT2Config) -> list[Rewrite]:
    """The rewrites with every choice made; what text is to place stands in the middle, or where there is room."""
    fixed = [item.resolved(config) for item in rewrites if not item.undecided]
    taken = frozenset[str]().union(*(item.sites(config) for item in fixed))
    placed = []
    for item in rewrites:
        if getattr(item, "start", None) == "best":
            item = _where_there_is_room(item, fixed, config)
        item = item.resolved(config).supposed(config, taken)
        taken |= item.sites(config)
        placed.append(item)
    check(placed, config)
    return placed


def _where_there_is_room(item: Rewrite, fixed: Sequence[Rewrite], config: GPT2Config) -> Rewrite:
    windows = allowed_windows(item, config, fixed)
    middle = middle_start(config.n_layer, windows[0].n)
    return place(item, min(windows, key=lambda window: abs(window.start - middle)))


def _work(recipe: Recipe, config: GPT2Config) -> int:
    """Floating-point operations of the alignment's statistics and of all passes over text but the benchmark's."""
    aligned = min(recipe.align.max_tokens, 1 << 30) if recipe.align.method == "activation" else 0
    statistics = 2 * aligned * gpt2.d_ff(config) ** 2 * (config.n_layer - 1)
    tokens = aligned + FIT_TOKENS
    if recipe.search is not None and any(getattr(item, "start", None) == "best" for item in recipe.rewrites):
        tokens += recipe.search.max_tokens * config.n_layer // 2  # a candidate runs what follows its window
    baselines = sum(word in run_folder.BASELINE_KINDS for word in recipe.benchmark.baselines)
    tokens += FIT_TOKENS * baselines
    if recipe.finetune is not None:
        jobs = 1 + recipe.finetune.control + baselines
        tokens += 3 * jobs * recipe.finetune.steps * recipe.finetune.batch_tokens  # forward and backward
    return statistics + flops_per_token(config) * tokens


def _measured_flops() -> float:
    """Floating-point operations a second of a float32 matrix product here and now."""
    side = 512
    a = torch.randn(side, side, generator=torch.Generator().manual_seed(0))
    a @ a
    start = time.perf_counter()
    for _ in range(3):
        a @ a
    return 3 * 2 * side**3 / (time.perf_counter() - start)


def _twins(rewrites: Sequence[Rewrite], base: GPT2Config, result: GPT2Config) -> list[str]:
    """Other `n` that end in this very structure, so that nobody compares a model with itself under two names."""
    own = structure_hash(result)
    if len(rewrites) != 1 or own == structure_hash(base):
        return []
    twins = []
    for n in range(1, base.n_layer + 1):
        try:
            other = dataclasses.replace(rewrites[0], n=n)  # type: ignore[call-arg]
            check([other], base)
        except (TypeError, UserError):  # a rewrite without n; an n that its start or anchor does not allow
            continue
        config = structure([other.resolved(base)], base)
        # the cheap comparison first
        alike = config.n_layer == result.n_layer and shared_layers(config) == shared_layers(result)
        if n != getattr(rewrites[0], "n", n) and alike and structure_hash(config) == own:
            twins.append(f"n={n}")
    return twins


def inspect(path: str) -> dict[str, Any]:
    """What a model is; of a run folder also its alignment. A run without a rewritten model shows its base model."""
    aligned = run_folder.aligned(path) if run_folder.is_run(path) else None
    found = models.find(aligned.base_model if aligned and not run_folder.steps(path) else path)
    config = found.config
    count = parameters(models.build(config))
    report = run_folder.made(found)
    body: dict[str, Any] = {
        "path": path,
        "folder": str(found.folder),
        "model_type": config.model_type,
        "layers": config.n_layer,
        "width": config.n_embd,
        "heads": config.n_head,
        "context": config.n_positions,
        "longest": gpt2.longest(config),  # null: any number of tokens
        "vocabulary": config.vocab_size,
        "compression": getattr(config, "compression", None) or [],
        "ffn_groups": getattr(config, "ffn_groups", None) or [],
        "feature_banks": _banks(config),
        "structure": structure_hash(config),
        "parameters": count,
        "parameters_before": report["parameters_before"] if report else count,
        "dtype": str(found.dtype).removeprefix("torch."),
        "bytes": found.bytes,
        "flops_per_token": flops_per_token(config),
        "cache_bytes": cache_bytes(config),
    }
    if report:
        body["made_by"] = report["provenance"]
        body["diagnostics"] = report.get("diagnostics", [])
    if aligned:
        body["alignment"] = [
            {"anchor": item.anchor, "layer": item.layer, **dataclasses.asdict(item.quality)}
            for item in aligned.alignments.solved
        ]
    return body


def _banks(config: GPT2Config) -> list[dict[str, Any]]:
    """The banks of features of Tversky projections, each with what uses it: [layer (null: the head), target]."""
    found: dict[str, dict[str, Any]] = {}
    for where, user in tversky_places(config).items():
        facts = {"key": user.key, "features": user.features, "width": user.widths[0]}
        entry = {**facts, "antipodal": user.entry["antipodal"], "projections": []}
        found.setdefault(user.key, entry)["projections"].append(list(where))
    return list(found.values())
