"""nystromformer: exact attention within a block, m landmarks of the completed blocks before it.

Source: Xiong et al., arXiv 2102.03902, whose landmarks are means over all tokens, later ones too (as in
klaipher/GPTAttentionsComparison); here they are those of the completed prefix (modeling/nystromformer.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from transformers import GPT2Config

from ..checkpoint_attention import MOST
from ..errors import UserError
from .efficient import EfficientAttention


@dataclass(frozen=True)
class Nystromformer(EfficientAttention):
    """landmarks: of a prefix. inverse: "newton" = the paper's pseudo-inverse and right factor, "none" = the landmarks'
    means of keys and values. It has nothing to train, and its cache holds all tokens: it saves time alone."""

    name = "nystromformer"

    landmarks: int = 16
    inverse: Literal["newton", "none"] = "none"

    def check(self, base: GPT2Config) -> None:
        super().check(base)
        if not 1 <= self.landmarks <= MOST:
            raise UserError(f"nystromformer: landmarks is {self.landmarks}; allowed: 1 to {MOST}")

    def knobs(self) -> dict[str, Any]:
        return {"landmarks": self.landmarks, "inverse": self.inverse}

    @classmethod
    def neutral(cls, base: GPT2Config) -> Nystromformer:
        return cls(block=base.n_positions)
