"""Changes of a GPT-2's attention that keep its function, which narrower sizes must not see either; balanced heads."""

from __future__ import annotations

import pytest
import torch
from test_matryoshka import nested
from toy import logits, toy_blocks, toy_gpt2

D, HEADS = 32, 4
NARROW = {"ffn": None, "width": [16, 8]}


@pytest.fixture(scope="module")
def sizes():
    return made(toy_gpt2())


def made(original):
    ids = torch.randint(1, 97, (3, 20), generator=torch.Generator().manual_seed(5))
    _, _, model = nested(NARROW, original=original)
    assert (logits(model, ids) - logits(original, ids)).abs().max() <= 1e-4
    return [logits(model.slice(width=width), ids) for width in NARROW["width"]]


@torch.no_grad()
def test_the_scale_of_scores_may_stand_in_the_queries(sizes):
    """Without scale_attn_weights nothing is divided by the root of a head's width, whichever that is."""
    scaled, original = toy_gpt2(), toy_gpt2(scale_attn_weights=False)
    original.load_state_dict(scaled.state_dict())
    for block in original.transformer.h:
        for tensor in (block.attn.c_attn.weight, block.attn.c_attn.bias):
            tensor[..., :D] *= (D / HEADS) ** -0.5
    found = made(original)
    assert all((one - other).abs().max() <= 1e-4 for one, other in zip(found, sizes, strict=True))


@torch.no_grad()
def test_what_all_keys_have_in_common_counts_for_nothing(sizes):
    original = toy_gpt2()
    for block in original.transformer.h:
        block.attn.c_attn.bias[D : 2 * D] += torch.randn(D, generator=torch.Generator().manual_seed(1))
    found = made(original)
    assert all((one - other).abs().max() <= 1e-4 for one, other in zip(found, sizes, strict=True))


@torch.no_grad()
def test_heads_are_balanced_on_calibration_text():
    """Queries and keys have one falling diagonal second moment, of keys about their mean."""
    original = toy_gpt2()
    _, _, model = nested(NARROW, original=original)
    taken: list = []
    hook = model.transformer.h[2].attn.c_attn.register_forward_hook(lambda module, given, made: taken.append(made))
    kept = []
    for rows, mask in toy_blocks(original.config).batches():
        model(rows)
        kept.append(taken.pop()[mask])
    hook.remove()
    queries, keys, _ = torch.cat(kept).double().unflatten(-1, (3, HEADS, D // HEADS)).unbind(1)
    keys = keys - keys.mean(0)
    for head in range(HEADS):
        found, other = (x[:, head].T @ x[:, head] for x in (queries, keys))
        assert (found - other).abs().max() <= 1e-3 * found.max()
        assert (found - found.diagonal().diag()).abs().max() <= 1e-3 * found.max()
        assert (found.diagonal().diff() <= 1e-3 * found.max()).all()
