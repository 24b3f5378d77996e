"""Nested models: the whole is the original, what is cut out is what was trained, and each change of basis keeps all."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from toy import logits, toy_alignment, toy_blocks, toy_gpt2
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from compressor.errors import UserError
from compressor.finetune import finetune
from compressor.lora import attach, effective_tensors, merge
from compressor.metrics.flops import flops_per_token
from compressor.metrics.size import parameters
from compressor.modeling import GPT2CompressedLMHeadModel
from compressor.modeling.nesting import FULL, full_size, narrowed, reflected, size_of, sliced, to_plain
from compressor.models import build
from compressor.rewrites import from_record, nested_bases
from compressor.rewrites.compose import apply, structure
from compressor.rewrites.matryoshka import Matryoshka, chosen_by, trained_sizes
from compressor.rewrites.matryoshka_fit import neuron_activations, neuron_importance, stream_moments, width_gains

D, FF, LAYERS, HEADS = 32, 128, 6, 4
EVERYTHING = {
    "ffn": [0.5, 0.25], "width": [16, 24], "depth": [4, 2], "head": [16, 8], "train": "joint", "inner": 0.5,
}  # fmt: skip
PARTS = [{"ffn": [0.5, 0.25]}, {"depth": [3], "ffn": None}, {"head": [0.5], "ffn": None}, {"width": [0.5]}, EVERYTHING]
ODD = [
    {},
    {"n_inner": 40},
    {"scale_attn_by_inverse_layer_idx": True},
    {"scale_attn_weights": False},
    {"activation_function": "relu"},
    {"tie_word_embeddings": False},
]


def rewritten(rewrites, original):
    return apply(rewrites, original, toy_alignment(original), calibration=toy_blocks(original.config))


def nested(record, original=None, **changes):
    original = toy_gpt2(**changes) if original is None else original
    rewrite = from_record({"rewrite": "matryoshka", **record}).resolved(original.config)
    return (
        rewrite,
        original,
        apply([rewrite], original, toy_alignment(original), calibration=toy_blocks(original.config)),
    )


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 97, (3, 20), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def everything():
    return nested(EVERYTHING)


# ---------------------------------------------------------------- the whole


@pytest.mark.parametrize("record", PARTS, ids=lambda record: "+".join(key for key in record if key in FULL))
@pytest.mark.parametrize("changes", ODD, ids=lambda changes: str(*changes))
def test_the_whole_is_the_original(record, changes, ids):
    if changes.get("n_inner") and "width" in record:
        record = {**record, "width": [16]}
    _, original, model = nested(record, **changes)
    assert type(model) is GPT2CompressedLMHeadModel
    assert (logits(model, ids) - logits(original, ids)).abs().max() <= 1e-5


def test_the_whole_keeps_cache_padding_and_generation(everything, ids):
    _, original, model = everything
    ones, pads = torch.ones_like(ids), torch.zeros(3, 5, dtype=torch.int64)
    mask = torch.cat([pads, ones], 1)
    places = (mask.cumsum(1) - 1).clamp_min(0)
    left = logits(model, torch.cat([pads, ids], 1), attention_mask=mask, position_ids=places)
    assert (left[:, 5:] - logits(model, ids)).abs().max() <= 1e-4
    asked = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "attention_mask": ones}
    cached, fresh = (model.generate(ids, use_cache=use, **asked) for use in (True, False))
    assert torch.equal(cached, fresh) and torch.equal(cached, original.generate(ids, **asked))


def test_parameters_of_the_whole_equal_the_formula(everything):
    _, original, model = everything
    widths, depths = [32, 24, 16], [6, 4, 2]
    ffn = {FF * 3 // 4, FF // 2, FF // 4}  # with those of widths
    own = LAYERS * len(ffn) * D + LAYERS * 4 * (24 + 16) + D * D + D
    own += sum(2 * width for width in widths for depth in depths if (width, depth) != (32, 6))
    assert parameters(model) == parameters(original) + own


def test_a_fresh_process_opens_it_and_cuts_out_the_same(everything, ids, tmp_path):
    _, _, model = everything
    model.save_pretrained(tmp_path)
    code = (
        "import json, sys; sys.modules['compressor'] = None\n"
        "import torch; from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "ids = torch.tensor(json.loads(sys.argv[2]))\n"
        "print(json.dumps([m(ids).logits[0, -1].tolist() for m in (model, model.slice(width=0.5), model.slice(ffn=0.5,"
        " depth=4))]))"
    )
    run = [sys.executable, "-c", code, str(tmp_path), json.dumps(ids.tolist())]
    said = json.loads(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
    wanted = [logits(m, ids)[0, -1] for m in (model, model.slice(width=0.5), model.slice(ffn=0.5, depth=4))]
    assert (torch.tensor(said) - torch.stack(wanted)).abs().max() <= 1e-6


# ---------------------------------------------------------------- changes of basis, one by one


def _plain(original, parts):
    """A model of these parts, with an untied head where a map leads to it."""
    model = copy.deepcopy(original).double()
    config = copy.deepcopy(original.config)
    tensors = parts.tensors()
    weight, bias = tensors.pop("head_map.weight", None), tensors.pop("head_map.bias", None)
    config.tie_word_embeddings = False
    model = GPT2LMHeadModel(config).double().eval()
    state = {**model.state_dict()}
    for name in "qkv":
        assert any(f"c_attn.{name}." in key for key in tensors)
    for layer in range(config.n_layer):
        for kind in ("weight", "bias"):
            key = f"transformer.h.{layer}.attn.c_attn"
            tensors[f"{key}.{kind}"] = torch.cat([tensors.pop(f"{key}.{name}.{kind}") for name in "qkv"], -1)
    state |= tensors
    state["lm_head.weight"] = tensors["transformer.wte.weight"]
    offset = 0
    if weight is not None:  # coordinates: back by the reflection
        state["lm_head.weight"] = tensors["transformer.wte.weight"] @ weight
        offset = tensors["transformer.wte.weight"] @ bias
        state["transformer.wte.weight"] = reflected(tensors["transformer.wte.weight"])
    model.load_state_dict(state)
    return lambda ids: model(ids).logits + offset


@torch.no_grad()
def test_each_change_of_basis_keeps_the_function(ids):
    original = toy_gpt2()
    with torch.no_grad():
        for norm in [m for m in original.modules() if isinstance(m, torch.nn.LayerNorm)]:
            norm.weight.mul_(1 + torch.rand(D))
    exact = copy.deepcopy(original).double()(ids).logits
    streams = stream_moments(original, toy_blocks(original.config).batches())
    parts = nested_bases.parts_of(original)
    steps = {
        "neurons": lambda: nested_bases.order_neurons(parts, [torch.randperm(FF) for _ in range(LAYERS)]),
        "norms": lambda: nested_bases.fold_norms(parts),
        "heads": lambda: nested_bases.balance_heads(parts, streams.heads),
        "rotation": lambda: nested_bases.rotate(
            parts, nested_bases.principal_basis(sum(m / streams.tokens for m in streams.norms))
        ),
    }
    before = {key: value.clone() for key, value in parts.tensors().items()}
    for name, step in steps.items():
        step()
        after = parts.tensors()
        assert any(key not in before or (before[key] - value).abs().max() > 1e-3 for key, value in after.items()), (
            f"{name} did nothing"
        )
        assert (_plain(original, parts)(ids) - exact).abs().max() <= 1e-9, name
        before = {key: value.clone() for key, value in after.items()}


def test_the_reflection_swaps_the_last_axis_and_the_ones():
    for width in (2, 3, 16, 767):
        eye = torch.eye(width, dtype=torch.float64)
        matrix = reflected(eye)
        assert (matrix @ matrix - eye).abs().max() < 1e-12 and (matrix - matrix.T).abs().max() < 1e-12
        assert (matrix[-1] - width**-0.5).abs().max() < 1e-12
        plain = to_plain(torch.randn(5, width - 1, dtype=torch.float64))
        assert plain.shape == (5, width) and plain.sum(1).abs().max() < 1e-12
    x = torch.randn(4, 16, dtype=torch.float64)
    assert torch.equal(narrowed(x, 16), x)
    # what a narrow stream has is the projection on its coordinates: lengths and products are theirs
    y = torch.randn(4, 16, dtype=torch.float64)
    wanted = reflected(x)[:, :7] @ reflected(y)[:, :7].T
    assert (narrowed(x, 8) @ narrowed(y, 8).T - wanted).abs().max() < 1e-12


def test_the_first_coordinates_are_the_principal_ones():
    generator = torch.Generator().manual_seed(3)
    planted, _ = torch.linalg.qr(
        torch.cat([torch.ones(8, 1, dtype=torch.float64), torch.randn(8, 7, generator=generator).double()], 1)
    )
    spread = torch.tensor([0.0, 5, 1, 9, 3, 2, 7, 4], dtype=torch.float64)  # of the ones: nothing
    basis = nested_bases.principal_basis(planted @ torch.diag(spread) @ planted.T)
    order = [3, 6, 1, 7, 4, 5, 2, 0]
    assert ((planted[:, order].T @ basis).diagonal().abs() - 1).abs().max() < 1e-9
    assert (basis[:, -1].abs() - 8**-0.5).abs().max() < 1e-12


def test_balanced_heads_put_planted_directions_first():
    """Queries and keys of rank 2 within a width of 8: two dimensions are enough for every score."""
    original = toy_gpt2()
    width = D // HEADS
    with torch.no_grad():
        for block in original.transformer.h:
            for head in range(HEADS):
                columns = slice(head * width, (head + 1) * width)
                block.attn.c_attn.weight[:, columns] = torch.randn(D, 2) @ torch.randn(2, width)
                block.attn.c_attn.bias[columns] = 0
    parts = nested_bases.parts_of(original)
    nested_bases.balance_heads(parts, stream_moments(original, toy_blocks(original.config).batches()).heads)
    q, k = (parts.linears[0, f"attn.{leaf}"] for leaf in "qk")
    x = torch.randn(9, D, dtype=torch.float64)
    old = [torch.cat(original.transformer.h[0].attn.c_attn(x.float()).double().split(D, -1)[:2], 0)]
    queries, keys = old[0].chunk(2)
    for head in range(HEADS):
        columns, kept = slice(head * width, (head + 1) * width), slice(head * width, head * width + 2)
        exact = queries[:, columns] @ keys[:, columns].T
        short = (x @ q[0] + q[1])[:, kept] @ (x @ k[0] + k[1])[:, kept].T
        assert (short - exact).abs().max() <= 1e-3 * exact.abs().max()


# ---------------------------------------------------------------- what comes first, and what is made up for


def test_neurons_by_importance_and_the_mean_of_the_rest(ids):
    _, original, model = nested({"ffn": [0.5]})
    blocks = toy_blocks(original.config)
    taken = []
    hook = original.transformer.h[2].mlp.c_proj.register_forward_pre_hook(lambda m, x: taken.append(x[0].detach()))
    for rows, mask in blocks.batches():
        taken.append(mask)
        logits(original, rows)
    hook.remove()
    a = torch.cat([x[mask] for mask, x in zip(taken[::2], taken[1::2], strict=True)]).double()
    out = original.transformer.h[2].mlp.c_proj.weight.detach().double()
    importance = a.var(0, correction=0) * out.square().sum(1)
    order = importance.argsort(descending=True)
    ours = model.transformer.h[2].mlp.c_fc.weight
    assert torch.equal(ours, original.transformer.h[2].mlp.c_fc.weight[:, order])
    rest = order[FF // 2 :]
    wanted = a[:, rest].mean(0) @ out[rest]
    cut = model.slice(ffn=FF // 2)
    assert (
        cut.transformer.h[2].mlp.c_proj.bias - original.transformer.h[2].mlp.c_proj.bias - wanted
    ).abs().max() < 1e-5
    # the expected FFN output is kept
    kept = a[:, order[: FF // 2]].mean(0) @ out[order[: FF // 2]] + cut.transformer.h[2].mlp.c_proj.bias
    before = original.transformer.h[2].mlp.c_proj.bias
    assert (kept - a.mean(0) @ out - before).abs().max() < 1e-4


def test_importance_by_energy_counts_the_mean_too():
    activations = neuron_activations(toy_gpt2(), _context(toy_gpt2()))[0]
    out = torch.ones(FF, D, dtype=torch.float64)
    variance, energy = (neuron_importance(activations, out, kind) for kind in ("variance", "energy"))
    mean = activations.total / activations.tokens
    assert (energy - variance - D * mean.square()).abs().max() < 1e-9 and (mean.abs() > 1e-3).any()


def _context(model):
    from compressor.rewrites import FitContext

    generator = torch.Generator().manual_seed(0)
    return FitContext(model, toy_alignment(model), toy_blocks(model.config), generator, dict(enumerate(range(LAYERS))))


def test_gains_keep_the_size_of_coordinates():
    original = toy_gpt2()
    blocks = toy_blocks(original.config)
    streams = stream_moments(original, blocks.batches())
    basis = nested_bases.principal_basis(sum(m / streams.tokens for m in streams.norms))
    seen = []
    hook = original.transformer.h[3].ln_2.register_forward_pre_hook(lambda m, x: seen.append(x[0].detach()))
    for rows, _ in blocks.batches():
        logits(original, rows)
    hook.remove()
    x = torch.cat([h.flatten(0, 1) for h in seen]).double()[: streams.tokens]  # the pads stand at the end
    whole = torch.nn.functional.layer_norm(x, (D,), eps=1e-5) @ basis[:, :15]
    # of a LayerNorm over 16 numbers of mean 0, which are 15 coordinates, the mean square is 1
    assert abs(width_gains(streams, basis, 16)[7] - (whole.square().sum(1).mean() / 16).sqrt()) < 1e-4


def test_an_exit_is_the_least_squares_fit(everything, ids):
    """On the calibration text no other diagonal map of the state after two layers comes closer to the final one."""
    _, original, model = nested({"ffn": None, "depth": [2]})
    blocks, errors = toy_blocks(original.config), []
    norm = model.transformer.nesting.exits["2_32"]
    pairs = []
    for rows, mask in blocks.batches():
        with torch.no_grad():
            states = original.transformer(rows, output_hidden_states=True)
        pairs.append((states.hidden_states[2][mask], states.last_hidden_state[mask]))
    x, wanted = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    for change in (0.0, 0.05, -0.05):
        for which in ("weight", "bias"):
            tried = copy.deepcopy(norm)
            with torch.no_grad():
                getattr(tried, which).add_(change)
                errors.append((tried(x) - wanted).square().sum().item())
    assert min(errors) == errors[0] and errors[0] < min(errors[2:4])
    states = torch.nn.functional.layer_norm(x, (D,)).double()
    for number in range(D):
        table = torch.stack([states[:, number], torch.ones(len(states), dtype=torch.float64)], 1)
        best = torch.linalg.lstsq(table, wanted[:, number, None].double()).solution[:, 0]
        assert (torch.stack([norm.weight[number], norm.bias[number]]) - best).abs().max() < 1e-3


def test_exits_of_narrower_sizes_give_the_head_what_the_whole_one_gets():
    """Number by number the least-squares fit to what the whole model's head meets: its first coordinates in a narrower
    size, all of its last LayerNorm's output in a shorter one."""
    _, original, model = nested({"ffn": None, "width": [16], "depth": [3]})
    states: dict[int, list] = {3: [], 6: []}
    met, ends = [], []
    for rows, mask in toy_blocks(original.config).batches():
        with torch.no_grad():
            hooks = [
                model.transformer.h[3].register_forward_pre_hook(lambda m, x: states[3].append(x[0])),
                model.transformer.ln_f.register_forward_pre_hook(lambda m, x: states[6].append(x[0])),
                model.transformer.ln_f.register_forward_hook(lambda m, x, y: ends.append(y)),
                model.head_map.register_forward_hook(lambda m, x, y: met.append(y)),
            ]
            model(rows)
            for hook in hooks:
                hook.remove()
        for own in (*states.values(), met, ends):
            own[-1] = own[-1][mask].double()
    coordinates = to_plain(torch.cat(met)[:, :15])
    for depth, width, wanted in ((6, 16, coordinates), (3, 16, coordinates), (3, 32, torch.cat(ends))):
        norm = model.transformer.nesting.exits[f"{depth}_{width}"]
        x = torch.nn.functional.layer_norm(narrowed(torch.cat(states[depth]), width), (width,))
        for number in range(width):
            table = torch.stack([x[:, number], torch.ones(len(x), dtype=torch.float64)], 1)
            best = torch.linalg.lstsq(table, wanted[:, number, None]).solution[:, 0]
            assert (torch.stack([norm.weight[number], norm.bias[number]]) - best).abs().max() < 1e-3


