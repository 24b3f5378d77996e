"""What two residual streams hold: how long each is, how alike they are, what the head reads from each alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GPT2LMHeadModel

from .. import gpt2
from ..capture import Batch

EVERY = 8  # tokens, of which one is read by the head
STREAMS = ("x", "xt", "xe")


@torch.no_grad()
def diagnose(model: GPT2LMHeadModel, batches: Iterable[Batch]) -> dict[str, Any]:
    """The streams of a model on some text, as they stand in report.json.

    tokens: of the text. read: how many of them the head read. layers: the embeddings (layer null), then what leaves
    every block, each with norm_xt and norm_xe (means over tokens), share_xt (mean of |xt| / (|xt| + |xe|)), cosine (of
    xt with xe, mean; 0 where one is 0) and, for x = xt + xe, xt and xe, `lens`: the final norm and the head on that
    stream alone; agreement (how often its likeliest token is that of the model itself) and nll (of the next token, in
    nats). The nll of x in the last layer is the model's own. Modes are as before when it ends.
    """
    layers: list[int | None] = [None, *range(model.config.n_layer)]
    sums = torch.zeros(len(layers), 4, dtype=torch.float64)
    lens = torch.zeros(len(layers), len(STREAMS), 2, dtype=torch.float64)
    tokens = read = 0
    with gpt2.evaluating(model):
        for ids, real in batches:
            ids, mask = ids.to(gpt2.device(model)), real.to(gpt2.device(model))
            hidden, rows = gpt2.embed(model, ids), torch.zeros_like(mask)
            rows[:, :-1] = mask[:, 1:] & mask[:, :-1]  # that have a next token
            row, place = rows.nonzero()[::EVERY].unbind(1)
            kept = []
            for index, layer in enumerate(layers):
                if layer is not None:
                    hidden = gpt2.run_blocks(model, hidden, layer, layer + 1)
                sums[index] += _lengths(*_parted(hidden[:, mask])[1:])
                kept.append(_parted(hidden[:, row, place]))
            wanted = ids[row, place + 1]
            likeliest = _logits(model, kept[-1][0]).argmax(-1)
            for index, streams in enumerate(kept):
                for which, stream in enumerate(streams):
                    logits = _logits(model, stream)
                    lens[index, which, 0] += int((logits.argmax(-1) == likeliest).sum())
                    lens[index, which, 1] += float(functional.cross_entropy(logits, wanted, reduction="sum"))
            tokens, read = tokens + int(mask.sum()), read + len(wanted)
    names = ("norm_xt", "norm_xe", "share_xt", "cosine")
    return {
        "tokens": tokens,
        "read": read,
        "layers": [
            {
                "layer": layer,
                **dict(zip(names, (sums[index] / tokens).tolist(), strict=True)),
                "lens": {
                    stream: dict(zip(("agreement", "nll"), (lens[index, which] / read).tolist(), strict=True))
                    for which, stream in enumerate(STREAMS)
                },
            }
            for index, layer in enumerate(layers)
        ],
    }


def _parted(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x, xt and xe of float[2, tokens, d]."""
    return hidden[0], hidden[1], hidden[0] - hidden[1]


def _lengths(xt: Tensor, xe: Tensor) -> Tensor:
    """Sums over tokens: |xt|, |xe|, |xt| / (|xt| + |xe|), cosine."""
    one, other = xt.double().norm(dim=-1), xe.double().norm(dim=-1)
    share = one / (one + other).clamp_min(1e-12)
    cosine = functional.cosine_similarity(xt.double(), xe.double(), dim=-1)
    return torch.stack([one.sum(), other.sum(), share.sum(), cosine.sum()]).cpu()


def _logits(model: GPT2LMHeadModel, stream: Tensor) -> Tensor:
    return gpt2.logits(model, gpt2.final_norm(model, stream)).float()
