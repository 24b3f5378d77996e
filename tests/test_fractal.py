"""Models side by side in one: the whole is the original, what is cut out is what was trained, each on its own rows."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from toy import logits, toy_alignment, toy_blocks, toy_gpt2
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from compressor.checkpoint_config import check_config
from compressor.correlation import SecondMoments
from compressor.errors import UserError
from compressor.finetune import finetune
from compressor.lora import attach, effective_tensors, merge
from compressor.metrics.cache import cache_bytes
from compressor.metrics.flops import flops_per_token
from compressor.metrics.size import parameters
from compressor.modeling import GPT2CompressedLMHeadModel
from compressor.modeling.fractal import Part, parted, parts_of_levels
from compressor.models import build
from compressor.rewrites import fractal_fit, from_record, nested_bases
from compressor.rewrites.compose import apply, structure

D, FF, LAYERS, HEADS, WIDTH = 32, 128, 6, 4, 8
ODD = [
    {},
    {"n_inner": 40},
    {"scale_attn_by_inverse_layer_idx": True},
    {"scale_attn_weights": False},
    {"activation_function": "relu"},
    {"tie_word_embeddings": False},
]


def divided(record=None, original=None, **changes):
    original = toy_gpt2(**changes) if original is None else original
    rewrite = from_record({"rewrite": "fractal", **(record or {})}).resolved(original.config)
    calibration = toy_blocks(original.config)
    return rewrite, original, apply([rewrite], original, toy_alignment(original), calibration=calibration)


def moved(model, seed=0):
    """With every number that is a part's alone at another than it begins at."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".parts." in key:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 97, (4, 20), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def made():
    rewrite, original, model = divided()
    return rewrite, original, moved(model)


PARTS = [(1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (2, 3)]

# ---------------------------------------------------------------- the whole


@pytest.mark.parametrize("record", [{}, {"groups": "mixed"}, {"split": 4, "levels": 1}], ids=str)
@pytest.mark.parametrize("changes", ODD, ids=lambda changes: str(*changes))
def test_the_whole_is_the_original(record, changes, ids):
    rewrite, original, model = divided(record, **changes)
    assert type(model) is GPT2CompressedLMHeadModel
    assert (logits(model, ids) - logits(original, ids)).abs().max() <= 1e-5
    assert not torch.equal(model.transformer.h[0].mlp.c_fc.weight, original.transformer.h[0].mlp.c_fc.weight)
    plain = rewrite.fold(model)
    assert type(plain) is GPT2LMHeadModel and torch.equal(logits(plain, ids), logits(model, ids))


def test_heads_and_neurons_are_all_there_in_another_order(made):
    """Each layer's, once: of attention q, k and v of a head move together with its rows of c_proj."""
    _, original, model = made
    for old, new in zip(original.transformer.h, model.transformer.h, strict=True):
        rows = torch.cat([old.mlp.c_fc.weight.T, old.mlp.c_fc.bias[:, None], old.mlp.c_proj.weight], 1)
        ours = torch.cat([new.mlp.c_fc.weight.T, new.mlp.c_fc.bias[:, None], new.mlp.c_proj.weight], 1)
        assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, ours.tolist()))
        heads = [
            {
                tuple(
                    torch.cat(
                        [
                            block.attn.c_attn.weight.view(D, 3, HEADS, WIDTH)[:, :, head].flatten(),
                            block.attn.c_attn.bias.view(3, HEADS, WIDTH)[:, head].flatten(),
                            block.attn.c_proj.weight.view(HEADS, WIDTH, D)[head].flatten(),
                        ]
                    ).tolist()
                )
                for head in range(HEADS)
            }
            for block in (old, new)
        ]
        assert heads[0] == heads[1] and len(heads[0]) == HEADS


