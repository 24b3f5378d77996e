"""An FFN stored once and used by several layers: W_l = W_c + A_l B_l, computed as x W_c + (x A_l) B_l.

The shared weights live in the trunk's bank; a layer holds only what is its own (low-rank deltas, biases) and is handed
the bank at every call, so no reference to a shared module can go stale.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D


class SharedConv1D(Conv1D):
    """GPT-2's linear (weight [in, out]) whose bias may belong to the calling layer instead."""

    def __init__(self, width_in: int, width_out: int, bias: bool):
        super().__init__(width_out, width_in)
        if not bias:
            self.register_parameter("bias", None)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:  # float[..., in] -> float[..., out]
        own = self.bias if bias is None else bias
        return torch.addmm(own, x.reshape(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


class SharedFFN(nn.Module):
    """One entry of the bank: the two linears that a group of layers shares."""

    def __init__(self, d: int, d_ff: int, bias: bool):
        super().__init__()
        self.c_fc = SharedConv1D(d, d_ff, bias)
        self.c_proj = SharedConv1D(d_ff, d, bias)


class LayerDelta(nn.Module):
    """What one layer adds to one shared linear: A [in, rank], B [rank, out] (rank > 0) and its bias [out]."""

    def __init__(self, width_in: int, width_out: int, rank: int, bias: bool):
        super().__init__()
        self.rank = rank
        if rank:
            self.delta_a = nn.Parameter(torch.empty(width_in, rank))
            self.delta_b = nn.Parameter(torch.empty(rank, width_out))
        if bias:
            self.bias = nn.Parameter(torch.empty(width_out))
        else:
            self.register_parameter("bias", None)

    def forward(self, x: Tensor, shared: SharedConv1D) -> Tensor:  # float[..., in] -> float[..., out]
        y = shared(x, self.bias)
        if not self.rank:
            return y
        narrow = x.reshape(-1, x.size(-1)) @ self.delta_a  # float[tokens, rank]: the in x out product is never formed
        flat = y.view(-1, y.size(-1))
        if torch.is_grad_enabled() or flat.dtype != self.delta_b.dtype:  # training, or autocast
            return torch.addmm(flat, narrow, self.delta_b).view_as(y)
        return torch.addmm(flat, narrow, self.delta_b, out=flat).view_as(y)  # y is ours: no second tensor of its size


class LayerFFN(nn.Module):
    """The FFN of a layer in a group: looks the shared weights up in the bank by index when it is called."""

    def __init__(self, config, group: int, rank: int, bias: str):
        super().__init__()
        d, d_ff = config.hidden_size, config.n_inner if config.n_inner is not None else 4 * config.hidden_size
        self.group = group
        self.c_fc = LayerDelta(d, d_ff, rank, bias == "per_layer")
        self.c_proj = LayerDelta(d_ff, d, rank, bias == "per_layer")
        self.act = ACT2FN[config.activation_function]
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor, bank: nn.ModuleList) -> Tensor:  # float[batch, context, d] -> the same
        shared = bank[self.group]
        hidden = self.act(self.c_fc(x, shared.c_fc))
        return self.dropout(self.c_proj(hidden, shared.c_proj))
