"""linformer: a completed block of c tokens is summarised by r slots, E K and F V with learned E, F [r, c].

Linformer (Wang et al., arXiv 2006.04768) projects all keys of a sequence at once, which a decoder must not. A slot that
stands for s tokens has to weigh as much as they do: log s is added to its scores, learned from there. r = c, E = F = I
and a log-mass of 0 are exact attention.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .block_attention import Far, State, appended, attended

_AT_ONCE = 256  # queries whose scores over all slots are held at a time


class LinformerFar(Far):
    """heads: 1 = one E, F and log-mass for all heads; else one for each."""

    def __init__(self, heads: int, block: int, slots: int):
        super().__init__()
        self.block, self.slots = block, slots
        self.keys = nn.Parameter(torch.empty(heads, slots, block))  # E
        self.values = nn.Parameter(torch.empty(heads, slots, block))  # F
        self.log_mass = nn.Parameter(torch.empty(heads, slots))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Means of segments as even as can be: with as many slots as tokens the tokens themselves."""
        segment = (torch.arange(self.block) * self.slots).div(self.block, rounding_mode="floor")
        member = segment == torch.arange(self.slots)[:, None]  # [slots, block]
        size = member.sum(1)
        means = member / size[:, None]
        init.copy_(self.keys, means.expand_as(self.keys))
        init.copy_(self.values, means.expand_as(self.values))
        init.copy_(self.log_mass, size.log().expand_as(self.log_mass))

    def summaries(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """[batch, heads, blocks, block, head_dim] -> [batch, heads, blocks, slots, head_dim] of keys and values."""
        return self.keys[:, None].to(key.dtype) @ key, self.values[:, None].to(value.dtype) @ value

    def over_blocks(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float, state: State
    ) -> tuple[Tensor, Tensor]:
        blocks, block = query.shape[2:4]
        slot_keys, slot_values = (slots.flatten(2, 3) for slots in self.summaries(key, value))
        own = torch.arange(blocks, device=query.device)
        block_of = own.repeat_interleave(self.slots)[None]  # of each slot; [1 or batch, slots]
        if "slot_keys" in state:
            old = torch.where(self._valid(state), -1, blocks)
            block_of = torch.cat([old, block_of.expand(len(old), -1)], 1)
            slot_keys = torch.cat([state["slot_keys"], slot_keys], 2)
            slot_values = torch.cat([state["slot_values"], slot_values], 2)
        found, step = [], max(1, _AT_ONCE // block)
        after = block_of.shape[1] - blocks * self.slots  # slots of the state
        for queries, numbers in zip(query.split(step, 2), own.split(step), strict=True):
            width = after + min(blocks, int(numbers[0]) + step) * self.slots
            seen = block_of[:, None, None, :width] < numbers.repeat_interleave(block)[:, None]
            found.append(
                self._attend(queries.flatten(2, 3), slot_keys[:, :, :width], slot_values[:, :, :width], scaling, seen)
            )
        out, mass = (torch.cat(parts, 2).unflatten(2, (-1, block)) for parts in zip(*found, strict=True))
        return out, mass

    def over_state(self, query: Tensor, scaling: float, state: State) -> tuple[Tensor, Tensor]:
        if "slot_keys" not in state:
            return torch.zeros_like(query, dtype=torch.float32), query.new_full(query.shape[:3], -math.inf).float()
        seen = self._valid(state)[:, None, None]
        return self._attend(query, state["slot_keys"], state["slot_values"], scaling, seen)

    def _attend(
        self, query: Tensor, keys: Tensor, values: Tensor, scaling: float, seen: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """seen: bool, as wide as [batch, heads, tokens, slots] or 1"""
        mass = self.log_mass.float().repeat(1, keys.shape[2] // self.slots)[:, None]
        return attended(query, keys, values, scaling, bias=mass, seen=seen)

    def _valid(self, state: State) -> Tensor:
        """bool[batch, slots]: those that a row has."""
        return torch.arange(state["slot_keys"].shape[2], device=state["blocks"].device) < (
            state["blocks"][:, None] * self.slots
        )

    def grown(
        self, state: State, query: Tensor | None, key: Tensor, value: Tensor, complete: Tensor, scaling: float
    ) -> State:
        slot_keys, slot_values = (slots.flatten(2, 3) for slots in self.summaries(key, value))
        if "blocks" not in state:
            return {"blocks": complete, "slot_keys": slot_keys, "slot_values": slot_values}
        have, total = state["blocks"] * self.slots, state["blocks"] + complete
        width = int(total.max()) * self.slots
        return {
            "blocks": total,
            "slot_keys": appended(state["slot_keys"], slot_keys, have)[:, :, :width],
            "slot_values": appended(state["slot_values"], slot_values, have)[:, :, :width],
        }
