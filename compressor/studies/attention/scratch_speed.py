"""How long an iteration of training takes with each kind of attention, the kinds in turns.

Types are trained one after another, and a machine that does other things too makes the one or the other slow: so their
times are taken here, each round one iteration of every type.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import GPT2LMHeadModel

from ...finetune import finetune
from ...tokens import TokenBlocks

ROUNDS = 9


@dataclass(frozen=True)
class Times:
    """Seconds of an iteration: forward, backward and optimiser, by type a figure of every round."""

    rounds: dict[str, list[float]]

    @property
    def count(self) -> int:
        """Of rounds."""
        return len(next(iter(self.rounds.values())))

    def median(self, name: str) -> float:
        return statistics.median(self.rounds[name])

    def ratios(self, name: str, other: str) -> list[float]:
        """How many times as long as `other` one takes, in every round, from the lowest."""
        return sorted(one / base for one, base in zip(self.rounds[name], self.rounds[other], strict=True))


def in_turns(
    models: Mapping[str, GPT2LMHeadModel], blocks: TokenBlocks, *, batch_tokens: int, rounds: int = ROUNDS
) -> Times:
    """Train every model, which changes, for `rounds` iterations of its own, in an order that turns with each round; an
    iteration of each before that is not counted."""
    found: dict[str, list[float]] = {name: [] for name in models}
    for place in range(-1, rounds):
        for name in _turned(list(models), place):
            done = finetune(
                models[name], blocks, None, train="full", steps=1, batch_tokens=batch_tokens, learning_rate=1e-4,
                seed=place + 1,
            )  # fmt: skip
            if place >= 0:
                found[name].append(done.training_seconds)
    return Times(found)


def _turned(names: Sequence[str], place: int) -> list[str]:
    start = place % len(names)
    return [*names[start:], *names[:start]]
