"""Capture, against the FFN computed by hand and against transformers' own forward pass."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import gelu
from transformers import GPT2Config, GPT2LMHeadModel

from compressor import gpt2
from compressor.capture import SITES, capture
from compressor.errors import UserError


@pytest.fixture
def model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=4, n_head=2, initializer_range=0.4)
    return GPT2LMHeadModel(config).eval()


def rows(count: int, context: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 50, (count, context), generator=torch.Generator().manual_seed(seed))
    return ids, torch.ones_like(ids, dtype=torch.bool)


def collect(model, batches, **options):
    seen: dict[tuple[int, str], list[torch.Tensor]] = {}
    order: list[tuple[int, str]] = []

    def consumer(layer, site, activations):
        order.append((layer, site))
        seen.setdefault((layer, site), []).append(activations.clone())

    tokens = capture(model, batches, consumer, **options)
    return tokens, order, {key: torch.cat(parts) for key, parts in seen.items()}


def hooks_of(model) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_sites_are_the_ffn_step_by_step(model):
    ids, mask = rows(3, 7)
    tokens, order, seen = collect(model, [(ids, mask)], sites=SITES[::-1])  # the order asked for does not matter
    assert tokens == 21
    assert order == [(layer, site) for layer in range(4) for site in SITES]
    with torch.no_grad():
        states = model.transformer(ids, output_hidden_states=True).hidden_states
    for layer in range(4):
        fc_weight, fc_bias, proj_weight, proj_bias = gpt2.ffn_weights(model, layer)
        given = {site: seen[layer, site] for site in SITES}
        assert given["pre"].shape == (21, 32)
        torch.testing.assert_close(given["pre"], given["input"] @ fc_weight + fc_bias)
        torch.testing.assert_close(given["post"], gelu(given["pre"], approximate="tanh"))
        torch.testing.assert_close(given["output"], given["post"] @ proj_weight + proj_bias)
        if layer < 3:  # the last hidden state is after ln_f
            ln_2 = model.transformer.h[layer].ln_2
            middle = states[layer + 1].flatten(0, 1) - given["output"]  # what ln_2 got: the block's residual stream
            torch.testing.assert_close(given["input"], ln_2(middle).detach(), rtol=1e-4, atol=1e-5)


def test_pads_have_no_influence(model):
    full_ids, full_mask = rows(2, 9)
    ids, mask = full_ids.clone(), full_mask.clone()
    ids[1, 5:], mask[1, 5:] = 0, False
    tokens, _, seen = collect(model, [(ids, mask)])
    assert tokens == 14
    _, _, alone = collect(model, [(full_ids[:1], full_mask[:1]), (full_ids[1:, :5], full_mask[1:, :5])])
    for key in seen:
        torch.testing.assert_close(seen[key], alone[key])
    ids[1, 5:] = 49
    _, _, other_pads = collect(model, [(ids, mask)])
    assert all(torch.equal(seen[key], other_pads[key]) for key in seen)


def test_rows_that_are_all_pads_are_left_out(model):
    ids, mask = rows(2, 4)
    tokens, order, _ = collect(model, [(ids, ~mask)])
    assert (tokens, order) == (0, [])


def test_only_the_layers_needed_are_run(model):
    ran = []
    for layer, block in enumerate(model.transformer.h):
        block.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
    model.transformer.ln_f.register_forward_hook(lambda *_: ran.append("ln_f"))
    model.lm_head.register_forward_hook(lambda *_: ran.append("head"))
    _, order, _ = collect(model, [rows(1, 4)], layers=[2, 1, 2])
    assert order == [(1, "pre"), (2, "pre")]
    assert ran == [0, 1, 2]


def test_modes_and_hooks_come_back(model):
    model.train()
    model.transformer.h[1].eval()
    before = [module.training for module in model.modules()]
    modes_inside: set[bool] = set()
    capture(model, [rows(1, 4)], lambda *_: modes_inside.update(module.training for module in model.modules()))
    assert modes_inside == {False}
    assert [module.training for module in model.modules()] == before
    assert hooks_of(model) == 0

    def broken(layer, site, activations):
        raise RuntimeError("consumer")

    with pytest.raises(RuntimeError, match="consumer"):
        capture(model, [rows(1, 4)], broken)
    assert [module.training for module in model.modules()] == before
    assert hooks_of(model) == 0
    assert torch.is_grad_enabled()


def test_activations_carry_no_graph_and_progress_counts_tokens(model):
    graphs: list[bool] = []
    steps: list[int] = []
    given = [rows(2, 4), rows(1, 5)]
    assert capture(model, given, lambda layer, site, x: graphs.append(x.requires_grad), progress=steps.append) == 13
    assert not any(graphs)
    assert steps == [8, 5]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_activations_name_the_layer(model, value):
    with torch.no_grad():
        model.transformer.h[2].mlp.c_fc.bias[3] = value
    with pytest.raises(UserError, match=r"layer 2 .*float16"):
        collect(model, [rows(1, 4)])
    assert hooks_of(model) == 0


def test_refusals(model):
    with pytest.raises(UserError, match=r"unknown site 'pree' \(did you mean 'pre'\?\).*allowed"):
        collect(model, [], sites=("pree",))
    for layers in ([4], [-1], []):
        with pytest.raises(UserError, match=r"layers 0\.\.3"):
            collect(model, [], layers=layers)
    with pytest.raises(UserError, match="17 tokens is longer than the model's 16"):
        collect(model, [rows(1, 17)])
    ids, mask = rows(1, 4)
    mask[0, 0] = False
    with pytest.raises(ValueError, match="end of a row"):
        collect(model, [(ids, mask)])
