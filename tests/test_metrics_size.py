"""Sizes against the published counts of GPT-2 and against what PyTorch counts and writes itself."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

from compressor.errors import UserError
from compressor.metrics.size import (
    embedding_parameters,
    embedding_share,
    flops_per_token,
    measure,
    non_zero,
    parameters,
    predicted_bytes,
    weight_bytes,
)
from compressor.modeling import GPT2CompressedConfig, GPT2CompressedLMHeadModel
from compressor.models import OpenModel
from compressor.rewrites import from_record
from compressor.rewrites.compose import structure

TINY = {"vocab_size": 50, "n_positions": 32, "n_embd": 16, "n_layer": 4, "n_head": 2}


def on_meta(config: GPT2Config):
    with torch.device("meta"):
        compressed = isinstance(config, GPT2CompressedConfig)
        return GPT2CompressedLMHeadModel(config) if compressed else GPT2LMHeadModel(config)


def shared(n: int, rank: int, bias: str, **changes) -> GPT2CompressedConfig:
    return GPT2CompressedConfig(ffn_groups=[{"layers": list(range(n)), "rank": rank, "bias": bias}], **changes)


# ---------------------------------------------------------------- parameters


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({}, 124_439_808),
        ({"tie_word_embeddings": False}, 163_037_184),
        ({"n_layer": 6}, 81_912_576),
        ({"n_embd": 1024, "n_layer": 24, "n_head": 16}, 354_823_168),
        ({"n_embd": 1280, "n_layer": 36, "n_head": 20}, 774_030_080),
        ({"n_embd": 1600, "n_layer": 48, "n_head": 25}, 1_557_611_200),
        ({"n_layer": 9}, 103_176_192),  # compressed_n, n = 4
        ({"n_layer": 3}, 60_648_960),  # compressed_n, n = 10
    ],
)
def test_parameters_of_the_gpt2_family(changes, count):
    assert parameters(on_meta(GPT2Config(**changes))) == count


@pytest.mark.parametrize(
    ("n", "rank", "bias", "count"),
    [
        (2, 0, "shared", 119_717_376),
        (4, 0, "shared", 110_272_512),
        (10, 0, "shared", 81_937_920),
        (12, 0, "shared", 72_493_056),
        (4, 8, "shared", 110_518_272),
        (4, 64, "shared", 112_238_592),
        (4, 8, "per_layer", 110_529_792),
    ],
)
def test_parameters_of_shared_ffns(n, rank, bias, count):
    assert parameters(on_meta(shared(n, rank, bias))) == count


def test_embeddings_are_the_two_tables():
    model = on_meta(GPT2Config())
    assert embedding_parameters(model) == 39_383_808
    assert embedding_share(model) == pytest.approx(0.3165, abs=5e-5)
    assert embedding_parameters(on_meta(GPT2Config(tie_word_embeddings=False))) == 39_383_808


def test_a_module_in_two_places_counts_once_and_a_copy_counts_twice():
    model = GPT2LMHeadModel(GPT2Config(**TINY))
    whole, ffn = parameters(model), sum(weight.numel() for weight in model.transformer.h[0].mlp.parameters())
    model.transformer.h[1].mlp = model.transformer.h[0].mlp
    assert parameters(model) == whole - ffn
    for one, other in zip(
        model.transformer.h[2].mlp.parameters(), model.transformer.h[3].mlp.parameters(), strict=True
    ):
        other.data = one.data  # two Parameters, one memory
    assert parameters(model) == whole - 2 * ffn


def test_views_of_one_memory_count_for_no_more_than_it_holds():
    class Views(torch.nn.Module):
        def __init__(self):
            super().__init__()
            memory = torch.tensor([0.0, 1, 2, 3, 0, 5])
            self.matrix = torch.nn.Parameter(memory.view(2, 3))
            self.transposed = torch.nn.Parameter(memory.view(2, 3).T)
            flat = torch.tensor([1.0, 0, 3])
            self.first, self.rest = torch.nn.Parameter(flat[:1]), torch.nn.Parameter(flat[1:])

    assert parameters(Views()) == 6 + 3
    assert non_zero(Views()) == 4 + 2


def test_non_zero_sees_pruning_and_counts_ties_once():
    model = GPT2LMHeadModel(GPT2Config(**TINY))
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(1)
        assert non_zero(model) == parameters(model) == sum(weight.numel() for weight in model.parameters())
        model.transformer.wte.weight[:5] = 0
    assert non_zero(model) == parameters(model) - 5 * 16


# ---------------------------------------------------------------- bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_files_and_predicted(tmp_path: Path, dtype):
    for name, model in (
        ("plain", GPT2LMHeadModel(GPT2Config(**TINY))),
        ("shared", GPT2CompressedLMHeadModel(shared(3, 2, "per_layer", **TINY))),
    ):
        model.to(dtype).save_pretrained(tmp_path / name)
        written = (tmp_path / name / "model.safetensors").stat().st_size
        assert weight_bytes(tmp_path / name) == written
        assert 0 < written - predicted_bytes(parameters(model), dtype) < 10_000  # the header


def test_bytes_of_shards_are_summed(tmp_path: Path):
    model = GPT2LMHeadModel(GPT2Config(**TINY))
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    shards = list(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2 and weight_bytes(tmp_path) == sum(file.stat().st_size for file in shards)
    shards[0].unlink()
    with pytest.raises(UserError, match="missing"):
        weight_bytes(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="no weights"):
        weight_bytes(tmp_path)


# ---------------------------------------------------------------- FLOPs


def test_flops_of_gpt2_small():
    d = 768
    flops = flops_per_token(GPT2Config(), 1024)
    assert 12 * 24 * d * d == pytest.approx(170e6, rel=0.005)  # the dense part of the layers
    assert 2 * d * 50257 == pytest.approx(77e6, rel=0.005)  # the head
    assert flops == 12 * (24 * d * d + 2 * 1024 * d) + 2 * d * 50257
    assert flops_per_token(GPT2Config(), 8192) - flops == 12 * 2 * (8192 - 1024) * d
    assert flops_per_token(GPT2Config()) == flops  # context: n_positions


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(**TINY),
        GPT2Config(**TINY, n_inner=24),
        shared(3, 2, "per_layer", **TINY),
        shared(4, 0, "shared", **TINY),
    ],
)
def test_flops_equal_those_pytorch_counts(config):
    """PyTorch counts full attention; the causal half of it is what a token sees."""
    model = on_meta(config).eval()
    context = 32
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, context, dtype=torch.int64, device="meta"))
    attention = 4 * context * config.n_embd * config.n_layer  # per token: scores and weighted sum, unmasked
    assert flops_per_token(model, context) == counter.get_total_flops() / context - attention / 2


def test_sharing_saves_no_flops_and_deltas_add_some():
    plain = flops_per_token(GPT2Config(), 1024)
    assert flops_per_token(shared(4, 0, "per_layer"), 1024) == plain
    assert flops_per_token(shared(4, 8, "per_layer"), 1024) - plain == 2 * 245_760  # a multiply-add a parameter


def tversky(base: GPT2Config, **settings) -> GPT2CompressedConfig:
    return structure([from_record({"rewrite": "tversky", **settings})], base)


def test_flops_of_tversky_projections_by_hand():
    d, ff, layers, vocabulary = 768, 3072, 12, 50257
    dense = flops_per_token(GPT2Config(), 1024)

    def more(**settings):
        return flops_per_token(tversky(GPT2Config(), **settings), 1024) - dense

    # c_fc at K = d / 2: 2 d K to measure, two products of K x d_ff, in place of 2 d d_ff
    half = layers * (2 * d * 384 + 2 * 2 * 384 * ff - 2 * d * ff)
    assert (
        more(bank_size=384) == half == more(bank_size=384, share="none") == more(bank_size=0.5, prototypes="explicit")
    )
    assert more(bank_size=384, learn_scalars=False) == half - layers * 2 * 384 * ff  # a dot product, for good
    assert more(bank_size=384, learn_scalars=False, alpha=0.7, init="lsq") == half
    # queries, keys and values of one bank measure once, of banks of their own three times
    attention = layers * (2 * d * 512 + 3 * 2 * 2 * 512 * d - 3 * 2 * d * d)
    assert more(targets=["q", "k", "v"], bank_size=512) == attention
    assert more(targets=["q", "k", "v"], bank_size=512, share="none") == attention + layers * 2 * 2 * d * 512
    assert more(targets=["mlp_out", "lm_head"], bank_size=256) == (
        layers * (2 * ff * 256 + 2 * 2 * 256 * d - 2 * ff * d)
        + 2 * d * 256 + 2 * 2 * 256 * vocabulary - 2 * d * vocabulary
    )  # fmt: skip
    # a minimum: difference, size and sum for each prototype and feature; the product differences two matrix products
    forms = {"antipodal": False, "init": "random", "bank_size": 100, "form": "contrast"}
    assert more(**forms, intersection="min", difference="product") == layers * (
        2 * d * 100 + (2 * 2 + 3) * 100 * ff - 2 * d * ff
    )


def test_the_papers_whole_ffn_takes_four_to_five_times_the_operations():
    """9.4 MF a layer become 38 to 50, by two or three products, with its bank of 8192."""
    found = []
    for intersection in ("product", "gmean"):
        config = tversky(
            GPT2Config(), targets=["mlp_block"], bank_size=8192, antipodal=False, init="random",
            intersection=intersection, difference="ignorematch",
        )  # fmt: skip
        more = flops_per_token(config, 1024) - flops_per_token(GPT2Config(), 1024)
        found.append(more / 12 + 4 * 768 * 3072)
    assert found == [3 * 2 * 768 * 8192, 4 * 2 * 768 * 8192] == pytest.approx([38e6, 50e6], rel=0.01)


SEPARABLE = [
    (intersection, difference, antipodal, form)
    for intersection in ("product", "min", "max", "mean", "gmean", "softmin")
    for difference in ("product", "ignorematch", "subtractmatch")
    for antipodal in (True, False)
    for form in ("contrast", "ratio")
]


@pytest.mark.parametrize(("intersection", "difference", "antipodal", "form"), SEPARABLE)
def test_products_of_every_form_equal_those_pytorch_counts(intersection, difference, antipodal, form):
    settings = {"intersection": intersection, "difference": difference, "antipodal": antipodal, "form": form}
    base = GPT2Config(**{**TINY, "n_layer": 1})
    config = tversky(
        base, **settings, targets=["q", "k", "c_fc"], bank_size=5, init="random", alpha=0.7,
        non_negative=form == "ratio",
    )  # fmt: skip
    config._attn_implementation = "eager"  # whose products are counted on a processor too
    model, ids = GPT2CompressedLMHeadModel(config).eval(), torch.zeros(1, 32, dtype=torch.int64)
    with torch.no_grad():
        model(ids)  # what depends on prototypes alone is kept from here on
        with FlopCounterMode(display=False) as counter:
            model(ids)
    attention = 4 * 32 * 16
    minima = 3 if intersection in ("min", "max") or difference == "subtractmatch" else 0
    minima += 8 * (2 if antipodal else 1) if intersection == "softmin" else 0  # no products: PyTorch counts none
    expected = counter.get_total_flops() / 32 - attention / 2 + minima * 5 * (16 + 16 + 64)
    assert flops_per_token(model, 32) == expected


# ---------------------------------------------------------------- as a metric


def test_measure_gives_the_contract_names(tmp_path: Path):
    model = GPT2LMHeadModel(GPT2Config(**TINY))
    model.save_pretrained(tmp_path)
    subject = OpenModel(name="tiny", folder=tmp_path, hash="", model=model, tokenizer=None, stored_dtype=torch.float32)
    results = {result.metric: result for result in measure(subject)}
    assert list(results) == ["parameters", "bytes", "flops_per_token"]
    assert results["parameters"].value == parameters(model)
    assert results["parameters"].settings["embedding_share"] == embedding_share(model)
    assert results["bytes"].value == weight_bytes(tmp_path)
    assert results["bytes"].settings["of_parameters"] == 4 * parameters(model)
    assert results["flops_per_token"].value == flops_per_token(model, 32)
    assert not any(result.higher_is_better for result in results.values())
    assert all(result.settings["protocol"] for result in results.values())
    half = dataclasses.replace(subject, stored_dtype=torch.float16)
    assert measure(half, context=8)[2].value == flops_per_token(model, 8)
    with pytest.raises(UserError, match="context=0 is not allowed"):
        measure(subject, context=0)
