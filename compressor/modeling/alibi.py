"""ALiBi: attention scores that fall with distance instead of learned positions, and the way from the one to the other.

Source: Press, Smith & Lewis, arXiv 2108.12409. Head h adds -m_h (i - j) to the score of query i and key j. A model that
was trained with learned positions gets there by a share s that falls from 1 to 0: the embeddings of a token at position
p are wte + s wpe[p] + (1 - s)(mean + 1[p = 0] first), the bias is taken (1 - s) times. s = 1 is GPT-2, bit for bit. At
the end wpe and mean are gone (mean becomes part of wte). `first` stays: position 0 is where GPT-2's attention rests,
and so that it may rest there from any distance, the bias of that token's key is a number of each head's own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .streams import to_context

SLOPES = ("geometric", "fitted", "learned")
WIDER = 4  # numbers more in a query and a key that carry the bias


def geometric_slopes(heads: int) -> list[float]:
    """The slopes of ALiBi's paper: 2^(-8 i / heads) for a power of two; else those of the power below, and every other
    one of those of the power above."""
    power = 1 << (heads.bit_length() - 1)
    found = [2.0 ** (-8 * (i + 1) / power) for i in range(power)]
    return found + [2.0 ** (-4 * (i + 1) / power) for i in range(0, 2 * (heads - power), 2)]


class AlibiPositions(nn.Module):
    """In the place of wpe: int64[batch or 1, tokens] -> float[batch or 1, tokens, d], or a 0 of no shape where there is
    nothing to add; as streams.StreamPositions where there are two. learned: wpe is still there, and its `share` falls
    to 0."""

    def __init__(self, config: Any):
        super().__init__()
        d, entry = config.hidden_size, config.alibi
        self.learned = entry["learned_positions"]
        self.share = 1.0 if self.learned else 0.0
        if self.learned:
            self.weight = nn.Parameter(torch.empty(config.max_position_embeddings, d))
            self.mean = nn.Parameter(torch.empty(d))
        self.first = nn.Parameter(torch.empty(d)) if entry["first"] else None
        self.std = config.initializer_range
        self.streams = bool(config.token_factored)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.learned:
            init.normal_(self.weight, mean=0.0, std=self.std)
            init.zeros_(self.mean)
        if self.first is not None:
            init.zeros_(self.first)

    def dropped(self) -> Tensor:
        """Forget the learned embeddings; returns their mean [d], which was added at every position."""
        mean = self.mean.detach()
        del self.weight, self.mean
        self.learned, self.share = False, 0.0
        return mean

    def forward(self, positions: Tensor) -> Tensor:
        found = self._added(positions)
        if not self.streams:
            return found
        if self.share == 1 or not self.learned:
            return to_context(found)
        return torch.stack([found, ((1 - self.share) * self.mean).expand_as(found)])  # which becomes part of wte

    def _added(self, positions: Tensor) -> Tensor:
        if self.share == 1:
            return nn.functional.embedding(positions, self.weight)
        found = torch.zeros((), device=positions.device)
        if self.first is not None:
            found = (1 - self.share) * (positions == 0)[..., None].to(self.first.dtype) * self.first
        if self.learned:
            found = found + (1 - self.share) * self.mean
        return found if self.share == 0 else found + self.share * nn.functional.embedding(positions, self.weight)


class AlibiSlopes(nn.Module):
    """The biases of a layer's heads: log_slopes float[heads]; first float[heads], the bias of the first token's key at
    any distance, where that token is told apart."""

    def __init__(self, heads: int, first: bool):
        super().__init__()
        self.log_slopes = nn.Parameter(torch.empty(heads))
        self.first = nn.Parameter(torch.empty(heads)) if first else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        slopes = geometric_slopes(len(self.log_slopes))
        init.copy_(self.log_slopes, torch.tensor([math.log(slope) for slope in slopes]))
        if self.first is not None:
            init.zeros_(self.first)

    def slopes(self, share: float) -> Tensor:
        return share * self.log_slopes.float().exp()

    def bias(self, query: Tensor, keys: int, start: int, share: float, first: Tensor) -> Tensor:
        """-m (i - j) of queries from place `start` on and keys from 0 on: [batch or 1, heads, queries, keys], in the
        query's dtype. first: int64[batch or 1], the place of each row's first token."""
        places = torch.arange(keys, device=query.device)
        behind = places - torch.arange(start, start + query.shape[2], device=query.device)[:, None]
        found = (self.slopes(share)[:, None, None] * behind)[None]
        if self.first is not None:
            found = torch.where(_at(places, first)[..., None, :], share * self.first.float()[:, None, None], found)
        return found.to(query.dtype)

    def widened(
        self, query: Tensor, key: Tensor, start: int, share: float, scaling: float, first: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Query [batch, heads, queries, head_dim + 4] and key [batch, heads, keys, head_dim + 4] whose product, scaled,
        has the bias in it: any attention takes it, and no tensor of queries x keys is made. start, first: as of `bias`.

        The four products m (j - i) is made of are exact in bfloat16 too, up to one rounding of m: both places are
        parted into 256 a + b.
        """
        slope = (self.slopes(share) / scaling).to(query.dtype)
        places = torch.arange(key.shape[2], device=query.device)
        high, low = (part.to(query.dtype) for part in (places // 256, places % 256))
        asking, asked = query.shape[:3], key.shape[:3]
        own = [part[start : start + query.shape[2]].expand(asking) for part in (high, low)]
        falls = [(factor * slope)[:, None].expand(asking) for factor in (256, 1)]
        rises = [-(factor * slope)[:, None].expand(asked) for factor in (256, 1)]
        more = torch.stack([*(part.expand(asked) for part in (high, low)), *rises], -1)
        if self.first is not None:  # of the four products the second is with the slope
            level = (share / scaling * self.first.float() / slope.float()).to(query.dtype)
            level = nn.functional.pad(level[:, None, None], (1, 2))
            more = torch.where(_at(places, first)[..., None], level, more)
        return torch.cat([query, torch.stack([*falls, *own], -1)], -1), torch.cat([key, more], -1)


def _at(places: Tensor, first: Tensor) -> Tensor:
    """bool[batch or 1, 1, keys]"""
    return (places == first[:, None])[:, None]
