"""The protocols, against plain loops over the text, and against a model whose perplexity is known."""

from __future__ import annotations

import math
import re

import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from toy import toy_alignment, toy_blocks
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

from compressor.data import Text
from compressor.errors import UserError
from compressor.metrics.perplexity import perplexity
from compressor.metrics.wikitext import articles, detokenise
from compressor.rewrites import from_record
from compressor.rewrites.compose import apply

END = 256
WIKI = (
    "\n = First = \n \n It cost 1 @,@ 250 , or so , in a well @-@ known shop . \n \n = = Part = = \n \n More "
    '( much more ) , he said . \n \n = Second = \n \n " Yes " , and no ; why ? \n'
)


@pytest.fixture(scope="module")
def tokenizer() -> GPT2Tokenizer:
    letters = {letter: index for index, letter in enumerate(sorted(ByteLevel.alphabet()))}
    return GPT2Tokenizer(vocab={**letters, "<|endoftext|>": END}, merges=[])


def make_model(**changes) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        **{
            "vocab_size": END + 1,
            "n_positions": 16,
            "n_embd": 24,
            "n_layer": 1,
            "n_head": 2,
            "initializer_range": 0.3,
            "bos_token_id": END,
            "eos_token_id": END,
            **changes,
        }
    )
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    return make_model()


def make_text(*documents: str) -> Text:
    return Text(
        documents=documents,
        joined="\n\n".join(documents),
        source="planted",
        part="test",
        split="all",
        fingerprint="f" * 64,
    )


def scores(model, history: list[int], begin: int, end: int, first: int) -> float:
    """Summed NLL of history[first:end] in one window history[begin:end], from the full logits in float64."""
    with torch.no_grad():
        logits = model(torch.tensor([history[begin : end - 1]])).logits[0].double().log_softmax(-1)
    return -sum(float(logits[target - 1 - begin, history[target]]) for target in range(first, end))


def strided_sum(model, ids: list[int], context: int, stride: int) -> float:
    total, scored = 0.0, 1
    for begin in range(0, len(ids), stride):
        end = min(begin + context, len(ids))
        total += scores(model, ids, begin, end, scored)
        scored = end
        if end == len(ids):
            return total
    raise AssertionError


def lm_eval_sum(model, ids: list[int], longest: int) -> float:
    history, total, done = [END, *ids], 0.0, 0
    while done < len(ids):
        new = min(longest, len(ids) - done)
        end = done + new + 1
        total += scores(model, history, max(0, end - 1 - longest), end, done + 1)
        done += new
    return total


def test_uniform_logits_give_the_size_of_the_vocabulary(tokenizer):
    uniform = make_model()
    with torch.no_grad():
        uniform.lm_head.weight.zero_()
    for protocol in ("strided", "lm-eval", "openai-detok"):
        token, word = perplexity(
            uniform, tokenizer, make_text("What is known of this text is nothing."), protocol=protocol
        )
        assert token.value == pytest.approx(257, rel=1e-6)
        assert word.value == pytest.approx(257 ** (token.count / 8), rel=1e-5)
        assert token.spread is None or token.spread["standard_error"] == pytest.approx(0, abs=1e-3)


def test_a_model_without_learned_positions_takes_longer_contexts(model, tokenizer):
    rewrite = from_record({"rewrite": "alibi", "slopes": "geometric", "anneal": 0.0})
    alibi = apply([rewrite], model, toy_alignment(model), calibration=toy_blocks(model.config))
    text = make_text("The first of the documents is longer than the model has positions.")
    ids = tokenizer.encode(text.joined)
    for context, stride in ((40, 20), (500, 250)):
        token, _ = perplexity(alibi, tokenizer, text, context=context, stride=stride)
        wanted = strided_sum(alibi, ids, context, stride) / (len(ids) - 1)
        assert math.log(token.value) == pytest.approx(wanted, rel=1e-6)
        with pytest.raises(UserError, match=f"context={context} is not allowed; allowed: whole numbers from 1 to 16"):
            perplexity(model, tokenizer, text, context=context, stride=stride)


