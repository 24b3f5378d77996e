"""performer: exact attention within a block, sums of features for the completed blocks before it: a fixed-size state.

Source: Choromanski et al., arXiv 2009.14794 (FAVOR+); klaipher/GPTAttentionsComparison, whose features were no
estimate of softmax and underflowed to zeros; Hedgehog, Zhang et al., arXiv 2402.04347, for learned features
(modeling/performer.py).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from .. import gpt2
from ..checkpoint_attention import MOST
from ..errors import UserError
from ..modeling.performer import ESTIMATES, PAIRED, PerformerFar
from .base import FitContext
from .efficient import EfficientAttention, attentions_of


@dataclass(frozen=True)
class Performer(EfficientAttention):
    """features: of each head (elu: as many as its width, relu and favor+: any, favor_hyp and learned: even).
    feature_map: favor+, favor_hyp = estimates of softmax; learned = favor_hyp whose directions are trained; relu, elu =
    no estimates. seed: of the random directions. local: whether a query's own block is exact, else all is features."""

    name = "performer"

    features: int | None = None  # null: twice a head's width, elu: its width
    feature_map: Literal["favor+", "favor_hyp", "relu", "elu", "learned"] = "learned"
    seed: int = 0
    local: bool = True
    distill_learning_rate: float = 3e-2  # directions have entries around 1

    def check(self, base: GPT2Config) -> None:
        super().check(base)
        width, count = base.n_embd // base.n_head, self._features(base)
        if not 1 <= count <= MOST or (self.feature_map == "elu" and count != width):
            raise UserError(
                f"performer: features is {count} with {self.feature_map}; allowed: 1 to {MOST}, elu: {width}"
            )
        if not 0 <= self.seed < 1 << 63:
            raise UserError(f"performer: seed is {self.seed}; allowed: 0 or more")
        if self.feature_map in PAIRED and count % 2:
            raise UserError(f"performer: {self.feature_map} takes features in pairs; features is {count}")

    def _features(self, base: GPT2Config) -> int:
        width = base.n_embd // base.n_head
        return self.features if self.features is not None else width if self.feature_map == "elu" else 2 * width

    def resolved(self, base: GPT2Config) -> Performer:
        found = super().resolved(base)
        assert isinstance(found, Performer)
        return dataclasses.replace(found, features=self._features(base))

    def begin(self, model: GPT2LMHeadModel, context: FitContext, places: dict[int, int]) -> None:
        """Of features that do not estimate softmax: how much their sum weighs beside the exact block, so that the mean
        logarithm of its mass, head by head, is that of the softmax mass of the same tokens."""
        if self.feature_map in ESTIMATES or not self.local or context.calibration is None:
            return
        sums: dict[int, Tensor] = {}
        original = context.original
        count: dict[int, int] = {}

        def compare(layer: int, x: Tensor, _: Tensor) -> None:
            far, scaling = gpt2.attention(model, layer).scores.far, gpt2.attention(original, places[layer]).scaling
            query, key, value = gpt2.queries_keys_values(original, places[layer], x)
            tokens = mask.shape[1] // self.block * self.block  # of whole blocks
            real = mask[:, self.block : tokens]  # pads come last: before a real token there is none
            if not bool(real.any()):
                return
            query, key, value = (part[:, :, :tokens].unflatten(2, (-1, self.block)) for part in (query, key, value))
            missing = missing_mass(far, query, key, value, scaling).flatten(2).transpose(1, 2)[real]
            sums[layer] = sums.get(layer, 0) + missing.double().sum(0)
            count[layer] = count.get(layer, 0) + len(missing)

        for number, (ids, mask) in zip(range(4), context.batches(), strict=False):
            context.progress(f"mass of features, batch {number + 1}")
            attentions_of(context.original, places, (ids, mask), compare)
        for layer, total in sums.items():
            gpt2.put(gpt2.attention(model, layer).scores.far, "gain", total / count[layer])

    def knobs(self) -> dict[str, Any]:
        return {
            "features": self.features,
            "feature_map": self.feature_map,
            "seed": self.seed,
            "local": self.local,
        }

    @classmethod
    def neutral(cls, base: GPT2Config) -> Performer:
        return cls(block=base.n_positions)


def missing_mass(far: PerformerFar, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """What the logarithm of the far part's mass lacks of that of the softmax of the same tokens: float32[batch, heads,
    blocks - 1, block], of query, key, value float[batch, heads, blocks, block, head_dim]."""
    mass = far.over_blocks(query, key, value, scaling, {})[1][:, :, 1:]
    scores = torch.einsum("bhnqd,bhmkd->bhnqmk", query[:, :, 1:].float(), key.float()) * scaling
    blocks = torch.arange(scores.shape[4], device=scores.device)
    hidden = blocks > torch.arange(scores.shape[2], device=scores.device)[:, None]
    return scores.masked_fill(hidden[:, None, :, None], -math.inf).flatten(-2).logsumexp(-1) - mass
