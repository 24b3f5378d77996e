"""The models that are nested in one: which there are, what each is called, and one of them cut out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from . import models
from .errors import UserError
from .modeling.nesting import FULL, Size, full_size, proportional, size_of, sliced
from .rewrites.matryoshka import Matryoshka, alone, chosen_by, trained_sizes

ALL = "all"
WHOLE = "whole"


def is_nested(config: GPT2Config) -> bool:
    """Whether smaller models can be cut out; a slice of a nested model has none left."""
    entry = getattr(config, "matryoshka", None)
    return entry is not None and any(len(entry[part]) > 1 for part in FULL)


def name(config: Any, size: Size) -> str:
    """What a size of a nested model is called, the same in every run: the parts that are smaller than the whole, each
    with what is left of it, such as "ffn-1536_depth-8"; where layers differ, "ffn-3072x8-1536x4"."""
    whole = full_size(config)
    usual = whole.ffn[0] if size.width == whole.width else proportional(whole.ffn[0], size.width, whole.width)
    found = []
    if set(size.ffn) != {usual}:
        runs = [(ff, len(list(run))) for ff, run in groupby(size.ffn)]
        found.append("-".join(["ffn", *(f"{ff}x{count}" if len(runs) > 1 else f"{ff}" for ff, count in runs)]))
    found += [
        f"{part}-{getattr(size, part)}" for part in ("width", "depth") if getattr(size, part) < getattr(whole, part)
    ]
    if size.head < min(size.width, whole.head):
        found.append(f"head-{size.head}")
    return "_".join(found) or WHOLE


def check_chosen(chosen: Any) -> None:
    """Raise UserError for what is neither null, nor `all`, nor a list of mappings of parts to sizes."""
    if chosen in (None, ALL):
        return
    allowed = f"null, {ALL}, or a list of mappings of {', '.join(FULL)} such as [{{ffn: 0.5}}]"
    entries = chosen if isinstance(chosen, list) and chosen else [None]
    for entry in entries:
        if not isinstance(entry, dict) or not entry or set(entry) - set(FULL):
            raise UserError(f"slices: {chosen if entry is None else entry!r} is not allowed; allowed: {allowed}")
        for part, value in entry.items():
            numbers = value if isinstance(value, list) and value and part == "ffn" else [value]
            if not all(type(number) in (int, float) for number in numbers):
                raise UserError(f"slices: {part} is {value!r}; allowed: a whole number, or a share of the whole")


def sizes(config: Any, chosen: str | Sequence[Mapping[str, Any]]) -> dict[str, Size]:
    """name -> size of what is chosen of a nested model: `all`, the sizes that it was trained at, or choices of
    `nesting.size_of`. Raises UserError for a model without smaller ones, a size that it has not, and the whole."""
    if not is_nested(config):
        raise UserError(
            "slices: no smaller models are nested in this one; a matryoshka rewrite without `only` makes one"
        )
    if chosen == ALL:
        found = trained_sizes(config)[1:]
    else:
        found = []
        for entry in chosen:
            try:
                found.append(size_of(config, **entry))  # type: ignore[arg-type]
            except ValueError as error:
                raise UserError(f"slices: {error}") from error
            if found[-1] == full_size(config):
                raise UserError(f"slices: {dict(entry)} is the whole model")  # type: ignore[arg-type]
    return {name(config, size): size for size in found}


def parameters(config: Any, of: Iterable[Size]) -> dict[Size, int]:
    """How many parameters the model of each size has, from the config: no weight is read, no model made."""
    tensors = dict(models.build(config).named_parameters())
    return {size: sum(tensor.numel() for tensor in sliced(tensors, config, size).values()) for size in of}


@torch.no_grad()
def cut(model: GPT2LMHeadModel, size: Size) -> GPT2LMHeadModel:
    """The model of a size in memory of its own; its `compression` says how a rewrite gets there at once."""
    only = chosen_by(size, model.config.n_embd)
    found = model.slice(**only)  # type: ignore[operator]
    found.load_state_dict({key: alone(value) for key, value in found.state_dict().items()}, assign=True)
    found.tie_weights()
    found.config.compression = [
        {**record, "only": only} if record["rewrite"] == Matryoshka.name else record
        for record in model.config.compression
    ]
    return found
