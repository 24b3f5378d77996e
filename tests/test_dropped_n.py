"""dropped_n: which blocks go, and that the rest computes what it did without them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from toy import toy_blocks, toy_config, toy_gpt2
from transformers import GPT2LMHeadModel

from compressor import gpt2
from compressor.errors import UserError
from compressor.rewrites import from_record
from compressor.rewrites.compose import apply, check, choose, layer_map
from compressor.rewrites.dropped_n import DroppedN, block_influence


def _quiet(model, *layers):
    """The same with blocks that add next to nothing."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for layer in layers:
            block = model.transformer.h[layer]
            for parameter in (*block.attn.c_proj.parameters(), *block.mlp.c_proj.parameters()):
                parameter.mul_(1e-3)
    return model


def _by_hand(model, blocks):
    """1 - mean cosine of what goes in and out of each block in one forward pass with padding masked, in numpy."""
    seen = {}
    hooks = [
        block.register_forward_hook(
            lambda _, inputs, output, layer=layer: seen.update({layer: (inputs[0], output)}), always_call=True
        )
        for layer, block in enumerate(model.transformer.h)
    ]
    with torch.no_grad():
        model(blocks.ids, attention_mask=blocks.mask.long())
    for hook in hooks:
        hook.remove()
    result = []
    for layer in range(model.config.n_layer):
        before, after = (
            (part[0] if isinstance(part, tuple) else part)[blocks.mask].double().numpy() for part in seen[layer]
        )
        cosines = (before * after).sum(1) / np.linalg.norm(before, axis=1) / np.linalg.norm(after, axis=1)
        result.append(1 - cosines.mean())
    return result


def test_influence_is_that_of_a_plain_forward_pass(original):
    blocks = toy_blocks(original.config, rows=6)
    found = block_influence(original, blocks.batches(128))
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), _by_hand(original, blocks), atol=1e-6)
    assert found.max() - found.min() > 0.01, "nothing to tell apart"
    with torch.no_grad():  # and, but for the last block, whose output is given after ln_f, of transformers' own states
        states = original(blocks.ids, attention_mask=blocks.mask.long(), output_hidden_states=True).hidden_states
    for layer in range(original.config.n_layer - 1):
        alike = torch.cosine_similarity(states[layer][blocks.mask], states[layer + 1][blocks.mask], dim=1)
        assert found[layer] == pytest.approx(1 - alike.mean().item(), abs=1e-5)


def test_pads_and_batches_change_no_influence_and_dropout_plays_no_part(original):
    blocks = toy_blocks(original.config, rows=6)
    found = block_influence(original, blocks.batches(64))
    noisy = toy_gpt2(resid_pdrop=0.3, embd_pdrop=0.3).train()
    other = blocks.ids.masked_fill(~blocks.mask, 33)
    torch.testing.assert_close(block_influence(noisy, [(other, blocks.mask)]), found, rtol=0, atol=1e-6)
    assert noisy.training


@pytest.mark.parametrize("layers", [[0], [5], [1, 4], [0, 2, 3]])
def test_blocks_that_add_next_to_nothing_go_first(original, alignment, layers):
    model = _quiet(original, *layers)
    blocks = toy_blocks(model.config)
    (chosen,) = choose([DroppedN(n=len(layers) + 1).resolved(model.config)], model, alignment, calibration=blocks)
    assert chosen == DroppedN(n=len(layers) + 1, layers=layers)
    made = apply([chosen], model, alignment)
    with torch.no_grad():
        change = (made(blocks.ids).logits - model(blocks.ids).logits)[blocks.mask].abs().max()
        assert change < 0.05 * model(blocks.ids).logits.abs().max()
    kept = [layer for layer in range(6) if layer not in layers]
    assert layer_map([chosen], model.config) == {old: new for new, old in enumerate(kept)}


