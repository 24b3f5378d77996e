"""Features, prototypes and biases against closed forms in numpy, on inputs that hooks of this file's own record."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from toy import toy_alignment, toy_blocks, toy_gpt2

from compressor.rewrites.compose import apply
from compressor.rewrites.tversky import Tversky
from compressor.rewrites.tversky_fit import linear_strength

LAYER = 2
TARGETS = ["q", "k", "v", "attn_out", "c_fc", "mlp_out"]


@pytest.fixture(scope="module")
def original():
    """The LayerNorms differ by direction: some inputs vary a hundred times as much as others."""
    model = toy_gpt2(n_layer=4, n_embd=16, n_head=2)
    with torch.no_grad():
        for block in model.transformer.h:
            for norm in (block.ln_1, block.ln_2):
                norm.weight.mul_(torch.logspace(0.5, -1.5, 16))
    return model


@pytest.fixture(scope="module")
def alignment(original):
    return toy_alignment(original)


def _linear(model, target):
    block = model.transformer.h[LAYER]
    if target in ("q", "k", "v"):
        columns = slice(16 * "qkv".index(target), 16 * "qkv".index(target) + 16)
        return block.attn.c_attn, columns
    return {"attn_out": block.attn.c_proj, "c_fc": block.mlp.c_fc, "mlp_out": block.mlp.c_proj}[target], slice(None)


@pytest.fixture(scope="module")
def inputs(original):
    """target -> x float64[tokens, in] of the calibration text, without pads."""
    blocks, found = toy_blocks(original.config), {}
    mask = blocks.mask.flatten()
    for target in TARGETS:
        hook = _linear(original, target)[0].register_forward_pre_hook(
            lambda _, given, target=target: found.__setitem__(target, given[0].flatten(0, 1)[mask].double().numpy())
        )
        with torch.no_grad():
            original(blocks.ids)
        hook.remove()
    return found


@pytest.fixture(scope="module")
def make(original, alignment):
    def build(**fields):
        rewrite = Tversky(**fields)
        return rewrite, apply([rewrite], original, alignment, calibration=toy_blocks(original.config))

    return build


def _weights(original, target):
    linear, columns = _linear(original, target)
    return tuple(tensor.detach().double().numpy()[..., columns] for tensor in (linear.weight, linear.bias))


def _parts(rewrite, model, target):
    """The projection, its bank."""
    place = rewrite.places(model)[LAYER, target]
    attention, mlp = model.transformer.h[LAYER].attn, model.transformer.h[LAYER].mlp
    found = {"attn_out": "attn.c_proj", "c_fc": "mlp.c_fc", "mlp_out": "mlp.c_proj"}.get(
        target, f"attn.c_attn.{target}"
    )
    root, _, rest = found.partition(".")
    return {"attn": attention, "mlp": mlp}[root].get_submodule(rest), model.transformer.feature_bank[place.key]


def _error(rewrite, model, target, x, y):
    projection, bank = _parts(rewrite, model, target)
    with torch.no_grad():
        found = projection.double()(torch.from_numpy(x), bank.double()).numpy()
    return np.square(found - y).sum(1).mean()


def _regression_error(regressors, y):
    solution = np.linalg.lstsq(regressors, y, rcond=None)[0]
    return np.square(regressors @ solution - y).sum(1).mean()


@pytest.mark.parametrize("prototypes", ["features", "explicit"])
@pytest.mark.parametrize("basis", ["pca", "svd", "asvd"])
@pytest.mark.parametrize("target", TARGETS)
def test_prototypes_are_the_least_squares_optimum_for_their_features(make, original, inputs, target, basis, prototypes):
    fields = {"targets": TARGETS, "share": "none", "bank_size": 8, "basis": basis, "prototypes": prototypes}
    for bias in (True, False):
        rewrite, model = make(**fields, bias=bias)
        x, (weight, own) = inputs[target], _weights(original, target)
        y = x @ weight + own
        features = _parts(rewrite, model, target)[1].weight.detach().double().numpy()
        assert np.abs(features @ features.T - np.eye(len(features))).max() <= 1e-5
        seen = x @ features.T
        best = _regression_error(np.hstack([seen, np.ones((len(x), 1))]) if bias else seen, y)
        found = _error(rewrite, model, target, x, y)
        assert best * (1 - 1e-6) <= found <= best * 1.002
        without = make(**fields, bias=bias, refit=False)
        assert _error(*without, target, x, y) > found


@pytest.mark.parametrize("target", TARGETS)
def test_asvd_reaches_the_best_of_all_subspaces(make, original, inputs, target):
    """Which truncating the SVD of the whitened linear gives: the energy of what is left out."""
    x, (weight, own) = inputs[target], _weights(original, target)
    covariance = np.cov(x.T, bias=True)
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    spectrum = np.linalg.svd(root @ weight, compute_uv=False)
    for size in (4, 12):
        rewrite, model = make(targets=TARGETS, share="none", bank_size=size, basis="asvd")
        best = np.square(spectrum[size:]).sum()
        assert best * (1 - 1e-6) <= _error(rewrite, model, target, x, x @ weight + own) <= best * 1.03


def test_pca_features_are_principal_components(make, original, inputs):
    rewrite, model = make(targets=["c_fc"], share="none", bank_size=5, basis="pca")
    features = _parts(rewrite, model, "c_fc")[1].weight.detach().double().numpy()
    found = np.trace(features @ np.cov(inputs["c_fc"].T, bias=True) @ features.T)
    best = np.linalg.eigvalsh(np.cov(inputs["c_fc"].T, bias=True))[-5:].sum()
    assert found == pytest.approx(best, rel=1e-5)


def test_a_shared_bank_weighs_its_inputs_alike(make, original):
    """The sum of covariances, each over its trace: a loud layer does not own the bank."""
    blocks, seen = toy_blocks(original.config), []
    mask = blocks.mask.flatten()
    hooks = [
        block.mlp.c_fc.register_forward_pre_hook(
            lambda _, given: seen.append(given[0].detach().flatten(0, 1)[mask].double().numpy())
        )
        for block in original.transformer.h
    ]
    with torch.no_grad():
        original(blocks.ids)
    for hook in hooks:
        hook.remove()
    moments = [np.cov(x.T, bias=True) for x in seen]
    moment = sum(own / np.trace(own) for own in moments)
    _, model = make(targets=["c_fc"], bank_size=6, basis="pca")
    features = model.transformer.feature_bank["features_16"].weight.detach().double().numpy()
    assert np.trace(features @ moment @ features.T) == pytest.approx(np.linalg.eigvalsh(moment)[-6:].sum(), rel=1e-5)


@pytest.mark.parametrize("target", TARGETS)
def test_knowing_the_inputs_beats_the_svd_of_the_weights(make, original, inputs, target):
    x, (weight, own) = inputs[target], _weights(original, target)
    y = x @ weight + own

    def error(**fields):
        return _error(*make(targets=TARGETS, share="none", bank_size=8, **fields), target, x, y)

    plain = error(basis="svd", refit=False)
    left = np.linalg.svd(weight)[0][:, 8:]  # of the weights' own SVD, in numpy
    assert plain == pytest.approx(np.square(x @ left @ left.T @ weight).sum(1).mean(), rel=1e-3)
    assert error(basis="asvd") < plain and error(basis="asvd") <= error(basis="pca") * 1.001
    assert error(basis="pca") < plain or target == "mlp_out"  # of 64 directions it knows the strong, not the needed


def test_more_features_are_never_worse(make, original, inputs):
    x, (weight, own) = inputs["c_fc"], _weights(original, "c_fc")
    errors = [
        _error(*make(targets=["c_fc"], share="none", bank_size=size), "c_fc", x, x @ weight + own)
        for size in (2, 6, 10, 14, 16)
    ]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-8


def test_theta_scales_the_prototypes_not_the_output(make, original, inputs):
    rewrite, model = make(targets=["c_fc"], bank_size=0.5, theta=2.0, alpha=0.5, beta=1.5)
    other, plain = make(targets=["c_fc"], bank_size=0.5)
    x, (weight, own) = inputs["c_fc"], _weights(original, "c_fc")
    y = x @ weight + own
    assert _error(rewrite, model, "c_fc", x, y) == pytest.approx(_error(other, plain, "c_fc", x, y), rel=1e-5)
    projection, bank = _parts(rewrite, model, "c_fc")
    assert linear_strength(projection, bank) == 2.0
    with torch.no_grad():
        projection.scalars.beta += 0.1
    assert linear_strength(projection, bank) is None


def test_the_same_seed_gives_the_same_random_start(original, alignment):
    def prototypes(seed):
        rewrite = Tversky(targets=["c_fc"], init="random")
        model = apply([rewrite], original, alignment, seed=seed)
        projection, bank = _parts(rewrite, model, "c_fc")
        assert bank.weight.std().item() == pytest.approx(16**-0.5, rel=0.2) and not projection.bias.any()
        return projection.prototypes

    assert torch.equal(prototypes(1), prototypes(1)) and not torch.equal(prototypes(1), prototypes(2))


class _Shapes(TorchDispatchMode):
    """The shapes of all tensors that any operation makes."""

    def __init__(self):
        super().__init__()
        self.made = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.made.add(tuple(tensor.shape))
        return result


@pytest.mark.parametrize("target", ["c_fc", "lm_head"])
def test_no_tensor_of_outputs_x_outputs_is_made(target):
    original = toy_gpt2(n_layer=2, n_embd=16, n_head=2)
    out = {"c_fc": original.transformer.h[0].mlp.c_fc.nf, "lm_head": original.config.vocab_size}[target]
    text, alignment = toy_blocks(original.config, rows=4), toy_alignment(original)
    with _Shapes() as shapes:
        apply([Tversky(targets=[target], bank_size=6)], original, alignment, calibration=text)
    assert (16, out) in shapes.made and (out, out) not in shapes.made
