"""Slices by name, chosen, and cut out as models of their own."""

from __future__ import annotations

import pytest
import torch
from test_matryoshka import EVERYTHING, logits, nested
from transformers import GPT2LMHeadModel

from compressor import slicing
from compressor.checkpoint import structure_hash
from compressor.errors import UserError
from compressor.metrics.size import parameters
from compressor.modeling.nesting import full_size, size_of
from compressor.rewrites import from_record
from compressor.rewrites.compose import structure
from compressor.rewrites.matryoshka import trained_sizes

CHOICES = {
    "whole": {},
    "ffn-64": {"ffn": 0.5},
    "depth-2": {"depth": 2},
    "head-16": {"head": 16},
    "width-16": {"width": 16},
    "ffn-32_width-16": {"width": 16, "ffn": 32},
    "ffn-64_depth-4": {"ffn": 64, "depth": 4},
    "ffn-32_depth-2_head-8": {"ffn": 0.25, "depth": 2, "head": 8},
    "ffn-128x4-64x2": {"ffn": [128, 128, 128, 128, 64, 64]},
    "ffn-64x1-32x1_depth-2": {"ffn": [0.5, 0.25], "depth": 2},
}


@pytest.fixture(scope="module")
def everything():
    return nested(EVERYTHING)


@pytest.mark.parametrize("name", CHOICES)
def test_a_slice_has_a_name_and_says_how_a_rewrite_gets_there(name, everything):
    _, original, model = everything
    size = size_of(model.config, **CHOICES[name])
    assert slicing.name(model.config, size) == name
    ids = torch.randint(1, 97, (2, 20), generator=torch.Generator().manual_seed(1))
    cut = slicing.cut(model, size)
    in_place = model.slice(**CHOICES[name])
    assert all(torch.equal(tensor, in_place.state_dict()[key]) for key, tensor in cut.state_dict().items())
    assert (logits(cut, ids) - logits(in_place, ids)).abs().max() <= 1e-6  # rounding differs where rows lie apart
    (record,) = cut.config.compression
    rewrite = from_record(record)
    assert rewrite == rewrite.resolved(original.config) and rewrite.nest(cut) is None
    again = structure([rewrite], original.config)
    assert structure_hash(again) == structure_hash(cut.config) and again.compression == cut.config.compression
    assert not slicing.is_nested(cut.config) and model.config.compression[0]["only"] is None
    assert slicing.parameters(model.config, [size]) == {size: parameters(cut)}
    owned = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
    for parameter in cut.parameters():
        assert parameter.untyped_storage().data_ptr() not in owned
        assert parameter.is_contiguous() and parameter.untyped_storage().nbytes() == 4 * parameter.numel()
    assert cut.lm_head.weight is cut.transformer.wte.weight


def test_names_are_of_sizes_not_of_how_they_were_asked_for():
    model = nested({"ffn": [0.5, 0.25]})[2]
    asked = [{"ffn": 0.5}, {"ffn": 64}, {"ffn": [64] * 6}, {"ffn": 0.5, "depth": 6}]
    assert list(slicing.sizes(model.config, asked)) == ["ffn-64"]
    assert isinstance(slicing.cut(model, size_of(model.config, ffn=0.5)), GPT2LMHeadModel)
    assert list(slicing.sizes(model.config, "all")) == ["ffn-64", "ffn-32"]


def test_all_are_those_that_were_trained(everything):
    config = everything[2].config
    found = slicing.sizes(config, slicing.ALL)
    assert list(found.values()) == trained_sizes(config)[1:] and full_size(config) not in found.values()
    assert list(found) == [
        "ffn-64", "ffn-32", "width-24", "width-16", "depth-4", "depth-2", "head-16", "head-8",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ([{"ffn": 0.3}], "slices: ffn is 0.3; allowed: 128, "),
        ([{"depth": 5}], "slices: depth is 5; allowed: 6, 4, 2"),
        ([{"ffn": [64, 64]}], "slices: ffn has 2 numbers"),
        ([{"width": 16, "head": 8}], "a narrower model's logits are made of its whole width"),
        ([{"ffn": 1.0}], "is the whole model"),
    ],
)
def test_sizes_that_are_not_there(chosen, said, everything):
    with pytest.raises(UserError, match=r"^slices: ") as error:
        slicing.sizes(everything[2].config, chosen)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "chosen", ["some", 3, [], {}, [{}], ["ffn"], [{"fnn": 0.5}], [{"ffn": "half"}], [{"ffn": True}], [{"ffn": []}],
               [{"depth": [4]}], [{"depth": None}], [None]]
)  # fmt: skip
def test_what_is_no_choice_of_slices(chosen):
    with pytest.raises(UserError, match=r"^slices: ") as error:
        slicing.check_chosen(chosen)
    assert "allowed: " in str(error.value) and "\n" not in str(error.value)


def test_what_is_one():
    for chosen in (None, "all", [{"ffn": 0.5}], [{"depth": 8, "ffn": [64, 0.5]}, {"width": 384}]):
        slicing.check_chosen(chosen)


def test_models_without_smaller_ones(everything, original):
    assert not slicing.is_nested(original.config) and slicing.is_nested(everything[2].config)
    with pytest.raises(UserError, match="no smaller models are nested in this one; a matryoshka rewrite"):
        slicing.sizes(original.config, "all")
