"""Fits values that read xt alone, layer by layer: what the layers before have become decides what the next one gets.

Everything is fitted in a model that has two streams and nothing else new, so that other rewrites of a recipe neither
change nor wait for it. Of the text only sums are kept, and the hidden states in front of one layer, the original's and
the new model's.

On the demo (perplexity 2.28; 16,384 tokens of calibration, 4,096 of test, ridge 1e-3) v_from_xt gives 9.7 so, and 25
where xt is the original's: errors pile up. After 40 steps of distillation it is 4.2 where all of attention is trained,
7.5 where the whole block is; kron 298 and 682. After 20 (learning rate 1e-3) 5.8, and 7.7 where queries and keys stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from .. import gpt2
from ..correlation import SecondMoments
from ..modeling.streams import STAGES, residual
from . import kronecker
from .base import FitContext
from .distillation import Loss, distill


@dataclass(frozen=True)
class Settings:
    """As TokenFactored's fields."""

    name: str
    stage: str
    layers: Sequence[int]
    ridge: float
    distill_steps: int
    distill_learning_rate: float


@torch.no_grad()
def fit_values(settings: Settings, model: GPT2LMHeadModel, context: FitContext) -> None:
    """Fill what is new in some layers of a model in two streams, whose other tensors are the original's own."""
    original, device, d = context.original, gpt2.device(context.original), context.original.config.n_embd
    own = [gpt2.embed(model, ids) for ids, _ in context.batches()]
    for layer in range(1 + max(settings.layers)):
        if layer in settings.layers:
            context.progress(f"values of layer {layer}")
            _begin(model, original, layer)
            inputs, both = SecondMoments(d, device=device), SecondMoments(d, d, device=device)
            for hidden, (x, mask) in zip(own, context.entering(layer), strict=True):
                normed = gpt2.value_norm(model, layer)(hidden[1][mask])
                inputs.update(normed)
                both.update(normed, gpt2.values_of(original, layer, x[mask]))
            _fill(settings, model, original, layer, inputs, both)
            if settings.distill_steps:
                _distill(settings, model, context, layer, own)
        own = [gpt2.run_blocks(model, hidden, layer, layer + 1) for hidden in own]


def _begin(model: GPT2LMHeadModel, original: GPT2LMHeadModel, layer: int) -> None:
    """Queries and keys, and the values' norm, as the original's."""
    parts = [gpt2.linear(original, layer, f"attn.{part}") for part in "qk"]
    linear = gpt2.attention(model, layer).c_qk
    gpt2.put(linear, "weight", torch.cat([weight for weight, _ in parts], 1))
    gpt2.put(linear, "bias", torch.cat([bias for _, bias in parts]))
    norm = gpt2.value_norm(model, layer)
    if not isinstance(norm, nn.Identity):
        for name, tensor in zip(("weight", "bias"), gpt2.attention_norm(original, layer), strict=True):
            gpt2.put(norm, name, tensor.clone())


