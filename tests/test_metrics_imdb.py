"""Accuracy on labelled texts: the probe, the fine-tuned classifier and the rows without a model."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import random

import numpy as np
import pytest
import torch
from conftest import make_config, make_model
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from transformers import AutoModelForSequenceClassification

from compressor.artifacts import provenance
from compressor.benchmark import benchmark
from compressor.errors import UserError
from compressor.examples import Examples, Labelled, labelled
from compressor.metrics import METRICS, MetricResult, imdb
from compressor.metrics.probe import features, fit_probe
from compressor.models import OpenModel
from compressor.tokens import first_tokens

_FILLER = ("the", "film", "story", "a", "scene", "camera", "was", "and", "this", "one", "garden", "winter")


@pytest.fixture(scope="module")
def opened(tmp_path_factory, tiny_tokenizer) -> OpenModel:
    """Room for 300 tokens: more than the 256 that are read unless told."""
    model = make_model(make_config(n_layer=2, n_positions=300))
    return OpenModel("tiny", tmp_path_factory.mktemp("tiny"), "", model, tiny_tokenizer, torch.float32)


def reviews(count: int, place: int, words: int, seed: int = 0) -> list[dict]:
    """Rows sorted by class whose only telling words (loved, hated) stand from the word `place` on."""
    chooser, rows = random.Random(seed), []
    for index in range(count):
        text = chooser.choices(_FILLER, k=words)
        text[place : place + 6] = [("hated", "loved")[index % 2]] * 6
        rows.append({"text": f"{' '.join(text)} {seed}.{index}", "label": index % 2})
    return sorted(rows, key=lambda row: row["label"])


def source(folder, **splits: list[dict]) -> Labelled:
    folder.mkdir(exist_ok=True)
    for name, rows in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return labelled(str(folder))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Labelled:
    """Short texts, 180 / 20 / 100 rows; a tenth of the labels is wrong, so that no accuracy is 1."""
    rows = reviews(300, 2, 14)
    for row in rows[::10]:
        row["label"] = 1 - row["label"]
    chooser = random.Random(1)
    chooser.shuffle(rows)
    ordered = [sorted(part, key=lambda row: row["label"]) for part in (rows[:200], rows[200:])]
    return source(tmp_path_factory.mktemp("data") / "d", train=ordered[0], test=ordered[1])


def only(results: list[MetricResult]) -> MetricResult:
    (result,) = results
    assert result.metric == "imdb_accuracy" and result.unit == "share of texts" and result.higher_is_better
    return result


def relabelled(part: Examples, targets: list[int]) -> Examples:
    return dataclasses.replace(part, targets=tuple(targets))


# ---------------------------------------------------------------- features


@pytest.fixture(scope="module")
def sequences(opened, data) -> list[torch.Tensor]:
    longer = [text * repeats for text, repeats in zip(data.test.texts, (1, 2, 3, 4, 1, 5), strict=False)]
    return [*first_tokens(longer, opened.tokenizer, context=200, vocabulary=320), torch.tensor([0]), torch.tensor([7])]


@torch.no_grad()
def by_hand(opened, sequences) -> np.ndarray:
    """One text at a time, without padding."""
    found = []
    for ids in sequences:
        hidden = opened.model.transformer(ids[None]).last_hidden_state[0]
        found.append(torch.stack([hidden[-1], hidden.sum(0) / len(ids)]).numpy())
    return np.stack(found)


@pytest.mark.parametrize("batch_tokens", [1, 150, 600, 100_000])
def test_features_are_those_of_each_text_alone(opened, sequences, batch_tokens):
    expected = by_hand(opened, sequences)
    assert len({len(ids) for ids in sequences}) > 5
    found = features(opened.model, sequences, batch_tokens=batch_tokens)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
    backwards = features(opened.model, sequences[::-1], batch_tokens=batch_tokens)
    np.testing.assert_allclose(backwards[::-1], expected, atol=1e-5, rtol=0)


def test_no_batch_holds_more_tokens_than_told(opened, sequences, monkeypatch):
    sizes, forward = [], type(opened.model.transformer).forward

    def watched(self, input_ids, **arguments):
        sizes.append(input_ids.numel())
        return forward(self, input_ids, **arguments)

    monkeypatch.setattr(type(opened.model.transformer), "forward", watched)
    told = []
    features(opened.model, sequences, batch_tokens=600, progress=lambda done, total: told.append((done, total)))
    assert max(sizes) <= 600 and len(told) == len(sizes) < len(sequences)
    assert told[-1] == (len(sequences), len(sequences))


def test_the_model_and_its_tokenizer_stay_as_they_are(opened, data):
    """Both heads; training mode, frozen parameters, the tokenizer's padding: all as before."""
    model = copy.deepcopy(opened.model).train()
    for parameter in model.transformer.h[0].parameters():
        parameter.requires_grad_(False)
    subject = dataclasses.replace(opened, model=model, tokenizer=copy.deepcopy(opened.tokenizer))
    subject.tokenizer.padding_side = "left"
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def state():
        return (
            [module.training for module in model.modules()],
            [type(module).__name__ for module in model.modules()],
            [parameter.requires_grad for parameter in model.parameters()],
            [parameter.grad for parameter in model.parameters()],
            model.config.to_dict(),
            subject.tokenizer.backend_tokenizer.to_str(),
            subject.tokenizer.pad_token,
            subject.tokenizer.padding_side,
            torch.get_rng_state().tolist(),
        )

    before = state()
    imdb.measure(subject, data, max_training=20, max_examples=10)
    imdb.measure(subject, data, head="finetune", seeds=1, max_training=20, max_examples=10)
    imdb.references(data, subject)
    assert state() == before
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


