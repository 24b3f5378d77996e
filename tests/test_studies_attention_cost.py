"""Times of calls in turns, memory by count, what a cache holds."""

from __future__ import annotations

import pytest
import torch

from compressor.studies.attention.cost import cache_bytes, peak_bytes, times
from compressor.studies.attention.kinds import Kind, attention_of, sdpa, vanilla

CPU = torch.device("cpu")


def test_calls_take_turns_and_the_first_round_does_not_count():
    now, told = [0.0], []

    def call(name, seconds):
        def run():
            told.append(name)
            now[0] += seconds * (100 if len(told) <= 2 else 1)

        return run

    steps = []
    found = times({"a": call("a", 1), "b": call("b", 3)}, 3, CPU, clock=lambda: now[0], step=lambda: steps.append(1))
    assert found == {"a": [1, 1, 1], "b": [3, 3, 3]}
    assert told == ["b", "a", "a", "b", "b", "a", "a", "b"] and len(steps) == 8


def test_the_peak_is_the_arithmetic():
    x = torch.zeros(1000)  # 4000 bytes, was there before

    def call():
        one = x + 1
        two = one * 2  # 8000
        del one
        view = two.view(10, 100).T  # no more
        view.add_(1)
        return (view + 1).sum()  # 8000, and 4 bytes when nothing has gone yet

    assert peak_bytes(call, CPU) == 8004 == peak_bytes(call, CPU)
    assert peak_bytes(lambda: x.view(10, 100), CPU) == 0


@torch.no_grad()
def test_explicit_attention_holds_two_squares():
    query, key, value = (torch.randn(1, 2, 512, 8) for _ in range(3))
    square = 4 * 2 * 512**2
    assert 2 * square <= peak_bytes(lambda: vanilla(query, key, value, scaling=0.3), CPU) < 2.4 * square
    assert peak_bytes(lambda: sdpa(query, key, value, scaling=0.3), CPU) < square / 10
    for kind in (Kind("linformer", 1), Kind("performer", 8, "elu")):
        attend = attention_of(kind, 2, 8, 16, 0)
        assert peak_bytes(lambda attend=attend: attend(query, key, value, scaling=0.3), CPU) < square / 2


@pytest.mark.parametrize("tokens", [64, 71])
def test_caches_are_the_arithmetic(tokens):
    heads, width, block, number = 2, 8, 8, 4
    query, key, value = (torch.randn(1, heads, tokens, width) for _ in range(3))
    whole, left = tokens // block, tokens % block
    token = heads * width * number  # a key or a value, or a query, which only the pseudo-inverse needs
    own = 2 * left * token

    def held(kind):
        return cache_bytes(attention_of(kind, heads, width, block, 0), query, key, value, 0.3)

    assert held(Kind("sdpa")) == held(Kind("vanilla")) == 2 * tokens * heads * width * number
    counts = 64  # whole numbers, such as how full a block is
    slots = 2 * whole * 3 * heads * width * number
    assert 0 <= held(Kind("linformer", 3)) - slots - own <= counts
    state = heads * 6 * (2 + width) * number
    assert 0 <= held(Kind("performer", 6, "relu")) - state - own <= counts
    for inverse, kept in (("none", 2), ("newton", 3)):
        least = kept * tokens * token + 2 * 3 * token  # and keys and values of 3 landmarks
        assert 0 <= held(Kind("nystromformer", 3, inverse)) - least <= kept * (left + block) * token + counts
