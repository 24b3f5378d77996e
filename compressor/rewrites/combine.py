"""combine: two checkpoints of as many layers side by side in one bigger model, joined by linear glue.

Source: the model combination of evintunador/matryoshkaGPT. All weights of both stay as they are; only the glue trains.
It is a map of both final states in front of the head, which begins as the mean of both models' logits or as those of
one of them, and, with `blocks`, one of what each attention and FFN adds to the residual stream, so that the parts can
read each other. When a recovery ends those become part of the linears that they follow (`finish`). The result expands:
make both smaller first. Each part keeps its own LayerNorms, which is why none of it is ever plain GPT-2.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from .. import artifacts, gpt2, models
from ..errors import UserError
from ..modeling import GPT2CompressedConfig
from ..modeling.combined import Glue, PartsLinear
from .base import BLOCK_SITES, FitContext, Rewrite, sites_of
from .structure import add_structure

# What both must have in common besides the width of a head and the tokenizer.
_ALIKE = (
    "vocab_size", "n_layer", "n_positions", "activation_function", "layer_norm_epsilon", "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn",
)  # fmt: skip
_SHARES = {"average": (0.5, 0.5), "first": (1.0, 0.0), "second": (0.0, 1.0)}  # of each model's logits


@dataclass(frozen=True)
class Combine(Rewrite):
    """other: a MODEL, plain GPT-2 too; null: the model itself once more. start: whose logits the result begins with,
    the mean of both, the model's or the other's. blocks: glue within the blocks too. other_hash: of the other's weight
    files, filled in, so that a result says what it was made of."""

    name = "combine"

    other: str | None = None
    start: Literal["average", "first", "second"] = "average"
    blocks: bool = False
    other_hash: str | None = None

    def sites(self, base: GPT2Config) -> frozenset[str]:
        return sites_of(range(base.n_layer), BLOCK_SITES) | {"wpe", "lm_head", "streams"}

    def check(self, base: GPT2Config) -> None:
        other, named = self._other(base), self._named
        if isinstance(other, GPT2CompressedConfig):
            raise UserError(
                f"combine: {named} is a gpt2_compressed; allowed: plain GPT-2 (`gpt2-compress export PATH --dense OUT` "
                "makes one where it can be)"
            )
        for key in _ALIKE:
            given, wanted = getattr(other, key), getattr(base, key)
            if given != wanted:
                raise UserError(f"combine: {named} has {key} {given}, the model {wanted}; allowed: the same")
        given, wanted = (config.n_embd // config.n_head for config in (other, base))
        if given != wanted:
            raise UserError(f"combine: heads of {named} are {given} wide, the model's {wanted}; allowed: the same")
        if base.name_or_path and other.name_or_path != base.name_or_path and _tokens(other) != _tokens(base):
            raise UserError(f"combine: {named} has another tokenizer than the model; allowed: the same vocabulary")

    def resolved(self, base: GPT2Config) -> Combine:
        if self.other is None or self.other_hash is not None:
            return self
        return dataclasses.replace(self, other_hash=artifacts.hash_files(list(models.find(self.other).files)))

    def _other(self, base: GPT2Config) -> GPT2Config:
        return base if self.other is None else models.find(self.other).config

    @property
    def _named(self) -> str:
        return "the model itself" if self.other is None else self.other

    def config(self, base: GPT2Config) -> GPT2Config:
        parts = base, self._other(base)
        widths, ffns = [part.n_embd for part in parts], [gpt2.d_ff(part) for part in parts]
        bigger = copy.deepcopy(base)
        bigger.n_embd, bigger.n_inner = sum(widths), sum(ffns)
        bigger.n_head = sum(part.n_head for part in parts)
        bigger.tie_word_embeddings = all(part.tie_word_embeddings for part in parts)
        outputs = "glued" if self.blocks else "apart"
        return add_structure(bigger, "combined", {"widths": widths, "ffn": ffns, "outputs": outputs})

    def fit(self, model: GPT2LMHeadModel, context: FitContext) -> None:
        first = context.original
        wanted, found = model.state_dict().keys(), {}
        of_first, of_second = first.state_dict(), self._second(first).state_dict()
        for name, tensor in of_first.items():
            if name == gpt2.HEAD_KEY and model.config.tie_word_embeddings:
                continue
            if name in wanted:
                found[name] = torch.cat([tensor, of_second[name]], -1)
                continue
            owner, _, leaf = name.rpartition(".")
            for index, own in enumerate((tensor, of_second[name])):
                found[f"{owner}.parts.{index}.{leaf}"] = own
        model.load_state_dict(found, strict=False, assign=True)
        for glue in glues(model):
            gpt2.put(glue, "weight", torch.eye(model.config.n_embd, device=gpt2.device(first)))
        widths = torch.tensor(model.config.combined["widths"])
        shares = torch.tensor(_SHARES[self.start]).repeat_interleave(widths)
        gpt2.put(gpt2.head_map(model), "weight", shares.diag().to(gpt2.device(first)))

    def _second(self, first: GPT2LMHeadModel) -> GPT2LMHeadModel:
        if self.other is None:
            return copy.deepcopy(first)  # no tensor may stand twice in a model
        dtype = str(first.dtype).removeprefix("torch.")
        opened = models.open_model(self.other, device=str(gpt2.device(first)), dtype=dtype)
        if self.other_hash not in (None, opened.hash):
            raise UserError(f"combine: the weights of {self.other} are not those of other_hash {self.other_hash}")
        return opened.model

    def trainable(self, model: GPT2LMHeadModel) -> list[nn.Parameter]:
        return [glue.weight for glue in glues(model)]

    def beside_adapters(self, model: GPT2LMHeadModel) -> list[nn.Parameter]:
        return self.trainable(model)

    def finish(self, model: GPT2LMHeadModel) -> None:
        for owner in list(model.modules()):
            for name, child in list(owner.named_children()):
                if isinstance(child, PartsLinear) and child.glue is not None:
                    setattr(owner, name, folded(child, child.glue))
        model.config.combined = self.finished(model.config).combined

    def finished(self, config: GPT2Config) -> GPT2Config:
        found = copy.deepcopy(config)
        if found.combined["outputs"] == "glued":
            found.combined = {**found.combined, "outputs": "dense"}
        return found

    def fold(self, model: GPT2LMHeadModel) -> GPT2LMHeadModel:
        raise UserError("combine: each part has LayerNorms of its own, plain GPT-2's are over all of the width")

    @classmethod
    def neutral(cls, base: GPT2Config) -> Combine:
        return cls(start="first")


def _tokens(config: GPT2Config) -> dict[str, int]:
    """The vocabulary of the tokenizer in the folder that a config was read from."""
    folder = str(config.name_or_path)
    return models.open_tokenizer(folder, Path(folder), config).get_vocab()


def glues(model: GPT2LMHeadModel) -> list[Glue]:
    """All glue of a model, the head's included."""
    return [module for module in model.modules() if isinstance(module, Glue)]


@torch.no_grad()
def folded(linear: PartsLinear, glue: Glue) -> Conv1D:
    """One linear over all parts that does what these and their glue do; made in float64, rounded once."""
    parts = [cast(Conv1D, part) for part in linear.parts]
    weight = torch.block_diag(*(part.weight.cpu().double() for part in parts))
    bias = torch.cat([part.bias.cpu().double() for part in parts])
    kind, over = glue.weight, glue.weight.cpu().double().T
    whole = Conv1D(weight.shape[1], weight.shape[0])
    whole.weight, whole.bias = (nn.Parameter((tensor @ over).to(kind)) for tensor in (weight, bias))
    return whole.train(linear.training)
