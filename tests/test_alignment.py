"""Alignment, against planted permutations, brute force and numpy."""

from __future__ import annotations

import copy
import itertools
import json
import os
import threading
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn.functional import gelu
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from compressor import alignment, artifacts, gpt2
from compressor.alignment import (
    Alignment,
    Alignments,
    Quality,
    align_activations,
    align_weights,
    assign,
    identity,
    layer_pairs,
    permute_ffn,
    permute_layer,
)
from compressor.capture import capture
from compressor.correlation import CorrelationStream
from compressor.errors import UserError

WIDTH = 32
CONFIG = GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=5, n_head=2, initializer_range=0.4)
ORIGIN = artifacts.Provenance(
    version="0",
    commit=None,
    command="test",
    seed=3,
    base_model="tiny",
    base_hash="abc",
    data={"calibration": {"fingerprint": "f"}},
)


@pytest.fixture
def model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    result = GPT2LMHeadModel(CONFIG).eval()
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            if ".mlp." in name and name.endswith("bias"):  # zero in a new model
                parameter.normal_(std=0.3)
    return result


def rows(count: int = 12, context: int = 16, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 50, (count, context), generator=torch.Generator().manual_seed(seed))
    return ids, torch.ones_like(ids, dtype=torch.bool)


def batches(size: int = 4, **options) -> list[tuple[torch.Tensor, torch.Tensor]]:
    ids, mask = rows(**options)
    return list(zip(ids.split(size), mask.split(size), strict=True))


def shuffle(seed: int, width: int = WIDTH) -> torch.Tensor:
    return torch.randperm(width, generator=torch.Generator().manual_seed(seed))


def permuted_copies(model: GPT2LMHeadModel, *, same_input: bool) -> list[torch.Tensor]:
    """Make every FFN a permuted copy of layer 0's; returns for each layer the neuron of layer 0 that its neuron i is.

    With `same_input` every layer also gets the same input: nothing is added to the residual stream.
    """
    fc_weight, fc_bias, proj_weight, proj_bias = (tensor.clone() for tensor in gpt2.ffn_weights(model, 0))
    if same_input:
        proj_weight.zero_()
        proj_bias.zero_()
    origin = fc_weight, fc_bias, proj_weight, proj_bias
    orders = []
    with torch.no_grad():
        for layer, block in enumerate(model.transformer.h):
            order = shuffle(10 + layer)
            for tensor, value in zip(gpt2.ffn_weights(model, layer), permute_ffn(origin, order), strict=True):
                tensor.copy_(value)
            if same_input:
                for parameter in block.get_submodule("attn.c_proj").parameters():
                    parameter.zero_()
            orders.append(order)
    return orders


def assert_recovered(alignments: Alignments, orders: list[torch.Tensor]) -> None:
    """Every layer, brought into the order of any anchor, has the anchor's neurons in place."""
    for layer, anchor in itertools.product(range(CONFIG.n_layer), repeat=2):
        assert torch.equal(orders[layer][alignments.to_anchor(layer, anchor)], orders[anchor]), (layer, anchor)


# ---------------------------------------------------------------- planted permutations


@pytest.mark.parametrize("site", ["pre", "post"])
@pytest.mark.parametrize("options", [{}, {"pairs": "direct", "n": 4, "anchor": "last"}], ids=["chain", "direct"])
def test_activations_recover_permuted_copies(model, site, options):
    orders = permuted_copies(model, same_input=True)
    alignments = align_activations(model, batches(), site=site, **options)
    assert_recovered(alignments, orders)
    for item in alignments.solved:
        assert item.permutation.dtype == torch.int64
        assert item.correlation.dtype == torch.float32
        assert (item.correlation > 0.9999).all()
        assert item.quality.matched > 0.9999
        assert max(item.quality.identity, item.quality.random) < 0.5


@pytest.mark.parametrize("options", [{}, {"pairs": "direct", "n": 3}], ids=["chain", "direct"])
def test_weights_recover_permuted_copies(model, options):
    orders = permuted_copies(model, same_input=False)
    alignments = align_weights(model, **options)
    assert_recovered(alignments, orders)
    assert all((item.correlation > 0.9999).all() for item in alignments.solved)
    assert (alignments.method, alignments.site, alignments.tokens) == ("weight", None, 0)


