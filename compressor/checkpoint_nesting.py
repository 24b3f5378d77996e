"""config.json of a nested model, or of a slice of one: refused in one line where no model can be built from it."""

from __future__ import annotations

from typing import Any

from .checkpoint_attention import different
from .errors import UserError
from .gpt2 import d_ff
from .modeling import GPT2CompressedConfig
from .modeling.nesting import FULL

_ALONE = ("ffn_groups", "tversky", "efficient_attention", "alibi", "token_factored", "shaped_attention", "combined")


def check_nesting(where: str, config: GPT2CompressedConfig) -> None:
    """Raises UserError for a `matryoshka` of which no model can be made."""
    entry = config.matryoshka
    if entry is None:
        return
    if not isinstance(entry, dict):
        raise UserError(f"{where} has {entry!r:.80} as matryoshka; allowed: a mapping")
    whole = {"ffn": d_ff(config), "width": config.n_embd, "depth": config.n_layer}
    for name in FULL:
        first = whole.get(name)  # of a slice the logits may be made of less than the width
        if not _falls(entry.get(name), config.n_embd if first is None else first, exactly=first is not None):
            raise UserError(
                f"{where} has {entry.get(name)!r:.80} as {name} of matryoshka; allowed: falling whole numbers, the "
                f"first {config.n_embd if first is None else first}"
            )
    if not isinstance(entry.get("rotated"), bool):
        raise UserError(f"{where} has {entry.get('rotated')!r:.80} as rotated of matryoshka; allowed: true, false")
    if any(width % config.n_head or width < 2 * config.n_head for width in entry["width"][1:]):
        raise UserError(
            f"{where} has width {entry['width']} in matryoshka; allowed: multiples of the {config.n_head} heads, "
            f"from {2 * config.n_head}"
        )
    if not entry["rotated"] and (entry["width"][1:] or entry["head"] != [config.n_embd]):
        raise UserError(f"{where} has narrower sizes in matryoshka, and is not rotated")
    of_layers = entry.get("ffn_of_layers", ())
    if of_layers is not None and not (
        isinstance(of_layers, list)
        and len(of_layers) == config.n_layer
        and all(type(ff) is int and 1 <= ff <= whole["ffn"] for ff in of_layers)
        and all(len(entry[name]) == 1 for name in FULL)
    ):
        raise UserError(
            f"{where} has {of_layers!r:.80} as ffn_of_layers of matryoshka; allowed: null, or of a slice "
            f"{config.n_layer} numbers from 1 to {whole['ffn']}"
        )
    beside = [name for name in _ALONE if getattr(config, name)]
    if beside:
        raise UserError(f"{where} has {beside[0]} beside matryoshka; a nested model has nothing else changed")


def _falls(sizes: Any, first: int, *, exactly: bool) -> bool:
    return (
        isinstance(sizes, list)
        and different(sizes, lambda size: 1 <= size <= first, int)
        and bool(sizes)
        and sizes == sorted(sizes, reverse=True)
        and (sizes[0] == first or not exactly)
    )
