"""TverskyGPT against its formulas, a naive copy of the whole model, and what was wrong with the original."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, GPT2Config

from compressor import models
from compressor.errors import UserError
from compressor.tversky_gpt import (
    TverskyGPTModel,
    count_parameters,
    create_tversky_gpt_from_config,
    estimate_memory_mb,
    get_shared_parameter_info,
    paper_config,
    tversky_gpt_config,
)

TINY = {
    "n_embd": 16,
    "n_layer": 3,
    "n_head": 2,
    "n_inner": 24,
    "vocab_size": 61,
    "n_positions": 32,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
IDS = torch.randint(1, 61, (3, 12), generator=torch.Generator().manual_seed(3))


def _model(seed=0, **changes):
    torch.manual_seed(seed)
    model = create_tversky_gpt_from_config(TINY, **changes).eval()
    with torch.no_grad():  # biases and gains that matter
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def model():
    return _model()


def _logits(model, ids=IDS, **given):
    with torch.no_grad():
        return model(ids, **given).logits


# ---------------------------------------------------------------- what it computes


def _similar(x, prototypes, bias, bank, strengths, offset=1e-6):
    """The formulas, every token with every prototype, feature by feature."""
    gamma, alpha, beta = strengths
    a, p = (x @ bank.T).relu()[..., None, :], (prototypes @ bank.T).relu()
    common = torch.minimum(a, p).sum(-1)
    only_x, only_p = (a - p).relu().sum(-1), (p - a).relu().sum(-1)
    return gamma * common / (gamma * common + alpha * only_x + beta * only_p + offset) + bias


def _naive(model, ids):
    """The logits of a TverskyGPT from its tensors alone, in float64."""
    own = {name: tensor.double() for name, tensor in model.state_dict().items()}
    heads, layers, d = TINY["n_head"], TINY["n_layer"], TINY["n_embd"]

    def layer(place, path, x, width):
        banks = f"transformer.feature_bank.shared_{width}" + (
            "" if model.config.tversky[0]["share"] == "global" else f"_{place}"
        )
        strengths = [functional.softplus(own[f"{banks}.scalars.{name}"]) for name in ("theta", "alpha", "beta")]
        tensors = (own[f"transformer.h.{place}.{path}.{name}"] for name in ("prototypes", "bias"))
        return _similar(x, *tensors, own[f"{banks}.weight"], strengths)

    def norm(x, path):
        return functional.layer_norm(x, (d,), own[f"transformer.{path}.weight"], own[f"transformer.{path}.bias"])

    hidden = own["transformer.wte.weight"][ids] + own["transformer.wpe.weight"][: ids.shape[1]]
    for place in range(layers):
        x = norm(hidden, f"h.{place}.ln_1")
        q, k, v = (
            layer(place, f"attn.c_attn.{part}", x, d).unflatten(-1, (heads, -1)).transpose(1, 2) for part in "qkv"
        )
        scores = (q @ k.transpose(-1, -2) / (d // heads) ** 0.5).masked_fill(
            torch.ones(ids.shape[1], ids.shape[1]).triu(1).bool(), -torch.inf
        )
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2)
        hidden = hidden + layer(place, "attn.c_proj", mixed, d)
        inner = layer(place, "mlp.c_fc", norm(hidden, f"h.{place}.ln_2"), d).relu()
        hidden = hidden + layer(place, "mlp.c_proj", inner, TINY["n_inner"])
    return norm(hidden, "ln_f") @ own["transformer.wte.weight"].T


@pytest.mark.parametrize("across", [True, False])
def test_the_whole_model_is_the_formula(across):
    model = _model(alpha=0.7, beta=0.3, gamma=1.5, share_across_layers=across)
    assert (_logits(model) - _naive(model, IDS)).abs().max() < 1e-4
    assert (_logits(model.double()) - _naive(model, IDS)).abs().max() < 1e-10


def test_the_scalars_start_as_given():
    """The original's second model of a key had the first one's; whole numbers could not be trained."""
    models_ = [create_tversky_gpt_from_config(TINY, alpha=alpha, beta=1, gamma=2) for alpha in (0.5, 0.9)]
    for model, alpha in zip(models_, (0.5, 0.9), strict=True):
        for bank in model.transformer.feature_bank.values():
            assert [round(value.item(), 5) for value in bank.scalars()] == [2.0, alpha, 1.0]
            assert all(parameter.requires_grad for parameter in bank.scalars.parameters())


def test_similarities_are_from_0_to_1_and_outputs_need_not_be(model):
    """A residual stream that can only grow was the original's."""
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(1))
    bank = model.transformer.feature_bank["shared_16"]
    with torch.no_grad():
        projection = model.transformer.h[0].mlp.c_fc
        similar = projection(x, bank) - projection.bias
        assert similar.min() >= 0 and similar.max() <= 1 and similar.std() > 0.01
        assert projection(x, bank).min() < 0
        scaled = _model(scale=True)
        projection = scaled.transformer.h[0].mlp.c_fc
        projection.scale[0] = -2.0
        assert projection(x, scaled.transformer.feature_bank["shared_16"])[:, 0].min() < -0.3


