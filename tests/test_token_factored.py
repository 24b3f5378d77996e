"""token_factored: what is fitted equals least squares on activations that are kept; planted answers; what it costs."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from toy import toy_blocks, toy_config, toy_gpt2
from transformers import GPT2Config, GPT2LMHeadModel

from compressor import alignment, gpt2, models
from compressor.errors import UserError
from compressor.finetune import finetune
from compressor.metrics.flops import flops_per_token
from compressor.metrics.size import parameters
from compressor.modeling.streams import STAGES, HeadMixing
from compressor.rewrites import from_record
from compressor.rewrites.compose import apply, structure
from compressor.rewrites.token_factored_fit import relative_error

LAYERS, D, HEADS = 3, 16, 2
WIDTH = D // HEADS
WHOLE = ["exact", "v_from_xt", "kron_v", "kron_o", "kron", "identity"]  # the others are for models from scratch
APART = WHOLE[1:]


@pytest.fixture(scope="module")
def original():
    return toy_gpt2(n_layer=LAYERS, n_embd=D, n_head=HEADS)


@pytest.fixture(scope="module")
def text(original):
    """Rows of 64, 53, 42, ... tokens in turn."""
    blocks = toy_blocks(original.config, rows=12)
    mask = torch.arange(64) < 64 - 11 * (torch.arange(12) % 5)[:, None]
    return dataclasses.replace(blocks, ids=blocks.ids.masked_fill(~mask, 0), mask=mask)


def made(original, text, **record):
    rewrite = from_record({"rewrite": "token_factored", **record}).resolved(original.config)
    return apply([rewrite], original, alignment.identity(original.config), calibration=text)


def own_part(tensor, head, axis):
    return tensor.unflatten(axis, (HEADS, WIDTH)).select(axis, head)


def entering(model, text, layer):
    """Hidden states of real tokens that enter a block: float[..., tokens, d]."""
    hidden = gpt2.run_blocks(model, gpt2.embed(model, text.ids), 0, layer)
    return hidden[..., text.mask, :]


@torch.no_grad()
def test_exact_is_the_original_bit_for_bit_and_folds_back(original, text):
    model = made(original, text, stage="exact")
    assert torch.equal(model(text.ids).logits, original(text.ids).logits)
    hidden = gpt2.run_blocks(model, gpt2.embed(model, text.ids), 0, LAYERS)
    attention = []
    hooks = [
        block.attn.register_forward_hook(lambda *given: attention.append(given[2][0])) for block in model.transformer.h
    ]
    model(text.ids)
    for hook in hooks:
        hook.remove()
    assert (hidden[1] - original.transformer.wte(text.ids) - sum(attention)).abs().max() < 1e-4  # xt
    folded = from_record({"rewrite": "token_factored", "stage": "exact"}).fold(model)
    assert type(folded) is GPT2LMHeadModel
    assert torch.equal(folded(text.ids).logits, original(text.ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("ridge", [0.0, 0.05])
def test_values_are_ridge_regression_on_what_the_new_model_itself_gives(original, text, ridge):
    """By numpy, on activations of the finished model: layers before one are what they were when it was fitted."""
    model = made(original, text, ridge=ridge)
    for layer in range(LAYERS):
        own = model.transformer.h[layer]
        assert torch.equal(own.ln_v.weight, original.transformer.h[layer].ln_1.weight)
        assert own.ln_v.weight.data_ptr() != original.transformer.h[layer].ln_1.weight.data_ptr()
        read = own.ln_v(entering(model, text, layer)[1]).double().numpy()
        block = original.transformer.h[layer]
        wanted = block.attn.c_attn(block.ln_1(entering(original, text, layer)))[:, 2 * D :].double().numpy()
        about, aim = read - read.mean(0), wanted - wanted.mean(0)
        more = np.sqrt(ridge * about.var(0).mean() * len(about)) * np.eye(D)
        best = np.linalg.lstsq(np.vstack([about, more]), np.vstack([aim, np.zeros((D, D))]), rcond=1e-6)[0]
        found = own.attn.c_v(torch.tensor(read, dtype=torch.float32)).numpy()
        assert np.abs(found - (about @ best + wanted.mean(0))).max() < 2e-4
        kept = original.transformer.h[layer].attn
        assert torch.equal(own.attn.c_qk.weight, kept.c_attn.weight[:, : 2 * D])
        assert torch.equal(own.attn.c_proj.weight, kept.c_proj.weight)


@torch.no_grad()
def turned(original, seed=0):
    """The same function: each head's values times a matrix, its outputs times the inverse."""
    model, generator = copy.deepcopy(original), torch.Generator().manual_seed(seed)
    for block in model.transformer.h:
        for head in range(HEADS):
            basis = torch.eye(WIDTH) + 0.5 * torch.randn(WIDTH, WIDTH, generator=generator)
            values = slice(2 * D + head * WIDTH, 2 * D + (head + 1) * WIDTH)
            for tensor in (block.attn.c_attn.weight, block.attn.c_attn.bias):
                tensor[..., values] = tensor[..., values] @ basis
            rows = slice(head * WIDTH, (head + 1) * WIDTH)
            block.attn.c_proj.weight[rows] = torch.linalg.solve(basis, block.attn.c_proj.weight[rows])
    return model