def test_weights_minimise_the_distance(model):
    """On unrelated layers too, no exchange of two neurons brings the FFNs' weights closer."""
    item = align_weights(model).solved[1]

    def distance(permutation):
        moved = permute_ffn(gpt2.ffn_weights(model, 2), permutation)
        return sum((a - b).square().sum().item() for a, b in zip(gpt2.ffn_weights(model, 1), moved, strict=True))

    best = distance(item.permutation)
    for first, second in itertools.combinations(range(WIDTH), 2):
        other = item.permutation.clone()
        other[[first, second]] = item.permutation[[second, first]]
        assert distance(other) > best - 1e-5
    one, other = (
        torch.cat([fc.T, bias[:, None], proj], 1)
        for fc, bias, proj, _ in (gpt2.ffn_weights(model, 1), permute_ffn(gpt2.ffn_weights(model, 2), item.permutation))
    )
    torch.testing.assert_close(item.correlation, torch.cosine_similarity(one, other, dim=1))


# ---------------------------------------------------------------- against numpy and brute force


def stored(model, ids, layer, site):
    kept: list[torch.Tensor] = []
    handle = model.transformer.h[layer].mlp.c_fc.register_forward_hook(lambda *given: kept.append(given[2]))
    with torch.no_grad():
        model(ids)
    handle.remove()
    return (kept[0] if site == "pre" else gelu(kept[0], approximate="tanh")).flatten(0, 1).double().numpy()


@pytest.mark.parametrize("site", ["pre", "post"])
def test_equals_corrcoef_and_assignment_of_stored_activations(model, site):
    ids, _ = rows()
    alignments = align_activations(model, batches(), site=site, pairs="direct", n=3, anchor="first", seed=5)
    assert (alignments.tokens, alignments.site) == (ids.numel(), site)
    assert [(item.anchor, item.layer) for item in alignments.solved] == layer_pairs(5, "direct", n=3, anchor="first")
    for item in alignments.solved:
        first, second = stored(model, ids, item.anchor, site), stored(model, ids, item.layer, site)
        expected = np.corrcoef(first, second, rowvar=False)[:WIDTH, WIDTH:]
        _, columns = linear_sum_assignment(expected, maximize=True)
        assert item.permutation.tolist() == columns.tolist()
        np.testing.assert_allclose(item.correlation, expected[range(WIDTH), columns], atol=1e-6)
        assert asdict(item.quality) == pytest.approx(
            {
                "matched": expected[range(WIDTH), columns].mean(),
                "identity": np.diag(expected).mean(),
                "random": expected[range(WIDTH), shuffle(5)].mean(),
                "unmoved": np.mean(columns == np.arange(WIDTH)),
                "dead_anchor": 0,
                "dead_layer": 0,
            },
            abs=1e-6,
        )


def test_assignment_equals_brute_force():
    similarity = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    best = max(itertools.permutations(range(6)), key=lambda p: sum(similarity[i, j].item() for i, j in enumerate(p)))
    assert assign(similarity).tolist() == list(best)
    assert assign(similarity).dtype == torch.int64


def test_batches_pads_and_processes_make_no_difference(model):
    whole = align_activations(model, batches(12))
    ids, mask = rows()
    padded = torch.cat([ids[:, :9], torch.full((12, 4), 7)], 1), torch.cat([mask[:, :9], ~mask[:, :4]], 1)
    cut = ids[:, :9], mask[:, :9]
    shares = in_two_processes(model, batches(4))
    for one, other in [
        (whole, align_activations(model, iter(batches(1)))),
        (whole, align_activations(model, batches(5)[::-1])),
        (whole, shares[0]),
        (whole, shares[1]),
        (align_activations(model, [cut]), align_activations(model, [padded])),
    ]:
        assert one.tokens == other.tokens
        for left, right in zip(one.solved, other.solved, strict=True):
            assert torch.equal(left.permutation, right.permutation)
            torch.testing.assert_close(left.correlation, right.correlation, rtol=0, atol=2e-6)


