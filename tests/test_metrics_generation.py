"""Loops that were planted and texts that only repeat themselves; continuations of the same length from every model."""

from __future__ import annotations

import copy
import os
from itertools import cycle, islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from compressor import examples
from compressor.benchmark import METRICS
from compressor.errors import UserError
from compressor.metrics.generation import PROMPTS, loops, measure
from tests.conftest import make_text
from tests.scripted import END, script, scripted_model, subject, word_tokenizer

DATA = Path(os.environ.get("GPT2_COMPRESS_TEST_DATA", "nowhere")) / "data"
GOOD = list(range(100, 160))  # 60 tokens, no two alike


def tokens(text: str) -> list[int]:
    """A token a word, a mark or a line's end: the same number for the same one."""
    words = text.replace("\n", " \\n ").replace(",", " ,").replace(".", " .").split()
    known = {word: place for place, word in enumerate(dict.fromkeys(words))}
    return [known[word] for word in words]


def looped(start: int, period: int, length: int = 60, varied: bool = False) -> list[int]:
    """`start` good tokens, then the same `period` tokens again and again, every other one changed if `varied`."""
    ids = GOOD[:start] + list(islice(cycle(range(period)), length - start))
    return [500 + place if varied and place % 2 else token for place, token in enumerate(ids)]


# ---------------------------------------------------------------- loops


@pytest.mark.parametrize("period", [1, 2, 5, 12, 20])
@pytest.mark.parametrize("start", [0, 7, 20])
def test_a_loop_is_found(start, period):
    assert loops(looped(start, period))


@pytest.mark.parametrize("start, period", [(47, 1), (46, 2), (43, 5), (36, 12), (20, 20)])
def test_a_loop_is_found_from_twelve_repeated_tokens_and_a_whole_period_on(start, period):
    assert loops(looped(start, period))
    assert not loops(looped(start + 1, period)), "one repeated token less"


def test_going_round_with_variations_is_a_loop():
    text = (
        "she was a man , and she was a little more than a little . she was a man , and she had been a little more than "
        "a little girl . she was a little boy , and she had been a little more than a little girl . she was a little"
    )
    assert loops(tokens(text))
    assert not loops(looped(10, 5, varied=True)), "half of it is new: no loop"


NORMAL = {
    "emphasis": "it was a very very very good film and I would watch it again and again , it is so good . ha ha ha",
    "list": "what we need :\n1. a loaf of bread\n2. a bag of flour\n3. a jar of honey\n4. a box of tea\n5. a piece of "
    "cheese\n6. a bottle of milk\n7. a sack of rice\n8. a tin of soup\n",
    "parallels": "we shall fight on the beaches , we shall fight on the landing grounds , we shall fight in the fields "
    "and in the streets , we shall fight in the hills ; we shall never surrender .",
    "refrain": "row , row , row your boat gently down the stream , merrily , merrily , merrily , merrily , life is but "
    "a dream .",
    "dialogue": "how are you ? I am fine . and how are you ? I am fine too . shall we go to the park ? no , I am tired",
    "said twice": "the dog ran over the hill and far away . nobody saw it . when the children came home they asked the "
    "old man at the gate , but he only said : the dog ran over the hill and far away . so they went to look for it",
    "short": "no no no no",
    "nothing": "",
}


@pytest.mark.parametrize("name", NORMAL)
def test_normal_text_is_no_loop(name):
    assert not loops(tokens(NORMAL[name]))


def test_texts_of_people_are_hardly_ever_taken_for_loops():
    """A token is a word here; of 60 of them, as of a continuation's 60 tokens."""
    if not DATA.is_dir():
        pytest.skip("needs the shared data")
    documents = examples.summaries(str(DATA / "bbc-summary")).texts + examples.summaries(str(DATA / "dialogsum")).texts
    ids = [tokens(document) for document in documents]
    pieces = [row[place : place + 60] for row in ids for place in range(0, len(row) - 59, 60)]
    assert len(pieces) > 2000
    assert sum(map(loops, pieces)) <= 2


# ---------------------------------------------------------------- the metric


@pytest.fixture
def tiny(_tiny_model, tiny_tokenizer):
    return subject(_tiny_model, tiny_tokenizer)


@pytest.fixture(scope="module")
def writer():
    """Would say "we walk the road," and <end>; where that is forbidden, "to town we walk the road," and so on."""
    line = "go we walk the road, to town"
    tokenizer = word_tokenizer(line)
    model = scripted_model(tokenizer, script(line, end=False))
    with torch.no_grad():
        model.lm_head.weight[0] = 1.5 * model.lm_head.weight[tokenizer.convert_tokens_to_ids("to")]
    return subject(model, tokenizer)


