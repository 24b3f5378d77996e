"""Perplexity: exp of the summed negative log-likelihood over the count of real tokens scored; never a mean of means."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import JOINER, Text
from ..errors import UserError, unknown
from ..gpt2 import longest
from ..models import OpenModel
from ..tokens import text_ids
from .base import MetricResult, Progress, whole
from .nll import BATCH_TOKENS, rolling_spans, standard_error, strided_spans, text_nll
from .wikitext import articles, detokenise, is_wikitext, words_begun

PROTOCOLS = ("strided", "lm-eval", "openai-detok")
SETTINGS = frozenset({"protocol", "context", "stride", "max_tokens", "batch_tokens"})


def _prefix(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The token that stands before a document: the tokenizer's BOS, else its EOS (GPT-2: <|endoftext|> is both)."""
    for candidate in (tokenizer.bos_token_id, tokenizer.eos_token_id, model.config.eos_token_id):
        if isinstance(candidate, int) and candidate < model.config.vocab_size:
            return torch.tensor([candidate])
    raise UserError("protocol 'lm-eval' puts an end-of-text token before each document; this tokenizer has none")


def _words(document: str) -> int:
    return len(document.split())


def _lm_eval_words(document: str) -> int:
    """As lm-evaluation-harness counts: blanks at either end of a document make one word more."""
    return len(re.split(r"\s+", document))


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: Text,
    *,
    protocol: str = "strided",
    context: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
) -> list[MetricResult]:
    """Token perplexity and word perplexity of `text` under one protocol.

    strided: the joined text, windows of `context` (default n_positions) advancing by `stride` (default half of it);
        the text's first token is not scored; words are those of the text.
    lm-eval: as lm-evaluation-harness's loglikelihood_rolling, per document (WikiText: per article, detokenised), EOT
        before each, disjoint windows, all tokens scored; words counted as it does.
    openai-detok: strided windows over the detokenised text; words are those of the text as given.

    max_tokens: score the first so many tokens only; words then are those begun within them. batch_tokens: tokens a
    forward pass takes; it does not change the result. Runs where the model is.
    Raises UserError for an unknown protocol, windows the model cannot hold, and a text of fewer than two tokens.
    """
    if protocol not in PROTOCOLS:
        raise unknown("protocol of perplexity", protocol, PROTOCOLS)
    context = whole("context", model.config.n_positions if context is None else context, 1, longest(model.config))
    if max_tokens is not None:
        whole("max_tokens", max_tokens, 2)
    whole("batch_tokens", batch_tokens, 1)
    if protocol == "lm-eval":
        if stride not in (None, context):
            raise UserError(f"stride={stride!r} is not allowed with protocol 'lm-eval': its windows are disjoint")
        stride = context
    else:
        stride = whole("stride", max(1, context // 2) if stride is None else stride, 1, context)

    rolling, from_wikitext = protocol == "lm-eval", is_wikitext(text.documents)
    detokenised = from_wikitext if rolling else protocol == "openai-detok"
    documents, count_words = [text.joined], _words
    if rolling:
        documents, count_words = articles(text.documents) if from_wikitext else list(text.documents), _lm_eval_words
    sequences, words = _first_tokens(
        tokenizer, model.config.vocab_size, documents, max_tokens, detokenised, count_words
    )
    tokens = sum(map(len, sequences))
    if tokens < 2:
        raise UserError(f"{text.source} has {tokens} tokens of text; perplexity needs 2 or more")
    if rolling:
        prefix = _prefix(model, tokenizer)
        sequences = [torch.cat([prefix, ids]) for ids in sequences]
        spans = [rolling_spans(len(ids), context) for ids in sequences]
    else:
        spans = [strided_spans(len(ids), context, stride) for ids in sequences]
    nll = text_nll(model, sequences, spans, batch_tokens=batch_tokens, progress=progress)

    settings = {
        "protocol": protocol,
        "context": context,
        "stride": stride,
        "max_tokens": max_tokens,
        "joiner": None if rolling or len(text.documents) == 1 else JOINER,
        "detokenised": detokenised,
        "documents": len(sequences),
        "tokens": tokens,
        "words": words,
        "source": text.source,
        "part": text.part,
        "split": text.split,
        "fingerprint": text.fingerprint,
    }
    error = standard_error(nll, context)
    return [
        perplexity_result("perplexity", "per token", nll, len(nll), context, error, settings),
        perplexity_result("word_perplexity", "per word", nll, words, context, error, settings),
    ]


def _first_tokens(
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: int,
    documents: Sequence[str],
    max_tokens: int | None,
    detokenised: bool,
    count_words: Callable[[str], int],
) -> tuple[list[Tensor], int]:
    """The token ids of the documents up to `max_tokens` in all, and the number of words of the documents as given."""
    sequences: list[Tensor] = []
    words, left = 0, math.inf if max_tokens is None else max_tokens
    for document in documents:
        ids = torch.tensor(
            text_ids(tokenizer, vocabulary, detokenise(document) if detokenised else document), dtype=torch.int64
        )
        if len(ids) > left:
            ids = ids[: int(left)]
            words += words_begun(document, str(tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)))
        else:
            words += count_words(document) if len(ids) else 0
        if len(ids):
            sequences.append(ids)
        left -= len(ids)
        if left <= 0:
            break
    return sequences, words


def perplexity_result(
    metric: str, unit: str, nll: Tensor, units: int, block: int, error: float | None, settings: dict[str, Any]
) -> MetricResult:
    """exp(sum / units) of nll float64[scored], with the standard error carried through the exponential."""
    from .measures import Perplexity

    value = Perplexity().compute(predictions=nll.numpy(), units=units)["perplexity"]
    spread = (
        None
        if error is None or not math.isfinite(value)
        else {
            "standard_error": value * error * len(nll) / max(1, units),
            "method": f"delta method on the mean over blocks of {block} tokens",
        }
    )
    return MetricResult(metric, value, unit, False, len(nll), spread, settings)


def measure(subject: OpenModel, data: Text, *, progress: Progress | None = None, **settings: Any) -> list[MetricResult]:
    """`perplexity` as an entry of METRICS."""
    return perplexity(subject.model, subject.tokenizer, data, progress=progress, **settings)
