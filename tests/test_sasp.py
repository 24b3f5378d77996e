"""sasp against matrices written out, a parallel block written out, and what recovery, folding and recipes owe."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional
from toy import toy_alignment, toy_blocks, toy_gpt2
from transformers import GPT2LMHeadModel, StaticCache

from compressor import gpt2
from compressor.errors import UserError
from compressor.finetune import finetune, resolve_train
from compressor.modeling.shaped import AttentionShape
from compressor.rewrites import from_record
from compressor.rewrites.compose import apply, check, structure
from compressor.rewrites.sasp import Sasp

LAYERS, HEADS, D = 3, 2, 16
IDS = torch.randint(1, 97, (3, 14), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def original():
    return toy_gpt2(n_layer=LAYERS, n_head=HEADS, n_embd=D)


@pytest.fixture(scope="module")
def alignment(original):
    return toy_alignment(original)


def made(original, alignment, *records):
    rewrites = [from_record(record).resolved(original.config) for record in records]
    return apply(rewrites, original, alignment, calibration=toy_blocks(original.config, rows=4))


def shaped(original, alignment, **fields):
    """With another alpha, beta and gamma in every head of every layer, and gains of its own in every block."""
    model = copy.deepcopy(made(original, alignment, {"rewrite": "sasp", **fields}))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in Sasp().trainable(model):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def logits(model, ids=IDS, **given):
    return model(ids, **given).logits


@torch.no_grad()
def by_hand(model, ids, pads=None):
    """The logits from the tensors alone, in float64, with [tokens, tokens] matrices; pads: of each row, on the left."""
    own = {name.removeprefix("transformer."): tensor.double() for name, tensor in model.state_dict().items()}
    entry, tokens, width = model.config.shaped_attention, ids.shape[1], D // HEADS

    def norm(x, path):
        return functional.layer_norm(x, (D,), own[f"{path}.weight"], own[f"{path}.bias"])

    def linear(x, path):
        return x @ own[f"{path}.weight"] + own[f"{path}.bias"]

    rows = []
    for row, skipped in zip(ids, pads or [0] * len(ids), strict=True):
        real = row[skipped:]
        size = tokens - skipped
        hidden = own["wte.weight"][real] + own["wpe.weight"][:size]
        identity, causal = torch.eye(size).double(), torch.ones(size, size).double().tril()
        for layer in range(LAYERS):
            path, found = f"h.{layer}", []
            parts = linear(norm(hidden, f"{path}.ln_1"), f"{path}.attn.c_attn").split(D, -1)
            for head in range(HEADS):
                q, k, v = (part[:, head * width : (head + 1) * width] for part in parts)
                softmax = (q @ k.T / width**0.5).masked_fill(causal == 0, -torch.inf).softmax(-1)
                matrix = softmax
                if layer in entry["layers"]:
                    shape = [own[f"{path}.attn.shape.{name}"][head] for name in ("identity", "softmax", "mean")]
                    matrix = shape[0] * identity + shape[1] * softmax - shape[2] * causal / causal.sum(1, keepdim=True)
                found.append(matrix @ v)
            attention = linear(torch.cat(found, -1), f"{path}.attn.c_proj")

            def ffn(x, path=path):
                inner = functional.gelu(linear(norm(x, f"{path}.ln_2"), f"{path}.mlp.c_fc"), approximate="tanh")
                return linear(inner, f"{path}.mlp.c_proj")

            if entry["parallel"] and layer in entry["layers"]:
                gains = [own[f"{path}.gains.{name}"] for name in ("attention", "ffn")]
                hidden = hidden + gains[0] * attention + gains[1] * ffn(hidden)
            else:
                hidden = hidden + attention
                hidden = hidden + ffn(hidden)
        out = norm(hidden, "ln_f") @ own["wte.weight"].T
        rows.append(torch.cat([torch.zeros(skipped, out.shape[1]).double(), out]))
    return torch.stack(rows)


# ---------------------------------------------------------------- what it computes


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("layers", [None, [1, 2]])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_it_is_the_matrices(original, alignment, parallel, layers, attention):
    model = shaped(original, alignment, parallel=parallel, layers=layers).double()
    model.set_attn_implementation(attention)
    wanted = by_hand(model, IDS)
    assert (logits(model) - wanted).abs().max() < 1e-10
    assert (logits(original) - wanted).abs().max() > 0.1


@pytest.mark.parametrize("parallel", [False, True])
def test_pads_are_no_tokens(original, alignment, parallel):
    """Neither in the softmax nor in the mean, on either side."""
    model = shaped(original, alignment, parallel=parallel).double()
    pads = [0, 5, 9]
    mask = (torch.arange(IDS.shape[1]) >= torch.tensor(pads)[:, None]).long()
    left = logits(model, IDS, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0))
    assert ((left - by_hand(model, IDS, pads)) * mask[..., None]).abs().max() < 1e-10
    right = logits(model, IDS, attention_mask=mask.flip(1))
    for row, skipped in enumerate(pads):
        kept = IDS[row : row + 1, : IDS.shape[1] - skipped]
        assert (right[row, : kept.shape[1]] - by_hand(model, kept)[0]).abs().max() < 1e-10


def test_what_a_cache_of_one_size_has_not_written_yet_is_no_token(original, alignment):
    model = shaped(original, alignment)
    cache = StaticCache(config=model.config, max_cache_len=32)
    parts = [logits(model, part, past_key_values=cache) for part in IDS.split([9, 1, 4], dim=1)]
    assert (torch.cat(parts, 1) - logits(model)).abs().max() < 1e-5


def test_sums_of_many_tokens_are_finite_in_float16():
    shape = AttentionShape(2).to(torch.float16)
    with torch.no_grad():
        shape.mean.fill_(-1.0)
        value = torch.full((1, 2, 1000, 4), 100.0, dtype=torch.float16)
        found = shape(torch.zeros(1, 1000, 2, 4, dtype=torch.float16), value, None)
    assert torch.equal(found, torch.full_like(found, 100.0))


@pytest.mark.parametrize("parallel", [False, True])
@torch.no_grad()
def test_cache_with_pads(original, alignment, parallel):
    model = shaped(original, alignment, parallel=parallel).double()
    pads = [2, 0, 6]
    mask = (torch.arange(IDS.shape[1]) >= torch.tensor(pads)[:, None]).long()
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    cache, parts, seen = None, [], 0
    for chunk in IDS.split([7, 1, 1, 5], dim=1):
        seen += chunk.shape[1]
        here = slice(seen - chunk.shape[1], seen)
        step = model(
            chunk, past_key_values=cache, use_cache=True, attention_mask=mask[:, :seen], position_ids=positions[:, here]
        )
        cache, parts = step.past_key_values, [*parts, step.logits]
    assert ((torch.cat(parts, 1) - by_hand(model, IDS, pads)) * mask[..., None]).abs().max() < 1e-10


def test_what_it_starts_with(original, alignment):
    model = made(original, alignment, {"rewrite": "sasp", "alpha": 0.25, "beta": 0.75, "gamma": -0.5, "layers": [2]})
    shape = gpt2.attention(model, 2).shape
    started = [part.tolist() for part in (shape.identity, shape.softmax, shape.mean)]
    assert started == [[0.25] * 2, [0.75] * 2, [-0.5] * 2]
    assert type(gpt2.attention(model, 1)).__name__ == "GPT2Attention"
    kept = original.state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items() if name in kept)
    assert model.state_dict().keys() - kept.keys() == {
        f"transformer.h.2.attn.shape.{name}" for name in ("identity", "softmax", "mean")
    }


def test_parallel_blocks_are_another_function(original, alignment):
    model = made(original, alignment, {"rewrite": "sasp", "parallel": True})
    assert (logits(model) - logits(original)).abs().max() > 0.1


# ---------------------------------------------------------------- recovery


@pytest.mark.parametrize(("parallel", "count"), [(False, 3 * HEADS), (True, 3 * HEADS + 2)])
def test_deltas_are_shapes_and_gains_alone_and_help(original, alignment, parallel, count):
    rewrite = from_record({"rewrite": "sasp", "parallel": parallel}).resolved(original.config)
    model = copy.deepcopy(made(original, alignment, rewrite.record()))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert resolve_train("auto", model, [rewrite]) == "deltas"
    text = toy_blocks(original.config, rows=8)
    recovery = finetune(
        model, text, text, rewrites=[rewrite], train="auto", steps=20, batch_tokens=256, learning_rate=3e-2
    )
    assert recovery.trainable == LAYERS * count
    assert recovery.evaluations[-1].nll < recovery.evaluations[0].nll - 0.01 and recovery.best_step > 0
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if ".shape." in name or ".gains." in name}


def test_adapters_train_beside_them(original, alignment):
    rewrite = from_record({"rewrite": "sasp", "parallel": True, "layers": [1]}).resolved(original.config)
    model = copy.deepcopy(made(original, alignment, rewrite.record()))
    text = toy_blocks(original.config, rows=4)
    finetune(model, text, None, rewrites=[rewrite], train="lora", steps=3, batch_tokens=128, learning_rate=1e-2)
    starts = made(original, alignment, rewrite.record()).state_dict()
    for name in ("attn.shape.identity", "attn.shape.mean", "gains.ffn", "attn.c_attn.weight", "mlp.c_fc.weight"):
        assert not torch.equal(model.state_dict()[f"transformer.h.1.{name}"], starts[f"transformer.h.1.{name}"])


# ---------------------------------------------------------------- back to plain GPT-2


def test_beta_of_each_head_folds_exactly(original, alignment):
    model = copy.deepcopy(made(original, alignment, {"rewrite": "sasp"})).double()
    with torch.no_grad():
        for layer, betas in enumerate([(0.5, -2.0), (1.0, 1.0), (1.5, 0.0)]):
            gpt2.attention(model, layer).shape.softmax.copy_(torch.tensor(betas))
    folded = Sasp().fold(model)
    assert type(folded) is GPT2LMHeadModel and folded.config.model_type == "gpt2"
    assert (logits(folded) - logits(model)).abs().max() < 1e-12
    assert (logits(folded) - logits(original)).abs().max() > 0.01
    kept = "transformer.h.1.attn.c_proj.weight"
    assert torch.equal(folded.state_dict()[kept], model.state_dict()[kept])


def test_what_does_not_fold_says_why(original, alignment):
    for fields, why in (
        ({"alpha": 0.1}, "sasp: heads of layer 0 have an alpha"),
        ({"gamma": 0.1, "layers": [2]}, "sasp: heads of layer 2 have"),
        ({"parallel": True}, "sasp: its FFNs stand beside attention"),
    ):
        with pytest.raises(UserError, match=why) as error:
            Sasp().fold(made(original, alignment, {"rewrite": "sasp", **fields}))
        assert "\n" not in str(error.value)


def test_beta_folds_into_linears_only(original, alignment):
    tversky = {"rewrite": "tversky", "targets": ["attn_out"], "init": "random", "layers": [1]}
    model = copy.deepcopy(made(original, alignment, {"rewrite": "sasp", "layers": [1]}, tversky))
    without = Sasp().fold(model)  # beta is 1: nothing has to take it up
    assert without.config.shaped_attention is None and without.config.tversky
    assert torch.equal(logits(without), logits(model))
    with torch.no_grad():
        gpt2.attention(model, 1).shape.softmax.fill_(0.5)
    with pytest.raises(UserError, match="sasp: beta of layer 1 is not 1, and attention's output there is no linear"):
        Sasp().fold(model)


# ---------------------------------------------------------------- recipes


def test_beside_other_rewrites(original, alignment):
    """Layers that go take theirs along; attention in blocks and parallel FFNs are somebody else's."""
    records = [{"rewrite": "sasp", "alpha": 0.5, "layers": [0, 2]}, {"rewrite": "dropped_n", "layers": [1]}]
    model = made(original, alignment, *records)
    assert model.config.shaped_attention == {"layers": [0, 1], "parallel": False}
    assert (logits(model) - by_hand_without(original, 1, 0.5)).abs().max() < 1e-4
    for other in ({"rewrite": "linformer"}, {"rewrite": "soft_shared", "n": 2, "start": 0, "fold_ln": True}):
        with pytest.raises(UserError, match="both take over"):
            check([Sasp(parallel=True), from_record(other)], original.config)
    check([Sasp(), from_record({"rewrite": "soft_shared", "n": 2, "start": 0, "fold_ln": True})], original.config)