def in_two_processes(model, shares):
    """Alignment of the first batch and of the rest in a thread each, summed like by a process group."""
    given: list = [None, None]
    results: list = [None, None]
    barrier = threading.Barrier(2, timeout=20)

    def run(rank, own, share):
        def all_sum(tensor):
            given[rank] = tensor.clone()
            barrier.wait()
            total = given[0] + given[1]
            barrier.wait()
            return total

        results[rank] = align_activations(own, share, all_sum=all_sum)

    threads = [
        threading.Thread(target=run, args=(rank, copy.deepcopy(model), share))
        for rank, share in enumerate([shares[:1], shares[1:]])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("pairs_in_memory", [0, 1, 2, 3])
def test_memory_slabs_give_the_same_bits(model, pairs_in_memory):
    seen: list[int] = []
    budget = 16 * model.config.n_embd**2  # bytes a pair: its cross scatter and its share of the layers' own
    whole = align_activations(model, batches(), pairs="direct", n=3)
    slabs = align_activations(
        model, iter(batches()), pairs="direct", n=3, progress=seen.append, memory_budget=pairs_in_memory * budget
    )
    passes = -(-len(whole.solved) // max(1, pairs_in_memory))
    assert seen == [64, 64, 64] * passes
    for one, other in zip(whole.solved, slabs.solved, strict=True):
        assert (one.anchor, one.layer, one.quality) == (other.anchor, other.layer, other.quality)
        assert torch.equal(one.permutation, other.permutation)
        assert torch.equal(one.correlation, other.correlation)


def test_constant_neurons_are_matched_and_counted(model):
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[:, [3, 9]] = 0
        model.transformer.h[2].mlp.c_fc.weight[:, 4] = 0
    pair = align_activations(model, batches()).solved[1]
    assert (pair.quality.dead_anchor, pair.quality.dead_layer) == (2, 1)
    assert pair.permutation.sort().values.tolist() == list(range(WIDTH))
    assert pair.correlation[[3, 9]].tolist() == [0, 0]
    live = [neuron for neuron in range(WIDTH) if neuron not in (3, 9) and pair.permutation[neuron] != 4]
    assert pair.quality.matched == pytest.approx(pair.correlation[live].double().mean().item())


# ---------------------------------------------------------------- routes


def by_hand(permutations: dict[tuple[int, int], torch.Tensor], method: str = "activation") -> Alignments:
    solved = tuple(
        Alignment(*pair, permutation, torch.zeros(6), Quality(0, 0, 0, 0, 0, 0))
        for pair, permutation in permutations.items()
    )
    return Alignments(method, "pre", "chain", 10, 5, 6, solved)


def test_composition_equals_following_each_neuron():
    permutations = {(layer, layer + 1): shuffle(layer, 6) for layer in range(4)}
    alignments = by_hand(permutations)
    for anchor, layer in itertools.product(range(5), repeat=2):  # first, middle and last of any window among them
        expected = []
        for neuron in range(6):
            at = neuron
            for lower in range(anchor, layer):
                at = permutations[lower, lower + 1].tolist()[at]
            for lower in range(anchor - 1, layer - 1, -1):
                at = permutations[lower, lower + 1].tolist().index(at)
            expected.append(at)
        assert alignments.to_anchor(layer, anchor).tolist() == expected
        distance = abs(layer - anchor)
        assert alignments.route(layer, anchor) == (
            "identity" if distance == 0 else "direct" if distance == 1 else "chain"
        )


def test_direct_is_preferred_in_both_directions():
    permutations = {(layer, layer + 1): shuffle(layer, 6) for layer in range(4)} | {(1, 3): shuffle(99, 6)}
    alignments = by_hand(permutations)
    assert alignments.route(3, 1) == alignments.route(1, 3) == "direct"
    assert alignments.route(4, 1) == "chain"
    assert torch.equal(alignments.to_anchor(3, 1), permutations[1, 3])
    assert torch.equal(alignments.to_anchor(1, 3)[permutations[1, 3]], torch.arange(6))
    with pytest.raises(UserError, match="layer 5 is not in this alignment; allowed: 0 to 4"):
        alignments.to_anchor(5, 0)


def test_identity():
    alignments = identity(CONFIG)
    assert alignments.route(0, 4) == "identity"
    assert torch.equal(alignments.to_anchor(0, 4), torch.arange(WIDTH))


def test_layer_pairs():
    chain = [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert layer_pairs(5) == chain
    assert layer_pairs(5, "direct", n=4, anchor="first") == sorted([*chain, (0, 2), (0, 3), (1, 3), (1, 4)])
    assert layer_pairs(5, "direct", n=4, anchor="last") == sorted([*chain, (0, 3), (1, 3), (1, 4), (2, 4)])
    assert layer_pairs(5, "direct", n=4) == sorted([*chain, (1, 3), (2, 4)])
    assert layer_pairs(5, "direct", n=4, start=0) == sorted([*chain, (1, 3)])
    assert layer_pairs(5, "direct", n=3, anchor=0) == sorted([*chain, (0, 2)])
    assert layer_pairs(5, "direct", n=1) == chain
    assert layer_pairs(1) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": "all"}, "unknown pairs 'all'; allowed: chain, direct"),
        ({"pairs": "direct"}, "give --n"),
        ({"pairs": "direct", "n": 6}, "n 6 is out of range for a model of 5 layers"),
        ({"pairs": "direct", "n": 4, "start": 2}, "allowed: 0 to 1"),
        ({"pairs": "direct", "n": 4, "anchor": 5}, "allowed: 0 to 4"),
        ({"pairs": "direct", "n": 4, "start": 1, "anchor": 0}, "outside the window"),
        ({"pairs": "direct", "n": 4, "anchor": "midle"}, "did you mean 'middle'"),
        ({"site": "output"}, "unknown site 'output'; allowed: post, pre"),
    ],
)
def test_refusals(model, options, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        align_activations(model, batches(), **options)


def test_broken_weights_are_refused(model):
    with torch.no_grad():
        model.transformer.h[3].mlp.c_proj.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="layer 3 has NaN"):
        align_weights(model)


def test_too_little_data_is_refused(model):
    with pytest.raises(UserError, match="at least 2 tokens, got 1"):
        align_activations(model, batches(count=1, context=1))


# ---------------------------------------------------------------- a trained model


@pytest.mark.skipif("GPT2_COMPRESS_TEST_DATA" not in os.environ, reason="needs GPT2_COMPRESS_TEST_DATA")
def test_trained_model():
    """Activations of a trained model, with its heavy tails after GELU, and real text."""
    folder = Path(os.environ["GPT2_COMPRESS_TEST_DATA"])
    model = GPT2LMHeadModel.from_pretrained(folder / "reference" / "gpt2-reviews")
    tokenizer = AutoTokenizer.from_pretrained(folder / "reference" / "gpt2-reviews")
    text = (folder / "data" / "wikitext-2" / "validation.txt").read_text(encoding="utf-8")[:8000]
    ids = torch.tensor(tokenizer(text)["input_ids"][:1024]).view(2, 512)
    mask = torch.ones_like(ids, dtype=torch.bool)
    activations: dict[int, np.ndarray] = {}
    capture(
        model,
        [(ids, mask)],
        lambda layer, _, x: activations.update({layer: x.double().numpy()}),
        sites=("post",),
        layers=[5, 6],
    )
    stream = CorrelationStream([(5, 6)], 1024)
    capture(
        model,
        [(ids[:1], mask[:1]), (ids[1:], mask[1:])],
        lambda layer, _, x: stream.update(layer, x),
        sites=("post",),
        layers=[5, 6],
    )
    expected = np.corrcoef(activations[5], activations[6], rowvar=False)[:1024, 1024:]
    assert np.abs(stream.correlation(5, 6).numpy() - expected).max() < 1e-6
    for item in align_activations(model, [(ids, mask)]).solved:
        assert item.quality.matched > 2 * max(abs(item.quality.identity), abs(item.quality.random))


# ---------------------------------------------------------------- permuting an FFN


def test_permuting_ffns_keeps_the_function(model):
    ids, _ = rows()
    with torch.no_grad():
        before = model(ids).logits
        weight = model.transformer.h[2].mlp.c_fc.weight.clone()
        for layer in range(CONFIG.n_layer):
            permute_layer(model, layer, shuffle(layer))
        after = model(ids).logits
    assert (before - after).abs().max() <= 1e-5
    assert torch.equal(model.transformer.h[2].mlp.c_fc.weight, weight[:, shuffle(2)])


def test_permute_ffn_is_the_matrix_product(model):
    weights, permutation = gpt2.ffn_weights(model, 1), shuffle(1)
    fc_weight, fc_bias, proj_weight, proj_bias = permute_ffn(weights, permutation)
    matrix = torch.eye(WIDTH)[permutation]
    assert torch.equal(fc_weight, weights[0] @ matrix.T)
    assert torch.equal(fc_bias, matrix @ weights[1])
    assert torch.equal(proj_weight, matrix @ weights[2])
    assert torch.equal(proj_bias, weights[3])


# ---------------------------------------------------------------- disk


def test_save_and_load(model, tmp_path):
    by_activation = align_activations(model, batches(), pairs="direct", n=3)
    for alignments in (by_activation, align_weights(model), identity(CONFIG)):
        alignment.save(tmp_path, alignments, ORIGIN)
        loaded, origin = alignment.load(tmp_path)
        assert (origin["base_hash"], origin["data"]["calibration"]["fingerprint"]) == ("abc", "f")
        facts = ("method", "site", "pairs", "tokens", "n_layer", "d_ff")
        assert [getattr(loaded, name) for name in facts] == [getattr(alignments, name) for name in facts]
        assert len(loaded.solved) == len(alignments.solved)
        for one, other in zip(alignments.solved, loaded.solved, strict=True):
            assert (one.anchor, one.layer, one.quality) == (other.anchor, other.layer, other.quality)
            assert torch.equal(one.permutation, other.permutation)
            assert torch.equal(one.correlation, other.correlation)
        for layer, anchor in itertools.product(range(5), repeat=2):
            assert torch.equal(loaded.to_anchor(layer, anchor), alignments.to_anchor(layer, anchor))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alignment.json", "alignment.safetensors"]


def test_same_input_same_files(model, tmp_path):
    for name in ("one", "two"):
        alignment.save(tmp_path / name, align_activations(model, batches()), ORIGIN)
    for file in ("alignment.json", "alignment.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def break_files(folder, change_tensors=None, change_json=None):
    tensors, document = folder / "alignment.safetensors", folder / "alignment.json"
    content = json.loads(document.read_text())
    if change_tensors is not None:
        loaded = artifacts.read_tensors(tensors, "align")
        change_tensors(loaded)
        artifacts.write_tensors(tensors, loaded)
        content["tensors"] = artifacts.hash_files([tensors])
    if change_json is not None:
        change_json(content)
    document.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"change_tensors": lambda t: t["permutation.2_to_1"].fill_(0)}, "layer 2 to 1 is no permutation of 32"),
        ({"change_tensors": lambda t: t.update({"permutation.2_to_1": torch.arange(31)})}, "no permutation of 32"),
        ({"change_tensors": lambda t: t.update({"permutation.2_to_1": torch.arange(32.0)})}, "no permutation of 32"),
        ({"change_tensors": lambda t: t.pop("permutation.2_to_1")}, "damaged"),
        ({"change_json": lambda d: d["quality"].pop(1)}, r"lacks the adjacent layers \[\(1, 2\)\]"),
        ({"change_json": lambda d: d["quality"][1].pop("matched")}, "damaged"),
        ({"change_json": lambda d: d.pop("d_ff")}, "damaged"),
        ({"change_json": lambda d: d.update(quality=[1])}, "damaged"),
        ({"change_json": lambda d: d.update(tensors="0")}, "does not belong"),
        ({"change_json": lambda d: d.update(kind="windows")}, "expected"),
    ],
)
def test_damaged_files_are_refused_in_one_line(model, tmp_path, broken, message):
    alignment.save(tmp_path, align_weights(model), ORIGIN)
    break_files(tmp_path, **broken)
    with pytest.raises(UserError, match=message) as caught:
        alignment.load(tmp_path)
    assert "\n" not in str(caught.value)
    assert "gpt2-compress align" in str(caught.value)


def test_missing_files_name_the_command(tmp_path):
    with pytest.raises(UserError, match="`gpt2-compress align` makes it"):
        alignment.load(tmp_path)
