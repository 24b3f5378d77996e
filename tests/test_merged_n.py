from __future__ import annotations

import pytest
import torch
from toy import toy_alignment, toy_blocks, toy_gpt2
from transformers import GPT2Config, GPT2LMHeadModel

from compressor import gpt2, models
from compressor.errors import UserError
from compressor.metrics.size import parameters
from compressor.rewrites.compose import apply, structure
from compressor.rewrites.merged_n import MergedN


def _make(original, alignment, **record):
    rewrite = MergedN(**record).resolved(original.config)
    return rewrite, apply([rewrite], original, alignment, calibration=toy_blocks(original.config))


def _explicit_mean(original, alignment, layers, anchor):
    """Dense permutation matrices, as the formulas of the paper have it: P W."""
    sums = [0, 0, 0, 0]
    for layer in layers:
        order = alignment.to_anchor(layer, anchor)
        p = torch.eye(len(order), dtype=torch.float64)[order]
        fc, fc_bias, proj, proj_bias = (tensor.double() for tensor in gpt2.ffn_weights(original, layer))
        for index, value in enumerate((fc @ p.T, p @ fc_bias, p @ proj, proj_bias)):
            sums[index] = sums[index] + value / len(layers)
    return sums


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("anchor", ["first", "middle", "last", 2])
def test_every_member_is_the_mean_of_the_permuted_weights(original, alignment, anchor, tie):
    rewrite, model = _make(original, alignment, n=4, start=1, anchor=anchor, tie=tie)
    expected = _explicit_mean(original, alignment, [1, 2, 3, 4], rewrite.anchor)
    plain = rewrite.fold(model)
    members = [gpt2.ffn_weights(plain, layer) for layer in (1, 2, 3, 4)]
    for member in members:
        assert all(torch.equal(a, b) for a, b in zip(member, members[0], strict=True))
        for value, reference in zip(member, expected, strict=True):
            assert torch.allclose(value.double(), reference, atol=1e-6)
    for layer in (0, 5):
        for a, b in zip(gpt2.ffn_weights(plain, layer), gpt2.ffn_weights(original, layer), strict=True):
            assert torch.equal(a, b)


def test_tied_blocks_register_no_ffn(original, alignment):
    _, model = _make(original, alignment, n=3, start=1, tie=True)
    names = [name for name, _ in model.named_parameters()]
    assert not [name for name in names if any(f"h.{layer}.mlp" in name for layer in (1, 2, 3))]
    assert sorted(name for name in names if "ffn_bank" in name) == [
        f"transformer.ffn_bank.0.{linear}.{part}" for linear in ("c_fc", "c_proj") for part in ("bias", "weight")
    ]
    bank = gpt2.bank(model)[0]
    assert (bank.c_fc.bias.numel(), bank.c_proj.bias.numel()) == (128, 32)


def test_anchor_only_is_the_published_code(original, alignment):
    rewrite, model = _make(original, alignment, n=3, start=1, anchor_only=True)
    for layer in range(6):
        same = torch.equal(gpt2.ffn_weights(model, layer)[0], gpt2.ffn_weights(original, layer)[0])
        assert same == (layer != rewrite.anchor)
    with pytest.raises(UserError, match="tie=true with anchor_only=true"):
        MergedN(tie=True, anchor_only=True).check(original.config)


def test_untied_is_plain_gpt2_of_the_same_size(original, alignment):
    _, model = _make(original, alignment, n=4)
    assert type(model) is GPT2LMHeadModel and model.config.model_type == "gpt2"
    assert parameters(model) == parameters(original)


def test_tiles_cover_the_model_and_a_lone_last_layer_stays(original, alignment):
    rewrite, model = _make(original, alignment, n=5, scope="tile", tie=True)
    assert [list(window.layers) for window in rewrite.windows(original.config)] == [[0, 1, 2, 3, 4]]
    assert torch.equal(gpt2.ffn_weights(model, 5)[0], gpt2.ffn_weights(original, 5)[0])


@pytest.mark.parametrize("untied_head", [False, True])
def test_sharing_does_not_depend_on_the_embedding_tie(untied_head, tmp_path):
    """transformers drops every declared tie when tie_word_embeddings is false: a bank is no tie."""
    model = toy_gpt2(tie_word_embeddings=not untied_head)
    _, merged = _make(model, toy_alignment(model), n=3, tie=True)
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path)
    assert parameters(again) == parameters(merged) == parameters(model) - 2 * (2 * 32 * 128 + 160)
    ids = torch.arange(40)[None]
    assert torch.equal(again(ids).logits, merged(ids).logits)


@pytest.mark.parametrize(
    ("n", "count"), [(2, 119_717_376), (4, 110_272_512), (6, 100_827_648), (8, 91_382_784), (10, 81_937_920)]
)
def test_counts_on_gpt2_small(n, count):
    rewrite = MergedN(n=n, tie=True).resolved(GPT2Config())
    assert parameters(models.build(structure([rewrite], GPT2Config()))) == count
