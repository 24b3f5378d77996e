"""What a model of parts is made of: heads and neurons in the order of their groups, and what is a part's alone.

That begins as nothing. On the embedded model the mean of what a part lacks as a bias made parts of half the model 4 to
12 times worse at first, and with the best scale beside it no better than neither, also after a recovery
(benchmarks/results/fractal_quality.md).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from .. import gpt2
from ..correlation import SecondMoments
from ..modeling.fractal import parts_of_levels, vectors_of
from .base import LINEAR_SITES, FitContext
from .nested_bases import Parts, order_neurons, parts_of
from .partition import dealt, divide, grouped

QUERIES, KEYS, VALUES, OUT, FC, PROJ = LINEAR_SITES
Groups = Literal["alike", "mixed"]


def fit_fractal(model: GPT2LMHeadModel, context: FitContext, *, groups: Groups) -> None:
    """Fill a model of parts, whose config says how many there are, from the original: its function as a whole."""
    original, entry = context.original, model.config.fractal
    smallest = entry["split"] ** entry["levels"]
    parts = parts_of(original)
    layers = range(parts.layers)
    moments: dict[str, dict[int, SecondMoments]] = {}
    if groups == "mixed":
        moments = {leaf: context.moments(layers, site) for leaf, site in ((OUT, "attention_mixed"), (PROJ, "post"))}
    context.progress("groups of heads and neurons")
    heads, neurons = [], []
    for layer in layers:
        if groups == "mixed":
            by_head = worth(parts, moments, layer, OUT).unflatten(0, (parts.heads, -1)).sum(1)
            of_heads, of_neurons = dealt(by_head, smallest), dealt(worth(parts, moments, layer, PROJ), smallest)
        else:
            of_heads = divide(head_features(parts, layer), smallest)[1]
            of_neurons = divide(neuron_features(parts, layer), smallest)[1]
        heads.append(grouped(of_heads))
        neurons.append(grouped(of_neurons))
    order_heads(parts, heads)
    order_neurons(parts, neurons)
    known = model.state_dict()
    tensors = gpt2.joined_qkv(parts.tensors(), known)
    model.load_state_dict(
        {key: value.to(original.dtype) for key, value in tensors.items() if key in known}, strict=False, assign=True
    )
    for part in parts_of_levels(model.config):
        vectors_of(model, part).begin(gpt2.norms(original)[-1])


# ---------------------------------------------------------------- groups


def head_features(parts: Parts, layer: int) -> Tensor:
    """What a head writes for what it reads, W_v W_o as a direction, float64[heads, d * d]: whatever its own basis."""
    values = parts.linears[layer, VALUES][0].unflatten(1, (parts.heads, -1)).transpose(0, 1)
    out = parts.linears[layer, OUT][0].unflatten(0, (parts.heads, -1))
    return torch.nn.functional.normalize((values @ out).flatten(1), dim=1)


def neuron_features(parts: Parts, layer: int) -> Tensor:
    """What a neuron looks for, a column of c_fc with LayerNorm's gain in it as a direction, float64[d_ff, d]."""
    gain = parts.norms[2 * layer + 1][0]
    return torch.nn.functional.normalize((gain[:, None] * parts.linears[layer, FC][0]).T, dim=1)


def worth(parts: Parts, moments: dict[str, dict[int, SecondMoments]], layer: int, leaf: str) -> Tensor:
    """How much each input of a linear adds to the residual stream, in mean squared length about its mean."""
    return moments[leaf][layer].covariance().diagonal().cpu() * parts.linears[layer, leaf][0].square().sum(1)


def order_heads(parts: Parts, orders: list[Tensor]) -> None:
    """Put each layer's heads in the order int64[heads]."""
    width = len(parts.linears[0, OUT][0]) // parts.heads
    for layer, by_head in enumerate(orders):
        order = (by_head[:, None] * width + torch.arange(width)).flatten()
        for leaf in (QUERIES, KEYS, VALUES):
            weight, bias = parts.linears[layer, leaf]
            parts.linears[layer, leaf] = weight[:, order], bias[order]
        weight, bias = parts.linears[layer, OUT]
        parts.linears[layer, OUT] = weight[order], bias
