"""ROUGE of what a model writes: planted texts, rouge_score by hand, the faults of a harness that scores the prompt."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer

from compressor import examples
from compressor.artifacts import provenance
from compressor.benchmark import METRICS, benchmark
from compressor.errors import UserError
from compressor.examples import Examples
from compressor.metrics.decoding import continuations
from compressor.metrics.rouge import first_sentences, measure, references, split_sentences
from tests.conftest import make_config, make_model
from tests.scripted import END, script, scripted_model, subject, word_tokenizer

NAMES = ("rouge1", "rouge2", "rougeL")
HINT = "TL;DR:"
SAID = "storm closes schools near town."
STORM = "the storm closed two schools in town"


def rows(*pairs: tuple[str, str]) -> Examples:
    texts, targets = zip(*pairs, strict=True)
    return Examples(texts, targets, "planted", "test", "all", "f" * 64, ())


def values(results) -> list[float]:
    assert [result.metric for result in results] == list(NAMES)
    return [result.value for result in results]


def by_hand(texts, targets) -> list[float]:
    scorer = RougeScorer(NAMES, use_stemmer=True)
    scores = [scorer.score(target, text) for text, target in zip(texts, targets, strict=True)]
    return [float(np.mean([score[name].fmeasure for score in scores])) for name in NAMES]


def planted(said: str = SAID, *, documents: str = "", end: bool = True, **changes):
    """An OpenModel that says `said` behind TL;DR:, and <end>."""
    tokenizer = word_tokenizer(f"{HINT} {said} {STORM} {documents}")
    return subject(scripted_model(tokenizer, script(f"{HINT} {said}", end=end), **changes), tokenizer)


WORDS = (
    "the a town river school storm rain. fell. closed. empty fields near warm winter garden was is and but which "
    "nobody remembered letter dog house. music slow quick watched opened never? long summer"
)


def words(count: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS.split(), k=count))


@pytest.fixture(scope="module")
def news() -> Examples:
    """Documents of 5 to 85 words, in no order of length."""
    return rows(*[(words(5 + 20 * (3 * row % 5), row), words(12, row + 50)) for row in range(10)])


@pytest.fixture(scope="module")
def tiny():
    """Random weights, 64 positions; every token is a word, so that whatever it writes scores something."""
    tokenizer = word_tokenizer(f"{HINT} {WORDS}")
    return subject(make_model(make_config(vocab_size=len(tokenizer), tie_word_embeddings=False)), tokenizer)


SHORT = {"new_tokens": 20, "context": 60}
ROOM = 39  # for the document

# ---------------------------------------------------------------- the figure


def test_by_hand():
    """storm close school near town | the storm close two school in town, stemmed: 4 of 5 and 4 of 7 words, 1 of 4 and
    1 of 6 pairs, the 4 words in the same order."""
    results = measure(planted(), rows(("much rain fell", STORM)), new_tokens=8)
    assert values(results) == pytest.approx([8 / 12, 2 / 10, 8 / 12])
    for result in results:
        assert (result.unit, result.higher_is_better, result.count) == ("F1", True, 1)
        assert result.settings["protocol"] == "TL;DR, greedy"
        assert result.spread is None, "one document has none"


def test_the_mean_over_documents_is_rouge_scores(tiny, news):
    ids = [tiny.tokenizer.encode(f"{' '.join(text.split()[:ROOM])} {HINT}") for text in news.texts]
    written = continuations(tiny.model, ids, 20, ends=[0])
    texts = [first_sentences(tiny.tokenizer.decode(row), 3) for row in written]
    results = measure(tiny, news, **SHORT)
    assert values(results) == pytest.approx(by_hand(texts, news.targets), abs=1e-12)
    assert min(values(results)) > 0
    for result in results:
        assert result.spread["low"] < result.value < result.spread["high"]
        assert "95 %" in result.spread["method"]
    assert values(measure(tiny, news, **SHORT)) == values(results)


def test_the_prompt_changes_no_rouge():
    """The peer's fault is to score decode(output[0]), the prompt with what follows. The model writes the same words
    whatever it has read; a document that holds the summary must not help it."""
    echo, other = f"{STORM} {STORM}", "much rain fell on empty fields"
    model = planted(documents=other)
    results = [
        measure(model, rows((document, STORM)), new_tokens=8, prompt=prompt)
        for document in (echo, other)
        for prompt in (f"\n{HINT}", f" rain {HINT}")
    ]
    for result in results:
        assert values(result) == values(results[0]) == pytest.approx([8 / 12, 2 / 10, 8 / 12])
    with_prompt = by_hand([f"{echo} {HINT} {SAID}"], [STORM])
    assert abs(with_prompt[0] - values(results[0])[0]) > 0.05, "the fault would show"


@pytest.mark.parametrize("top_k", [None, 2])
def test_batch_padding_and_order_change_no_value(tiny, news, top_k):
    alone = values(measure(tiny, news, **SHORT, top_k=top_k, batch=1))
    for batch in (2, 5, 16):
        assert values(measure(tiny, news, **SHORT, top_k=top_k, batch=batch)) == alone
    turned = rows(*list(zip(news.texts, news.targets, strict=True))[::-1])
    assert alone[0] > 0.1 and alone[2] > 0.1
    assert values(measure(tiny, turned, **SHORT, top_k=top_k, batch=4)) == pytest.approx(alone, abs=1e-12)
    torch.manual_seed(9)
    assert values(measure(tiny, news, **SHORT, top_k=top_k)) == alone


def test_top_k_samples_with_the_seed(tiny, news):
    greedy, first, again, other = (
        measure(tiny, news, **SHORT, **changes)[2]
        for changes in ({}, {"top_k": 2}, {"top_k": 2, "seed": 0}, {"top_k": 2, "seed": 1})
    )
    assert first.to_dict() == again.to_dict()
    texts = [[example["generated"] for example in result.details] for result in (greedy, first, other)]
    assert texts[0] != texts[1] != texts[2]
    assert [result.settings["protocol"] for result in (greedy, first)] == ["TL;DR, greedy", "TL;DR, top-k 2"]
    assert [result.settings["seed"] for result in (greedy, first, other)] == [None, 0, 1]


# ---------------------------------------------------------------- what the model is given


def test_documents_are_cut_at_their_end_to_fit(tiny, news):
    """Every position is used and none is passed; the beginning stays, the prompt stands whole at the end."""
    seen: list[list[int]] = []
    positions: list[int] = []

    def record(module, arguments, keywords):
        positions.append(int(keywords["position_ids"].max()))
        ids, mask = keywords["input_ids"], keywords.get("attention_mask")
        if ids.shape[1] > 1:
            own = (torch.ones_like(ids) if mask is None else mask).sum(1)
            seen.extend(row[-int(length) :].tolist() for row, length in zip(ids, own, strict=True))

    handle = tiny.model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        results = measure(tiny, news, new_tokens=20, batch=4)
    finally:
        handle.remove()
    ending = tiny.tokenizer.encode(HINT)
    room = 64 - 20 - 1
    whole = [tiny.tokenizer.encode(text) for text in news.texts]
    assert sorted(seen) == sorted(ids[:room] + ending for ids in whole)
    assert max(map(len, seen)) + 20 == 64
    assert max(positions) == 62, "the last new token is not read again"
    assert results[0].settings["cut"] == np.mean([len(ids) > room for ids in whole]) == 0.6
    assert results[0].settings["context"] == 64


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, "new_tokens=100 and 1 tokens of prompt leave 0 of 64 positions to the document, which needs 16"),
        ({"new_tokens": 48}, "leave 15 of 64"),
        ({"new_tokens": 20, "context": 36}, "leave 15 of 36"),
        ({"context": 65}, "context=65 is not allowed; allowed: whole numbers from 1 to 64"),
        ({"new_tokens": 0}, "new_tokens=0"),
        ({**SHORT, "top_k": 0}, "top_k=0"),
        ({**SHORT, "sentences": 0}, "sentences=0"),
        ({**SHORT, "max_examples": 0}, "max_examples=0"),
        ({**SHORT, "batch": 0}, "batch=0"),
        ({**SHORT, "seed": -1}, "seed=-1"),
        ({**SHORT, "prompt": 3}, "prompt=3"),
    ],
)
def test_refused(tiny, news, settings, message):
    with pytest.raises(UserError, match=message) as caught:
        measure(tiny, news, **settings)
    assert "\n" not in str(caught.value)
    if not {"batch", "seed"} & set(settings):
        with pytest.raises(UserError, match=message):
            references(news, tiny, **settings)


def test_least_room(tiny, news):
    assert measure(tiny, news, new_tokens=47)[0].count == 10


def test_a_language_that_rouge_cannot_count_is_refused(tiny):
    with pytest.raises(UserError, match="no summary of planted has a letter a to z"):
        measure(tiny, rows(("дождь", "дождь идёт")), **SHORT)


# ---------------------------------------------------------------- what is scored


def test_the_end_of_text_ends_a_summary():
    model = planted("storm closes")
    model.model.lm_head.weight.data[model.tokenizer.convert_tokens_to_ids("town")] = (
        model.model.lm_head.weight.data[0] * 0.999
    )  # behind <end> it would say town
    results = measure(model, rows(("much rain fell", STORM)), new_tokens=8)
    assert results[2].details[0]["generated"] == "storm closes"
    assert (results[0].settings["generated_tokens"], results[0].settings["ended"]) == (2.0, 1.0)


def test_a_model_that_writes_nothing_scores_a_visible_zero():
    model = planted("storm")
    silent = subject(scripted_model(model.tokenizer, {HINT: END}), model.tokenizer)
    results = measure(silent, rows(("much rain fell", STORM), ("rain", STORM)), new_tokens=8)
    assert values(results) == [0, 0, 0] and results[0].count == 2
    for result in results:
        assert (result.settings["empty"], result.settings["ended"], result.settings["generated_tokens"]) == (1, 1, 0)
    assert measure(model, rows(("rain", STORM)), new_tokens=8)[0].settings["empty"] == 0


def test_a_model_without_an_end_writes_on():
    tokenizer = word_tokenizer(f"{HINT} storm town", end=None)
    model = subject(scripted_model(tokenizer, script(f"{HINT} storm town", end=False)), tokenizer)
    result = measure(model, rows(("rain", STORM)), new_tokens=9)[2]
    assert result.details[0]["generated"] == " ".join(["storm town"] * 4 + ["storm"])
    assert (result.settings["ended"], result.settings["generated_tokens"]) == (0, 9)


def test_the_first_sentences_are_scored():
    said = "storm closes. schools near! town in? fields empty. rain"
    model = planted(said)
    for count, kept in ((1, 2), (3, 6), (None, 9)):
        result = measure(model, rows(("much rain fell", STORM)), new_tokens=12, sentences=count)[2]
        text = " ".join(said.split()[:kept])
        assert result.details[0]["generated"] == text
        assert result.value == pytest.approx(by_hand([text], [STORM])[2])
        assert result.settings["sentences"] == count


@pytest.mark.parametrize(
    "sentences",
    [
        ["One.", "Two!", "Three?", "Four"],
        ['He said: "Stop!"', "Then (it was late.)", "nothing...", "more"],
        ["it cost 3.5 million.", "mr. smith of the u.s. army paid.", "J. R. Hill did not."],
        ["the vest.", "the best.", "done."],
        [],
    ],
)
def test_sentences(sentences):
    text = f" {' '.join(sentences)} \n"
    assert split_sentences(text) == sentences
    assert split_sentences("a headline\n\n" + text) == ["a headline", *sentences]
    assert first_sentences(text, 2) == " ".join(sentences[:2])
    assert first_sentences(text, None) == text.strip()


def test_the_first_rows_and_examples_to_read(tiny, news):
    results = measure(tiny, news, **SHORT, max_examples=2)
    assert {result.count for result in results} == {2}
    assert results[0].settings["fingerprint"] == news.first(2).fingerprint != news.fingerprint
    assert [result.details is None for result in results] == [True, True, False]
    assert [example["reference"] for example in results[2].details] == list(news.targets[:2])
    assert all(text.startswith(shown["document"]) for text, shown in zip(news.texts, results[2].details, strict=False))
    assert len(measure(tiny, news, **SHORT)[2].details) == 3


# ---------------------------------------------------------------- reference rows


def test_references(tiny, news):
    found = references(news, tiny, **SHORT)
    assert list(found) == ["lead-3", "prompt echo"]
    leads = [" ".join(split_sentences(text)[:3]) for text in news.texts]
    assert values(found["lead-3"]) == pytest.approx(by_hand(leads, news.targets))
    echoes = [" ".join(text.split()[:ROOM]) for text in news.texts]
    assert values(found["prompt echo"]) == pytest.approx(by_hand(echoes, news.targets))
    measured = measure(tiny, news, **SHORT)[0].settings
    for results in found.values():
        for result in results:
            assert result.count == len(news) and result.details is None
            assert result.settings.items() <= measured.items()
    assert list(references(news, tiny, **SHORT, sentences=1)) == ["lead-1", "prompt echo"]
    assert references(news, tiny, **SHORT, max_examples=2)["lead-3"][0].count == 2


def test_as_a_metric_of_a_benchmark(tiny, news):
    assert METRICS["rouge"].standard == "cnn_dailymail"
    origin = provenance(seed=0, base_model="a", base_hash="", device="cpu", dtype="float32")
    asked = {"metric": "rouge", **SHORT, "top_k": 2, "max_examples": 4, "batch": 2, "seed": 3, "sentences": None}
    report = benchmark({"a": tiny, "b": tiny}, [asked], {"rouge": news}, origin=origin, quiet=True)
    assert [row.name for row in report.references] == ["lead-3", "prompt echo"]
    assert report.ratio(report.rows[1], report.rows[1].results[0]) == 1
    assert report.ratio(report.references[0], report.references[0].results[0]) is not None
    gap = benchmark({"a": tiny}, ["rouge", asked], {"rouge": news}, origin=origin, quiet=True).rows[0].gaps
    assert "positions" in gap[0].reason


def test_the_model_and_the_tokenizer_come_back_as_they_were(tiny, news):
    def state():
        return tiny.tokenizer.padding_side, tiny.tokenizer.truncation_side, tiny.tokenizer.pad_token

    before, own = state(), tiny.model.generation_config
    measure(tiny, news, **SHORT)
    assert state() == before
    assert tiny.model.generation_config is own and not tiny.model.training


def test_the_demo_beats_nothing_but_writes_summaries():
    """The demo model knows its summaries by the words "In short:"."""
    from compressor.demo import CHECKPOINT
    from compressor.models import open_model

    model, news = open_model(str(CHECKPOINT), device="cpu"), examples.summaries("demo").first(8)
    asked = measure(model, news, prompt="\nIn short:", new_tokens=40)
    assert values(asked)[0] > 0.2 and asked[0].settings["protocol"] == "In short, greedy"
    assert asked[0].settings["ended"] > 0.5