# ---------------------------------------------------------------- slices

SIZES = [
    {"ffn": 0.5},
    {"ffn": 32, "depth": 4},
    {"depth": 2},
    {"width": 16},
    {"width": 24, "depth": 2, "ffn": 0.25},
    {"head": 8},
    {"head": 16, "ffn": 64, "depth": 4},
    {"ffn": [128, 128, 96, 64, 64, 32]},
    {"ffn": [32, 64], "depth": 2, "width": 0.5},
    {},
]


@pytest.mark.parametrize("choice", SIZES, ids=str)
class TestSlices:
    def test_is_what_is_trained(self, everything, choice, ids):
        """The slice as a training pass has it, gradients and all, against the model that is cut out and reloaded."""
        from compressor.nested_training import NestedObjective
        from compressor.rewrites.base import Nest

        _, _, model = everything
        size = size_of(model.config, **choice)
        objective = NestedObjective(model, None, 0.0, (), None, nest=Nest((size,), "joint", 0.0), seed=0)
        hidden, head = objective._slice(dict(model.named_parameters()), size, ids, None)
        cut = model.slice(**choice)
        assert (hidden @ head.T - logits(cut, ids)[:, :-1].flatten(0, 1)).abs().max() <= 2e-6

    def test_is_saved_as_it_is(self, everything, choice, ids, tmp_path):
        cut = everything[2].slice(**choice)
        alone = copy.deepcopy(cut)
        for parameter in alone.parameters():
            parameter.data = parameter.data.contiguous()
        alone.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        state = again.state_dict()
        assert type(again) is type(cut) and state.keys() == cut.state_dict().keys()
        assert all(torch.equal(value, state[key]) for key, value in cut.state_dict().items())
        assert (logits(again, ids) - logits(cut, ids)).abs().max() <= 1e-6  # where numbers lie changes their rounding

    def test_is_what_the_rewrite_cuts_out_at_once(self, everything, choice, ids):
        if choice:
            rewrite, original, model = nested({**EVERYTHING, "only": choice}, everything[1])
            assert (logits(model, ids) - logits(everything[2].slice(**choice), ids)).abs().max() <= 1e-6
            assert parameters(model) == parameters(build(structure([rewrite], original.config)))

    def test_is_plain_where_it_can_be(self, everything, choice):
        cut = everything[2].slice(**choice)
        uniform = not isinstance(choice.get("ffn"), list)
        narrow = choice.get("width") is not None
        assert (type(cut) is GPT2LMHeadModel) is (uniform and narrow)  # the whole width is rotated here

    def test_generates_with_a_cache(self, everything, choice, ids):
        cut = everything[2].slice(**choice)
        asked = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
        assert torch.equal(cut.generate(ids, use_cache=True, **asked), cut.generate(ids, use_cache=False, **asked))

    def test_folds(self, everything, choice, ids):
        rewrite, _, model = everything
        cut = model.slice(**choice)
        plain = rewrite.fold(cut)
        if plain is None:
            assert type(cut) is GPT2LMHeadModel
        else:
            assert type(plain) is GPT2LMHeadModel
            assert (logits(plain, ids) - logits(cut, ids)).abs().max() <= 1e-5

    def test_no_token_sees_a_later_one(self, everything, choice, ids):
        cut = everything[2].slice(**choice)
        changed = ids.clone()
        changed[:, 12] = (changed[:, 12] + 1) % 97
        assert (logits(cut, changed)[:, :12] - logits(cut, ids)[:, :12]).abs().max() <= 1e-6


