"""Models side by side within a model: its parts, and a part's tensors as a differentiable function of the whole's.

Source: evintunador/FractalFormer, where each level has `split` times as many models as the one before, each with a
slice of every matrix. Here the residual stream and the embeddings are common to all; heads and neurons are divided, so
that what the parts of one level add to the residual stream sums up to what the whole model adds. Part j of level l has
the j-th of split^l equal runs of heads and neurons, and so the parts `split` j to `split` j + `split` - 1 of the next
level. Vectors of its own make up for what it lacks: biases of what attention and FFN add, and the last LayerNorm.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from transformers.pytorch_utils import Conv1D

TRUNK = "transformer."
OWN = "parts"


class Part(NamedTuple):
    """One of the models of a level; level 0 is the whole."""

    level: int
    place: int  # from 0, among split^level

    @property
    def name(self) -> str:
        return f"{self.level}_{self.place}"


def parts_of_levels(config: Any) -> list[Part]:
    """The smaller models of a config, the largest first."""
    entry = config.fractal
    return [Part(level, place) for level in range(1, entry["levels"] + 1) for place in range(entry["split"] ** level)]


def part_of(config: Any, level: int, place: int) -> Part:
    """Raises ValueError for what the model has not."""
    entry = getattr(config, "fractal", None) or {"levels": 0}
    if not entry["levels"]:
        raise ValueError("this model has no parts side by side")
    if level not in range(1, entry["levels"] + 1):
        raise ValueError(f"level is {level}; allowed: 1 to {entry['levels']}")
    if place not in range(entry["split"] ** level):
        raise ValueError(f"place is {place}; allowed on level {level}: 0 to {entry['split'] ** level - 1}")
    return Part(level, place)


def few_heads(config: Any) -> bool:
    """Whether a config is of a part, whose heads together are narrower than its residual stream."""
    return bool(config.fractal) and config.fractal["heads"] < config.n_head


class FewerHeads(GPT2Attention):
    """GPT-2's with the config's `fractal` heads in the place of n_head, as wide as those."""

    def __init__(self, config: Any, layer_idx: int):
        super().__init__(config, layer_idx=layer_idx)
        self.num_heads = config.fractal["heads"]
        self.split_size = self.num_heads * self.head_dim
        self.c_attn = Conv1D(3 * self.split_size, config.hidden_size)
        self.c_proj = Conv1D(config.hidden_size, self.split_size)


class PartLayer(nn.Module):
    """What a part adds in a layer to what attention and FFN give, [d] each."""

    def __init__(self, d: int):
        super().__init__()
        self.attention = nn.Parameter(torch.empty(d))
        self.ffn = nn.Parameter(torch.empty(d))

    def reset_parameters(self) -> None:
        init.zeros_(self.attention)
        init.zeros_(self.ffn)


class PartVectors(nn.Module):
    """All that belongs to one part alone."""

    def __init__(self, config: Any):
        super().__init__()
        d = config.hidden_size
        self.layers = nn.ModuleList([PartLayer(d) for _ in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(d, eps=config.layer_norm_epsilon)

    def begin(self, final: nn.LayerNorm) -> None:
        """Nothing added, and the whole model's last LayerNorm, in memory of its own."""
        self.ln_f.load_state_dict({name: tensor.clone() for name, tensor in final.state_dict().items()}, assign=True)
        for layer in self.layers:
            zeros = {name: torch.zeros_like(final.bias) for name, _ in layer.named_parameters()}
            layer.load_state_dict(zeros, assign=True)


def own_vectors(config: Any) -> nn.ModuleDict:
    """Of all parts by their names. The whole model uses none of them."""
    return nn.ModuleDict({part.name: PartVectors(config) for part in parts_of_levels(config)})


# ---------------------------------------------------------------- a part as a model