@torch.no_grad()
@pytest.mark.parametrize("stage", APART)
def test_the_basis_of_a_heads_own_space_changes_nothing(original, text, stage):
    """It is arbitrary; naive projection of values and outputs would depend on it."""
    other = turned(original)
    assert (other(text.ids).logits - original(text.ids).logits).abs().max() < 1e-3
    settings = {"stage": stage, "ridge": 0.0}
    found, again = (made(model, text, **settings)(text.ids).logits for model in (original, other))
    assert (found - again).abs().max() < 2e-3 < 0.1 < (found - original(text.ids).logits).abs().max()


@torch.no_grad()
def planted(stage, biases=True):
    """An original whose xt is all there is (no positions, no FFNs), and whose values and outputs are Kronecker products
    as the stage says, in a basis that hides it."""
    model, generator = toy_gpt2(3, n_layer=LAYERS, n_embd=D, n_head=HEADS), torch.Generator().manual_seed(1)
    model.transformer.wpe.weight.zero_()
    values, outputs = STAGES[stage]
    for block in model.transformer.h:
        block.mlp.c_proj.weight.zero_()
        block.mlp.c_proj.bias.zero_()
        lift = torch.eye(WIDTH)
        if values == "kron":
            block.attn.c_attn.weight[:, 2 * D :] = torch.kron(torch.randn(HEADS, HEADS, generator=generator), lift)
        if outputs == "kron":
            block.attn.c_proj.weight.copy_(torch.kron(torch.randn(HEADS, HEADS, generator=generator), lift))
        if values == "identity":
            block.attn.c_attn.weight[:, 2 * D :] = torch.diag(torch.randn(D, generator=generator))
            block.attn.c_proj.weight.copy_(torch.diag(torch.randn(D, generator=generator)))
        if not biases:
            block.attn.c_attn.bias[2 * D :].zero_()
            block.attn.c_proj.bias.zero_()
    return turned(model, seed=2)


@torch.no_grad()
@pytest.mark.parametrize("stage", APART)
def test_a_planted_model_is_recovered_with_its_biases(stage, text):
    model = planted(stage)
    found = made(model, text, stage=stage, ridge=0.0)
    assert (found(text.ids).logits - model(text.ids).logits).abs().max() < 1e-3
    assert found.transformer.h[1].attn.c_v.__class__.__name__ == {"dense": "Conv1D", "kron": "HeadMixing"}.get(
        STAGES[stage][0], "Identity"
    )


