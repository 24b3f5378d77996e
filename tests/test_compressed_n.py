from __future__ import annotations

import itertools

import pytest
import torch
from toy import toy_blocks, toy_gpt2
from transformers import GPT2Config, GPT2LMHeadModel

from compressor import gpt2, models
from compressor.alignment import identity
from compressor.errors import UserError
from compressor.metrics.size import parameters
from compressor.rewrites import compressed_n
from compressor.rewrites.compose import apply, structure
from compressor.rewrites.compressed_n import CompressedN


def _make(original, alignment, **record):
    rewrite = CompressedN(**record).resolved(original.config)
    return rewrite, apply([rewrite], original, alignment, calibration=toy_blocks(original.config))


def _block(model, layer):
    return {name: tensor.double() for name, tensor in gpt2.block_tensors(model, layer).items()}


def test_plain_gpt2_with_the_other_blocks_untouched(original, alignment):
    rewrite, model = _make(original, alignment, n=3, start=1, collapse="keep")
    assert type(model) is GPT2LMHeadModel and model.config.n_layer == 4
    assert [block.attn.layer_idx for block in gpt2.blocks(model)] == [0, 1, 2, 3]
    for new, old in enumerate([0, 2, 4, 5]):
        for name, tensor in _block(model, new).items():
            assert torch.equal(tensor, _block(original, old)[name])
    assert rewrite.anchor == 2


@pytest.mark.parametrize(("attention", "source"), [("anchor", 2), ("first", 1), ("last", 3)])
def test_mean_takes_the_aligned_average_and_one_attention(original, alignment, attention, source):
    _, model = _make(original, alignment, n=3, start=1, collapse="mean", attention=attention)
    block = _block(model, 1)
    order = {layer: alignment.to_anchor(layer, 2) for layer in (1, 2, 3)}
    fc = sum(_block(original, layer)["mlp.c_fc.weight"][:, order[layer]] for layer in (1, 2, 3)) / 3
    proj = sum(_block(original, layer)["mlp.c_proj.weight"][order[layer]] for layer in (1, 2, 3)) / 3
    assert torch.allclose(block["mlp.c_fc.weight"], fc, atol=1e-6)
    assert torch.allclose(block["mlp.c_proj.weight"], proj, atol=1e-6)
    for name, tensor in block.items():
        if not name.startswith("mlp."):
            assert torch.equal(tensor, _block(original, source)[name])
    _, total = _make(original, alignment, n=3, start=1, collapse="sum", attention=attention)
    assert torch.allclose(_block(total, 1)["mlp.c_proj.weight"], 3 * proj, atol=1e-6)
    assert torch.allclose(_block(total, 1)["mlp.c_fc.weight"], fc, atol=1e-6)
    assert torch.allclose(_block(total, 1)["attn.c_proj.weight"], 3 * _block(original, source)["attn.c_proj.weight"])


def test_laco_adds_every_difference_to_the_anchor(original):
    _, model = _make(original, identity(original.config), n=3, start=1, collapse="laco")
    for name, tensor in _block(model, 1).items():
        members = [_block(original, layer)[name] for layer in (1, 2, 3)]
        assert torch.allclose(tensor, members[1] + (members[0] - members[1]) + (members[2] - members[1]), atol=1e-6)


def test_fit_brings_the_block_to_the_windows_output(original, alignment):
    """On text that was not calibrated on, and far better than the other ways of making one block."""
    ids = torch.randint(0, 97, (24, 64), generator=torch.Generator().manual_seed(77))
    with torch.no_grad():
        entry = gpt2.run_blocks(original, gpt2.embed(original, ids), 0, 2)
        truth = gpt2.run_blocks(original, entry, 2, 5)
        errors = {}
        for collapse in ("mean", "keep", "sum", "laco", "fit"):
            rewrite = CompressedN(n=3, start=2, collapse=collapse).resolved(original.config)
            model = apply([rewrite], original, alignment, calibration=toy_blocks(original.config, rows=160))
            output = gpt2.run_blocks(model, entry, 2, 3)
            errors[collapse] = (output - truth).square().mean().item()
    assert errors["fit"] < 0.7 * min(value for name, value in errors.items() if name != "fit"), errors


def test_fit_is_the_weighted_ridge_regression(original, alignment, monkeypatch):
    """One round, by ordinary least squares on rows that carry the square roots of their weights."""
    monkeypatch.setattr(compressed_n, "ROUNDS", 1)
    _, kept = _make(original, alignment, n=3, start=2, collapse="keep")
    _, fitted = _make(original, alignment, n=3, start=2, collapse="fit")
    before, after = gpt2.blocks(kept)[2], gpt2.blocks(fitted)[2]
    blocks, seen = toy_blocks(original.config), {}
    for name, linear in (("a", before.attn.c_proj), ("h", before.mlp.c_proj)):
        linear.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs[0]}))
    with torch.no_grad():
        entry = gpt2.run_blocks(original, gpt2.embed(original, blocks.ids), 0, 2)
        truth = gpt2.run_blocks(original, entry, 2, 5)[blocks.mask].double()
        error = truth - gpt2.run_blocks(kept, entry, 2, 3)[blocks.mask].double()
    features = torch.cat([seen["a"][blocks.mask], seen["h"][blocks.mask]], 1).double()
    root = truth.var(1, keepdim=True).rsqrt()
    weighed = root * torch.cat([features, torch.ones_like(root)], 1)
    pull = (compressed_n.RIDGE * weighed[:, :-1].square().sum(0).mean()).sqrt() * torch.eye(161)[:-1]
    rows, targets = torch.cat([weighed, pull]), torch.cat([root * error, torch.zeros(160, 32)])
    change = torch.linalg.lstsq(rows, targets).solution
    for name, part in (("attn.c_proj.weight", change[:32]), ("mlp.c_proj.weight", change[32:-1])):
        moved = after.get_parameter(name) - before.get_parameter(name)
        assert (moved - part).abs().max() < 1e-4 * part.abs().max() + 1e-5, name
    assert torch.allclose((after.mlp.c_proj.bias - before.mlp.c_proj.bias).double(), change[-1], atol=1e-4)
    assert torch.equal(after.attn.c_attn.weight, before.attn.c_attn.weight)


