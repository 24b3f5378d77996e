"""compressed_n: a window of n whole blocks becomes one block; the result is plain GPT-2 with fewer layers.

Source: code_n_all of chetaniitbhilai (collapse=mean, its attention the anchor's). "laco": LaCo, arXiv 2402.11187.
"fit" is ours: one averaged block adds about 1/n of what n residual blocks add, so the anchor's block is kept and its
two output projections, in which the block is linear, are refitted to what the whole window really adds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from .. import gpt2
from ..errors import UserError
from ..windows import Window
from .base import BLOCK_SITES, FitContext, WindowRewrite, sites_of
from .merged_n import aligned_ffns, merged_ffn

_FFN_NAMES = ("mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias")


@dataclass(frozen=True)
class CompressedN(WindowRewrite):
    """collapse, the block that stands for the window:
    "mean" = the aligned average FFN; "keep" = the anchor's FFN; "sum" = the average FFN with its output projection, and
    the attention's, times n; "laco" = anchor + sum of the differences of the others to it, for every tensor; "fit" =
    keep, then a least-squares refit of both output projections on calibration data.
    attention: whose attention and LayerNorms the block has (not laco, which combines them).
    """

    name = "compressed_n"

    collapse: Literal["mean", "keep", "sum", "laco", "fit"] = "mean"
    attention: Literal["anchor", "first", "last"] = "anchor"

    def check(self, base: GPT2Config) -> None:
        super().check(base)
        if self.collapse == "laco" and self.attention != "anchor":
            raise UserError(
                f"compressed_n: attention={self.attention} with collapse=laco, which combines the attentions; "
                "allowed: anchor"
            )

    def sites(self, base: GPT2Config) -> frozenset[str]:
        return sites_of(self.layers(base), BLOCK_SITES)

    def removed(self, base: GPT2Config) -> frozenset[int]:
        return frozenset(layer for item in self.windows(base) for layer in item.layers if layer != item.anchor)

    def fit(self, model: GPT2LMHeadModel, context: FitContext) -> None:
        for window in self.windows(context.original.config):
            layer = context.layers[window.anchor]
            block = gpt2.blocks(model)[layer]
            for name, value in self._start(context, window, layer).items():
                path, _, leaf = name.rpartition(".")
                gpt2.put(block.get_submodule(path), leaf, value)
            if self.collapse == "fit" and window.n > 1:
                _refit(model, layer, context, window)

    def _start(self, context: FitContext, window: Window, layer: int) -> dict[str, Tensor]:
        """The tensors of the one block, before any refit."""
        original = context.original
        source = {"anchor": window.anchor, "first": window.start, "last": window.start + window.n - 1}[self.attention]

        def block(index: int) -> dict[str, Tensor]:
            return {
                name: gpt2.for_layer(
                    gpt2.block_key(index, name), tensor, gpt2.block_key(layer, name), original.config
                ).double()
                for name, tensor in gpt2.block_tensors(original, index).items()
            }

        if self.collapse == "laco":
            ffns = aligned_ffns(context, window)
            members = [
                {**block(index), **dict(zip(_FFN_NAMES, ffn, strict=True))}
                for index, ffn in zip(window.layers, ffns, strict=True)
            ]
            anchor = members[window.anchor - window.start]
            return {name: anchor[name] + sum(member[name] - anchor[name] for member in members) for name in anchor}
        tensors = {name: value for name, value in block(source).items() if not name.startswith("mlp.")}
        if self.collapse in ("keep", "fit"):
            return {
                **tensors,
                **dict(zip(_FFN_NAMES, (t.double() for t in gpt2.ffn_weights(original, window.anchor)), strict=True)),
            }
        ffn = merged_ffn(context, window)
        if self.collapse == "sum":
            ffn[2:] = [value * window.n for value in ffn[2:]]
            for name in ("attn.c_proj.weight", "attn.c_proj.bias"):
                tensors[name] = tensors[name] * window.n
        return {**tensors, **dict(zip(_FFN_NAMES, ffn, strict=True))}

    @classmethod
    def neutral(cls, base: GPT2Config) -> CompressedN:
        return cls(n=1, start=0)


ROUNDS = 2  # h depends on W_o; a third round changed nothing measurable
RIDGE = 3e-2  # of the mean squared feature; 1e-3 to 1e-1 differ by 1 % of the perplexity


def _refit(model: GPT2LMHeadModel, layer: int, context: FitContext, window: Window) -> None:
    """Least squares of the window's true update on the features of the block's two output projections.

    With a = the attention's heads [d] and h = the FFN's hidden activations [d_ff], the block is x + a W_o + h W_p + b.
    h depends on W_o, so solve and repeat. Each token weighs 1 / variance of its true output, because what follows reads
    it through a LayerNorm. The ridge holds the weights where they are in directions the data say little about.
    """
    block = gpt2.blocks(model)[layer]
    d = model.config.n_embd
    width = d + gpt2.d_ff(model.config)
    device = gpt2.device(context.original)
    passages = _passages(context, window)
    for turn in range(ROUNDS):
        context.progress(f"refit of block {layer}, round {turn + 1} of {ROUNDS}")
        gram = torch.zeros(width + 1, width + 1, dtype=torch.float64, device=device)
        pull = torch.zeros(width + 1, d, dtype=torch.float64, device=device)
        for features, error, weight in _errors(model, layer, passages):
            gram.addmm_((features * weight).T, features)
            pull.addmm_((features * weight).T, error)
        ridge = torch.full((width + 1,), RIDGE * gram.diagonal()[:-1].mean().item(), dtype=torch.float64, device=device)
        ridge[-1] = 0
        change = torch.linalg.solve(gram + ridge.diag(), pull)
        for linear, part in ((block.attn.c_proj, change[:d]), (block.mlp.c_proj, change[d:-1])):
            gpt2.put(linear, "weight", linear.weight.double() + part)
        gpt2.put(block.mlp.c_proj, "bias", block.mlp.c_proj.bias.double() + change[-1])


def _passages(context: FitContext, window: Window) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Per calibration batch: what enters the original's window, what leaves it [rows, context, d], and the mask.

    Kept for all rounds: running the layers below again would cost more than the fit, and this is 8 d bytes a token.
    """
    result = []
    for entry, mask in context.entering(window.start):
        truth = gpt2.run_blocks(context.original, entry, window.start, window.start + window.n)
        result.append((entry, truth, mask))
    return result


def _errors(
    model: GPT2LMHeadModel, layer: int, passages: list[tuple[Tensor, Tensor, Tensor]]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Per passage, of its real tokens in float64: features [a, h, 1] of the block [tokens, d + d_ff + 1], what left the
    window minus what leaves the block [tokens, d], weights [tokens, 1]."""
    block, seen = gpt2.blocks(model)[layer], {}
    hooks = [
        linear.register_forward_pre_hook(lambda _module, inputs, key=key: seen.update({key: inputs[0]}))
        for key, linear in (("a", block.attn.c_proj), ("h", block.mlp.c_proj))
    ]
    try:
        for entry, truth, mask in passages:
            output = gpt2.run_blocks(model, entry, layer, layer + 1)
            features = torch.cat(
                [seen["a"][mask], seen["h"][mask], torch.ones_like(truth[mask][:, :1])], dim=1
            ).double()
            weight = 1 / truth[mask].double().var(dim=1, keepdim=True).clamp_min(1e-12)
            yield features, (truth - output)[mask].double(), weight
    finally:
        for hook in hooks:
            hook.remove()
