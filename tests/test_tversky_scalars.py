"""theta, alpha, beta, scales and biases against one plain least squares in numpy over all calibration tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from toy import toy_alignment, toy_blocks, toy_gpt2

from compressor.rewrites import tversky_scalars
from compressor.rewrites.compose import apply
from compressor.rewrites.tversky import Tversky


@pytest.fixture(scope="module")
def original():
    return toy_gpt2(n_layer=3, n_embd=16, n_head=2)


@pytest.fixture(scope="module")
def alignment(original):
    return toy_alignment(original)


@pytest.fixture(scope="module")
def text(original):
    return toy_blocks(original.config, rows=10)


@pytest.fixture(scope="module")
def make(original, alignment, text):
    def build(**fields):
        rewrite = Tversky(init="lsq", **{"targets": ["c_fc"], "bank_size": 12, **fields})
        return apply([rewrite], original, alignment, calibration=text)

    return build


def _pairs(original, text, head=False):
    """x float64[tokens, 16], y float64[tokens, out] of every c_fc, or of the head."""
    found, mask = [], text.mask.flatten()
    modules = [original.lm_head] if head else [block.mlp.c_fc for block in original.transformer.h]

    def keep(_, given, output):
        found.append(tuple(part.detach().flatten(0, 1)[mask].double() for part in (given[0], output)))

    hooks = [module.register_forward_hook(keep) for module in modules]
    with torch.no_grad():
        original(text.ids)
    for hook in hooks:
        hook.remove()
    return found


def _columns(projection, bank, x, given=None):
    """theta's, alpha's and beta's column for each output, float64[3, tokens, out], feature by feature."""
    z = x @ bank.weight.detach().double().T
    u = (
        given.detach().double() @ bank.weight.detach().double().T
        if given is not None
        else projection.prototypes.detach().double()
    )
    if projection.antipodal:
        z, u = torch.cat([z, -z], 1), torch.cat([u, -u], 1)
    a, p = z.relu()[:, None], u.relu()
    both, mine, theirs = (a > 0) & (p > 0), (a > 0) & (p <= 0), (a <= 0) & (p > 0)
    common = {"product": a * p, "min": torch.minimum(a, p)}[projection.intersection] * both
    if projection.difference == "ignorematch":
        first, second = a * mine, p * theirs
    else:
        first, second = (a - p).relu(), (p - a).relu()
    return torch.stack([common.sum(-1), -first.sum(-1), -second.sum(-1)]).numpy()


def _least_squares(columns, y, bias, non_negative):
    """Pooled over outputs: each has its own constant, found by hand where there is a bias."""
    if bias:
        columns, y = columns - columns.mean(1, keepdims=True), y - y.mean(0)
    design, wanted = columns.reshape(3, -1).T, y.reshape(-1)
    return nnls(design, wanted)[0] if non_negative else np.linalg.lstsq(design, wanted, rcond=None)[0]


CASES = [
    {"difference": "ignorematch"},
    {"difference": "ignorematch", "antipodal": False},
    {"intersection": "min", "difference": "subtractmatch"},
    {"difference": "ignorematch", "bias": False},
    {"difference": "ignorematch", "scale": True},
    {"difference": "ignorematch", "scale": True, "bias": False},
    {"difference": "ignorematch", "non_negative": True},
    {"difference": "subtractmatch", "non_negative": True, "antipodal": False, "bias": False},
]


@pytest.mark.parametrize("fields", CASES, ids=str)
def test_contrasts(make, original, text, fields):
    model = make(**fields)
    bank, bias = model.transformer.feature_bank["features_16"], fields.get("bias", True)
    for block, (x, y) in zip(model.transformer.h, _pairs(original, text), strict=True):
        projection, y = block.mlp.c_fc, y.numpy()
        columns = _columns(projection, bank, x)
        expected = _least_squares(columns, y, bias, fields.get("non_negative", False))
        found = [value.item() for value in projection.scalars()]
        assert found == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-3)
        mixed = np.tensordot(expected, columns, 1)
        for j in (0, 7, 63):  # then scale and bias, output by output
            regressors = [mixed[:, j], np.ones(len(y))] if fields.get("scale") and bias else None
            if fields.get("scale"):
                regressors = regressors or [mixed[:, j]]
                solution = np.linalg.lstsq(np.stack(regressors, 1), y[:, j], rcond=None)[0]
                assert projection.scale[j].item() == pytest.approx(solution[0], rel=1e-3)
                shift = solution[-1]
            else:
                shift = (y[:, j] - mixed[:, j]).mean()
            if bias:
                assert projection.bias[j].item() == pytest.approx(shift, rel=1e-3, abs=1e-4)
    if fields.get("non_negative"):
        assert min(value.item() for block in model.transformer.h for value in block.mlp.c_fc.scalars()) >= 0