# ---------------------------------------------------------------- the original's faults


@pytest.mark.parametrize(
    "config",
    [{**TINY, "n_embed": 32}, GPT2Config(n_embed=32)],
    ids=["mapping", "config"],
)
def test_n_embed_is_refused(config):
    with pytest.raises(UserError, match=r"'n_embed'.*did you mean 'n_embd'"):
        create_tversky_gpt_from_config(config)


def test_a_config_and_its_fields_make_the_same():
    mapped, given = tversky_gpt_config(TINY), tversky_gpt_config(GPT2Config(**TINY))
    assert mapped.to_dict() == given.to_dict() and (given.n_embd, given.activation_function) == (16, "relu")
    assert tversky_gpt_config({"hidden_size": 24}).n_embd == 24
    config = GPT2Config(**TINY)
    assert tversky_gpt_config(config, activation_function="gelu").activation_function == "gelu"
    assert config.activation_function == "gelu_new" and not hasattr(config, "tversky"), "the caller's stays as it was"


@pytest.mark.parametrize(
    ("config", "options", "said"),
    [
        ({**TINY, "n_head": 3}, {}, "n_embd 16, which n_head 3 does not divide"),
        ({**TINY, "n_embd": "16"}, {}, "no configuration of a GPT-2 .*n_embd"),
        ({**TINY, "n_layer": 0}, {}, "n_layer 0; allowed: 1 to"),
        ({**TINY, "add_cross_attention": True}, {}, "add_cross_attention; give that of a plain GPT-2"),
        (paper_config("tied"), {}, "tversky; give that of a plain GPT-2"),
        (TINY, {"gamma": -1.0}, r"theta, alpha, beta = \(-1.0, .*; allowed: 0 or more"),
        (TINY, {"alpha": "half"}, "alpha is 'half'; allowed: a number"),
        (TINY, {"feature_key": "my key"}, "feature_key is 'my key'; allowed"),
        (TINY, {"bank_sze": 8}, "unknown option of TverskyGPT 'bank_sze' .did you mean 'bank_size'"),
        (TINY, {"init": "exact"}, "unknown option of TverskyGPT 'init'"),
        (TINY, {"activation_function": "rel"}, "unknown activation_function 'rel'"),
        (TINY, {"targets": ["c_fc", "mlp_block"]}, "mlp_block replaces c_fc"),
    ],
)
def test_what_cannot_be_is_refused(config, options, said):
    with pytest.raises(UserError, match=said) as caught:
        tversky_gpt_config(config, **options)
    assert "\n" not in str(caught.value)


def test_banks_and_scalars_are_parameters_and_stored_once(model):
    named, stored = dict(model.named_parameters()), model.state_dict()
    for width in (16, 24):
        for name in ("weight", "scalars.theta", "scalars.alpha", "scalars.beta"):
            key = f"transformer.feature_bank.shared_{width}.{name}"
            assert key in named and key in stored
    assert sum("feature_bank" in name for name in stored) == 8
    assert {p.dtype for p in copy.deepcopy(model).to(torch.float64).parameters()} == {torch.float64}


def test_one_step_moves_every_parameter():
    model = _model().train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    model(IDS, labels=IDS).loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    optimizer.step()
    assert not [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]


def test_models_of_one_feature_key_are_independent(model):
    one, two = _model(1), _model(2)
    before = _logits(two)
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.zero_()
    assert torch.equal(_logits(two), before)
    del one
    assert torch.equal(_logits(two), before)
    twin = copy.deepcopy(two)
    with torch.no_grad():
        twin.transformer.feature_bank["shared_16"].weight.zero_()
    assert torch.equal(_logits(two), before) and not torch.equal(_logits(twin), before)