def _fill(
    settings: Settings,
    model: GPT2LMHeadModel,
    original: GPT2LMHeadModel,
    layer: int,
    inputs: SecondMoments,
    both: SecondMoments,
) -> None:
    """Values and outputs of a layer, from the moments of what its values read and of the original's values.

    The weights of a head sum to 1 for every token, so whatever is constant in values is constant in the output, and
    belongs to its bias.
    """
    attention, heads = gpt2.attention(model, layer), original.config.n_head
    covariance = inputs.covariance()
    value = kronecker.ridge(covariance, both.covariance(), settings.ridge)
    kinds = STAGES[settings.stage]
    if kinds == ("dense", None):
        gpt2.put(attention.c_v, "weight", value)
        gpt2.put(attention.c_v, "bias", both.second_mean - inputs.mean @ value)
        return
    output, output_bias = (part.double() for part in gpt2.linear(original, layer, "attn.o"))
    width = len(output) // heads
    parts = [slice(head * width, (head + 1) * width) for head in range(heads)]
    constant = output_bias + both.second_mean @ output  # of the output, where n is at its mean
    if kinds == ("identity", "identity"):
        own = [kronecker.own_slice(value[:, part], output[part], covariance, part) for part in parts]
        _fill_norm(gpt2.value_norm(model, layer), torch.cat(own), constant, inputs.mean)
        return
    project = _PROJECTIONS[kinds]
    found = [project(value[:, part], output[part], covariance, heads) for part in parts]
    values = torch.stack([v for v, _ in found]) if kinds[0] == "kron" else torch.cat([v for v, _ in found], 1)
    outputs = torch.stack([o for _, o in found], 1) if kinds[1] == "kron" else torch.cat([o for _, o in found])
    place = gpt2.output_map(model, layer)
    gpt2.put(attention.c_v, "weight", values)
    gpt2.put(place, "weight", outputs)
    mean = _mixed(values, inputs.mean) if kinds[0] == "kron" else inputs.mean @ values
    left = constant - (_mixed(outputs, mean) if kinds[1] == "kron" else mean @ outputs)
    if kinds[0] == "dense":
        before = torch.zeros_like(left) if place.bias is not None else _mixed(torch.linalg.pinv(outputs), left)
        gpt2.put(attention.c_v, "bias", before)
    if place.bias is not None:
        gpt2.put(place, "bias", left)


_PROJECTIONS: dict[Any, Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]] = {
    ("kron", "kron"): kronecker.values_and_outputs,
    ("kron", None): kronecker.values,
    ("dense", "kron"): kronecker.outputs,
}


def _fill_norm(norm: nn.Module, gains: Tensor, constant: Tensor, mean: Tensor) -> None:
    """A norm that is all there is: its own n becomes gains (n - mean) + constant."""
    if isinstance(norm, nn.LayerNorm):
        gpt2.put(norm, "bias", gains * (norm.bias - mean) + constant)
        gpt2.put(norm, "weight", gains * norm.weight)


def _mixed(weight: Tensor, x: Tensor) -> Tensor:
    """As HeadMixing: float64[heads, heads] on float64[d]."""
    return (weight @ x.unflatten(0, (len(weight), -1))).flatten()


def _distill(
    settings: Settings, model: GPT2LMHeadModel, context: FitContext, layer: int, own: Sequence[Tensor]
) -> list[float]:
    """A layer's attention learns to bring what enters the new model's block to what leaves the original's."""
    parameters = values_parameters(model, layer)
    for module, name, parameter in parameters:
        gpt2.put(module, name, parameter.clone())  # some are the original's own
    wanted = [x for x, _ in context.entering(layer + 1)]
    masks = [mask for _, mask in context.batches()]

    def take(batch: tuple[Tensor, Tensor, Tensor], learn: Loss) -> None:
        hidden, aim, mask = batch
        with torch.enable_grad():
            found = residual(gpt2.run_blocks(model, hidden, layer, layer + 1))[mask].float()
            learn(relative_error(found, aim[mask].float()))

    return distill(
        [getattr(module, name) for module, name, _ in parameters],
        lambda: zip(own, wanted, masks, strict=True),
        take,
        steps=settings.distill_steps,
        learning_rate=settings.distill_learning_rate,
        name=settings.name,
        progress=context.progress,
    )


def relative_error(found: Tensor, wanted: Tensor) -> Tensor:
    """Of float[tokens, d]: the mean over tokens of |found - wanted|^2 / |wanted|^2. Each token by its own size: that of
    position 0 is a hundred times the others' in GPT-2."""
    return ((found - wanted).square().sum(-1) / wanted.square().sum(-1).clamp_min(1e-12)).mean()


def values_parameters(model: GPT2LMHeadModel, layer: int) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """What a layer's distillation trains: all of its attention and the values' norm."""
    return [
        (module, name, parameter)
        for place in (gpt2.value_norm(model, layer), gpt2.attention(model, layer))
        for module in place.modules()
        for name, parameter in module.named_parameters(recurse=False)
    ]
