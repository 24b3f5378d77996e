"""Rewrites of attention scores: which layers, beside what, what distillation and recovery train, what is refused."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from toy import toy_alignment, toy_blocks, toy_config, toy_gpt2

from compressor import gpt2, models
from compressor.errors import UserError
from compressor.finetune import finetune
from compressor.metrics.size import parameters, stored_besides
from compressor.modeling.block_attention import BlockAttention
from compressor.modeling.linformer import LinformerFar
from compressor.rewrites import from_record
from compressor.rewrites.compose import apply
from compressor.rewrites.efficient import attentions_of

KINDS = {
    "linformer": {"block": 8, "slots": 2},
    "nystromformer": {"block": 8, "landmarks": 4},
    "performer": {"block": 8, "feature_map": "learned"},
}


@pytest.fixture(scope="module")
def original():
    return toy_gpt2(n_layer=4, n_embd=16, n_head=2)


@pytest.fixture(scope="module")
def alignment(original):
    return toy_alignment(original)


@pytest.fixture(scope="module")
def text(original):
    return toy_blocks(original.config, rows=8)


@pytest.fixture(scope="module")
def make(original, alignment, text):
    def build(*records):
        rewrites = [from_record(record).resolved(original.config) for record in records]
        return rewrites, apply(rewrites, original, alignment, calibration=text)

    return build


def errors(original, model, text, places=None):
    """Squared error of each layer's attention output for the original's input, over its variance."""
    found = {}

    def compare(layer, x, wanted):
        given = gpt2.attention(model, layer)(x, real=mask)[0]
        found[layer] = float((given - wanted)[mask].square().mean() / wanted[mask].var(0).mean())

    ids, mask = next(iter(text.batches()))
    attentions_of(original, places or {layer: layer for layer in range(4)}, (ids, mask), compare)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_layers_that_are_named_change(make, original, text, kind):
    _, model = make({"rewrite": kind, **KINDS[kind], "layers": [2, 0]})
    assert model.config.efficient_attention[0]["layers"] == [0, 2]
    found = errors(original, model, text, {0: 0, 2: 2})
    assert all(error > 1e-3 for error in found.values())
    for layer in (1, 3):
        assert type(gpt2.attention(model, layer)).__name__ == "GPT2Attention"
    weights = dict(model.named_parameters())
    for name, parameter in original.named_parameters():
        assert torch.equal(weights[name], parameter)


@pytest.mark.parametrize("record", [KINDS["linformer"], {"block": 8, "slots": 1, "per_head": True}])
def test_distillation_of_linformer_brings_every_layer_nearer(make, original, text, record):
    record = {"rewrite": "linformer", **record}
    start, found = (
        make({**record, "distill_steps": steps, "distill_learning_rate": 3e-3})[1] for steps in (0, 20)
    )  # fmt: skip
    before, after = errors(original, start, text), errors(original, found, text)
    assert all(after[layer] < 0.97 * before[layer] for layer in before)
    assert all(not parameter.requires_grad or parameter.grad is None for parameter in found.parameters())
    new = [name for name, parameter in found.named_parameters() if not torch.equal(parameter, _named(start)[name])]
    assert new and all(".scores.far." in name for name in new)


@pytest.mark.parametrize("feature_map", ["relu", "elu", "learned"])
def test_distillation_of_performer(make, original, text, feature_map):
    record = {"rewrite": "performer", "block": 8, "feature_map": feature_map}
    start, found = (make({**record, "distill_steps": steps})[1] for steps in (0, 20))
    assert sum(errors(original, found, text).values()) < sum(errors(original, start, text).values())


def test_distillation_that_leads_away_is_put_back(make):
    record = {"rewrite": "linformer", "block": 8, "slots": 7}
    start, found = (make({**record, "distill_steps": steps, "distill_learning_rate": 3.0})[1] for steps in (0, 6))
    weights = _named(start)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in found.named_parameters())


def _named(model):
    return dict(model.named_parameters())


@torch.no_grad()
def test_features_that_estimate_nothing_begin_with_the_mass_of_their_tokens(original, alignment, text):
    """By brute force on one head: mean over queries of log sum exp of scores of completed blocks, minus that of
    features."""
    rows, lengths = slice(-4, None), torch.tensor([64, 64, 5, 39])
    full = dataclasses.replace(text, ids=text.ids[rows], mask=torch.arange(64) < lengths[:, None])
    rewrite = from_record({"rewrite": "performer", "block": 8, "feature_map": "relu", "features": 6})
    model = apply([rewrite.resolved(original.config)], original, alignment, calibration=full)
    layer, head = 2, 1
    captured = {}
    attentions_of(original, {layer: layer}, (full.ids, full.mask), lambda _, x, __: captured.update(x=x))
    attention = gpt2.attention(model, layer)
    query, key, _ = (part[:, head].double() for part in attention.heads(captured["x"]))
    far, differences = attention.scores.far, []
    for row in range(len(query)):
        for token in range(8, int(lengths[row])):
            past = token // 8 * 8
            exact = (query[row, token] @ key[row, :past].T * attention.scaling).logsumexp(-1)
            weight = far.weight[head].double()
            one = (query[row, token] * math.sqrt(attention.scaling) @ weight.T).relu() + 1e-6
            other = (key[row, :past] * math.sqrt(attention.scaling) @ weight.T).relu() + 1e-6
            differences.append(exact - (other @ one).sum().log())
    assert float(far.gain[head]) == pytest.approx(float(torch.stack(differences).mean()), abs=1e-4)


@torch.no_grad()
def test_log_mass_of_one_summary_halves_the_error():
    """Of attention on random inputs, against a summary that weighs as much as one token."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 4, 2, 256, 64).unbind()
    exact = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)

    def error(log_mass):
        far = LinformerFar(1, 64, 1)
        if log_mass is not None:
            torch.nn.init.constant_(far.log_mass, log_mass)
        out = BlockAttention(64, far)(query, key, value, scaling=64**-0.5)
        return float((out - exact)[:, :, 64:].norm() / exact[:, :, 64:].norm())

    assert error(None) < 0.6 * error(0.0)


