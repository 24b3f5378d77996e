"""Equal groups within groups: of planted clusters, against brute force, and of things that are worth the same."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from compressor.rewrites.partition import dealt, divide, fall_into, grouped


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_planted_clusters_are_found(groups):
    generator = torch.Generator().manual_seed(groups)
    sorts = torch.randperm(8 * 16, generator=generator) % 8
    corners = torch.tensor([[a, b, c] for a in (0.0, 40) for b in (0.0, 20) for c in (0.0, 10)], dtype=torch.float64)
    x = corners[sorts] + torch.randn(128, 3, generator=generator, dtype=torch.float64)
    division, group = divide(x, groups)
    assert group.bincount().tolist() == [128 // groups] * groups
    assert len(set(zip(sorts.tolist(), group.tolist(), strict=True))) == 8  # no sort is torn apart
    assert torch.equal(fall_into(division, x, groups), group)
    # those of a half stand side by side: the widest gap divides first
    if groups > 1:
        assert len(set(zip((sorts // 4).tolist(), (group // (groups // 2)).tolist(), strict=True))) == 2


def test_a_division_is_no_worse_than_the_best_by_a_tenth():
    """Against all ways to halve 10 things, in squared distance to the centres."""
    for seed in range(8):
        x = torch.randn(10, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

        def spread(half, x=x):
            inside = torch.zeros(10, dtype=torch.bool)
            inside[list(half)] = True
            return sum((own - own.mean(0)).square().sum().item() for own in (x[inside], x[~inside]))

        _, group = divide(x, 2)
        best = min(spread(half) for half in combinations(range(10), 5))
        assert best <= spread(group.nonzero()[:, 0].tolist()) <= 1.15 * best


@pytest.mark.parametrize("groups", [2, 4])
def test_groups_within_groups(groups):
    x = torch.randn(48, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    outer, inner = divide(x, groups)[1], divide(x, 2 * groups)[1]
    assert torch.equal(inner // 2, outer)
    worth = torch.rand(48, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    outer, inner = dealt(worth, groups), dealt(worth, 2 * groups)
    assert torch.equal(inner // 2, outer) and inner.bincount().tolist() == [48 // (2 * groups)] * (2 * groups)


def test_dealt_groups_are_worth_about_the_same():
    worth = torch.tensor([9.0, 1, 7, 3, 5, 5, 2, 8]).double()
    sums = torch.zeros(2, dtype=torch.float64).index_add_(0, dealt(worth, 2), worth)
    assert (sums[0] - sums[1]).abs() <= 2
    worth = torch.rand(512, generator=torch.Generator().manual_seed(0)).double() ** 8
    sums = torch.zeros(4, dtype=torch.float64).index_add_(0, dealt(worth, 4), worth)
    assert (sums - sums.mean()).abs().max() < 0.1 * sums.mean()
    assert torch.equal(dealt(worth, 1), torch.zeros(512, dtype=torch.int64))


def test_things_that_are_all_the_same_are_halved_in_order():
    group = divide(torch.ones(6, 2, dtype=torch.float64), 2)[1]
    assert group.tolist() == [0, 0, 0, 1, 1, 1]
    assert grouped(torch.tensor([1, 0, 1, 0])).tolist() == [1, 3, 0, 2]