@torch.no_grad()
def test_outputs_without_a_bias_leave_it_to_the_values(text):
    model = planted("kron_o")
    found = made(model, text, stage="kron_o", ridge=0.0, bias=False)
    assert found.transformer.h[0].attn.out_map.bias is None
    assert (found(text.ids).logits - model(text.ids).logits).abs().max() < 1e-3


@torch.no_grad()
@pytest.mark.parametrize("stage", ["kron", "kron_v", "kron_o", "identity"])
def test_no_small_change_of_a_projection_is_better(original, text, stage):
    """The error of one head's n V O over the text, by brute force, with everything about its mean."""
    model = made(original, text, stage=stage, ridge=0.0, layers=[0])
    own, kept = model.transformer.h[0], original.transformer.h[0]
    x = entering(original, text, 0)
    n = gpt2.run_blocks(model, gpt2.embed(model, text.ids), 0, 0)[1][text.mask]
    n = torch.nn.functional.layer_norm(n, (D,), kept.ln_1.weight, kept.ln_1.bias).double()
    n = n - n.mean(0)
    values = (kept.attn.c_attn(kept.ln_1(x))[:, 2 * D :]).double()
    values = values - values.mean(0)
    generator = torch.Generator().manual_seed(0)

    def error(value, output, head):
        part = slice(head * WIDTH, (head + 1) * WIDTH)
        wanted = values[:, part] @ kept.attn.c_proj.weight[part].double()
        return float((n @ value @ output - wanted).square().sum())

    lift = torch.eye(WIDTH, dtype=torch.float64)
    for head in range(HEADS):
        part = slice(head * WIDTH, (head + 1) * WIDTH)
        if stage == "identity":
            v, o = torch.zeros(D, WIDTH).double(), torch.zeros(WIDTH, D).double()
            v[part] = torch.diag((own.ln_v.weight / kept.ln_1.weight).double()[part])
            o[:, part] = lift
            free = [(v, v != 0)]
        else:
            values_kron, outputs_kron = (kind == "kron" for kind in STAGES[stage])
            v = own.attn.c_v.weight[head].double() if values_kron else own.attn.c_v.weight[:, part].double()
            o = gpt2.output_map(model, 0).weight.double()
            o = o[:, head] if outputs_kron else o[part]
            free = [(v, torch.ones_like(v, dtype=bool)), (o, torch.ones_like(o, dtype=bool))]

        def lifted(v=v, o=o):
            value = torch.kron(v[:, None], lift) if v.ndim == 1 else v
            return value, torch.kron(o[None, :], lift) if o.ndim == 1 else o

        best = error(*lifted(), head)
        for tensor, mask in free:
            for _ in range(20):
                step = torch.randn(tensor.shape, generator=generator).double() * mask
                step *= 1e-2 * tensor.norm() / step.norm()
                tensor += step
                assert error(*lifted(), head) > best
                tensor -= step


@torch.no_grad()
def test_dropout_of_embeddings_is_one_for_both_streams(original, text):
    """xe = x - xt would begin as noise else."""
    model = copy.deepcopy(made(original, text, stage="exact"))
    model.transformer.drop.p = 0.5
    torch.manual_seed(0)
    x, xt = model.transformer.drop.train()(torch.ones(2, 3, 64, D))
    assert torch.equal(x, xt) and 0.4 < float((x == 0).float().mean()) < 0.6


def test_mixing_heads_is_the_explicit_kronecker_product():
    torch.manual_seed(0)
    mixing = HeadMixing(3, 12, bias=True)
    torch.nn.init.normal_(mixing.weight)
    torch.nn.init.normal_(mixing.bias)
    x = torch.randn(2, 5, 12)
    explicit = torch.kron(mixing.weight, torch.eye(4))
    assert (mixing(x) - (x @ explicit.T + mixing.bias)).abs().max() < 1e-5


