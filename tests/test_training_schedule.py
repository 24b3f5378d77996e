"""Which rows, at what rate."""

from __future__ import annotations

import math
from itertools import pairwise

from compressor.training_schedule import batch_rows, mixed_seed, rate_factor


def test_every_epoch_has_every_block_once_in_another_order():
    stream = [row for step in range(11) for row in batch_rows(7, 4, step, seed=5)]
    epochs = [stream[i : i + 7] for i in range(0, 42, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_a_batch_follows_from_seed_and_step_alone():
    assert batch_rows(50, 8, 3, seed=1) == batch_rows(50, 8, 3, seed=1) != batch_rows(50, 8, 3, seed=2)
    assert sorted(batch_rows(3, 6, 0, seed=0)) == [0, 0, 1, 1, 2, 2]  # more rows than blocks


def test_seeds_do_not_collide_where_one_would_think_so():
    seeds = {mixed_seed(a, b, c) for a in range(12) for b in range(12) for c in range(12)}
    assert len(seeds) == 12**3 and all(0 <= seed < 1 << 63 for seed in seeds)


def test_warm_up_then_cosine():
    rates = [rate_factor(step, 20, 4) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4] == 1.0
    assert math.isclose(rates[12], 0.5) and all(a > b for a, b in pairwise(rates[4:]))
    assert 0 < rates[-1] < 0.02
    assert rate_factor(0, 1, 0) == 1.0
