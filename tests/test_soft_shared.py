from __future__ import annotations

import pytest
import torch
from toy import toy_blocks, toy_gpt2

from compressor import gpt2, models
from compressor.alignment import align_activations, identity, permute_layer
from compressor.capture import capture
from compressor.errors import UserError
from compressor.metrics.size import parameters
from compressor.rewrites import from_record
from compressor.rewrites.compose import apply, structure
from compressor.rewrites.merged_n import MergedN
from compressor.rewrites.soft_shared import RIDGE, SoftShared


def _make(original, alignment, **record):
    rewrite = SoftShared(**record).resolved(original.config)
    return rewrite, apply([rewrite], original, alignment, calibration=toy_blocks(original.config))


def _difference(one, other, ids):
    with torch.no_grad():
        return (one(ids).logits - other(ids).logits).abs().max().item()


def _ids(model, rows=4):
    return torch.randint(
        0, model.config.vocab_size, (rows, model.config.n_positions), generator=torch.Generator().manual_seed(11)
    )


def plant(model, layers, *, difference, seed=3):
    """Make the FFNs of `layers` permuted copies of the first plus rank-2 differences; gives the permutations."""
    generator = torch.Generator().manual_seed(seed)
    source = [tensor.clone() for tensor in gpt2.ffn_weights(model, layers[0])]
    orders = {}
    with torch.no_grad():
        for layer in layers:
            weights = gpt2.ffn_weights(model, layer)
            for target, tensor in zip(weights, source, strict=True):
                target.copy_(tensor)
                if tensor.ndim == 2 and difference:
                    low = torch.randn(len(tensor), 2, generator=generator) @ torch.randn(
                        2, tensor.shape[1], generator=generator
                    )
                    target.add_(low * (difference * tensor.std() / low.std()))
            norm = gpt2.blocks(model)[layer].ln_2
            norm.weight.fill_(1.0)
            norm.bias.zero_()
            order = (
                torch.arange(len(source[1]))
                if layer == layers[0]
                else torch.randperm(len(source[1]), generator=generator)
            )
            permute_layer(model, layer, order)
            orders[layer] = order
    return orders


def test_planted_redundancy_is_found_and_removed():
    """FFNs 5 to 8 are permuted copies of one plus rank-2 differences of a sixth of the weights' deviation."""
    model = toy_gpt2(n_layer=10)
    orders = plant(model, [5, 6, 7, 8], difference=1 / 6)
    blocks = toy_blocks(model.config, rows=64)
    found = align_activations(model, blocks.batches())
    for layer in (6, 7, 8):  # neuron j of the layer is neuron order[j] of layer 5
        assert torch.equal(orders[layer][found.to_anchor(layer, 5)], torch.arange(gpt2.d_ff(model.config)))
    rewrite = SoftShared(n=4, start=5, rank=4, base="anchor").resolved(model.config)
    shared = apply([rewrite], model, found, calibration=blocks)
    assert _difference(shared, model, _ids(model)) <= 2e-3
    blind = apply([rewrite], model, identity(model.config), calibration=blocks)
    assert _difference(blind, model, _ids(model)) > 0.1
    assert parameters(shared) == parameters(model) - 3 * 2 * 32 * 128 + 4 * 2 * 4 * (32 + 128)


def test_exact_copies_merge_exactly_only_when_aligned():
    model = toy_gpt2(n_layer=10)
    plant(model, [5, 6, 7, 8], difference=0)
    blocks = toy_blocks(model.config, rows=64)
    rewrite = MergedN(n=4, start=5, tie=True).resolved(model.config)
    aligned = apply([rewrite], model, align_activations(model, blocks.batches()), calibration=blocks)
    assert _difference(aligned, model, _ids(model)) <= 1e-4
    blind = apply([rewrite], model, identity(model.config), calibration=blocks)
    assert _difference(blind, model, _ids(model)) > 0.1


def test_rank_zero_with_shared_bias_is_tied_merged(original, alignment):
    _, shared = _make(original, alignment, n=4, rank=0, bias="shared", delta_init="svd")
    merge = MergedN(n=4, tie=True).resolved(original.config)
    tied = apply([merge], original, alignment)
    assert _difference(shared, tied, _ids(original)) <= 1e-6
    assert parameters(shared) == parameters(tied)


@pytest.mark.parametrize("fold_ln", [False, True])
@pytest.mark.parametrize("base", ["mean", "lsq", "anchor"])
@pytest.mark.parametrize("delta_init", ["svd", "asvd"])
def test_full_rank_is_the_original(original, alignment, base, delta_init, fold_ln):
    _, model = _make(original, alignment, n=3, rank=32, base=base, delta_init=delta_init, fold_ln=fold_ln)
    assert _difference(model, original, _ids(original)) <= 1e-4


def test_error_falls_with_rank_and_with_knowledge(original, alignment):
    """Mean squared error of the logits: more rank is better, whitened beats plain, the joint base beats the mean."""
    ids = _ids(original, rows=16)

    def error(**record):
        _, model = _make(original, alignment, n=4, **record)
        with torch.no_grad():
            return (model(ids).logits - original(ids).logits).square().mean().item()

    ranks = [error(rank=rank) for rank in (0, 4, 8, 16, 32)]
    assert ranks == sorted(ranks, reverse=True) and ranks[-1] < 1e-6
    assert error(rank=8) < error(rank=8, delta_init="svd")
    assert error(rank=8, base="lsq") < error(rank=8)


