"""Shaped attention: a token's own value and the mean of all so far beside what softmax mixes.

Source: He & Hofmann, arXiv 2311.01906, eq. 6: alpha I + beta softmax - gamma C, C the uniform causal average; the SASP
of ckerce/cleanGPT. One of each for a head. alpha = gamma = 0 and beta = 1 is attention as it was.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import initialization as init


class AttentionShape(nn.Module):
    """identity, softmax, mean: float[heads], alpha, beta and gamma."""

    def __init__(self, heads: int):
        super().__init__()
        self.identity = nn.Parameter(torch.empty(heads))
        self.softmax = nn.Parameter(torch.empty(heads))
        self.mean = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.zeros_(self.identity)
        init.ones_(self.softmax)
        init.zeros_(self.mean)

    def forward(self, mixed: Tensor, value: Tensor, real: Tensor | None) -> Tensor:
        """mixed float[batch, tokens, heads, head_dim], of the last tokens of value float[batch, heads, tokens so far,
        head_dim]; real bool[batch, tokens so far], None: all are."""
        tokens = mixed.shape[1]
        own = value[:, :, -tokens:].transpose(1, 2)
        exact = value.to(torch.promote_types(value.dtype, torch.float32))
        if real is None:
            counted = exact
            count = torch.arange(1, value.shape[2] + 1, device=value.device)[None, :]
        else:
            counted = exact * real[:, None, :, None]
            count = real.cumsum(1).clamp_min(1)
        sums = counted.sum(2, keepdim=True) if tokens == 1 else counted.cumsum(2)[:, :, -tokens:]
        means = (sums / count[:, None, -tokens:, None]).to(value.dtype).transpose(1, 2)
        alpha, beta, gamma = (part[:, None].to(value.dtype) for part in (self.identity, self.softmax, self.mean))
        return alpha * own + beta * mixed - gamma * means


class BranchGains(nn.Module):
    """Of attention and FFN beside each other, x + attention a(x) + ffn f(x): float[1] each."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Parameter(torch.empty(1))
        self.ffn = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.ones_(self.attention)
        init.ones_(self.ffn)
