"""Which slice of a nested model a budget buys: what may be looked at, and the choice among what was measured.

Mix'n'Match (MatFormer, arXiv 2310.07707): between two uniform sizes lie those whose layers take from both; schedules
that rise or fall once, in gentle steps, are the best.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from .modeling.nesting import Size

_PAIRS = 2  # of uniform sizes, the nearest to the budget, that mixes are made of


@dataclass(frozen=True)
class Budget:
    """The most that a slice may take; None: any."""

    parameters: int | None = None
    latency: float | None = None  # over the whole model's


@dataclass(frozen=True)
class Candidate:
    """A size, and what is known of it."""

    name: str
    size: Size
    parameters: int
    latency: float | None = None  # over the whole model's; None: not measured
    perplexity: float | None = None  # None: not measured

    @property
    def scored(self) -> bool:
        return self.perplexity is not None and math.isfinite(self.perplexity)


def within(candidate: Candidate, budget: Budget) -> bool:
    """Whether nothing that is known of a candidate is over the budget."""
    fits = budget.parameters is None or candidate.parameters <= budget.parameters
    return fits and (budget.latency is None or candidate.latency is None or candidate.latency <= budget.latency)


def best(candidates: Iterable[Candidate], budget: Budget) -> Candidate | None:
    """The lowest perplexity within the budget, of equals the one with fewer parameters; None where none was scored."""
    found = [item for item in candidates if item.scored and within(item, budget)]
    return min(found, key=lambda item: (item.perplexity, item.parameters), default=None)


def front(candidates: Iterable[Candidate]) -> list[Candidate]:
    """The scored candidates that no other one is as good as in everything and better than in something."""
    scored = [item for item in candidates if item.scored]
    costs = {item: (item.perplexity or 0.0, item.parameters, item.latency or 0.0) for item in scored}
    return [
        item
        for item in scored
        if not any(
            costs[other] != costs[item] and all(a <= b for a, b in zip(costs[other], costs[item], strict=True))
            for other in scored
        )
    ]


# ---------------------------------------------------------------- which sizes


def combined(trained: Sequence[Size]) -> list[Size]:
    """The sizes that a model was trained at, the whole first, and those that are smaller as two of them at once; then
    the smallest there is."""
    found = [
        *trained,
        *(_smaller(pair, trained[0]) for pair in combinations(trained[1:], 2)),
        _smaller(trained, trained[0]),
    ]
    return list(dict.fromkeys(found))


def _smaller(sizes: Sequence[Size], whole: Size) -> Size:
    """What all of them have in common."""
    width, depth, head = (min(each) for each in zip(*(size[1:] for size in sizes), strict=True))
    ffn = tuple(min(layer) for layer in zip(*(size.ffn[:depth] for size in sizes), strict=True))
    return Size(ffn, width, depth, head if width == whole.width else width)


def mixes(costs: Mapping[Size, float], budget: float, *, spare: int = 0) -> list[Size]:
    """Sizes whose layers take the neurons of two uniform ones, of which the larger is over the budget and the smaller
    is not: as many layers of the larger as the budget has room for, and down to `spare` fewer, in front or behind.

    costs: of uniform sizes, taken to be the same for each layer: so parameters are exactly, and time is nearly.
    """
    found = []
    ladders: dict[tuple[int, ...], list[Size]] = {}
    for size in costs:
        if len(set(size.ffn)) == 1:
            ladders.setdefault(size[1:], []).append(size)
    for ladder in ladders.values():
        ladder.sort(key=lambda size: size.ffn)
        pairs = [(few, many) for few, many in combinations(ladder, 2) if costs[few] <= budget < costs[many]]
        pairs.sort(key=lambda pair: ladder.index(pair[1]) - ladder.index(pair[0]))
        for few, many in pairs[:_PAIRS]:
            room = math.floor(few.depth * (budget - costs[few]) / (costs[many] - costs[few]) + 1e-9)
            for count in range(room, room - spare - 1, -1):
                if 0 < count < few.depth:
                    rest = few.depth - count
                    found.append(few._replace(ffn=many.ffn[:count] + few.ffn[:rest]))
                    found.append(few._replace(ffn=few.ffn[:rest] + many.ffn[:count]))
    return list(dict.fromkeys(found))


def worth_measuring(candidates: Sequence[Candidate], trained: Sequence[Size]) -> list[Candidate]:
    """Those that were trained, and of the others those that no other candidate has all of and more."""
    return [
        item
        for item in candidates
        if item.size in trained or not any(_covers(other.size, item.size) for other in candidates)
    ]


def _covers(one: Size, other: Size) -> bool:
    if one == other or one.depth < other.depth or one.width < other.width or one.head < other.head:
        return False
    return all(many >= few for many, few in zip(one.ffn, other.ffn, strict=False))
