"""What a training goes over, and what it is judged by: rows of token ids of which something is predicted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .metrics.nll import BATCH_TOKENS, token_nll
from .tokens import TokenBlocks


class Rows(Protocol):
    """Rows of a training or selection part, by their index; a pad is neither seen nor predicted."""

    def __len__(self) -> int: ...

    def count(self, rows: Sequence[int]) -> int:
        """How many predictions are made in these rows."""

    def passes(self, rows: Sequence[int], tokens: int) -> list[list[int]]:
        """These rows as forward passes of at most so many tokens with their pads, at least one row each."""

    def tensors(self, rows: Sequence[int], *, counted: bool = True) -> tuple[Tensor | None, ...]:
        """What an Objective's forward takes, on the CPU; not `counted`: so that none of it is predicted."""

    def nll(self, model: PreTrainedModel, rows: Sequence[int]) -> float:
        """The NLL of what is predicted in these rows, in nats, summed; the model as it is in evaluation."""


@dataclass(frozen=True)
class TokenRows:
    """Token blocks, of which every token but the first of a row is predicted."""

    blocks: TokenBlocks

    def __len__(self) -> int:
        return len(self.blocks.ids)

    def count(self, rows: Sequence[int]) -> int:
        return int(self.blocks.mask[list(rows), 1:].sum())

    def passes(self, rows: Sequence[int], tokens: int) -> list[list[int]]:
        size = max(1, tokens // self.blocks.ids.shape[1])
        return [list(rows[start : start + size]) for start in range(0, len(rows), size)]

    def tensors(self, rows: Sequence[int], *, counted: bool = True) -> tuple[Tensor | None, ...]:
        """ids int64[rows, context]; mask bool[rows, context], None where there is no pad."""
        ids, mask = self.blocks.ids[list(rows)], self.blocks.mask[list(rows)]
        if not counted:
            mask = torch.zeros_like(mask)
        return ids, None if mask.all() else mask

    def nll(self, model: PreTrainedModel, rows: Sequence[int]) -> float:
        device = next(model.parameters()).device
        total = 0.0
        for part in self.passes(rows, BATCH_TOKENS):
            ids, mask = self.blocks.ids[part].to(device), self.blocks.mask[part].to(device)
            total += float(token_nll(model, ids, mask).sum())
        return total
