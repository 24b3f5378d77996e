"""Perplexity at lengths below and above the trained context, in two kinds of windows, and text written past it.

Every length and every model scores the same tokens: all of the text but its first. In non-overlapping windows fewer
tokens stand near the beginning of a longer one, where little is known (the early-token curse), so that perplexity falls
with length even where nothing of what is far away is used; sliding windows show what is left of that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..data import Text
from ..errors import UserError
from ..gpt2 import longest
from ..models import OpenModel
from ..tokens import text_ids
from .base import MetricResult, Progress, whole
from .nll import BATCH_TOKENS, Span, standard_error, strided_spans, text_nll
from .past_length import continued
from .perplexity import perplexity_result

SETTINGS = frozenset({"multiples", "context", "stride", "max_tokens", "batch_tokens", "prompts", "top_k", "seed"})
SLIDING, APART = "sliding", "non-overlapping"
MULTIPLES = (0.25, 0.5, 1, 2, 4)
MAX_TOKENS = 16384
PROMPTS = 4
TOP_K = 40  # of GPT-2's published samples
BINS = 8  # of the positions in the longest window


def measure(
    subject: OpenModel,
    data: Text,
    *,
    progress: Progress | None = None,
    multiples: Sequence[float] = MULTIPLES,
    context: int | None = None,
    stride: float = 0.5,
    max_tokens: int | None = MAX_TOKENS,
    batch_tokens: int = BATCH_TOKENS,
    prompts: int = PROMPTS,
    top_k: int = TOP_K,
    seed: int = 0,
) -> list[MetricResult]:
    """`length_perplexity` at `multiples` of the trained context (`context`, default n_positions), in windows that do
    not overlap and in windows that advance by `stride`, a share of their length; `repetition` of what the model writes
    past it behind `prompts` pieces of the text (past_length.continued).

    Its spread holds the paired error of the ratio to the perplexity at the trained context, as the tokens are the
    same. A length that the model cannot take has no figure; `takes` in the settings of the others says why. The
    details of the longest window that does not overlap hold the loss by position in it, beside that of the same tokens
    in sliding windows of the trained context. max_tokens: of the text, None for all.

    Raises UserError for a text that does not fill the longest window, and for a model that takes none of the lengths.
    """
    model, tokenizer = subject.model, subject.tokenizer
    trained = whole("context", model.config.n_positions if context is None else context, 4)
    lengths = _lengths(multiples, trained)
    if not isinstance(stride, int | float) or isinstance(stride, bool) or not 0 < stride < 1:
        raise UserError(f"stride={stride!r} is not allowed; allowed: a share of the context, above 0 and below 1")
    for name, value, least in (
        ("batch_tokens", batch_tokens, 1), ("prompts", prompts, 0), ("top_k", top_k, 1), ("seed", seed, 0),
    ):  # fmt: skip
        whole(name, value, least)
    if max_tokens is not None:
        whole("max_tokens", max_tokens, 2)
    ids = torch.tensor(text_ids(tokenizer, model.config.vocab_size, data.joined)[:max_tokens], dtype=torch.int64)
    needed = max(lengths[-1] + 1, 2 * trained)
    if len(ids) < needed:
        raise UserError(
            f"{len(ids)} tokens of {data.source} do not fill a window of {needed}; give more text or max_tokens"
        )
    takes = longest(model.config)
    held = [length for length in lengths if takes is None or length <= takes]
    if not held:
        raise UserError(f"takes {takes} tokens; asked for {', '.join(map(str, lengths))}")

    shared = {
        "trained": trained,
        "takes": takes,
        "stride_share": stride,
        "max_tokens": max_tokens,
        "tokens": len(ids),
        "source": data.source,
        "part": data.part,
        "split": data.split,
        "fingerprint": data.fingerprint,
    }
    strides = {length: {SLIDING: max(1, round(stride * length)), APART: length} for length in held}
    spans = {
        (protocol, length): strided_spans(len(ids), length, step)
        for length, own in strides.items()
        for protocol, step in own.items()
    }
    kinds = [(protocol, length) for protocol in (SLIDING, APART) for length in held]
    done, total = 0, sum(map(len, spans.values()))

    def step(passes: int, of: int) -> None:
        if progress is not None:
            progress(done + passes, total)

    losses: dict[tuple[str, int], Tensor] = {}
    for kind in kinds:
        losses[kind] = text_nll(model, [ids], [spans[kind]], batch_tokens=batch_tokens, progress=step)
        done += len(spans[kind])
    results = []
    for protocol, length in kinds:
        settings = {"protocol": protocol, "context": length, "stride": strides[length][protocol], **shared}
        results.append(_perplexity(losses[protocol, length], losses.get((protocol, trained)), settings))
    if trained in held:
        last = kinds[-1]
        width = -(-lengths[-1] // BINS)
        found = by_position(losses[last], losses[SLIDING, trained], spans[last], width)
        results[-1] = dataclasses.replace(results[-1], details=found)
    if prompts:
        results += continued(
            model, tokenizer, ids, trained, takes, prompts=prompts, top_k=top_k, seed=seed, settings=shared
        )
    return results


def _lengths(multiples: Sequence[float], trained: int) -> list[int]:
    """In ascending order; the trained one is always among them."""
    if (
        isinstance(multiples, str)
        or not isinstance(multiples, Sequence)
        or not all(isinstance(item, int | float) and not isinstance(item, bool) and item > 0 for item in multiples)
    ):
        raise UserError(f"multiples={multiples!r} is not allowed; allowed: a list of numbers above 0")
    found = sorted({trained, *(round(item * trained) for item in multiples)})
    if found[0] < 2:
        raise UserError(f"multiples={multiples!r} of {trained} tokens are lengths below 2; give larger ones")
    return found


def _perplexity(nll: Tensor, trained: Tensor | None, settings: dict[str, Any]) -> MetricResult:
    """nll, trained: float64[scored], of the same tokens at this length and at the trained one."""
    block = settings["context"]
    result = perplexity_result(
        "length_perplexity", "per token", nll, len(nll), block, standard_error(nll, block), settings
    )
    if trained is None or result.spread is None:
        return result
    paired = standard_error(nll - trained, max(block, settings["trained"]))
    if paired is None:
        return result
    ratio_error = float((nll - trained).mean().exp()) * paired
    return dataclasses.replace(result, spread={**result.spread, "ratio_error": ratio_error})


def by_position(nll: Tensor, others: Tensor, spans: Sequence[Span], width: int) -> list[dict[str, Any]]:
    """Mean loss by the number of tokens in view, `width` of them a bin: {"first", "last", "tokens", "nll", "others"}.

    nll: float64[scored] in windows of `spans`; others: of the same tokens otherwise.
    """
    seen = torch.cat([torch.arange(span.first, span.stop + 1) - span.start for span in spans])  # 1, 2, ...
    bins = (seen - 1) // width
    return [
        {
            "first": int(place) * width + 1,
            "last": int(seen[bins == place].max()),
            "tokens": int((bins == place).sum()),
            "nll": float(nll[bins == place].mean()),
            "others": float(others[bins == place].mean()),
        }
        for place in bins.unique()
    ]
