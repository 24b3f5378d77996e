"""The measures by hand and against what they wrap; none of them needs a network or leaves anything behind."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys

import evaluate
import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

from compressor.metrics.measures import Accuracy, Distinct, Perplexity, Rouge

ALONE = """
import socket
def refuse(*arguments, **more):
    raise AssertionError("the network was asked")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from compressor.metrics.measures import Accuracy, Distinct, Perplexity, Rouge
print(Perplexity().compute(predictions=[0.0, 0.0])["perplexity"])
print(Accuracy().compute(predictions=[1, 0], references=[1, 1])["accuracy"])
print(Distinct().compute(predictions=["a b a"])["distinct2"])
print(Rouge().compute(predictions=["a b"], references=["a c"])["rouge1"]["f1"])
"""


def test_they_work_without_a_network_and_leave_nothing_behind(tmp_path):
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    home.mkdir()
    temporary.mkdir()
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith(("HF_", "XDG_"))},
        "HOME": str(home),
        "TMPDIR": str(temporary),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run([sys.executable, "-c", ALONE], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1.0", "0.5", "1.0", "0.5"]
    assert [*home.rglob("*"), *temporary.rglob("*")] == []


@pytest.mark.parametrize("measure", [Accuracy, Distinct, Perplexity, Rouge])
def test_they_are_measures_of_evaluate(measure):
    assert isinstance(measure(), evaluate.Metric)


def test_perplexity():
    def perplexity(nll, **more):
        return Perplexity().compute(predictions=nll, **more)["perplexity"]

    assert perplexity([math.log(2), math.log(8)]) == pytest.approx(4)
    assert perplexity([math.log(2), math.log(8)], units=1) == pytest.approx(16)
    assert perplexity(np.full(3, 1e4)) == math.inf
    assert math.isnan(perplexity([1.0, math.nan]))


def test_accuracy():
    """The bounds p of Wilson's interval are where (right/n - p)^2 = 1.96^2 p (1 - p) / n."""
    found = Accuracy().compute(predictions=[1, 0, 2, 2, 1, 1, 0, 1], references=[1, 0, 2, 0, 1, 1, 0, 0])
    assert (found["accuracy"], found["count"]) == (0.75, 8)
    for bound in (found["low"], found["high"]):
        assert (0.75 - bound) ** 2 == pytest.approx(1.959964**2 * bound * (1 - bound) / 8)
    assert found["low"] < 0.75 < found["high"]
    assert Accuracy().compute(predictions=[1] * 9, references=[1] * 9)["high"] == 1


# ---------------------------------------------------------------- texts


def make_texts(count: int, seed: int = 0) -> tuple[list[str], list[str]]:
    chooser = random.Random(seed)
    words = [
        "storms",
        "stormed",
        "storm",
        "closing",
        "schools",
        "school",
        "the",
        "a",
        "near",
        "town,",
        "Town",
        "river's",
    ]
    return tuple([" ".join(chooser.choices(words, k=chooser.randint(3, 14))) for _ in range(count)] for _ in range(2))


def test_rouge_is_the_mean_of_rouge_scores():
    predictions, references = make_texts(40)
    predictions[3] = ""
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    scores = [scorer.score(target, text) for text, target in zip(predictions, references, strict=True)]
    for name, found in Rouge().compute(predictions=predictions, references=references).items():
        assert found["f1"] == pytest.approx(np.mean([score[name].fmeasure for score in scores]))


def test_rouge_by_hand():
    """police kill the gunman | the gunman killed police: 4 of 4 words stemmed, 1 of 3 pairs, 2 of 4 in order."""
    found = Rouge().compute(predictions=["police kill the gunman"], references=["The gunman killed police."])
    assert [found[name]["f1"] for name in ("rouge1", "rouge2", "rougeL")] == pytest.approx([1, 1 / 3, 1 / 2])


def test_the_interval_of_rouge():
    def interval(count, **more):
        predictions, references = make_texts(count)
        return Rouge().compute(predictions=predictions, references=references, **more)["rougeL"]

    few, many = interval(25), interval(400)
    for found in (few, many):
        assert found["low"] < found["f1"] < found["high"]
    assert 3 < (few["high"] - few["low"]) / (many["high"] - many["low"]) < 5, "a quarter, with 16 times the documents"
    assert interval(25) == few != interval(25, seed=1)
    one = interval(1)
    assert one["low"] == one["f1"] == one["high"]


def test_the_interval_of_rouge_is_that_of_the_mean():
    """Of scores 0 and 1 at even odds the mean of 100 has a standard error of 0.05."""
    texts = ["storm"] * 100
    found = Rouge().compute(predictions=texts, references=["storm", "river"] * 50, resamples=4000)["rouge1"]
    assert found["low"] == pytest.approx(0.5 - 1.96 * 0.05, abs=0.012)
    assert found["high"] == pytest.approx(0.5 + 1.96 * 0.05, abs=0.012)


def test_distinct():
    found = Distinct().compute(predictions=["a b a b", "b c", "a"])
    assert found == {"distinct1": 3 / 7, "distinct2": 3 / 4}  # ab ba ab | bc: no pair spans two texts
    assert Distinct().compute(predictions=["", " "]) == {"distinct1": 0, "distinct2": 0}


def test_thousands_of_texts():
    texts = [f"word{number}" for number in range(12_000)]
    assert Distinct().compute(predictions=texts)["distinct1"] == 1