@pytest.mark.parametrize("bias", ["per_layer", "shared"])
def test_lsq_refits_the_output_projections_to_the_true_outputs(original, alignment, bias):
    """By ordinary least squares on stacked rows: c_proj of each layer, given what the shared c_fc makes of its inputs,
    against the layer's true outputs; then one base for all of them."""
    rewrite, model = _make(original, alignment, n=3, start=1, rank=0, base="lsq", bias=bias)
    shared, seen = gpt2.bank(model)[0], {}
    capture(
        original,
        toy_blocks(original.config).batches(),
        lambda layer, site, x: seen.setdefault((layer, site), []).append(x.double()),
        sites=("input", "output"),
        layers=(1, 2, 3),
    )
    rows, targets, means = [], [], {}
    for layer in (1, 2, 3):
        x, y = torch.cat(seen[layer, "input"]), torch.cat(seen[layer, "output"])
        own = shared.c_fc if bias == "shared" else gpt2.ffn(model, layer).c_fc
        h = gpt2.ffn(original, layer).act(x @ shared.c_fc.weight.double() + own.bias.double())
        means[layer] = h.mean(0), y.mean(0)
        if bias == "per_layer":
            h, y = h - h.mean(0), y - y.mean(0)
        else:
            y = y - shared.c_proj.bias.double()
        near = gpt2.ffn_weights(original, layer)[2][alignment.to_anchor(layer, rewrite.anchor)].double()
        pull = (RIDGE * h.square().mean() * len(h)).sqrt()
        rows.append(h)
        fitted = torch.linalg.lstsq(torch.cat([h, pull * torch.eye(128)]), torch.cat([y, pull * near])).solution
        targets.append(h @ fitted)
    base = torch.linalg.lstsq(torch.cat(rows), torch.cat(targets)).solution
    assert (shared.c_proj.weight - base).abs().max() < 1e-3 * base.abs().max()
    if bias == "per_layer":
        for layer, (h, y) in means.items():
            assert (gpt2.ffn(model, layer).c_proj.bias - (y - h @ base)).abs().max() < 1e-3


def test_lora_start_is_the_base_alone_and_trains(original, alignment):
    rewrite, lora = _make(original, alignment, n=3, rank=4, delta_init="lora")
    _, bare = _make(original, alignment, n=3, rank=0, delta_init="lora")
    assert _difference(lora, bare, _ids(original)) <= 1e-6
    ids = _ids(original)
    lora.train()(ids, labels=ids).loss.backward()
    names = {key: p.grad.abs().sum().item() for key, p in lora.named_parameters() if "delta" in key}
    assert all((value > 0) == ("delta_b" in key) for key, value in names.items())  # B wakes first, then A
    assert len(rewrite.trainable(lora)) == 3 * 2 * 2


@pytest.mark.parametrize("record", [{"base": "anchor"}, {"base": "mean"}, {"base": "lsq"}, {"n": 1, "start": 2}])
def test_no_delta_is_dead(original, alignment, record):
    """A = B = 0 has no gradient for ever (the source's deltas): every direction has one of the two."""
    rewrite, model = _make(original, alignment, **{"n": 3, "rank": 6, **record})
    deltas = rewrite.trainable(model)
    for a, b in zip(deltas[::2], deltas[1::2], strict=True):
        assert ((a.norm(dim=0) > 0) | (b.norm(dim=1) > 0)).all()
    ids = _ids(original)
    model.train()(ids, labels=ids).loss.backward()
    assert all(a.grad.abs().sum() + b.grad.abs().sum() > 0 for a, b in zip(deltas[::2], deltas[1::2], strict=True))


def test_zero_init_is_refused():
    with pytest.raises(UserError, match=r"delta_init is 'zero'.*svd, asvd, lora"):
        from_record({"rewrite": "soft_shared", "delta_init": "zero"})


@pytest.mark.parametrize("rank", [-1, 33])
def test_rank_out_of_range(original, rank):
    with pytest.raises(UserError, match=rf"rank {rank} is out of range; allowed: 0 to 32"):
        SoftShared(rank=rank).check(original.config)


def test_penalty_is_the_relative_frobenius_norm(original, alignment):
    rewrite, model = _make(original, alignment, n=3, rank=5)
    expected = []
    for layer in rewrite.windows(original.config)[0].layers:
        for linear in gpt2.FFN_LINEARS:
            part = getattr(gpt2.ffn(model, layer), linear)
            base = getattr(gpt2.bank(model)[0], linear).weight
            expected.append(((part.delta_a @ part.delta_b).norm() / base.norm()).square())
    assert rewrite.penalty(model).item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)


def test_layer_norms_and_biases_stay_per_layer(original, alignment):
    rewrite, model = _make(original, alignment, n=4, rank=2, delta_init="svd")
    for layer in rewrite.windows(original.config)[0].layers:
        assert torch.equal(gpt2.ffn_norm(model, layer)[0], gpt2.ffn_norm(original, layer)[0])
        order = alignment.to_anchor(layer, rewrite.anchor)
        assert torch.equal(gpt2.ffn(model, layer).c_fc.bias, gpt2.ffn_weights(original, layer)[1][order])


def test_counts_on_gpt2_small():
    """The closed forms of the method's table, on the real shape."""
    from transformers import GPT2Config

    base = GPT2Config()
    counts = {
        **{
            ("soft_shared", 4, rank, "shared"): count
            for rank, count in ((8, 110_518_272), (16, 110_764_032), (32, 111_255_552), (64, 112_238_592))
        },
        ("soft_shared", 4, 8, "per_layer"): 110_529_792,
    }
    for (_, n, rank, bias), count in counts.items():
        config = structure([SoftShared(n=n, rank=rank, bias=bias, start=4)], base)
        assert parameters(models.build(config)) == count
    config = structure([SoftShared(n=4, rank=8, start=4)], base)
    model = models.build(config)
    deltas = SoftShared(n=4, rank=8, start=4).trainable(model)
    assert sum(p.numel() for p in deltas) == 245_760
