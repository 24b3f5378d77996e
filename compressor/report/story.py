"""What a run tells besides its figures: how its window was found, how it was recovered, how its layers match."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..windows import Candidate, Plan


@dataclass(frozen=True)
class Search:
    """The score table of a search for windows, and the plan that it found best."""

    rewrite: str
    candidates: tuple[Candidate, ...]
    winner: Plan


@dataclass(frozen=True)
class Curve:
    """The training of one model; losses are per token, in nats."""

    name: str  # recovered | control
    train: str
    steps: tuple[tuple[int, float], ...]  # (step, training loss)
    evaluations: tuple[tuple[int, float], ...]  # (step, loss on the selection text)
    best: int  # the step whose weights were kept


@dataclass(frozen=True)
class Pair:
    """How well two layers match: mean similarity of their matched neurons, of those of one index, of random ones."""

    anchor: int
    layer: int
    matched: float
    identity: float
    random: float


@dataclass(frozen=True)
class Alignment:
    """All solved pairs of layers."""

    measure: str  # correlation | cosine
    n_layer: int
    pairs: tuple[Pair, ...]
    tensors: str = ""  # sha256 of the alignment: several runs may share one


@dataclass(frozen=True)
class Story:
    """One run folder. `run` is the prefix of its rows; "" where they have none."""

    run: str
    rewrites: tuple[dict[str, Any], ...] = ()
    search: Search | None = None
    curves: tuple[Curve, ...] = ()
    alignment: Alignment | None = None
