"""What study attention looks at: queries, keys and values, random ones and those of a model's heads on text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ... import gpt2
from ...errors import UserError
from ...models import OpenModel
from ...rewrites.efficient import attentions_of


@dataclass(frozen=True, eq=False)
class Heads:
    """query, key, value: float[batch, heads, tokens, head_dim]."""

    name: str
    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value

    @property
    def tokens(self) -> int:
        return self.query.shape[2]

    def to(self, device: torch.device, dtype: torch.dtype) -> Heads:
        query, key, value = (part.to(device, dtype) for part in self.parts)
        return Heads(self.name, query, key, value, self.scaling)

    def first(self, tokens: int) -> Heads:
        query, key, value = (part[:, :, :tokens].contiguous() for part in self.parts)
        return Heads(self.name, query, key, value, self.scaling)

    @property
    def norms(self) -> tuple[float, float]:
        """Mean length of a query and of a key, as the softmax sees them: for scaling 1 / sqrt(head_dim)."""
        factor = math.sqrt(self.scaling * math.sqrt(self.query.shape[-1]))
        query, key = (tensor.float().norm(dim=-1).mean().item() * factor for tensor in (self.query, self.key))
        return query, key


def random_heads(
    shape: tuple[int, int, int, int], generator: torch.Generator, *, norm: float, correlation: float = 0.0
) -> Heads:
    """Gaussian vectors, queries and keys of the root mean square length `norm`. correlation: with the token before, in
    every entry (AR(1)); 0 is the hardest there is for whatever sums up neighbours."""
    parts = []
    for _ in range(3):
        fresh = torch.randn(shape, generator=generator)
        if correlation:
            fresh[:, :, 1:] *= math.sqrt(1 - correlation**2)
            for token in range(1, shape[2]):
                fresh[:, :, token] += correlation * fresh[:, :, token - 1]
        parts.append(fresh)
    factor = norm / math.sqrt(shape[3])
    name = f"random, norm {norm:g}" + (f", correlation {correlation:g}" if correlation else "")
    return Heads(name, parts[0] * factor, parts[1] * factor, parts[2], shape[3] ** -0.5)


def chosen_layers(layers: Sequence[int] | None, model: OpenModel) -> list[int]:
    """The first, the middle and the last, unless given. Raises UserError for layers that the model has not, and for a
    model whose attention is not GPT-2's own."""
    count = model.model.config.n_layer
    if not model.plain:
        raise UserError(f"attention: {model.name} is no plain GPT-2; give model= the original")
    if layers is None:
        return sorted({0, count // 2, count - 1})
    if any(layer >= count for layer in layers):
        raise UserError(f"attention: layers is {list(layers)}; {model.name} has 0 to {count - 1}")
    return list(layers)


def model_heads(model: OpenModel, ids: Tensor, layers: Sequence[int]) -> list[Heads]:
    """Of a plain GPT-2's layers on tokens int64[batch, tokens], in float32."""
    found: dict[int, Heads] = {}

    def take(layer: int, x: Tensor, _: Tensor) -> None:
        parts = gpt2.queries_keys_values(model.model, layer, x)
        query, key, value = (part.float().contiguous() for part in parts)
        found[layer] = Heads(f"layer {layer}", query, key, value, float(gpt2.attention(model.model, layer).scaling))

    batch = ids.to(gpt2.device(model.model)), torch.ones_like(ids, dtype=torch.bool)
    attentions_of(model.model, {layer: layer for layer in layers}, batch, take)
    return [found[layer] for layer in layers]
