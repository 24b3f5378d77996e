"""A projection in place of a whole FFN: its features against planted neurons, its prototypes against numpy's ridge."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from toy import toy_alignment, toy_blocks, toy_gpt2

from compressor.alignment import align_weights, identity, permute_layer
from compressor.errors import UserError
from compressor.rewrites.base import FitContext
from compressor.rewrites.compose import apply
from compressor.rewrites.tversky import Tversky
from compressor.rewrites.tversky_block import RIDGE, neuron_directions

D, FF, LAYERS = 16, 64, 4


@pytest.fixture(scope="module")
def original():
    return toy_gpt2(n_layer=LAYERS, n_embd=D, n_head=2)


@pytest.fixture(scope="module")
def alignment(original):
    return toy_alignment(original)


@pytest.fixture(scope="module")
def text(original):
    return toy_blocks(original.config)


def _block(original, alignment, text, **fields):
    fields = {"targets": ["mlp_block"], "antipodal": False, "init": "lsq", "bank_size": 100, **fields}
    return apply([Tversky(**fields)], original, alignment, calibration=text)


def _pairs(original, text):
    """x, y float64[tokens, d] of every FFN."""
    found, mask = [], text.mask.flatten()

    def keep(_, given, output):
        found.append(tuple(part.detach().flatten(0, 1)[mask].double().numpy() for part in (given[0], output)))

    hooks = [block.mlp.register_forward_hook(keep) for block in original.transformer.h]
    with torch.no_grad():
        original(text.ids)
    for hook in hooks:
        hook.remove()
    return found


def _outputs(model, layer, x):
    with torch.no_grad():
        x = torch.from_numpy(x).float()
        return model.transformer.h[layer].mlp(x, model.transformer.feature_bank).double().numpy()


def _bank(model):
    return model.transformer.feature_bank[f"features_{D}"].weight.detach().double().numpy()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prototypes", ["features", "explicit"])
def test_prototypes_are_the_ridge_regression_of_the_outputs(original, alignment, text, prototypes, bias):
    fixed = {"learn_scalars": False, "theta": 2.0, "alpha": 2.0, "beta": 0.0}  # as when the prototypes are fitted
    model = _block(original, alignment, text, prototypes=prototypes, bias=bias, **fixed)
    bank = _bank(model)
    for layer, (x, y) in enumerate(_pairs(original, text)):
        hidden = np.maximum(x @ bank.T, 0)
        regressors = hidden @ bank if prototypes == "explicit" else hidden
        design, wanted = (regressors - regressors.mean(0), y - y.mean(0)) if bias else (regressors, y)
        moment = design.T @ design / len(x)
        moment += RIDGE * np.diag(moment).mean() * np.eye(len(moment))
        weight = np.linalg.solve(moment, design.T @ wanted / len(x))
        expected = regressors @ weight + (y.mean(0) - regressors.mean(0) @ weight if bias else 0.0)
        found = _outputs(model, layer, x)
        assert np.abs(found - expected).max() <= 1e-3 * np.abs(expected).max()


@pytest.mark.parametrize("prototypes", ["features", "explicit"])
def test_it_beats_a_random_start_and_the_mean(original, alignment, text, prototypes):
    fitted = _block(original, alignment, text, prototypes=prototypes)
    random = _block(original, alignment, text, prototypes=prototypes, init="random")
    for layer, (x, y) in enumerate(_pairs(original, text)):
        error, at_random = (np.square(_outputs(model, layer, x) - y).mean() for model in (fitted, random))
        assert error < (0.5 if prototypes == "features" else 0.95) * np.square(y - y.mean(0)).mean()
        assert error < at_random


def test_a_ridge_of_lsq_with_other_words_fits_the_scalars(original, alignment, text):
    """Of the paper's reductions: prototypes as above, then theta, alpha, beta."""
    model = _block(original, alignment, text, difference="ignorematch")
    for layer, (x, y) in enumerate(_pairs(original, text)):
        assert np.square(_outputs(model, layer, x) - y).mean() < np.square(y - y.mean(0)).mean()


def _context(model, alignment):
    return FitContext(model, alignment, None, torch.Generator(), {layer: layer for layer in range(LAYERS)})


def test_directions_of_neurons_that_are_copies(original):
    """All layers have the same neurons, in orders of their own: one run over all gives these back."""
    model = copy.deepcopy(original)
    with torch.no_grad():
        for layer in range(1, LAYERS):
            for name in ("c_fc", "c_proj"):
                source, target = (getattr(model.transformer.h[i].mlp, name) for i in (0, layer))
                target.weight.copy_(source.weight)
                if name == "c_fc":
                    target.bias.copy_(source.bias)
            order = torch.randperm(FF, generator=torch.Generator().manual_seed(layer))
            permute_layer(model, layer, order)
    context = _context(model, align_weights(model))
    wanted = model.transformer.h[0].mlp.c_fc.weight.T.double()
    assert torch.allclose(neuron_directions(context, range(LAYERS), FF), wanted, atol=1e-6)
    much = wanted.norm(dim=1) * model.transformer.h[0].mlp.c_proj.weight.double().norm(dim=1)
    best = much.topk(10).indices.sort().values
    assert torch.allclose(neuron_directions(context, range(LAYERS), 10), wanted[best], atol=1e-6)
    unaligned = neuron_directions(_context(model, identity(model.config)), range(LAYERS), FF)
    assert (unaligned - wanted).abs().max() > 0.1


def test_as_many_neurons_as_there_are(original):
    context = _context(original, identity(original.config))
    every = neuron_directions(context, [2, 0], 2 * FF)
    expected = [original.transformer.h[layer].mlp.c_fc.weight.T.double() for layer in (0, 2)]
    assert torch.allclose(every, torch.cat(expected))
    assert neuron_directions(context, range(LAYERS), 3 * FF).shape == (3 * FF, D)
    with pytest.raises(UserError, match=f"a bank of {2 * FF + 1} features for 2 FFNs of {FF} neurons"):
        neuron_directions(context, [0, 2], 2 * FF + 1)


@pytest.mark.parametrize("fields", [{"init": "random"}, {"init": "lsq", "form": "ratio", "non_negative": True}])
@pytest.mark.parametrize("share_scalars", [False, True])
def test_scalars_that_are_not_fitted_are_those_given(original, alignment, text, fields, share_scalars):
    rewrite = Tversky(
        targets=["mlp_block"], antipodal=False, alpha=0.7, beta=0.3, gamma=1.5, share_scalars=share_scalars, **fields
    )
    model = apply([rewrite], original, alignment, calibration=text)
    (bank,) = model.transformer.feature_bank.values()
    for block in model.transformer.h:
        strengths = block.mlp.block.strengths(bank)
        assert [round(float(value.detach()), 5) for value in strengths] == [1.5, 0.7, 0.3]
