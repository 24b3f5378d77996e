"""What a model writes: continuations of fixed prompts to read side by side, how varied they are, and whether they loop.

A model may predict well and write badly: greedy decoding shows loops, sampling shows garbage, so each prompt is
continued both ways. The end of text may not fire, so that all models write as much.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..checkpoint_attention import MOST
from ..data import fingerprint
from ..errors import UserError
from ..gpt2 import longest
from ..models import OpenModel
from ..tokens import text_ids
from .base import MetricResult, Progress, whole
from .decoding import continuations, end_tokens

SETTINGS = frozenset({"prompts", "new_tokens", "top_k", "seed"})
PROMPTS = (
    "India will become global leader in AI because",
    "The weather this morning was",
    "She opened the door and saw",
    "The most important thing about learning a language is",
    "In a statement on Monday, the company said that",
    "Once upon a time there was a",
    "I watched this film last night and",
    "Scientists have discovered that",
)
NEW_TOKENS = 60
TOP_K = 40  # of GPT-2's published samples
_LEAST = 16  # new tokens; less cannot be told from a loop
_REPEATED, _GRAM, _DISTINCT = 12, 4, 0.7


def loops(tokens: Sequence[int]) -> bool:
    """Whether a continuation, token ids, is caught in a loop.

    Either it ends in a period: its last tokens, 12 at least and a whole period at least, repeat those one period
    before (a period of 1 to half of the length; a loop after a good start counts, "very very good" does not). Or it
    goes round with variations: less than 70 % of its runs of 4 tokens are distinct. Of 6,431 pieces of 60 tokens of
    reviews, news and dialogues written by people, one is taken for a loop.
    """
    ids = np.asarray(tokens)
    for period in range(1, len(ids) // 2 + 1):
        same = ids[period:] == ids[:-period]
        repeated = len(same) if same.all() else int(same[::-1].argmin())
        if repeated >= max(period, _REPEATED):
            return True
    grams = [tuple(tokens[start : start + _GRAM]) for start in range(len(tokens) - _GRAM + 1)]
    return len(tokens) >= _LEAST and len(set(grams)) < _DISTINCT * len(grams)


def measure(
    subject: OpenModel,
    data: None = None,
    *,
    progress: Progress | None = None,
    prompts: Sequence[str] | None = None,
    new_tokens: int | None = None,
    top_k: int = TOP_K,
    seed: int = 0,
) -> list[MetricResult]:
    """`distinct1`, `distinct2` (share of distinct n-grams) and `looping` (share of the continuations that loop) over
    one greedy and one sampled continuation (`top_k` likeliest tokens, temperature 1) of each of `prompts`.

    new_tokens: of each continuation; 60 unless given, fewer where the model has no room. Models side by side share
    the random numbers of a prompt. The texts stand in the details of `distinct2`. Raises UserError for prompts that
    are none and where the positions leave no room.
    """
    given = PROMPTS if prompts is None else prompts
    if (
        isinstance(given, str)
        or not isinstance(given, Sequence)
        or not given
        or not all(isinstance(prompt, str) and prompt for prompt in given)
    ):
        raise UserError(f"prompts={prompts!r} is not allowed; allowed: a list of texts")
    model, tokenizer = subject.model, subject.tokenizer
    ids = [text_ids(tokenizer, model.config.vocab_size, prompt) for prompt in given]
    room = (longest(model.config) or MOST) - max(map(len, ids))
    if room < _LEAST:
        raise UserError(
            f"the longest prompt has {max(map(len, ids))} tokens and leaves {max(0, room)} of the model's "
            f"{model.config.n_positions} positions; a continuation needs {_LEAST}"
        )
    new_tokens = min(NEW_TOKENS, room) if new_tokens is None else whole("new_tokens", new_tokens, _LEAST, room)
    whole("top_k", top_k, 1)
    whole("seed", seed, 0)

    texts: list[dict[str, Any]] = []
    decodings = {"greedy": None, f"top-k {top_k}": top_k}
    for place, (decoding, choices) in enumerate(decodings.items()):

        def step(done: int, total: int, before: int = place * len(ids)) -> None:
            if progress is not None:
                progress(before + done, len(decodings) * total)

        written = continuations(
            model, ids, new_tokens, forbidden=end_tokens(model, tokenizer), top_k=choices, seed=seed, progress=step
        )
        texts += [
            {
                "prompt": prompt,
                "decoding": decoding,
                "text": str(tokenizer.decode(row, clean_up_tokenization_spaces=False)),
                "loops": loops(row),
                "seed": None if choices is None else seed,
            }
            for prompt, row in zip(given, written, strict=True)
        ]
    settings = {
        "protocol": f"greedy and top-k {top_k}",
        "prompts": len(given),
        "new_tokens": new_tokens,
        "seed": seed,
        "fingerprint": fingerprint(list(given)),
    }
    return _results(texts, list(decodings), settings)


def _results(texts: list[dict[str, Any]], decodings: list[str], settings: dict[str, Any]) -> list[MetricResult]:
    from .measures import Distinct

    distinct = Distinct().compute(predictions=[text["text"] for text in texts])
    looping = {
        decoding: float(np.mean([text["loops"] for text in texts if text["decoding"] == decoding]))
        for decoding in decodings
    }
    share = float(np.mean([text["loops"] for text in texts]))
    count = len(texts)
    return [
        MetricResult("distinct1", distinct["distinct1"], "share of words", True, count, None, settings),
        MetricResult("distinct2", distinct["distinct2"], "share of word pairs", True, count, None, settings, texts),
        MetricResult("looping", share, "share of texts", False, count, None, {**settings, "looping": looping}),
    ]
