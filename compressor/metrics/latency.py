"""Prefill and decode latency, side by side: fixed lengths, all models in one process, taking turns.

Latency of `generate` with the end of text free to fire measures when a model stops, not how fast it is; and figures of
two processes measure the machine. Here every model makes the same number of forward passes whatever it predicts, and
the models take turns in every repeat, in an order that turns round, so that a slow minute hits all of them alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import GPT2Config, PreTrainedModel

from ..checkpoint_attention import MOST
from ..errors import UserError
from ..gpt2 import longest
from ..models import OpenModel
from .base import MetricResult, Progress, whole
from .cache import cache_bytes

SETTINGS = frozenset({"batch", "prompt_tokens", "new_tokens", "repeats", "warm_up"})
PROTOCOL = "greedy, fixed length, models interleaved"
_PROMPT, _NEW = 256, 32  # where the models have room for them

Clock = Callable[[], float]  # seconds


def _synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@torch.no_grad()
def time_generation(
    model: PreTrainedModel, ids: Tensor, new_tokens: int, *, clock: Clock = time.perf_counter
) -> tuple[float, float]:
    """Seconds of a prefill of ids int64[batch, prompt], and of `new_tokens` greedy one-token steps with its KV cache.

    As generate(min_new_tokens=max_new_tokens) works: one forward pass a step, the head on the last position only, and
    the end of text is a token like any other.
    """
    _synchronise(ids.device)
    begin = clock()
    output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    token = output.logits[:, -1:].argmax(-1)
    _synchronise(ids.device)
    middle = clock()
    for _ in range(new_tokens):
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True, logits_to_keep=1)
        token = output.logits[:, -1:].argmax(-1)
    _synchronise(ids.device)
    return middle - begin, clock() - middle


def interleaved(
    models: Sequence[PreTrainedModel],
    batch: int,
    prompt_tokens: int,
    new_tokens: int,
    *,
    repeats: int,
    warm_up: int,
    clock: Clock = time.perf_counter,
    step: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """float64[models, 2, repeats]: seconds of the prefill and of the decode of each repeat, after `warm_up` more that
    are not counted. Every repeat runs all models, every other one in reverse order. `step` is called after each run."""
    prompts = [_prompt(model, batch, prompt_tokens) for model in models]
    seconds = np.empty((len(models), 2, warm_up + repeats))
    for repeat in range(warm_up + repeats):
        order = range(len(models)) if repeat % 2 == 0 else reversed(range(len(models)))
        for index in order:
            seconds[index, :, repeat] = time_generation(models[index], prompts[index], new_tokens, clock=clock)
            step()
    return seconds[:, :, warm_up:]


def _prompt(model: PreTrainedModel, batch: int, tokens: int) -> Tensor:
    """int64[batch, tokens] on the model's device: which tokens does not matter, but they are the same every time."""
    ids = [(7919 * i + 13) % model.config.vocab_size for i in range(batch * tokens)]
    return torch.tensor(ids, device=next(model.parameters()).device).view(batch, tokens)


def measure(
    subjects: Sequence[OpenModel],
    data: None = None,
    *,
    progress: Progress | None = None,
    batch: int | Sequence[int] = 1,
    prompt_tokens: int | Sequence[int] | None = None,
    new_tokens: int | None = None,
    repeats: int = 10,
    warm_up: int = 2,
    clock: Clock = time.perf_counter,
) -> list[list[MetricResult]]:
    """`prefill_latency` (ms a prefill of `prompt_tokens`) and `decode_latency` (ms a step of one token for the whole
    batch, over `new_tokens` steps behind that prompt) of every model, as medians over `repeats`; with the latter what
    the cache then holds for a token of each sequence.

    batch, prompt_tokens: a number or several, all combinations are measured; prompt_tokens defaults to 256 and
    new_tokens to 32, less where a model has no room. Raises UserError for lengths a model cannot hold.
    """
    batches, prompts = _several("batch", batch) or [1], _several("prompt_tokens", prompt_tokens)
    configs = [subject.model.config for subject in subjects]
    room = min(longest(config) or MOST for config in configs)
    prompts = prompts or [max(1, min(_PROMPT, min(config.n_positions for config in configs) // 2))]
    new_tokens = max(1, min(_NEW, room - max(prompts))) if new_tokens is None else whole("new_tokens", new_tokens, 1)
    whole("repeats", repeats, 2)
    whole("warm_up", warm_up, 0)
    if max(prompts) + new_tokens > room:
        raise UserError(
            f"prompt_tokens={max(prompts)} and new_tokens={new_tokens} are more than the {room} positions "
            "that the models have; give fewer"
        )
    models: list[PreTrainedModel] = [subject.model for subject in subjects]
    kinds = list(product(batches, prompts))
    done, total = 0, len(kinds) * len(models) * (warm_up + repeats)

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    results: list[list[MetricResult]] = [[] for _ in models]
    for size, length in kinds:
        seconds = interleaved(
            models, size, length, new_tokens, repeats=repeats, warm_up=warm_up, clock=clock, step=step
        )
        for own, model, (prefill, decode) in zip(results, models, seconds, strict=True):
            settings = {
                "protocol": PROTOCOL,
                "batch": size,
                "prompt_tokens": length,
                "new_tokens": new_tokens,
                "repeats": repeats,
                "warm_up": warm_up,
                "models": len(models),
                **machine(model),
            }
            tokens = length + new_tokens
            held = cache_bytes(cast(GPT2Config, model.config), tokens, model.dtype.itemsize)
            own += [
                _result("prefill_latency", "ms", 1000 * prefill, settings),
                _result(
                    "decode_latency",
                    "ms per step",
                    1000 * decode / new_tokens,
                    settings | {"cache_bytes_per_token": held / tokens},
                ),
            ]
    return results


def _result(metric: str, unit: str, values: np.ndarray, settings: dict[str, Any]) -> MetricResult:
    low, median, high, p90 = np.percentile(values, [25, 50, 75, 90])
    spread = {
        "p90": float(p90),
        "iqr": float(high - low),
        "least": float(values.min()),
        "method": "90th percentile and interquartile range over the repeats",
    }
    return MetricResult(metric, float(median), unit, False, len(values), spread, settings)


def machine(model: PreTrainedModel) -> dict[str, Any]:
    """Where and how a model computes, which belongs to every time."""
    parameter = next(model.parameters())
    device = parameter.device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "attention": model.config._attn_implementation,
    }


def _several(name: str, given: Any) -> list[int]:
    """One number or several, each once, as a list; None gives none."""
    if given is None:
        return []
    values = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    if not values:
        raise UserError(f"{name}={given!r} is not allowed; allowed: a whole number from 1, or several")
    return list(dict.fromkeys(whole(name, value, 1) for value in values))