def test_results(tiny):
    results = measure(tiny, None)
    assert [result.metric for result in results] == ["distinct1", "distinct2", "looping"]
    assert [result.higher_is_better for result in results] == [True, True, False]
    assert {result.count for result in results} == {2 * len(PROMPTS)}
    assert PROMPTS[0] == "India will become global leader in AI because"
    texts = results[1].details
    assert [text["prompt"] for text in texts] == [*PROMPTS, *PROMPTS]
    assert [text["decoding"] for text in texts] == ["greedy"] * 8 + ["top-k 40"] * 8
    assert [text["seed"] for text in texts] == [None] * 8 + [0] * 8
    assert results[0].settings["protocol"] == "greedy and top-k 40"

    def share(grams):
        return len(set(grams)) / len(grams)

    words = [text["text"].split() for text in texts]
    assert results[0].value == pytest.approx(share([word for row in words for word in row]))
    assert results[1].value == pytest.approx(share([pair for row in words for pair in pairwise(row)]))
    looping = [text["loops"] for text in texts]
    assert results[2].value == np.mean(looping)
    assert results[2].settings["looping"] == {"greedy": np.mean(looping[:8]), "top-k 40": np.mean(looping[8:])}


def test_only_what_is_written_is_shown_and_it_goes_on_past_the_end(writer):
    """The peer's other fault: models that want <end> early write less, and look the more varied for it."""
    results = measure(writer, prompts=["go", "walk the"], new_tokens=30, top_k=2)
    greedy = [text for text in results[1].details if text["decoding"] == "greedy"]
    round_ = ["we", "walk", "the", "road,", "to", "town"]
    assert greedy[0]["text"].split() == list(islice(cycle(round_), 30))
    assert greedy[1]["text"].split() == list(islice(cycle(round_), 3, 33))
    assert all(text["loops"] for text in greedy)
    assert {len(text["text"].split()) for text in results[1].details} == {30}
    assert END not in "".join(text["text"] for text in results[1].details)
    assert results[2].settings["looping"]["greedy"] == 1


def test_the_seed_makes_the_sampled_texts(tiny):
    def texts(**settings):
        return [text["text"] for text in measure(tiny, **settings)[1].details]

    first = texts()
    torch.manual_seed(3)
    assert texts(seed=0) == first
    other = texts(seed=1)
    assert other[:8] == first[:8] and all(one != two for one, two in zip(other[8:], first[8:], strict=True))
    assert texts(top_k=1) == first[:8] * 2
    assert texts(prompts=list(PROMPTS[2:5]))[:3] == first[2:5], "a prompt's text hangs on no other prompt"


def test_models_side_by_side_share_the_random_numbers(tiny):
    near = copy.deepcopy(tiny.model)
    with torch.no_grad():
        near.lm_head.weight.mul_(1 + 1e-5)
    assert measure(subject(near, tiny.tokenizer))[1].details == measure(tiny)[1].details


def test_few_positions(tiny, tiny_tokenizer):
    lengths = [len(tiny_tokenizer.encode(prompt)) for prompt in PROMPTS]
    assert measure(tiny)[0].settings["new_tokens"] == 64 - max(lengths) < 60, "fewer, and it says so"
    assert measure(tiny, prompts=["a"])[0].settings["new_tokens"] == 60
    assert measure(tiny, prompts=["a"], new_tokens=63)[0].settings["new_tokens"] == 63
    with pytest.raises(UserError, match="new_tokens=64 is not allowed; allowed: whole numbers from 16 to 63"):
        measure(tiny, prompts=["a"], new_tokens=64)
    long = make_text(20)
    with pytest.raises(UserError, match=r"^the longest prompt has \d+ tokens and leaves 0 of the model's 64 positions"):
        measure(tiny, prompts=["a", long])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"prompts": "India"}, "prompts='India' is not allowed; allowed: a list of texts"),
        ({"prompts": []}, "a list of texts"),
        ({"prompts": ["a", ""]}, "a list of texts"),
        ({"prompts": ["a", 3]}, "a list of texts"),
        ({"new_tokens": 15}, "new_tokens=15"),
        ({"top_k": 0}, "top_k=0"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": True}, "seed=True"),
    ],
)
def test_refused(tiny, settings, message):
    with pytest.raises(UserError, match=message):
        measure(tiny, **settings)


def test_as_a_metric(tiny):
    metric, seen = METRICS["generation"], []
    metric.run(tiny, None, progress=lambda done, total: seen.append((done, total)), prompts=["a"], seed=1)
    assert seen == [(1, 2), (2, 2)]
    assert metric.data is None and metric.settings == {"prompts", "new_tokens", "top_k", "seed"}


def test_other_prompts_are_another_measurement(tiny):
    settings = [measure(tiny, prompts=prompts)[0].settings for prompts in (["a"], ["b"], ["a"])]
    assert settings[0] == settings[2] and settings[0]["fingerprint"] != settings[1]["fingerprint"]
