"""Several rewrites, one model: structure first, then the original's tensors where nothing changed, then the fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from .. import gpt2, models
from ..alignment import Alignments
from ..checkpoint_attention import check_attention
from ..data import TokenBlocks
from ..errors import UserError
from ..modeling import GPT2CompressedConfig
from .base import FitContext, Rewrite, Statistics


def check(rewrites: Sequence[Rewrite], base: GPT2Config) -> None:
    """Raise UserError for parameters the model cannot take and for sites that two rewrites claim. Costs nothing."""
    if getattr(base, "model_type", "gpt2") != "gpt2":
        raise UserError(
            "this model is a compressed GPT-2 already; `gpt2-compress export PATH --dense OUT` makes a plain one"
        )
    owners: dict[str, tuple[int, Rewrite]] = {}
    for index, rewrite in enumerate(rewrites):
        rewrite.check(base)
        if rewrite.undecided:
            continue
        for site in sorted(rewrite.sites(base)):
            if site in owners:
                other, owner = owners[site]
                raise UserError(
                    f"rewrites.{other} ({owner.name}) and rewrites.{index} ({rewrite.name}) both take over {site}; "
                    "give them windows that do not overlap"
                )
            owners[site] = index, rewrite


def structure(rewrites: Sequence[Rewrite], base: GPT2Config) -> GPT2Config:
    """The config of the result. Layers are removed last and all at once, so that every rewrite counts original ones."""
    config = base
    for rewrite in rewrites:
        config = rewrite.config(config)
    layers = layer_map(rewrites, base)
    fields = {**config.to_dict(), "n_layer": len(layers)}
    fields.pop("model_type")
    for group in [*(fields.get("ffn_groups") or []), *(fields.get("efficient_attention") or [])]:
        group["layers"] = [layers[layer] for layer in group["layers"]]
    for field in ("token_factored", "shaped_attention"):
        if entry := fields.get(field):
            entry["layers"] = [layers[layer] for layer in entry["layers"] if layer in layers]
    for entry in fields.get("tversky") or []:
        entry["groups"] = [[layers[layer] for layer in group] for group in entry["groups"]]
    result = type(config)(**fields)
    earlier = getattr(base, "compression", None) or []
    result.compression = [*earlier, *(rewrite.record() for rewrite in rewrites)]
    if isinstance(result, GPT2CompressedConfig):
        check_attention("this recipe", result)
    return result


def layer_map(rewrites: Sequence[Rewrite], base: GPT2Config) -> dict[int, int]:
    """Original layer -> layer of the result, for the layers that stay."""
    gone = frozenset[int]().union(*(rewrite.removed(base) for rewrite in rewrites))
    return {layer: index for index, layer in enumerate(layer for layer in range(base.n_layer) if layer not in gone)}


def choose(
    rewrites: Sequence[Rewrite],
    original: GPT2LMHeadModel,
    alignments: Alignments,
    *,
    calibration: TokenBlocks | None = None,
    seed: int = 0,
    progress: Callable[[str], None] = lambda message: None,
) -> list[Rewrite]:
    """The rewrites, resolved, with what calibration text decides decided; where they are so already, as they are."""
    taken = frozenset[str]().union(*(item.sites(original.config) for item in rewrites if not item.undecided))
    chosen = []
    for item in rewrites:
        if item.undecided:
            generator = torch.Generator().manual_seed(seed)
            item = item.chosen(FitContext(original, alignments, calibration, generator, {}, progress), taken)
            taken |= item.sites(original.config)
        chosen.append(item)
    return chosen


def apply(
    rewrites: Sequence[Rewrite],
    original: GPT2LMHeadModel,
    alignments: Alignments,
    *,
    calibration: TokenBlocks | None = None,
    seed: int = 0,
    progress: Callable[[str], None] = lambda message: None,
    statistics: Statistics | None = None,
) -> GPT2LMHeadModel:
    """The rewritten model, in evaluation mode. Untouched tensors are the original's own: nothing is copied.

    rewrites: resolved; what calibration text decides is decided here where it was not before. statistics: shared by
    calls with the same original and calibration text. Raises UserError as `check` does.
    """
    base = original.config
    check(rewrites, base)
    rewrites = choose(rewrites, original, alignments, calibration=calibration, seed=seed, progress=progress)
    layers = layer_map(rewrites, base)
    with torch.no_grad(), gpt2.evaluating(original):
        model = models.build(structure(rewrites, base)).to(original.dtype).eval()  # type: ignore[arg-type]
        wanted = model.state_dict()
        kept = {}  # a tensor that changes its shape is the rewrite's to fill
        for name, tensor in original.state_dict().items():
            target = gpt2.moved(name, layers)
            if target is not None and target in wanted and wanted[target].shape == tensor.shape:
                kept[target] = gpt2.for_layer(name, tensor, target, base)
        model.load_state_dict(kept, strict=False, assign=True)
        generator = torch.Generator().manual_seed(seed)
        context = FitContext(original, alignments, calibration, generator, layers, progress, statistics or Statistics())
        for rewrite in rewrites:
            rewrite.fit(model, context)
    model.tie_weights()
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if empty:
        raise RuntimeError(f"no rewrite filled {empty[0]}")
    model.generation_config = original.generation_config
    return model.to(gpt2.device(original))
