"""Models side by side against matrices with their zeros written out, and against both models run in step by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toy import toy_config, toy_gpt2
from transformers import AutoModelForCausalLM

from compressor import gpt2
from compressor.checkpoint_config import check_config
from compressor.errors import UserError
from compressor.modeling import GPT2CompressedConfig, GPT2CompressedLMHeadModel
from compressor.modeling.combined import OUTPUTS, Glue, PartsLinear, PartsNorm

WIDTHS, FFN = [32, 16], [128, 40]
ENTRY = {"widths": WIDTHS, "ffn": FFN, "outputs": "glued"}
IDS = torch.randint(1, 97, (3, 11), generator=torch.Generator().manual_seed(2))


def config(**changes) -> GPT2CompressedConfig:
    fields = {**toy_config(n_layer=3, n_embd=48, n_head=6, n_inner=168).to_dict(), "combined": ENTRY, **changes}
    fields.pop("model_type")
    return GPT2CompressedConfig(**fields)


def drawn(module, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


@pytest.mark.parametrize(("each", "glued"), [(1, False), (3, False), (1, True)])
def test_a_linear_of_parts_is_a_matrix_with_blocks_of_zeros(each, glued):
    linear = drawn(PartsLinear([4, 2], [3, 5], each, glued))
    dense, bias = np.zeros((6, each * 8)), np.zeros(each * 8)
    starts = {0: (0, 0, 3), 1: (4, 3, 5)}  # of each part: where its inputs and, of each kind, its outputs begin; width
    for part, (row, column, width) in starts.items():
        weight, own = (tensor.detach().double().numpy() for tensor in linear.parts[part].parameters())
        for kind in range(each):
            here = slice(8 * kind + column, 8 * kind + column + width)
            dense[row : row + len(weight), here] = weight[:, kind * width : (kind + 1) * width]
            bias[here] = own[kind * width : (kind + 1) * width]
    x = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(1))
    expected = x.double().numpy() @ dense + bias
    if glued:
        expected = expected @ linear.glue.weight.detach().double().numpy().T
    assert np.abs(linear(x).detach().numpy() - expected).max() < 1e-5


def test_each_part_is_normalised_alone():
    norm, x = drawn(PartsNorm([4, 2], eps=1e-5)), torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    expected = np.empty((3, 6))
    for own in (slice(0, 4), slice(4, 6)):
        part = x[:, own].double().numpy()
        part = (part - part.mean(1, keepdims=True)) / np.sqrt(part.var(1, keepdims=True) + 1e-5)
        expected[:, own] = part * norm.weight[own].detach().numpy() + norm.bias[own].detach().numpy()
    assert np.abs(norm(x).detach().numpy() - expected).max() < 1e-5


@torch.no_grad()
def in_step(models, joined, ids):
    """The logits of two plain models whose blocks read each other through the glue of `joined`, in the same order."""
    states = [gpt2.embed(model, ids) for model in models]
    widths = [model.config.n_embd for model in models]

    def mixed(added, glue):
        return (torch.cat(added, -1) @ glue.weight.T).split(widths, -1)

    for layer in range(models[0].config.n_layer):
        own, of = gpt2.blocks(joined)[layer], [gpt2.blocks(model)[layer] for model in models]
        causal = torch.full((ids.shape[1], ids.shape[1]), -1e30).triu(1)
        given = [block.attn(block.ln_1(x), attention_mask=causal)[0] for block, x in zip(of, states, strict=True)]
        states = [x + added for x, added in zip(states, mixed(given, own.attn.c_proj.glue), strict=True)]
        given = [block.mlp(block.ln_2(x)) for block, x in zip(of, states, strict=True)]
        states = [x + added for x, added in zip(states, mixed(given, own.mlp.c_proj.glue), strict=True)]
    final = torch.cat([gpt2.final_norm(model, x) for model, x in zip(models, states, strict=True)], -1)
    return final @ joined.head_map.weight.T @ torch.cat([gpt2.embeddings(model) for model in models], -1).T


@pytest.fixture(scope="module")
def pair():
    return toy_gpt2(n_layer=3), toy_gpt2(seed=1, n_layer=3, n_embd=16, n_head=2, n_inner=40)


@pytest.fixture(scope="module")
def joined(pair):
    """Both side by side, with glue that is anything but the identity."""
    model = GPT2CompressedLMHeadModel(config()).eval()
    of_first, of_second = (part.state_dict() for part in pair)
    tensors = {}
    for name, tensor in of_first.items():
        if "attn.c_" in name or "mlp.c_" in name:
            owner, _, leaf = name.rpartition(".")
            tensors |= {f"{owner}.parts.0.{leaf}": tensor, f"{owner}.parts.1.{leaf}": of_second[name]}
        else:
            tensors[name] = torch.cat([tensor, of_second[name]], -1)
    left = model.load_state_dict(tensors, strict=False)
    assert not left.unexpected_keys and all("glue" in key or "head_map" in key for key in left.missing_keys)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Glue):
                module.weight.add_(0.1 * torch.randn(module.weight.shape, generator=generator))
    return model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_it_is_both_models_in_step(pair, joined, attention):
    joined.set_attn_implementation(attention)
    with torch.no_grad():
        assert (joined(IDS).logits - in_step(pair, joined, IDS)).abs().max() < 1e-4


def test_the_heads_product_is_its_logits(joined):
    hidden = torch.randn(4, 48, generator=torch.Generator().manual_seed(1))
    left, right = joined.head_product(hidden)
    assert torch.equal(joined.logits(hidden), left @ right.T)
    assert right.data_ptr() == joined.transformer.wte.weight.data_ptr() and right.shape == (97, 48)


def test_without_the_field_there_is_no_map():
    assert GPT2CompressedLMHeadModel(config(combined=None)).head_map is None


@pytest.mark.parametrize("outputs", OUTPUTS)
def test_from_scratch(outputs, tmp_path):
    """Glue begins as the identity, norms as norms; the file holds it all."""
    model = GPT2CompressedLMHeadModel(config(combined={**ENTRY, "outputs": outputs})).eval()
    glue = [module.weight for module in model.modules() if isinstance(module, Glue)]
    assert len(glue) == (7 if outputs == "glued" else 1) and all(torch.equal(own, torch.eye(48)) for own in glue)
    norms = [module for module in model.modules() if isinstance(module, PartsNorm)]
    assert len(norms) == 7 and all(norm.weight.min() == 1 and not norm.bias.any() for norm in norms)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_products_in_bfloat16(joined):
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        found = joined(IDS).logits
    with torch.no_grad():
        assert (found - joined(IDS).logits).abs().max() < 0.05 * found.abs().max()


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ([1], r"has \[1\] as combined; allowed: a mapping"),
        (
            {**ENTRY, "widths": [32, 8]},
            r"has \[32, 8\] as widths in combined; allowed: two multiples of 8 that sum to 48",
        ),
        ({**ENTRY, "widths": [28, 20]}, "allowed: two multiples of 8 that sum to 48"),
        ({**ENTRY, "widths": [48]}, "allowed: two multiples of 8"),
        ({**ENTRY, "widths": [16, 16, 16]}, "allowed: two multiples of 8"),
        ({**ENTRY, "widths": [48, 0]}, "allowed: two multiples of 8"),
        ({**ENTRY, "widths": [56, -8]}, "allowed: two multiples of 8"),
        ({**ENTRY, "widths": [32.0, 16.0]}, "allowed: two multiples of 8"),
        ({**ENTRY, "ffn": [128, 41]}, "as ffn in combined; allowed: two multiples of 1 that sum to 168"),
        ({**ENTRY, "outputs": True}, "as outputs in combined; allowed: apart, glued, dense"),
        ({"widths": WIDTHS, "ffn": FFN}, "has no outputs in combined"),
    ],
)
def test_entries_of_which_no_model_can_be_made(entry, said):
    check_config("config.json", config())
    with pytest.raises(UserError, match=said) as caught:
        check_config("config.json", config(combined=entry))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "other",
    [
        {"alibi": {"slopes": "geometric", "learned_positions": False, "first": True}},
        {"shaped_attention": {"layers": [0], "parallel": False}},
        {"ffn_groups": [{"layers": [0, 1], "start": 0, "rank": 0, "bias": "shared"}]},
        {"efficient_attention": [{"kind": "linformer", "layers": [0], "block": 8, "slots": 2, "per_head": False}]},
    ],
    ids=lambda other: next(iter(other)),
)
def test_not_beside_other_structures(other):
    with pytest.raises(UserError, match=f"has combined and {next(iter(other))}, which would have to be of each part"):
        check_config("config.json", config(**other))