def test_without_another_basis_uniform_slices_are_plain_and_share_memory():
    _, _, model = nested({"ffn": [0.5], "depth": [3]})
    cut = model.slice(ffn=0.5, depth=3)
    assert type(cut) is GPT2LMHeadModel and cut.config.n_inner == 64 and cut.config.n_layer == 3
    mine = {p.untyped_storage().data_ptr() for p in model.parameters()}
    own = [p for p in cut.parameters() if p.untyped_storage().data_ptr() not in mine]
    assert sum(p.numel() for p in own) == 3 * D  # biases with what the missing neurons add


def test_a_narrow_model_by_hand(ids):
    """Width 16 of 32 by explicit matrices: projection of the stream, prefixes of heads, the scale of the scores."""
    _, _, model = nested({"width": [16], "ffn": None})
    state = {key: value.double() for key, value in model.state_dict().items()}
    mirror, small = reflected(torch.eye(D, dtype=torch.float64)), reflected(torch.eye(16, dtype=torch.float64))
    keep = mirror[:, :15] @ small[:15]  # [32, 16]
    nest, attn, mlp = "transformer.nesting.", "transformer.h.0.attn.", "transformer.h.0.mlp."
    x = state["transformer.wte.weight"][ids][..., :15] @ small[:15] + state["transformer.wpe.weight"][:20] @ keep

    def norm(x, key):
        return torch.nn.functional.layer_norm(x, (16,), state[f"{key}.weight"], state[f"{key}.bias"], 1e-5)

    y = norm(x, f"{nest}norms.16.0.ln_1") @ keep.T @ state[f"{attn}c_attn.weight"] + state[f"{attn}c_attn.bias"]
    mixed = []
    for head in range(HEADS):
        q, k, v = (part[..., head * 8 : head * 8 + 4] for part in y.split(D, -1))  # 4 of 8 dimensions
        scores = q @ k.transpose(1, 2) / 8**0.5  # the whole model's scale
        scores = scores.masked_fill(torch.ones(20, 20).triu(1).bool(), -torch.inf)
        mixed.append(scores.softmax(-1) @ v @ state[f"{attn}c_proj.weight"][head * 8 : head * 8 + 4])
    x = x + (sum(mixed) + state[f"{attn}c_proj.bias"]) @ keep
    h = norm(x, f"{nest}norms.16.0.ln_2") @ keep.T @ state[f"{mlp}c_fc.weight"] + state[f"{mlp}c_fc.bias"]
    h = torch.nn.functional.gelu(h, approximate="tanh")[..., :64]
    out = h @ state[f"{mlp}c_proj.weight"][:64] + state[f"{mlp}c_proj.bias"] + state[f"{nest}ffn_bias.0.64"]
    x = x + out @ keep
    cut = model.slice(width=16)
    with torch.no_grad():
        assert (cut.transformer(ids, output_hidden_states=True).hidden_states[1] - x).abs().max() < 1e-5


