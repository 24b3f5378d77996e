from __future__ import annotations

import copy

import pytest
import torch
from toy import toy_alignment, toy_blocks, toy_gpt2

from compressor import gpt2
from compressor.errors import UserError
from compressor.rewrites import from_record
from compressor.rewrites.compose import apply, check, layer_map, structure


@pytest.fixture(scope="module")
def original():
    return toy_gpt2(n_layer=8)


def _all(original, *records):
    return [from_record(record).resolved(original.config) for record in records]


SOFT_LOW = {"rewrite": "soft_shared", "n": 2, "start": 0, "rank": 3, "base": "lsq"}
SOFT_HIGH = {"rewrite": "soft_shared", "n": 2, "start": 6, "rank": 2}
DEEP = {"rewrite": "compressed_n", "n": 3, "start": 2, "collapse": "fit"}


def test_starts_count_original_layers_in_any_order(original):
    alignment, blocks = toy_alignment(original), toy_blocks(original.config)
    ids = torch.arange(60)[None]
    results = []
    for records in ((SOFT_LOW, DEEP, SOFT_HIGH), (DEEP, SOFT_LOW, SOFT_HIGH)):
        model = apply(_all(original, *records), original, alignment, calibration=blocks)
        assert model.config.n_layer == 6
        assert [group["layers"] for group in model.config.ffn_groups] == [[0, 1], [4, 5]]
        assert [group["start"] for group in model.config.ffn_groups] == [0, 6]
        results.append(model(ids).logits)
    assert torch.equal(*results)
    # each window is what it is when it is alone
    alone = apply(_all(original, SOFT_HIGH), original, alignment, calibration=blocks)
    for old, new in ((6, 4), (7, 5)):
        for name, tensor in gpt2.block_tensors(alone, old).items():
            assert torch.equal(tensor, gpt2.block_tensors(model, new)[name]), name


def test_two_depth_changes(original):
    rewrites = _all(
        original,
        {"rewrite": "compressed_n", "n": 2, "start": 1, "collapse": "keep"},
        {"rewrite": "compressed_n", "n": 3, "start": 4, "collapse": "keep"},
    )
    model = apply(rewrites, original, toy_alignment(original), calibration=toy_blocks(original.config))
    assert layer_map(rewrites, original.config) == {0: 0, 1: 1, 3: 2, 5: 3, 7: 4}
    for old, new in layer_map(rewrites, original.config).items():
        assert torch.equal(gpt2.ffn_weights(model, new)[0], gpt2.ffn_weights(original, old)[0])


def test_layers_that_lie_on_both_sides_of_another_rewrite(original):
    """They are removed all at once: each rewrite counts the original's layers, whatever the others remove."""
    records = [
        {"rewrite": "compressed_n", "n": 2, "start": 3, "collapse": "keep"},
        {"rewrite": "dropped_n", "layers": [0, 5]},
        {**SOFT_HIGH, "delta_init": "svd"},
    ]
    rewrites = _all(original, *records)
    model = apply(rewrites, original, toy_alignment(original))
    assert layer_map(rewrites, original.config) == {1: 0, 2: 1, 3: 2, 6: 3, 7: 4} and model.config.n_layer == 5
    assert [group["layers"] for group in model.config.ffn_groups] == [[3, 4]]
    for old, new in layer_map(rewrites, original.config).items():
        for name, tensor in gpt2.block_tensors(original, old).items():
            assert old >= 6 or torch.equal(gpt2.block_tensors(model, new)[name], tensor), name


def test_each_penalty_and_training_list_is_its_own(original):
    rewrites = _all(original, SOFT_LOW, SOFT_HIGH, DEEP)
    model = apply(rewrites, original, toy_alignment(original), calibration=toy_blocks(original.config))
    low, high, deep = (rewrite.trainable(model) for rewrite in rewrites)
    assert (len(low), len(high), deep) == (8, 8, [])
    assert not {id(p) for p in low} & {id(p) for p in high}
    assert {p.shape[1] for p in low[::2]} == {3} and {p.shape[1] for p in high[::2]} == {2}


def test_overlapping_sites_are_refused(original):
    with pytest.raises(
        UserError, match=r"rewrites.0 \(soft_shared\) and rewrites.1 \(compressed_n\) both take over h.2"
    ):
        check(_all(original, {**SOFT_LOW, "start": 1}, DEEP), original.config)
    check(_all(original, SOFT_LOW, SOFT_HIGH, DEEP), original.config)


