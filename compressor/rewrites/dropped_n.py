"""dropped_n: n - 1 whole blocks are left out, those that change the hidden states least; the result is plain GPT-2.

A baseline: as many blocks go as with compressed_n of the same n, and nothing is fitted. Source: ShortGPT, Men et al.,
arXiv 2403.03853, with its block influence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from .. import gpt2
from ..errors import UserError
from ..windows import check_length
from .base import BLOCK_SITES, FitContext, Rewrite, sites_of


@dataclass(frozen=True)
class DroppedN(Rewrite):
    """n: n - 1 blocks go (default 4). layers: which; null: those of the least influence on calibration text, among the
    blocks that no other rewrite takes."""

    name = "dropped_n"

    n: int | None = None
    layers: list | None = None

    @property
    def count(self) -> int:
        """How many blocks go."""
        if self.n is not None:
            return self.n - 1
        return 3 if self.layers is None else len(self.layers)

    @property
    def undecided(self) -> bool:
        return self.layers is None and self.count > 0

    def check(self, base: GPT2Config) -> None:
        check_length(base.n_layer, self.count + 1)
        if self.layers is None:
            return
        known = [layer for layer in self.layers if type(layer) is int and 0 <= layer < base.n_layer]
        if len(set(known)) < len(self.layers):
            raise UserError(
                f"dropped_n: layers is {self.layers}; allowed: a list of different layers from 0 to {base.n_layer - 1}"
            )
        if len(self.layers) != self.count:
            raise UserError(f"dropped_n: layers={self.layers} with n={self.n}, which is {self.count} blocks; give one")

    def resolved(self, base: GPT2Config) -> DroppedN:
        self.check(base)
        layers = [] if self.count == 0 else self.layers
        return dataclasses.replace(self, n=self.count + 1, layers=None if layers is None else sorted(layers))

    def supposed(self, base: GPT2Config, taken: frozenset[str]) -> DroppedN:
        if not self.undecided:
            return self
        middle = (base.n_layer - 1) / 2
        return self._of(sorted(self._free(base, taken), key=lambda layer: abs(layer - middle)))

    def chosen(self, context: FitContext, taken: frozenset[str]) -> DroppedN:
        if not self.undecided:
            return self
        context.progress("influence of every block")
        influence = block_influence(context.original, context.batches()).tolist()
        return self._of(sorted(self._free(context.original.config, taken), key=lambda layer: influence[layer]))

    def _free(self, base: GPT2Config, taken: frozenset[str]) -> list[int]:
        free = [layer for layer in range(base.n_layer) if taken.isdisjoint(sites_of([layer], BLOCK_SITES))]
        if len(free) < self.count:
            raise UserError(f"dropped_n: {self.count} blocks are to go, the other rewrites leave {len(free)}")
        return free

    def _of(self, layers: list[int]) -> DroppedN:
        """With the first of these layers."""
        return dataclasses.replace(self, n=self.count + 1, layers=sorted(layers[: self.count]))

    def sites(self, base: GPT2Config) -> frozenset[str]:
        return sites_of(self.removed(base), BLOCK_SITES)

    def removed(self, base: GPT2Config) -> frozenset[int]:
        if self.undecided:
            raise UserError("dropped_n: calibration text has yet to choose the layers; give layers, such as [4, 5, 6]")
        return frozenset(self.layers or ())

    def fit(self, model: GPT2LMHeadModel, context: FitContext) -> None:
        """Nothing is left to fill."""

    @classmethod
    def neutral(cls, base: GPT2Config) -> DroppedN:
        return cls(n=1)


@torch.no_grad()
def block_influence(model: GPT2LMHeadModel, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """1 - the mean over real tokens of the cosine between what enters a block and what leaves it: float64[layers].

    batches: ids int64[rows, context], mask bool[rows, context], pads at the end of a row, where causal attention keeps
    them out of the real tokens. Raises UserError for hidden states that are not finite.
    """
    layers = model.config.n_layer
    total, tokens = torch.zeros(layers, dtype=torch.float64), 0
    with gpt2.evaluating(model):
        for ids, mask in batches:
            hidden = gpt2.embed(model, ids)
            for layer in range(layers):
                after = gpt2.run_blocks(model, hidden, layer, layer + 1)
                alike = torch.cosine_similarity(hidden[mask].double(), after[mask].double(), dim=-1)
                total[layer] += alike.sum().cpu()
                hidden = after
            tokens += int(mask.sum())
    if not torch.isfinite(total).all():
        layer = int((~torch.isfinite(total)).nonzero()[0])
        raise UserError(f"what leaves layer {layer} is not finite; the weights must be, and float16 may need float32")
    return 1 - total / max(1, tokens)
