"""The training loss: next tokens, a teacher, penalties; the logits of a few positions at a time, never of all.

Loss and gradient are taken in the same pass over a slice of positions, while its logits are there: no logits are kept
for the backward pass and none are computed twice. (The idea is Liger Kernel's fused linear cross-entropy, arXiv
2410.10989; recomputing the slices under `torch.utils.checkpoint` was slower than holding all logits.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import GPT2LMHeadModel

from . import gpt2
from .rewrites import Rewrite
from .training_rows import Rows

_LEAST_ROWS = 256  # fewer make the head's products slow
_LOGITS_AT_ONCE = {"cpu": 1 << 20}  # float32 logits; on a CPU what about fits its caches
_LOGITS_ELSEWHERE = 1 << 26


def slice_rows(positions: int, weight: Tensor) -> Iterator[slice]:
    """Slices of so many positions whose logits, of a head float[vocabulary, d], are held at once."""
    size = max(_LEAST_ROWS, _LOGITS_AT_ONCE.get(weight.device.type, _LOGITS_ELSEWHERE) // len(weight))
    yield from (slice(start, start + size) for start in range(0, positions, size))


class _TokenLosses(torch.autograd.Function):
    """Forward: (objective, [NLL, divergence]), all summed over positions; the second output has no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        teacher_hidden: Tensor | None,
        teacher_weight: Tensor | None,
        mix: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        head = weight.to(dtype)
        teacher_head = None if teacher_weight is None else teacher_weight.to(dtype)
        wants_weight = ctx.needs_input_grad[1]
        hidden_gradient = torch.empty_like(hidden)
        weight_gradient = torch.zeros_like(weight) if wants_weight else None
        sums = torch.zeros(2, dtype=torch.float32 if dtype != torch.float64 else dtype, device=hidden.device)
        for rows in slice_rows(len(hidden), weight):
            states, wanted = hidden[rows].to(dtype), targets[rows, None]
            logits = (states @ head.T).to(sums.dtype)
            logits -= logits.logsumexp(1, keepdim=True)  # now log p
            sums[0] -= logits.gather(1, wanted).sum()
            if teacher_hidden is None or teacher_head is None:
                slope = logits.exp_()
            else:
                teacher = (teacher_hidden[rows].to(dtype) @ teacher_head.T).to(sums.dtype).log_softmax(1)
                likely = teacher.exp()
                sums[1] += (likely * teacher.sub_(logits)).sum()
                slope = logits.exp_().sub_(likely, alpha=mix)
            slope.scatter_add_(1, wanted, slope.new_full(wanted.shape, mix - 1))
            slope = slope.to(dtype)
            hidden_gradient[rows] = slope @ head
            if weight_gradient is not None:
                weight_gradient += slope.T @ states
        ctx.save_for_backward(hidden_gradient, *([] if weight_gradient is None else [weight_gradient]))
        ctx.mark_non_differentiable(sums)
        return (1 - mix) * sums[0] + mix * sums[1], sums

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden_gradient, *rest = ctx.saved_tensors
        scaled = [tensor * gradients[0].to(tensor.dtype) for tensor in (hidden_gradient, *rest)]
        return scaled[0], scaled[1] if rest else None, None, None, None, None, None


