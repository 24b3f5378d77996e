"""The figures of study attention, and what can be said of them: where one overtakes another, which is nearest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from .kinds import Kind, middle
from .likeness import Likeness

MIB = 2**20


@dataclass(frozen=True)
class Cost:
    """Of a kind at a length. *_ms: quartiles of a forward pass. peak_bytes: beyond its inputs. cache_bytes: of
    length - 1 tokens."""

    kind: Kind
    length: int
    low_ms: float
    median_ms: float
    high_ms: float
    peak_bytes: int
    cache_bytes: int

    @property
    def cache_per_token(self) -> float:
        return self.cache_bytes / (self.length - 1)


@dataclass(frozen=True)
class Match(Likeness):
    """Of a kind on some heads, with what its cache holds there."""

    kind: Kind
    heads: str
    cache_bytes: int


@dataclass(frozen=True)
class Measured:
    """norms: of queries and keys, by heads."""

    settings: dict[str, Any]
    costs: tuple[Cost, ...]
    matches: tuple[Match, ...]
    norms: dict[str, tuple[float, float]]

    @property
    def lengths(self) -> list[int]:
        return self.settings["lengths"]

    @property
    def heads(self) -> list[str]:
        return list(self.norms)

    def at(self, length: int) -> dict[Kind, Cost]:
        return {cost.kind: cost for cost in self.costs if cost.length == length}

    def on(self, heads: str) -> dict[Kind, Match]:
        return {match.kind: match for match in self.matches if match.heads == heads}

    def course(self, kind: Kind) -> list[Cost]:
        """By length."""
        return [cost for cost in self.costs if cost.kind == kind]

    @property
    def main(self) -> list[Kind]:
        """The kinds that were measured at every length."""
        return middle(list(self.at(self.settings["knob_length"])))

    def body(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "settings": self.settings,
            "costs": [_record(cost) for cost in self.costs],
            "likeness": [_record(match) for match in self.matches],
            "norms": {name: {"query": query, "key": key} for name, (query, key) in self.norms.items()},
        }


def _record(item: Cost | Match) -> dict[str, Any]:
    record = asdict(item)
    return {"name": item.kind.name, **record.pop("kind"), **record}


def crossing(own: Sequence[tuple[float, float]], other: Sequence[tuple[float, float]]) -> float | None:
    """The length from which on `own` is no more than `other`, of (length, value) by ascending length, the same ones;
    between two lengths as a power of the length; None where `own` is more at the last one."""
    ratios = [(length, math.log(mine / theirs)) for (length, mine), (_, theirs) in zip(own, other, strict=True)]
    if ratios[-1][1] > 0:
        return None
    for (before, high), (after, low) in reversed(list(pairwise(ratios))):
        if high > 0:
            return before * (after / before) ** (high / (high - low))
    return ratios[0][0]
