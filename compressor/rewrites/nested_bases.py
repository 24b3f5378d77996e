"""Changes of basis of a GPT-2 that keep its function, so that the first part of everything carries most of it.

Neurons by importance (MatFormer, arXiv 2310.07707); LayerNorm's gain and bias into the linears after it and one
rotation of the residual stream by principal components (SliceGPT, arXiv 2401.15024, which has one a block and takes
LayerNorm's mean out; here the rotation keeps the vector of ones instead, see modeling/nesting.py); per head, queries
with keys and values with outputs balanced, so that dimension j of both weighs alike and the first weigh most (balanced
truncation, Moore 1981).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from .. import gpt2
from ..modeling.nesting import HEAD_MAP, reflected
from .base import LINEAR_SITES

QUERIES, KEYS, VALUES, OUT, FC, PROJ = LINEAR_SITES
READING = (QUERIES, KEYS, VALUES, FC)  # the residual stream, through a LayerNorm


@dataclass
class Parts:
    """A plain GPT-2's tensors, float64; what `rotate` makes of it has token embeddings and head in coordinates."""

    layers: int
    heads: int
    linears: dict[tuple[int, str], tuple[Tensor, Tensor]]  # weight [in, out], bias [out]
    norms: list[tuple[Tensor, Tensor]]  # gain, bias [d] each, as `gpt2.norms` orders them
    tokens: Tensor  # [vocabulary, d]
    positions: Tensor  # [positions, d]
    head: Tensor | None = None  # [vocabulary, d], where it is not the embeddings
    head_map: tuple[Tensor, Tensor] | None = None  # weight [d, d], bias [d]: final state -> coordinates

    def tensors(self) -> dict[str, Tensor]:
        """By state-dict key."""
        found = dict(zip(gpt2.EMBEDDING_KEYS, (self.tokens, self.positions), strict=True))
        for index, (gain, bias) in enumerate(self.norms):
            key = gpt2.norm_key(index, self.layers)
            found |= {f"{key}.weight": gain, f"{key}.bias": bias}
        for (layer, leaf), (weight, bias) in self.linears.items():
            found |= {
                gpt2.linear_key(layer, leaf, "weight"): weight,
                gpt2.linear_key(layer, leaf, "bias"): bias,
            }
        if self.head is not None:
            found[gpt2.HEAD_KEY] = self.head
        if self.head_map is not None:
            found |= {f"{HEAD_MAP}.weight": self.head_map[0].T, f"{HEAD_MAP}.bias": self.head_map[1]}
        return found


def parts_of(model: GPT2LMHeadModel) -> Parts:
    """Of a plain GPT-2, on the CPU."""
    layers = model.config.n_layer
    linears = {}
    for layer in range(layers):
        for leaf in LINEAR_SITES:
            weight, bias = gpt2.linear(model, layer, leaf)
            linears[layer, leaf] = weight.cpu().double(), bias.cpu().double()
    norms = [(norm.weight.detach().cpu().double(), norm.bias.detach().cpu().double()) for norm in gpt2.norms(model)]
    tables = gpt2.embeddings(model).cpu().double(), gpt2.positions(model).cpu().double()
    head = None if model.config.tie_word_embeddings else gpt2.head(model).weight.detach().cpu().double()
    return Parts(layers, model.config.n_head, linears, norms, *tables, head)


# ---------------------------------------------------------------- neurons


def order_neurons(parts: Parts, orders: Iterable[Tensor]) -> None:
    """Put each layer's neurons in the order int64[d_ff]."""
    for layer, order in enumerate(orders):
        weight, bias = parts.linears[layer, FC]
        parts.linears[layer, FC] = weight[:, order], bias[order]
        weight, bias = parts.linears[layer, PROJ]
        parts.linears[layer, PROJ] = weight[order], bias


# ---------------------------------------------------------------- residual stream


def fold_norms(parts: Parts) -> None:
    """Gain and bias of every LayerNorm but the last into the linears that read it."""
    for (layer, leaf), (weight, bias) in list(parts.linears.items()):
        if leaf in READING:
            gain, shift = parts.norms[2 * layer + (leaf == FC)]
            parts.linears[layer, leaf] = gain[:, None] * weight, bias + shift @ weight
    for index, (gain, _) in enumerate(parts.norms[:-1]):
        parts.norms[index] = torch.ones_like(gain), torch.zeros_like(gain)


