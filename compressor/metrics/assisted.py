"""Assisted generation with a nested model's own slices: each drafts for the whole, which takes what it would write.

One pass of the whole model judges all that a draft guessed, so that text comes in fewer of them (speculative decoding,
arXiv 2211.17192, in its greedy form; transformers' `generate(..., assistant_model=)`). The draft is cut out of the same
memory. Whether that is faster depends on what is accepted and on what a guess costs beside a pass of the whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import numpy as np
import torch
from transformers import GPT2LMHeadModel, PreTrainedModel

from .. import gpt2, slicing
from ..checkpoint_attention import MOST
from ..data import Text
from ..errors import UserError, unknown
from ..modeling.modeling_gpt2_compressed import sliced_model
from ..models import OpenModel
from ..tokens import text_ids
from .base import MetricResult, Progress, whole
from .decoding import Draft, continuations, end_tokens
from .latency import Clock, machine

SETTINGS = frozenset(
    {"prompts", "prompt_tokens", "new_tokens", "draft_tokens", "schedule", "confidence", "repeats", "max_tokens"}
)
Schedule = Literal["constant", "heuristic"]
PROMPTS, DRAFT_TOKENS, REPEATS = 4, 5, 5
_PROMPT, _NEW = 64, 64  # where the model has room for them
MAX_TOKENS = 16384


def measure(
    subject: OpenModel,
    data: Text,
    *,
    progress: Progress | None = None,
    prompts: int = PROMPTS,
    prompt_tokens: int | None = None,
    new_tokens: int | None = None,
    draft_tokens: int = DRAFT_TOKENS,
    schedule: Schedule = "constant",
    confidence: float = 0.0,
    repeats: int = REPEATS,
    max_tokens: int | None = MAX_TOKENS,
    clock: Clock = time.perf_counter,
) -> list[MetricResult]:
    """For every smaller size that a nested model was trained at, as the draft of the whole, which writes greedily
    behind `prompts` pieces of the text, one at a time: `acceptance` (accepted of all drafted tokens), `tokens_per_pass`
    of the whole model, `assisted_speed_up` (seconds of plain greedy `generate` over those with the draft) and
    `same_text`, the share of continuations that are the same tokens as without a draft.

    draft_tokens, schedule, confidence: as of decoding.Draft. The end of text may not fire, so that both write as much.
    What is counted is counted in a run that is not timed; the timed ones take turns in one process, in an order that
    turns round, and the speed-up is the median of their ratios. Where a text differs, `gap` in the settings of
    `same_text` says by how many nats at most the two tokens at the first difference are apart: 0 up to rounding where
    it is a tie. prompt_tokens, new_tokens: 64 unless given, fewer where the model has no room. max_tokens: of the text,
    None for all.

    Raises UserError for a model in which none is nested, settings that are not allowed and a text that is too short.
    """
    model, tokenizer = subject.model, subject.tokenizer
    drafts = _drafts(model)
    room = gpt2.longest(model.config) or MOST
    for name, value, least in (
        ("prompts", prompts, 1), ("draft_tokens", draft_tokens, 1), ("repeats", repeats, 2),
    ):  # fmt: skip
        whole(name, value, least)
    if schedule not in get_args(Schedule):
        raise unknown("schedule", str(schedule), get_args(Schedule))
    if isinstance(confidence, bool) or not isinstance(confidence, int | float) or not 0 <= confidence < 1:
        raise UserError(f"confidence={confidence!r} is not allowed; allowed: a number from 0, below 1")
    if max_tokens is not None:
        whole("max_tokens", max_tokens, 1)
    half = max(1, min(_PROMPT, room // 2))
    prompt_tokens = half if prompt_tokens is None else whole("prompt_tokens", prompt_tokens, 1, room - 2)
    left = room - prompt_tokens
    new_tokens = min(_NEW, left) if new_tokens is None else whole("new_tokens", new_tokens, 2, left)
    ids = text_ids(tokenizer, model.config.vocab_size, data.joined)[:max_tokens]
    if len(ids) < prompt_tokens:
        raise UserError(f"{len(ids)} tokens of {data.source} are no prompt of {prompt_tokens}; give more text")
    starts = [place * (len(ids) - prompt_tokens) // max(1, prompts - 1) for place in range(prompts)]
    pieces = [ids[start : start + prompt_tokens] for start in starts]

    ends, total = end_tokens(model, tokenizer), (1 + repeats) * (1 + len(drafts)) * prompts
    done = 0

    def write(draft: Draft | None) -> list[list[int]]:
        nonlocal done
        before = done

        def step(texts: int, of: int) -> None:
            nonlocal done
            done = before + texts
            if progress is not None:
                progress(done, total)

        return continuations(
            model, pieces, new_tokens, forbidden=ends, batch=1, draft=draft, as_built=True, progress=step
        )

    kinds = {name: Draft(one, draft_tokens, schedule, confidence) for name, one in drafts.items()}
    plain = write(None)
    counted: dict[str, tuple[list[list[int]], int, int]] = {}
    for name, draft in kinds.items():
        with passes(model) as widths:
            counted[name] = (write(draft), len(widths), sum(widths))
    seconds = _timed([None, *kinds.values()], write, repeats, clock)  # [1 + drafts, repeats]

    settings = {
        "protocol": f"greedy, {draft_tokens} drafted tokens, {schedule}"
        + (f", confidence {confidence:g}" if confidence else ""),
        "prompts": prompts,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "draft_tokens": draft_tokens,
        "schedule": schedule,
        "confidence": confidence,
        "max_tokens": max_tokens,
        "source": data.source,
        "part": data.part,
        "split": data.split,
        "fingerprint": data.fingerprint,
        **machine(model),
    }
    results = []
    for place, (name, (texts, count, width)) in enumerate(counted.items(), 1):
        # a pass judges its drafted tokens behind one token whose keys are not kept yet; the first behind the prompt
        drafted = width - prompts * (prompt_tokens - 1) - count
        written = prompts * new_tokens
        own = {**settings, "draft": name}
        results += [
            MetricResult(
                "acceptance", (written - count) / drafted, "share of drafted tokens", True, drafted, None, own
            ),
            MetricResult("tokens_per_pass", written / count, "tokens a pass", True, count, None, own),
            _speed_up(seconds[0], seconds[place], written, own),
            same_text(model, pieces, plain, texts, own),
        ]
    return results


def _drafts(model: GPT2LMHeadModel) -> dict[str, GPT2LMHeadModel]:
    """name -> each smaller model that the whole one was trained with, in its memory where the width is the whole."""
    config: Any = model.config
    if not slicing.is_nested(config):
        raise UserError(
            "no smaller models are nested in it that could draft; the rewrite matryoshka makes such a model"
        )
    tensors = dict(model.named_parameters())
    sizes = slicing.sizes(config, slicing.ALL)
    return {name: sliced_model(tensors, config, size) for name, size in sizes.items()}


@contextmanager
def passes(model: PreTrainedModel) -> Iterator[list[int]]:
    """The tokens of each of a model's forward passes."""
    widths: list[int] = []

    def note(module: torch.nn.Module, args: Any, given: dict[str, Any]) -> None:
        widths.append(given["input_ids"].shape[1])

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield widths
    finally:
        hook.remove()


