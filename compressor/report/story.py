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
class Bank:
    """The features of some Tversky projections, as rewrites/tversky_diagnosis.py describes them."""

    key: str
    width: int
    features: int
    dead_features: int
    projections: int


@dataclass(frozen=True)
class Projection:
    """What became of a Tversky projection, as rewrites/tversky_diagnosis.py describes it."""

    layer: int | None
    target: str
    bank: str
    features_per_token: float
    dead_features: int
    prototypes: int
    empty_prototypes: int
    constant_prototypes: int
    dead_prototypes: int
    theta: float
    alpha: float
    beta: float
    linear: bool
    asymmetry: float | None


@dataclass(frozen=True)
class Diagnosis:
    """The Tversky projections of one model, on so many tokens of calibration text."""

    name: str  # rewritten | recovered
    tokens: int
    banks: tuple[Bank, ...]
    projections: tuple[Projection, ...]

    def features(self, projection: Projection) -> int:
        """How many features a projection has."""
        return next(bank.features for bank in self.banks if bank.key == projection.bank)


@dataclass(frozen=True)
class Met:
    """How clusters meet groups of tokens that look alike (embedding_clusters.Agreement)."""

    tokens: int
    purity: float
    chance: float
    nmi: float
    ami: float


@dataclass(frozen=True)
class Prefix:
    """The first coordinates of token embeddings, as rewrites/hierarchy_diagnosis.py describes them."""

    coordinates: int
    mean_cosine: float
    clusters: int
    largest: int
    clustered: int
    agreement: dict[str, Met | None]  # by scheme


@dataclass(frozen=True)
class CosineMap:
    """Cosines of some tokens, a square for each prefix; sets: [name, how many] in their order."""

    tokens: list
    sets: list
    cosines: list


@dataclass(frozen=True)
class Hierarchy:
    """The prefixes of one model's token embeddings, the longest first."""

    name: str  # rewritten | recovered
    vocabulary: int
    minimum_similarity: float
    minimum_group_size: int
    prefixes: tuple[Prefix, ...]
    map: CosineMap


@dataclass(frozen=True)
class Story:
    """One run folder. `run` is the prefix of its rows; "" where they have none."""

    run: str
    rewrites: tuple[dict[str, Any], ...] = ()
    search: Search | None = None
    curves: tuple[Curve, ...] = ()
    alignment: Alignment | None = None
    diagnoses: tuple[Diagnosis, ...] = ()  # of its models that have Tversky projections
    hierarchies: tuple[Hierarchy, ...] = ()  # of its models whose sizes read prefixes of the embeddings
