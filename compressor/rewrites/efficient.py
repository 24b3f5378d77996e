"""What the rewrites of attention scores have in common: which layers, exact blocks, distillation of attention outputs.

q, k, v and o stay as they are. None of them has fewer parameters, and at GPT-2's own lengths (up to 1024) none is
faster: they are for long contexts, in time and in what a cache holds. Up to `block` tokens all are exact attention.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from .. import gpt2
from ..checkpoint_attention import MOST
from ..errors import UserError
from ..modeling.attention import far_of
from .base import FitContext, Rewrite, check_layers, layers_of, sites_of
from .distillation import Loss, distill
from .structure import add_structure


@dataclass(frozen=True)
class EfficientAttention(Rewrite):
    """layers: which (null = all). block: tokens within which attention is exact. distill_steps: of training what is
    new in each layer towards the original's attention output, for the same input, on calibration text."""

    layers: list | None = None
    block: int = 64
    distill_steps: int = 0
    distill_learning_rate: float = 3e-3

    @abstractmethod
    def knobs(self) -> dict[str, Any]:
        """What the config's entry says besides kind, layers and block."""

    def check(self, base: GPT2Config) -> None:
        check_layers(self.name, self.layers, base)
        if not 1 <= self.block <= MOST:
            raise UserError(f"{self.name}: block is {self.block}; allowed: 1 to {MOST} tokens")
        if self.distill_steps < 0:
            raise UserError(f"{self.name}: distill_steps is {self.distill_steps}; allowed: 0 or more")
        if self.distill_learning_rate <= 0:
            raise UserError(f"{self.name}: distill_learning_rate is {self.distill_learning_rate}; allowed: above 0")

    def resolved(self, base: GPT2Config) -> EfficientAttention:
        return dataclasses.replace(self, layers=layers_of(self.layers, base))

    def sites(self, base: GPT2Config) -> frozenset[str]:
        return sites_of(layers_of(self.layers, base), ["attn.scores"])

    def config(self, base: GPT2Config) -> GPT2Config:
        entry = {"kind": self.name, "layers": layers_of(self.layers, base), "block": self.block, **self.knobs()}
        return add_structure(base, "efficient_attention", [entry])

    def fit(self, model: GPT2LMHeadModel, context: FitContext) -> None:
        places = {context.layers[layer]: layer for layer in layers_of(self.layers, context.original.config)}
        for entry in model.config.efficient_attention:
            for layer in set(entry["layers"]) & places.keys():
                attention = gpt2.attention(model, layer)
                attention.scores.far = far_of(entry, attention).to(gpt2.device(context.original), model.dtype)
        self.begin(model, context, places)
        parameters = self.trainable(model)
        if self.distill_steps and parameters:
            distill(
                parameters,
                context.batches,
                lambda batch, learn: self._towards(model, context, places, batch, learn),
                steps=self.distill_steps,
                learning_rate=self.distill_learning_rate,
                name=self.name,
                progress=context.progress,
            )

    def begin(self, model: GPT2LMHeadModel, context: FitContext, places: dict[int, int]) -> None:
        """Give what is new in some layers (of the result -> of the original) a start that the text decides."""

    def _towards(
        self,
        model: GPT2LMHeadModel,
        context: FitContext,
        places: dict[int, int],
        batch: tuple[Tensor, Tensor],
        learn: Loss,
    ) -> None:
        """Hand `learn` the relative squared error of each layer's attention output for one batch of text."""
        mask, original = batch[1], context.original

        def compare(layer: int, x: Tensor, wanted: Tensor) -> None:
            query, key, value = (part.detach() for part in gpt2.queries_keys_values(original, places[layer], x))
            scaling = gpt2.attention(original, places[layer]).scaling
            weight, bias = gpt2.linear(original, places[layer], "attn.o")
            with torch.enable_grad():
                mixed = gpt2.attention(model, layer).scores(query, key, value, scaling=scaling, real=mask)
                found = torch.addmm(bias, mixed.transpose(1, 2).flatten(2)[mask], weight)
                error = (found - wanted[mask].detach()).float().square().mean()
                if not error.requires_grad:  # all is exact
                    raise UserError(
                        f"{self.name}: block is {self.block}, and no calibration text is longer: there is nothing to "
                        "distil; give a smaller block or distill_steps 0"
                    )
                learn(error / wanted[mask].float().var(0, unbiased=False).mean().clamp_min(1e-12))

        attentions_of(context.original, places, batch, compare)

    def trainable(self, model: GPT2LMHeadModel) -> list[nn.Parameter]:
        return [
            parameter
            for entry in model.config.efficient_attention or []
            if entry["kind"] == self.name
            for layer in entry["layers"]
            for parameter in gpt2.attention(model, layer).scores.parameters()
        ]

    def beside_adapters(self, model: GPT2LMHeadModel) -> list[nn.Parameter]:
        return self.trainable(model)

    def fold(self, model: GPT2LMHeadModel) -> GPT2LMHeadModel:
        raise UserError(f"attention of {self.name} is not plain GPT-2's, which cannot express it")


@torch.no_grad()
def attentions_of(
    original: GPT2LMHeadModel,
    places: Mapping[int, int],
    batch: tuple[Tensor, Tensor],
    take: Callable[[int, Tensor, Tensor], None],
) -> None:
    """Call take(layer, what its attention gets, what it gives), float[rows, context, d], for a batch of text in the
    original. places: layer, as `take` is to know it -> layer of the original."""
    hooks = [
        gpt2.attention(original, source).register_forward_hook(
            lambda _, given, output, layer=layer: take(layer, given[0], output[0])
        )
        for layer, source in places.items()
    ]
    try:
        gpt2.run_blocks(original, gpt2.embed(original, batch[0]), 0, 1 + max(places.values()))
    finally:
        for hook in hooks:
            hook.remove()
