"""Small GPTs with random weights, one for each kind of attention, that start alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from ...errors import UserError, unknown
from ...modeling import GPT2CompressedLMHeadModel
from ...rewrites import Rewrite
from ...rewrites.linformer import Linformer
from ...rewrites.nystromformer import Nystromformer
from ...rewrites.performer import Performer

TYPES = ("vanilla", "linformer", "nystrom", "performer")


@dataclass(frozen=True)
class AttentionConfig:
    """The source's knobs and what these kinds of attention need besides. linformer_k: summaries of a full context, as
    many for each block. nystrom_landmarks: of a prefix. performer_features: of each head."""

    linformer_k: int | None = None  # null: a quarter of each block (the source's: 128 of 512)
    nystrom_landmarks: int = 32
    performer_features: int | None = None  # null: twice a head's width (the source's: 64)
    inverse: Literal["newton", "none"] = "none"  # of nystrom
    feature_map: Literal["favor+", "favor_hyp", "relu", "elu", "learned"] = "favor+"  # of performer


def rewrites_of(
    attention_types: Sequence[str], given: AttentionConfig, block: int, base: GPT2Config, seed: int
) -> tuple[AttentionConfig, dict[str, Rewrite | None]]:
    """The knobs with nothing left open; type -> the rewrite whose structure it has, None for GPT-2's own. Raises
    UserError for what is not allowed."""
    if isinstance(attention_types, str) or not attention_types or len(set(attention_types)) < len(attention_types):
        raise UserError(f"attention_types is {attention_types!r}; allowed: different ones of {', '.join(TYPES)}")
    for name in attention_types:
        if name not in TYPES:
            raise unknown("attention_type", str(name), TYPES)
    blocks = -(-base.n_positions // block)
    k = max(1, block // 4) * blocks if given.linformer_k is None else given.linformer_k
    if k % blocks or not blocks <= k <= blocks * block:
        raise UserError(
            f"linformer_k is {k}; allowed: multiples of {blocks} (blocks of {block} in block_size) up to "
            f"{blocks * block}"
        )
    performer = Performer(
        block=block, features=given.performer_features, feature_map=given.feature_map, seed=seed
    ).resolved(base)
    assert isinstance(performer, Performer)
    every: dict[str, Rewrite | None] = {
        "vanilla": None,
        "linformer": Linformer(block=block, slots=k // blocks),
        "nystrom": Nystromformer(block=block, landmarks=given.nystrom_landmarks, inverse=given.inverse),
        "performer": performer,
    }
    for rewrite in every.values():
        if rewrite is not None:
            rewrite.check(base)
    own = dataclasses.replace(given, linformer_k=k, performer_features=performer.features)
    return own, {name: every[name] for name in attention_types}


def initial(config: GPT2Config, seed: int) -> GPT2LMHeadModel:
    """GPT-2 of this config with random weights of a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config)


def variant(start: GPT2LMHeadModel, config: GPT2Config, rewrite: Rewrite | None) -> GPT2LMHeadModel:
    """A model of its own with the weights of `start`; what its attention has besides begins as segment means, or as
    the random directions of its own seed."""
    if rewrite is None:
        made = GPT2LMHeadModel(config)
    else:
        made = GPT2CompressedLMHeadModel(rewrite.resolved(config).config(config))  # type: ignore[arg-type]
    made.load_state_dict(start.state_dict(), strict=False)
    return made
