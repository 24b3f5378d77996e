"""Where Tversky projections stand in a GPT-2: queries, keys, values, attention's output, the FFN, the LM head.

The banks live on the trunk and are handed to the layers at every call; a layer holds its prototypes and the key of its
bank.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from .tversky import FORM, SCALARS, FeatureBank, Scalars, TverskyProjection


class TverskyQKV(nn.Module):
    """Queries, keys and values: each a linear as GPT-2 has it, or a projection."""

    def __init__(self, parts: dict[str, nn.Module], keys: dict[str, str]):
        super().__init__()
        self.keys = keys  # part -> its bank, for the projections
        for name in "qkv":
            self.add_module(name, parts[name])

    def forward(self, x: Tensor, banks: nn.ModuleDict) -> tuple[Tensor, ...]:  # float[..., d] -> 3 of the same
        measured: dict[tuple[str, bool], Tensor] = {}
        found = []
        for name in "qkv":
            part, key = getattr(self, name), self.keys.get(name)
            if key is None:
                found.append(part(x))
                continue
            if (key, part.normalize) not in measured:
                measured[key, part.normalize] = part.measure(x, banks[key])
            found.append(part.compare(measured[key, part.normalize], banks[key]))
        return tuple(found)


class TverskyFFN(nn.Module):
    """GPT-2's FFN, one or both of whose linears are projections, or one projection in place of all of it."""

    def __init__(self, config: Any, found: dict[str, TverskyPlace]):
        super().__init__()
        d, d_ff = config.hidden_size, config.n_inner if config.n_inner is not None else 4 * config.hidden_size
        self.dropout = nn.Dropout(config.resid_pdrop)
        self.whole = "mlp_block" in found
        if self.whole:
            self.keys: tuple[str | None, ...] = (found["mlp_block"].key,)
            self.block = found["mlp_block"].make()
            return
        self.keys = tuple(found[name].key if name in found else None for name in ("c_fc", "mlp_out"))
        self.c_fc = found["c_fc"].make() if "c_fc" in found else Conv1D(d_ff, d)
        self.act = ACT2FN[config.activation_function]
        self.c_proj = found["mlp_out"].make() if "mlp_out" in found else Conv1D(d, d_ff)

    def forward(self, x: Tensor, banks: nn.ModuleDict) -> Tensor:  # float[batch, context, d] -> the same
        if self.whole:
            return self.dropout(self.block(x, banks[str(self.keys[0])]))
        first, last = self.keys
        hidden = self.act(self.c_fc(x) if first is None else self.c_fc(x, banks[first]))
        return self.dropout(self.c_proj(hidden) if last is None else self.c_proj(hidden, banks[last]))


class TverskyHead(nn.Module):
    """The LM head as similarities to the token embeddings: weight [vocabulary, d], tied as GPT-2's head is."""

    def __init__(self, config: Any, place: TverskyPlace):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.key, self.projection = place.key, place.make()

    def forward(self, hidden: Tensor, banks: nn.ModuleDict) -> Tensor:  # float[..., d] -> float[..., vocabulary]
        return self.projection(hidden, banks[self.key], self.weight)

    def resize(self, weight: nn.Parameter) -> None:
        """Take another weight [tokens, d]; the scale of a token that is new is 1."""
        self.weight, self.projection.width_out = weight, len(weight)
        if self.projection.scale is not None:
            scale = self.projection.scale.detach()
            more = scale.new_ones(max(0, len(weight) - len(scale)))
            self.projection.scale = nn.Parameter(torch.cat([scale[: len(weight)], more]))

    def product(self, hidden: Tensor, banks: nn.ModuleDict) -> tuple[Tensor, Tensor]:
        """left [..., k], right [vocabulary, k]: the logits are left right^T, where the form is a sum of products."""
        bank = cast(FeatureBank, banks[self.key])
        left, right = self.projection.product(self.projection.measure(hidden, bank), bank, self.weight)
        return left, right