def test_it_answers_as_transformers_do(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answer = model(IDS, labels=IDS)
        assert model.transformer(IDS).last_hidden_state.shape == (3, 12, 16)
        assert torch.equal(model(IDS, return_dict=False)[0], answer.logits)
    assert isinstance(model, TverskyGPTModel) and answer.logits.shape == (3, 12, 61)
    expected = functional.cross_entropy(answer.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    assert torch.allclose(answer.loss, expected)


def test_no_token_sees_a_later_one(model):
    changed = IDS.clone()
    changed[:, 7] = changed[:, 7] % 60 + 1
    before, after = _logits(model), _logits(model, changed)
    assert (before[:, :7] - after[:, :7]).abs().max() < 1e-6
    assert (before[:, 7:] - after[:, 7:]).abs().max() > 1e-3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_masks(attention):
    model = _model()
    model.set_attn_implementation(attention)
    full, ones, pads = _logits(model), torch.ones_like(IDS), torch.zeros(3, 4, dtype=torch.int64)
    assert (_logits(model, attention_mask=ones) - full).abs().max() < 1e-5
    right = _logits(model, torch.cat([IDS, pads], 1), attention_mask=torch.cat([ones, pads], 1))
    mask = torch.cat([pads, ones], 1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    left = _logits(model, torch.cat([pads, IDS], 1), attention_mask=mask, position_ids=positions)
    assert (right[:, :12] - full).abs().max() < 1e-5 and (left[:, 4:] - full).abs().max() < 1e-5
    assert torch.isfinite(left).all() and torch.isfinite(right).all()


def test_attentions_and_hidden_states():
    model = _model()
    model.set_attn_implementation("eager")
    answer = model(IDS, output_attentions=True, output_hidden_states=True)
    assert len(answer.hidden_states) == 4 and len(answer.attentions) == 3
    for weights in answer.attentions:
        assert weights.shape == (3, 2, 12, 12) and not weights.triu(1).any()
        assert torch.allclose(weights.sum(-1), torch.ones(3, 2, 12))


def test_cache_and_generate(model):
    cache, parts = None, []
    with torch.no_grad():
        for chunk in IDS.split([5, 1, 6], dim=1):
            step = model(chunk, past_key_values=cache, use_cache=True)
            cache, parts = step.past_key_values, [*parts, step.logits]
    assert (torch.cat(parts, 1) - _logits(model)).abs().max() < 1e-5
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(IDS)}
    cached, fresh = (model.generate(IDS, use_cache=use, **settings) for use in (True, False))
    assert torch.equal(cached, fresh) and cached.shape == (3, 18)
    assert torch.equal(cached[:, 12], _logits(model)[:, -1].argmax(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(model, dtype):
    half = copy.deepcopy(model).to(dtype)
    assert (_logits(half).float() - _logits(model)).abs().max() < (0.2 if dtype == torch.bfloat16 else 0.05)
    half.train()(IDS, labels=IDS).loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in half.parameters())


def test_inputs_of_zeros_and_without_contiguity(model):
    """0 / 0 is what a similarity of nothing with nothing would be without its offset."""
    bank, projection = model.transformer.feature_bank["shared_16"], model.transformer.h[0].attn.c_proj
    empty = copy.deepcopy(projection)
    with torch.no_grad():
        empty.prototypes.zero_()
    x = torch.zeros(2, 16, requires_grad=True)
    empty(x, bank).sum().backward()
    assert torch.isfinite(x.grad).all() and torch.equal(empty(x, bank), empty.bias.expand(2, 16))
    y = torch.randn(16, 5).T
    assert torch.allclose(projection(y, bank), projection(y.contiguous(), bank))


_STRANGER = """
import json, sys
sys.modules["compressor"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
logits = model(torch.tensor(json.loads(sys.argv[2]))).logits
print(json.dumps([logits[0, -1].tolist(), sum(p.numel() for p in model.parameters())]))
"""


def test_it_opens_in_a_fresh_process_without_this_package(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    again, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert torch.equal(_logits(again.eval()), _logits(model))
    answer = subprocess.run(
        [sys.executable, "-c", _STRANGER, str(tmp_path / "saved"), json.dumps(IDS.tolist())],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    assert answer.returncode == 0, answer.stderr
    logits, count = json.loads(answer.stdout.splitlines()[-1])
    assert (torch.tensor(logits) - _logits(model)[0, -1]).abs().max() < 1e-5 and count == count_parameters(model)


def test_it_learns():
    text = torch.tensor(list(b"the quick brown fox jumps over the lazy dog. " * 12))[: 32 * 16].view(16, 32)
    torch.manual_seed(0)
    model = create_tversky_gpt_from_config({**TINY, "n_embd": 32, "n_layer": 2, "n_inner": None, "vocab_size": 128})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(50):
        loss = model(text, labels=text).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 4.5 and losses[-1] < 1.5, "letters alone, without an order, have an entropy of 2.9"


# ---------------------------------------------------------------- counts

SHAPES = [  # d, layers, heads: GPT-2, shared banks, banks of each layer; by arithmetic
    (128, 4, 4, 7_357_312, 7_635_846, 8_471_448),
    (256, 6, 8, 17_867_008, 18_981_126, 24_551_716),
    (512, 8, 8, 51_475_968, 55_932_422, 87_127_600),
    (768, 12, 12, 124_439_808, 134_466_822, 244_763_976),
]


@pytest.mark.parametrize(("d", "layers", "heads", "gpt2", "shared", "apart"), SHAPES)
def test_counts(d, layers, heads, gpt2, shared, apart):
    shape = GPT2Config(n_embd=d, n_layer=layers, n_head=heads)
    counts = [
        count_parameters(models.build(config))
        for config in (shape, tversky_gpt_config(shape), tversky_gpt_config(shape, share_across_layers=False))
    ]
    assert counts == [gpt2, shared, apart]
    assert shared - gpt2 == d * d + (4 * d) ** 2 + 6 and apart - gpt2 == layers * (shared - gpt2)


@pytest.mark.parametrize(("setting", "total"), [("tied", 81_139_968), ("untied", 116_591_616), ("head", 175_620_096)])
def test_the_papers_totals(setting, total):
    model = models.build(paper_config(setting))
    assert count_parameters(model) == total
    assert len(model.transformer.feature_bank) == 1
    assert not [name for name, _ in model.named_parameters() if "theta" in name or "lm_head.projection" in name]


def test_the_papers_structure_runs():
    """Its words on a small shape: causal, with finite gradients in its one bank and all prototypes."""
    small = {**TINY, "tie_word_embeddings": True}
    paper = paper_config("tied").tversky[0]
    options = {name: paper[name] for name in ("targets", "form", "intersection", "difference", "bias", "learn_scalars")}
    torch.manual_seed(0)
    model = create_tversky_gpt_from_config(small, bank_size=40, share_scalars=False, **options)
    answer = model(IDS, labels=IDS)
    answer.loss.backward()
    assert answer.logits.shape == (3, 12, 61) and all(p.grad.abs().sum() > 0 for p in model.parameters())
    assert model.lm_head.weight is model.transformer.wte.weight
    assert get_shared_parameter_info(model)["shared_parameters"] == {"shared_16": 40 * 16}


def test_what_is_shared(model):
    info = get_shared_parameter_info(model)
    assert info.keys() == {"shared_parameters", "total_shared_params", "total_model_params", "shared_percentage"}
    assert info["shared_parameters"] == {"shared_16": 16 * 16 + 3, "shared_24": 24 * 24 + 3}
    assert info["total_shared_params"] == 256 + 576 + 6
    # embeddings; per layer 4 d d + 2 d d_ff and biases, two norms; the last norm; and the banks
    layer = 4 * 256 + 2 * 16 * 24 + 4 * 16 + 24 + 16 + 4 * 16
    assert info["total_model_params"] == (61 + 32) * 16 + 3 * layer + 32 + 838 == count_parameters(model)
    assert info["shared_percentage"] == pytest.approx(100 * 838 / info["total_model_params"])
    apart = get_shared_parameter_info(_model(share_across_layers=False))
    assert apart["shared_parameters"] == {f"shared_16_{layer}": 259 for layer in range(3)}, "of a layer's five"
    plain = models.build(GPT2Config(**TINY))
    assert get_shared_parameter_info(plain) == {
        "shared_parameters": {},
        "total_shared_params": 0,
        "total_model_params": count_parameters(plain),
        "shared_percentage": 0.0,
    }


def test_memory(model, tmp_path):
    model.save_pretrained(tmp_path)
    stored = (tmp_path / "model.safetensors").stat().st_size  # and some kilobytes of names
    assert 0 <= stored / 2**20 - estimate_memory_mb(model) < 0.02
    assert estimate_memory_mb(copy.deepcopy(model).to(torch.bfloat16)) == estimate_memory_mb(model), "as float32"


def test_a_smaller_bank_for_both_widths():
    """The original's bank of the FFN's second layer is inner x inner, most of what it has."""
    model = _model(bank_size=5)
    assert {key: tuple(bank.weight.shape) for key, bank in model.transformer.feature_bank.items()} == {
        "shared_16": (5, 16),
        "shared_24": (5, 24),
    }
    assert torch.isfinite(_logits(model)).all()