def test_with_alibi(original, alignment):
    alibi = {"rewrite": "alibi", "slopes": "geometric", "anneal": 0}
    alone, both = made(original, alignment, alibi), made(original, alignment, alibi, {"rewrite": "sasp", "beta": 0.5})
    assert (logits(both) - logits(alone)).abs().max() > 0.01
    folded = Sasp().fold(both)
    assert folded.config.alibi and not folded.config.shaped_attention
    assert (logits(folded) - logits(both)).abs().max() < 1e-5
    with torch.no_grad():
        for layer in range(LAYERS):
            gpt2.attention(both, layer).shape.softmax.fill_(1)
    assert (logits(both) - logits(alone)).abs().max() < 1e-6


@torch.no_grad()
def by_hand_without(original, gone, alpha):
    """The original without a layer, each head's own value alpha times more."""
    model = copy.deepcopy(original)
    del gpt2.blocks(model)[gone]
    for layer, block in enumerate(gpt2.blocks(model)):
        block.attn.layer_idx = layer

        def more(module, given, output):
            value = module.c_attn(given[0]).split(D, -1)[2]
            return output[0] + alpha * value @ module.c_proj.weight, *output[1:]

        block.attn.register_forward_hook(more)
    return model(IDS, use_cache=False).logits


def test_refused(original):
    for fields, why in (
        ({"layers": []}, "sasp: layers is \\[\\]; allowed: different layers from 0 to 2"),
        ({"layers": [1, 1]}, "sasp: layers is"),
        ({"layers": [3]}, "sasp: layers is"),
        ({"alpha": float("nan")}, "sasp: alpha is nan; allowed: finite numbers"),
        ({"gamma": float("inf")}, "sasp: gamma is inf"),
    ):
        with pytest.raises(UserError, match=why):
            Sasp(**fields).check(original.config)
    with pytest.raises(UserError, match="sasp"):
        from_record({"rewrite": "sasp", "parallel": "yes"})
    with pytest.raises(UserError, match="a recipe can have sasp once"):
        structure([Sasp(layers=[0]), Sasp(layers=[1])], original.config)


def test_a_static_cache(original):
    rewrite = from_record({"rewrite": "sasp", "alpha": 0.3, "gamma": 0.2}).resolved(original.config)
    model = apply([rewrite], original, None)
    ids = torch.randint(1, 97, (2, 20), generator=torch.Generator().manual_seed(8))
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    settings["attention_mask"] = (torch.arange(20) >= torch.tensor([[0], [6]])).long()
    static = model.generate(ids, cache_implementation="static", disable_compile=True, **settings)
    assert torch.equal(static, model.generate(ids, use_cache=False, **settings))
