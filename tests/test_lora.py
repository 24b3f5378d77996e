"""lora: adapters that begin as nothing, train, and merge exactly."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from toy import toy_alignment, toy_blocks, toy_gpt2
from transformers import GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from compressor import lora
from compressor.errors import UserError
from compressor.rewrites.compose import apply
from compressor.rewrites.soft_shared import SoftShared
from compressor.rewrites.tversky import Tversky


def plain() -> GPT2LMHeadModel:
    return toy_gpt2()


def shared() -> GPT2LMHeadModel:
    """Layers 1 to 3 share an FFN and have deltas of their own."""
    original = toy_gpt2()
    rewrite = SoftShared(n=3, start=1, rank=4, delta_init="svd").resolved(original.config)
    return apply([rewrite], original, toy_alignment(original))


def shared_biases() -> GPT2LMHeadModel:
    original = toy_gpt2()
    rewrite = SoftShared(n=3, start=1, rank=0, bias="shared").resolved(original.config)
    return apply([rewrite], original, toy_alignment(original))


def with_linear() -> GPT2LMHeadModel:
    """One of the linears is a torch Linear, whose weight lies the other way round."""
    model = toy_gpt2()
    conv = model.transformer.h[2].mlp.c_fc
    linear = nn.Linear(32, 128)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.T)
        linear.bias.copy_(conv.bias)
    model.transformer.h[2].mlp.c_fc = linear
    return model


MAKERS = [plain, shared, shared_biases, with_linear]


def logits(model: GPT2LMHeadModel) -> torch.Tensor:
    with torch.no_grad():
        return model(toy_blocks(model.config, rows=3).ids).logits


def structure(model: GPT2LMHeadModel) -> list[tuple[str, type]]:
    return [(name, type(module)) for name, module in model.named_modules()]


def wake(parameters: list[nn.Parameter]) -> None:
    """As if they had been trained."""
    with torch.no_grad():
        for index, parameter in enumerate(parameters):
            generator = torch.Generator().manual_seed(index)
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("make", MAKERS)
def test_attaching_changes_no_logit(make):
    model = make()
    before = logits(model)
    lora.attach(model)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("make", MAKERS)
def test_merging_keeps_the_logits_the_modules_and_the_keys(make):
    model = make()
    before, modules, keys = logits(model), structure(model), list(model.state_dict())
    wake(lora.attach(model, rank=3, alpha=5.0))
    adapted = logits(model)
    assert (adapted - before).abs().max() > 0.1, "the adapters do nothing"
    lora.merge(model)
    assert (logits(model) - adapted).abs().max() < 1e-5 * adapted.abs().max()
    assert structure(model) == modules
    assert list(model.state_dict()) == keys


def test_the_merged_weight_is_w_plus_scale_a_b():
    model = with_linear()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wake(lora.attach(model, rank=2, alpha=6.0))
    adapter = model.transformer.h[4].mlp.c_proj
    transposed = model.transformer.h[2].mlp.c_fc
    products = [(a.low_rank_a.detach().numpy() @ a.low_rank_b.detach().numpy()) * 3 for a in (adapter, transposed)]
    lora.merge(model)
    after = model.state_dict()
    for key, change in (("h.4.mlp.c_proj", products[0]), ("h.2.mlp.c_fc", products[1].T)):
        key = f"transformer.{key}.weight"
        torch.testing.assert_close(after[key], before[key] + torch.from_numpy(change), rtol=0, atol=1e-6)
    untouched = [key for key in before if "ln_" in key or key.endswith("bias") or "wte" in key or "wpe" in key]
    assert all(torch.equal(after[key], before[key]) for key in untouched)


def test_what_must_stay_0_is_0_in_training_as_in_the_merge():
    model = plain()
    weight = model.transformer.h[1].mlp.c_fc.weight
    zero = weight.detach().abs() < 0.08
    with torch.no_grad():
        weight.masked_fill_(zero, 0)
    before, plain_logits = weight.detach().clone(), logits(model)
    parameters = lora.attach(model, rank=3, alpha=5.0, zeros=[(weight, zero)])
    torch.testing.assert_close(logits(model), plain_logits, rtol=0, atol=1e-5)
    wake(parameters)
    adapter = model.transformer.h[1].mlp.c_fc
    change = 5 / 3 * (adapter.low_rank_a @ adapter.low_rank_b).detach()
    adapted = logits(model)
    model(toy_blocks(model.config, rows=2).ids).logits.square().mean().backward()
    gradient = adapter.low_rank_b.grad
    x = torch.randn(9, 32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(adapter(x[None])[0], x @ (before + change.masked_fill(zero, 0)) + adapter.bias)
    torch.testing.assert_close(adapter.effective().detach(), before + change.masked_fill(zero, 0))
    lora.merge(model)
    merged = model.transformer.h[1].mlp.c_fc.weight
    assert torch.equal(merged == 0, zero)
    torch.testing.assert_close(merged.detach(), before + change.masked_fill(zero, 0))
    assert (logits(model) - adapted).abs().max() < 1e-5 * adapted.abs().max()
    assert gradient.abs().max() > 0


def test_every_linear_of_the_blocks_and_each_shared_one_once():
    def adapted(model):
        lora.attach(model)
        return {name for name, module in model.named_modules() if isinstance(module, lora.LowRankAdapter)}

    attention = {f"transformer.h.{layer}.attn.{linear}" for layer in range(6) for linear in ("c_attn", "c_proj")}
    own = {f"transformer.h.{layer}.mlp.{linear}" for layer in range(6) for linear in ("c_fc", "c_proj")}
    assert adapted(plain()) == attention | own
    left = {name for name in own if name.split(".")[2] in "045"}
    bank = {f"transformer.ffn_bank.0.{linear}" for linear in ("c_fc", "c_proj")}
    assert adapted(shared()) == attention | left | bank


def test_a_gradient_reaches_b_at_once_and_the_shared_adapter_hears_every_layer():
    model = shared()
    model.requires_grad_(False)
    parameters = lora.attach(model, rank=2)
    model(toy_blocks(model.config, rows=2).ids).logits.square().mean().backward()
    assert {id(p) for p in model.parameters() if p.grad is not None} == {id(p) for p in parameters}
    for adapter in lora.adapters(model):
        assert adapter.low_rank_b.grad.abs().max() > 0 and adapter.low_rank_a.abs().min() > 0


def test_what_was_not_trained_or_is_detached_leaves_every_bit():
    for leave in (lora.merge, lora.detach):
        model = plain()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        parameters = lora.attach(model)
        if leave is lora.detach:
            wake(parameters)
        leave(model)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert type(model.transformer.h[0].mlp.c_fc) is Conv1D and lora.adapters(model) == []


def test_the_same_generator_gives_the_same_start():
    first, second = plain(), plain()
    for model in (first, second):
        lora.attach(model, generator=torch.Generator().manual_seed(3))
    assert all(
        torch.equal(a.low_rank_a, b.low_rank_a)
        for a, b in zip(lora.adapters(first), lora.adapters(second), strict=True)
    )


def test_refusals():
    model = plain()
    with pytest.raises(UserError, match="rank is 0"):
        lora.attach(model, rank=0)
    lora.attach(model)
    with pytest.raises(UserError, match="adapters already"):
        lora.attach(model)
    tied = plain()
    tied.transformer.h[1].mlp.c_fc.weight = tied.transformer.h[0].mlp.c_fc.weight
    with pytest.raises(UserError, match="share one weight"):
        lora.attach(tied)


def test_a_model_without_linears_is_refused():
    original = toy_gpt2(n_layer=1)
    rewrite = Tversky(targets=["q", "k", "v", "attn_out", "c_fc", "mlp_out"])
    model = apply([rewrite], original, toy_alignment(original), calibration=toy_blocks(original.config, rows=2))
    with pytest.raises(UserError, match="no linear to put an adapter on; train=deltas or train=full"):
        lora.attach(model)
