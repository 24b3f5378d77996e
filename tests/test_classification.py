"""A classifier on a language model: padding, training against a loop written out in full, saving."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import make_config, make_model
from torch import nn
from torch.nn import functional
from toy import toy_alignment, toy_gpt2
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel, GPT2Tokenizer

from compressor import processes
from compressor.classification import LabelledRows, attach, class_logits, padding_token, save, train
from compressor.errors import UserError
from compressor.metrics.size import parameters
from compressor.modeling import GPT2CompressedForSequenceClassification
from compressor.rewrites.compose import apply
from compressor.rewrites.soft_shared import SoftShared
from compressor.tokens import first_tokens
from compressor.training_schedule import batch_rows

PAD = 3
SETTINGS = {"epochs": 2, "batch_rows": 5, "learning_rate": 3e-3, "seed": 4}


@pytest.fixture(scope="module")
def compressed() -> GPT2LMHeadModel:
    original = toy_gpt2()
    rewrite = SoftShared(n=3, start=1, rank=4, delta_init="svd").resolved(original.config)
    return apply([rewrite], original, toy_alignment(original))


def rows(count: int, seed: int = 0, longest: int = 40) -> LabelledRows:
    """Texts of 1 to `longest` tokens; those with token 7 are of class 1."""
    generator = torch.Generator().manual_seed(seed)
    sequences, labels = [], []
    for index in range(count):
        length = int(torch.randint(1, longest + 1, (), generator=generator))
        ids = torch.randint(8, 97, (length,), generator=generator)
        if index % 2:
            ids[torch.randint(0, length, (), generator=generator)] = 7
        sequences.append(ids)
        labels.append(index % 2)
    return LabelledRows(sequences, torch.tensor(labels), PAD)


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ---------------------------------------------------------------- attaching


@pytest.mark.parametrize("kind", ["plain", "compressed"])
def test_the_trunk_is_the_models_and_the_model_stays_as_it_is(compressed, kind):
    model = toy_gpt2() if kind == "plain" else copy.deepcopy(compressed)
    before, config, state = tensors(model), model.config.to_dict(), torch.get_rng_state()
    classifier = attach(model, ("bad", "good", "so so"), PAD, seed=1)
    expected = GPT2ForSequenceClassification if kind == "plain" else GPT2CompressedForSequenceClassification
    assert type(classifier) is expected and not classifier.training
    assert all(parameter.requires_grad and parameter.device.type == "cpu" for parameter in classifier.parameters())
    assert parameters(classifier) == parameters(model) + 3 * 32
    ids = torch.arange(1, 30)[None]
    assert torch.equal(classifier.transformer(ids).last_hidden_state, model.transformer(ids).last_hidden_state)
    assert classifier.config.id2label == {0: "bad", 1: "good", 2: "so so"}
    assert classifier.config.label2id == {"bad": 0, "good": 1, "so so": 2}
    assert (classifier.config.num_labels, classifier.config.pad_token_id) == (3, PAD)
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.add_(1.0)
    assert same_bits(tensors(model), before) and model.config.to_dict() == config
    assert torch.equal(torch.get_rng_state(), state)


def test_the_seed_draws_the_head():
    heads = [attach(toy_gpt2(), ("a", "b"), PAD, seed).score.weight for seed in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    wide = attach(toy_gpt2(n_embd=2048, n_layer=1), ("a", "b"), PAD, 0).score.weight
    assert float(wide.detach().std()) == pytest.approx(0.02, rel=0.05)  # transformers' own


def test_half_precision_is_refused():
    with pytest.raises(UserError, match="trained in float32, these weights are bfloat16; leave --dtype out"):
        attach(toy_gpt2().to(torch.bfloat16), ("a", "b"), PAD, 0)


def test_what_pads(tiny_tokenizer):
    assert tiny_tokenizer.pad_token_id is None and padding_token(tiny_tokenizer, 320) == tiny_tokenizer.eos_token_id
    other = copy.deepcopy(tiny_tokenizer)
    other.pad_token = "!"
    assert padding_token(other, 320) == other.convert_tokens_to_ids("!") != other.eos_token_id
    with pytest.raises(UserError, match="this tokenizer has neither padding nor EOS"):
        padding_token(GPT2Tokenizer(vocab={"a": 0, "b": 1}, merges=[], eos_token=None, unk_token=None), 2)
    with pytest.raises(UserError, match="neither padding nor EOS"):
        padding_token(tiny_tokenizer, 0)  # beyond the model's vocabulary


# ---------------------------------------------------------------- predictions


def alone(classifier: GPT2ForSequenceClassification, ids: torch.Tensor) -> torch.Tensor:
    """Written out: the head on the final state of the last token that is no pad, of the first where all are."""
    real = (ids != PAD).nonzero().flatten().tolist()
    hidden = classifier.transformer(ids[None]).last_hidden_state[0]
    return hidden[real[-1] if real else 0] @ classifier.score.weight.T


@pytest.mark.parametrize("kind", ["plain", "compressed"])
@torch.no_grad()
def test_padding_batch_size_and_order_change_no_prediction(compressed, kind):
    """Texts that hold the padding token too: at their end, within, and nothing else."""
    model = toy_gpt2() if kind == "plain" else compressed
    classifier = attach(model, ("a", "b"), PAD, seed=0)
    classifier.score.weight.normal_(generator=torch.Generator().manual_seed(0))
    texts = [*rows(20).sequences, *(torch.tensor(ids) for ids in ([5, 9, 3], [5, 3, 9], [3], [3, 3, 3], [5, 9]))]
    expected = torch.stack([alone(classifier, ids) for ids in texts])
    labels = torch.zeros(len(texts), dtype=torch.int64)
    for batch_tokens in (1, 50, 100_000):
        found = class_logits(classifier, LabelledRows(texts, labels, PAD), batch_tokens=batch_tokens)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    backwards = class_logits(classifier, LabelledRows(texts[::-1], labels, PAD))
    torch.testing.assert_close(backwards.flip(0), expected, atol=1e-5, rtol=0)
    some = class_logits(classifier, LabelledRows(texts, labels, PAD), [22, 3, 7])
    torch.testing.assert_close(some, expected[[22, 3, 7]], atol=1e-5, rtol=0)


def test_judging_leaves_the_classifier_in_its_mode():
    classifier = attach(toy_gpt2(resid_pdrop=0.5), ("a", "b"), PAD, seed=0).train()
    first, second = (class_logits(classifier, rows(9)) for _ in range(2))
    assert torch.equal(first, second) and all(module.training for module in classifier.modules())
    assert type(classifier.transformer.h[0].mlp.act).__name__ == "NewGELUActivation"


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("forward_tokens", [1, 90, 100_000], ids=["row by row", "some rows", "at once"])
def test_every_step_is_that_of_a_loop_written_out_in_full(forward_tokens):
    """One text at a time without padding, torch's own optimiser and schedule, float64."""
    classifier = attach(toy_gpt2().double(), ("a", "b"), PAD, seed=0)
    reference, part = copy.deepcopy(classifier), rows(13)
    found = train(classifier, part, rows(6, seed=1), **SETTINGS, autocast="none", forward_tokens=forward_tokens)
    assert found.steps == len(found.curve) == math.ceil(2 * 13 / 5)

    matrices = [parameter for parameter in reference.parameters() if parameter.ndim > 1]
    rest = [parameter for parameter in reference.parameters() if parameter.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}], lr=3e-3
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 1.0 if step < 1 else 0.5 * (1 + math.cos(math.pi * (step - 1) / 5))
    )
    judged, states = [selection_loss(reference)], [tensors(reference)]
    for step, row in enumerate(found.curve):
        chosen = batch_rows(13, 5, step, seed=4)
        logits = torch.stack([alone(reference, part.sequences[index]) for index in chosen])
        loss = functional.cross_entropy(logits, part.labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        assert row.nll == pytest.approx(loss.item(), rel=1e-9)
        assert row.gradient_norm == pytest.approx(norm.item(), rel=1e-9)
        optimizer.step()
        schedule.step()
        judged.append(selection_loss(reference))
        states.append(tensors(reference))
    for evaluation in found.evaluations:
        assert evaluation.nll == pytest.approx(judged[evaluation.step], rel=1e-9) and evaluation.tokens == 6
    assert [evaluation.step for evaluation in found.evaluations] == [0, 2, 4, 6]
    assert found.best_step == min((0, 2, 4, 6), key=judged.__getitem__)
    assert found.selection_nll == pytest.approx(judged[found.best_step], rel=1e-9)
    for name, tensor in tensors(classifier).items():
        torch.testing.assert_close(tensor, states[found.best_step][name], rtol=1e-9, atol=1e-12)


@torch.no_grad()
def selection_loss(classifier: GPT2ForSequenceClassification) -> float:
    part = rows(6, seed=1)
    logits = torch.stack([alone(classifier, ids) for ids in part.sequences])
    return functional.cross_entropy(logits, part.labels).item()


def test_all_epochs_are_seen(monkeypatch):
    seen = []
    real = LabelledRows.count
    monkeypatch.setattr(LabelledRows, "count", lambda self, rows: seen.append(list(rows)) or real(self, rows))
    train(attach(toy_gpt2(n_layer=1), ("a", "b"), PAD, 0), rows(20), rows(4), **{**SETTINGS, "epochs": 3})
    batches = [batch for batch in seen if not isinstance(batch, range) and len(batch) == 5]
    epochs = [[row for batch in batches[start : start + 4] for row in batch] for start in (0, 4, 8)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs) and epochs[0] != epochs[1]


def test_it_learns_what_can_be_learnt():
    classifier = attach(toy_gpt2(n_layer=2), ("a", "b"), PAD, seed=0)
    found = train(classifier, rows(400, longest=8), rows(60, 1, 8), epochs=6, batch_rows=16, learning_rate=3e-3, seed=0)
    test = rows(200, 2, 8)
    accuracy = (class_logits(classifier, test).argmax(1) == test.labels).float().mean()
    assert found.best_step and accuracy > 0.85


def test_the_seed_fixes_a_training_dropout_too():
    found, state = [], torch.get_rng_state()
    for seed in (4, 4, 5):
        classifier = attach(toy_gpt2(n_layer=2, resid_pdrop=0.2, embd_pdrop=0.2), ("a", "b"), PAD, seed=0)
        result = train(classifier, rows(13), rows(6, 1), **{**SETTINGS, "seed": seed})
        found.append((result, tensors(classifier)))
        assert not classifier.training and classifier.config.resid_pdrop == 0.2
    assert found[0][0] == found[1][0] and same_bits(found[0][1], found[1][1])
    assert found[2][0].curve[0].nll != found[0][0].curve[0].nll
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_is_on_while_training():
    curves = []
    for dropout in (0.0, 0.5):
        classifier = attach(toy_gpt2(n_layer=2, embd_pdrop=dropout), ("a", "b"), PAD, seed=0)
        curves.append(train(classifier, rows(13), rows(6, 1), **SETTINGS).curve)
    assert curves[0][0].nll != curves[1][0].nll


def test_a_loss_that_is_not_finite_is_refused():
    with pytest.raises(UserError, match="is not a finite number with learning_rate=1e\\+30; give a smaller one"):
        train(attach(toy_gpt2(), ("a", "b"), PAD, 0), rows(13), rows(6, 1), **{**SETTINGS, "learning_rate": 1e30})


def test_it_waits_for_no_other_process(monkeypatch):
    """A benchmark runs in one process while the others of a launch wait for it."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(processes, "accelerator", lambda: pytest.fail("asked for the others"))
    train(attach(toy_gpt2(n_layer=1), ("a", "b"), PAD, 0), rows(6), rows(4, 1), **SETTINGS)


# ---------------------------------------------------------------- saving

_STRANGER = """
import json, sys
sys.modules["compressor"] = None
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
texts, folders, said = json.loads(sys.argv[1]), sys.argv[2:], []
for folder in folders:
    trust = {"trust_remote_code": True}
    model, loading = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True, **trust)
    tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
    batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        logits = model.eval()(**batch).logits
    said.append({"logits": logits.tolist(), "width": batch["input_ids"].shape[1], "class": type(model).__name__,
                 "labels": [model.config.id2label[i] for i in logits.argmax(1).tolist()],
                 "loading": [sorted(loading["missing_keys"]), sorted(loading["unexpected_keys"])]})