def test_every_token_counts_by_its_own_size():
    """A hundred times longer, the first is no more than the others: (1/4 + 1 + 4) / 3."""
    wanted = torch.tensor([[0.0, 200.0], [3.0, 4.0], [1.0, 0.0]])
    found = wanted + torch.tensor([[100.0, 0.0], [4.0, -3.0], [0.0, 2.0]])
    assert float(relative_error(found, wanted)) == pytest.approx(1.75)


def block_errors(original, model, text):
    """After every block, with the model's own blocks before."""
    return [
        float(relative_error(entering(model, text, layer)[0], entering(original, text, layer)))
        for layer in range(1, LAYERS + 1)
    ]


@torch.no_grad()
@pytest.mark.parametrize("stage", APART)
def test_distillation_brings_the_hidden_states_nearer(original, text, stage):
    before = copy.deepcopy(original.state_dict())
    start, found = (made(original, text, stage=stage, distill_steps=steps) for steps in (0, 15))
    assert block_errors(original, found, text)[-1] < 0.97 * block_errors(original, start, text)[-1]
    assert block_errors(original, found, text)[0] < block_errors(original, start, text)[0]
    assert all(torch.equal(before[key], value) for key, value in original.state_dict().items())
    named = dict(start.named_parameters())
    moved = {name for name, parameter in found.named_parameters() if not torch.equal(parameter, named[name])}
    assert moved and all(".attn." in name or ".ln_v." in name for name in moved)
    assert all(parameter.grad is None for parameter in found.parameters())


@torch.no_grad()
def test_streams_are_told_as_brute_force_finds_them(original, text):
    rewrite = from_record({"rewrite": "token_factored", "stage": "v_from_xt"}).resolved(original.config)
    model = made(original, text)
    batches = [(text.ids[rows], text.mask[rows]) for rows in (slice(7), slice(7, None))]
    told = rewrite.diagnose(model, batches)
    assert told["tokens"] == int(text.mask.sum())
    assert [entry["layer"] for entry in told["layers"]] == [None, 0, 1, 2]
    norms, sums, read = [0.0] * 4, [0.0, 0.0], 0
    for ids, mask in batches:
        hidden = gpt2.run_blocks(model, gpt2.embed(model, ids), 0, 2)
        after = gpt2.run_blocks(model, hidden, 2, LAYERS)[0]
        index = 0
        for row in range(len(ids)):
            for place in range(ids.shape[1]):
                if not mask[row, place]:
                    continue
                x, xt = hidden[:, row, place]
                xe = x - xt
                a, b = xt.norm(), xe.norm()
                for which, value in enumerate((a, b, a / (a + b), xt @ xe / (a * b))):
                    norms[which] += float(value)
                if place + 1 < ids.shape[1] and mask[row, place + 1]:
                    if index % 8 == 0:
                        lens, own = (model.lm_head(model.transformer.ln_f(state)) for state in (xt, after[row, place]))
                        sums[0] += float(lens.argmax() == own.argmax())
                        sums[1] -= float(lens.log_softmax(-1)[ids[row, place + 1]])
                        read += 1
                    index += 1
    entry = told["layers"][2]
    found = [entry[key] for key in ("norm_xt", "norm_xe", "share_xt", "cosine")]
    assert found == pytest.approx([value / told["tokens"] for value in norms], rel=1e-4)
    assert told["read"] == read
    assert entry["lens"]["xt"] == pytest.approx({"agreement": sums[0] / read, "nll": sums[1] / read}, rel=1e-4)
    assert told["layers"][-1]["lens"]["x"]["agreement"] == 1


@torch.no_grad()
def test_pads_count_for_nothing(original, text):
    other = dataclasses.replace(text, ids=text.ids.masked_fill(~text.mask, 5))
    one, two = (made(original, given, stage="kron", distill_steps=2) for given in (text, other))
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, dict(two.named_parameters())[name]), name
    rewrite = from_record({"rewrite": "token_factored"})
    assert rewrite.diagnose(one, text.batches()) == rewrite.diagnose(one, other.batches())


