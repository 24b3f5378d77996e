"""Layer-wise distillation: every projection alone learns to give what its linear, or the FFN, gave for the same input.

The loss of a projection is its mean squared error over the variance of what is to come out; a shared bank gets the sum
of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import distillation
from .distillation import Loss

if TYPE_CHECKING:
    from .tversky_fit import Fit, Where


def distill(fit: Fit) -> list[float]:
    """`rewrite.distill_steps` steps; see `distillation.distill`."""

    def take(batch: tuple[Tensor, Tensor], learn: Loss) -> None:
        def compare(where: Where, x: Tensor, y: Tensor) -> None:
            with torch.enable_grad():
                projection = fit.projections[where]
                error = (projection(x.detach(), fit.bank(where), fit.given(where)) - y.detach()).float().square().mean()
                learn(error / y.float().var(0, unbiased=False).mean().clamp_min(1e-12))

        fit.stream(batch, compare)

    return distillation.distill(
        fit.rewrite.trainable(fit.model),
        fit.context.batches,
        take,
        steps=fit.rewrite.distill_steps,
        learning_rate=fit.rewrite.distill_learning_rate,
        name=fit.rewrite.name,
        progress=fit.context.progress,
    )