def test_a_compressed_model_is_refused(original):
    config = structure(_all(original, SOFT_LOW), original.config)
    with pytest.raises(UserError, match="export"):
        check(_all(original, SOFT_HIGH), config)


def test_nothing_untouched_is_copied(original):
    model = apply(_all(original, SOFT_LOW), original, toy_alignment(original), calibration=toy_blocks(original.config))
    own = {name: parameter.data_ptr() for name, parameter in original.named_parameters()}
    for name, parameter in model.named_parameters():
        if name in own and "h.0." not in name and "h.1." not in name:
            assert parameter.data_ptr() == own[name], name


def test_the_same_seed_gives_the_same_weights(original):
    alignment, blocks = toy_alignment(original), toy_blocks(original.config)
    lora = {**SOFT_HIGH, "delta_init": "lora"}
    one, same, other = (
        apply(_all(original, lora), original, alignment, calibration=blocks, seed=seed) for seed in (0, 0, 1)
    )
    states = [model.state_dict() for model in (one, same, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


@pytest.mark.parametrize("record", [DEEP, {**SOFT_LOW, "base": "lsq"}])
def test_dropout_plays_no_part_in_a_fit(original, record):
    """GPT-2 has dropout of 0.1, and a freshly built model is in training mode."""
    plain = apply(_all(original, record), original, toy_alignment(original), calibration=toy_blocks(original.config))
    noisy = toy_gpt2(n_layer=8, resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3).train()
    noisy.transformer.h[1].eval()
    made = apply(_all(noisy, record), noisy, toy_alignment(original), calibration=toy_blocks(original.config))
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, made.state_dict()[name]), name
    assert not any(module.training for module in made.modules())
    assert noisy.training and noisy.transformer.h[0].mlp.training and not noisy.transformer.h[1].training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("record", [{**DEEP, "n": 2}, {**SOFT_LOW, "fold_ln": True}, {**SOFT_HIGH, "base": "mean"}])
def test_a_half_precision_model_is_fitted_as_well(original, record, dtype):
    half = copy.deepcopy(original).to(dtype)
    alignment, blocks, ids = toy_alignment(original), toy_blocks(original.config), torch.arange(60)[None]
    full, made = (apply(_all(m, record), m, alignment, calibration=blocks) for m in (original, half))
    assert {parameter.dtype for parameter in made.parameters()} == {dtype}
    with torch.no_grad():
        change = (full(ids).logits - original(ids).logits).square().mean()
        assert (made(ids).logits.float() - full(ids).logits).square().mean() < (
            0.2 if dtype == torch.bfloat16 else 0.05
        ) * change


def test_ffns_narrower_than_the_model():
    narrow = toy_gpt2(n_inner=20)
    records = [
        {"rewrite": "soft_shared", "n": 2, "start": 0, "rank": 20, "base": "lsq"},
        {"rewrite": "merged_n", "n": 1, "start": 2, "average": "activation-weighted", "tie": True},
        {"rewrite": "compressed_n", "n": 1, "start": 3, "collapse": "laco"},
    ]
    model = apply(_all(narrow, *records), narrow, toy_alignment(narrow), calibration=toy_blocks(narrow.config))
    ids = torch.arange(60)[None]
    with torch.no_grad():
        assert (model(ids).logits - narrow(ids).logits).abs().max() <= 1e-4


def test_calibration_text_is_asked_for_only_where_it_is_needed(original):
    for record in (
        {"rewrite": "merged_n"},
        {"rewrite": "soft_shared", "delta_init": "svd"},
        {**DEEP, "collapse": "sum"},
        {"rewrite": "dropped_n", "layers": [3]},
        {"rewrite": "pruned", "sparsity": 0.5},
    ):
        apply(_all(original, record), original, toy_alignment(original))
    activation_weighted = {"rewrite": "merged_n", "average": "activation-weighted"}
    for record in (SOFT_LOW, DEEP, activation_weighted, {"rewrite": "dropped_n"}):
        with pytest.raises(UserError, match="fitted on calibration text"):
            apply(_all(original, record), original, toy_alignment(original))


def test_a_second_compression_keeps_the_record_of_the_first(original):
    first = apply(_all(original, DEEP), original, toy_alignment(original), calibration=toy_blocks(original.config))
    second = apply(_all(first, {**DEEP, "start": 0}), first, toy_alignment(first), calibration=toy_blocks(first.config))
    assert [record["start"] for record in second.config.compression] == [2, 0]
    assert second.config.n_layer == 4