def _timed(
    kinds: Sequence[Draft | None], write: Callable[[Draft | None], Any], repeats: int, clock: Clock
) -> np.ndarray:
    """float64[kinds, repeats]: seconds of all texts; every repeat has all kinds, every other one in reverse order."""
    seconds = np.empty((len(kinds), repeats))
    for repeat in range(repeats):
        order = range(len(kinds)) if repeat % 2 == 0 else reversed(range(len(kinds)))
        for index in order:
            begin = clock()
            write(kinds[index])
            seconds[index, repeat] = clock() - begin
    return seconds


def _speed_up(plain: np.ndarray, assisted: np.ndarray, tokens: int, settings: dict[str, Any]) -> MetricResult:
    ratios = plain / assisted
    low, median, high = np.percentile(ratios, [25, 50, 75])
    spread = {
        "iqr": float(high - low),
        "least": float(ratios.min()),
        "most": float(ratios.max()),
        "method": "of the ratios of the repeats, in each of which both were timed: interquartile range, least, most",
    }
    times = {
        "plain_ms_per_token": float(1000 * np.median(plain) / tokens),
        "assisted_ms_per_token": float(1000 * np.median(assisted) / tokens),
        "repeats": len(ratios),
    }
    unit = "times as fast as without a draft"
    return MetricResult("assisted_speed_up", float(median), unit, True, len(ratios), spread, {**settings, **times})


def same_text(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    plain: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    settings: dict[str, Any],
) -> MetricResult:
    """The share of `texts` that are the tokens of `plain`; with how near the two are where others first differ."""
    gaps = [
        _gap(model, prompt, one, other)
        for prompt, one, other in zip(prompts, plain, texts, strict=True)
        if one != other
    ]
    own = {**settings, "gap": max(gaps, default=0.0)}
    return MetricResult("same_text", 1 - len(gaps) / len(plain), "share of texts", True, len(plain), None, own)


def _gap(model: PreTrainedModel, prompt: Sequence[int], one: Sequence[int], other: Sequence[int]) -> float:
    """How many nats the model gives one of the two tokens more at the first place where two texts differ."""
    place = next(index for index, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
    ids = torch.tensor([[*prompt, *one[:place]]], device=gpt2.device(model))
    with torch.no_grad(), gpt2.evaluating(model):
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1].double()
    return float((logits[one[place]] - logits[other[place]]).abs())