def token_losses(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    mix: float = 0.0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """((1 - mix) NLL + mix KL(teacher || model), [NLL, KL]), nats summed over positions; gradients of the first only.

    hidden: float[positions, d], the trunk's final states; weight: float[vocabulary, d], the head's; targets:
    int64[positions]. teacher_hidden, teacher_weight: the teacher's, of any width, over the same vocabulary; without
    them KL is 0 and mix must be. dtype: what the head's products run in (default: the states'); softmax is float32 at
    least.
    """
    if teacher_hidden is None and mix:
        raise ValueError(f"mix={mix} without a teacher")
    with torch.autocast(hidden.device.type, enabled=False):  # the products' dtype is given
        return _TokenLosses.apply(hidden, weight, targets, teacher_hidden, teacher_weight, mix, dtype or hidden.dtype)


class Objective(nn.Module):
    """The loss of some rows: a module, so that accelerate can wrap it.

    forward(*tensors of training_rows, with_penalty) gives the objective summed over the predictions, [NLL, KL]
    likewise, and the mean penalty (None where there is none, or it is not wanted).
    """

    model: Any  # a language model, or a classifier
    distilled: bool = False
    some_idle: bool = False  # whether a step may leave parameters without a gradient

    def begin_step(self, step: int) -> None:
        """Called before the passes of each step, 0 the first."""

    def state(self) -> dict[str, Tensor]:
        """What else an interrupted training needs to go on as if nothing had been."""
        return {}

    def take_state(self, state: dict[str, Tensor]) -> None:
        """Go on with what `state` gave."""

    def selection_nll(self, rows: Rows, share: Sequence[int]) -> float:
        """What the model is judged by: the summed NLL of what is predicted in a share of the rows."""
        return rows.nll(self.model, share)


class TokenObjective(Objective):
    """Of next tokens."""

    def __init__(
        self,
        model: GPT2LMHeadModel,
        teacher: GPT2LMHeadModel | None,
        mix: float,
        penalised: Sequence[Rewrite],
        low: torch.dtype | None,
    ):
        super().__init__()
        self.model, self.mix, self.penalised, self.low = model, mix, penalised, low
        self.others, self.distilled = (teacher,), teacher is not None  # in a tuple: not a part of this module

    def forward(self, ids: Tensor, mask: Tensor | None, with_penalty: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """As of Objective. ids: int64[rows, context]; mask: bool[rows, context], None when there is no pad. The last
        position predicts nothing, yet it is computed: an even width is faster than one token less.
        """
        loss, sums, _ = self._whole_losses(ids, mask)
        return loss, sums, self._penalty() if with_penalty else None

    def _whole_losses(self, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Objective and [NLL, KL] of the model, and its `_states`."""
        hidden, head = self._states(self.model, ids, mask)
        targets = ids[:, 1:]
        teacher_hidden = teacher_head = None
        if self.others[0] is not None:
            with torch.no_grad():
                teacher_hidden, teacher_head = self._states(self.others[0], ids, mask)
        wanted = slice(None) if mask is None else mask[:, 1:].reshape(-1)
        loss, sums = token_losses(
            hidden[wanted], head, targets.reshape(-1)[wanted], mix=self.mix, dtype=self.low,
            teacher_hidden=None if teacher_hidden is None else teacher_hidden[wanted], teacher_weight=teacher_head,
        )  # fmt: skip
        return loss, sums, (hidden, head)

    def _states(self, model: GPT2LMHeadModel, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The trunk's final states of all positions but the last, float[rows * (context - 1), d], and the head
        [vocabulary, d]; of another width than d where the head is no linear."""
        attention_mask = None if mask is None else mask.long()
        with torch.autocast(ids.device.type, dtype=self.low, enabled=self.low is not None):
            hidden = gpt2.trunk(model)(input_ids=ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
            return gpt2.head_product(model, hidden[:, :-1].flatten(0, 1))

    def _cut_states(
        self, cut: GPT2LMHeadModel, tensors: Mapping[str, Tensor], ids: Tensor, mask: Tensor | None
    ) -> Tensor:
        """The final states, as `_states` has them, of a model that is cut out of this one and runs on its tensors, by
        their keys in the trunk."""
        cut.set_attn_implementation(self.model.config._attn_implementation)
        cut.train(self.model.training)
        inputs = {"input_ids": ids, "attention_mask": None if mask is None else mask.long(), "use_cache": False}
        with (
            torch.autocast(ids.device.type, dtype=self.low, enabled=self.low is not None),
            gpt2.fused_activations(cut),
        ):
            found = functional_call(gpt2.trunk(cut), dict(tensors), (), inputs)
        return found.last_hidden_state[:, :-1].flatten(0, 1)

    def _penalty(self) -> Tensor | None:
        with torch.autocast(gpt2.device(self.model).type, enabled=False):
            terms = [term for rewrite in self.penalised if (term := rewrite.penalty(self.model)) is not None]
            return torch.stack(terms).mean() if terms else None
