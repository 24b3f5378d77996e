"""The residual stream in two: tokens, which attention changes, and context, which FFNs and positions add.

Source: the token-factored transformer of ckerce/cleanGPT. x = xt + xe; queries, keys and FFNs read x, values may read
xt alone: xt += O(attention of V(xt)), xe += FFN(LN(x)). Between blocks the hidden states are [2, batch, tokens, d], x
and xt, so that x is what GPT-2 has to the last bit where nothing else was changed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.pytorch_utils import Conv1D

# stage -> what values and outputs are made by; None: of c_attn and c_proj as in GPT-2. A rewrite fits all but the two
# that end in _only, which are for models from scratch.
STAGES: dict[str, tuple[str | None, str | None]] = {
    "exact": (None, None),
    "v_from_xt": ("dense", None),
    "kron_v": ("kron", None),
    "kron_o": ("dense", "kron"),
    "kron_v_only": ("kron", "identity"),
    "kron_o_only": ("identity", "kron"),
    "kron": ("kron", "kron"),
    "identity": ("identity", "identity"),
}


class StreamPositions(nn.Embedding):
    """wpe, added to x alone: float[2, batch or 1, tokens, d]."""

    def forward(self, positions: Tensor) -> Tensor:
        return to_context(super().forward(positions))


def to_context(added: Tensor) -> Tensor:
    """What is added to x and not to xt."""
    return torch.stack([added, torch.zeros_like(added)]) if added.ndim else added


class StreamDropout(nn.Dropout):
    """Of embeddings, alike in both streams; [batch, tokens, d] becomes [2, batch, tokens, d]."""

    def forward(self, hidden: Tensor) -> Tensor:
        if hidden.ndim == 3:
            hidden = torch.stack([hidden, hidden])
        if not self.training or not self.p:
            return hidden
        return hidden * super().forward(torch.ones_like(hidden[0]))


class StreamNorm(nn.LayerNorm):
    """Of x."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(residual(hidden))


def residual(hidden: Tensor) -> Tensor:
    """x of hidden states that may be two streams."""
    return hidden[0] if hidden.ndim == 4 else hidden


class HeadMixing(nn.Module):
    """float[..., d] -> the same: slice g of the output is the sum over h of weight[g, h] times slice h of the input,
    the Kronecker product of weight and 1 of the head's width; plus a bias [d] where there is one."""

    def __init__(self, heads: int, d: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, heads))
        self.bias = nn.Parameter(torch.empty(d)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.eye_(self.weight)
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (len(self.weight), -1))
        found = torch.einsum("gh,...hd->...gd", self.weight, heads).flatten(-2)
        return found if self.bias is None else found + self.bias


def stream_map(kind: str, config: Any, bias: bool) -> nn.Module:
    """The module of a kind of STAGES."""
    d = config.hidden_size
    if kind == "dense":
        return Conv1D(d, d)
    return HeadMixing(config.num_attention_heads, d, bias) if kind == "kron" else nn.Identity()