def test_parts_of_a_level_make_up_the_whole(made, ids):
    """Without what is theirs alone, what the parts of a level add to one residual stream sums up to the whole's."""
    model = divided(original=made[1])[2]
    x = torch.randn(2, 9, D, generator=torch.Generator().manual_seed(2))
    block = model.transformer.h[3]
    with torch.no_grad():
        for level, count in ((1, 2), (2, 4)):
            cut = [model.part(level, place).transformer.h[3] for place in range(count)]
            mixed = sum(own.mlp(x) - own.mlp.c_proj.bias for own in cut) + block.mlp.c_proj.bias
            assert (mixed - block.mlp(x)).abs().max() <= 1e-5
            mixed = sum(own.attn(x)[0] - own.attn.c_proj.bias for own in cut) + block.attn.c_proj.bias
            assert (mixed - block.attn(x)[0]).abs().max() <= 1e-5


def test_a_level_lies_within_the_one_before(made):
    model = made[2]
    for place in range(4):
        outer, inner = model.part(1, place // 2), model.part(2, place)
        columns = slice(place % 2 * FF // 4, (place % 2 + 1) * FF // 4)
        assert torch.equal(outer.transformer.h[2].mlp.c_fc.weight[:, columns], inner.transformer.h[2].mlp.c_fc.weight)


# ---------------------------------------------------------------- a part


@pytest.mark.parametrize("part", PARTS, ids=str)
class TestParts:
    def test_by_hand(self, made, part, ids):
        """The whole block with explicit matrices of the part's heads and neurons and its biases."""
        model = made[2]
        state = {key: value.double() for key, value in model.state_dict().items()}
        level, place = part
        share, own = 2**level, f"transformer.parts.{level}_{place}."
        x = state["transformer.wte.weight"][ids] + state["transformer.wpe.weight"][: ids.shape[1]]

        def norm(x, key):
            return torch.nn.functional.layer_norm(x, (D,), state[f"{key}.weight"], state[f"{key}.bias"], 1e-5)

        for layer in range(LAYERS):
            h, mine = f"transformer.h.{layer}.", f"{own}layers.{layer}."
            y = norm(x, f"{h}ln_1") @ state[f"{h}attn.c_attn.weight"] + state[f"{h}attn.c_attn.bias"]
            added = 0
            for head in range(HEADS):
                if head * share // HEADS == place:
                    columns = slice(head * WIDTH, (head + 1) * WIDTH)
                    q, k, v = (tensor[..., columns] for tensor in y.split(D, -1))
                    scores = (q @ k.transpose(1, 2) / WIDTH**0.5).masked_fill(
                        torch.ones(20, 20).triu(1).bool(), -torch.inf
                    )
                    added = added + scores.softmax(-1) @ v @ state[f"{h}attn.c_proj.weight"][columns]
            x = x + added + state[f"{h}attn.c_proj.bias"] + state[f"{mine}attention"]
            a = norm(x, f"{h}ln_2") @ state[f"{h}mlp.c_fc.weight"] + state[f"{h}mlp.c_fc.bias"]
            a = torch.nn.functional.gelu(a, approximate="tanh") * (torch.arange(FF) * share // FF == place)
            added = a @ state[f"{h}mlp.c_proj.weight"]
            x = x + added + state[f"{h}mlp.c_proj.bias"] + state[f"{mine}ffn"]
        wanted = norm(x, f"{own}ln_f") @ state["transformer.wte.weight"].T
        assert (logits(model.part(*part), ids) - wanted).abs().max() <= 1e-4

    def test_is_what_is_trained(self, made, part, ids):
        from compressor.fractal_training import DividedObjective

        rewrite, _, model = made
        objective = DividedObjective(model, None, 0.0, (), None, divided=rewrite.nest(model))
        hidden = objective._part_states(dict(model.named_parameters()), Part(*part), ids, None)
        head = model.transformer.wte.weight
        assert (hidden @ head.T - logits(model.part(*part), ids)[:, :-1].flatten(0, 1)).abs().max() <= 2e-6

    def test_is_saved_as_it_is(self, made, part, ids, tmp_path):
        cut = made[2].part(*part)
        for parameter in cut.parameters():
            parameter.data = parameter.data.contiguous()
        cut.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert type(again) is type(cut) is GPT2CompressedLMHeadModel
        assert torch.equal(logits(again, ids), logits(cut, ids))

    def test_cache_and_padding(self, made, part, ids):
        cut = made[2].part(*part)
        asked = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
        assert torch.equal(cut.generate(ids, use_cache=True, **asked), cut.generate(ids, use_cache=False, **asked))
        full, pads = logits(cut, ids), torch.zeros(len(ids), 5, dtype=torch.int64)
        mask = torch.cat([pads, torch.ones_like(ids)], 1)
        left = logits(
            cut, torch.cat([pads, ids], 1), attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)
        )
        assert (left[:, 5:] - full).abs().max() <= 1e-4
        with torch.no_grad():
            cache = cut(ids, use_cache=True).past_key_values
        assert sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) == 4 * cache_bytes(cut.config, 20)

    def test_no_token_sees_a_later_one(self, made, part, ids):
        cut, changed = made[2].part(*part), ids.clone()
        changed[:, 12] = (changed[:, 12] + 1) % 97
        before, after = logits(cut, ids), logits(cut, changed)
        assert (after[:, :12] - before[:, :12]).abs().max() <= 1e-6 < (after[:, 12:] - before[:, 12:]).abs().max()

    def test_folds(self, made, part, ids):
        cut = made[2].part(*part)
        plain = made[0].fold(cut)
        assert type(plain) is GPT2LMHeadModel and plain.config.n_head == HEADS // 2 ** part[0]
        assert (logits(plain, ids) - logits(cut, ids)).abs().max() <= 1e-5

    def test_counts_by_formula(self, made, part):
        cut, share = made[2].part(*part), 2 ** part[0]
        d, ff = D // share, FF // share
        layer = 4 * D * d + 3 * d + D + 2 * D * ff + ff + D + 4 * D
        assert parameters(cut) == (97 + 64) * D + LAYERS * layer + 2 * D
        flops = flops_per_token(cut, 20)
        assert flops == LAYERS * (8 * D * d + 4 * D * ff + 2 * 20 * d) + 2 * D * 97
        cut.set_attn_implementation("eager")
        with FlopCounterMode(display=False) as counter:
            logits(cut, torch.ones(1, 20, dtype=torch.int64))
        assert flops == counter.get_total_flops() / 20 - LAYERS * 2 * 20 * d  # it counts what no token sees too


def test_memory_is_the_whole_models_where_it_can_be(made):
    model = made[2]
    cut = model.part(2, 3)
    mine = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    own = {key for key, parameter in cut.named_parameters() if parameter.untyped_storage().data_ptr() not in mine}
    linears = ("attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.bias", "mlp.c_proj.bias")
    assert own == {f"transformer.h.{layer}.{name}" for layer in range(LAYERS) for name in linears}


def test_counts_of_gpt2_small():
    rewrite = from_record({"rewrite": "fractal"})
    whole = build(structure([rewrite], GPT2Config()))
    assert parameters(whole) - parameters(build(GPT2Config())) == 6 * (12 * 2 * 768 + 2 * 768)


@pytest.mark.parametrize("changes", ODD, ids=lambda changes: str(*changes))
def test_parts_of_odd_models_fold(changes, ids):
    rewrite, _, model = divided({"split": 4, "levels": 1}, **changes)
    cut = moved(model).part(1, 2)
    assert (logits(rewrite.fold(cut), ids) - logits(cut, ids)).abs().max() <= 1e-5


def test_a_fresh_process_opens_it_and_cuts_out_the_same(made, ids, tmp_path):
    model = made[2]
    model.save_pretrained(tmp_path)
    code = (
        "import json, sys; sys.modules['compressor'] = None\n"
        "import torch; from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "ids = torch.tensor(json.loads(sys.argv[2]))\n"
        "cut = [model.part(1, 1), model.part(2, 2)]\n"
        "cut[1].save_pretrained(sys.argv[1] + '/cut')\n"
        "cut.append(AutoModelForCausalLM.from_pretrained(sys.argv[1] + '/cut', trust_remote_code=True))\n"
        "print(json.dumps([m(ids).logits[0, -1].tolist() for m in (model, *cut)]))"
    )
    run = [sys.executable, "-c", code, str(tmp_path), json.dumps(ids.tolist())]
    answer = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    models = (model, model.part(1, 1), model.part(2, 2), model.part(2, 2))
    wanted = torch.stack([logits(m, ids)[0, -1] for m in models])
    assert (torch.tensor(json.loads(answer.stdout)) - wanted).abs().max() <= 1e-6


# ---------------------------------------------------------------- recovery


@pytest.mark.parametrize("share", ["own", "all"])
@pytest.mark.parametrize("inner", [0.0, 0.25])
def test_gradients_of_a_step_are_those_of_its_models_on_their_rows(made, ids, share, inner):
    """Loss and gradients against those of models that are built by hand from `parted` and run on their own."""
    from compressor.fractal_training import DividedObjective

    _, original, _ = made
    rewrite, _, model = divided({"share": share, "inner": inner}, original)
    moved(model)
    stream = torch.tensor([2, 0, 1, 2])
    objective = DividedObjective(model, None, 0.0, (), None, divided=rewrite.nest(model))
    loss, _, _ = objective(ids, None, stream if share == "own" else None, False)
    loss.backward()
    found = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    model.zero_grad()
    whole = model(ids).logits[:, :-1].double().log_softmax(-1)
    expected = -whole.gather(-1, ids[:, 1:, None]).sum()
    rows_of = {(1, 0): [1, 2], (1, 1): [0, 3], (2, 0): [1], (2, 1): [2], (2, 2): [0, 3], (2, 3): []}
    for part in PARTS:
        rows = rows_of[part] if share == "own" else [0, 1, 2, 3]
        cut = model.part(*part)
        own = torch.func.functional_call(
            cut, parted(dict(model.named_parameters()), model.config, Part(*part)), (ids[rows],), tie_weights=True
        ) if rows else None  # fmt: skip
        if rows:
            predicted = own.logits[:, :-1].double().log_softmax(-1)
            nll = -predicted.gather(-1, ids[rows, 1:][..., None]).sum()
            teacher = whole[rows].detach()
            divergence = (teacher.exp() * (teacher - predicted)).sum()
            weight = 2 ** part[0] if share == "own" else 1
            expected = expected + weight * ((1 - inner) * nll + inner * divergence)
    expected = expected / 7
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for key, parameter in model.named_parameters():
        wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert (found[key] - wanted).abs().max() <= 1e-4 * max(1, wanted.abs().max()), key
    assert found["transformer.parts.2_3.ln_f.weight"].any() == (share == "all")


@pytest.mark.parametrize("stream", ["rows", "cluster"])
def test_the_passes_of_a_step_change_nothing(stream):
    """One pass of 8 rows, and eight of one row each."""
    curves = []
    for tokens in (8 * 64, 64):
        rewrite, original, model = divided({"stream": stream, "inner": 0.5})
        blocks = toy_blocks(original.config, rows=20)
        result = finetune(model, blocks, blocks, rewrites=[rewrite], train="full", steps=3, batch_tokens=512,
                          learning_rate=1e-3, forward_tokens=tokens)  # fmt: skip
        curves.append([value for row in result.curve for value in (row.nll, row.divergence, row.gradient_norm)])
        curves[-1] += [row.nll for row in result.evaluations]
    assert curves[0][:3] == pytest.approx(curves[1][:3], rel=1e-4)
    assert curves[0] == pytest.approx(curves[1], rel=1e-2)  # AdamW makes much of rounding


def test_streams_of_rows_are_equal_in_each_step_and_the_same_in_every_epoch():
    from compressor.fractal_training import of_part, stream_rows
    from compressor.training_schedule import batch_rows

    rewrite, original, model = divided()
    blocks = toy_blocks(original.config, rows=24)
    training, judged = stream_rows(model, rewrite.nest(model), blocks, blocks, seed=3)
    assert judged.stream is None and training.tensors([2, 0])[2].tolist() == training.stream[[2, 0]].tolist()
    for step in range(3):  # of 8 rows: the first epoch
        own = training.stream[batch_rows(24, 8, step, 3)]
        assert own.bincount().tolist() == [2, 2, 2, 2]
        for place in range(2):
            halves = of_part(own, Part(1, place), model.config)
            assert torch.equal(halves, (own == 2 * place) | (own == 2 * place + 1))


@pytest.mark.parametrize("stream", ["rows", "cluster"])
def test_fewer_blocks_of_text_than_parts_is_said(stream):
    rewrite, original, model = divided({"stream": stream})
    blocks = toy_blocks(original.config, rows=3)
    with pytest.raises(UserError, match=r"4 parts .* need as many blocks; the calibration part of .* gives 3; "):
        finetune(model, blocks, None, rewrites=[rewrite], train="full", steps=1, batch_tokens=64)
    rewrite, _, model = divided({"stream": stream, "share": "all"}, original)
    assert finetune(model, blocks, None, rewrites=[rewrite], train="full", steps=1, batch_tokens=64).best_step >= 0


def test_streams_of_clusters_are_texts_that_are_alike():
    """Planted: rows of tokens of four sorts, whose embeddings lie apart; in other text the same sorts are found."""
    from compressor.fractal_training import stream_rows

    rewrite, original, model = divided({"stream": "cluster"})
    with torch.no_grad():
        model.transformer.wte.weight[:96] += 3 * torch.randn(4, D).repeat_interleave(24, 0)
    sorts = torch.tensor([0, 1, 2, 3, 2, 1, 0, 3] * 3)
    draw = torch.Generator().manual_seed(0)
    blocks = toy_blocks(original.config)
    planted = torch.randint(0, 24, blocks.ids.shape, generator=draw) + 24 * sorts[:, None]
    blocks = dataclasses.replace(blocks, ids=planted.masked_fill(~blocks.mask, 0))
    order = torch.randperm(24, generator=draw)[:9]
    other = dataclasses.replace(blocks, ids=blocks.ids[order], mask=blocks.mask[order])
    training, judged = stream_rows(model, rewrite.nest(model), blocks, other, seed=0)
    assert sorted(training.stream.bincount().tolist()) == [6, 6, 6, 6]
    assert len(set(zip(sorts.tolist(), training.stream.tolist(), strict=True))) == 4
    assert torch.equal(judged.stream, training.stream[order])


def test_pads_are_of_no_text(made):
    """What a row is alike to is the mean of its own tokens."""
    from compressor.fractal_training import mean_embeddings

    model, blocks = made[2], toy_blocks(made[1].config, rows=5)
    mask = torch.arange(64) < torch.tensor([64, 1, 40, 63, 20])[:, None]
    blocks = dataclasses.replace(blocks, ids=blocks.ids.masked_fill(~mask, 7), mask=mask)
    table = model.transformer.wte.weight.detach().double()
    for row, found in enumerate(mean_embeddings(model, blocks)):
        assert (found - table[blocks.ids[row, : int(mask[row].sum())]].mean(0)).abs().max() < 1e-12


def test_parts_are_judged_on_their_own_rows_as_if_they_were_all(made):
    """Rows of uneven streams and lengths; the last part has none, and is judged on all. Two processes have a share."""
    from compressor.fractal_training import DividedObjective, StreamRows

    rewrite, original, model = made
    blocks = toy_blocks(original.config, rows=6)
    rows = StreamRows(blocks, torch.tensor([0, 0, 1, 0, 2, 2]))
    rows_of = {(1, 0): [0, 1, 2, 3], (1, 1): [4, 5], (2, 0): [0, 1, 3], (2, 1): [2], (2, 2): [4, 5], (2, 3): range(6)}

    def mean_nll(one, kept):
        ids, mask = blocks.ids[list(kept)], blocks.mask[list(kept)][:, 1:]
        chances = logits(one, ids)[:, :-1].double().log_softmax(-1)
        return -chances.gather(-1, ids[:, 1:, None])[..., 0][mask].mean().item()

    wanted = mean_nll(model, range(6)) + sum(mean_nll(model.part(*part), kept) for part, kept in rows_of.items())
    objective = DividedObjective(model, None, 0.0, (), None, divided=rewrite.nest(model))
    found = sum(objective.selection_nll(rows, share) for share in (range(0, 6, 2), range(1, 6, 2)))
    assert found / int(blocks.mask[:, 1:].sum()) == pytest.approx(wanted / 7, rel=1e-5)


def test_pads_are_neither_predicted_nor_learned_from(made, ids):
    """A row with pads behind it is that row alone, in every part."""
    from compressor.fractal_training import DividedObjective

    rewrite, original, model = made
    nest = dataclasses.replace(rewrite.nest(model), inner=0.5)
    objective, mask = DividedObjective(model, original, 0.5, (), None, divided=nest), (torch.arange(20) < 12)[None]
    with torch.no_grad():
        padded, alone = objective(ids[:1], mask, None, False), objective(ids[:1, :12], None, None, False)
    assert padded[0].item() == pytest.approx(alone[0].item(), rel=1e-5)
    assert padded[1].tolist() == pytest.approx(alone[1].tolist(), rel=1e-5)


def test_the_whole_learns_from_a_teacher(ids):
    """Of the whole the KL to the teacher is in the curve, of parts that to the whole has no share."""
    rewrite, original, model = divided({"levels": 1, "share": "all"})
    teacher, blocks = toy_gpt2(seed=4), toy_blocks(original.config, rows=4)
    chances = [logits(one, blocks.ids)[:, :-1].double().log_softmax(-1) for one in (teacher, model)]
    apart = (chances[0].exp() * (chances[0] - chances[1])).sum(-1)[blocks.mask[:, 1:]].mean().item()
    result = finetune(model, blocks, None, rewrites=[rewrite], train="full", steps=1, batch_tokens=256, teacher=teacher,
                      autocast="none")  # fmt: skip
    assert result.curve[0].divergence == pytest.approx(apart / 3, rel=1e-4)  # a mean over three models


@torch.no_grad()
def test_what_is_alike_does_not_depend_on_how_it_is_written():
    """A head's own basis and size, where LayerNorm's gain stands and how long a neuron's column is: of no effect."""
    original = toy_gpt2()
    other, draw = copy.deepcopy(original), torch.Generator().manual_seed(0)
    for block in other.transformer.h:
        gain = 0.5 + torch.rand(D, generator=draw)
        block.ln_2.weight.mul_(gain)
        block.mlp.c_fc.weight.div_(gain[:, None]).mul_(0.5 + torch.rand(FF, generator=draw))
        for head in range(HEADS):
            rows = slice(head * WIDTH, (head + 1) * WIDTH)
            basis = torch.eye(WIDTH) + 0.3 * torch.randn(WIDTH, WIDTH, generator=draw)
            values = block.attn.c_attn.weight[:, 2 * D :][:, rows]
            values.copy_(values @ basis)
            block.attn.c_proj.weight[rows] = (1 + head) * torch.linalg.solve(basis, block.attn.c_proj.weight[rows])
    one, two = (nested_bases.parts_of(model) for model in (original, other))
    for features in (fractal_fit.head_features, fractal_fit.neuron_features):
        for layer in range(LAYERS):
            found, wanted = features(two, layer), features(one, layer)
            assert (found - wanted).abs().max() < 1e-4 and (found.norm(dim=1) - 1).abs().max() < 1e-6


@torch.no_grad()
def test_what_an_input_of_a_linear_is_worth(made):
    """The mean squared length of what a neuron adds, about its mean, on real tokens."""
    original = made[1]
    blocks, kept = toy_blocks(original.config, rows=5), []
    hook = original.transformer.h[1].mlp.c_proj.register_forward_pre_hook(lambda m, x: kept.append(x[0]))
    logits(original, blocks.ids)
    hook.remove()
    moments = SecondMoments(FF)
    moments.update(kept[0][blocks.mask])
    found = fractal_fit.worth(nested_bases.parts_of(original), {fractal_fit.PROJ: {1: moments}}, 1, fractal_fit.PROJ)
    for neuron in (0, 77):
        added = kept[0][blocks.mask][:, neuron, None].double() * original.transformer.h[1].mlp.c_proj.weight[neuron]
        wanted = (added - added.mean(0)).square().sum(1).mean()
        assert float(found[neuron]) == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize(
    ("record", "train"), [({}, "full"), ({"stream": "cluster", "inner": 0.5}, "lora"), ({"share": "all"}, "lora")]
)
def test_recovery_helps_and_is_what_is_judged(record, train):
    rewrite, original, model = divided({**record, "levels": 1})
    blocks = toy_blocks(original.config, rows=16)
    result = finetune(model, blocks, blocks, rewrites=[rewrite], train=train, steps=15, batch_tokens=512,
                      learning_rate=3e-3)  # fmt: skip
    assert result.evaluations[-1].nll < result.evaluations[0].nll - 0.05
    if record.get("stream") != "cluster":
        mean = 0.0
        for one in (model, model.part(1, 0), model.part(1, 1)):
            for rows, mask in blocks.batches():
                scores = logits(one, rows)[:, :-1].log_softmax(-1).gather(-1, rows[:, 1:, None])[..., 0]
                mean -= scores[mask[:, 1:]].double().sum().item() / int(blocks.mask[:, 1:].sum()) / 3
        assert min(row.nll for row in result.evaluations) == pytest.approx(mean, rel=1e-5)


def test_adapters_count_in_every_part(made):
    model = copy.deepcopy(made[2])
    attach(model, rank=2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "low_rank_b" in name:
                parameter.normal_(std=0.1)
    tensors = {key: value.detach().clone() for key, value in effective_tensors(model).items()}
    before = parted(tensors, model.config, Part(2, 1))
    merge(model)
    after = parted(dict(model.named_parameters()), model.config, Part(2, 1))
    assert max((before[key] - after[key]).abs().max().item() for key in after) < 1e-5


def test_an_interrupted_recovery_goes_on_as_if_nothing_had_been(tmp_path):
    from compressor.artifacts import provenance
    from compressor.finetune import StateFolder

    def recovered(stop=None):
        record = {"stream": "cluster", "inner": 0.5}
        rewrite, original, model = divided(record)
        blocks = toy_blocks(original.config)
        origin = provenance(seed=0, base_model="toy", base_hash="0", data={}, device="cpu", dtype="float32")
        folder = StateFolder(tmp_path / "state", origin)
        asked = {"rewrites": [rewrite], "train": "full", "steps": 5, "batch_tokens": 256, "learning_rate": 1e-3}

        def halt(step):
            if stop is not None and step.step == stop:
                raise KeyboardInterrupt

        if stop is None:
            finetune(model, blocks, blocks, **asked)
            return model
        with pytest.raises(KeyboardInterrupt):
            finetune(model, blocks, blocks, state_folder=folder, checkpoint_every=2, progress=halt, **asked)
        rewrite, original, model = divided(record)
        finetune(model, blocks, blocks, state_folder=folder, resume=True, **asked)
        return model

    straight, resumed = recovered(), recovered(stop=4)
    other = resumed.state_dict()
    assert all(torch.equal(value, other[key]) for key, value in straight.state_dict().items())


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("record", "changes", "said"),
    [
        ({"split": 3}, {}, "split=2 with levels=1, split=2 with levels=2, split=4 with levels=1"),
        ({"levels": 3}, {}, "of 4 heads and 128 neurons; allowed: split=2"),
        ({"levels": 0}, {}, "levels=0"),
        ({}, {"n_inner": 42}, "allowed: split=2 with levels=1"),
        ({}, {"n_head": 1}, "none for this model"),
        ({"inner": -1}, {}, "0 to 1"),
        ({"only": [1]}, {}, "[level, place]"),
        ({"only": [3, 0]}, {}, "level is 3; allowed: 1 to 2"),
        ({"only": [1, 2]}, {}, "allowed on level 1: 0 to 1"),
        ({"only": [True, 0]}, {}, "[level, place]"),
    ],
)
def test_bad_settings_are_refused_in_one_line(record, changes, said):
    with pytest.raises(UserError) as error:
        from_record({"rewrite": "fractal", **record}).check(toy_gpt2(**changes).config)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("entry", "changes", "said"),
    [
        ([2, 2], {}, "allowed: a mapping"),
        ({"split": 3}, {}, "3 as split of fractal; allowed: 2, 4"),
        ({"split": 2.0}, {}, "2.0 as split"),
        ({"levels": -1}, {}, "-1 as levels of fractal; allowed: 0 to 12"),
        ({"levels": None}, {}, "None as levels"),
        ({"levels": 3}, {}, "do not divide 4 heads and 128 neurons"),
        ({}, {"n_inner": 42}, "42 neurons"),
        ({"heads": 3, "levels": 0}, {}, "3 as heads of fractal; allowed: divisors of 4"),
        ({"heads": 0, "levels": 0}, {}, "0 as heads"),
        ({"heads": 2}, {}, "allowed: levels 0 of a part cut out"),
        ({}, {"alibi": {"slopes": "geometric", "learned_positions": False, "first": True}}, "alibi beside fractal"),
        ({}, {"combined": {"widths": [16, 16], "ffn": [64, 64], "outputs": "apart"}}, "combined beside fractal"),
    ],
)
def test_a_damaged_config_is_refused_in_one_line(entry, changes, said):
    config = structure([from_record({"rewrite": "fractal"})], toy_gpt2().config)
    check_config("m", config)
    config.fractal = {**config.fractal, **entry} if isinstance(entry, dict) else entry
    for key, value in changes.items():
        setattr(config, key, value)
    with pytest.raises(UserError) as error:
        check_config("m", config)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_diagnosis_is_of_the_whole_and_of_each_part(made):
    rewrite, original, model = made
    blocks = toy_blocks(original.config, rows=5)
    told = rewrite.diagnose(model, blocks.batches())
    assert told["tokens"] == int(blocks.mask[:, 1:].sum())
    assert [(row["level"], row["place"]) for row in told["parts"]] == [(0, 0), *PARTS]
    for row, one in ((told["parts"][0], model), (told["parts"][5], model.part(2, 2))):
        scores = logits(one, blocks.ids)[:, :-1].log_softmax(-1).gather(-1, blocks.ids[:, 1:, None])[..., 0]
        assert row["nll"] == pytest.approx(-scores[blocks.mask[:, 1:]].mean().item(), rel=1e-5)


def test_cutting_out_of_what_has_no_parts(made):
    with pytest.raises(ValueError, match="no parts"):
        made[2].part(1, 0).part(1, 0)
    with pytest.raises(ValueError, match="allowed on level 2: 0 to 3"):
        made[2].part(2, 4)


def test_it_takes_the_whole_model():
    original = toy_gpt2()
    for other in ({"rewrite": "alibi"}, {"rewrite": "matryoshka"}, {"rewrite": "dropped_n", "layers": [1]}):
        rewrites = [from_record({"rewrite": "fractal"}), from_record(other).resolved(original.config)]
        with pytest.raises(UserError, match="both take over"):
            apply(rewrites, original, toy_alignment(original), calibration=toy_blocks(original.config))
    assert [tuple(part) for part in parts_of_levels(structure(rewrites[:1], original.config))] == PARTS
