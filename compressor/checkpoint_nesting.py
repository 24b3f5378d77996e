"""config.json of a model of sizes or parts, or of one cut out of it: refused in one line where none can be built."""

from __future__ import annotations

from typing import Any

from .checkpoint_attention import different
from .errors import UserError
from .gpt2 import d_ff
from .modeling import GPT2CompressedConfig
from .modeling.nesting import FULL

_ALONE = ("ffn_groups", "tversky", "efficient_attention", "alibi", "token_factored", "shaped_attention", "combined")
_LEVELS = 12  # 2 to the power of more is no number of heads


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


def check_parts(where: str, config: GPT2CompressedConfig) -> None:
    """Raises UserError for a `fractal` of which no model can be made."""
    entry = config.fractal
    if entry is None:
        return
    if not isinstance(entry, dict):
        raise UserError(f"{where} has {entry!r:.80} as fractal; allowed: a mapping")
    split, levels, heads = (entry.get(key) for key in ("split", "levels", "heads"))
    if type(split) is not int or split not in (2, 4):
        raise UserError(f"{where} has {split!r:.80} as split of fractal; allowed: 2, 4")
    if type(levels) is not int or not 0 <= levels <= _LEVELS:
        raise UserError(f"{where} has {levels!r:.80} as levels of fractal; allowed: 0 to {_LEVELS}")
    if levels and (config.n_head % split**levels or d_ff(config) % split**levels):
        raise UserError(
            f"{where} has {levels} levels of split {split} in fractal, which do not divide {config.n_head} heads and "
            f"{d_ff(config)} neurons"
        )
    if type(heads) is not int or not 1 <= heads <= config.n_head or config.n_head % heads:
        raise UserError(f"{where} has {heads!r:.80} as heads of fractal; allowed: divisors of {config.n_head}")
    if levels and heads != config.n_head:
        raise UserError(f"{where} has {heads} heads in fractal and levels; allowed: levels 0 of a part cut out")
    beside = [name for name in (*_ALONE, "matryoshka") if getattr(config, name)]
    if beside:
        raise UserError(f"{where} has {beside[0]} beside fractal; a model of parts has nothing else changed")


def _falls(sizes: Any, first: int, *, exactly: bool) -> bool:
    return (
        isinstance(sizes, list)
        and different(sizes, lambda size: 1 <= size <= first, int)
        and bool(sizes)
        and sizes == sorted(sizes, reverse=True)
        and (sizes[0] == first or not exactly)
    )
