"""linformer: exact attention within a block, r learned summaries of every completed block before it.

Source: Wang et al., arXiv 2006.04768, whose projection over all tokens sees the future of a decoder (as did that of
klaipher/GPTAttentionsComparison); here each completed block is projected alone (modeling/linformer.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import GPT2Config

from ..errors import UserError
from .efficient import EfficientAttention


@dataclass(frozen=True)
class Linformer(EfficientAttention):
    """slots: summaries of a block. per_head: projections and log-masses of each head, not of each layer."""

    name = "linformer"

    slots: int = 8
    per_head: bool = False

    def check(self, base: GPT2Config) -> None:
        super().check(base)
        if not 1 <= self.slots <= self.block:
            raise UserError(f"linformer: slots is {self.slots}; allowed: 1 to {self.block} (block)")

    def knobs(self) -> dict[str, Any]:
        return {"slots": self.slots, "per_head": self.per_head}

    @classmethod
    def neutral(cls, base: GPT2Config) -> Linformer:
        return cls(block=8, slots=8)