def test_shared_scalars_are_fitted_to_all_projections_at_once(make, original, text):
    """Each weighed by the variance of its linear's outputs."""
    model = make(difference="ignorematch", share_scalars=True)
    bank, designs, wanted = model.transformer.feature_bank["features_16"], [], []
    for block, (x, y) in zip(model.transformer.h, _pairs(original, text), strict=True):
        columns, y = _columns(block.mlp.c_fc, bank, x), y.numpy()
        weight = y.var(0).sum() ** -0.5
        designs.append((columns - columns.mean(1, keepdims=True)).reshape(3, -1).T * weight)
        wanted.append((y - y.mean(0)).reshape(-1) * weight)
    expected = np.linalg.lstsq(np.concatenate(designs), np.concatenate(wanted), rcond=None)[0]
    assert [value.item() for value in bank.scalars()] == pytest.approx(expected.tolist(), rel=1e-3)


def test_the_head(make, original, text):
    """It has no bias."""
    model = make(targets=["lm_head"], difference="ignorematch", bank_size=16)
    ((x, y),) = _pairs(original, text, head=True)
    columns = _columns(
        model.lm_head.projection, model.transformer.feature_bank["features_16"], x, original.transformer.wte.weight
    )
    expected = _least_squares(columns, y.numpy(), False, False)
    found = [value.item() for value in model.lm_head.projection.scalars()]
    assert found == pytest.approx(expected.tolist(), rel=1e-3)


@pytest.mark.parametrize("fields", [{"form": "ratio", "non_negative": True}, {"learn_scalars": False}], ids=str)
def test_where_scalars_stay_scale_and_bias_are_fitted(make, original, text, fields):
    model = make(scale=True, difference="ignorematch", **fields)
    bank = model.transformer.feature_bank["features_16"]
    for block, (x, y) in zip(model.transformer.h, _pairs(original, text), strict=True):
        projection, y = block.mlp.c_fc, y.numpy()
        assert [float(torch.as_tensor(v).detach()) for v in projection.scalars()] == pytest.approx(
            [1.0, 0.5, 0.5], rel=1e-5
        )
        common, first, second = _columns(projection, bank, x)
        if fields.get("form") == "ratio":
            bare = common / (common - 0.5 * first - 0.5 * second + 1.0)
        else:
            bare = common + 0.5 * first + 0.5 * second
        for j in (0, 7, 63):
            solution = np.linalg.lstsq(np.stack([bare[:, j], np.ones(len(y))], 1), y[:, j], rcond=None)[0]
            assert projection.scale[j].item() == pytest.approx(solution[0], rel=1e-3)
            assert projection.bias[j].item() == pytest.approx(solution[1], rel=1e-3, abs=1e-3)


def test_the_fit_explains_more_than_the_scalars_it_began_with(make, original, text):
    """Of the variance of the linear's outputs: most for products with ignorematch, and more with a scale per output."""

    def explained(model):
        bank, shares = model.transformer.feature_bank["features_16"], []
        for block, (x, y) in zip(model.transformer.h, _pairs(original, text), strict=True):
            with torch.no_grad():
                found = block.mlp.c_fc(x.float(), bank).double()
            shares.append(1 - float((found - y).square().mean() / y.var(0).mean()))
        return np.mean(shares)

    fields = {"difference": "ignorematch", "bank_size": 16}
    fitted, scaled = explained(make(**fields)), explained(make(**fields, scale=True))
    assert 0.6 < fitted < scaled < 1
    assert explained(make(**fields, learn_scalars=False)) < fitted


@pytest.mark.parametrize("fields", [{}, {"learn_scalars": False, "intersection": "mean"}])
def test_tokens_are_taken_a_few_at_a_time(make, monkeypatch, fields):
    fields = {"targets": ["lm_head"], "difference": "ignorematch", "scale": True, **fields}
    whole, taken, update = make(**fields), [], tversky_scalars._Sums.update
    monkeypatch.setattr(tversky_scalars, "_AT_ONCE", 3 * whole.config.vocab_size)
    monkeypatch.setattr(
        tversky_scalars._Sums, "update", lambda own, columns, y: taken.append(len(y)) or update(own, columns, y)
    )
    parts = make(**fields)
    assert max(taken) == 3
    for (key, one), other in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5), key
