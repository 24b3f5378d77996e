"""What a budget buys, on planted numbers; schedules beside all schedules."""

from __future__ import annotations

import itertools
import math

import pytest

from compressor.modeling.nesting import Size
from compressor.slice_choice import Budget, Candidate, best, combined, front, mixes, within, worth_measuring

WHOLE = Size((64,) * 4, 32, 4, 32)


def uniform(ff, depth=4):
    return Size((ff,) * depth, 32, depth, 32)


def candidate(name, parameters, perplexity=None, latency=None, size=WHOLE):
    return Candidate(name, size, parameters, latency, perplexity)


PLANTED = [
    candidate("whole", 100, 10.0, 1.0),
    candidate("half", 60, 12.0, 0.7),
    candidate("worse half", 60, 13.0, 0.7),
    candidate("slow", 55, 12.5, 0.9),
    candidate("small", 40, 20.0, 0.5),
    candidate("broken", 30, math.nan, 0.4),
    candidate("unknown", 20),
]


@pytest.mark.parametrize(
    ("budget", "name"),
    [
        (Budget(), "whole"),
        (Budget(parameters=100), "whole"),
        (Budget(parameters=99), "half"),
        (Budget(parameters=59), "slow"),
        (Budget(parameters=59, latency=0.8), "small"),
        (Budget(latency=0.69), "small"),
        (Budget(latency=0.7), "half"),
        (Budget(parameters=30), None),  # what is no number is no choice, nor what was not measured
    ],
)
def test_the_best_within_a_budget(budget, name):
    found = best(PLANTED, budget)
    assert (found and found.name) == name
    assert found is None or within(found, budget)


def test_of_equals_the_smaller():
    assert best([candidate("a", 9, 2.0), candidate("b", 8, 2.0), candidate("c", 8.5, 2.0)], Budget()).name == "b"


def test_the_front_is_what_nothing_beats():
    assert [item.name for item in front(PLANTED)] == ["whole", "half", "slow", "small"]
    two = [candidate("a", 9, 2.0), candidate("b", 9, 2.0), candidate("c", 10, 2.0)]
    assert [item.name for item in front(two)] == ["a", "b"]


def test_trained_sizes_and_two_at_once():
    half, quarter, short = uniform(32), uniform(16), uniform(64, 2)
    narrow, head = Size((32,) * 4, 16, 4, 16), Size((64,) * 4, 32, 4, 24)
    found = combined([WHOLE, half, quarter, short, narrow, head])
    assert found[:6] == [WHOLE, half, quarter, short, narrow, head] and len(found) == len(set(found))
    assert uniform(32, 2) in found and uniform(16, 2) in found  # fewer neurons and layers
    assert Size((32,) * 2, 16, 2, 16) in found  # narrower and fewer layers
    assert Size((16,) * 4, 16, 4, 16) in found  # narrower and fewer neurons
    assert Size((32,) * 4, 32, 4, 24) in found and Size((64,) * 2, 32, 2, 24) in found
    assert all(size.head == size.width for size in found if size.width < 32)  # as a narrower model's is
    assert found[-1] == Size((16,) * 2, 16, 2, 16)  # the smallest there is
    assert combined([WHOLE]) == [WHOLE]


@pytest.mark.parametrize("budget", [80, 100, 127, 128, 200, 255])
def test_mixes_fill_the_budget(budget):
    """Costs are neurons: of schedules of a pair that rise or fall once, the largest within the budget, found by trying
    all."""
    costs = {uniform(ff): 4.0 * ff for ff in (16, 32, 64)}
    found = mixes(costs, budget)
    assert found
    for size in found:
        few, many = min(size.ffn), max(size.ffn)
        assert few < many and size.ffn in (tuple(sorted(size.ffn)), tuple(sorted(size.ffn, reverse=True)))
        tried = [sum(each) for each in itertools.product((few, many), repeat=4) if sum(each) <= budget]
        assert sum(size.ffn) == max(tried)
        assert size.ffn[::-1] in {other.ffn for other in found}  # rising and falling


def test_mixes_lie_between_what_fits_and_what_does_not():
    costs = {uniform(ff): 4.0 * ff for ff in (8, 16, 32, 64)}
    assert mixes(costs, 256) == mixes(costs, 31) == []  # all fit, none does
    pairs = {(min(size.ffn), max(size.ffn)) for size in mixes(costs, 170)}
    assert pairs == {(32, 64), (16, 64)}  # the nearest first, and no more than two
    costs |= {uniform(ff, 2): 2.0 * ff for ff in (32, 64)}
    assert {size.depth for size in mixes(costs, 100)} == {2, 4}
    assert all(len(size.ffn) == size.depth for size in mixes(costs, 100))
    counts = {size.ffn.count(64) for size in mixes({uniform(32): 4.0, uniform(64): 8.0}, 7.0, spare=1)}
    assert counts == {3, 2}  # a layer to spare


def test_what_is_not_worth_a_measurement():
    sizes = [WHOLE, uniform(32), uniform(16), uniform(32, 2), uniform(16, 2)]
    trained = sizes[:3]
    items = [candidate(str(place), 1, size=size) for place, size in enumerate(sizes)]
    # 3 and 4 were not trained, and others have all of them and more
    assert [item.name for item in worth_measuring(items, trained)] == ["0", "1", "2"]
    assert [item.name for item in worth_measuring(items[2:], trained)] == ["2", "3"]  # 32 in two layers is not in 16
