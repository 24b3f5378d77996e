"""Distillation layer by layer: what is new in a layer learns to give what the original gave there for the same input.

Where the inputs come from is the caller's: the original as it runs over the calibration text, batch by batch, or
states that are held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import cycle
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..errors import UserError

Loss = Callable[[Tensor], None]
Given = TypeVar("Given")


def distill(
    parameters: Sequence[nn.Parameter],
    batches: Callable[[], Iterable[Given]],
    take: Callable[[Given, Loss], None],
    *,
    steps: int,
    learning_rate: float,
    name: str,
    progress: Callable[[str], None] = lambda message: None,
) -> list[float]:
    """`steps` steps of Adam, the learning rate falling to 0; returns the mean loss of each step.

    take: given a batch, calls what it is given besides with the loss of every layer: gradients of shared parameters add
    up. What ends further from the original than it began, on the first batch, is put back.
    requires_grad is as before when it ends. Raises UserError, which names `name`, for gradients that are not finite.
    """
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    wanted = [parameter.requires_grad for parameter in parameters]
    began = [parameter.detach().clone() for parameter in parameters]
    losses: list[float] = []

    def learn(loss: Tensor) -> None:
        loss.backward()
        of_step.append(float(loss.detach()))

    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        for step, batch in zip(range(steps), cycle(batches()), strict=False):
            of_step: list[float] = []
            optimizer.zero_grad(set_to_none=True)
            take(batch, learn)
            if not all(torch.isfinite(p.grad).all() for p in parameters if p.grad is not None):
                raise UserError(
                    f"{name}: the layer-wise distillation has no finite gradient at step {step + 1}; "
                    f"give a smaller distill_learning_rate than {learning_rate}"
                )
            optimizer.step()
            schedule.step()
            losses.append(sum(of_step) / len(of_step))
            progress(f"distillation, step {step + 1} of {steps}: {losses[-1]:.3g}")
        of_step = []
        take(next(iter(batches())), lambda loss: of_step.append(float(loss.detach())))
        end = sum(of_step) / len(of_step)
        if not end <= losses[0]:
            progress(f"distillation: {losses[0]:.3g} has become {end:.3g}, all is put back")
            with torch.no_grad():
                for parameter, start in zip(parameters, began, strict=True):
                    parameter.copy_(start)
    finally:
        for parameter, flag in zip(parameters, wanted, strict=True):
            parameter.requires_grad_(flag)
            parameter.grad = None
    return losses
