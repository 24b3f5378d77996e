"""Perplexity by length and text past it: against plain loops over windows, and planted models."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from conftest import make_config, make_model
from scripted import subject
from toy import toy_alignment, toy_blocks

from compressor import gpt2
from compressor.data import Text
from compressor.errors import UserError
from compressor.metrics import METRICS
from compressor.metrics.extrapolation import by_position, measure
from compressor.metrics.nll import strided_spans
from compressor.metrics.past_length import repetition
from compressor.rewrites import from_record
from compressor.rewrites.compose import apply

TRAINED = 16


def text_of(words: str) -> Text:
    return Text((words,), words, "planted", "test", "all", "f" * 64)


@pytest.fixture(scope="module")
def text(text_file) -> Text:
    return text_of(text_file.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def plain():
    return make_model(make_config(n_positions=TRAINED, n_layer=2))


@pytest.fixture(scope="module")
def alibi(plain):
    """It takes any number of tokens at once."""
    rewrite = from_record({"rewrite": "alibi", "slopes": "geometric", "anneal": 0.0})
    return apply([rewrite], plain, toy_alignment(plain), calibration=toy_blocks(plain.config))


@pytest.fixture(scope="module")
def found(alibi, tiny_tokenizer, text):
    return measure(subject(alibi, tiny_tokenizer), text, max_tokens=300, prompts=2)


def losses(model, ids: list[int], context: int, stride: int) -> dict[int, tuple[int, float]]:
    """Of each token its place in its window and its NLL, window by window from the full logits in float64. Without
    overlap a window hands on the token behind it."""
    known: dict[int, tuple[int, float]] = {}
    for begin in range(0, len(ids), stride):
        window = ids[begin : begin + context + (stride == context)]
        with torch.no_grad():
            chances = model(torch.tensor([window[:-1]])).logits[0].double().log_softmax(-1) if window[1:] else []
        for place, token in enumerate(window[1:], 1):
            known.setdefault(begin + place, (place, -float(chances[place - 1, token])))
    return known


def lengths(results) -> dict:
    return {
        (item.settings["protocol"], item.settings["context"]): item
        for item in results
        if item.metric == "length_perplexity"
    }


def mean(values) -> float:
    values = list(values)
    return math.fsum(values) / len(values)


# ---------------------------------------------------------------- perplexity by length


def test_every_length_scores_the_same_tokens_as_a_loop_over_windows_does(found, alibi, tiny_tokenizer, text):
    ids = tiny_tokenizer.encode(text.joined)[:300]
    own = lengths(found)
    assert list(own) == [(kind, context) for kind in ("sliding", "non-overlapping") for context in (4, 8, 16, 32, 64)]
    for (kind, context), item in own.items():
        stride = context // 2 if kind == "sliding" else context
        known = losses(alibi, ids, context, stride)
        assert sorted(known) == list(range(1, 300)) and item.count == 299
        assert item.settings["stride"] == stride and item.settings["takes"] is None
        assert math.log(item.value) == pytest.approx(mean(nll for _, nll in known.values()), rel=1e-5)


def test_a_plain_model_has_no_figure_beyond_its_positions_and_says_why(found, plain, tiny_tokenizer, text):
    results = measure(subject(plain, tiny_tokenizer), text, max_tokens=300, prompts=2)
    own, ids = lengths(results), tiny_tokenizer.encode(text.joined)[:300]
    assert {context for _, context in own} == {4, 8, 16}
    assert {item.settings["takes"] for item in own.values()} == {TRAINED}
    assert math.log(own["sliding", 16].value) == pytest.approx(
        mean(nll for _, nll in losses(plain, ids, 16, 8).values()), rel=1e-5
    )
    assert {item.count for item in own.values()} == {item.count for item in lengths(found).values()}
    texts = [item for item in results if item.metric == "repetition"]
    assert {item.settings["context"] for item in texts} == {TRAINED}
    assert {item.details[0]["text"] for item in texts} == {f"(cannot: takes {TRAINED} tokens)"}


def test_the_ratio_has_the_error_of_what_differs_on_the_same_tokens(found):
    own = lengths(found)
    assert own["sliding", 16].spread["ratio_error"] == 0
    alone = {key: item.spread["standard_error"] / item.value for key, item in own.items()}
    for key, item in own.items():  # of two texts it would be the root of both squares
        assert item.spread["ratio_error"] < 0.9 * math.hypot(alone[key], alone["sliding", 16])


def test_the_error_of_the_ratio_is_of_the_pairs_in_blocks_of_the_longer_window(found, alibi, tiny_tokenizer, text):
    """ratio = e^(mean of what differs); its error is that times the error of the mean, from sums over blocks."""
    ids = tiny_tokenizer.encode(text.joined)[:300]
    for kind, strides in (("sliding", (8, 4, 32)), ("non-overlapping", (16, 8, 64))):
        trained, *others = (
            [nll for _, (_, nll) in sorted(losses(alibi, ids, context, stride).items())]
            for context, stride in zip((16, 8, 64), strides, strict=True)
        )
        for context, own in zip((8, 64), others, strict=True):
            apart = np.array(own) - np.array(trained)
            blocks = [apart[start : start + max(context, 16)] for start in range(0, 299, max(context, 16))]
            residuals = [block.sum() - len(block) * apart.mean() for block in blocks]
            error = math.sqrt(len(blocks) / (len(blocks) - 1) * np.square(residuals).sum()) / 299
            wanted = math.exp(apart.mean()) * error
            assert lengths(found)[kind, context].spread["ratio_error"] == pytest.approx(wanted, rel=1e-4)


def test_settings_change_what_they_name(alibi, tiny_tokenizer, text):
    results = measure(
        subject(alibi, tiny_tokenizer), text, multiples=[3], context=8, stride=0.25, max_tokens=100, prompts=0
    )
    assert [(item.settings["context"], item.settings["stride"]) for item in results] == [
        (8, 2),
        (24, 6),
        (8, 8),
        (24, 24),
    ]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_tokens": 64}, "64 tokens of planted do not fill a window of 65; give more text or max_tokens"),
        ({"multiples": [0.05]}, "are lengths below 2"),
        ({"multiples": "4"}, "multiples='4' is not allowed; allowed: a list of numbers above 0"),
        ({"multiples": [-1]}, "a list of numbers above 0"),
        ({"stride": 1}, "stride=1 is not allowed; allowed: a share of the context, above 0 and below 1"),
        ({"prompts": -1}, "prompts=-1 is not allowed"),
        ({"context": 64, "multiples": [0.5]}, "takes 16 tokens; asked for 32, 64"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(plain, tiny_tokenizer, text, settings, said):
    with pytest.raises(UserError) as error:
        measure(subject(plain, tiny_tokenizer), text, **{"max_tokens": 400, **settings})
    assert said in str(error.value) and "\n" not in str(error.value)


def test_its_settings_are_those_that_may_be_named():
    assert METRICS["extrapolation"].settings == {
        "multiples", "context", "stride", "max_tokens", "batch_tokens", "prompts", "top_k", "seed"
    }  # fmt: skip


# ---------------------------------------------------------------- by position


def test_loss_by_position_equals_a_loop(found, alibi, tiny_tokenizer, text):
    ids = tiny_tokenizer.encode(text.joined)[:300]
    known, others = losses(alibi, ids, 64, 64), losses(alibi, ids, 16, 8)
    bins = lengths(found)["non-overlapping", 64].details
    assert [(item["first"], item["last"]) for item in bins] == [(first, first + 7) for first in range(1, 64, 8)]
    for item in bins:
        inside = [target for target, (place, _) in known.items() if item["first"] <= place <= item["last"]]
        assert item["tokens"] == len(inside)
        assert item["nll"] == pytest.approx(mean(known[target][1] for target in inside), rel=1e-5)
        assert item["others"] == pytest.approx(mean(others[target][1] for target in inside), rel=1e-5)


def test_a_loss_that_rises_with_the_position_is_seen(tiny_tokenizer):
    """Of a model whose embeddings of positions turn away from the one token that the text has."""
    letter = tiny_tokenizer.encode("a")[0]
    model = make_model(make_config(n_positions=TRAINED, n_layer=1, tie_word_embeddings=False))
    first, second = torch.tensor([1.0, -1.0] * 16), torch.tensor([1.0, 1.0, -1.0, -1.0] * 8)
    angles = torch.linspace(0, 3, TRAINED)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if ".ln_f.weight" in name else 0.0)
        model.transformer.wpe.weight.copy_(100 * (angles.cos()[:, None] * first + angles.sin()[:, None] * second))
        model.lm_head.weight[letter] = first / 32  # the logit of the token is the cosine
    one = text_of("a" * 400)
    assert set(tiny_tokenizer.encode(one.joined)) == {letter}, "the tokenizer has a token for two letters"
    results = measure(subject(model, tiny_tokenizer), one, multiples=[1], max_tokens=16 * 20 + 1, prompts=0)
    (last,) = [item for item in results if item.details]
    wanted = [math.log(math.exp(cosine) + 319) - cosine for cosine in angles.cos().tolist()]
    for place, item in enumerate(last.details):  # bins of two positions
        assert item["nll"] == pytest.approx(mean(wanted[2 * place : 2 * place + 2]), rel=1e-4)
    assert [item["nll"] for item in last.details] == sorted(item["nll"] for item in last.details)


def test_bins_count_the_tokens_in_view():
    spans = strided_spans(10, 4, 4)
    nll = torch.arange(9, dtype=torch.float64)
    assert by_position(nll, -nll, spans, 2) == [
        {"first": 1, "last": 2, "tokens": 5, "nll": (0 + 1 + 4 + 5 + 8) / 5, "others": -18 / 5},
        {"first": 3, "last": 4, "tokens": 4, "nll": (2 + 3 + 6 + 7) / 4, "others": -18 / 4},
    ]


# ---------------------------------------------------------------- text past the trained length


def test_text_past_the_trained_length_is_what_generation_without_cache_writes(found, alibi, tiny_tokenizer, text):
    ids = tiny_tokenizer.encode(text.joined)[:300]
    texts = {
        (item.settings["protocol"], item.settings["context"]): item for item in found if item.metric == "repetition"
    }
    assert list(texts) == [("greedy", 16), ("greedy", 32), ("top-k 40", 16), ("top-k 40", 32)]
    written = []
    for start in (0, 300 - 32):
        own = ids[start : start + 8]
        for _ in range(24):
            with torch.no_grad():
                scores = alibi(torch.tensor([own]), use_cache=False).logits[0, -1]
            scores[0] = -torch.inf  # the end of text
            own.append(int(scores.argmax()))
        written.append(own)
    for context in (16, 32):
        item = texts["greedy", context]
        assert item.value == pytest.approx(mean(repetition(own[context - 8 : context]) for own in written))
        assert item.settings["text_repetition"] == pytest.approx(
            mean(repetition(ids[start + context - 8 : start + context]) for start in (0, 268))
        )
        assert 0 <= item.settings["cache_gap"] < 1e-4
        with torch.no_grad():
            chances = [alibi(torch.tensor([own])).logits[0].double().log_softmax(-1) for own in written]
        wanted = mean(
            -float(chance[place - 1, own[place]])
            for chance, own in zip(chances, written, strict=True)
            for place in range(context - 8, context)
        )
        assert item.settings["nll"] == pytest.approx(wanted, rel=1e-4)
    (sample,) = texts["greedy", 32].details
    assert sample["text"] == tiny_tokenizer.decode(written[0][16:]) and sample["decoding"] == "greedy, from token 17 on"
    assert texts["greedy", 16].details is None and texts["top-k 40", 32].settings["cache_gap"] is None


def test_a_cache_that_loses_its_biases_is_found_out(alibi, tiny_tokenizer, text, monkeypatch):
    kind = type(gpt2.attention(alibi, 0).alibi)  # this one is taken for one token behind a cache
    monkeypatch.setattr(kind, "bias", lambda self, query, keys, *_: query.new_zeros(1, query.shape[1], 1, keys))
    results = measure(subject(alibi, tiny_tokenizer), text, max_tokens=300)
    assert max(item.settings["cache_gap"] or 0 for item in results if item.metric == "repetition") > 1e-3


def test_the_end_of_text_that_may_not_be_chosen_is_no_gap(alibi, tiny_tokenizer, text):
    model = copy.deepcopy(alibi)
    with torch.no_grad():
        model.transformer.ln_f.bias.add_(9 * model.transformer.wte.weight[0])
    results = measure(subject(model, tiny_tokenizer), text, max_tokens=300)
    assert max(item.settings["cache_gap"] or 0 for item in results if item.metric == "repetition") < 1e-4


def test_repetition():
    assert repetition(list(range(20))) == 0 and repetition([1, 2, 3]) == 0
    assert repetition([1, 2] * 10) == pytest.approx(1 - 2 / 17)
    assert repetition([*range(10), *range(10)]) == pytest.approx(1 - 10 / 17)
