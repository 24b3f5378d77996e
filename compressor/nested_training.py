"""The loss of a nested model: that of its sizes, each a slice of the same parameters, which the gradients go back to.

A slice is run by GPT-2's own code on tensors that `modeling.nesting.sliced` takes out of the whole model's, so what is
trained is what a cut-out model computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from . import lora
from .group_loss import HierarchyLoss
from .modeling.modeling_gpt2_compressed import empty_slice, sliced_model
from .modeling.nesting import HEAD, HEAD_MAP, TOKENS, TRUNK, Size, sliced
from .rewrites import Rewrite
from .rewrites.base import Nest
from .token_groups import Strings
from .training_loss import TokenObjective, token_losses
from .training_rows import Rows
from .training_schedule import mixed_seed


class NestedObjective(TokenObjective):
    """The mean of the loss over the sizes that a step takes. With a teacher all of them learn as `TokenObjective` has
    it; without, the whole size learns next tokens, the others (1 - inner) NLL + inner KL(whole || size), of the whole
    size's predictions in the same pass. Where the nest has groups of tokens, sizes that read a prefix of the final
    state learn the loss of groups, with its weight, too.

    strings: what the tokens of the vocabulary stand for, for imposed groups."""

    some_idle = True  # what belongs to sizes that a step does not take

    def __init__(
        self,
        model: GPT2LMHeadModel,
        teacher: GPT2LMHeadModel | None,
        mix: float,
        penalised: Sequence[Rewrite],
        low: torch.dtype | None,
        *,
        nest: Nest,
        seed: int,
        strings: Strings | None = None,
    ):
        super().__init__(model, teacher, mix, penalised, low)
        self.distilled = True
        self.nest, self.seed = nest, seed
        self.sizes: tuple[Size, ...] = nest.sizes
        self.empty: dict[Size, Any] = {}
        self.groups: HierarchyLoss | None = None
        if nest.groups is not None:
            self.groups = HierarchyLoss(nest.groups, nest.sizes, model.config.n_embd, strings)

    @property
    def at_once(self) -> int:
        """How many sizes a step takes."""
        most = {"joint": len(self.nest.sizes), "sandwich": 3, "one": 1}[self.nest.train]
        return min(most, len(self.nest.sizes))

    def begin_step(self, step: int) -> None:
        """Which sizes this step takes: drawn from the seed and the step alone. Groups of tokens."""
        if self.groups is not None:
            self.groups.begin_step(step, self.model.get_input_embeddings().weight)
        sizes = self.nest.sizes
        if self.at_once == len(sizes):
            return
        if self.at_once == 1:  # each of them once before any comes again
            turn, place = divmod(step, len(sizes))
            self.sizes = (sizes[int(torch.randperm(len(sizes), generator=self._generator(turn))[place])],)
            return
        smallest = min(range(1, len(sizes)), key=lambda index: _volume(sizes[index]))
        others = [index for index in range(1, len(sizes)) if index != smallest]
        drawn = others[int(torch.randint(len(others), (), generator=self._generator(step)))]
        self.sizes = tuple(sizes[index] for index in sorted({0, smallest, drawn}))

    def _generator(self, draw: int) -> torch.Generator:
        return torch.Generator().manual_seed(mixed_seed(self.seed, 3, draw))

    def forward(self, ids: Tensor, mask: Tensor | None, with_penalty: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """As of TokenObjective; NLL and KL are means over the sizes."""
        wanted = slice(None) if mask is None else mask[:, 1:].reshape(-1)
        targets = ids[:, 1:].reshape(-1)[wanted]
        whole = self.nest.sizes[0]
        teacher = self.others[0]
        taught: tuple[Tensor | None, Tensor | None] = None, None
        if teacher is not None:
            with torch.no_grad():
                hidden, head = self._states(teacher, ids, mask)
            taught = hidden[wanted], head
        loss, sums = ids.new_zeros((), dtype=self.model.dtype), ids.new_zeros(2, dtype=self.model.dtype)
        tensors = {} if self.sizes == (whole,) else lora.effective_tensors(self.model)
        for size in self.sizes:
            mix = self.mix if teacher is not None else 0.0 if size == whole else self.nest.inner
            if mix and taught[0] is None:  # the whole size is none of this step's
                with torch.no_grad():
                    hidden, head = self._states(self.model, ids, mask)
                taught = hidden[wanted], head
            states = self._states(self.model, ids, mask) if size == whole else self._slice(tensors, size, ids, mask)
            hidden, head = states[0][wanted], states[1]
            own, more = token_losses(
                hidden, head, targets, mix=mix, dtype=self.low, teacher_hidden=taught[0], teacher_weight=taught[1]
            )
            loss, sums = loss + own, sums + more
            if self.groups is not None:
                loss = loss + self.groups.loss(size, hidden, head, targets, self.low)
            if teacher is None and size == whole:
                taught = hidden.detach(), head.detach()
        count = len(self.sizes)
        return loss / count, sums / count, self._penalty() if with_penalty else None

    def _slice(self, tensors: dict[str, Tensor], size: Size, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """As `_states`, of a slice."""
        if size not in self.empty:
            self.empty[size] = empty_slice(self.model.config, size)
        own = sliced(tensors, self.model.config, size)
        trunk = {key.removeprefix(TRUNK): tensor for key, tensor in own.items() if key.startswith(TRUNK)}
        hidden, head = self._cut_states(self.empty[size], trunk, ids, mask), own.get(HEAD, trunk[TOKENS])
        if f"{HEAD_MAP}.weight" not in own:
            return hidden, head
        with torch.autocast(ids.device.type, dtype=self.low, enabled=self.low is not None):
            left = torch.nn.functional.linear(hidden, own[f"{HEAD_MAP}.weight"], own[f"{HEAD_MAP}.bias"])
        return left, head[:, : size.head]

    def state(self) -> dict[str, Tensor]:
        return {} if self.groups is None else self.groups.state()

    def take_state(self, state: dict[str, Tensor]) -> None:
        if self.groups is not None:
            self.groups.take_state(state)

    def selection_nll(self, rows: Rows, share: Sequence[int]) -> float:
        """The mean over all sizes."""
        with torch.no_grad():
            tensors = {key: tensor.detach() for key, tensor in lora.effective_tensors(self.model).items()}
            total = rows.nll(self.model, share)
            for size in self.nest.sizes[1:]:
                total += rows.nll(sliced_model(tensors, self.model.config, size), share)
        return total / len(self.nest.sizes)


def _volume(size: Size) -> int:
    """What orders sizes: about their multiplications a token."""
    return sum(size.width * (4 * size.width + 2 * ff) for ff in size.ffn) + size.head
