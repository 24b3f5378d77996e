"""Groups of layers that share an FFN in the trunk's bank: put into a config, found in a model, folded back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from .. import gpt2
from ..modeling import GPT2CompressedConfig
from ..windows import Window
from .structure import add_structure, without_structure


def add_groups(base: GPT2Config, windows: Sequence[Window], *, rank: int, bias: str) -> GPT2CompressedConfig:
    """`base` with one bank entry more for each window; its "start" stays what it was in the original."""
    return add_structure(
        base,
        "ffn_groups",
        [{"layers": list(window.layers), "start": window.start, "rank": rank, "bias": bias} for window in windows],
    )


def group_index(model: GPT2LMHeadModel, layer: int) -> int:
    """The bank entry that a layer of a compressed model uses."""
    return next(g for g, entry in enumerate(model.config.ffn_groups) if layer in entry["layers"])


def fold_groups(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """The same function without groups: every layer of one gets its own dense W_c + A_l B_l."""
    entries = getattr(model.config, "ffn_groups", None) or []
    if not entries:
        return model
    tensors = {}
    for entry, shared in zip(entries, gpt2.bank(model), strict=True):
        for layer in entry["layers"]:
            for linear in gpt2.FFN_LINEARS:
                own, base = getattr(gpt2.ffn(model, layer), linear), getattr(shared, linear)
                weight = base.weight.detach()
                if own.rank:
                    weight = (weight.double() + own.delta_a.detach().double() @ own.delta_b.detach().double()).to(
                        weight.dtype
                    )
                tensors[gpt2.ffn_key(layer, f"{linear}.weight")] = weight.clone()
                bias = base.bias if own.bias is None else own.bias
                tensors[gpt2.ffn_key(layer, f"{linear}.bias")] = bias.detach().clone()
    return without_structure(model, "ffn_groups", lambda entry: True, tensors)


def average(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The element-wise mean, summed in float64."""
    return torch.stack([tensor.double() for tensor in tensors]).mean(0)
