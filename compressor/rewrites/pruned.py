"""pruned: the weights of least magnitude become 0, over the linears of all blocks together; the file stays as large.

A baseline: unstructured magnitude pruning (Han et al., arXiv 1506.02626), global, down to a number of parameters that
are not 0. Embeddings, LayerNorms and biases stay. Recovery leaves the zeros at 0 (`zeros`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from .. import gpt2, models
from ..errors import UserError
from ..fields import parameter_count
from .base import LINEAR_SITES, FitContext, Rewrite, sites_of


@dataclass(frozen=True)
class Pruned(Rewrite):
    """parameters: how many of the whole model are not 0 afterwards, each counted once; or sparsity: the part of the
    linears' weights that becomes 0."""

    name = "pruned"

    parameters: int | float | str | None = None
    sparsity: float | None = None

    def check(self, base: GPT2Config) -> None:
        if (self.parameters is None) == (self.sparsity is None):
            raise UserError(
                f"pruned: parameters={self.parameters}, sparsity={self.sparsity}; give one, such as sparsity=0.5"
            )
        if self.sparsity is not None and not 0 <= self.sparsity <= 1:
            raise UserError(f"pruned: sparsity is {self.sparsity}; allowed: 0 to 1")
        if self.parameters is not None:
            wanted = parameter_count("pruned: parameters", self.parameters)
            model = models.build(base)
            most = sum(parameter.numel() for parameter in model.parameters())
            least = most - sum(linear.weight.numel() for linear in gpt2.linears(model))
            if not least <= wanted <= most:
                raise UserError(f"pruned: parameters={wanted:,} is out of reach; allowed: {least:,} to {most:,}")

    def resolved(self, base: GPT2Config) -> Pruned:
        self.check(base)
        if self.parameters is None:
            return self
        return dataclasses.replace(self, parameters=parameter_count("pruned: parameters", self.parameters))

    def sites(self, base: GPT2Config) -> frozenset[str]:
        return sites_of(range(base.n_layer), LINEAR_SITES)

    def fit(self, model: GPT2LMHeadModel, context: FitContext) -> None:
        weights = [linear.weight.detach() for linear in gpt2.linears(context.original)]
        context.progress("magnitudes of all weights")
        masks = smallest(weights, self._count(context.original, weights))
        for linear, weight, mask in zip(gpt2.linears(model), weights, masks, strict=True):
            gpt2.put(linear, "weight", weight.masked_fill(mask.to(weight.device), 0))

    def _count(self, original: GPT2LMHeadModel, weights: Sequence[Tensor]) -> int:
        """How many of the linears' weights become 0."""
        total = sum(weight.numel() for weight in weights)
        if self.sparsity is not None:
            return round(self.sparsity * total)
        everything = sum(int(parameter.count_nonzero()) for parameter in original.parameters())
        left = sum(int(weight.count_nonzero()) for weight in weights)
        wanted = parameter_count("pruned: parameters", self.parameters or 0)
        if wanted > everything:
            raise UserError(f"pruned: parameters={wanted:,}, and only {everything:,} of this model's are not 0")
        return total - left + everything - wanted

    def zeros(self, model: GPT2LMHeadModel) -> list[tuple[nn.Parameter, Tensor]]:
        masks = [(linear.weight, linear.weight.detach() == 0) for linear in gpt2.linears(model)]
        return [(weight, mask) for weight, mask in masks if mask.any()]

    @classmethod
    def neutral(cls, base: GPT2Config) -> Pruned:
        return cls(sparsity=0.0)


def smallest(weights: Sequence[Tensor], count: int) -> list[Tensor]:
    """A mask of each tensor, bool on the CPU: the `count` entries of least magnitude of all together. Of equal ones the
    first are taken, so that the count is exact."""
    kind = torch.promote_types(weights[0].dtype, torch.float32)  # which numpy knows
    magnitudes = [weight.abs().cpu().to(kind).contiguous() for weight in weights]
    if count == 0:
        return [torch.zeros_like(magnitude, dtype=torch.bool) for magnitude in magnitudes]
    ranked = torch.cat([magnitude.flatten() for magnitude in magnitudes]).numpy()
    ranked.partition(count - 1)
    threshold = float(ranked[count - 1])
    ties = count - int(np.count_nonzero(ranked[:count] < threshold))
    masks = []
    for magnitude in magnitudes:
        mask = magnitude < threshold
        equal = (magnitude == threshold).flatten().nonzero()[:ties, 0]
        mask.view(-1)[equal] = True
        ties -= len(equal)
        masks.append(mask)
    return masks