# ---------------------------------------------------------------- the probe


def test_the_probe_finds_what_the_states_hold(opened, data):
    result = only(imdb.measure(opened, data))
    assert 0.8 < result.value < 1 and result.count == 100
    assert result.value * 100 == pytest.approx(round(result.value * 100))
    share, count, z = result.value, 100, 1.959963984540054
    centre, half = share + z * z / (2 * count), z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    scale = 1 + z * z / count
    assert result.spread == {
        "low": pytest.approx((centre - half) / scale),
        "high": pytest.approx((centre + half) / scale),
        "method": "95 % Wilson interval",
    }
    known = {name: result.settings[name] for name in ("protocol", "context", "training", "selection", "part", "split")}
    assert known == {
        "protocol": "probe", "context": 256, "training": 180, "selection": 20, "part": "test", "split": "test",
    }  # fmt: skip
    assert result.settings["fingerprint"] == data.fingerprint and result.settings["source"] == data.source
    assert imdb.measure(opened, data) == [result]


def test_no_head_is_run(opened, data, monkeypatch):
    monkeypatch.setattr(opened.model.lm_head, "forward", lambda states: pytest.fail("the head ran"))
    imdb.measure(opened, data, max_training=40, max_examples=10)


@pytest.mark.parametrize("batch_tokens", [1, 300, 20_000])
def test_batch_size_changes_no_figure(opened, data, batch_tokens):
    assert imdb.measure(opened, data, batch_tokens=batch_tokens) == imdb.measure(opened, data)


def test_the_order_of_the_rows_changes_no_figure(opened, data):
    def shuffled(part: Examples, seed: int) -> Examples:
        order = random.Random(seed).sample(range(len(part)), len(part))
        return dataclasses.replace(
            part, texts=tuple(part.texts[i] for i in order), targets=tuple(part.targets[i] for i in order)
        )

    other = Labelled(*(shuffled(part, 3) for part in (data.training, data.selection, data.test)))
    first, second = only(imdb.measure(opened, data)), only(imdb.measure(opened, other))
    assert (first.value, first.settings["C"]) == (second.value, second.settings["C"])


def test_the_test_part_chooses_nothing(opened, data):
    """With every test label turned round each text is predicted as before, and the share turns round."""
    turned = dataclasses.replace(data, test=relabelled(data.test, [1 - target for target in data.test.targets]))
    first, second = only(imdb.measure(opened, data)), only(imdb.measure(opened, turned))
    assert second.value == pytest.approx(1 - first.value) and second.settings["C"] == first.settings["C"]