def test_counts_of_gpt2_small():
    """systems.md 5.4: without any weights."""
    from transformers import GPT2Config

    def millions(**only):
        record = {"rewrite": "matryoshka", "ffn": [0.5, 0.25, 0.125], "width": [384, 192, 96], "only": only}
        rewrite = from_record(record)
        rewrite.check(GPT2Config())
        return round(parameters(build(structure([rewrite.resolved(GPT2Config())], GPT2Config()))) / 1e6, 2)

    assert [millions(width=w) for w in (384, 192, 96)] == [40.99, 15.18, 6.27]
    narrow = {"rewrite": "matryoshka", "ffn": [0.5, 0.25, 0.125]}
    found = []
    for share in (0.5, 0.25, 0.125):
        rewrite = from_record({**narrow, "only": {"ffn": share}}).resolved(GPT2Config())
        found.append(round(parameters(build(structure([rewrite], GPT2Config()))) / 1e6, 2))
    assert found == [96.11, 81.94, 74.86]


def test_operations_of_slices(everything):
    _, original, model = everything
    whole, head = flops_per_token(original), flops_per_token(model.slice(head=8))
    assert flops_per_token(model) == whole + 2 * D * D
    assert head == whole - 2 * (D - 8) * 97 + 2 * D * 8
    mixed = flops_per_token(model.slice(ffn=[128, 64, 64, 64, 32, 32]))
    assert mixed == whole + 2 * D * D - 4 * D * (3 * 64 + 2 * 96)


