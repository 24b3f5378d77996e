"""Against brute force: the weighted error that is minimised, written out."""

from __future__ import annotations

import pytest
import torch

from compressor.rewrites.low_rank import low_rank, share, weighted_mean


def _moment(width, seed, decay=1.0):
    x = torch.randn(400, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x * torch.logspace(0, -decay, width, dtype=torch.float64)
    return x.T @ x / len(x), x


def _matrix(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
@pytest.mark.parametrize("rank", [1, 4, 11])
def test_equals_whitened_svd(shape, rank):
    residual, (moment, _) = _matrix(*shape, seed=0), _moment(shape[0], 1)
    a, b = low_rank(residual, moment, rank)
    # SVD-LLM's way: whiten with a Cholesky factor, truncate, undo
    root = torch.linalg.cholesky(moment).T
    u, s, v = torch.linalg.svd(root @ residual, full_matrices=False)
    best = torch.linalg.solve(root, u[:, :rank] * s[:rank] @ v[:rank])
    error = [torch.trace((residual - x).T @ moment @ (residual - x)).item() for x in (a @ b, best)]
    assert error[0] == pytest.approx(error[1], rel=1e-3)
    assert torch.allclose(a.norm(dim=0), b.norm(dim=1))
    plain = low_rank(residual, None, rank)
    u, s, v = torch.linalg.svd(residual, full_matrices=False)
    assert torch.allclose(plain[0] @ plain[1], u[:, :rank] * s[:rank] @ v[:rank], atol=1e-8)


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
def test_full_rank_is_exact_even_where_the_data_say_nothing(shape):
    residual = _matrix(*shape, seed=2)
    unseen = torch.zeros(shape[0], shape[0], dtype=torch.float64)
    unseen[0, 0] = 1
    a, b = low_rank(residual, unseen, min(shape))
    assert (a @ b - residual).abs().max() < 1e-9


def test_directions_without_residual_are_zero():
    residual = _matrix(20, 2, seed=3) @ _matrix(2, 9, seed=4)
    a, b = low_rank(residual, _moment(20, 5)[0], 6)
    assert (a @ b - residual).abs().max() < 1e-6
    assert ((a.norm(dim=0) == 0) == (b.norm(dim=1) == 0)).all() and (a.norm(dim=0) == 0).sum() == 4
    zero = low_rank(torch.zeros(20, 9, dtype=torch.float64), _moment(20, 5)[0], 3)
    assert not zero[0].any() and not zero[1].any() and not zero[0].isnan().any()


def test_weighted_mean_minimises_the_summed_error():
    weights = [_matrix(8, 5, seed=seed) for seed in range(3)]
    inputs = [_moment(8, seed + 10) for seed in range(3)]
    base = weighted_mean(weights, [moment for moment, _ in inputs])
    stacked = torch.cat([x for _, x in inputs])
    target = torch.cat([x @ w for (_, x), w in zip(inputs, weights, strict=True)])
    assert torch.allclose(base, torch.linalg.lstsq(stacked, target).solution, atol=1e-4)


def test_unseen_directions_keep_the_plain_mean():
    weights = [_matrix(6, 4, seed=seed) for seed in (20, 21)]
    seen = torch.diag(torch.tensor([1.0, 1, 1, 0, 0, 0], dtype=torch.float64))
    base = weighted_mean(weights, [seen, 3 * seen])
    assert torch.allclose(base[3:], (weights[0] + weights[1])[3:] / 2)
    assert torch.allclose(base[:3], (weights[0] + 3 * weights[1])[:3] / 4, atol=1e-4)


def test_joint_base_beats_the_others():
    weights = [_matrix(10, 14, seed=seed) for seed in range(3)]
    moments = [_moment(10, seed + 30)[0] for seed in range(3)]

    def error(base, whiten):
        shared, deltas = share(weights, moments, 3, base, 1, whiten)
        residuals = [w - shared - a @ b for w, (a, b) in zip(weights, deltas, strict=True)]
        return sum(torch.trace(r.T @ m @ r).item() for r, m in zip(residuals, moments, strict=True))

    assert error("lsq", True) < error("mean", True) < error("mean", False)
    assert error("mean", True) < error("anchor", True)