def test_fit_ignores_pads(original, alignment):
    rewrite = CompressedN(n=3, start=2, collapse="fit").resolved(original.config)
    blocks = toy_blocks(original.config)
    model = apply([rewrite], original, alignment, calibration=blocks)
    noise = torch.randint(0, 97, blocks.ids.shape, generator=torch.Generator().manual_seed(3))
    other = type(blocks)(
        ids=torch.where(blocks.mask, blocks.ids, noise),
        mask=blocks.mask,
        source="toy",
        part="calibration",
        fingerprint="toy",
    )
    again = apply([rewrite], original, alignment, calibration=other)
    for name, tensor in model.state_dict().items():
        assert torch.allclose(tensor, again.state_dict()[name], atol=1e-6), name


@pytest.mark.parametrize("removed", [set(c) for size in (1, 2) for c in itertools.combinations(range(6), size)])
def test_any_removed_blocks_keep_the_cache_right(original, removed):
    """Removing a block = a window whose anchor stays; here every subset, made of windows of 2 kept at one end."""
    kept = [layer for layer in range(6) if layer not in removed]
    config = GPT2Config(**{**original.config.to_dict(), "n_layer": len(kept)})
    model = models.build(config)
    layers = {layer: index for index, layer in enumerate(kept)}
    tensors = {gpt2.moved(name, layers): tensor for name, tensor in original.state_dict().items()}
    tensors.pop(None, None)
    model.load_state_dict(tensors, assign=True)
    model.eval().tie_weights()
    ids = torch.randint(0, 97, (2, 18), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        full, cache, parts = model(ids).logits, None, []
        for chunk in ids.split([5, 1, 12], dim=1):
            step = model(chunk, past_key_values=cache, use_cache=True)
            cache, parts = step.past_key_values, [*parts, step.logits]
        assert (torch.cat(parts, 1) - full).abs().max() <= 1e-4
        hidden = gpt2.embed(original, ids)
        for layer in kept:
            hidden = gpt2.run_blocks(original, hidden, layer, layer + 1)
        assert (original.lm_head(gpt2.final_norm(original, hidden)) - full).abs().max() <= 1e-4


def test_attention_scaled_by_layer_survives_renumbering():
    """scale_attn_by_inverse_layer_idx: a block that moves from layer 4 to layer 2 still divides by 5."""
    model = toy_gpt2(scale_attn_by_inverse_layer_idx=True)
    rewrite = CompressedN(n=3, start=1, collapse="keep").resolved(model.config)
    compressed = apply([rewrite], model, identity(model.config), calibration=toy_blocks(model.config))
    ids = torch.arange(50)[None]
    with torch.no_grad():
        hidden = gpt2.embed(model, ids)
        for layer in (0, 2, 4, 5):
            hidden = gpt2.run_blocks(model, hidden, layer, layer + 1)
        expected = model.lm_head(gpt2.final_norm(model, hidden))
        assert (compressed(ids).logits - expected).abs().max() <= 1e-4


@pytest.mark.parametrize(
    "record",
    [
        {"collapse": "keep", "attention": "first"},
        {"collapse": "keep", "attention": "last"},
        {"collapse": "laco"},
        {"collapse": "laco", "anchor": "last"},
    ],
)
def test_attention_scaled_by_layer_is_collapsed_as_if_it_were_not(record):
    """The same function without the flag, each layer's queries divided by its number, gives the same result."""
    scaled = toy_gpt2(scale_attn_by_inverse_layer_idx=True)
    plain = toy_gpt2()
    with torch.no_grad():
        for layer, block in enumerate(gpt2.blocks(plain)):
            for parameter in block.attn.c_attn.parameters():
                parameter[..., :32] /= layer + 1
        ids, results = torch.arange(50)[None], []
        for model in (scaled, plain):
            rewrite = CompressedN(n=3, start=2, **record).resolved(model.config)
            results.append(apply([rewrite], model, identity(model.config))(ids).logits)
    assert (results[0] - results[1]).abs().max() <= 1e-3


def test_laco_refuses_another_attention(original):
    with pytest.raises(UserError, match="attention=first with collapse=laco"):
        CompressedN(collapse="laco", attention="first").check(original.config)


@pytest.mark.parametrize(
    ("record", "count"),
    [
        ({"n": 2}, 117_351_936),
        ({"n": 4}, 103_176_192),
        ({"n": 6}, 89_000_448),
        ({"n": 8}, 74_824_704),
        ({"n": 10}, 60_648_960),
        ({"n": 2, "scope": "tile"}, 81_912_576),
        ({"n": 4, "scope": "tile"}, 60_648_960),
        ({"n": 6, "scope": "tile"}, 53_561_088),
        ({"n": 8, "scope": "tile"}, 53_561_088),
        ({"n": 10, "scope": "tile"}, 53_561_088),
    ],
)
def test_counts_on_gpt2_small(record, count):
    rewrite = CompressedN(**record).resolved(GPT2Config())
    assert parameters(models.build(structure([rewrite], GPT2Config()))) == count
