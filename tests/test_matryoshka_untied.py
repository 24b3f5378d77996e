"""Nested models of a GPT-2 whose head is not its embeddings."""

from __future__ import annotations

import copy

import pytest
import torch
from test_matryoshka import EVERYTHING, PARTS, nested
from toy import logits, toy_gpt2

from compressor.metrics.size import parameters
from compressor.nested_training import NestedObjective
from compressor.rewrites.matryoshka import chosen_by, plain, trained_sizes
from compressor.slicing import parameters as counted

D = 32


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 97, (3, 20), generator=torch.Generator().manual_seed(5))


def other_order(tied):
    """The same model, but its head has the embeddings' rows in another order, twice as large."""
    order = torch.randperm(97, generator=torch.Generator().manual_seed(2))
    model = toy_gpt2(tie_word_embeddings=False)
    state = tied.state_dict()
    model.load_state_dict({**state, "lm_head.weight": 2 * state["transformer.wte.weight"][order]})
    return model, order


@pytest.mark.parametrize("record", PARTS, ids=str)
def test_every_size_has_the_head_of_its_own(record, ids):
    _, tied, wanted = nested(record)
    original, order = other_order(tied)
    rewrite, _, model = nested(record, original=original)
    assert (logits(model, ids) - logits(original, ids)).abs().max() <= 1e-5
    sizes = trained_sizes(model.config)
    objective = NestedObjective(model, None, 0.0, (), None, nest=rewrite.nest(model), seed=0)
    for size in sizes:
        choice = chosen_by(size, D)
        cut = model.slice(**choice)
        assert not cut.config.tie_word_embeddings and parameters(cut) == counted(model.config, [size])[size]
        expected = 2 * logits(wanted.slice(**choice), ids)[..., order]
        assert (logits(cut, ids) - expected).abs().max() <= 1e-5
        hidden, head = objective._slice(dict(model.named_parameters()), size, ids, None)
        assert (hidden @ head.T - expected[:, :-1].flatten(0, 1)).abs().max() <= 1e-5
        if hasattr(cut.config, "matryoshka"):
            assert (logits(plain(cut), ids) - expected).abs().max() <= 1e-5


def test_cut_out_at_once(ids):
    original, _ = other_order(toy_gpt2())
    _, _, model = nested(EVERYTHING, original=original)
    for only in ({"width": 16}, {"head": 8, "depth": 4}):
        _, _, cut = nested({**EVERYTHING, "only": only}, original=copy.deepcopy(original))
        assert (logits(cut, ids) - logits(model.slice(**only), ids)).abs().max() <= 1e-6
