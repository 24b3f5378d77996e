"""Clusters of embeddings: planted ones are found, and how well they meet groups is the textbook's."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.cluster import DBSCAN

from compressor.embedding_clusters import NEIGHBOURS, agreement, directions, emergent_groups


def planted(shift: float = 0.0, spread: float = 0.1, each: int = 6):
    """Some tokens around each of 5 directions of 32, 20 anywhere, all moved by one vector."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(5, 32, generator=generator)
    own = (centres[:, None] + spread * torch.randn(5, each, 32, generator=generator)).flatten(0, 1)
    lengths = 0.5 + torch.rand(5 * each, 1, generator=generator)
    x = torch.cat([own * lengths, torch.randn(20, 32, generator=generator)])
    order = torch.randperm(5 * each + 20, generator=generator)
    label = torch.cat([torch.arange(5).repeat_interleave(each), torch.full((20,), -1)])
    return (x + shift * torch.randn(32, generator=generator))[order], label[order]


@pytest.mark.parametrize("shift", [0.0, 20.0])
def test_planted_clusters_are_found(shift):
    x, label = planted(shift)
    found = emergent_groups(x, minimum_similarity=0.8, minimum_group_size=3)
    assert torch.equal(found < 0, label < 0)
    for group in range(5):
        assert len(set(found[label == group].tolist())) == 1
    assert set(found.tolist()) == {-1, 0, 1, 2, 3, 4}
    assert torch.equal(found, emergent_groups(x, minimum_similarity=0.8, minimum_group_size=3))


def test_many_tokens_around_one_direction_may_be_parted_but_never_mixed():
    x, label = planted(20.0, each=40)
    found = emergent_groups(x, minimum_similarity=0.8, minimum_group_size=3)
    assert (found[label >= 0] >= 0).float().mean() > 0.9 and (found[label < 0] < 0).all()
    assert all(len(set(label[found == group].tolist())) == 1 for group in found.unique() if group >= 0)


def test_without_the_mean_taken_off_all_tokens_are_one_cluster():
    x, _ = planted(20.0)
    raw = x / x.norm(dim=1, keepdim=True)
    assert set(DBSCAN(eps=0.2, min_samples=3, metric="cosine").fit_predict(raw.numpy())) == {0}


def test_pairs_by_brute_force():
    """Which tokens hang together, from all cosines, a list of neighbours each, and a walk."""
    x, _ = planted(1.0, spread=0.6, each=12)
    for similarity, least in ((0.2, 2), (0.5, 3), (0.5, 6)):
        centred = (x - x.mean(0)).double()
        cosines = torch.nn.functional.cosine_similarity(centred[:, None], centred[None], dim=-1)
        cosines.fill_diagonal_(-2)
        near = [set(row.topk(NEIGHBOURS).indices.tolist()) for row in cosines]
        left, components = set(range(len(x))), []
        while left:
            todo, component = [left.pop()], set()
            while todo:
                token = todo.pop()
                component.add(token)
                for other in near[token]:
                    if other in left and token in near[other] and cosines[token, other] >= similarity:
                        left.discard(other)
                        todo.append(other)
            components.append(frozenset(component))
        found = emergent_groups(x, minimum_similarity=similarity, minimum_group_size=least)
        by_group = {frozenset((found == group).nonzero()[:, 0].tolist()) for group in found.unique() if group >= 0}
        assert by_group == {component for component in components if len(component) >= least} and len(by_group) > 1


def test_a_token_without_direction_is_harmless():
    x = torch.zeros(6, 4)
    assert (directions(x) == 0).all()
    x[:3], x[3:] = torch.tensor([1.0, 0, 0, 0]), torch.tensor([-1.0, 0, 0, 0])
    assert emergent_groups(x, minimum_similarity=0.9, minimum_group_size=3).tolist() == [0, 0, 0, 1, 1, 1]


def test_agreement_by_hand():
    clusters = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, -1, 2])
    groups = torch.tensor([0, 0, 0, 1, 1, 1, 1, 0, 0, -1])
    found = agreement(clusters, groups)
    assert (found.tokens, found.purity, found.chance) == (8, 0.75, 0.5)
    mutual = sum(p * math.log(p / 0.25) for p in (3 / 8, 1 / 8, 1 / 8, 3 / 8))
    assert found.nmi == pytest.approx(mutual / math.log(2))
    assert 0 < found.ami < found.nmi
    same = agreement(groups + 3, groups)
    assert same.purity == 1 and same.nmi == pytest.approx(1)
    generator = torch.Generator().manual_seed(0)
    large = agreement(*(torch.randint(0, 50, (4000,), generator=generator) for _ in "ab"))
    assert large.nmi > 0.05 and abs(large.ami) < 0.02  # what chance alone gives
    assert agreement(clusters, torch.full((10,), -1)) is None