def test_nothing_to_distil_is_said(make):
    for record in ({"rewrite": "linformer", "block": 64}, {"rewrite": "performer", "block": 80}):
        with pytest.raises(UserError, match=f"block is {record['block']}, and no calibration text is longer"):
            make({**record, "distill_steps": 1})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", ["q", "k", "v"])
def test_autocast_with_similarities_for_a_third_of_attention(make, kind, target):
    """Similarities stay float32 where linears do not."""
    _, model = make(
        {"rewrite": kind, **KINDS[kind]}, {"rewrite": "tversky", "targets": [target], "bank_size": 0.75, "layers": [1]}
    )
    ids = torch.randint(1, 90, (2, 20), generator=torch.Generator().manual_seed(1))
    exact = model(ids).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(ids, labels=ids)
    found.loss.backward()
    assert (found.logits - exact).abs().max() < 0.1 * exact.abs().max()


@torch.no_grad()
def test_a_mask_of_another_length_is_refused(make):
    """transformers would take it; which tokens it is of is not for this attention to guess."""
    _, model = make({"rewrite": "linformer", **KINDS["linformer"], "layers": [1]})
    ids = torch.ones(2, 10, dtype=torch.long)
    for width in (9, 11):
        with pytest.raises(ValueError, match=f"attention_mask has {width} tokens; allowed: all so far, 10"):
            model(ids, attention_mask=torch.ones(2, width))
    cache = model(ids, attention_mask=torch.ones(2, 10)).past_key_values
    with pytest.raises(ValueError, match="attention_mask has 1 tokens; allowed: all so far, 11"):
        model(ids[:, :1], past_key_values=cache, attention_mask=torch.ones(2, 1))


def test_recovery_by_adapters_trains_what_is_new_too(make, original, text):
    for kind in ("linformer", "performer"):
        rewrites, model = make({"rewrite": kind, **KINDS[kind], "layers": [1]})
        before = copy.deepcopy(model.state_dict())
        own = {name for name, p in model.named_parameters() if any(p is q for q in rewrites[0].trainable(model))}
        result = finetune(model, text, None, rewrites=rewrites, train="lora", steps=3, batch_tokens=128, rank=2)
        assert result.train == "lora" and own
        moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
        assert own < moved and any("c_attn" in name for name in moved)


