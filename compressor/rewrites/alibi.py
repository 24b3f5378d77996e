"""alibi: linear biases in the place of learned positions, so that a model takes contexts longer than it was trained at.

Source: Press, Smith & Lewis, arXiv 2108.12409; the way there from learned positions is ours (modeling/alibi.py): they
fade out during recovery while the biases fade in, and are dropped at its end.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from .. import gpt2
from ..errors import UserError
from ..modeling.alibi import geometric_slopes
from ..token_groups import Strings
from .alibi_fit import fitted_slopes
from .base import FitContext, Rewrite
from .structure import add_structure, without_structure


@dataclass(frozen=True)
class Alibi(Rewrite):
    """slopes: geometric, the paper's, for any number of heads; fitted, those of the model's own attention on
    calibration text; learned, which begin as fitted and train with the rest. least: nats by which a fitted bias falls
    within the trained context at least; more let what is beyond disturb less, and cost sight. anneal: the share of the
    recovery's steps in which learned positions fade out; 0 drops them at once, in the rewrite."""

    name = "alibi"

    slopes: Literal["geometric", "fitted", "learned"] = "fitted"
    least: float = 12.0
    anneal: float = 0.5

    def sites(self, base: GPT2Config) -> frozenset[str]:
        return frozenset({"wpe", "lm_head"})  # the head: it is the embeddings, which take up the positions' mean

    def check(self, base: GPT2Config) -> None:
        if not 0 <= self.anneal <= 1:
            raise UserError(f"alibi: anneal is {self.anneal}; allowed: 0 to 1, a share of the recovery's steps")
        if not 0 < self.least < math.inf:
            raise UserError(f"alibi: least is {self.least}; allowed: above 0, in nats")

    def config(self, base: GPT2Config) -> GPT2Config:
        entry = {"slopes": self.slopes, "learned_positions": self.anneal > 0, "first": True}
        return add_structure(base, "alibi", entry)

    def fit(self, model: GPT2LMHeadModel, context: FitContext) -> None:
        config, places = context.original.config, context.layers
        if self.slopes == "geometric":
            slopes = {layer: torch.tensor(geometric_slopes(config.n_head)) for layer in places}
        else:
            context.progress("attention by distance")
            least = self.least / config.n_positions
            found = fitted_slopes(context.original, context.batches(), list(places))
            slopes = {layer: own.clamp_min(least) for layer, own in found.items()}
        for layer, own in places.items():
            biases = gpt2.attention(model, own).alibi
            gpt2.put(biases, "log_slopes", slopes[layer].log())
            gpt2.put(biases, "first", torch.zeros(config.n_head))
        positions = gpt2.positions(context.original)
        mean = positions[1:].mean(0) if len(positions) > 1 else positions[0]
        added = gpt2.position_layer(model)
        gpt2.put(added, "first", positions[0] - mean)
        if self.anneal:
            gpt2.put(added, "mean", mean)
        else:
            gpt2.put_embeddings(model, gpt2.embeddings(model) + mean)

    def beside_adapters(self, model: GPT2LMHeadModel) -> list[nn.Parameter]:
        added, layers = gpt2.position_layer(model), range(model.config.n_layer)
        biases = [gpt2.attention(model, layer).alibi for layer in layers]
        found = [added.first, *(bias.first for bias in biases), *([added.mean] if added.learned else [])]
        return [*found, *(bias.log_slopes for bias in biases)] if self.slopes == "learned" else found

    def anneals(self, model: GPT2LMHeadModel) -> bool:
        return model.config.alibi["learned_positions"]

    def on_step(self, model: GPT2LMHeadModel, progress: float) -> None:
        if self.anneals(model):
            gpt2.position_layer(model).share = max(0.0, 1 - progress / self.anneal)

    def finish(self, model: GPT2LMHeadModel) -> None:
        if self.anneals(model):
            mean = gpt2.position_layer(model).dropped()
            gpt2.put_embeddings(model, gpt2.embeddings(model) + mean)
            model.config.alibi = {**model.config.alibi, "learned_positions": False}

    def finished(self, config: GPT2Config) -> GPT2Config:
        found = copy.deepcopy(config)
        found.alibi = {**found.alibi, "learned_positions": False}
        return found

    def fold(self, model: GPT2LMHeadModel) -> GPT2LMHeadModel:
        if not model.config.alibi["learned_positions"]:
            raise UserError("alibi's biases fall with distance, which plain GPT-2 cannot express")
        return without_structure(model, "alibi", lambda entry: True, {})

    def diagnose(self, model: GPT2LMHeadModel, batches: Any, strings: Strings = ()) -> dict[str, Any]:
        slopes = [gpt2.attention(model, layer).alibi.slopes(1.0).tolist() for layer in range(model.config.n_layer)]
        return {"slopes": [[float(f"{slope:.6g}") for slope in own] for own in slopes]}

    @classmethod
    def neutral(cls, base: GPT2Config) -> Alibi:
        return cls(slopes="geometric")
