"""performer: exact attention within a block, sums of features for the completed blocks before it: a fixed-size state.

Source: Choromanski et al., arXiv 2009.14794 (FAVOR+); klaipher/GPTAttentionsComparison, whose features were no
estimate of softmax and underflowed to zeros; Hedgehog, Zhang et al., arXiv 2402.04347, for learned features
(modeling/performer.py).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from transformers import GPT2Config

from ..errors import UserError
from .efficient import EfficientAttention


@dataclass(frozen=True)
class Performer(EfficientAttention):
    """features: of each head (elu: as many as its width, relu and favor+: any, favor_hyp and learned: even).
    feature_map: favor+, favor_hyp = estimates of softmax; relu, elu, learned = trained in its place. seed: of the
    random directions. local: whether a query's own block is exact, else all is features."""

    name = "performer"

    features: int | None = None  # null: twice a head's width, elu: its width
    feature_map: Literal["favor+", "favor_hyp", "relu", "elu", "learned"] = "learned"
    seed: int = 0
    local: bool = True

    def check(self, base: GPT2Config) -> None:
        super().check(base)
        width, count = base.n_embd // base.n_head, self._features(base)
        if count < 1 or (self.feature_map == "elu" and count != width):
            raise UserError(f"performer: features is {count} with {self.feature_map}; allowed: 1 or more, elu: {width}")
        if self.feature_map in ("favor_hyp", "learned") and count % 2:
            raise UserError(f"performer: {self.feature_map} takes features in pairs; features is {count}")

    def _features(self, base: GPT2Config) -> int:
        width = base.n_embd // base.n_head
        return self.features if self.features is not None else width if self.feature_map == "elu" else 2 * width

    def resolved(self, base: GPT2Config) -> Performer:
        found = super().resolved(base)
        assert isinstance(found, Performer)
        return dataclasses.replace(found, features=self._features(base))

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
