"""How the scores of a model's heads fall with distance: slopes for ALiBi that are the model's own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from .. import gpt2
from .efficient import attentions_of


def scores_by_distance(
    model: GPT2LMHeadModel, batches: Iterable[tuple[Tensor, Tensor]], layers: Sequence[int]
) -> tuple[dict[int, Tensor], Tensor]:
    """Mean score of queries and keys at each distance: {layer: float64[heads, context]}, and how many pairs there are,
    float64[context]. Pads do not count, nor does the first key of a row, on which attention rests however far it is.

    Sums over all pairs at a distance are a correlation, taken by FFT: the spectra add up over text and dimensions, and
    no matrix of scores is made.
    """
    spectra: dict[int, Tensor] = {}
    pairs = None
    width = 0

    def add(mask: Tensor, layer: int, x: Tensor, output: Tensor) -> None:
        query, key, _ = (part.float() for part in gpt2.queries_keys_values(model, layer, x))
        query = query * mask[:, None, :, None]
        key = key * mask[:, None, :, None]
        key[:, :, 0] = 0
        found = _spectrum(query) * _spectrum(key).conj()  # [rows, heads, frequency, dim]
        total = found.sum((0, 3)).to(torch.complex128).cpu()
        spectra[layer] = spectra[layer] + total if layer in spectra else total

    for ids, mask in batches:
        width = ids.shape[1]
        attentions_of(model, {layer: layer for layer in layers}, (ids, mask), partial(add, mask))
        real = mask.double().cpu()
        later = real.clone()
        later[:, 0] = 0
        one, other = (_spectrum(part[:, None, :, None]) for part in (real, later))
        counted = (one * other.conj()).sum((0, 1, 3))
        pairs = counted if pairs is None else pairs + counted
    assert pairs is not None
    count = torch.fft.irfft(pairs)[:width].round()
    sums = {layer: torch.fft.irfft(total)[:, :width] for layer, total in spectra.items()}
    scaling = {layer: gpt2.attention(model, layer).scaling for layer in layers}
    return {layer: scaling[layer] * total / count.clamp_min(1) for layer, total in sums.items()}, count


def _spectrum(x: Tensor) -> Tensor:
    """Over the tokens of float[rows, heads, tokens, dim], with as many zeros behind: nothing wraps around."""
    return torch.fft.rfft(x, 2 * x.shape[2], dim=2)


def fitted_slopes(
    model: GPT2LMHeadModel, batches: Iterable[tuple[Tensor, Tensor]], layers: Sequence[int]
) -> dict[int, Tensor]:
    """By how much a head's mean score falls with each token of distance: {layer: float32[heads]}, 0 where it rises."""
    means, count = scores_by_distance(model, batches, layers)
    weight = count / count.sum()
    distance = torch.arange(len(weight), dtype=torch.float64)
    centred = distance - (weight * distance).sum()
    spread = (weight * centred.square()).sum()
    return {layer: (-(weight * centred * mean).sum(1) / spread).clamp_min(0).float() for layer, mean in means.items()}
