"""Smaller models within a model: its sizes, and a size's tensors as a differentiable function of the whole model's.

Matrices are nested: a smaller size takes the first neurons (MatFormer, arXiv 2310.07707), the first dimensions of
every head, the first coordinates of the residual stream, the first layers. What is a vector and would differ belongs to
its size alone: LayerNorms of a width (slimmable networks, arXiv 1812.08928) and of an exit, and what an FFN without its
last neurons adds on average.

Coordinates: a narrower residual stream needs a basis whose first directions carry most. A rotation that keeps the
vector of ones passes through LayerNorm, so a rotated GPT-2 is a GPT-2, and so is each of its widths: width w keeps the
first w - 1 coordinates and embeds them into the w numbers of mean 0 by a reflection (`to_plain`). Token embeddings are
kept in coordinates, and so is a head of its own; the rest is as the reflection has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GPT2Config
from transformers import initialization as init

TRUNK = "transformer."
TOKENS = "wte.weight"
HEAD = "lm_head.weight"
HEAD_MAP = "head_map"
FULL = ("ffn", "width", "depth", "head")


class Size(NamedTuple):
    """How much of a nested model is taken."""

    ffn: tuple[int, ...]  # neurons of each layer that stays
    width: int  # of the residual stream
    depth: int  # layers
    head: int  # coordinates of the final state that the logits are made of


# ---------------------------------------------------------------- coordinates


def reflection(width: int) -> Tensor:
    """v, float64[width], of 1 - 2 v v^T, which swaps the last axis and the direction of the vector of ones."""
    v = torch.full((width,), -(width**-0.5), dtype=torch.float64)
    v[-1] += 1
    return v / v.norm()


def reflected(x: Tensor) -> Tensor:
    """float[..., width] -> the same, its own inverse."""
    v = reflection(x.shape[-1]).to(x)
    return x - (2 * (x @ v))[..., None] * v


def to_plain(coordinates: Tensor) -> Tensor:
    """float[..., width - 1] -> float[..., width] of mean 0."""
    return reflected(nn.functional.pad(coordinates, (0, 1)))


def narrowed(x: Tensor, width: int) -> Tensor:
    """What width `width` has of x float[..., d] of the whole model: float[..., width]."""
    return x if width == x.shape[-1] else to_plain(reflected(x)[..., : width - 1])


class RotatedEmbedding(nn.Embedding):
    """Token embeddings that are kept in coordinates."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return reflected(super().forward(input_ids))


# ---------------------------------------------------------------- what belongs to one size


class Nesting(nn.Module):
    """ffn_bias.{layer}.{neurons}: what is added to c_proj's bias, [d]; norms.{width}.{layer}.{ln_1,ln_2}, [width];
    exits.{depth}_{width}: ln_f of that size. The whole model uses none of them."""

    def __init__(self, config: Any):
        super().__init__()
        entry, layers, eps = config.matryoshka, config.n_layer, config.layer_norm_epsilon
        self.ffn_bias = nn.ModuleList(
            nn.ParameterDict({str(ff): nn.Parameter(torch.empty(config.n_embd)) for ff in entry["ffn"][1:]})
            for _ in range(layers)
        )
        self.norms = nn.ModuleDict(
            {
                str(width): nn.ModuleList(
                    nn.ModuleDict({name: nn.LayerNorm(width, eps=eps) for name in ("ln_1", "ln_2")})
                    for _ in range(layers)
                )
                for width in entry["width"][1:]
            }
        )
        self.exits = nn.ModuleDict(
            {
                f"{depth}_{width}": nn.LayerNorm(width, eps=eps)
                for depth in entry["depth"]
                for width in entry["width"]
                if (depth, width) != (entry["depth"][0], entry["width"][0])
            }
        )

    def reset_parameters(self) -> None:
        for own in self.ffn_bias:
            for bias in own.parameters():
                init.zeros_(bias)


# ---------------------------------------------------------------- sizes


def full_size(config: Any) -> Size:
    """The whole model as a size."""
    entry = config.matryoshka
    ffn = entry["ffn_of_layers"] or [entry["ffn"][0]] * config.n_layer
    return Size(tuple(ffn), entry["width"][0], entry["depth"][0], entry["head"][0])


def size_of(
    config: Any,
    ffn: float | list | tuple | None = None,
    width: float | None = None,
    depth: float | None = None,
    head: float | None = None,
) -> Size:
    """The size of these choices, whole numbers, or shares of the whole as a float; None: the whole, but FFNs in
    proportion to the width. ffn may be one for each layer that stays. Raises ValueError for what the model has not."""
    entry = config.matryoshka
    if entry["ffn_of_layers"]:
        raise ValueError("the layers of this model differ in neurons: it is a slice already")
    chosen = {name: _one_of(name, value, entry) for name, value in (("width", width), ("depth", depth), ("head", head))}
    narrow = chosen["width"] < entry["width"][0]
    if narrow and chosen["head"] < entry["head"][0]:
        raise ValueError(f"head={head} with width={width}: a narrower model's logits are made of its whole width")
    if ffn is None and narrow:
        ffn = proportional(entry["ffn"][0], chosen["width"], entry["width"][0])
    each = list(ffn) if isinstance(ffn, list | tuple) else [ffn] * chosen["depth"]
    if len(each) != chosen["depth"]:
        raise ValueError(f"ffn has {len(each)} numbers; allowed: one, or one for each of {chosen['depth']} layers")
    kept = entry["head"][0] if not narrow else chosen["width"]
    return Size(
        tuple(_one_of("ffn", value, entry) for value in each),
        chosen["width"],
        chosen["depth"],
        kept if head is None or narrow else chosen["head"],
    )


