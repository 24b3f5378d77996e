"""What a Tversky similarity is computed from: products of functions of z with functions of u, minima, soft minima.

z float[tokens, features] and u float[out, features] are what tokens and prototypes have of each feature. Nothing here
makes a tensor of tokens x out x features.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class Factors:
    """A sum of products left(z) @ right.T and what is added to it."""

    def __init__(self) -> None:
        self.right: dict[str, Tensor] = {}  # the function of z -> [out, features]
        self.sums: dict[str, Any] = {}  # the sign -> what the sum of relu(sign z) is multiplied by
        self.constant: Tensor | None = None  # [out]
        self.common: Any = None  # what the sum of minima is multiplied by
        self.softmin: Any = None  # what the sum of soft minima is multiplied by
        self.halves: tuple[float, ...] = ()  # the signs that features count with
        self.u: Tensor | None = None  # [out, features]

    def add(self, left: str, right: Tensor) -> None:
        self.right[left] = right if left not in self.right else self.right[left] + right

    def add_constant(self, row: Tensor) -> None:
        self.constant = row if self.constant is None else self.constant + row

    def add_sum(self, sign: str, strength: Any) -> None:
        self.sums[sign] = strength

    def of(self, z: Tensor, common: Tensor | None) -> Tensor:  # float[tokens, features] -> float[tokens, out]
        total: Tensor | None = None
        for name, right in self.right.items():
            left = LEFT[name](z)
            total = left @ right.T if total is None else torch.addmm(total, left, right.T)
        if self.common is not None:
            assert common is not None
            term = common * self.common
            total = term if total is None else total + term
        if self.softmin is not None:
            assert self.u is not None
            for half in self.halves:
                term = SoftMin.apply(z * half, self.u * half) * self.softmin
                total = term if total is None else total + term
        assert total is not None
        for sign, strength in self.sums.items():
            total = total + LEFT[f"relu{sign}"](z).sum(-1, keepdim=True) * strength
        return total if self.constant is None else plus(total, self.constant)


def plus(total: Tensor, row: Tensor) -> Tensor:
    """Their sum, in the place of a total of the same dtype: one tensor of tokens x prototypes less."""
    return total.add_(row) if total.dtype == row.dtype else total + row


def root(x: Tensor) -> Tensor:
    """sqrt(x+), with a gradient that is finite at 0."""
    return torch.where(x > 0, x.clamp_min(1e-12 if x.dtype != torch.float16 else 1e-7).sqrt(), 0)


LEFT = {
    "signed": lambda z: z,
    "size": torch.abs,
    "relu+": torch.relu,
    "relu-": lambda z: torch.relu(-z),
    "has+": lambda z: (z > 0).to(z.dtype),
    "has-": lambda z: (z < 0).to(z.dtype),
    "root+": root,
    "root-": lambda z: root(-z),
}


def minima(a: Tensor, p: Tensor) -> Tensor:
    """The sum over the features of min(a, p), of those that agree in sign min(|a|, |p|): float[tokens, out]."""
    whole = a.abs().sum(-1)[:, None] + p.abs().sum(-1)
    rows = len(a) if a.device.type == "cpu" else max(1, _BUFFER // p.numel())
    apart = torch.cat([torch.cdist(part, p, p=1) for part in a.split(rows)])
    return ((whole - apart) / 2).clamp_min(0)


_BUFFER = 1 << 26  # elements: off the CPU, the backward pass of cdist holds rows x out x features of them
_TILE = 1 << 16  # similarities that are worked on at once: they stay in the cache
_FACTORS = 64  # of at least a half each, multiplied before a logarithm is taken


class SoftMin(torch.autograd.Function):
    """The sum of -log(e^-z + e^-u) over the features that both have: [tokens, out].

    Each is min(z, u) + log sigmoid|z - u|, and the logarithms are those of products of sigmoids, feature after feature.
    What a token or a prototype lacks is infinitely far away.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, u: Tensor) -> Tensor:
        ctx.save_for_backward(z, u)
        wide = torch.promote_types(z.dtype, torch.float32)
        total = minima(z.relu().to(wide), u.relu().to(wide))
        far, near = _far_apart(z, u)
        rows = max(1, _TILE // len(u))
        for a, part in zip(far.split(rows, 1), total.split(rows), strict=True):
            apart, factor = torch.empty_like(part), torch.ones_like(part)
            for k, p in enumerate(near, 1):
                factor *= torch.sub(a[k - 1][:, None], p, out=apart).abs_().sigmoid_()
                if k % _FACTORS == 0 or k == len(near):
                    part += factor.log_()
                    factor.fill_(1)
        return total.to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (grad,), (z, u) = grads, ctx.saved_tensors
        far, near = _far_apart(z, u)
        flow = grad.to(far.dtype)
        to_z, to_u = (flow @ (u > 0).to(flow.dtype)).T.contiguous(), torch.zeros_like(near)
        rows = max(1, _TILE // len(u))
        for a, part, share in zip(far.split(rows, 1), flow.split(rows), to_z.split(rows, 1), strict=True):
            apart = torch.empty_like(part)
            for k, p in enumerate(near):  # sigmoid(z - u) = e^-u / (e^-z + e^-u), of what flows to u
                torch.sub(a[k][:, None], p, out=apart).sigmoid_().mul_(part)
                share[k] -= apart.sum(1)
                to_u[k] += apart.sum(0)
        return (to_z.T * (z > 0)).to(z.dtype), to_u.T.to(u.dtype)


def _far_apart(z: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """z and u by feature, [features, tokens] and [features, out], -infinite and infinite where they are not above 0."""
    wide = torch.promote_types(z.dtype, torch.float32)
    far, near = z.to(wide).where(z > 0, -math.inf), u.to(wide).where(u > 0, math.inf)
    return far.T.contiguous(), near.T.contiguous()