def part_config(config: Any, part: Part) -> Any:
    """Of the model of a part: that of the whole with fewer heads and neurons."""
    share = config.fractal["split"] ** part.level
    fields = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "architectures")}
    neurons = config.n_inner if config.n_inner is not None else 4 * config.n_embd
    fields["n_inner"] = neurons // share
    fields["fractal"] = {"split": config.fractal["split"], "levels": 0, "heads": config.n_head // share}
    return type(config)(**fields)


def parted(tensors: Mapping[str, Tensor], config: Any, part: Part) -> dict[str, Tensor]:
    """The tensors of the model of a part by their state-dict keys, without a head that is the embeddings. tensors: of
    the whole model. All but c_attn and what its own biases are added to are views; gradients reach `tensors`."""
    share = config.fractal["split"] ** part.level
    heads, width = config.n_head, config.n_embd // config.n_head
    kept = slice(part.place * heads // share, (part.place + 1) * heads // share)
    rows = slice(kept.start * width, kept.stop * width)
    own = f"{TRUNK}{OWN}.{part.name}."
    found = {f"{TRUNK}{name}.weight": tensors[f"{TRUNK}{name}.weight"] for name in ("wte", "wpe")}
    for layer in range(config.n_layer):
        block, added = f"{TRUNK}h.{layer}.", f"{own}layers.{layer}."
        c_attn, o, c_fc, c_proj = (
            f"{block}{name}." for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        )
        for name in ("weight", "bias"):
            found |= {key: tensors[key] for key in (f"{block}ln_1.{name}", f"{block}ln_2.{name}")}
            by_head = tensors[f"{c_attn}{name}"].unflatten(-1, (3, heads, width))
            found[f"{c_attn}{name}"] = by_head[..., kept, :].flatten(-3)
        neurons = len(tensors[f"{c_fc}bias"])
        columns = slice(part.place * neurons // share, (part.place + 1) * neurons // share)
        found[f"{o}weight"] = tensors[f"{o}weight"][rows]
        found[f"{o}bias"] = tensors[f"{o}bias"] + tensors[f"{added}attention"]
        found[f"{c_fc}weight"], found[f"{c_fc}bias"] = (
            tensors[f"{c_fc}{name}"][..., columns] for name in ("weight", "bias")
        )
        found[f"{c_proj}weight"] = tensors[f"{c_proj}weight"][columns]
        found[f"{c_proj}bias"] = tensors[f"{c_proj}bias"] + tensors[f"{added}ffn"]
    for name in ("weight", "bias"):
        found[f"{TRUNK}ln_f.{name}"] = tensors[f"{own}ln_f.{name}"]
    if not config.tie_word_embeddings:
        found["lm_head.weight"] = tensors["lm_head.weight"]
    return found


def vectors_of(model: Any, part: Part) -> PartVectors:
    """What belongs to a part of a model alone."""
    return model.transformer.parts[part.name]


def with_wider_heads(tensors: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """The linears of a part's attentions by their keys, for heads that are together as wide as the residual stream:
    each filled up with numbers that are 0, and queries longer, as scores are divided by the root of a head's width."""
    heads, width = config.fractal["heads"], config.n_embd // config.n_head
    more = (0, config.n_embd // heads - width)
    scale = torch.ones(3, 1, 1)
    if config.scale_attn_weights:
        scale[0] = (1 + more[1] / width) ** 0.5
    found = {}
    for layer in range(config.n_layer):
        block = f"{TRUNK}h.{layer}.attn."
        for key in (f"{block}c_attn.weight", f"{block}c_attn.bias"):
            by_head = tensors[key].unflatten(-1, (3, heads, width)) * scale.to(tensors[key])
            found[key] = nn.functional.pad(by_head, more).flatten(-3)
        rows = tensors[f"{block}c_proj.weight"].unflatten(0, (heads, width))
        found[f"{block}c_proj.weight"] = nn.functional.pad(rows, (0, 0, *more)).flatten(0, 1)
    return found