def projection_at(model: Any, layer: int | None, target: str) -> TverskyProjection:
    """The projection that stands for a target (of `tversky_places`) in a language model."""
    if layer is None:
        return model.lm_head.projection
    block = model.transformer.h[layer]
    if target in ("q", "k", "v"):
        return getattr(block.attn.c_attn, target)
    if target == "attn_out":
        return block.attn.c_proj
    return getattr(block.mlp, {"c_fc": "c_fc", "mlp_out": "c_proj", "mlp_block": "block"}[target])


def receiver_at(model: Any, layer: int, target: str) -> nn.Module:
    """The module whose first argument is what the projection at a target of a layer measures."""
    return model.transformer.h[layer].attn.c_attn if target in ("q", "k", "v") else projection_at(model, layer, target)


# ---------------------------------------------------------------- from the config

FFN_TARGETS = ("c_fc", "mlp_out", "mlp_block")
HEAD_TARGET = "lm_head"
TARGETS = ("q", "k", "v", "attn_out", *FFN_TARGETS, HEAD_TARGET)


class TverskyPlace:
    """Where a projection stands: its bank, and how it is made."""

    def __init__(self, key: str, width_in: int, width_out: int, entry: dict, config: Any, given: bool = False):
        self.key, self.widths, self.entry, self.given = key, (width_in, width_out), entry, given
        self.initializer_range = config.initializer_range

    @property
    def features(self) -> int:
        return self.entry["features"][str(self.widths[0])]

    def make(self) -> TverskyProjection:
        entry = self.entry
        scalars = {name: entry[name] for name in (*SCALARS, "learn_scalars", "non_negative", "share_scalars")}
        width_in, width_out = self.widths
        return TverskyProjection(
            width_in,
            width_out,
            self.features,
            **{name: entry[name] for name in FORM},
            **scalars,
            prototypes="given" if self.given else entry["prototypes"],
            shared=True,
            scale=entry["scale"],
            bias=entry["bias"] and not self.given,
            initializer_range=self.initializer_range,
        )

    def make_bank(self) -> FeatureBank:
        entry, scalars = self.entry, None
        if entry["share_scalars"]:
            scalars = Scalars(
                *(entry[name] for name in SCALARS), learnable=entry["learn_scalars"], non_negative=entry["non_negative"]
            )
        return FeatureBank(self.features, self.widths[0], scalars)


def tversky_places(config: Any) -> dict[tuple[int | None, str], TverskyPlace]:
    """(layer, target) -> its place; the head's layer is None. Banks are named by feature key and input width, and by
    group, layer or target where these do not share."""
    d, d_ff = config.hidden_size, config.n_inner if config.n_inner is not None else 4 * config.hidden_size
    widths = {"c_fc": (d, d_ff), "mlp_out": (d_ff, d), "lm_head": (d, config.vocab_size)}
    found: dict[tuple[int | None, str], TverskyPlace] = {}
    for entry in getattr(config, "tversky", None) or []:
        own = entry["share"] == "none"
        for number, layers in enumerate(entry["groups"]):
            suffix = "" if len(entry["groups"]) == 1 and entry["share"] == "global" else f"_{number}"
            for place, layer in enumerate(layers):
                for target in entry["targets"]:
                    if target == "lm_head":
                        continue
                    width_in, width_out = widths.get(target, (d, d))
                    last = f"_{place}_{target}" if own else ""
                    key = f"{entry['feature_key']}_{width_in}{suffix}{last}"
                    found[layer, target] = TverskyPlace(key, width_in, width_out, entry, config)
        if "lm_head" in entry["targets"]:
            key = f"{entry['feature_key']}_{d}" + ("" if entry["share"] == "global" else "_lm_head")
            found[None, "lm_head"] = TverskyPlace(key, *widths["lm_head"], entry, config, given=True)
    return found


def feature_banks(places: dict[tuple[int | None, str], TverskyPlace]) -> nn.ModuleDict:
    """Every bank once, by its key."""
    banks = nn.ModuleDict()
    for place in places.values():
        if place.key not in banks:
            banks[place.key] = place.make_bank()
    return banks
