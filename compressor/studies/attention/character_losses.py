"""What a character-level model predicts: its losses, what counts alone give, and whether it sees the future."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from ... import gpt2
from ...metrics.nll import token_nll
from ...tokens import TokenBlocks


def row_nll(model: GPT2LMHeadModel, blocks: TokenBlocks) -> Tensor:
    """NLL in nats of every character but the first of each row: float64[rows, block_size - 1]."""
    device = gpt2.device(model)
    return torch.cat([token_nll(model, ids.to(device), mask.to(device)) for ids, mask in blocks.batches()])


@torch.no_grad()
def leak(model: GPT2LMHeadModel, ids: Tensor) -> float:
    """The largest change of any logit before a character of ids int64[1, tokens] when that character is changed: at
    four places from the second to the last."""
    ids = ids.to(gpt2.device(model))
    most = 0.0
    with gpt2.evaluating(model):
        before = model(ids).logits
        for place in torch.linspace(1, ids.shape[1] - 1, 4).long().tolist():
            changed = ids.clone()
            changed[0, place] = (changed[0, place] + 1) % model.config.vocab_size
            difference = model(changed).logits[:, :place] - before[:, :place]
            most = max(most, float(difference.abs().max()))
    return most


def counted_nll(training: TokenBlocks, test: TokenBlocks, vocabulary: int) -> dict[str, float]:
    """Nats per predicted character of the test rows for what knows only how often each is in the training rows, and
    for what knows how often it follows the one before it (one more than counted)."""
    before, after = test.ids[:, :-1].flatten(), test.ids[:, 1:].flatten()
    single = torch.bincount(training.ids.flatten(), minlength=vocabulary).double() + 1
    places = training.ids[:, :-1] * vocabulary + training.ids[:, 1:]
    pairs = torch.bincount(places.flatten(), minlength=vocabulary**2).double().view(vocabulary, vocabulary) + 1
    return {
        "single characters": float(-(single / single.sum()).log()[after].mean()),
        "pairs of characters": float(-(pairs / pairs.sum(1, keepdim=True)).log()[before, after].mean()),
    }
