"""Random heads as they are asked for, a model's heads as its attention has them."""

from __future__ import annotations

import pytest
import torch
from toy import toy_blocks, toy_config, toy_gpt2

from compressor import gpt2
from compressor.errors import UserError
from compressor.models import OpenModel
from compressor.studies.attention.inputs import chosen_layers, model_heads, random_heads
from compressor.studies.attention.kinds import sdpa


def opened(model):
    return OpenModel("toy", None, "", model, None, torch.float32)


def test_random_heads_have_their_norm_and_correlation():
    shape = (1, 2, 4000, 8)
    for norm, correlation in ((3, 0.0), (12, 0.0), (3, 0.8)):
        made = random_heads(shape, torch.Generator().manual_seed(1), norm=norm, correlation=correlation)
        for part in (made.query, made.key):
            assert part.square().sum(-1).mean().sqrt().item() == pytest.approx(norm, rel=0.05)
        before, after = made.query[:, :, :-1].flatten(), made.query[:, :, 1:].flatten()
        assert torch.corrcoef(torch.stack([before, after]))[0, 1].item() == pytest.approx(correlation, abs=0.03)
        assert made.norms[0] == pytest.approx(made.query.norm(dim=-1).mean().item())
        assert made.tokens == 4000 and made.first(7).value.equal(made.value[:, :, :7])


@pytest.mark.parametrize("changes", [{}, {"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False}])
@torch.no_grad()
def test_a_models_heads_give_its_attentions_output(changes):
    model = toy_gpt2(**changes)
    ids = toy_blocks(model.config).ids[:1]
    wanted = {}
    hooks = [
        gpt2.attention(model, layer).register_forward_hook(lambda _, x, y, layer=layer: wanted.update({layer: y[0]}))
        for layer in (0, 4)
    ]
    model(ids)
    for hook in hooks:
        hook.remove()
    found = model_heads(opened(model), ids, [0, 4])
    assert [heads.name for heads in found] == ["layer 0", "layer 4"]
    for heads, layer in zip(found, (0, 4), strict=True):
        mixed = sdpa(*heads.parts, scaling=heads.scaling).transpose(1, 2).flatten(2)
        weight, bias = gpt2.linear(model, layer, "attn.o")
        assert torch.allclose(mixed @ weight + bias, wanted[layer], atol=1e-4)


def test_layers_are_the_first_the_middle_and_the_last_or_given():
    model = opened(toy_gpt2())
    assert chosen_layers(None, model) == [0, 3, 5] and chosen_layers([1, 2], model) == [1, 2]
    assert chosen_layers(None, opened(toy_gpt2(**{"n_layer": 1}))) == [0]
    with pytest.raises(UserError, match=r"layers is \[2, 6\]; toy has 0 to 5"):
        chosen_layers([2, 6], model)
    assert toy_config().n_layer == 6
