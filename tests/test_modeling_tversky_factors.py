"""Softmin: many features, wide ranges, tiles; against -log(e^-z + e^-u) as it is written, and autograd of that."""

from __future__ import annotations

import pytest
import torch

from compressor.modeling import tversky_factors
from compressor.modeling.tversky import TverskyProjection


def plain(z, u):
    both = (z > 0)[:, None] & (u > 0)
    soft = -torch.logaddexp(-z[:, None], -u)
    return torch.where(both, soft, 0).sum(-1)


def given(tokens, out, features, spread, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    z, u = (torch.randn(rows, features, generator=generator, dtype=torch.float64) for rows in (tokens, out))
    z, u = z * spread, u * spread
    z[0], u[:, 0] = 0, 0  # exactly lacking
    z[1, :3] = u[0, :3]  # exactly alike
    return z.to(dtype).requires_grad_(), u.to(dtype).requires_grad_()


@pytest.mark.parametrize("tile", [1, 20, 1 << 16])
@pytest.mark.parametrize("features", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("spread", [0.01, 1.0, 300.0])
def test_against_the_formula(monkeypatch, tile, features, spread):
    monkeypatch.setattr(tversky_factors, "_TILE", tile)
    z, u = given(7, 5, features, spread)
    flow = torch.randn(7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found, expected = tversky_factors.SoftMin.apply(z, u), plain(z, u)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10 * spread * features)
    for one, other in zip(
        torch.autograd.grad(found, (z, u), flow), torch.autograd.grad(expected, (z, u), flow), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype):
    z, u = given(9, 6, 300, 2.0, dtype)
    found = tversky_factors.SoftMin.apply(z, u)
    assert found.dtype == dtype
    expected = plain(z.double(), u.double())
    tolerance = 1e-6 if dtype == torch.float32 else 8e-3
    assert ((found.double() - expected).abs() <= tolerance * 300).all()
    grads = torch.autograd.grad(found.sum(), (z, u))
    assert all(grad.dtype == dtype and grad.isfinite().all() for grad in grads)


def test_a_ratio_goes_over_the_features_once(monkeypatch):
    calls = []
    apply = tversky_factors.SoftMin.apply
    monkeypatch.setattr(tversky_factors.SoftMin, "apply", lambda *given: calls.append(given) or apply(*given))
    settings = {"form": "ratio", "intersection": "softmin", "non_negative": True}
    projection = TverskyProjection(6, 4, 5, **settings)
    projection(torch.randn(3, 6))
    assert len(calls) == 1
