"""GPT-2's attribute names, spelled here and in modeling/ only.

Linears of the blocks are `Conv1D`: weight (in, out), y = x W + b.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GPT2Config, PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.masking_utils import create_causal_mask
from transformers.pytorch_utils import Conv1D

from .modeling.streams import residual

FFN_LINEARS = ("c_fc", "c_proj")


def d_ff(config: GPT2Config) -> int:
    """Width of an FFN's hidden layer, in neurons."""
    return config.n_inner if config.n_inner is not None else 4 * config.n_embd


def longest(config: Any) -> int | None:
    """The most tokens that a model takes at once; None where any number: n_positions is what it was trained at then."""
    alibi = getattr(config, "alibi", None)
    return None if alibi and not alibi["learned_positions"] else config.n_positions


def trunk(model: PreTrainedModel) -> Any:
    """The model without its head: embeddings, blocks, final LayerNorm."""
    return model.transformer


def blocks(model: PreTrainedModel) -> Any:
    """The blocks, an nn.ModuleList."""
    return trunk(model).h


def linears(model: PreTrainedModel) -> list[Conv1D]:
    """The linears within the blocks, attention's and the FFN's, in order; shared ones stand in the bank instead."""
    return [module for module in blocks(model).modules() if isinstance(module, Conv1D)]


def ffn(model: PreTrainedModel, layer: int) -> Any:
    """The FFN of a plain GPT-2's block: `.c_fc` [d, d_ff], `.act`, `.c_proj` [d_ff, d]."""
    return blocks(model)[layer].mlp


def attention(model: PreTrainedModel, layer: int) -> Any:
    """The attention of a plain GPT-2's block: `.c_attn` [d, 3 d], `.c_proj` [d, d]."""
    return blocks(model)[layer].attn


def linear(model: PreTrainedModel, layer: int, leaf: str) -> tuple[Tensor, Tensor]:
    """Weight [in, out] and bias [out] of a linear of a plain GPT-2's block: "attn.q", "attn.k", "attn.v", "attn.o",
    "mlp.c_fc" or "mlp.c_proj"."""
    own = attention(model, layer)
    if leaf in ("attn.q", "attn.k", "attn.v"):
        d, part = model.config.n_embd, "qkv".index(leaf[-1])
        columns = slice(part * d, (part + 1) * d)
        return own.c_attn.weight.detach()[:, columns], own.c_attn.bias.detach()[columns]
    found = own.c_proj if leaf == "attn.o" else ffn(model, layer).get_submodule(leaf.removeprefix("mlp."))
    return found.weight.detach(), found.bias.detach()


def queries_keys_values(model: PreTrainedModel, layer: int, x: Tensor) -> list[Tensor]:
    """Of a plain GPT-2's attention for x float[batch, tokens, d]: float[batch, heads, tokens, head_dim] each."""
    own = attention(model, layer)
    parts = own.c_attn(x).split(own.split_size, dim=-1)
    return [part.unflatten(-1, (own.num_heads, own.head_dim)).transpose(1, 2) for part in parts]


def values_of(model: PreTrainedModel, layer: int, x: Tensor) -> Tensor:
    """What a plain GPT-2's attention mixes over tokens, for x float[..., d] that enters the block: the same shape, head
    by head side by side."""
    weight, bias = linear(model, layer, "attn.v")
    return blocks(model)[layer].ln_1(x) @ weight + bias


def value_norm(model: PreTrainedModel, layer: int) -> Any:
    """The LayerNorm in front of values that read another stream than queries and keys; nn.Identity where none is."""
    return blocks(model)[layer].ln_v


def output_map(model: PreTrainedModel, layer: int) -> Any:
    """What takes the heads' mixed values to attention's output: a linear, or what stands in its place."""
    own = attention(model, layer)
    return own.c_proj if getattr(own, "out_map", None) is None else own.out_map


def linear_key(layer: int, leaf: str, name: str) -> str:
    """The state-dict key of a tensor ("weight" or "bias") of a linear, queries, keys and values as parts of c_attn."""
    path = {"attn.o": "attn.c_proj"}.get(leaf, leaf.replace("attn.", "attn.c_attn."))
    return block_key(layer, f"{path}.{name}")


def joined_qkv(tensors: dict[str, Tensor], wanted: Collection[str]) -> dict[str, Tensor]:
    """With every c_attn of the keys `wanted` that is there in parts put together."""
    result = dict(tensors)
    for name in wanted:
        head, dot, tail = name.rpartition(".c_attn.")
        parts = [f"{head}.c_attn.{part}.{tail}" for part in "qkv"]
        if dot and name not in result and all(part in result for part in parts):
            result[name] = torch.cat([result[part] for part in parts], -1)
    return result