def test_counts_of_gpt2_small_are_exact():
    """Dense V and O 11.4 %; with the Kronecker weights and without positions 12.0 %. ln_v, biases and slopes beside."""
    base = GPT2Config()
    d, heads, layers = 768, 12, 12
    whole = parameters(models.build(base))
    dense = layers * 2 * (d * d + d)
    assert dense == 14_174_208 and round(100 * dense / whole, 1) == 11.4

    def change(**record):
        return parameters(models.build(structure([from_record({"rewrite": "token_factored", **record})], base))) - whole

    kron = layers * 2 * heads * heads
    assert kron == 3_456
    assert change(stage="exact") == 0
    assert change(stage="kron", value_norm=False, bias=False) == kron - dense
    assert change(stage="kron") == kron - dense + layers * 3 * d  # ln_v, and the output's bias
    assert change(stage="identity", value_norm=False) == -dense
    positions = 1024 * d
    assert positions == 786_432 and round(100 * positions / whole, 2) == 0.63
    assert round(100 * (dense - kron + positions) / whole, 1) == 12.0


@pytest.mark.parametrize("stage", WHOLE)
def test_operations_equal_those_pytorch_counts(stage):
    base = toy_config(n_layer=3)
    config = structure([from_record({"rewrite": "token_factored", "stage": stage, "layers": [0, 2]})], base)
    with torch.device("meta"):
        model = models.build(config).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 64, dtype=torch.int64, device="meta"))
    attention = 4 * 64 * base.n_embd * base.n_layer
    assert flops_per_token(config, 64) == counter.get_total_flops() / 64 - attention / 2


def test_recovery_by_adapters_trains_what_is_new_too(original, text):
    rewrite = from_record({"rewrite": "token_factored", "stage": "kron", "layers": [1]})
    model = made(original, text, stage="kron", layers=[1])
    before = copy.deepcopy(model.state_dict())
    own = {name for name, p in model.named_parameters() if any(p is q for q in rewrite.beside_adapters(model))}
    assert own == {f"transformer.h.1.{name}" for name in (
        "ln_v.weight", "ln_v.bias", "attn.c_v.weight", "attn.out_map.weight", "attn.out_map.bias"
    )}  # fmt: skip
    result = finetune(model, text, None, rewrites=[rewrite], train="lora", steps=3, batch_tokens=128, rank=2)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert result.train == "lora" and own < moved and any("c_qk" in name for name in moved)


@torch.no_grad()
def test_beside_other_rewrites(original, text):
    """Layers are renumbered; each rewrite is fitted as if it were alone; queries keep their scale in another layer."""
    base = toy_gpt2(n_layer=4, n_embd=D, n_head=HEADS, scale_attn_by_inverse_layer_idx=True)
    records = [
        {"rewrite": "dropped_n", "layers": [1]},
        {"rewrite": "token_factored", "stage": "kron", "layers": [2, 3], "distill_steps": 2},
        {"rewrite": "soft_shared", "n": 2, "start": 2, "rank": 2},
        {"rewrite": "linformer", "block": 8, "layers": [3]},
    ]
    rewrites = [from_record(record).resolved(base.config) for record in records]
    found = apply(rewrites, base, alignment.identity(base.config), calibration=text)
    alone = apply(rewrites[1:2], base, alignment.identity(base.config), calibration=text)
    assert found.config.token_factored["layers"] == [1, 2] and torch.isfinite(found(text.ids).logits).all()
    for layer in (1, 2):
        one, other = (gpt2.attention(model, place) for model, place in ((found, layer), (alone, layer + 1)))
        assert torch.equal(one.c_v.weight, other.c_v.weight) and torch.equal(one.out_map.weight, other.out_map.weight)
        assert torch.equal(one.c_qk.weight[:, D:], other.c_qk.weight[:, D:])
        scaled = other.c_qk.weight[:, :D] * (layer + 1) / (layer + 2)
        assert torch.allclose(one.c_qk.weight[:, :D], scaled)