@pytest.mark.parametrize("scaled", [False, True])
def test_the_other_blocks_are_the_originals_own(alignment, scaled):
    """Also where GPT-2 divides a layer's attention scores by its number."""
    model = toy_gpt2(scale_attn_by_inverse_layer_idx=scaled)
    made = apply([DroppedN(layers=[1, 4]).resolved(model.config)], model, alignment)
    assert type(made) is GPT2LMHeadModel and made.config.n_layer == 4
    assert [block.attn.layer_idx for block in made.transformer.h] == [0, 1, 2, 3]
    ids = toy_blocks(model.config, rows=3).ids
    with torch.no_grad():
        hidden = gpt2.embed(model, ids)
        for layer in (0, 2, 3, 5):
            hidden = gpt2.run_blocks(model, hidden, layer, layer + 1)
        expected = model.lm_head(model.transformer.ln_f(hidden))
        torch.testing.assert_close(made(ids).logits, expected, rtol=0, atol=1e-4)
    own = {parameter.data_ptr() for parameter in model.parameters()}
    copied = [name for name, parameter in made.named_parameters() if parameter.data_ptr() not in own]
    assert not [name for name in copied if not (scaled and ".c_attn." in name)]


def test_blocks_that_another_rewrite_takes_stay(original, alignment):
    model, blocks = _quiet(original, 2, 3), toy_blocks(original.config)
    shared = from_record({"rewrite": "merged_n", "n": 2, "start": 2, "tie": True}).resolved(model.config)
    dropped = DroppedN(n=2).resolved(model.config)
    made = apply([shared, dropped], model, alignment, calibration=blocks)
    (layer,) = made.config.compression[1]["layers"]
    influence = block_influence(model, blocks.batches())
    assert layer == min((0, 1, 4, 5), key=lambda layer: influence[layer])
    assert made.config.ffn_groups[0]["layers"] == ([1, 2] if layer < 2 else [2, 3])
    assert dropped.supposed(model.config, shared.sites(model.config)).layers in ([1], [4])
    with pytest.raises(UserError, match="5 blocks are to go, the other rewrites leave 4"):
        apply([shared, DroppedN(n=6).resolved(model.config)], model, alignment, calibration=blocks)
    with pytest.raises(UserError, match=r"both take over h\.3"):
        check([shared, DroppedN(layers=[3])], model.config)


def test_n_and_layers():
    config = toy_config()
    assert DroppedN().resolved(config) == DroppedN(n=4, layers=None) and DroppedN().undecided
    assert DroppedN(layers=[4, 1]).resolved(config) == DroppedN(n=3, layers=[1, 4])
    assert DroppedN(n=3, layers=[4, 1]).resolved(config) == DroppedN(n=3, layers=[1, 4])
    assert not DroppedN(n=1).undecided and DroppedN(n=1).resolved(config).layers == []
    assert DroppedN(n=4).resolved(config).supposed(config, frozenset()).layers == [1, 2, 3]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"n": 0}, "n 0 is out of range for a model of 6 layers; allowed: 1 to 6"),
        ({"n": 7}, "n 7 is out of range"),
        ({"layers": [0, 1, 2, 3, 4, 5]}, "n 7 is out of range"),
        ({"layers": [6]}, r"layers is \[6\]; allowed: a list of different layers from 0 to 5"),
        ({"layers": [1, 1]}, "different layers"),
        ({"layers": ["first"]}, "different layers"),
        ({"layers": [True]}, "different layers"),
        ({"layers": [1, 2], "n": 4}, r"layers=\[1, 2\] with n=4, which is 3 blocks; give one"),
        ({"start": 3}, "unknown key of dropped_n 'start'"),
    ],
)
def test_mistakes(record, said):
    with pytest.raises(UserError, match=said) as error:
        from_record({"rewrite": "dropped_n", **record}).check(toy_config())
    assert "\n" not in str(error.value)


def test_layers_that_nobody_has_chosen(original, alignment):
    undecided = DroppedN(n=3).resolved(original.config)
    with pytest.raises(UserError, match="calibration text has yet to choose the layers"):
        undecided.removed(original.config)
    with pytest.raises(UserError, match="fitted on calibration text"):
        apply([undecided], original, alignment)


def test_a_model_that_is_not_finite(original):
    broken = copy.deepcopy(original)
    with torch.no_grad():
        broken.transformer.h[2].mlp.c_proj.bias.fill_(torch.inf)
    with pytest.raises(UserError, match="what leaves layer 2 is not finite"):
        block_influence(broken, toy_blocks(broken.config).batches())