def test_the_selection_part_chooses_and_both_are_learnt_from():
    """Features of which the last token's tell the class and the means mislead: against every candidate by hand."""
    generator = np.random.default_rng(0)
    classes = generator.integers(0, 3, 240)
    found = generator.normal(size=(240, 2, 5))
    found[:, 0, 0] += 1.5 * classes
    found[:120, 1, 1] += 20.0 * classes[:120]  # in the training rows alone
    probe = fit_probe(found[:120], classes[:120], found[120:180], classes[120:180])

    losses = {}
    places = {"last token and mean": [0, 1], "mean": [1], "last token": [0]}
    for read, own in places.items():
        x = found[:, own].reshape(240, -1)
        x = (x - x[:120].mean(0)) / x[:120].std(0)
        for strength in (1e-4, 1e-3, 1e-2, 1e-1, 1.0):
            fitted = LogisticRegression(C=strength, max_iter=1000).fit(x[:120], classes[:120])
            losses[read, strength] = log_loss(classes[120:180], fitted.predict_proba(x[120:180]))
    read, strength = min(losses, key=losses.__getitem__)
    assert read == "last token"
    assert probe.best_params_ == {"view__kw_args": {"read": read}, "regression__C": strength}
    x = found[:, 0]
    x = (x - x[:180].mean(0)) / x[:180].std(0)
    again = LogisticRegression(C=strength, max_iter=1000).fit(x[:180], classes[:180])
    np.testing.assert_array_equal(probe.predict(found[180:]), again.predict(x[180:]))


# ---------------------------------------------------------------- context


@pytest.fixture(scope="module")
def telling_late(opened, tmp_path_factory) -> Labelled:
    """The telling words stand behind token 128 and before token 256."""
    found = source(tmp_path_factory.mktemp("late") / "d", train=reviews(120, 58, 90), test=reviews(60, 58, 90, seed=1))
    for text in found.test.texts:
        words = ("loved", "hated")
        before = opened.tokenizer.encode(text[: min(text.find(word) for word in words if word in text)])
        assert 128 < len(before) < 200
    return found


def test_a_text_is_read_to_256_tokens_unless_told(opened, telling_late):
    result = only(imdb.measure(opened, telling_late))
    assert result.value > 0.75 and result.settings["context"] == 256
    short = only(imdb.measure(opened, telling_late, context=128))
    assert short.value < 0.7 and short.settings["context"] == 128


def test_the_tfidf_row_reads_as_far_as_the_models_do(opened, telling_late):
    for context, least, most in ((256, 0.9, 1), (128, 0, 0.7)):
        found = only(imdb.references(telling_late, opened, context=context)["tf-idf"])
        assert least <= found.value <= most and found.settings["context"] == context


def test_a_smaller_model_reads_all_it_can(data, opened):
    small = dataclasses.replace(opened, model=make_model(make_config(n_layer=1, n_positions=16)))
    assert only(imdb.measure(small, data, max_training=40, max_examples=10)).settings["context"] == 16


# ---------------------------------------------------------------- rows


def test_capped_rows_of_a_sorted_source_hold_both_classes(opened, data):
    result = only(imdb.measure(opened, data, max_training=60, max_examples=50))
    assert (result.settings["training"], result.settings["selection"], result.count) == (60, 15, 50)
    assert 0.7 < result.value <= 1
    majority = only(imdb.references(data, opened, max_training=60, max_examples=50)["majority class"])
    assert 0.4 <= majority.value <= 0.6
    assert majority.settings["fingerprint"] == result.settings["fingerprint"] != data.fingerprint


