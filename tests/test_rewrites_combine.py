"""combine against both models' own logits; what trains, what a recovery's end folds, and what is refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from conftest import make_config, make_model
from toy import toy_blocks, toy_gpt2, toy_tokenizer
from transformers import AutoModelForCausalLM

from compressor import models
from compressor.errors import UserError
from compressor.finetune import finetune, resolve_train
from compressor.metrics.size import parameters
from compressor.rewrites import from_record
from compressor.rewrites.combine import glues
from compressor.rewrites.compose import apply, check, structure

IDS = torch.randint(1, 97, (3, 14), generator=torch.Generator().manual_seed(4))
FIRST = {"n_layer": 3}
SECOND = {"n_layer": 3, "n_embd": 16, "n_head": 2, "n_inner": 40}


def saved(folder, seed=1, **changes):
    """Where a second model is now, with a tokenizer."""
    toy_gpt2(seed=seed, **{**SECOND, **changes}).save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def first():
    return toy_gpt2(**FIRST)


@pytest.fixture(scope="module")
def second():
    return toy_gpt2(seed=1, **SECOND)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("models") / "other")


def combined(first, **fields):
    rewrite = from_record({"rewrite": "combine", **fields}).resolved(first.config)
    return rewrite, apply([rewrite], first, None)


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids).logits


def disturbed(model, by=0.1):
    """With glue that is anything."""
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for glue in glues(model):
            glue.weight.add_(by * torch.randn(glue.weight.shape, generator=generator))
    return model


# ---------------------------------------------------------------- what it begins as


@pytest.mark.parametrize("blocks", [False, True])
def test_glue_that_selects_one_is_that_one(first, second, other, blocks):
    assert torch.equal(logits(combined(first, other=other, start="first", blocks=blocks)[1]), logits(first))
    assert torch.equal(logits(combined(first, other=other, start="second", blocks=blocks)[1]), logits(second))


@pytest.mark.parametrize("blocks", [False, True])
def test_the_average_is_the_mean_of_both(first, second, other, blocks):
    found = logits(combined(first, other=other, blocks=blocks)[1])
    assert (found - (logits(first) + logits(second)) / 2).abs().max() < 1e-5
    assert (logits(first) - logits(second)).abs().max() > 0.1


def test_a_model_and_itself_are_that_model(first):
    model = combined(first, blocks=True)[1]
    assert (logits(model) - logits(first)).abs().max() < 1e-5
    assert parameters(model) == sum(own.numel() for own in model.parameters())  # no tensor stands twice


def test_heads_of_their_own(first, other, tmp_path):
    """Of one that is tied, and one that is not."""
    untied = saved(tmp_path / "untied", tie_word_embeddings=False)
    model = combined(first, other=untied)[1]
    assert not model.config.tie_word_embeddings and model.lm_head.weight is not model.transformer.wte.weight
    own = AutoModelForCausalLM.from_pretrained(untied)
    assert own.lm_head.weight is not own.transformer.wte.weight
    assert (logits(model) - (logits(first) + logits(own)) / 2).abs().max() < 1e-5


def test_scores_scaled_by_layer(tmp_path):
    scaled = {"scale_attn_by_inverse_layer_idx": True}
    one, two = toy_gpt2(**FIRST, **scaled), toy_gpt2(seed=1, **SECOND, **scaled)
    model = combined(one, other=saved(tmp_path / "other", **scaled))[1]
    assert (logits(model) - (logits(one) + logits(two)) / 2).abs().max() < 1e-5


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("blocks", [False, True])
def test_only_the_glue_trains(first, other, blocks):
    rewrite, model = combined(first, other=other, blocks=blocks)
    model, text = copy.deepcopy(model), toy_blocks(first.config, rows=4)
    before = copy.deepcopy(dict(model.named_parameters()))
    asked = []

    def look(step):
        asked.append({name for name, parameter in model.named_parameters() if parameter.grad is not None})
        moved.update(name for name, own in model.named_parameters() if not torch.equal(own, before[name]))

    moved: set[str] = set()
    assert resolve_train("auto", model, [rewrite]) == "deltas"
    own = {name for name, p in model.named_parameters() if any(p is given for given in rewrite.trainable(model))}
    assert len(own) == (7 if blocks else 1) and all(name.endswith(("glue.weight", "head_map.weight")) for name in own)
    result = finetune(
        model, text, None, rewrites=[rewrite], steps=3, batch_tokens=128, learning_rate=1e-2, progress=look
    )
    assert result.train == "deltas" and result.trainable == (7 if blocks else 1) * 48 * 48
    assert moved == own and all(names <= own for names in asked)


def test_a_recovery_lowers_the_loss_and_ends_folded(first, other):
    rewrite, model = combined(first, other=other, blocks=True)
    model, text = copy.deepcopy(model), toy_blocks(first.config, rows=8)
    found = finetune(model, text, text, rewrites=[rewrite], steps=12, batch_tokens=512, learning_rate=1e-2)
    assert found.evaluations[-1].nll < found.evaluations[0].nll - 0.05
    assert model.config.combined["outputs"] == "dense"


def test_adapters_train_beside_the_glue(first, other):
    rewrite, model = combined(first, other=other, blocks=True)
    model = copy.deepcopy(model)
    text = toy_blocks(first.config, rows=4)
    before = copy.deepcopy(model.state_dict())
    result = finetune(model, text, None, rewrites=[rewrite], train="lora", steps=3, batch_tokens=128, rank=2)
    assert result.train == "lora"
    after = model.state_dict()
    assert not torch.equal(after["head_map.weight"], before["head_map.weight"])
    for part in "01":
        name = f"transformer.h.1.attn.c_attn.parts.{part}.weight"
        assert not torch.equal(after[name], before[name])


def test_the_end_folds_the_blocks_glue_into_their_linears(first, other, tmp_path):
    rewrite, model = combined(first, other=other, blocks=True)
    model = disturbed(copy.deepcopy(model))
    expected, wanted = logits(model), rewrite.finished(model.config)
    assert (expected - logits(combined(first, other=other)[1])).abs().max() > 0.1
    with torch.no_grad():
        cached = model.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0)
    rewrite.finish(model)
    assert (logits(model) - expected).abs().max() < 1e-4
    assert model.config.to_dict() == wanted.to_dict() and model.config.combined["outputs"] == "dense"
    assert len(glues(model)) == 1  # the head's: it is tied
    assert {name: list(own.shape) for name, own in model.state_dict().items()} == {
        name: list(own.shape) for name, own in models.build(wanted).state_dict().items()
    }
    assert torch.equal(model.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0), cached)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    rewrite.finish(again)  # a second time changes nothing
    assert torch.equal(logits(again), logits(model)) and len(rewrite.trainable(again)) == 1


def test_without_glue_in_blocks_the_end_changes_nothing(first, other):
    rewrite, model = combined(first, other=other)
    names = list(model.state_dict())
    rewrite.finish(model)
    assert list(model.state_dict()) == names and model.config.combined["outputs"] == "apart"


def test_plain_gpt2_it_never_is(first, other):
    rewrite, model = combined(first, other=other)
    with pytest.raises(UserError, match="each part has LayerNorms of its own, plain GPT-2's are over all of the width"):
        rewrite.fold(model)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_layer": 2}, "has n_layer 2, the model 3; allowed: the same"),
        ({"vocab_size": 98}, "has vocab_size 98, the model 97"),
        ({"n_positions": 32}, "has n_positions 32, the model 64"),
        ({"activation_function": "relu"}, "has activation_function relu, the model gelu_new"),
        ({"layer_norm_epsilon": 1e-6}, "has layer_norm_epsilon 1e-06"),
        ({"scale_attn_weights": False}, "has scale_attn_weights False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "has scale_attn_by_inverse_layer_idx True"),
        ({"reorder_and_upcast_attn": True}, "has reorder_and_upcast_attn True"),
        ({"n_head": 4}, "heads of .* are 4 wide, the model's 8; allowed: the same"),
    ],
)
def test_others_that_do_not_fit(first, tmp_path, changes, said):
    named = saved(tmp_path / "other", **changes)
    with pytest.raises(UserError, match=said) as caught:
        check([from_record({"rewrite": "combine", "other": named})], first.config)
    assert "\n" not in str(caught.value) and named in str(caught.value)


def test_others_that_are_no_plain_gpt2(first, other, tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        check([from_record({"rewrite": "combine", "other": "./nowhere"})], first.config)
    model = combined(first, other=other)[1]
    model.save_pretrained(tmp_path)
    toy_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a gpt2_compressed; allowed: plain GPT-2"):
        check([from_record({"rewrite": "combine", "other": str(tmp_path)})], first.config)
    with pytest.raises(UserError, match="this model is a compressed GPT-2 already"):
        check([from_record({"rewrite": "combine", "other": other})], model.config)


def test_another_tokenizer(tmp_path, other):
    """Known where the model was opened from a folder."""
    base = saved(tmp_path / "base")
    check([from_record({"rewrite": "combine", "other": other})], models.find(base).config)
    tokens = json.loads((tmp_path / "base" / "tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (tmp_path / "base" / "tokenizer.json").write_text(json.dumps(tokens))
    with pytest.raises(UserError, match="has another tokenizer than the model; allowed: the same vocabulary"):
        check([from_record({"rewrite": "combine", "other": other})], models.find(base).config)


def test_another_that_has_changed_since(first, tmp_path):
    named = saved(tmp_path / "other")
    rewrite = from_record({"rewrite": "combine", "other": named}).resolved(first.config)
    assert rewrite.other_hash == models.open_model(named).hash and rewrite.resolved(first.config) == rewrite
    saved(tmp_path / "other", seed=2)
    with pytest.raises(UserError, match=f"the weights of {named} are not those of other_hash {rewrite.other_hash}"):
        apply([rewrite], first, None)


@pytest.mark.parametrize(
    "beside",
    [
        {"rewrite": "alibi"},
        {"rewrite": "soft_shared", "n": 2, "start": 0},
        {"rewrite": "dropped_n", "layers": [1]},
        {"rewrite": "token_factored"},
        {"rewrite": "sasp"},
        {"rewrite": "linformer", "layers": [2]},
        {"rewrite": "pruned", "sparsity": 0.5},
        {"rewrite": "tversky", "targets": ["lm_head"]},
        {"rewrite": "combine"},
    ],
    ids=lambda beside: beside["rewrite"],
)
def test_nothing_stands_beside_it(first, beside):
    records = [{"rewrite": "combine"}, beside]
    with pytest.raises(UserError, match="both take over"):
        check([from_record(record).resolved(first.config) for record in records], first.config)


def test_a_plan_needs_no_weights(first, other):
    rewrite = from_record({"rewrite": "combine", "other": other, "blocks": True}).resolved(first.config)
    config = structure([rewrite], first.config)
    assert (config.n_embd, config.n_head, config.n_inner) == (48, 6, 168)
    assert config.combined == {"widths": [32, 16], "ffn": [128, 40], "outputs": "glued"}
    assert parameters(models.build(config)) == parameters(apply([rewrite], first, None))


# ---------------------------------------------------------------- a run


def test_a_run_from_recipe_to_proof(tmp_path, tiny_folder, tiny_tokenizer, text_file, run):
    make_model(make_config(n_embd=16, n_head=2), seed=1).save_pretrained(tmp_path / "other")
    tiny_tokenizer.save_pretrained(tmp_path / "other")
    words = [
        f"model={tiny_folder}", f"data={text_file}", f"other={tmp_path / 'other'}", "finetune.steps=3",
        "finetune.batch_tokens=256", "finetune.control=false", "finetune.selection_tokens=512",
        "finetune.learning_rate=3e-2", "benchmark.metrics=[size]", "align.max_tokens=500",
    ]  # fmt: skip
    planned = run("plan", "combine", *words, "--json")
    assert planned.code == 0, planned.err
    made = run("run", "combine", *words, "--run", tmp_path / "run", "--json", "--quiet")
    assert made.code == 0, made.err
    body = json.loads((tmp_path / "run" / "recovered" / "report.json").read_text())
    assert body["parameters"] == planned.json["parameters"]
    record = json.loads((tmp_path / "run" / "recovered" / "config.json").read_text())["compression"][-1]
    assert record["other_hash"] == models.open_model(str(tmp_path / "other")).hash
    proof = run("verify", tmp_path / "run", "--json")
    assert proof.code == 0 and proof.json["ok"], proof.out
    refused = run("export", tmp_path / "run", "--dense", tmp_path / "dense")
    assert refused.code == 2 and "LayerNorms of its own" in refused.err
    make_model(make_config(n_embd=16, n_head=2), seed=2).save_pretrained(tmp_path / "other")
    again = run("run", "combine", *words, "--run", tmp_path / "run", "--quiet")
    assert again.code == 2 and "is not what this recipe makes (rewrites differ)" in again.err
