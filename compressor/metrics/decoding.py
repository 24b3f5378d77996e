"""Continuations of prompts, many at a time: the same text for a prompt whatever it is batched with.

Each prompt draws its random numbers from a generator of its own (the seed and the prompt make it), prompts are padded
on the left with positions that count real tokens only, and a row that has ended stays ended.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .. import gpt2
from ..errors import UserError
from .base import Progress

BATCH = 16  # rows


@dataclass(frozen=True)
class Draft:
    """A smaller model that guesses `tokens` ahead; one pass of the model then takes of them what it would choose.

    schedule: constant, or heuristic: from `tokens` on 2 more after guesses that were all taken, else 1 less.
    confidence: it stops guessing at a token that it gives less than this, a threshold that transformers then moves with
    what is taken; 0: never.
    """

    model: PreTrainedModel
    tokens: int
    schedule: Literal["constant", "heuristic"] = "constant"
    confidence: float = 0.0


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end a text: the tokenizer's EOS, else the config's; () where the vocabulary has neither."""
    for given in (tokenizer.eos_token_id, model.config.eos_token_id):
        ids = given if isinstance(given, list) else [given]
        known = [token for token in ids if isinstance(token, int) and 0 <= token < model.config.vocab_size]
        if known:
            return tuple(known)
    return ()


def continuations(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    ends: Collection[int] = (),
    forbidden: Collection[int] = (),
    top_k: int | None = None,
    seed: int = 0,
    batch: int = BATCH,
    progress: Progress | None = None,
    draft: Draft | None = None,
    as_built: bool = False,
) -> list[list[int]]:
    """The new tokens of each prompt (token ids, one or more), in the order of the prompts: at most `new_tokens`, only
    those before the first of `ends`.

    Greedy, or with `top_k` sampled at temperature 1 from the k likeliest tokens. forbidden: tokens never chosen. batch:
    rows of a forward pass; it changes no text. draft: writes ahead what the model then takes or not, which changes no
    text either but where two tokens are as likely up to rounding; it needs a batch of 1 and no top_k. as_built: with
    the activations that transformers builds, for time. The model comes back as it was; its own generation_config is not
    used.

    Raises UserError where a prompt and its new tokens need more positions than the model has, and for NaN logits.
    """
    longest, positions = max(map(len, prompts), default=0), gpt2.longest(model.config)
    if positions is not None and longest + new_tokens > positions:
        raise UserError(
            f"a prompt of {longest} tokens and new_tokens={new_tokens} are more than the {positions} positions that "
            "the model has; give fewer"
        )
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
    found: list[list[int]] = [[]] * len(prompts)
    settings = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, use_cache=True, eos_token_id=sorted(ends) or None, pad_token_id=0
    )
    with torch.no_grad(), ExitStack() as state:
        extra: dict[str, Any] = {}
        for one in (model,) if draft is None else (model, draft.model):
            state.enter_context(gpt2.evaluating(one))
            if not as_built:
                state.enter_context(gpt2.fused_activations(one))
            state.enter_context(_own_settings_only(one))
        for start in range(0, len(order), batch):
            rows = [prompts[index] for index in order[start : start + batch]]
            ids, mask = _left_padded(rows, gpt2.device(model))
            choice = _Choice(rows, new_tokens, ids.shape[1], forbidden, top_k, seed)
            if draft is not None:  # what its schedule came to in the last text is left there
                draft.model.generation_config = _drafting(draft)
                extra = {"assistant_model": draft.model}
            output = model.generate(  # type: ignore[operator]
                ids,
                attention_mask=mask,
                generation_config=settings,
                logits_processor=LogitsProcessorList([choice]),
                **extra,
            )
            for index, row in zip(order[start : start + batch], output[:, ids.shape[1] :].tolist(), strict=True):
                stop = next((place for place, token in enumerate(row) if token in ends), len(row))
                found[index] = row[:stop]
            if progress is not None:
                progress(min(start + batch, len(order)), len(order))
    return found


def _drafting(draft: Draft) -> GenerationConfig:
    """generate takes these from the draft's own generation_config."""
    return GenerationConfig(
        num_assistant_tokens=draft.tokens,
        num_assistant_tokens_schedule=draft.schedule,
        assistant_confidence_threshold=draft.confidence,
    )


@contextmanager
def _own_settings_only(model: PreTrainedModel) -> Iterator[None]:
    """generate fills what its caller leaves open from the checkpoint's generation_config (sampling, penalties, an EOS);
    what a user saved there is no part of a measurement."""
    before = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


def _left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """ids and mask, int64[rows, width]. generate counts the positions by the mask."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, width - len(row) :] = torch.tensor(row)
        mask[place, width - len(row) :] = 1
    return ids.to(device), mask.to(device)


class _Choice(LogitsProcessor):
    """Chooses the next token of every row and leaves generate, which takes the largest, no other."""

    def __init__(
        self,
        rows: Sequence[Sequence[int]],
        new_tokens: int,
        width: int,
        forbidden: Collection[int],
        top_k: int | None,
        seed: int,
    ):
        self.width, self.forbidden, self.top_k = width, sorted(forbidden), top_k
        self.draws = None if top_k is None else np.stack([_draws(row, new_tokens, seed) for row in rows])

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores: float32[rows, vocabulary]."""
        if scores.isnan().any():
            raise UserError("the model gives NaN logits: it writes no text; try --dtype float32")
        scores[:, self.forbidden] = -torch.inf
        if self.top_k is None or self.draws is None:
            return scores
        likeliest = scores.topk(min(self.top_k, scores.shape[1])).indices.sort().values  # in the order of the tokens
        shares = scores.gather(1, likeliest).cpu().double().softmax(1).cumsum(1)  # not every accelerator has float64
        draw = torch.from_numpy(self.draws[:, input_ids.shape[1] - self.width])
        place = (shares[:, :-1] <= draw[:, None]).sum(1, keepdim=True).to(scores.device)
        return torch.full_like(scores, -torch.inf).scatter(1, likeliest.gather(1, place), 0.0)


def _draws(prompt: Sequence[int], count: int, seed: int) -> np.ndarray:
    """float64[count] in 0..1, the same for the same prompt and seed: models side by side share them."""
    digest = hashlib.sha256(np.asarray(prompt, dtype=np.int64).tobytes()).digest()
    return np.random.default_rng([seed, int.from_bytes(digest[:8], "little")]).random(count)
