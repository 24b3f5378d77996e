"""How big a model is: parameters counted once, bytes of its weight files, operations per token."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GPT2Config, PreTrainedModel

from ..errors import UserError
from ..gpt2 import d_ff
from ..modeling.tversky_layers import tversky_places
from ..models import OpenModel, weight_files
from .base import MetricResult, Progress

SETTINGS = frozenset({"context"})


def _memories(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What the tensors hold, each element once: the tensors themselves, or their whole storage where they overlap."""
    storages: dict[Any, dict[tuple, Tensor]] = defaultdict(dict)
    for tensor in tensors:
        # meta tensors have no storage address: the object stands for it
        storage = (tensor.device, tensor.untyped_storage().data_ptr() or id(tensor))
        storages[storage][tensor.storage_offset(), tensor.shape, tensor.stride()] = tensor.detach()
    memories: list[Tensor] = []
    for views in storages.values():
        some = next(iter(views.values()))
        whole = some.untyped_storage().nbytes() // some.element_size()
        overlap = len(views) > 1 and sum(view.numel() for view in views.values()) > whole
        memories += [some.new_empty(0).set_(some.untyped_storage())] if overlap else views.values()
    return memories


def parameters(model: nn.Module) -> int:
    """Parameters of the model over unique storages: a tied head counts once."""
    return sum(memory.numel() for memory in _memories(model.parameters()))


def embedding_parameters(model: nn.Module) -> int:
    """Parameters of the token and position tables, which sharing FFNs cannot touch."""
    tables = (module.weight for module in model.modules() if isinstance(module, nn.Embedding))
    return sum(memory.numel() for memory in _memories(tables))


def embedding_share(model: nn.Module) -> float:
    """Part of the parameters that are embeddings, 0..1."""
    return embedding_parameters(model) / parameters(model)


def non_zero(model: nn.Module) -> int:
    """Parameters that are not 0, over unique storages: what pruning by zeros leaves of the stored ones."""
    return sum(int(torch.count_nonzero(memory)) for memory in _memories(model.parameters()))


def weight_bytes(folder: Path) -> int:
    """Bytes of the weight files in a folder, all shards. Raises UserError when there are none."""
    return sum(file.stat().st_size for file in weight_files(str(folder), folder))


def predicted_bytes(count: int, dtype: torch.dtype) -> int:
    """Bytes that so many parameters take on disk, without the file's header (some 10 kB)."""
    return count * dtype.itemsize


def flops_per_token(model: PreTrainedModel | GPT2Config, context: int | None = None) -> int:
    """Floating-point operations of a forward pass per token (a multiply-add is 2), with the LM head.

    Per layer 8 d^2 for attention's linears, 4 d d_ff for the FFN, 4 r (d + d_ff) for low-rank deltas of rank r, and
    2 context d for the causal scores and their weighted sum (a token sees context / 2 others on average). Norms,
    activations, softmax, biases and look-ups are not counted. Sharing an FFN saves none of it. context: default
    n_positions.

    A Tversky projection in place of a linear or an FFN, of K features (rows of its bank) and m prototypes, takes 2 in K
    to measure the features, once for queries, keys and values of one bank, and 2 K m for each matrix product of its
    form: 2 of an antipodal bank with products, 1 where theta = alpha + beta is fixed (learnable ones may part); 2 of
    products, and of product and ignorematch, without an antipode. Minima and subtractmatch take 3 for each token,
    prototype and feature (difference, size, sum), softmin 8 for each sign (5 for what goes beyond the minimum). What
    depends on prototypes and features alone is made once and kept. Sharing a bank saves none of it.
    """
    config = model if isinstance(model, GPT2Config) else cast(GPT2Config, model.config)
    context = config.n_positions if context is None else context
    d, ff = config.n_embd, d_ff(config)
    layer = 8 * d * d + 4 * d * ff + 2 * context * d
    deltas = sum(
        len(group["layers"]) * 4 * group["rank"] * (d + ff) for group in getattr(config, "ffn_groups", None) or []
    )
    return config.n_layer * layer + deltas + 2 * d * config.vocab_size + _tversky_flops(config)


def _tversky_flops(config: GPT2Config) -> int:
    """What Tversky projections take, less what they take the place of."""
    more, measured = 0, set()
    for (layer, target), place in tversky_places(config).items():
        width, out = place.widths
        shares = (layer, place.key) if target in ("q", "k", "v") else None
        if shares is None or shares not in measured:
            more += 2 * width * place.features
        measured.add(shares)
        products, others = _operations(place.entry)
        more += (2 * products + others) * place.features * out
        more -= 4 * width * d_ff(config) if target == "mlp_block" else 2 * width * out
    return more


def _operations(entry: Mapping[str, Any]) -> tuple[int, int]:
    """Matrix products of a form (one for each function of the measured features), and its other operations for each
    prototype and feature of the bank."""
    intersection, difference, ratio = entry["intersection"], entry["difference"], entry["form"] == "ratio"
    signs = (1, -1) if entry["antipodal"] else (1,)
    kinds = {"product": ["salience"], "gmean": ["root"], "mean": ["salience", "has"], "max": ["salience", "has"]}
    common = {(kind, sign) for sign in signs for kind in kinds.get(intersection, [])}
    apart = set()
    if difference == "product":
        apart = {("salience", 1), ("salience", -1)}
    elif difference == "ignorematch":
        apart = {(kind, sign) for sign in signs for kind in ("salience", "has")}
    products = len(common) + len(apart) if ratio else len(common | apart)  # a ratio keeps them apart
    linear = not entry["learn_scalars"] and entry["theta"] == entry["alpha"] + entry["beta"]
    if entry["antipodal"] and intersection == difference == "product" and linear and not ratio:
        products = 1
    others = 3 if intersection in ("min", "max") or difference == "subtractmatch" else 0
    others += 8 * len(signs) if intersection == "softmin" else 0
    return products, others


def measure(
    subject: OpenModel, data: None = None, *, progress: Progress | None = None, context: int | None = None
) -> list[MetricResult]:
    """Parameters, bytes of the weight files and FLOPs per token at `context` (default n_positions)."""
    model = subject.model
    context = model.config.n_positions if context is None else context
    if not isinstance(context, int) or isinstance(context, bool) or context < 1:
        raise UserError(f"context={context!r} is not allowed; allowed: whole numbers from 1")
    total = parameters(model)
    return [
        MetricResult(
            "parameters",
            total,
            "parameters",
            False,
            len(_memories(model.parameters())),
            None,
            {
                "protocol": "unique storages",
                "embeddings": embedding_parameters(model),
                "embedding_share": embedding_share(model),
                "non_zero": non_zero(model),
            },
        ),
        MetricResult(
            "bytes",
            weight_bytes(subject.folder),
            "bytes",
            False,
            len(weight_files(subject.name, subject.folder)),
            None,
            {
                "protocol": "weight files",
                "of_parameters": predicted_bytes(total, subject.stored_dtype),
                "dtype": str(subject.stored_dtype).removeprefix("torch."),
            },
        ),
        MetricResult(
            "flops_per_token",
            flops_per_token(model, context),
            "operations per token",
            False,
            model.config.n_layer,
            None,
            {"protocol": "forward pass, a multiply-add is 2", "context": context},
        ),
    ]
