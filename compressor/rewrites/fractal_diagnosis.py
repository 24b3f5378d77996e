"""How well a model of parts and each of its parts do on some text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GPT2LMHeadModel

from .. import gpt2
from ..capture import Batch
from ..modeling.fractal import parts_of_levels


@torch.no_grad()
def diagnose(model: GPT2LMHeadModel, batches: Iterable[Batch]) -> dict[str, Any]:
    """tokens: predicted ones. parts: of the whole (level 0), then of every part its level, its place in it and nll, the
    mean NLL of the next token in nats. Modes are as before when it ends."""
    named = [(0, 0), *map(tuple, parts_of_levels(model.config))]
    cut = [model, *(cast(Any, model).part(*part) for part in named[1:])]
    sums, tokens = [0.0] * len(cut), 0
    with gpt2.evaluating(model):
        for ids, mask in batches:
            ids, mask = (tensor.to(gpt2.device(model)) for tensor in (ids, mask))
            tokens += int(mask[:, 1:].sum())
            for index, one in enumerate(cut):
                sums[index] += _nll(one, ids, mask)
    return {
        "tokens": tokens,
        "parts": [
            {"level": level, "place": place, "nll": total / max(1, tokens)}
            for (level, place), total in zip(named, sums, strict=True)
        ],
    }


def _nll(model: GPT2LMHeadModel, ids: Tensor, mask: Tensor) -> float:
    logits = model(ids, attention_mask=mask.long(), use_cache=False).logits[:, :-1]
    losses = functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    return float(losses[mask[:, 1:].flatten()].double().sum())
