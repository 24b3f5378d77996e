"""Which neuron goes with which: the assignment that maximises the summed similarity, and how good it is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


@dataclass(frozen=True)
class Quality:
    """How good a matching is: mean similarity of matched neurons, over matches of two live neurons."""

    matched: float
    identity: float  # were each neuron matched to the one of the same index
    random: float  # were they matched by a random permutation
    unmoved: float  # share of neurons that the matching leaves at their index, 0..1
    dead_anchor: int  # neurons that do not vary; their correlation counts as 0
    dead_layer: int


def assign(similarity: Tensor) -> Tensor:
    """int64[n]: for each row its column, such that the sum of float[n, n] `similarity` over the matches is greatest."""
    values = similarity.cpu().double()
    # What a row falls short of its best, then a column of its least: the same optimum, found in 0.6 of the time.
    cost = values.amax(1, keepdim=True) - values
    cost -= cost.amin(0)
    _, columns = linear_sum_assignment(cost.numpy())
    return torch.from_numpy(columns).long()


def rate(similarity: Tensor, permutation: Tensor, dead_anchor: Tensor, dead_layer: Tensor, seed: int) -> Quality:
    """How good the matching `permutation` [n] is under `similarity` [n, n], over neurons that vary."""
    same = torch.arange(len(permutation))
    shuffled = torch.randperm(len(permutation), generator=torch.Generator().manual_seed(seed))

    def mean(columns: Tensor) -> float:
        live = ~(dead_anchor | dead_layer[columns])
        return similarity[same, columns][live].mean().item() if live.any() else 0.0

    return Quality(
        mean(permutation),
        mean(same),
        mean(shuffled),
        (permutation == same).double().mean().item(),
        int(dead_anchor.sum()),
        int(dead_layer.sum()),
    )