def test_rows_that_lack_a_class_are_refused(opened, data):
    with pytest.raises(UserError, match="max_training=4 leaves a selection part of 1 rows, which lacks one of the 2"):
        imdb.measure(opened, data, max_training=4)
    with pytest.raises(UserError, match="max_training=1 leaves a training part of 1 rows"):
        imdb.references(data, opened, max_training=1)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"context": 301}, r"context=301 is not allowed; allowed: whole numbers from 1 to 300"),
        ({"context": 0}, "context=0 is not allowed"),
        ({"head": "svm"}, "unknown head of imdb 'svm'; allowed: finetune, probe|unknown head of imdb 'svm'"),
        ({"max_examples": 0}, "max_examples=0 is not allowed; allowed: whole numbers from 1"),
        ({"max_training": True}, "max_training=True is not allowed"),
        ({"batch_tokens": 0}, "batch_tokens=0 is not allowed"),
        ({"epochs": 2}, "epochs is a setting of head 'finetune'; the head is 'probe'"),
        ({"head": "finetune", "epochs": 0}, "epochs=0 is not allowed"),
        ({"head": "finetune", "seeds": 1.5}, "seeds=1.5 is not allowed"),
        ({"head": "finetune", "learning_rate": 0}, "learning_rate=0 is not allowed; allowed: numbers above 0"),
        ({"head": "finetune", "learning_rate": math.nan}, "learning_rate=nan is not allowed"),
        ({"head": "finetune", "learning_rate": "fast"}, "learning_rate='fast' is not allowed"),
    ],
)
def test_settings_that_are_not_allowed(opened, data, settings, said):
    for call in (lambda: imdb.measure(opened, data, **settings), lambda: imdb.references(data, opened, **settings)):
        with pytest.raises(UserError, match=said) as refused:
            call()
        assert "\n" not in str(refused.value)


def test_a_tokenizer_of_another_model_is_refused(data, opened):
    other = dataclasses.replace(opened, model=make_model(make_config(n_layer=1, vocab_size=100)))
    with pytest.raises(UserError, match="they do not belong together"):
        imdb.measure(other, data)


# ---------------------------------------------------------------- rows without a model


def test_references_are_those_of_scikit_learn(opened, data):
    found = imdb.references(data, opened)
    assert list(found) == ["majority class", "tf-idf"]
    majority, words = only(found["majority class"]), only(found["tf-idf"])
    most = max((0, 1), key=data.training.targets.count)
    assert majority.value == data.test.targets.count(most) / 100 and majority.count == words.count == 100
    vectors = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True).fit(data.training.texts)
    x, s = vectors.transform(data.training.texts), vectors.transform(data.selection.texts)
    losses = {
        strength: log_loss(
            data.selection.targets,
            LogisticRegression(C=strength, max_iter=1000).fit(x, data.training.targets).predict_proba(s),
        )
        for strength in (0.1, 1, 10, 100, 1000)
    }
    assert words.settings["C"] == min(losses, key=losses.__getitem__)
    both = [*data.training.texts, *data.selection.texts]
    vectors = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True).fit(both)
    again = LogisticRegression(C=words.settings["C"], max_iter=1000).fit(
        vectors.transform(both), [*data.training.targets, *data.selection.targets]
    )
    assert words.value == again.score(vectors.transform(data.test.texts), data.test.targets)


def test_references_stand_in_the_same_table(opened, data):
    for head in ("probe", "finetune"):
        own = only(imdb.measure(opened, data, head=head, max_training=40, **({} if head == "probe" else {"seeds": 1})))
        for results in imdb.references(data, opened, head=head, max_training=40).values():
            for name in ("protocol", "context", "fingerprint", "training", "selection", "part", "source"):
                assert only(results).settings[name] == own.settings[name], name


# ---------------------------------------------------------------- the fine-tuned classifier


@pytest.fixture(scope="module")
def tuned(opened, data, tmp_path_factory):
    """(result, folder) of 3 seeds."""
    folder = tmp_path_factory.mktemp("tuned") / "tiny"
    moves = []
    result = imdb.measure(
        opened, data, head="finetune", learning_rate=2e-3, folder=folder, progress=lambda *move: moves.append(move)
    )
    assert moves == [(step, 36) for step in range(1, 37)]
    return only(result), folder