def test_exact_beside_a_removed_layer(original, text):
    records = [{"rewrite": "token_factored", "stage": "exact"}, {"rewrite": "dropped_n", "layers": [1]}]
    rewrites = [from_record(record).resolved(original.config) for record in records]
    found, alone = (
        apply(chosen, original, alignment.identity(original.config), calibration=text)
        for chosen in (rewrites, rewrites[1:])
    )
    assert torch.equal(found(text.ids).logits, alone(text.ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("stage", WHOLE)
def test_with_linear_biases_positions_are_no_tokens(original, text, stage):
    """Before a recovery the two together are what the stage alone is; what positions fade to stands in both streams
    only where wte takes it up, so that nothing moves when they are taken away."""
    records = [{"rewrite": "token_factored", "stage": stage}, {"rewrite": "alibi", "slopes": "geometric"}]
    rewrites = [from_record(record).resolved(original.config) for record in records]
    model = apply(rewrites, original, alignment.identity(original.config), calibration=text)
    ids = text.ids[:3]
    assert (model(ids).logits - made(original, text, stage=stage)(ids).logits).abs().max() < 1e-5
    rewrites[1].on_step(model, 1.0)
    before, streams = model(ids).logits.log_softmax(-1), gpt2.embed(model, ids)
    rewrites[1].finish(model)
    assert (model(ids).logits.log_softmax(-1) - before).abs().max() < 1e-4
    hidden = gpt2.embed(model, ids)
    assert (hidden - streams).abs().max() < 1e-6
    assert torch.equal(hidden[1], model.transformer.wte(ids))
    first = model.transformer.wpe.first
    assert (hidden[0] - hidden[1])[:, 1:].abs().max() == 0
    assert ((hidden[0] - hidden[1])[:, 0] - first).abs().max() < 1e-6 < first.abs().max()
    long = ids.repeat(1, 3)  # beyond n_positions
    full, cache = model(long).logits, model(long[:, :100], use_cache=True).past_key_values
    assert (model(long[:, 100:], past_key_values=cache).logits - full[:, 100:]).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"stage": "dense"}, "stage is 'dense'; allowed: exact, v_from_xt, kron_v, kron_o, kron, identity"),
        ({"layers": [6]}, r"layers is \[6\]; allowed: different layers from 0 to 5"),
        ({"layers": [1, 1]}, r"layers is \[1, 1\]"),
        ({"layers": []}, r"layers is \[\]"),
        ({"ridge": -0.1}, "ridge is -0.1; allowed: 0 or more"),
        ({"distill_steps": -1}, "distill_steps is -1; allowed: 0 or more"),
        ({"stage": "exact", "distill_steps": 1}, "distill_steps is 1 with stage exact; allowed: 0"),
        ({"distill_learning_rate": 0.0}, "distill_learning_rate is 0.0; allowed: above 0"),
    ],
)
def test_settings_that_are_refused(record, said):
    with pytest.raises(UserError, match=said) as caught:
        from_record({"rewrite": "token_factored", **record}).check(toy_config())
    assert "\n" not in str(caught.value)


def test_the_words_of_the_recipe_are_the_stages():
    for stage in WHOLE:
        assert from_record({"rewrite": "token_factored", "stage": stage}).stage == stage


def test_two_may_not_take_the_same_values(original, text):
    records = [{"rewrite": "token_factored"}, {"rewrite": "tversky", "targets": ["v"], "layers": [1]}]
    rewrites = [from_record(record).resolved(original.config) for record in records]
    with pytest.raises(UserError, match=r"both take over h\.1\.attn\.v"):
        apply(rewrites, original, alignment.identity(original.config), calibration=text)
