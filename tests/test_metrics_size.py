"""Sizes against the published counts of GPT-2 and against what PyTorch counts and writes itself."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from compressor.errors import UserError
from compressor.metrics.cache import cache_bytes
from compressor.metrics.flops import flops_per_token
from compressor.metrics.size import (
    embedding_parameters,
    embedding_share,
    measure,
    non_zero,
    parameters,
    predicted_bytes,
    weight_bytes,
)
from compressor.modeling import GPT2CompressedConfig, GPT2CompressedLMHeadModel
from compressor.models import OpenModel

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


# ---------------------------------------------------------------- as a metric


def test_measure_gives_the_contract_names(tmp_path: Path):
    model = GPT2LMHeadModel(GPT2Config(**TINY))
    model.save_pretrained(tmp_path)
    subject = OpenModel(name="tiny", folder=tmp_path, hash="", model=model, tokenizer=None, stored_dtype=torch.float32)
    results = {result.metric: result for result in measure(subject)}
    assert list(results) == ["parameters", "bytes", "flops_per_token", "cache_bytes"]
    assert results["parameters"].value == parameters(model)
    assert results["parameters"].settings["embedding_share"] == embedding_share(model)
    assert results["bytes"].value == weight_bytes(tmp_path)
    assert results["bytes"].settings["of_parameters"] == 4 * parameters(model)
    assert results["flops_per_token"].value == flops_per_token(model, 32)
    assert results["cache_bytes"].value == cache_bytes(model.config, 32, 4)
    assert not any(result.higher_is_better for result in results.values())
    assert all(result.settings["protocol"] for result in results.values())
    half = dataclasses.replace(subject, stored_dtype=torch.float16)
    assert measure(half, context=8)[2].value == flops_per_token(model, 8)
    with pytest.raises(UserError, match="context=0 is not allowed"):
        measure(subject, context=0)