def proportional(d_ff: int, width: int, full: int) -> int:
    """Neurons of a narrower model, whose FFN is as many times wider than its residual stream."""
    return max(1, d_ff * width // full)


def _one_of(name: str, value: float | None, entry: Mapping[str, Any]) -> int:
    allowed = entry[name]
    if value is None:
        return allowed[0]
    number = value * allowed[0] if isinstance(value, float) and 0 < value <= 1 else value
    if number not in allowed:
        raise ValueError(f"{name} is {value}; allowed: {', '.join(map(str, allowed))}, or as a share of {allowed[0]}")
    return int(number)


# ---------------------------------------------------------------- slices


def sliced_config(config: Any, size: Size) -> GPT2Config:
    """Of the model of a size: plain GPT-2 but where layers differ in neurons, or the whole width is rotated."""
    entry = config.matryoshka
    uniform, rotated = len(set(size.ffn)) == 1, bool(entry["rotated"]) and size.width == config.n_embd
    fields = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "architectures")}
    widest = max(size.ffn)
    given = config.n_inner is not None or widest != 4 * size.width
    fields |= {"n_embd": size.width, "n_layer": size.depth, "n_inner": widest if given else None}
    if uniform and not rotated:
        for key in ("matryoshka", "auto_map", *_COMPRESSED):
            fields.pop(key, None)
        return GPT2Config(**fields)
    own = {"ffn": [widest], "width": [size.width], "depth": [size.depth], "head": [size.head], "rotated": rotated}
    fields["matryoshka"] = {**own, "ffn_of_layers": None if uniform else list(size.ffn)}
    return type(config)(**fields)


_COMPRESSED = (
    "ffn_groups", "tversky", "efficient_attention", "alibi", "token_factored", "shaped_attention", "combined",
    "fractal",
)  # fmt: skip


def sliced(tensors: Mapping[str, Tensor], config: Any, size: Size) -> dict[str, Tensor]:
    """The tensors of the model of a size by their state-dict keys, a tied head once. tensors: of the whole model. Views
    where the width is the whole one; gradients reach `tensors`."""
    d, heads, full = config.n_embd, config.n_head, full_size(config)
    width, narrow, rotated = size.width, size.width < config.n_embd, bool(config.matryoshka["rotated"])
    nest = f"{TRUNK}nesting."
    found: dict[str, Tensor] = {}

    def put(key: str, *names: str, source: str | None = None) -> None:
        for name in names or ("weight", "bias"):
            found[f"{key}.{name}"] = tensors[f"{source or key}.{name}"]

    wte, wpe = (f"{TRUNK}{name}.weight" for name in ("wte", "wpe"))
    for table in (wte,) if config.tie_word_embeddings else (wte, HEAD):
        found[table] = to_plain(tensors[table][:, : width - 1]) if narrow else tensors[table]
    found[wpe] = narrowed(tensors[wpe], width)
    for layer, ff in enumerate(size.ffn):
        block = f"{TRUNK}h.{layer}."
        for norm in ("ln_1", "ln_2"):
            put(f"{block}{norm}", source=f"{nest}norms.{width}.{layer}.{norm}" if narrow else None)
        c_attn, o, c_fc, c_proj = (
            f"{block}{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        )
        weight, bias = _head_prefixes(tensors[f"{c_attn}.weight"], tensors[f"{c_attn}.bias"], config, width)
        found[f"{c_attn}.weight"], found[f"{c_attn}.bias"] = narrowed(weight.T, width).T, bias
        rows = tensors[f"{o}.weight"]
        if narrow:
            rows = rows.unflatten(0, (heads, d // heads))[:, : width // heads].flatten(0, 1)
        found[f"{o}.weight"], found[f"{o}.bias"] = narrowed(rows, width), narrowed(tensors[f"{o}.bias"], width)
        found[f"{c_fc}.weight"] = narrowed(tensors[f"{c_fc}.weight"][:, :ff].T, width).T
        found[f"{c_fc}.bias"] = tensors[f"{c_fc}.bias"][:ff]
        added = tensors[f"{c_proj}.bias"]
        if ff < full.ffn[layer]:
            added = added + tensors[f"{nest}ffn_bias.{layer}.{ff}"]
        found[f"{c_proj}.weight"] = narrowed(tensors[f"{c_proj}.weight"][:ff], width)
        found[f"{c_proj}.bias"] = narrowed(added, width)
    whole = (size.depth, width) == (full.depth, full.width)
    put(f"{TRUNK}ln_f", source=None if whole else f"{nest}exits.{size.depth}_{width}")
    if rotated and not narrow:
        for name in ("weight", "bias"):
            found[f"{HEAD_MAP}.{name}"] = tensors[f"{HEAD_MAP}.{name}"][: size.head]
    return found


def _head_prefixes(weight: Tensor, bias: Tensor, config: Any, width: int) -> tuple[Tensor, Tensor]:
    """c_attn with the first dimensions of every head; queries keep the scale of the whole model's scores."""
    d, heads = config.n_embd, config.n_head
    if width == d:
        return weight, bias
    short = width // heads
    scale = weight.new_ones(3, 1, 1)
    if config.scale_attn_weights:
        scale[0] = (width / d) ** 0.5
    parts = [x.unflatten(-1, (3, heads, d // heads))[..., :short] * scale for x in (weight, bias)]
    return parts[0].flatten(-3), parts[1].flatten(-3)
