"""The embedded default: its language is the same everywhere, its splits are apart, its model has learned it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from collections import Counter
from itertools import islice

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Tokenizer

from compressor.demo import CHECKPOINT, KINDS, SPLITS, rows, stream
from compressor.demo.ablation import blocks_of, perplexity, without_ffn
from compressor.demo.pretrain import Schedule, batches, factor

TEXT = {"lm": "text", "reviews": "text", "summaries": "document"}
DIGESTS = {
    "lm train": "ca9ac7a28b2b",
    "lm validation": "64631d9bc574",
    "lm test": "54d3cfdd702a",
    "reviews train": "7415b2a6a69a",
    "reviews validation": "e118454873b3",
    "reviews test": "aace6c3602c6",
    "summaries train": "a4f7bd6f12f8",
    "summaries validation": "79c13acf8d87",
    "summaries test": "60f0c7348423",
}


@pytest.fixture(scope="module")
def everything() -> dict[tuple[str, str], list[dict]]:
    return {(kind, split): rows(kind, split) for kind in KINDS for split in SPLITS}


@pytest.fixture(scope="module")
def tokenizer() -> GPT2Tokenizer:
    return AutoTokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()


def digest(data: list[dict]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]


def test_rows_are_the_same_on_every_call_and_machine(everything):
    assert {f"{kind} {split}": digest(data) for (kind, split), data in everything.items()} == DIGESTS
    assert rows("summaries", "test") == everything["summaries", "test"]


def test_the_order_of_hashes_does_not_matter():
    code = "from compressor.demo import rows; print(hash('a'), repr(rows('summaries', 'validation')))"
    first, second = (
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout.split(" ", 1)
        for seed in "12"
    )
    assert first[0] != second[0] and first[1] == second[1]


def test_the_language_needs_no_torch():
    code = "import sys, compressor.demo as d; d.rows('reviews', 'test'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_sizes(everything):
    characters = {split: sum(len(row["text"]) for row in everything["lm", split]) for split in SPLITS}
    assert 1_500_000 <= characters["train"] < 1_510_000
    assert all(300_000 <= characters[split] < 310_000 for split in ("validation", "test"))
    assert [len(everything["reviews", split]) for split in SPLITS] == [2000, 500, 500]
    assert [len(everything["summaries", split]) for split in SPLITS] == [400, 100, 200]


@pytest.mark.parametrize("kind", KINDS)
def test_splits_share_no_document(everything, kind):
    documents = [row[TEXT[kind]] for split in SPLITS for row in everything[kind, split]]
    assert len(set(documents)) == len(documents)


def test_what_one_kind_tests_no_other_kind_trains_on(everything):
    trained = "\0".join(row["text"] for row in everything["lm", "train"])
    for kind in ("reviews", "summaries"):
        for split in ("validation", "test"):
            assert not any(row[TEXT[kind]] in trained for row in everything[kind, split])


def test_fresh_documents_for_pretraining_are_none_of_validation_or_test(everything):
    fresh = list(islice(stream(12345), 3000))
    assert len(set(fresh)) == len(fresh)
    held_out = {row["text"] for split in ("validation", "test") for row in everything["lm", split]}
    assert held_out.isdisjoint(fresh)


@pytest.mark.parametrize(("kind", "split"), [("prose", "train"), ("lm", "dev")])
def test_unknown_names_are_refused_with_the_allowed_ones(kind, split):
    with pytest.raises(ValueError, match=r"must be one of (lm, reviews, summaries|train, validation, test)$"):
        rows(kind, split)


def test_reviews_are_balanced_and_no_word_decides(everything):
    for split in SPLITS:
        assert sum(row["label"] for row in everything["reviews", split]) * 2 == len(everything["reviews", split])
    counts = {label: Counter() for label in (0, 1)}
    for row in everything["reviews", "train"]:
        counts[row["label"]].update(set(row["text"].lower().replace(".", " ").replace(",", " ").split()))
    for word in set(counts[0]) | set(counts[1]):
        # The best rule "has the word" or "lacks the word" is right for half of the 2,000 reviews and this many more.
        assert abs(counts[1][word] - counts[0][word]) < 400, word


def test_summaries_say_nothing_the_article_does_not(everything):
    for row in everything["summaries", "test"]:
        assert len(row["summary"]) < len(row["document"]) / 2
        names = {word.strip(".,;:") for word in row["summary"].split()[1:] if word[0].isupper()}
        assert all(name in row["document"] for name in names)


def test_the_checkpoint_is_small_and_opens(model):
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) <= 6_000_000
    assert model.config.model_type == "gpt2" and model.config.n_layer == len(model.transformer.h) == 12
    assert json.loads((CHECKPOINT / "config.json").read_text())["dtype"] == "float16"


def test_the_tokenizer_fits_the_model_and_loses_nothing(everything, tokenizer, model):
    assert isinstance(tokenizer, GPT2Tokenizer)
    assert len(tokenizer) == model.config.vocab_size == 2048
    assert tokenizer.model_max_length == model.config.n_positions == 256
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == model.config.eos_token_id == model.config.bos_token_id
    for kind in KINDS:
        for row in everything[kind, "test"][:50]:
            assert tokenizer.decode(tokenizer(row[TEXT[kind]])["input_ids"]) == row[TEXT[kind]]


def test_the_model_knows_the_language_and_uses_its_layers(tokenizer, model):
    blocks = blocks_of(tokenizer, "test", 2048, 256)
    seen = torch.bincount(blocks_of(tokenizer, "train", 200_000, 256).flatten(), minlength=2048) + 1.0
    unigram = math.exp(-(seen / seen.sum()).log()[blocks[:, 1:]].mean().item())
    reached = perplexity(model, blocks)
    assert reached < unigram / 20
    with without_ffn(model, 0):
        assert perplexity(model, blocks) > 1.05 * reached
    assert perplexity(model, blocks) == reached


def test_the_model_knows_a_fact_of_the_world(tokenizer, model):
    start = tokenizer("The fox, a mammal of the", return_tensors="pt")
    assert "woods" in tokenizer.decode(model.generate(**start, max_new_tokens=4, do_sample=False)[0])


def test_pretraining_lays_documents_end_to_end(tokenizer):
    first, second = islice(batches(tokenizer, 7, "train", 2), 2)
    assert first.shape == second.shape == (2, 257)
    assert first[0, -1] == first[1, 0] and first[1, -1] == second[0, 0]
    one, two, three = islice(stream(7), 3)
    text = tokenizer.decode(torch.cat([*first[:, :-1], *second[:, :-1]]))
    assert f"{one}<|endoftext|>{two}\n\n{three}".startswith(text[: len(one) + 20])


def test_the_rate_rises_then_falls():
    schedule = Schedule(steps=100, warmup=10)
    factors = [factor(step, schedule) for step in range(100)]
    assert factors[:10] == sorted(factors[:10]) and factors[9] == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True) and 0.02 <= factors[-1] < 0.03