# ---------------------------------------------------------------- recovery


def test_gradients_of_a_step_are_those_of_its_models(everything, ids):
    """The loss of all sizes against that of the models that are cut out, each run on its own."""
    from compressor.nested_training import NestedObjective

    rewrite, _, model = everything
    model = copy.deepcopy(model)
    nest = rewrite.nest(model)
    assert nest.sizes[0] == full_size(model.config) and len(nest.sizes) == 1 + 2 + 2 + 2 + 2
    loss, sums, _ = NestedObjective(model, None, 0.0, (), None, nest=nest, seed=0)(ids, None, False)
    loss.backward()
    found = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    count = ids[:, 1:].numel()
    expected, whole = 0.0, model(ids).logits[:, :-1].log_softmax(-1)
    taught = whole.detach()
    for index, size in enumerate(nest.sizes):
        cut = model.slice(**chosen_by(size, D))
        tensors = sliced(dict(model.named_parameters()), model.config, size)
        predicted = torch.func.functional_call(cut, tensors, (ids,), tie_weights=True).logits[:, :-1].log_softmax(-1)
        predicted = whole if index == 0 else predicted
        nll = -predicted.gather(-1, ids[:, 1:, None]).sum()
        divergence = (taught.exp() * (taught - predicted)).sum()
        expected = expected + (nll if index == 0 else 0.5 * nll + 0.5 * divergence)
    expected = expected / len(nest.sizes)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert sums[0] / count < 10
    expected.backward()
    for key, parameter in model.named_parameters():
        wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert (found.get(key, torch.zeros(())) - wanted).abs().max() <= 1e-4 * (1 + wanted.abs().max()), key
    idle = [key for key, p in model.named_parameters() if key not in found or found[key].abs().sum() == 0]
    # nobody takes a width together with a smaller depth, nor the neurons of the widest narrow model apart
    assert all("exits" in key for key in idle), idle


