"""Layer-wise distillation: every projection alone learns to give what its linear, or the FFN, gave for the same input.

The inputs come from the original as it runs over the calibration text, batch by batch; none is stored. The loss of a
projection is its mean squared error over the variance of what is to come out; a shared bank gets the sum of them.
"""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import UserError

if TYPE_CHECKING:
    from .tversky_fit import Fit, Where


def distill(fit: Fit) -> list[float]:
    """`rewrite.distill_steps` steps of Adam, the learning rate falling to 0; returns the mean loss of each step."""
    rewrite = fit.rewrite
    parameters = rewrite.trainable(fit.model)
    optimizer = torch.optim.Adam(parameters, lr=rewrite.distill_learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / rewrite.distill_steps)
    wanted = [parameter.requires_grad for parameter in parameters]
    losses: list[float] = []

    def take(where: Where, x: Tensor, y: Tensor) -> None:
        with torch.enable_grad():
            projection = fit.projections[where]
            error = (projection(x.detach(), fit.bank(where), fit.given(where)) - y.detach()).float().square().mean()
            variance = y.float().var(0, unbiased=False).mean().clamp_min(1e-12)
            loss = error / variance
            loss.backward()
        losses[-1] += float(loss.detach()) / len(fit.projections)

    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        for step, batch in zip(range(rewrite.distill_steps), cycle(fit.context.batches()), strict=False):
            losses.append(0.0)
            optimizer.zero_grad(set_to_none=True)
            fit.stream(batch, take)
            if not all(torch.isfinite(p.grad).all() for p in parameters if p.grad is not None):
                raise UserError(
                    f"tversky: the layer-wise distillation has no finite gradient at step {step + 1}; "
                    f"give a smaller distill_learning_rate than {rewrite.distill_learning_rate}"
                )
            optimizer.step()
            schedule.step()
            fit.context.progress(f"distillation, step {step + 1} of {rewrite.distill_steps}: {losses[-1]:.3g}")
    finally:
        for parameter, flag in zip(parameters, wanted, strict=True):
            parameter.requires_grad_(flag)
            parameter.grad = None
    return losses
