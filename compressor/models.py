"""Open a MODEL for computing, save one, and say in numbers which one it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase

from . import artifacts, gpt2
from .checkpoint import Checkpoint, build, find, locate, open_tokenizer, read_config, weight_files
from .errors import UserError
from .modeling import GPT2CompressedConfig, GPT2CompressedLMHeadModel, register

__all__ = [
    "DTYPES",
    "Checkpoint",
    "OpenModel",
    "build",
    "find",
    "locate",
    "open_model",
    "open_tokenizer",
    "parse_device",
    "parse_dtype",
    "probe",
    "read_config",
    "save",
    "weight_files",
]

register()

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True)
class OpenModel:
    """A language model ready to use, and where it came from."""

    name: str  # what the user named
    folder: Path
    hash: str  # sha256 over the weight files
    model: GPT2LMHeadModel
    tokenizer: PreTrainedTokenizerBase
    stored_dtype: torch.dtype  # of the checkpoint's files; what is derived from it is saved in the same

    @property
    def plain(self) -> bool:
        return type(self.model) is GPT2LMHeadModel


# ---------------------------------------------------------------- open


def parse_dtype(dtype: str | None) -> torch.dtype:
    """The dtype to compute in: float32 unless named, also for float16 and bfloat16 files."""
    if dtype is None:
        return torch.float32
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}; allowed: {', '.join(DTYPES)}")
    return DTYPES[dtype]


def parse_device(device: str | None) -> torch.device:
    """The device to compute on: a GPU when there is one, unless named."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        parsed = torch.device(device)
        torch.zeros(1, device=parsed).tolist()  # "meta" has no values to give
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device!r} cannot be used here ({str(error).splitlines()[0]})") from error
    return parsed


def open_model(name: str, *, device: str | None = None, dtype: str | None = None) -> OpenModel:
    """Open a MODEL for computing in float32 (unless `dtype`), in evaluation mode. Never runs code of the checkpoint."""
    compute, target = parse_dtype(dtype), parse_device(device)
    found = find(name)
    tokenizer = open_tokenizer(name, found.folder, found.config)
    model_class = GPT2CompressedLMHeadModel if isinstance(found.config, GPT2CompressedConfig) else GPT2LMHeadModel
    model = model_class.from_pretrained(
        found.folder, config=found.config, dtype=compute, use_safetensors=True, local_files_only=True
    )
    for key, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise UserError(f"{name}: {key} holds NaN or infinite numbers; this checkpoint is broken")
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if found.config.tie_word_embeddings and head.weight is not embeddings.weight:  # transformers warns and goes on
        raise UserError(
            f"{name}: the weight files hold a head of its own, but config.json ties it to the embeddings; "
            "set tie_word_embeddings to false there"
        )
    model.to(target)  # type: ignore[arg-type]
    digest = artifacts.hash_files(list(found.files))
    return OpenModel(name, found.folder, digest, model.eval(), tokenizer, found.dtype)


# ---------------------------------------------------------------- save


def save(model: GPT2LMHeadModel, folder: Path, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> None:
    """Write a save_pretrained folder: safetensors in `dtype`, config, generation config, tokenizer, modeling files.

    The model itself becomes `dtype`. Raises UserError for weights that are not finite in it.
    """
    model.to(dtype)  # type: ignore[arg-type]
    for key, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise UserError(
                f"{key} came out with NaN or infinite numbers in {str(dtype).removeprefix('torch.')}, the dtype of the "
                "checkpoint; nothing was saved"
            )
    model.save_pretrained(folder)
    tokenizer.model_max_length = model.config.n_positions  # transformers does not infer it
    tokenizer.save_pretrained(folder)


def probe(model: GPT2LMHeadModel) -> dict[str, Any]:
    """A short fixed input, beyond two blocks of attention in blocks and beyond the trained length of a model that
    takes any, and some of the logits it gives: lets a fresh process prove that it opened this model."""
    blocks = [entry["block"] for entry in getattr(model.config, "efficient_attention", None) or []]
    length = min(max([24, *(2 * block + 8 for block in blocks)]), model.config.n_positions)
    if gpt2.longest(model.config) is None:
        length = model.config.n_positions + 8
    vocabulary = model.config.vocab_size
    ids = [(7919 * i + 13) % vocabulary for i in range(length)]
    tokens = [(104729 * i) % vocabulary for i in range(16)]
    device = next(model.parameters()).device
    with torch.no_grad():
        logits = model(torch.tensor([ids], device=device)).logits[0].float()
    return {
        "ids": ids,
        "tokens": tokens,
        "logits": logits[-1, tokens].tolist(),
        "logsumexp": logits.logsumexp(-1).tolist(),
    }
