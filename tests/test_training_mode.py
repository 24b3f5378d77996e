"""What training switches on is switched off again."""

from __future__ import annotations

import pytest
import torch
from toy import toy_blocks, toy_gpt2
from transformers.activations import NewGELUActivation

from compressor.errors import UserError
from compressor.training_mode import attention_while_training, autocast_dtype, training

CPU = torch.device("cpu")


def test_everything_comes_back_even_when_training_fails():
    model = toy_gpt2(resid_pdrop=0.1)
    model.requires_grad_(True)
    model.transformer.wte.weight.requires_grad_(False)
    model.transformer.h[3].train()
    modes = [module.training for module in model.modules()]
    chosen = model.transformer.h[2].mlp.c_fc.weight
    with pytest.raises(KeyError), training(model, [chosen], attention="eager", dropout=True):
        assert [p for p in model.parameters() if p.requires_grad] == [chosen]
        assert model.training and model.config._attn_implementation == "eager"
        model(toy_blocks(model.config, rows=1).ids).logits.sum().backward()
        assert chosen.grad is not None
        raise KeyError
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == "sdpa"
    assert all(type(block.mlp.act) is NewGELUActivation for block in model.transformer.h)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["transformer.wte.weight"]
    assert chosen.grad is None


def test_the_fast_kernels_are_the_same_function():
    model = toy_gpt2()
    ids = toy_blocks(model.config, rows=3).ids
    with torch.no_grad():
        plain = model(ids).logits
        with training(model, [], attention="eager", dropout=False):
            fast = model(ids).logits
    assert not torch.equal(fast, plain), "nothing was switched on"
    assert (fast - plain).abs().max() < 1e-5 * plain.abs().max()


def test_no_dropout_unless_wanted():
    model = toy_gpt2(resid_pdrop=0.5)
    ids = toy_blocks(model.config, rows=1).ids
    for dropout in (False, True):
        with torch.no_grad(), training(model, [], attention="sdpa", dropout=dropout):
            assert torch.equal(model(ids).logits, model(ids).logits) is not dropout


def test_precision():
    assert autocast_dtype("none", CPU) is None
    assert autocast_dtype("bfloat16", CPU) == torch.bfloat16
    assert autocast_dtype("auto", torch.device("meta")) is None
    with pytest.raises(UserError, match="autocast is 'fp16'; allowed: auto, bfloat16, none"):
        autocast_dtype("fp16", CPU)


def test_bfloat16_only_where_the_machine_has_it(monkeypatch):
    for capabilities, expected in (
        ({"avx512_f": True, "avx512_bf16": False}, None),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found, raising=False)
        assert autocast_dtype("auto", CPU) == expected


def test_plain_attention_only_where_it_is_faster():
    model = toy_gpt2()
    assert attention_while_training(model, 256, torch.bfloat16) == "eager"
    assert attention_while_training(model, 1024, torch.bfloat16) == "sdpa"
    assert attention_while_training(model, 256, None) == "sdpa"
