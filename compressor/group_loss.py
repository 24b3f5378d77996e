"""The loss of groups: how likely the next token's group is, -log sum of p_v over the tokens v of its group.

Not next tokens with the same target for every token of a group (the source's loss): that has a floor of log |group|
and pulls the tokens of a group towards one probability, against the loss of next tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .embedding_clusters import emergent_groups
from .errors import UserError
from .modeling.nesting import Size
from .rewrites.hierarchy import Emergent, Imposed, prefix_of
from .token_groups import Strings, imposed_groups
from .training_loss import slice_rows


class _GroupLosses(torch.autograd.Function):
    """Forward: summed over positions; the gradient is taken in the same pass, as in training_loss.py."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, groups: Tensor, dtype: torch.dtype
    ) -> Tensor:
        head = weight.to(dtype)
        hidden_gradient = torch.empty_like(hidden)
        weight_gradient = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        total = torch.zeros((), dtype=torch.float32 if dtype != torch.float64 else dtype, device=hidden.device)
        for rows in slice_rows(len(hidden), weight):
            states = hidden[rows].to(dtype)
            logits = (states @ head.T).to(total.dtype)
            whole = logits.logsumexp(1, keepdim=True)
            outside = groups != groups[targets[rows], None]  # bool[rows, vocabulary]
            within = logits.masked_fill(outside, -torch.inf)
            of_group = within.logsumexp(1, keepdim=True)
            total += (whole - of_group).sum()
            slope = logits.sub_(whole).exp_()
            slope -= within.sub_(of_group).exp_()
            slope = slope.to(dtype)
            hidden_gradient[rows] = slope @ head
            if weight_gradient is not None:
                weight_gradient += slope.T @ states
        ctx.save_for_backward(hidden_gradient, *([] if weight_gradient is None else [weight_gradient]))
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [tensor * gradients[0].to(tensor.dtype) for tensor in ctx.saved_tensors]
        return scaled[0], scaled[1] if len(scaled) > 1 else None, None, None, None


def group_losses(
    hidden: Tensor, weight: Tensor, targets: Tensor, groups: Tensor, *, dtype: torch.dtype | None = None
) -> Tensor:
    """-log sum over v in G(y) of p_v, nats summed over positions, at least 0.

    hidden: float[positions, k]; weight: float[vocabulary, k]; targets: int64[positions], y. groups: int64[vocabulary],
    the group of each token; a token of -1 is a group by itself. dtype: what products run in (default: hidden's).
    """
    alone = groups.max().clamp_min(-1) + 1 + torch.arange(len(groups), device=groups.device)
    with torch.autocast(hidden.device.type, enabled=False):  # the products' dtype is given
        own = torch.where(groups < 0, alone, groups)
        return _GroupLosses.apply(hidden, weight, targets, own, dtype or hidden.dtype)


class HierarchyLoss:
    """The weighted loss of groups of each size whose logits are made of a prefix, and the groups of the time."""

    def __init__(self, settings: Imposed | Emergent, sizes: Sequence[Size], width: int, strings: Strings | None):
        """width: of the whole model. strings: of the vocabulary; imposed groups need them."""
        self.settings = settings
        self.prefixes = {size: prefix for size in sizes if (prefix := prefix_of(size, width)) < width}
        self.groups: dict[int, Tensor] = {}  # by prefix
        if isinstance(settings, Imposed):
            if strings is None:
                raise UserError("imposed groups are made of what tokens stand for: a tokenizer is needed")
            order = sorted(set(self.prefixes.values()), reverse=True)
            for prefix, scheme in zip(order, settings.schemes(len(order)), strict=True):
                self.groups[prefix] = imposed_groups(strings, scheme)[0]

    def begin_step(self, step: int, embeddings: Tensor) -> None:
        """Emergent groups are found at the first step and after so many, where embeddings are trained at all."""
        if not isinstance(self.settings, Emergent):
            return
        if not self.groups or (step % self.settings.every == 0 and embeddings.requires_grad):
            for prefix in sorted(set(self.prefixes.values())):
                self.groups[prefix] = emergent_groups(
                    embeddings[:, :prefix],
                    minimum_similarity=self.settings.minimum_similarity,
                    minimum_group_size=self.settings.minimum_group_size,
                )

    def loss(self, size: Size, hidden: Tensor, head: Tensor, targets: Tensor, dtype: torch.dtype | None) -> Tensor:
        """Of one size, weighted, as `group_losses` takes it; 0 for a size that reads the whole final state."""
        if size not in self.prefixes:
            return hidden.new_zeros(())
        groups = self.groups[self.prefixes[size]].to(head.device)
        return self.settings.weight * group_losses(hidden, head, targets, groups, dtype=dtype)

    def state(self) -> dict[str, Tensor]:
        """What an interrupted training needs to go on: groups found in embeddings that have changed since."""
        if not isinstance(self.settings, Emergent):
            return {}
        return {f"groups.{prefix}": groups for prefix, groups in self.groups.items()}

    def take_state(self, state: dict[str, Tensor]) -> None:
        self.groups |= {int(name.rpartition(".")[2]): groups for name, groups in state.items()}