def test_beside_other_rewrites(make, original, text):
    """Depth goes last, and the layers of the others are renumbered; queries may be similarities."""
    records = [
        {"rewrite": "compressed_n", "n": 2, "start": 0},
        {"rewrite": "performer", **KINDS["performer"], "layers": [2]},
        {"rewrite": "linformer", **KINDS["linformer"], "layers": [3], "distill_steps": 3},
        {"rewrite": "tversky", "targets": ["q", "c_fc"], "layers": [3], "bank_size": 0.75},
    ]
    rewrites, model = make(*records)
    assert [entry["layers"] for entry in model.config.efficient_attention] == [[1], [2]]
    assert model.config.n_layer == 3 and [rewrite.name for rewrite in rewrites][1] == "performer"
    assert set(errors(original, model, text, {1: 2})) == {1}
    ids = torch.randint(1, 90, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.isfinite(model(ids).logits).all()
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached, fresh = (model.generate(ids, use_cache=use, **settings) for use in (True, False))
    assert torch.equal(cached, fresh)


def test_two_may_not_take_one_layer(make):
    with pytest.raises(UserError, match=r"both take over h\.1\.attn\.scores"):
        make(
            {"rewrite": "linformer", **KINDS["linformer"], "layers": [0, 1]},
            {"rewrite": "performer", **KINDS["performer"], "layers": [1]},
        )


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"rewrite": "linformer", "layers": []}, r"layers is \[\]; allowed: different layers from 0 to 5"),
        ({"rewrite": "linformer", "layers": [6]}, r"layers is \[6\]"),
        ({"rewrite": "linformer", "layers": [1, 1]}, r"layers is \[1, 1\]"),
        ({"rewrite": "linformer", "layers": [True]}, r"layers is \[True\]"),
        ({"rewrite": "linformer", "block": 0}, "block is 0; allowed: 1 to 4194304 tokens"),
        ({"rewrite": "linformer", "block": 1 << 23}, "block is 8388608; allowed: 1 to 4194304 tokens"),
        ({"rewrite": "linformer", "block": 8, "slots": 9}, r"slots is 9; allowed: 1 to 8 \(block\)"),
        ({"rewrite": "linformer", "distill_steps": -1}, "distill_steps is -1; allowed: 0 or more"),
        ({"rewrite": "linformer", "distill_learning_rate": 0.0}, "distill_learning_rate is 0.0; allowed: above 0"),
        ({"rewrite": "nystromformer", "landmarks": 0}, "landmarks is 0; allowed: 1 to 4194304"),
        ({"rewrite": "nystromformer", "landmarks": 1 << 23}, "landmarks is 8388608; allowed: 1 to 4194304"),
        ({"rewrite": "nystromformer", "inverse": "pinv"}, "newton, none"),
        ({"rewrite": "performer", "features": 0}, "features is 0"),
        ({"rewrite": "performer", "features": 1 << 23}, "features is 8388608 with learned; allowed: 1 to 4194304"),
        ({"rewrite": "performer", "features": 7}, "takes features in pairs; features is 7"),
        ({"rewrite": "performer", "feature_map": "elu", "features": 9}, "elu: 8"),
        ({"rewrite": "performer", "feature_map": "cos"}, "favor"),
        ({"rewrite": "performer", "seed": -1}, "seed is -1; allowed: 0 or more"),
    ],
)
def test_settings_that_are_refused(record, said):
    with pytest.raises(UserError, match=said) as caught:
        from_record(record).check(toy_config())
    assert "\n" not in str(caught.value)


def test_what_cannot_be_dense_says_so(make):
    for kind, record in KINDS.items():
        rewrites, model = make({"rewrite": kind, **record})
        with pytest.raises(UserError, match=f"attention of {kind} is not plain GPT-2's"):
            rewrites[0].fold(model)


def test_attentions_are_the_weights_of_the_values(make):
    """As output_attentions: rows sum to 1, none sees what comes later; with a cache of tokens before it is an error."""
    for kind, record in KINDS.items():
        _, model = make({"rewrite": kind, **record})
        ids = torch.randint(1, 90, (2, 21), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            found = model(ids, output_attentions=True).attentions
            assert len(found) == 4 and found[0].shape == (2, 2, 21, 21)
            for weights in found:
                assert torch.allclose(weights.sum(-1), torch.ones(2, 2, 21), atol=1e-4)
                assert weights.triu(1).abs().max() == 0
            cache = model(ids, use_cache=True).past_key_values
            with pytest.raises(ValueError, match="pass use_cache=False"):
                model(ids[:, :1], past_key_values=cache, output_attentions=True)


def test_files_hold_fixed_directions_and_verify_counts_them(make, tmp_path):
    _, model = make({"rewrite": "performer", "block": 8, "feature_map": "favor+", "features": 10})
    assert parameters(model) == parameters(models.build(toy_config(n_layer=4, n_embd=16, n_head=2)))
    assert stored_besides(model) == 4 * 2 * 10 * 8
    model.save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert 0 < size - 4 * (parameters(model) + stored_besides(model)) < 16384


def test_a_proof_looks_beyond_a_block(make):
    """A leak between blocks is none within the first."""
    _, model = make({"rewrite": "linformer", "block": 20, "slots": 2})
    assert len(models.probe(model)["ids"]) == 48
    assert len(models.probe(toy_gpt2())["ids"]) == 24
