"""Negative log-likelihoods of tokens, and the windows a long text is scored in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..gpt2 import evaluating, fused_activations, logits, trunk
from .base import Progress

BATCH_TOKENS = 4096
_LOGITS_AT_ONCE = 1 << 24  # float32 logits held at a time (64 MiB); a full [batch, context, vocabulary] never is


def hidden_nll(model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """NLL in nats of each target, float64[targets] on the CPU, from the trunk's final hidden states float[targets, d].

    The head runs on slices of the states; log-softmax is float32 whatever the model's dtype.
    """
    rows = max(1, _LOGITS_AT_ONCE // model.config.vocab_size)
    slices = [
        nn.functional.cross_entropy(logits(model, states).float(), wanted, reduction="none")
        for states, wanted in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    return torch.cat(slices).cpu().double()  # on the CPU: not every accelerator has float64


def token_nll(model: PreTrainedModel, ids: Tensor, mask: Tensor, *, scored: Tensor | None = None) -> Tensor:
    """NLL in nats of the tokens after the first of each row: float64[rows, width - 1] on the CPU, 0 where not scored.

    ids: int64[rows, width]; the last token is a target only, so width may be n_positions + 1.
    mask: bool[rows, width], False = pad (at the end of a row); a pad is neither scored nor seen.
    scored: bool[rows, width], the targets wanted (default: every real token); column 0 has nothing before it.
    """
    inputs, targets = ids[:, :-1], ids[:, 1:]
    wanted = (mask if scored is None else mask & scored)[:, 1:]
    nll = torch.zeros(targets.shape, dtype=torch.float64)
    with torch.no_grad(), evaluating(model), fused_activations(model):
        hidden = trunk(model)(input_ids=inputs, attention_mask=mask[:, :-1].long(), use_cache=False).last_hidden_state
        nll[wanted.cpu()] = hidden_nll(model, hidden[wanted], targets[wanted])
    return nll


# ---------------------------------------------------------------- windows


@dataclass(frozen=True)
class Span:
    """One forward pass over a sequence: inputs start..stop-1, of whose targets first..stop are scored."""

    start: int
    stop: int
    first: int


def strided_spans(length: int, context: int, stride: int) -> list[Span]:
    """Windows of `context` tokens that advance by `stride`; each token but the text's first is scored once, in the
    first window that holds it. Without overlap a window's first token has nothing before it there, so the window
    ahead of it scores it after its last input: with all of its context."""
    lookahead = 1 if stride == context else 0
    spans, scored, start = [], 1, 0
    while scored < length:
        stop = min(start + context + lookahead, length) - 1
        spans.append(Span(start, stop, scored))
        scored, start = stop + 1, start + stride
    return spans


def rolling_spans(length: int, context: int) -> list[Span]:
    """lm-evaluation-harness's rolling windows over one document of `length` tokens, the first of them the prefix: no
    target twice, each window opened by the token before its targets, the last one filled up with earlier context."""
    spans, scored = [], 0
    while scored < length - 1:
        stop = min(scored + context, length - 1)
        spans.append(Span(max(0, stop - context), stop, scored + 1))
        scored = stop
    return spans


def text_nll(
    model: PreTrainedModel,
    sequences: Sequence[Tensor],
    spans: Sequence[Sequence[Span]],
    *,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
) -> Tensor:
    """NLL in nats of every scored token, float64[scored] in the order of the text.

    sequences: int64[length] each; spans: those of each sequence. Windows of like length run together.
    """
    device = next(model.parameters()).device
    work = [
        (sequence[span.start : span.stop + 1], span)
        for sequence, own in zip(sequences, spans, strict=True)
        for span in own
    ]
    order = sorted(range(len(work)), key=lambda index: len(work[index][0]), reverse=True)
    results: list[Tensor] = [torch.empty(0)] * len(work)
    done = 0
    while done < len(order):
        width = len(work[order[done]][0])
        batch = order[done : done + max(1, batch_tokens // width)]
        ids = torch.zeros(len(batch), width, dtype=torch.int64)
        mask, scored = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
        for row, index in enumerate(batch):
            window, span = work[index]
            ids[row, : len(window)] = window
            mask[row, : len(window)] = True
            scored[row, span.first - span.start : len(window)] = True
        nll = token_nll(model, ids.to(device), mask.to(device), scored=scored.to(device))
        for row, index in enumerate(batch):
            results[index] = nll[row][scored[row, 1:]]
        done += len(batch)
        if progress is not None:
            progress(done, len(order))
    return torch.cat(results)


def standard_error(nll: Tensor, block: int) -> float | None:
    """Standard error of the mean of `nll`, float64[tokens], from the sums of consecutive blocks of `block` tokens (the
    tokens of one block depend on each other). None with fewer than two blocks."""
    sums = torch.stack([part.sum() for part in nll.split(block)])
    counts = torch.tensor([len(part) for part in nll.split(block)], dtype=torch.float64)
    if len(sums) < 2:
        return None
    residuals = sums - nll.mean() * counts  # of a ratio estimator: the last block may be shorter
    return math.sqrt(len(sums) / (len(sums) - 1) * float(residuals.square().sum())) / len(nll)