print(json.dumps(said))
"""


def test_what_is_saved_opens_in_a_fresh_process_and_gives_the_same_logits(tmp_path, tiny_tokenizer):
    """As whoever downloads it would: transformers' own classes, padding and truncation, without this package."""
    original = make_model(make_config())
    rewrite = SoftShared(n=3, start=1, rank=4, delta_init="svd").resolved(original.config)
    models = {"plain": original, "compressed": apply([rewrite], original, toy_alignment(original))}
    texts = ["The film was slow.", "the garden " * 60, "x", "A warm summer<|endoftext|>", "I loved it, and she wrote."]
    sequences = first_tokens(texts, tiny_tokenizer, context=48, vocabulary=320)
    expected = {}
    for name, model in models.items():
        classifier = attach(model, ("bad", "good"), 0, seed=0)
        with torch.no_grad():
            classifier.score.weight.normal_(generator=torch.Generator().manual_seed(0))
        expected[name] = class_logits(classifier, LabelledRows(sequences, torch.zeros(5, dtype=torch.int64), 0))
        (tmp_path / name).mkdir()
        (tmp_path / name / "old").touch()
        save(classifier, tiny_tokenizer, 48, tmp_path / name)
        files = {file.name for file in (tmp_path / name).iterdir()}
        assert "model.safetensors" in files and "old" not in files and not [f for f in files if f.endswith(".bin")]
        assert any(file.endswith(".py") for file in files) == (name == "compressed")
    assert tiny_tokenizer.pad_token is None and tiny_tokenizer.model_max_length > 64
    answer = subprocess.run(
        [sys.executable, "-c", _STRANGER, json.dumps(texts), *(str(tmp_path / name) for name in models)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    assert answer.returncode == 0, answer.stderr
    for said, (name, logits) in zip(json.loads(answer.stdout.splitlines()[-1]), expected.items(), strict=True):
        assert said["class"] == f"GPT2{'Compressed' if name == 'compressed' else ''}ForSequenceClassification"
        assert said["loading"] == [[], []] and said["width"] == 48
        torch.testing.assert_close(torch.tensor(said["logits"]), logits, atol=1e-5, rtol=0)
        assert said["labels"] == [("bad", "good")[index] for index in logits.argmax(1).tolist()]
