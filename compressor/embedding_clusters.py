"""An emergent hierarchy: tokens in groups by the directions of their embeddings.

Source: evintunador/hierarchical_embeddings, which takes scikit-learn's DBSCAN on cosines. That has no setting that
fits: embeddings of GPT-2 share a direction, and without it chains of neighbours still join most of a vocabulary at a
similarity that leaves the rest alone (benchmarks/results/hierarchy_quality.md). So the mean is taken off, and only
tokens that are each among the nearest of the other are joined; many that are all alike may come in several groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

NEIGHBOURS = 5  # that a token has


def directions(embeddings: Tensor) -> np.ndarray:
    """float32[vocabulary, k]: of length 1, after the mean over tokens is taken off; 0 where nothing is left."""
    x = embeddings.detach().to("cpu", torch.float64)
    x = x - x.mean(0)
    return (x / x.norm(dim=1, keepdim=True).clamp_min(1e-12)).float().numpy()


def emergent_groups(embeddings: Tensor, *, minimum_similarity: float, minimum_group_size: int) -> Tensor:
    """int64[vocabulary]: the group of every token, -1 for a token in none.

    Tokens are joined where each is one of the `NEIGHBOURS` nearest of the other and their cosine, after the mean of
    embeddings float[vocabulary, k] is taken off, is minimum_similarity or more; groups are what hangs together. Pairs
    are looked at in chunks, never kept. The same embeddings give the same groups.
    """
    x = directions(embeddings)
    count = len(x)
    near = NearestNeighbors(n_neighbors=min(NEIGHBOURS, count - 1), algorithm="brute").fit(x)
    distances, others = near.kneighbors()  # without itself
    alike = (1 - distances**2 / 2 >= minimum_similarity).ravel()
    rows = np.repeat(np.arange(count), others.shape[1])[alike]
    links = csr_array((np.ones(len(rows), np.int8), (rows, others.ravel()[alike])), shape=(count, count))
    _, found = connected_components(links.multiply(links.T), directed=False)
    large = np.bincount(found)[found] >= minimum_group_size
    groups = np.full(count, -1, np.int64)
    groups[large] = np.unique(found[large], return_inverse=True)[1]
    return torch.from_numpy(groups)


@dataclass(frozen=True)
class Agreement:
    """How well clusters meet groups, over the tokens that are in one of both. purity: the share of tokens that are of
    their cluster's commonest group; chance: of the commonest group of all. nmi: normalised mutual information; ami:
    with what chance alone gives taken off."""

    tokens: int
    purity: float
    chance: float
    nmi: float
    ami: float


def agreement(clusters: Tensor, groups: Tensor) -> Agreement | None:
    """Of int64[vocabulary], -1 is none; None where no token is in both."""
    both = (clusters >= 0) & (groups >= 0)
    if not both.any():
        return None
    found, wanted = clusters[both].numpy(), groups[both].numpy()
    table = contingency_matrix(wanted, found)  # [groups, clusters]
    return Agreement(
        tokens=len(found),
        purity=float(table.max(0).sum() / len(found)),
        chance=float(table.sum(1).max() / len(found)),
        nmi=float(normalized_mutual_info_score(wanted, found)),
        ami=float(adjusted_mutual_info_score(wanted, found)),
    )