@pytest.mark.parametrize(("context", "stride"), [(None, None), (16, 5), (8, None), (12, 1)])
def test_strided_equals_a_loop(model, tokenizer, context, stride):
    text = make_text("The first of the documents.", "And, later, a second one: été.")
    token, word = perplexity(model, tokenizer, text, context=context, stride=stride)
    ids = tokenizer.encode(text.joined)
    context = context or 16
    wanted = strided_sum(model, ids, context, stride or context // 2)
    assert token.count == word.count == len(ids) - 1
    assert math.log(token.value) == pytest.approx(wanted / (len(ids) - 1), rel=1e-6)
    assert math.log(word.value) == pytest.approx(wanted / 11, rel=1e-6)
    assert (token.metric, word.metric, token.unit, word.unit) == (
        "perplexity",
        "word_perplexity",
        "per token",
        "per word",
    )
    assert token.settings["context"] == context and token.settings["stride"] == (stride or context // 2)
    assert token.settings["joiner"] == "\n\n" and token.settings["tokens"] == len(ids)
    assert token.settings["fingerprint"] == "f" * 64 and token.settings["protocol"] == "strided"
    assert not token.higher_is_better


def test_lm_eval_equals_a_loop_over_documents(model, tokenizer):
    documents = ["The first of the documents.\n", "", "A", " two words ", "And a last, rather longer one, to end with."]
    token, word = perplexity(model, tokenizer, make_text(*documents), protocol="lm-eval", context=9)
    wanted = sum(lm_eval_sum(model, tokenizer.encode(text), 9) for text in documents if text)
    count = sum(len(tokenizer.encode(text)) for text in documents)
    assert token.count == count  # each document's first token too
    assert math.log(token.value) == pytest.approx(wanted / count, rel=1e-6)
    words = sum(len(re.split(r"\s+", text)) for text in documents if text)
    assert math.log(word.value) == pytest.approx(wanted / words, rel=1e-6)


def test_lm_eval_reads_wikitext_by_the_article_and_detokenised(model, tokenizer):
    token, word = perplexity(model, tokenizer, make_text(WIKI), protocol="lm-eval")
    pages = articles([WIKI])
    wanted = sum(lm_eval_sum(model, tokenizer.encode(detokenise(page)), 16) for page in pages)
    assert len(pages) == 2 and "@" in pages[0] and token.settings["documents"] == 2
    assert math.log(word.value) == pytest.approx(wanted / sum(len(re.split(r"\s+", page)) for page in pages), rel=1e-6)
    assert token.settings["detokenised"] is True
    rows = make_text(*["" if not line.strip() else line + "\n" for line in WIKI.split("\n")[:-1]])
    again = perplexity(model, tokenizer, rows, protocol="lm-eval")[1]
    assert again.count == token.count and math.log(again.value) == pytest.approx(math.log(word.value), rel=0.02)


def test_openai_detok_scores_the_detokenised_text_over_the_words_given(model, tokenizer):
    text = make_text(WIKI)
    token, word = perplexity(model, tokenizer, text, protocol="openai-detok", stride=16)
    ids = tokenizer.encode(detokenise(WIKI))
    assert token.count == len(ids) - 1 < len(tokenizer.encode(WIKI)) - 1
    again, _ = perplexity(model, tokenizer, make_text(detokenise(WIKI)), stride=16)
    assert token.value == again.value
    assert math.log(word.value) == pytest.approx(math.log(token.value) * token.count / len(WIKI.split()), rel=1e-9)


@pytest.mark.parametrize("protocol", ["strided", "lm-eval", "openai-detok"])
def test_batch_size_changes_nothing(model, tokenizer, protocol):
    text = make_text("Short.", "A text that is longer than a window of the model.", "Once more, and again.", "x")
    one, _ = perplexity(model, tokenizer, text, protocol=protocol, batch_tokens=1)
    for batch_tokens in (40, 10_000):
        other, _ = perplexity(model, tokenizer, text, protocol=protocol, batch_tokens=batch_tokens)
        assert other.value == pytest.approx(one.value, rel=1e-6) and other.count == one.count


def test_max_tokens_takes_the_first_of_the_text(model, tokenizer):
    text = make_text("one two three four", "five six")
    for protocol in ("strided", "lm-eval"):
        token, word = perplexity(model, tokenizer, text, protocol=protocol, max_tokens=9)  # "one two t"
        whole, _ = perplexity(model, tokenizer, make_text("one two t"), protocol=protocol)
        assert token.value == pytest.approx(whole.value, rel=1e-9) and token.settings["tokens"] == 9
        assert word.settings["words"] == 3
    token, word = perplexity(model, tokenizer, text, protocol="lm-eval", max_tokens=22)  # "five" of the second
    assert token.count == 22 and word.settings["words"] == 5 and token.settings["max_tokens"] == 22
    token, word = perplexity(model, tokenizer, make_text("a well @-@ known one"), protocol="openai-detok", max_tokens=8)
    assert word.settings["words"] == 4  # "a well-k" begins a, well, @-@, known
    everything, _ = perplexity(model, tokenizer, text, max_tokens=10_000)
    assert everything.count == len(text.joined) - 1


def test_spread_is_the_delta_method_on_block_means(model, tokenizer):
    text = make_text("Many words in a row, so that there are several blocks, of which this is the last but one.")
    token, word = perplexity(model, tokenizer, text, context=8)
    assert token.spread is not None and word.spread is not None
    relative = token.spread["standard_error"] / token.value
    assert 0.001 < relative < 1 and "blocks of 8" in token.spread["method"]
    per_word = token.count / word.settings["words"]
    assert word.spread["standard_error"] / word.value == pytest.approx(relative * per_word, rel=1e-9)
    assert perplexity(model, tokenizer, make_text("short"))[0].spread is None


def test_bfloat16_is_close(model, tokenizer):
    text = make_text("A text to be scored by two models, one of them in half the precision of the other.")
    full, _ = perplexity(model, tokenizer, text)
    half, _ = perplexity(make_model().to(torch.bfloat16), tokenizer, text)
    assert half.value == pytest.approx(full.value, rel=0.03)


def test_what_is_not_finite_is_said_and_is_no_json_number(tokenizer):
    broken = make_model()
    with torch.no_grad():
        broken.transformer.wpe.weight[0] = math.nan
    token, _ = perplexity(broken, tokenizer, make_text("some text"))
    assert math.isnan(token.value) and token.to_dict()["value"] is None and token.spread is None
    hopeless = make_model()
    with torch.no_grad():
        hopeless.lm_head.weight.mul_(1e6)
    token, _ = perplexity(hopeless, tokenizer, make_text("some text"))
    assert math.isinf(token.value) and token.to_dict()["value"] is None
    assert math.isnan(type(token).from_dict(token.to_dict()).value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"context": 17}, r"context=17 is not allowed; allowed: whole numbers from 1 to 16"),
        ({"context": 0}, r"context=0 is not allowed"),
        ({"context": "all"}, r"context='all' is not allowed"),
        ({"stride": 17}, r"stride=17 is not allowed; allowed: whole numbers from 1 to 16"),
        ({"context": 8, "stride": 9}, r"stride=9 is not allowed; allowed: whole numbers from 1 to 8"),
        ({"stride": 0}, r"stride=0 is not allowed"),
        ({"stride": -4}, r"stride=-4 is not allowed"),
        ({"stride": True}, r"stride=True is not allowed"),
        ({"max_tokens": 1}, r"max_tokens=1 is not allowed; allowed: whole numbers from 2"),
        ({"batch_tokens": 0}, r"batch_tokens=0 is not allowed"),
        ({"protocol": "stridden"}, r"unknown protocol of perplexity 'stridden' \(did you mean 'strided'\?\)"),
        ({"protocol": "lm-eval", "stride": 4}, r"stride=4 is not allowed with protocol 'lm-eval'"),
    ],
)
def test_bad_settings_are_one_line(model, tokenizer, given, message):
    with pytest.raises(UserError, match=message) as caught:
        perplexity(model, tokenizer, make_text("some text"), **given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("protocol", ["strided", "lm-eval", "openai-detok"])
@pytest.mark.parametrize("documents", [("",), ("x",), ()])
def test_too_little_text_is_one_line(model, tokenizer, documents, protocol):
    with pytest.raises(UserError, match=r"planted has [01] tokens of text; perplexity needs 2 or more"):
        perplexity(model, tokenizer, make_text(*documents), protocol=protocol)


def test_a_tokenizer_of_another_model_is_refused(tokenizer):
    with pytest.raises(UserError, match="vocabulary ends at 89"):
        perplexity(make_model(vocab_size=90, bos_token_id=0, eos_token_id=0), tokenizer, make_text("zzz yyy"))
