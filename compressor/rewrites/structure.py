"""Structures that plain GPT-2 cannot express: put into a config, taken out of a model again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from .. import gpt2, models
from ..modeling import AUTO_MAP, GPT2CompressedConfig

# What in the config makes a GPT-2 a compressed one: lists of entries, and one mapping each.
LISTS = ("ffn_groups", "tversky", "efficient_attention")
STRUCTURES = (*LISTS, "alibi", "token_factored", "shaped_attention", "matryoshka", "combined", "fractal")


def add_structure(base: GPT2Config, field: str, entries: list[dict[str, Any]] | dict[str, Any]) -> GPT2CompressedConfig:
    """`base` with these entries more in one of LISTS, or with this mapping as another of STRUCTURES."""
    fields = {key: value for key, value in base.to_dict().items() if key not in ("model_type", "architectures")}
    fields[field] = entries if isinstance(entries, dict) else (fields.get(field) or []) + entries
    return GPT2CompressedConfig(**{**fields, "auto_map": dict(AUTO_MAP)})


def without_structure(
    model: GPT2LMHeadModel,
    field: str,
    goes: Callable[[dict[str, Any]], bool],
    tensors: Mapping[str, Tensor],
    changes: Mapping[str, Any] | None = None,
) -> GPT2LMHeadModel:
    """The model without the entries of `field` that go: plain GPT-2 where no other is left. tensors: what takes the
    place of theirs, by state-dict key, a query's, key's or value's linear as part of c_attn. changes: what else of
    the config is another then. A head that is no longer the embeddings is untied from them."""
    fields = {**model.config.to_dict(), **(changes or {})}
    if field in LISTS:
        fields[field] = [entry for entry in fields.get(field) or [] if not goes(entry)] or None
    elif goes(fields[field]):
        fields[field] = None
    for key in ("model_type", "architectures"):
        fields.pop(key, None)
    if fields["tie_word_embeddings"] and gpt2.HEAD_KEY in tensors:
        head, embeddings = tensors[gpt2.HEAD_KEY], gpt2.embeddings(model)
        rounding = 8 * torch.finfo(head.dtype).eps * embeddings.abs().max()  # of features that span everything
        fields["tie_word_embeddings"] = bool((head - embeddings).abs().max() <= rounding)
    kind: type[GPT2Config] = GPT2CompressedConfig
    if not any(fields.get(name) for name in STRUCTURES):
        kind = GPT2Config
        for key in ("auto_map", *STRUCTURES):
            fields.pop(key, None)
    result = models.build(kind(**fields))
    wanted = result.state_dict().keys()
    known = gpt2.joined_qkv({**model.state_dict(), **tensors}, wanted)
    result.load_state_dict({name: known[name] for name in wanted}, assign=True)
    result.tie_weights()
    result.generation_config = model.generation_config
    return result.eval()
