"""What a model writes past its trained length: whether it repeats itself there, and whether its cache still holds.

A model that merely does not fail at position 1,025 may write garbage there. Pieces of a text, half a trained context
each, are continued greedily and sampled to twice the trained context. The end of text may not fire, so that all models
write as much.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import gpt2
from .base import MetricResult
from .decoding import continuations, end_tokens

FAR = 2  # trained contexts that are filled
_GRAM = 4
_SHOWN, _PROMPT = 60, 20  # tokens of a sample: what was written past the trained length; the end of what it is behind
_ROWS = 256  # positions whose logits are held at a time


def repetition(tokens: Sequence[int]) -> float:
    """The share of runs of 4 tokens that stood before (rep-4 of Welleck et al., 2020), 0 where there is none."""
    grams = [tuple(tokens[start : start + _GRAM]) for start in range(len(tokens) - _GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def continued(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    trained: int,
    takes: int | None,
    *,
    prompts: int,
    top_k: int,
    seed: int,
    settings: Mapping[str, Any],
) -> list[MetricResult]:
    """`repetition` of the last half of a trained context, of texts that end at the trained length and at twice that.

    ids: int64[tokens], the text that `prompts` pieces are taken of, evenly. takes: tokens that the model takes, None
    for any number; a text that is longer has no figure. In the settings: `text_repetition` of the text's own tokens in
    these places, `nll` that the model gives its own tokens there in one pass without cache, and `cache_gap`, how many
    nats more than the token that greedy decoding chose with its cache the likeliest one has without it: 0 up to
    rounding where both are one model. The details hold what the first piece was continued with past the trained length.
    """
    half = trained // 2
    starts = [place * (len(ids) - FAR * trained) // max(1, prompts - 1) for place in range(prompts)]
    pieces = [ids[start : start + FAR * trained].tolist() for start in starts]
    lengths = [length for length in (trained, FAR * trained) if takes is None or length <= takes]
    if not lengths:
        return []
    ends = end_tokens(model, tokenizer)
    results = []
    for decoding, choices in (("greedy", None), (f"top-k {top_k}", top_k)):
        given = [piece[:half] for piece in pieces]
        rows = continuations(model, given, lengths[-1] - half, forbidden=ends, top_k=choices, seed=seed)
        texts = [[*prompt, *row] for prompt, row in zip(given, rows, strict=True)]
        scored = torch.stack([_scored(model, text, half, ends) for text in texts])  # [prompts, 2, new tokens]
        for length in lengths:
            last = slice(length - half, length)
            own = {
                "protocol": decoding,
                "context": length,
                "prompts": prompts,
                "prompt_tokens": half,
                "new_tokens": length - half,
                "seed": seed,
                **settings,
                "text_repetition": _mean([repetition(piece[last]) for piece in pieces]),
                "nll": float(scored[:, 0, last.start - half : last.stop - half].mean()),
                "cache_gap": float(scored[:, 1, : length - half].max()) if choices is None else None,
            }
            value = _mean([repetition(text[last]) for text in texts])
            results.append(MetricResult("repetition", value, "share of runs of 4", False, prompts, None, own))
        sample = _sample(tokenizer, texts[0], half, trained, takes, decoding, choices, seed)
        results[-1] = dataclasses.replace(results[-1], details=[sample])
    return results


def _scored(model: PreTrainedModel, text: Sequence[int], prompt: int, forbidden: Collection[int]) -> Tensor:
    """float64[2, tokens behind the prompt] in one pass without cache: the NLL of each, and how many nats likelier the
    likeliest token that is allowed is."""
    ids = torch.tensor([text], device=gpt2.device(model))
    with torch.no_grad(), gpt2.evaluating(model), gpt2.fused_activations(model):
        hidden = gpt2.trunk(model)(input_ids=ids, use_cache=False).last_hidden_state[0, prompt - 1 : -1]
        found = []
        for states, written in zip(hidden.split(_ROWS), ids[0, prompt:].split(_ROWS), strict=True):
            chances = gpt2.logits(model, states).float().log_softmax(-1)
            own = chances.gather(1, written[:, None])[:, 0]
            chances[:, sorted(forbidden)] = -torch.inf
            found.append(torch.stack([-own, chances.amax(1) - own]).cpu().double())
    return torch.cat(found, 1)


def _sample(
    tokenizer: PreTrainedTokenizerBase,
    text: Sequence[int],
    prompt: int,
    trained: int,
    takes: int | None,
    decoding: str,
    choices: int | None,
    seed: int,
) -> dict[str, Any]:
    """A text to read: the end of its prompt, and what stands behind the trained length, or that nothing can."""

    def words(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))

    past = words(text[trained : trained + _SHOWN])
    return {
        "prompt": "… " + words(text[max(0, prompt - _PROMPT) : prompt]).lstrip(),
        "decoding": f"{decoding}, from token {trained + 1:,} on",
        "text": past or f"(cannot: takes {takes:,} tokens)",
        "seed": None if choices is None else seed,
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
