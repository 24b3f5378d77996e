"""What a nested model is made of: statistics of the original on calibration text, bases by them, and what belongs to
the smaller sizes alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from .. import gpt2
from ..capture import capture
from ..modeling.nesting import narrowed, reflected, to_plain
from .base import FitContext
from .nested_bases import (
    PROJ,
    HeadMoments,
    balance_heads,
    fold_norms,
    order_neurons,
    parts_of,
    principal_basis,
    rotate,
)

Importance = Literal["variance", "energy"]


@dataclass
class Activations:
    """Of the neurons of one layer, after the activation function: sums over tokens, float64[d_ff]."""

    total: Tensor
    squares: Tensor
    tokens: int = 0


@dataclass
class Streams:
    """Of the original: second moments of what each LayerNorm makes without gain and bias, float64[d, d] over tokens;
    of heads, one a layer."""

    norms: list[Tensor]
    heads: list[HeadMoments]
    tokens: int = 0


def fit_nested(model: GPT2LMHeadModel, context: FitContext, *, importance: Importance) -> None:
    """Fill a nested model, whose config says what is nested, from the original: its function at the whole size."""
    original, entry = context.original, model.config.matryoshka
    parts = parts_of(original)
    basis = None
    if entry["rotated"]:
        context.progress("second moments of the residual stream and of heads")
        streams = stream_moments(original, context.batches())
    if len(entry["ffn"]) > 1:
        context.progress("importance of neurons")
        neurons = neuron_activations(original, context)
        orders = [
            neuron_importance(own, parts.linears[layer, PROJ][0], importance).argsort(descending=True)
            for layer, own in enumerate(neurons)
        ]
        order_neurons(parts, orders)
    if entry["rotated"]:
        fold_norms(parts)
        basis = principal_basis(sum(moment / streams.tokens for moment in streams.norms))  # type: ignore[arg-type]
        balance_heads(parts, streams.heads)
        rotate(parts, basis)
    tensors = parts.tensors()
    known = model.state_dict()
    model.load_state_dict(
        {key: value.to(original.dtype) for key, value in gpt2.joined_qkv(tensors, known).items() if key in known},
        strict=False, assign=True,
    )  # fmt: skip
    nest = gpt2.nesting(model)
    if len(entry["ffn"]) > 1:
        for layer, (own, order) in enumerate(zip(neurons, orders, strict=True)):
            mean, out = (own.total / own.tokens)[order], parts.linears[layer, PROJ][0]
            for ff in entry["ffn"][1:]:
                nest.ffn_bias[layer][str(ff)] = torch.nn.Parameter((mean[ff:] @ out[ff:]).to(original.dtype))
    if basis is not None:
        for width in entry["width"][1:]:
            for index, size in enumerate(width_gains(streams, basis, width)):
                norm = list(nest.norms[str(width)][index // 2].values())[index % 2]
                gpt2.put(norm, "weight", torch.full((width,), size))
                gpt2.put(norm, "bias", torch.zeros(width))
    if len(nest.exits):
        context.progress("final LayerNorms of the smaller sizes")
        sizes = [(int(depth), int(width)) for depth, width in (name.split("_") for name in nest.exits)]
        for (depth, width), (gain, bias) in exit_norms(original, context, sizes, basis).items():
            gpt2.put(nest.exits[f"{depth}_{width}"], "weight", gain)
            gpt2.put(nest.exits[f"{depth}_{width}"], "bias", bias)


# ---------------------------------------------------------------- neurons


def neuron_activations(model: GPT2LMHeadModel, context: FitContext) -> list[Activations]:
    """One for each layer, on calibration text."""
    width = gpt2.d_ff(model.config)
    found = [
        Activations(torch.zeros(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64))
        for _ in range(model.config.n_layer)
    ]

    def take(layer: int, site: str, x: Tensor) -> None:
        own = found[layer]
        own.total += x.sum(0, dtype=torch.float64).cpu()
        own.squares += x.square().sum(0, dtype=torch.float64).cpu()
        own.tokens += len(x)

    capture(model, context.batches(), take, sites=("post",))
    return found


def neuron_importance(activations: Activations, out: Tensor, kind: Importance) -> Tensor:
    """float64[d_ff]: what is lost, in squared length, where a neuron a_j is left out: variance, Var[a_j] |out_j|^2, as
    the mean goes into a bias; or energy, E[a_j^2] |out_j|^2. out: its rows of c_proj, [d_ff, d]."""
    mean = activations.total / activations.tokens
    square = activations.squares / activations.tokens
    spread = square - mean.square() if kind == "variance" else square
    return spread.clamp_min(0) * out.square().sum(1)


# ---------------------------------------------------------------- residual stream


@torch.no_grad()
def stream_moments(model: GPT2LMHeadModel, batches: Iterator[tuple[Tensor, Tensor]]) -> Streams:
    """Second moments, one pass; pads never count."""
    config = model.config
    d, heads, layers = config.n_embd, config.n_head, config.n_layer
    width = d // heads
    norms = [torch.zeros(d, d, dtype=torch.float64) for _ in range(2 * layers + 1)]
    sums = [torch.zeros(3, heads, width, width, dtype=torch.float64) for _ in range(layers)]
    means = [torch.zeros(heads, width, dtype=torch.float64) for _ in range(layers)]
    tokens = 0
    for states, mask in _norm_inputs(model, batches):
        tokens += int(mask.sum())
        for index, x in states:
            norms[index] += _gram(_normalised(model, x)[mask])
            if index % 2 == 0 and index < 2 * layers:
                layer = index // 2
                for place, part in enumerate(gpt2.queries_keys_values(model, layer, gpt2.norms(model)[index](x))):
                    real = part.transpose(1, 2)[mask]  # [tokens, heads, width]
                    by_head = real.transpose(0, 1)
                    sums[layer][place] += (by_head.transpose(1, 2) @ by_head).double().cpu()
                    if place == 1:
                        means[layer] += real.sum(0, dtype=torch.float64).cpu()
    for own, mean in zip(sums, means, strict=True):  # what all keys have in common changes no attention
        own[1] -= mean[:, :, None] * mean[:, None] / max(1, tokens)
    return Streams(norms, [HeadMoments(*own.unbind()) for own in sums], tokens)


def _gram(x: Tensor) -> Tensor:
    return (x.T @ x).double().cpu()


def _normalised(model: GPT2LMHeadModel, x: Tensor) -> Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=model.config.layer_norm_epsilon)


def _norm_inputs(
    model: GPT2LMHeadModel, batches: Iterator[tuple[Tensor, Tensor]]
) -> Iterator[tuple[list[tuple[int, Tensor]], Tensor]]:
    """For each batch what every LayerNorm gets, by its place in `gpt2.norms`, float[rows, context, d], and the mask."""
    norms = gpt2.norms(model)
    for ids, mask in batches:
        taken: list[tuple[int, Tensor]] = []
        with ExitStack() as hooks:
            for index, norm in enumerate(norms[:-1]):
                hooks.callback(norm.register_forward_pre_hook(_keeper(taken, index)).remove)
            final = gpt2.run_blocks(model, gpt2.embed(model, ids), 0, model.config.n_layer)
        yield [*taken, (len(norms) - 1, final)], mask


def _keeper(taken: list[tuple[int, Tensor]], index: int) -> Callable[[Any, Any], None]:
    def keep(module: Any, inputs: Any) -> None:
        taken.append((index, inputs[0]))

    return keep


def width_gains(streams: Streams, basis: Tensor, width: int) -> list[float]:
    """What makes a LayerNorm over the first width - 1 coordinates as large as these are in the whole one's output, for
    every LayerNorm but the last: the root of the mean square over tokens."""
    kept = basis[:, : width - 1]
    return [
        float(((kept * (moment @ kept)).sum() / (streams.tokens * width)).clamp_min(0).sqrt())
        for moment in streams.norms[:-1]
    ]


# ---------------------------------------------------------------- exits


def exit_norms(
    model: GPT2LMHeadModel, context: FitContext, sizes: list[tuple[int, int]], basis: Tensor | None
) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
    """Gain and bias [width] of the final LayerNorm of each (depth, width): least squares, number by number, from the
    original's states after that many layers to what its head reads (a diagonal tuned lens, arXiv 2303.08112)."""
    d, layers = model.config.n_embd, model.config.n_layer
    rotation = None if basis is None else reflected(basis)
    sums = {size: torch.zeros(4, size[1], dtype=torch.float64) for size in sizes}
    tokens = 0
    for states, mask in _norm_inputs(model, context.batches()):
        by_index = dict(states)
        final = by_index[2 * layers][mask]
        whole = _normalised(model, final if rotation is None else final @ rotation.to(final))
        if rotation is None:
            whole = gpt2.final_norm(model, final)
        read = gpt2.final_norm(model, final)
        tokens += len(final)
        for depth, width in sizes:
            x = by_index[2 * depth][mask]
            x = x if rotation is None else x @ rotation.to(x)
            x = _normalised(model, narrowed(x, width))
            wanted = whole if width == d or basis is None else _coordinates(read, basis, width)
            for place, term in enumerate((x, wanted, x * wanted, x.square())):
                sums[depth, width][place] += term.sum(0, dtype=torch.float64).cpu()
    found = {}
    for size, own in sums.items():
        x, wanted, both, square = own / tokens
        gain = (both - x * wanted) / (square - x.square()).clamp_min(1e-12)
        found[size] = gain, wanted - gain * x
    return found


def _coordinates(read: Tensor, basis: Tensor, width: int) -> Tensor:
    """What a narrow model's head should get for what the whole one's embeddings meet, float[tokens, d]."""
    return to_plain(read @ basis[:, : width - 1].to(read))
