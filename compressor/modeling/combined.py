"""Models side by side in one: every part reads and writes its own slice of the residual stream, glue mixes the slices.

The linears of parts are held apart, as a block-diagonal matrix is without its zeros; heads, cache and hidden states are
those of one GPT-2 of the summed widths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.pytorch_utils import Conv1D

# What the linears that write to the residual stream are: of each part alone, the same with glue over what all of them
# give, or one over all parts, as they are when glue has become part of them.
OUTPUTS = ("apart", "glued", "dense")


class Glue(nn.Module):
    """float[..., d] -> the same, x W^T; weight [d, d] begins as the identity."""

    def __init__(self, d: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d, d))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.eye_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


class PartsLinear(nn.Module):
    """float[..., sum of widths_in] -> float[..., each * sum of widths_out], a linear for each part. each: how many
    outputs of that width stand side by side (3: queries, keys, values); the first of all parts come first."""

    def __init__(self, widths_in: Sequence[int], widths_out: Sequence[int], each: int = 1, glued: bool = False):
        super().__init__()
        self.widths, self.each = list(widths_in), each
        pairs = zip(widths_in, widths_out, strict=True)
        self.parts = nn.ModuleList([Conv1D(each * out, width) for width, out in pairs])
        self.glue = Glue(sum(widths_out)) if glued else None

    def forward(self, x: Tensor) -> Tensor:
        made = [part(own) for part, own in zip(self.parts, x.split(self.widths, -1), strict=True)]
        if self.each > 1:
            chunks = [own.chunk(self.each, -1) for own in made]
            made = [chunk for kind in zip(*chunks, strict=True) for chunk in kind]
        y = torch.cat(made, -1)
        return y if self.glue is None else self.glue(y)


class PartsNorm(nn.LayerNorm):
    """LayerNorm of each part's slice; weight and bias [sum of widths]."""

    def __init__(self, widths: Sequence[int], eps: float):
        super().__init__(sum(widths), eps=eps)
        self.widths = list(widths)

    def forward(self, x: Tensor) -> Tensor:
        slices = (tensor.split(self.widths, -1) for tensor in (x, self.weight, self.bias))
        return torch.cat(
            [
                nn.functional.layer_norm(own, own.shape[-1:], weight, bias, self.eps)
                for own, weight, bias in zip(*slices, strict=True)
            ],
            -1,
        )


def put_parts(block: Any, config: Any) -> None:
    """Give a GPT-2 block the norms and linears of the config's `combined`."""
    entry = config.combined
    widths, ffns, outputs = entry["widths"], entry["ffn"], entry["outputs"]
    block.ln_1, block.ln_2 = (PartsNorm(widths, config.layer_norm_epsilon) for _ in range(2))
    block.attn.c_attn, block.mlp.c_fc = PartsLinear(widths, widths, each=3), PartsLinear(widths, ffns)
    if outputs != "dense":
        block.attn.c_proj = PartsLinear(widths, widths, glued=outputs == "glued")
        block.mlp.c_proj = PartsLinear(ffns, widths, glued=outputs == "glued")
