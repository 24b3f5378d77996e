"""A small GPT-2 whose every layer matters, and token blocks for it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

from compressor.alignment import Alignments, align_activations
from compressor.data import TokenBlocks


def toy_config(**changes) -> GPT2Config:
    fields = {
        "n_layer": 6,
        "n_embd": 32,
        "n_head": 4,
        "vocab_size": 97,
        "n_positions": 64,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }
    return GPT2Config(**{**fields, **changes})


def toy_gpt2(seed: int = 0, **changes) -> GPT2LMHeadModel:
    """Random weights large enough that dropping any FFN moves the logits."""
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(toy_config(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def toy_tokenizer() -> GPT2Tokenizer:
    """Of single characters; token 0 is the end of text."""
    end = "<|endoftext|>"
    vocabulary = {end: 0, **{chr(97 + i): 1 + i for i in range(26)}}
    return GPT2Tokenizer(vocab=vocabulary, merges=[], bos_token=end, eos_token=end, unk_token=end)


def toy_blocks(config: GPT2Config, rows: int = 24, seed: int = 1) -> TokenBlocks:
    """Random calibration tokens; the last row is half pads."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, config.vocab_size, (rows, config.n_positions), generator=generator)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[-1, config.n_positions // 2 :] = False
    return TokenBlocks(ids=ids.masked_fill(~mask, 0), mask=mask, source="toy", part="calibration", fingerprint="toy")


def toy_alignment(model: GPT2LMHeadModel) -> Alignments:
    return align_activations(model, toy_blocks(model.config).batches())


def logits(model: GPT2LMHeadModel, ids: torch.Tensor, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **more).logits