def test_the_value_is_the_mean_over_seeds(tuned):
    result, _ = tuned
    each = result.spread["seeds"]
    assert len(each) == 3 and len(set(each)) > 1, "one seed says nothing of the noise"
    assert result.value == pytest.approx(sum(each) / 3) and result.value > 0.7
    assert result.spread["std"] == pytest.approx(np.std(each, ddof=1))
    assert result.spread["low"] < result.value < result.spread["high"] and result.count == 100
    assert result.spread["high"] - result.spread["low"] > 0.1  # of 100 texts, not of 300
    assert {name: result.settings[name] for name in ("protocol", "epochs", "seeds", "batch_rows", "learning_rate")} == {
        "protocol": "finetune", "epochs": 1, "seeds": 3, "batch_rows": 16, "learning_rate": 2e-3,
    }  # fmt: skip
    assert [record["seed"] for record in result.details] == [0, 1, 2]
    assert [record["accuracy"] for record in result.details] == each
    assert all(record["steps"] == math.ceil(180 / 16) for record in result.details)
    assert MetricResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result


def test_the_best_by_selection_is_saved(tuned, opened, data):
    result, folder = tuned
    best = min(result.details, key=lambda record: record["selection_nll"])
    classifier = AutoModelForSequenceClassification.from_pretrained(folder)
    assert classifier.config.id2label == {0: "0", 1: "1"}
    predicted, losses = [], []
    with torch.no_grad():
        for part, found in ((data.test, predicted), (data.selection, losses)):
            for ids, target in zip(
                first_tokens(part.texts, opened.tokenizer, context=256, vocabulary=320), part.targets, strict=True
            ):
                logits = classifier(ids[None]).logits[0]
                found.append(int(logits.argmax()) == target if found is predicted else -logits.log_softmax(0)[target])
    assert np.mean(predicted) == best["accuracy"]
    assert float(np.mean(losses)) == pytest.approx(best["selection_nll"], abs=1e-5)


def test_seeds_and_epochs_are_settings(opened, data, tuned):
    one = only(
        imdb.measure(opened, data, head="finetune", seeds=1, epochs=2, batch_rows=64, max_training=80, max_examples=20)
    )
    assert one.spread["std"] is None and len(one.spread["seeds"]) == 1
    assert one.settings["learning_rate"] == 0.08 / 32
    assert one.details[0]["steps"] == math.ceil(2 * 80 / 64)


def test_tuning_is_repeatable(opened, data):
    first, second = (
        imdb.measure(opened, data, head="finetune", seeds=2, max_training=40, max_examples=20) for _ in range(2)
    )
    assert first == second


# ---------------------------------------------------------------- in a benchmark


def test_in_a_benchmark(opened, data, tmp_path):
    entry = METRICS["imdb"]
    assert (entry.data, entry.standard, entry.saves, entry.settings) == ("labelled", "imdb", True, imdb.SETTINGS)
    other = dataclasses.replace(opened, model=make_model(make_config(n_layer=1, n_positions=100), seed=1))
    report = benchmark(
        {"one": opened, "two": other},
        [
            {"metric": "imdb", "context": 32},
            {"metric": "imdb", "context": 200},
            {"metric": "imdb", "head": "finetune", "seeds": 1, "max_training": 20, "max_examples": 20},
        ],
        {"imdb": data},
        origin=provenance(seed=0, base_model="one", base_hash="", device="cpu", dtype="float32"),
        quiet=True,
        folder=tmp_path,
    )
    one, two = report.rows
    assert [len(one.results), len(two.results)] == [3, 2]
    assert [gap.reason for gap in two.gaps] == ["context=200 is not allowed; allowed: whole numbers from 1 to 100"]
    assert report.ratio(two, two.results[0]) == two.results[0].value / one.results[0].value
    assert report.ratio(two, two.results[1]) is None  # another context
    assert [row.name for row in report.references] == ["majority class", "tf-idf"]
    assert [len(row.results) for row in report.references] == [3, 3]
    for row in report.rows:
        saved = row.results[-1].settings["classifier"]
        assert saved.startswith(row.name) and (tmp_path / saved / "model.safetensors").is_file()
