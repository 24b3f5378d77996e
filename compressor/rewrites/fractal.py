"""fractal: a model partitioned into 2 or 4 models side by side, each of these into as many again, and so on; every one
is trained on its own share of the batch.

Source: evintunador/FractalFormer; the groups of neurons as in MoEfication, arXiv 2110.01786. Putting heads and neurons
in the order of their groups keeps the model's function: as a whole it stays the original (modeling/fractal.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from .. import gpt2, models
from ..capture import Batch
from ..errors import UserError
from ..modeling import GPT2CompressedConfig
from ..modeling.fractal import Part, few_heads, part_config, part_of, parts_of_levels, vectors_of, with_wider_heads
from ..modeling.modeling_gpt2_compressed import parted_model
from ..token_groups import Strings
from .base import BLOCK_SITES, Divided, FitContext, Rewrite, sites_of
from .fractal_diagnosis import diagnose
from .fractal_fit import Groups, fit_fractal
from .structure import add_structure, without_structure


@dataclass(frozen=True)
class Fractal(Rewrite):
    """split: how many models a model is partitioned into; levels: how often. groups: which heads and neurons go
    together, such as are alike, or mixed ones that are worth the same. stream: which blocks of text are a part's own,
    by their places in the batch, or such as are alike (by the mean of their tokens' embeddings). share: whether a part
    is trained on its own blocks, or on all. inner: the share of the whole model's own predictions, against next tokens,
    in what the parts learn. only: cut this part out at once, [level, place]; the result is that model alone."""

    name = "fractal"

    split: int = 2
    levels: int = 2
    groups: Groups = "alike"
    stream: Literal["rows", "cluster"] = "rows"
    share: Literal["own", "all"] = "own"
    inner: float = 0.0
    only: list | None = None

    def check(self, base: GPT2Config) -> None:
        if not 0 <= self.inner <= 1:
            raise UserError(f"fractal: inner is {self.inner}; allowed: 0 to 1")
        fitting = [
            (split, levels)
            for split in (2, 4)
            for levels in range(1, 13)
            if base.n_head % split**levels == 0 and gpt2.d_ff(base) % split**levels == 0
        ]
        if (self.split, self.levels) not in fitting:
            allowed = ", ".join(f"split={split} with levels={levels}" for split, levels in fitting)
            raise UserError(
                f"fractal: split={self.split} with levels={self.levels} of {base.n_head} heads and {gpt2.d_ff(base)} "
                f"neurons; allowed: {allowed or 'none for this model'}"
            )
        self._only(base)

    def _whole(self, base: GPT2Config) -> GPT2CompressedConfig:
        """The config of the whole model, before `only`."""
        return add_structure(base, "fractal", {"split": self.split, "levels": self.levels, "heads": base.n_head})

    def _only(self, base: GPT2Config) -> Part | None:
        if self.only is None:
            return None
        if len(self.only) != 2 or any(type(number) is not int for number in self.only):
            raise UserError(f"fractal: only is {self.only}; allowed: [level, place]")
        try:
            return part_of(self._whole(base), *self.only)
        except ValueError as error:
            raise UserError(f"fractal: only is {self.only}: {error}") from error

    def sites(self, base: GPT2Config) -> frozenset[str]:
        return sites_of(range(base.n_layer), BLOCK_SITES) | {"wpe", "lm_head", "streams"}

    def config(self, base: GPT2Config) -> GPT2Config:
        whole, part = self._whole(base), self._only(base)
        return whole if part is None else part_config(whole, part)

    def fit(self, model: GPT2LMHeadModel, context: FitContext) -> None:
        base = context.original.config
        part = self._only(base)
        if part is None:
            fit_fractal(model, context, groups=self.groups)
            return
        whole = models.build(self._whole(base)).to(model.dtype)  # type: ignore[arg-type]
        fit_fractal(whole, context, groups=self.groups)
        whole.tie_weights()
        cut = parted_model(dict(whole.named_parameters()), whole.config, part)
        alone = {key: value.clone(memory_format=torch.contiguous_format) for key, value in cut.state_dict().items()}
        model.load_state_dict(alone, assign=True)

    # ------------------------------------------------------------ training and export

    def beside_adapters(self, model: GPT2LMHeadModel) -> list[nn.Parameter]:
        if self.only is not None:
            return []
        parts = parts_of_levels(model.config)
        return [parameter for part in parts for parameter in vectors_of(model, part).parameters()]

    def nest(self, model: GPT2LMHeadModel) -> Divided | None:
        if self.only is not None:
            return None
        return Divided(tuple(parts_of_levels(model.config)), self.stream, self.share, self.inner)

    def fold(self, model: GPT2LMHeadModel) -> GPT2LMHeadModel:
        return plain(model)

    def diagnose(
        self, model: GPT2LMHeadModel, batches: Iterable[Batch], strings: Strings = ()
    ) -> dict[str, Any] | None:
        return None if self.only is not None else diagnose(model, batches)

    @classmethod
    def neutral(cls, base: GPT2Config) -> Fractal:
        return cls(levels=1)


@torch.no_grad()
def plain(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """A model of parts without what is theirs alone, or a part of one, as plain GPT-2: a part's heads filled up with
    numbers that are 0, so that together they are as wide as the residual stream."""
    config = model.config
    if not few_heads(config):
        return without_structure(model, "fractal", lambda entry: True, {})
    wider = with_wider_heads(model.state_dict(), config)
    return without_structure(model, "fractal", lambda entry: True, wider, {"n_head": config.fractal["heads"]})
