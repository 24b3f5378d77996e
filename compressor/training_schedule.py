"""Which rows a step of a training sees, and at what learning rate: functions of seed and step alone.

So every row of a table sees the same batches in the same order, on any number of processes, interrupted or not.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch


def batch_rows(blocks: int, rows: int, step: int, seed: int) -> list[int]:
    """The rows of the global batch of a step (0 is the first): consecutive places in an endless sequence of seeded
    permutations of the blocks, one an epoch. The same for every model and any number of processes."""
    places = range(step * rows, (step + 1) * rows)
    return [_permutation(blocks, place // blocks, seed)[place % blocks] for place in places]


@lru_cache(maxsize=4)
def _permutation(blocks: int, epoch: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(mixed_seed(seed, epoch))
    return torch.randperm(blocks, generator=generator).tolist()


def mixed_seed(*parts: int) -> int:
    """One seed of several numbers."""
    mixed = 0
    for part in parts:
        mixed = (mixed * 6364136223846793005 + part + 1442695040888963407) % (1 << 63)
    return mixed


def rate_factor(step: int, steps: int, warm_up: int) -> float:
    """The share of the full learning rate at a step (0 is the first): a linear warm-up, then a cosine down to 0."""
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))