@pytest.mark.parametrize(("mix", "inner"), [(None, 0.25), (0.25, 0.0), (0.25, 0.75)])
def test_whom_a_size_that_is_taken_alone_learns_from(mix, inner, ids):
    """From the teacher with `mix` where there is one, whatever `inner` is; else from the whole size with `inner`, which
    no gradient reaches by that way."""
    from compressor.nested_training import NestedObjective

    rewrite, _, model = nested({"ffn": [0.5], "train": "one", "inner": inner})
    teacher = None if mix is None else toy_gpt2(seed=9)
    taught = logits(model if teacher is None else teacher, ids)[:, :-1].double().log_softmax(-1)
    objective = NestedObjective(model, teacher, mix or 0.0, (), None, nest=rewrite.nest(model), seed=0)
    whole, small = rewrite.nest(model).sizes
    for size in (small, whole):
        objective.sizes = (size,)
        loss, sums, _ = objective(ids, None, False)
        cut = model if size == whole else model.slice(ffn=0.5)
        predicted = logits(cut, ids)[:, :-1].double().log_softmax(-1)
        nll = -predicted.gather(-1, ids[:, 1:, None]).sum().item()
        divergence = (taught.exp() * (taught - predicted)).sum().item()
        share = mix if teacher is not None else 0.0 if size == whole else inner
        assert loss.item() == pytest.approx((1 - share) * nll + share * divergence, rel=1e-5)
        assert sums.tolist() == pytest.approx([nll, divergence if share else 0.0], rel=1e-4)
        model.zero_grad()
        loss.backward()
        rest = model.transformer.h[0].mlp.c_proj.weight.grad[FF // 2 :]
        assert bool(rest.any()) == (size == whole)


def test_pads_are_neither_predicted_nor_learned_from(everything, ids):
    """A row with pads behind it is that row alone, in every size, towards a teacher or the whole one."""
    from compressor.nested_training import NestedObjective

    rewrite, original, model = everything
    mask = (torch.arange(20) < 12)[None]
    for teacher in (None, original):
        objective = NestedObjective(model, teacher, 0.5 if teacher else 0.0, (), None, nest=rewrite.nest(model), seed=0)
        with torch.no_grad():
            padded, alone = objective(ids[:1], mask, False), objective(ids[:1, :12], None, False)
        assert padded[0].item() == pytest.approx(alone[0].item(), rel=1e-5)
        assert padded[1].tolist() == pytest.approx(alone[1].tolist(), rel=1e-5)


def test_sizes_drop_what_the_whole_one_drops(ids):
    from compressor.nested_training import NestedObjective

    rewrite, _, model = nested({"ffn": [0.5]}, resid_pdrop=0.5)
    objective = NestedObjective(model, None, 0.0, (), None, nest=rewrite.nest(model), seed=0)
    objective.sizes = rewrite.nest(model).sizes[1:]
    with torch.no_grad():
        still, dropped = ([objective.train(on)(ids, None, False)[0].item() for _ in range(2)] for on in (False, True))
    assert still[0] == still[1] and dropped[0] != dropped[1]


def test_with_teacher_the_whole_size_learns_from_it(ids):
    rewrite, original, model = nested({"ffn": [0.5]})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    blocks = toy_blocks(original.config)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    result = finetune(model, blocks, None, rewrites=[rewrite], train="full", steps=3, batch_tokens=256,
                      teacher=original, mix=1.0, learning_rate=1e-3)  # fmt: skip
    assert all(row.divergence is not None and row.divergence > 0 for row in result.curve)
    assert any(not torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("train", ["full", "lora"])
def test_recovery_helps_every_size_and_is_what_is_judged(train, tmp_path):
    rewrite, original, model = nested({"ffn": [0.25], "depth": [3], "head": [16]})
    blocks = toy_blocks(original.config, rows=32)
    before = copy.deepcopy(model.state_dict())
    result = finetune(model, blocks, blocks, rewrites=[rewrite], train=train, steps=30, batch_tokens=512,
                      learning_rate=3e-3)  # fmt: skip
    apart = [key for key in before if "nesting" in key or "head_map" in key]
    still = [key for key in apart if torch.equal(model.state_dict()[key], before[key])]
    assert len(apart) == LAYERS + 2 + 2 and not still, "beside adapters too"
    assert result.evaluations[-1].nll < result.evaluations[0].nll - 0.05
    sizes = trained_sizes(model.config)
    mean = 0.0
    for size in sizes:
        cut = model.slice(ffn=list(size.ffn), depth=size.depth, head=size.head)
        total = 0.0
        for rows, mask in blocks.batches():
            scores = logits(cut, rows)[:, :-1].log_softmax(-1).gather(-1, rows[:, 1:, None])[..., 0]
            total -= scores[mask[:, 1:]].double().sum().item()
        mean += total / int(blocks.mask[:, 1:].sum()) / len(sizes)
    best = min(row.nll for row in result.evaluations)
    assert best == pytest.approx(mean, rel=1e-5)


def test_adapters_count_in_every_size(everything, ids):
    _, _, model = everything
    model = copy.deepcopy(model)
    attach(model, rank=2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "low_rank_b" in name:
                parameter.normal_(std=0.1)
    tensors = {key: value.detach().clone() for key, value in effective_tensors(model).items()}
    before = sliced(tensors, model.config, size_of(model.config, width=16))
    merge(model)
    assert tensors.keys() - dict(model.named_parameters()).keys() <= {"lm_head.weight"}
    after = sliced(dict(model.named_parameters()), model.config, size_of(model.config, width=16))
    assert max((before[key] - after[key]).abs().max().item() for key in after) < 1e-5


def test_the_sandwich_takes_three_and_follows_from_the_seed(everything):
    from compressor.nested_training import NestedObjective
    from compressor.rewrites.base import Nest

    _, _, model = everything
    sizes = tuple(trained_sizes(model.config))

    def drawn(seed, train="sandwich"):
        objective = NestedObjective(model, None, 0.0, (), None, nest=Nest(sizes, train, 0.5), seed=seed)
        found = []
        for step in range(20):
            objective.begin_step(step)
            found.append(objective.sizes)
        return found

    one = drawn(0, "one")
    turns = [one[start : start + len(sizes)] for start in range(0, 2 * len(sizes), len(sizes))]
    assert all(sorted(own) == sorted((size,) for size in sizes) for own in turns) and turns[0] != turns[1]
    first = drawn(0)
    assert first == drawn(0) != drawn(1)
    smallest = size_of(model.config, width=16)
    assert all(len(own) == 3 and own[0] == sizes[0] and smallest in own for own in first)
    assert set().union(*first) == set(sizes)


@pytest.mark.parametrize(
    "record",
    [
        {"ffn": None, "head": [24, 16, 8, 4]},
        {"ffn": [0.5, 0.25], "depth": [4, 2]},
        {"ffn": [0.5, 0.125], "depth": [5, 4]},
        {"ffn": [0.5, 0.125], "width": [24], "depth": [5]},
    ],
    ids=str,
)
def test_the_smallest_of_the_sandwich_is_that_of_the_fewest_operations(record):
    from compressor.nested_training import NestedObjective

    rewrite, _, model = nested({**record, "train": "sandwich"})
    objective = NestedObjective(model, None, 0.0, (), None, nest=rewrite.nest(model), seed=0)
    whole, *smaller = trained_sizes(model.config)
    work = {size: flops_per_token(model.slice(**chosen_by(size, D))) for size in smaller}
    assert len(set(work.values())) == len(work) > 2
    for step in range(9):
        objective.begin_step(step)
        assert objective.sizes[0] == whole and min(work, key=work.get) in objective.sizes


def test_an_interrupted_recovery_goes_on_as_if_nothing_had_been(tmp_path):
    from compressor.artifacts import provenance
    from compressor.finetune import StateFolder

    def recovered(stop=None):
        rewrite, original, model = nested({"ffn": [0.5], "depth": [3], "head": [16], "train": "sandwich"})
        blocks = toy_blocks(original.config)
        origin = provenance(seed=0, base_model="toy", base_hash="0", data={}, device="cpu", dtype="float32")
        folder = StateFolder(tmp_path / "state", origin)
        asked = {"rewrites": [rewrite], "train": "full", "steps": 6, "batch_tokens": 256, "learning_rate": 1e-3}

        def halt(step):
            if stop is not None and step.step == stop:
                raise KeyboardInterrupt

        if stop is None:
            return model, finetune(model, blocks, blocks, **asked)
        with pytest.raises(KeyboardInterrupt):
            finetune(model, blocks, blocks, state_folder=folder, checkpoint_every=2, progress=halt, **asked)
        rewrite, original, model = nested({"ffn": [0.5], "depth": [3], "head": [16], "train": "sandwich"})
        other = {**asked, "rewrites": [dataclasses.replace(rewrite, inner=0.5)]}
        with pytest.raises(UserError, match="rewrites"):
            finetune(model, blocks, blocks, state_folder=folder, resume=True, **other)
        return model, finetune(model, blocks, blocks, state_folder=folder, resume=True, **asked)

    (straight, _), (resumed, _) = recovered(), recovered(stop=5)
    other = resumed.state_dict()
    assert all(torch.equal(value, other[key]) for key, value in straight.state_dict().items())


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"ffn": [1.5]}, "shares of it"),
        ({"ffn": [128]}, "1 to 127"),
        ({"ffn": [64, 0.5]}, "different whole numbers"),
        ({"ffn": ["half"]}, "'half'"),
        ({"ffn": [0.3]}, "whole"),
        ({"width": [18]}, "multiples of the 4 heads"),
        ({"width": [4]}, "from 8 to 31"),
        ({"depth": [6]}, "1 to 5"),
        ({"head": [True]}, "True"),
        ({"ffn": None}, "no smaller size"),
        ({"inner": 1.5}, "0 to 1"),
        ({"only": {}}, "only"),
        ({"only": {"ff": 2}}, "mapping of ffn, width, depth, head"),
        ({"only": {"ffn": 7}}, "allowed: 128, 64, 32, 16"),
        ({"only": {"ffn": [64]}}, "one for each of 6 layers"),
        ({"width": [16], "head": [8], "only": {"width": 16, "head": 8}}, "whole width"),
    ],
)
def test_bad_sizes_are_refused_in_one_line(record, said):
    with pytest.raises(UserError) as error:
        from_record({"rewrite": "matryoshka", **record}).check(toy_gpt2().config)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_slicing_what_is_not_nested(everything):
    _, _, model = everything
    with pytest.raises(ValueError, match="ffn is 48; allowed: 128, 96, 64, 32"):
        model.slice(ffn=48)
    with pytest.raises(ValueError, match="slice already"):
        model.slice(ffn=[64] * 5 + [32]).slice(ffn=32)
    with pytest.raises(ValueError, match="allowed: 128"):
        model.slice(head=16).slice(ffn=64)
    original = toy_gpt2()
    shared = rewritten([from_record({"rewrite": "soft_shared", "n": 3, "rank": 2}).resolved(original.config)], original)
    with pytest.raises(ValueError, match="no smaller models"):
        shared.slice(ffn=64)


def _soft():
    original = toy_gpt2()
    rewrite = from_record({"rewrite": "soft_shared", "n": 3, "rank": 2}).resolved(original.config)
    return (
        rewrite,
        original,
        apply([rewrite], original, toy_alignment(original), calibration=toy_blocks(original.config)),
    )


def test_it_takes_the_whole_model():
    original = toy_gpt2()
    streams = {"rewrite": "token_factored", "stage": "exact"}
    window, dropped = {"rewrite": "soft_shared", "n": 2}, {"rewrite": "dropped_n", "layers": [1]}
    for other in ({"rewrite": "alibi"}, window, streams, dropped):
        rewrites = [Matryoshka().resolved(original.config), from_record(other).resolved(original.config)]
        with pytest.raises(UserError, match="both take over"):
            rewritten(rewrites, original)