def principal_basis(moment: Tensor) -> Tensor:
    """Q float64[d, d], orthogonal: the principal directions of numbers of mean 0, the largest first, then that of the
    vector of ones. moment: their second moment, [d, d]."""
    d = len(moment)
    plane = reflected(torch.eye(d, dtype=torch.float64))  # the last column is the direction of ones
    inner = plane[:, : d - 1]
    _, vectors = torch.linalg.eigh(inner.T @ moment.double() @ inner)
    return torch.cat([inner @ vectors.flip(1), plane[:, d - 1 :]], 1)


def rotate(parts: Parts, basis: Tensor) -> None:
    """The residual stream in another basis, [d, d] as of `principal_basis`. Needs `fold_norms`; the final LayerNorm's
    gain and bias become `head_map`, so that the head stays the embeddings, or stands in coordinates as these do."""
    rotation = reflected(basis)  # keeps the vector of ones
    for (layer, leaf), (weight, bias) in list(parts.linears.items()):
        if leaf in READING:
            parts.linears[layer, leaf] = rotation.T @ weight, bias
        else:
            parts.linears[layer, leaf] = weight @ rotation, bias @ rotation
    gain, shift = parts.norms[-1]
    parts.head_map = rotation.T @ (gain[:, None] * basis), shift @ basis
    parts.norms[-1] = torch.ones_like(gain), torch.zeros_like(gain)
    parts.tokens, parts.positions = parts.tokens @ basis, parts.positions @ rotation
    parts.head = None if parts.head is None else parts.head @ basis


# ---------------------------------------------------------------- heads


@dataclass
class HeadMoments:
    """Second moments of each head's queries, keys and values, sums over tokens, float64[heads, width, width]."""

    queries: Tensor
    keys: Tensor
    values: Tensor


def balance_heads(parts: Parts, moments: list[HeadMoments]) -> None:
    """Another basis within each head: q -> q M, k -> k M^-T keep every score, v -> v N, o -> N^-1 o the output; in it
    queries and keys have one diagonal second moment, its largest entries first, and so have values and outputs."""
    for layer, own in enumerate(moments):
        q, k, v, o = (_by_head(parts, layer, leaf) for leaf in LINEAR_SITES[:4])
        out = o[0] @ o[0].transpose(1, 2)
        forward, back = _balancing(own.queries, own.keys)
        _put(parts, layer, QUERIES, q[0] @ forward, q[1] @ forward)
        _put(parts, layer, KEYS, k[0] @ back, k[1] @ back)
        forward, back = _balancing(own.values, out)
        _put(parts, layer, VALUES, v[0] @ forward, v[1] @ forward)
        weight = (back.transpose(1, 2) @ o[0]).flatten(0, 1)
        parts.linears[layer, OUT] = weight, parts.linears[layer, OUT][1]


def _by_head(parts: Parts, layer: int, leaf: str) -> tuple[Tensor, Tensor]:
    """Weight [heads, d, width] and bias [heads, 1, width]; of outputs weight [heads, width, d] alone counts."""
    weight, bias = parts.linears[layer, leaf]
    if leaf == OUT:
        return weight.unflatten(0, (parts.heads, -1)), bias
    return (
        weight.unflatten(1, (parts.heads, -1)).permute(1, 0, 2),
        bias.unflatten(0, (parts.heads, -1))[:, None],
    )


def _put(parts: Parts, layer: int, leaf: str, weight: Tensor, bias: Tensor) -> None:
    parts.linears[layer, leaf] = weight.permute(1, 0, 2).flatten(1), bias.flatten()


def _balancing(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """M and M^-T, [heads, width, width]: M^T first M and M^-1 second M^-T are the same diagonal, falling."""
    root, inverse = _root(first)
    values, vectors = torch.linalg.eigh(root @ second @ root)
    values, vectors = values.flip(-1).clamp_min(0), vectors.flip(-1)
    least = 1e-12 * values[..., :1].clamp_min(torch.finfo(torch.float64).tiny)
    scale = values.clamp_min(least)[:, None] ** 0.25
    return inverse @ vectors * scale, root @ vectors / scale


def _root(moment: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric square root and its inverse, of a moment whose smallest directions are lifted to what keeps the
    inverse finite: any invertible M keeps the function."""
    values, vectors = torch.linalg.eigh((moment + moment.transpose(1, 2)) / 2)
    top = values[..., -1:].clamp_min(torch.finfo(torch.float64).tiny)
    values = values.clamp_min(1e-6 * top).sqrt()
    back = vectors.transpose(1, 2)
    return vectors * values[:, None] @ back, vectors / values[:, None] @ back
