"""sasp: shaped attention, alpha I + beta softmax - gamma C of each head, and FFNs that may stand beside attention.

Source: He & Hofmann, arXiv 2311.01906, eq. 6, and the SASP of ckerce/cleanGPT. C is the causal average. All weights
stay as they are: alpha = gamma = 0 and beta = 1 is GPT-2, and recovery finds what each head makes of the other two.

parallel: x + a attention(ln_1 x) + f ffn(ln_2 x), in which FFNs no longer read what attention of their own block found.
That is another function whatever a and f are: it needs recovery, by distillation of the original.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from .. import gpt2
from ..errors import UserError
from .base import FitContext, Rewrite, check_layers, layers_of, sites_of
from .structure import add_structure, without_structure


@dataclass(frozen=True)
class Sasp(Rewrite):
    """layers: which (null = all). alpha, beta, gamma: what each head starts with. parallel: FFNs beside attention, both
    with a gain that starts at 1."""

    name = "sasp"

    layers: list | None = None
    alpha: float = 0.0
    beta: float = 1.0
    gamma: float = 0.0
    parallel: bool = False

    def check(self, base: GPT2Config) -> None:
        check_layers(self.name, self.layers, base)
        for word in ("alpha", "beta", "gamma"):
            if not math.isfinite(getattr(self, word)):
                raise UserError(f"sasp: {word} is {getattr(self, word)}; allowed: finite numbers")

    def resolved(self, base: GPT2Config) -> Sasp:
        return dataclasses.replace(self, layers=layers_of(self.layers, base))

    def sites(self, base: GPT2Config) -> frozenset[str]:
        """Of parallel blocks ln_2 too: it reads another sum."""
        return sites_of(layers_of(self.layers, base), ["attn.scores", "ln_2"] if self.parallel else ["attn.scores"])

    def config(self, base: GPT2Config) -> GPT2Config:
        if getattr(base, "shaped_attention", None):
            raise UserError("a recipe can have sasp once; give it all of its layers")
        return add_structure(
            base, "shaped_attention", {"layers": layers_of(self.layers, base), "parallel": self.parallel}
        )

    def fit(self, model: GPT2LMHeadModel, context: FitContext) -> None:
        heads, device = model.config.n_head, gpt2.device(context.original)
        for layer in model.config.shaped_attention["layers"]:
            shape = gpt2.attention(model, layer).shape
            for name, value in (("identity", self.alpha), ("softmax", self.beta), ("mean", self.gamma)):
                gpt2.put(shape, name, torch.full((heads,), value, device=device))
            if self.parallel:
                for name in ("attention", "ffn"):
                    gpt2.put(gpt2.blocks(model)[layer].gains, name, torch.ones(1, device=device))

    def trainable(self, model: GPT2LMHeadModel) -> list[nn.Parameter]:
        """The shapes, and the gains of parallel blocks."""
        found: list[nn.Parameter] = []
        for layer in model.config.shaped_attention["layers"]:
            found += gpt2.attention(model, layer).shape.parameters()
            if model.config.shaped_attention["parallel"]:
                found += gpt2.blocks(model)[layer].gains.parameters()
        return found

    def beside_adapters(self, model: GPT2LMHeadModel) -> list[nn.Parameter]:
        return self.trainable(model)

    def fold(self, model: GPT2LMHeadModel) -> GPT2LMHeadModel:
        """beta becomes part of what reads its head."""
        shaped = model.config.shaped_attention
        if shaped["parallel"]:
            raise UserError("sasp: its FFNs stand beside attention, which plain GPT-2 cannot express")
        tensors, state = {}, model.state_dict()
        for layer in shaped["layers"]:
            shape, key = gpt2.attention(model, layer).shape, gpt2.linear_key(layer, "attn.o", "weight")
            if shape.identity.any() or shape.mean.any():
                raise UserError(
                    f"sasp: heads of layer {layer} have an alpha or a gamma that is not 0, which plain GPT-2 cannot "
                    "express"
                )
            beta = shape.softmax.detach()
            if (beta == 1).all():
                continue
            if key not in state:
                raise UserError(f"sasp: beta of layer {layer} is not 1, and attention's output there is no linear")
            heads = state[key].unflatten(0, (len(beta), -1))
            tensors[key] = (heads * beta[:, None, None]).flatten(0, 1)
        return without_structure(model, "shaped_attention", lambda entry: True, tensors)

    @classmethod
    def neutral(cls, base: GPT2Config) -> Sasp:
        return cls()
