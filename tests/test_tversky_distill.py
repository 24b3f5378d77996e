"""Layer-wise distillation: every projection comes nearer to its linear, and nothing else moves."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from toy import toy_alignment, toy_blocks, toy_gpt2

from compressor.errors import UserError
from compressor.modeling.tversky_layers import projection_at
from compressor.rewrites.base import FitContext
from compressor.rewrites.compose import apply
from compressor.rewrites.tversky import Tversky
from compressor.rewrites.tversky_distill import distill
from compressor.rewrites.tversky_fit import Fit


@pytest.fixture(scope="module")
def original():
    return toy_gpt2(n_layer=3, n_embd=16, n_head=2)


@pytest.fixture(scope="module")
def alignment(original):
    return toy_alignment(original)


@pytest.fixture(scope="module")
def text(original):
    return toy_blocks(original.config, rows=10)


CASES = [
    {"targets": ["q", "c_fc"], "difference": "ignorematch", "init": "lsq"},
    {
        "targets": ["mlp_out"],
        "intersection": "min",
        "difference": "subtractmatch",
        "init": "lsq",
        "scale": True,
    },
    {"targets": ["attn_out"], "form": "ratio", "non_negative": True, "init": "lsq", "scale": True},
    {"targets": ["c_fc", "lm_head"], "bank_size": 0.5, "basis": "svd", "refit": False},
    {"targets": ["mlp_block"], "antipodal": False, "init": "lsq", "bank_size": 40},
]


@pytest.mark.parametrize("fields", CASES, ids=str)
def test_errors_fall_and_the_original_stays(original, alignment, text, fields):
    before = copy.deepcopy(original.state_dict())
    flags = [p.requires_grad for p in original.parameters()]

    def make(**more):
        return apply([Tversky(**fields, **more)], original, alignment, calibration=text)

    start, found = make(), make(distill_steps=15, distill_learning_rate=3e-3)
    assert all(torch.equal(before[key], value) for key, value in original.state_dict().items())
    assert [p.requires_grad for p in original.parameters()] == flags
    assert all(p.grad is None for model in (original, found) for p in model.parameters())
    assert all(p.requires_grad for p in found.parameters()) and not found.training and not original.training
    own = {id(p) for p in Tversky(**fields).trainable(found)}
    named = dict(start.named_parameters())
    for key, parameter in found.named_parameters():
        if id(parameter) not in own:
            assert torch.equal(parameter, named[key])
        elif not key.endswith("scalars.beta"):
            assert not torch.equal(parameter, named[key]), key
    _nearer(original, start, found, fields["targets"], text)


def _pairs(original, modules, text):
    seen = []
    hooks = [
        module.register_forward_hook(lambda _, x, y: seen.append((x[0].detach(), y.detach()))) for module in modules
    ]
    with torch.no_grad():
        original(text.ids)
    for hook in hooks:
        hook.remove()
    return seen


def _nearer(original, start, found, targets, text):
    """The outputs of the projections for what the linears get."""
    modules = {
        "q": lambda block: block.attn.c_attn,
        "c_fc": lambda block: block.mlp.c_fc,
        "mlp_out": lambda block: block.mlp.c_proj,
        "attn_out": lambda block: block.attn.c_proj,
        "mlp_block": lambda block: block.mlp,
    }
    for target in set(targets) - {"lm_head"}:
        seen = _pairs(original, [modules[target](block) for block in original.transformer.h], text)
        errors = []
        for model in (start, found):
            places, total = Tversky(targets=targets).places(model), 0.0
            for layer, (x, y) in enumerate(seen):
                bank = model.transformer.feature_bank[places[layer, target].key]
                with torch.no_grad():
                    output = projection_at(model, layer, target)(x, bank)
                total += float((output - y[..., : output.shape[-1]])[text.mask].square().mean() / y[text.mask].var())
            errors.append(total)
        assert errors[1] < errors[0], target


def _fit(original, alignment, text, rewrite):
    start = dataclasses.replace(rewrite, distill_steps=0)
    model = apply([start], original, alignment, calibration=text)
    layers = {layer: layer for layer in range(3)}
    return Fit(rewrite, model, FitContext(original, alignment, text, torch.Generator(), layers))


def test_losses_are_shares_of_the_variance(original, alignment, text):
    """1 is what predicting the mean costs; a start at random is above, a dot product over everything is 0."""
    at_random = Tversky(targets=["c_fc"], init="random", distill_steps=1)
    assert distill(_fit(original, alignment, text, at_random))[0] > 0.9
    exact = Tversky(targets=["c_fc", "v"], distill_steps=1)
    assert distill(_fit(original, alignment, text, exact))[0] < 1e-8


def test_frozen_parameters_are_frozen_again(original, alignment, text):
    fit = _fit(original, alignment, text, Tversky(targets=["c_fc"], init="random", distill_steps=3))
    for parameter in fit.model.parameters():
        parameter.requires_grad_(False)
    losses = distill(fit)
    assert len(losses) == 3 and not any(p.requires_grad for p in fit.model.parameters())


def test_a_step_that_is_too_large_is_said(original, alignment, text):
    rewrite = Tversky(targets=["c_fc"], init="random", distill_steps=6, distill_learning_rate=1e30)
    with pytest.raises(UserError, match=r"at step \d; give a smaller distill_learning_rate than 1e"):
        apply([rewrite], original, alignment, calibration=text)
