"""The saved model's structure: the traps of transformers 5 that the bank avoids."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from compressor import gpt2, modeling
from compressor.modeling import GPT2CompressedConfig, GPT2CompressedLMHeadModel, register

register()


def _config(**changes):
    fields = {
        "n_layer": 4,
        "n_embd": 16,
        "n_head": 2,
        "vocab_size": 61,
        "n_positions": 32,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "ffn_groups": [
            {"layers": [1, 2], "start": 1, "rank": 2, "bias": "per_layer"},
            {"layers": [0, 3], "start": 0, "rank": 0, "bias": "shared"},
        ],
    }
    return GPT2CompressedConfig(**{**fields, **changes})


def _model():
    torch.manual_seed(0)
    model = GPT2CompressedLMHeadModel(_config()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def shipped() -> set[str]:
    """The files that travel inside a checkpoint."""
    return {file.name for file in Path(modeling.__file__).parent.glob("*.py")} - {"__init__.py"}


IDS = torch.arange(24).reshape(2, 12)


def test_construction_corrupts_no_bias():
    """tie_weights pads and cuts the biases of tied Conv1Ds; the bank is not tied."""
    model = _model()
    for shared in model.transformer.ffn_bank:
        for linear, width in ((shared.c_fc, 64), (shared.c_proj, 16)):
            assert linear.bias is None or linear.bias.numel() == width
    assert model.transformer.h[1].mlp.c_fc.bias.numel() == 64
    assert model.transformer.h[1].mlp.c_proj.bias.numel() == 16


def test_fresh_deltas_are_lora_and_change_nothing():
    torch.manual_seed(0)
    model = GPT2CompressedLMHeadModel(_config()).eval()
    delta = model.transformer.h[1].mlp.c_fc
    assert delta.delta_a.abs().sum() > 0 and not delta.delta_b.any() and not delta.bias.any()


def test_forward_is_the_dense_formula():
    model = _model()
    mlp, shared = model.transformer.h[2].mlp, model.transformer.ffn_bank[0]
    x = torch.randn(3, 5, 16)
    weights = [
        getattr(shared, name).weight + getattr(mlp, name).delta_a @ getattr(mlp, name).delta_b
        for name in ("c_fc", "c_proj")
    ]
    expected = mlp.act(x @ weights[0] + mlp.c_fc.bias) @ weights[1] + mlp.c_proj.bias
    assert torch.allclose(mlp(x, model.transformer.ffn_bank), expected, atol=1e-6)


def test_replacing_the_bank_or_a_part_of_it_is_seen():
    model = _model()
    before = model(IDS).logits
    model.transformer.ffn_bank[0].c_fc = copy.deepcopy(model.transformer.ffn_bank[0].c_fc)
    assert torch.equal(model(IDS).logits, before)
    nn.init.zeros_(model.transformer.ffn_bank[0].c_fc.weight)
    after = model(IDS).logits
    assert not torch.equal(after, before)
    model.transformer.ffn_bank = nn.ModuleList(copy.deepcopy(list(model.transformer.ffn_bank)))
    assert torch.equal(model(IDS).logits, after)
    nn.init.ones_(model.transformer.ffn_bank[1].c_proj.weight)
    assert not torch.equal(model(IDS).logits, after)


def test_a_copy_uses_its_own_bank():
    model = _model()
    before, twin = model(IDS).logits, copy.deepcopy(model)
    with torch.no_grad():
        model.transformer.ffn_bank[0].c_fc.weight.zero_()
    assert torch.equal(twin(IDS).logits, before) and not torch.equal(model(IDS).logits, before)


def test_untied_embeddings_leave_the_sharing_alone(tmp_path):
    torch.manual_seed(0)
    model = GPT2CompressedLMHeadModel(_config(tie_word_embeddings=False)).eval()
    model.save_pretrained(tmp_path)
    again, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"] and torch.equal(again(IDS).logits, model(IDS).logits)


def test_a_fine_tuned_second_generation_still_ships_its_files(tmp_path):
    model = _model().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    model.eval().save_pretrained(tmp_path / "one")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    again.save_pretrained(tmp_path / "two")
    assert {file.name for file in (tmp_path / "two").glob("*.py")} == shipped()
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    assert torch.equal(final(IDS).logits, model(IDS).logits)


def test_training_under_autocast():
    model = _model().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(model(IDS).logits).all()


@torch.no_grad()
def test_blocks_one_by_one_take_both_streams():
    """Of a batch of any size; what wpe adds is no part of xt."""
    entry = {"stage": "kron", "layers": [1, 2], "value_norm": True, "bias": True}
    model = GPT2CompressedLMHeadModel(_config(token_factored=entry)).eval()
    for rows in (1, 2, 3):
        ids = torch.arange(12 * rows).reshape(rows, 12)
        hidden = gpt2.embed(model, ids)
        assert torch.equal(hidden[1], model.transformer.wte(ids)) and not torch.equal(hidden[0], hidden[1])
        final = gpt2.final_norm(model, gpt2.run_blocks(model, hidden, 0, 4))
        assert (gpt2.logits(model, final) - model(ids).logits).abs().max() <= 1e-6
