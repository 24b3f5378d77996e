"""token_factored: the residual stream in two, tokens that attention moves and context that FFNs add.

Source: the token-factored transformer of ckerce/cleanGPT (modeling/streams.py). Stages:
- exact: GPT-2's own function, to be looked at in two streams;
- v_from_xt: values read LN(xt) and not LN(xt + xe), by a dense linear refitted to the original's values;
- kron_v, kron_o, kron: values, outputs or both only mix whole heads: n_head^2 numbers in the place of d^2. This takes
  most of what attention moves away; only distillation and recovery make a model of it;
- identity: a head moves its own slice of LN(xt).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from .. import gpt2, models
from ..capture import Batch
from ..errors import UserError
from ..modeling.streams import STAGES, HeadMixing
from ..token_groups import Strings
from .base import FitContext, Rewrite, check_layers, layers_of, sites_of
from .stream_diagnosis import diagnose
from .structure import add_structure, without_structure
from .token_factored_fit import Settings, fit_values


@dataclass(frozen=True)
class TokenFactored(Rewrite):
    """layers: whose values and outputs the stage changes (null = all). value_norm: values read LN(xt), else xt. bias:
    Kronecker outputs have one. ridge: of the refit, as a share of the mean variance of what values read. distill_steps:
    of each layer's attention towards the original's hidden states after its block, for what the new model's own layers
    before give it, on calibration text."""

    name = "token_factored"

    stage: Literal["exact", "v_from_xt", "kron_v", "kron_o", "kron", "identity"] = "v_from_xt"
    layers: list | None = None
    value_norm: bool = True
    bias: bool = True
    ridge: float = 1e-2
    distill_steps: int = 0
    distill_learning_rate: float = 3e-3

    def check(self, base: GPT2Config) -> None:
        check_layers(self.name, self.layers, base)
        if self.ridge < 0:
            raise UserError(f"{self.name}: ridge is {self.ridge}; allowed: 0 or more")
        if self.distill_steps < 0:
            raise UserError(f"{self.name}: distill_steps is {self.distill_steps}; allowed: 0 or more")
        if self.distill_steps and not self._apart:
            raise UserError(f"{self.name}: distill_steps is {self.distill_steps} with stage exact; allowed: 0")
        if self.distill_learning_rate <= 0:
            raise UserError(f"{self.name}: distill_learning_rate is {self.distill_learning_rate}; allowed: above 0")

    @property
    def _apart(self) -> bool:
        return STAGES[self.stage][0] is not None

    def resolved(self, base: GPT2Config) -> TokenFactored:
        return dataclasses.replace(self, layers=layers_of(self.layers, base))

    def sites(self, base: GPT2Config) -> frozenset[str]:
        own = (
            sites_of(layers_of(self.layers, base), [f"attn.{part}" for part in "qkvo"]) if self._apart else frozenset()
        )
        return own | {"streams"}

    def config(self, base: GPT2Config) -> GPT2Config:
        layers = layers_of(self.layers, base) if self._apart else list(range(base.n_layer))
        entry = {"stage": self.stage, "layers": layers, "value_norm": self.value_norm, "bias": self.bias}
        return add_structure(base, "token_factored", entry)

    def fit(self, model: GPT2LMHeadModel, context: FitContext) -> None:
        if not self._apart:
            return
        original, base = context.original, context.original.config
        layers = layers_of(self.layers, base)
        alone = models.build(self.config(base)).to(original.dtype).eval()  # type: ignore[arg-type]
        alone.load_state_dict(original.state_dict(), strict=False, assign=True)
        steps, rate = self.distill_steps, self.distill_learning_rate
        fit_values(Settings(self.name, self.stage, layers, self.ridge, steps, rate), alone, context)
        found = {}
        for layer in layers:
            for name, tensor in gpt2.block_tensors(alone, layer).items():
                if name.startswith(("attn.", "ln_v.")):
                    source, target = (gpt2.block_key(index, name) for index in (layer, context.layers[layer]))
                    found[target] = gpt2.for_layer(source, tensor, target, base)
        model.load_state_dict(found, strict=False, assign=True)

    def trainable(self, model: GPT2LMHeadModel) -> list[nn.Parameter]:
        return self.beside_adapters(model)

    def beside_adapters(self, model: GPT2LMHeadModel) -> list[nn.Parameter]:
        """What mixes whole heads, and the values' norms."""
        if not self._apart:
            return []
        return [
            parameter
            for layer in model.config.token_factored["layers"]
            for module in (gpt2.value_norm(model, layer), *gpt2.attention(model, layer).children())
            if isinstance(module, HeadMixing | nn.LayerNorm)
            for parameter in module.parameters()
        ]

    def fold(self, model: GPT2LMHeadModel) -> GPT2LMHeadModel:
        if self._apart:
            raise UserError(f"values of token_factored ({self.stage}) read a stream of their own, plain GPT-2's do not")
        return without_structure(model, "token_factored", lambda entry: True, {})

    def diagnose(self, model: GPT2LMHeadModel, batches: Iterable[Batch], strings: Strings = ()) -> dict[str, Any]:
        return diagnose(model, batches)

    @classmethod
    def neutral(cls, base: GPT2Config) -> TokenFactored:
        return cls(stage="exact")