def head(model: PreTrainedModel) -> Any:
    """The module that gives the logits; its `.weight` is [vocabulary, d]."""
    return model.get_output_embeddings()


def logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """float[..., vocabulary] of the trunk's final hidden states float[..., d]."""
    return cast(Any, model).logits(hidden) if hasattr(model, "logits") else head(model)(hidden)


def head_product(model: PreTrainedModel, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """left [..., k] and right [vocabulary, k] with logits = left right^T: the states and the head's weight, but where
    the head is no linear."""
    return cast(Any, model).head_product(hidden) if hasattr(model, "head_product") else (hidden, head(model).weight)


def head_map(model: PreTrainedModel) -> Any:
    """The map of a compressed model's final states in front of its head; None where there is none."""
    return getattr(model, "head_map", None)


HEAD_KEY = "lm_head.weight"  # in a state dict; float[vocabulary, d], as the embeddings are


def embeddings(model: PreTrainedModel) -> Tensor:
    """Of the tokens, [vocabulary, d]."""
    return trunk(model).wte.weight.detach()


def positions(model: PreTrainedModel) -> Tensor:
    """The learned embeddings of positions of a plain GPT-2, [n_positions, d]."""
    return trunk(model).wpe.weight.detach()


def position_parameters(model: PreTrainedModel) -> int:
    """How many numbers tell positions apart before the first block."""
    return sum(parameter.numel() for parameter in trunk(model).wpe.parameters())


def position_layer(model: PreTrainedModel) -> Any:
    """The module that adds what tells positions apart."""
    return trunk(model).wpe


def put_embeddings(model: PreTrainedModel, tensor: Tensor) -> None:
    """Give the tokens these embeddings, [vocabulary, d], in a new parameter: the old one may be another model's too."""
    put(trunk(model).wte, "weight", tensor)
    model.tie_weights()


def feature_bank(model: PreTrainedModel) -> Any:
    """The feature banks of a compressed model's Tversky projections, by their keys."""
    return trunk(model).feature_bank


def ffn_weights(model: PreTrainedModel, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """c_fc weight [d, d_ff], c_fc bias [d_ff], c_proj weight [d_ff, d], c_proj bias [d] of a plain GPT-2's FFN."""
    block_ffn = ffn(model, layer)
    return (
        block_ffn.c_fc.weight.detach(),
        block_ffn.c_fc.bias.detach(),
        block_ffn.c_proj.weight.detach(),
        block_ffn.c_proj.bias.detach(),
    )


def embed(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Token plus position embeddings from int64[batch, context]: float[batch, context, d], or of two streams [2, batch,
    context, d]."""
    base = trunk(model)
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    return base.drop(base.wte(input_ids) + base.wpe(positions))


def run_blocks(
    model: PreTrainedModel, hidden: Tensor, start: int, stop: int, attention_mask: Tensor | None = None
) -> Tensor:
    """Blocks start..stop-1 on hidden states [batch, context, d], or of two streams [2, batch, context, d];
    attention_mask bool or int [batch, context]."""
    positions = torch.arange(hidden.shape[-2], device=hidden.device).unsqueeze(0)
    mask = create_causal_mask(
        config=model.config,
        inputs_embeds=residual(hidden),
        attention_mask=attention_mask,
        past_key_values=None,
        position_ids=positions,
    )
    extra = trunk(model).block_arguments(attention_mask) if hasattr(trunk(model), "block_arguments") else {}
    with fused_activations(model):
        for block in blocks(model)[start:stop]:
            hidden = block(hidden, None, mask, None, use_cache=False, position_ids=positions, **extra)
    return hidden


@contextmanager
def fused_activations(model: PreTrainedModel) -> Iterator[None]:
    """GPT-2's GELU as one kernel: the same function up to rounding, in one pass over memory instead of eight. Latency
    is measured without it: a user's model runs as transformers builds it."""
    slow = [
        (own, own.act)
        for own in (ffn(model, layer) for layer in range(len(blocks(model))))
        if isinstance(getattr(own, "act", None), NewGELUActivation)
    ]
    try:
        for own, act in slow:
            own.act = nn.GELU(approximate="tanh").train(act.training)
        yield
    finally:
        for own, act in slow:
            own.act = act


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout); every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def final_norm(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """ln_f, applied before the head."""
    return trunk(model).ln_f(hidden)


def device(model: PreTrainedModel) -> torch.device:
    """Where the model's embeddings, and so its inputs, are."""
    return trunk(model).wte.weight.device


def norms(model: PreTrainedModel) -> list[nn.LayerNorm]:
    """Every LayerNorm in the order of the forward pass: attention's and the FFN's of each block, then the final one."""
    return [norm for block in blocks(model) for norm in (block.ln_1, block.ln_2)] + [trunk(model).ln_f]


def norm_key(index: int, layers: int) -> str:
    """What the state-dict keys of a LayerNorm begin with; index: in `norms`."""
    return f"transformer.h.{index // 2}.ln_{index % 2 + 1}" if index < 2 * layers else "transformer.ln_f"


# of an FFN, what has an entry for each neuron
FFN_OF_NEURONS = ("c_fc.weight", "c_fc.bias", "c_proj.weight")
EMBEDDING_KEYS = ("transformer.wte.weight", "transformer.wpe.weight")


def nesting(model: PreTrainedModel) -> Any:
    """What belongs to the smaller sizes of a nested model alone."""
    return trunk(model).nesting


def bank(model: PreTrainedModel) -> Any:
    """The shared FFNs of a compressed model."""
    return trunk(model).ffn_bank


def ffn_key(layer: int, name: str) -> str:
    """The state-dict key of a tensor of a layer's FFN, such as "c_fc.weight"."""
    return f"transformer.h.{layer}.mlp.{name}"


def ffn_norm(model: PreTrainedModel, layer: int) -> tuple[Tensor, Tensor]:
    """Gain [d] and bias [d] of the LayerNorm in front of an FFN."""
    norm = blocks(model)[layer].ln_2
    return norm.weight.detach(), norm.bias.detach()


def attention_norm(model: PreTrainedModel, layer: int) -> tuple[Tensor, Tensor]:
    """Gain [d] and bias [d] of the LayerNorm in front of attention."""
    norm = blocks(model)[layer].ln_1
    return norm.weight.detach(), norm.bias.detach()


def reset_ffn_norm(model: PreTrainedModel, layer: int) -> None:
    """Make the LayerNorm in front of an FFN a pure normalisation (its gain and bias were folded elsewhere)."""
    norm = blocks(model)[layer].ln_2
    put(norm, "weight", torch.ones_like(norm.weight))
    put(norm, "bias", torch.zeros_like(norm.bias))


def put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Give a module's parameter this value in the dtype it is to have (works for parameters on the meta device)."""
    old = getattr(module, name)
    if old.shape != tensor.shape:
        raise ValueError(f"{name} has shape {list(old.shape)}, got {list(tensor.shape)}")
    module.register_parameter(
        name, nn.Parameter(tensor.detach().to(old.dtype).contiguous(), requires_grad=old.requires_grad)
    )


_LAYER = re.compile(r"^transformer\.h\.(\d+)\.")


def moved(name: str, layers: dict[int, int]) -> str | None:
    """The state-dict key of the same tensor when layers are renumbered; None when its layer is gone."""
    match = _LAYER.match(name)
    if match is None:
        return name
    layer = layers.get(int(match[1]))
    return None if layer is None else f"transformer.h.{layer}.{name[match.end() :]}"


def for_layer(name: str, tensor: Tensor, target: str, config: GPT2Config) -> Tensor:
    """`tensor` of the state-dict key `name`, so that it acts the same as `target` in another layer.

    Matters only with scale_attn_by_inverse_layer_idx, where layer l divides its attention scores by l + 1: the queries
    (what c_attn and c_qk begin with) take up the difference.
    """
    begins = any(part in name for part in (".attn.c_attn.", ".attn.c_qk."))
    if not config.scale_attn_by_inverse_layer_idx or not begins:
        return tensor
    source, destination = (int(_LAYER.match(key)[1]) for key in (name, target))  # type: ignore[index]
    if source == destination:
        return tensor
    scaled = tensor.clone()
    scaled[..., : config.n_embd] *= (destination + 1) / (source + 1)
    return scaled


def block_tensors(model: PreTrainedModel, layer: int) -> dict[str, Tensor]:
    """Every tensor of a block by its name within the block, such as "attn.c_attn.weight"."""
    return dict(blocks(model)[layer].state_dict())


def block_key(layer: int, name: str) -> str:
    """The state-dict key of a tensor of a block."""
    return f"transformer.h.{layer}.{name}"
