"""Equal groups of like things, groups of these within them, and so on: which heads and neurons, and which rows of text,
belong to which of the models side by side.

Balanced 2-means, again and again. With two centres the best assignment of equal sizes is a sort by the difference of
the squared distances, of which the half that is nearer to a centre gets it. It begins along the first principal
direction, so that nothing is drawn. (MoEfication, arXiv 2110.01786, has balanced k-means over the columns of c_fc.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_ROUNDS = 100  # far more than it takes to settle


@dataclass(frozen=True)
class Division:
    """Things float64[things, features] with x @ direction > threshold fall into the second half."""

    direction: Tensor  # float64[features]
    threshold: float
    below: tuple[Division, Division] | None  # how each half is divided in its turn


def divide(x: Tensor, groups: int) -> tuple[Division | None, Tensor]:
    """x float64[things, features] in a power of 2 of groups: how they are divided (None: one group), and the group of
    each, int64[things]. Equal groups, to one thing; those of each half, quarter and so on stand side by side."""
    group = torch.zeros(len(x), dtype=torch.int64)
    if groups == 1:
        return None, group
    second, direction = _second_half(x)
    made = x @ direction
    ends = made[~second], made[second]
    threshold = sum(float(end) for end in (ends[0].max(), ends[1].min())) / 2 if second.any() else 0.0
    group[second] = groups // 2
    below = []
    for half in (~second, second):
        division, inner = divide(x[half], groups // 2)
        group[half] += inner
        below.append(division)
    return Division(direction, threshold, None if below[0] is None else tuple(below)), group  # type: ignore[arg-type]


def fall_into(division: Division | None, x: Tensor, groups: int) -> Tensor:
    """The group of each of other things, by the same division, int64[things]: no longer equal ones."""
    group = torch.zeros(len(x), dtype=torch.int64)
    if division is None:
        return group
    second = x @ division.direction > division.threshold
    group[second] = groups // 2
    for half, below in zip((~second, second), division.below or (None, None), strict=True):
        group[half] += fall_into(below, x[half], groups // 2)
    return group


def _second_half(x: Tensor) -> tuple[Tensor, Tensor]:
    """bool[things] of a half of x and what it lies beyond the other along, float64[features]."""
    x = x - x.mean(0)
    direction = torch.linalg.svd(x, full_matrices=False).Vh[0]
    direction = direction * direction[direction.abs().argmax()].sign()  # a library is free to give either
    second = _upper(x @ direction)
    for _ in range(_ROUNDS):
        moved = x[second].sum(0) - x[~second].sum(0)
        if not moved.any():
            break
        direction, before = moved / moved.norm(), second
        second = _upper(x @ direction)
        if torch.equal(second, before):
            break
    return second, direction


def _upper(score: Tensor) -> Tensor:
    """bool[things]: the larger half; of equal ones the later."""
    found = torch.zeros(len(score), dtype=torch.bool)
    found[score.argsort(stable=True)[len(score) // 2 :]] = True
    return found


def grouped(group: Tensor) -> Tensor:
    """The order int64[things] in which groups stand side by side; within a group as before."""
    return group.argsort(stable=True)


def dealt(worth: Tensor, groups: int) -> Tensor:
    """The group of each thing, int64[things], in a power of 2 of equal groups that are worth about the same, and so
    are their halves: the most worthy to the first, the next two to the second, the next two to the first, and so on."""
    group = torch.zeros(len(worth), dtype=torch.int64)
    if groups == 1:
        return group
    place = torch.empty_like(group)
    place[worth.argsort(descending=True, stable=True)] = torch.arange(len(worth))
    second = (place % 4 == 1) | (place % 4 == 2)
    group[second] = groups // 2
    for half in (~second, second):
        group[half] += dealt(worth[half], groups // 2)
    return group
