"""What config.json may say of attention, positions, streams and parts: checked before a model is built from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import GPT2Config

from .errors import UserError
from .modeling import GPT2CompressedConfig
from .modeling.alibi import SLOPES
from .modeling.attention import KINDS
from .modeling.combined import OUTPUTS
from .modeling.nystromformer import INVERSES
from .modeling.performer import MAPS, PAIRED
from .modeling.streams import STAGES
from .modeling.tversky_layers import tversky_places

MOST = 1 << 22  # of what widths and lengths may be

_OTHERS = ("ffn_groups", "tversky", "efficient_attention", "alibi", "token_factored", "shaped_attention")

Rule = tuple[Callable[[Any], bool], str]  # whether a value fits, and what fits in words


def check_attention(where: str, config: GPT2CompressedConfig) -> None:
    """Raises UserError for entries of which no model can be made, and for such as do not go together."""
    _check_blocks(where, config)
    for field, rules in _mappings(config).items():
        entry = getattr(config, field)
        if entry is None:
            continue
        if not isinstance(entry, dict):
            raise UserError(f"{where} has {entry!r:.80} as {field}; allowed: a mapping")
        for key, (fits, allowed) in rules.items():
            if key not in entry or not fits(entry[key]):
                given = f"{entry[key]!r:.80} as" if key in entry else "no"
                raise UserError(f"{where} has {given} {key} in {field}; allowed: {allowed}")
    if config.alibi and config.efficient_attention:
        raise UserError(f"{where} has alibi and efficient_attention; attention in blocks has no place for its bias")
    if (entry := config.token_factored) and STAGES[entry["stage"]][0]:
        places = tversky_places(config)
        for layer in entry["layers"]:
            if any((layer, target) in places for target in ("q", "k", "v", "attn_out")):
                raise UserError(f"{where} has the attention of layer {layer} in token_factored and in tversky")
    shaped = set((config.shaped_attention or {}).get("layers", []))
    blocks = {layer for entry in config.efficient_attention or [] for layer in entry["layers"]}
    if shaped & blocks:
        raise UserError(f"{where} has layer {min(shaped & blocks)} in shaped_attention and in efficient_attention")
    beside = [field for field in _OTHERS if getattr(config, field)]
    if config.combined and beside:
        raise UserError(f"{where} has combined and {beside[0]}, which would have to be of each part")


def _mappings(config: GPT2Config) -> dict[str, dict[str, Rule]]:
    flag = _one_of(True, False)
    return {
        "alibi": {"slopes": _one_of(*SLOPES), "learned_positions": flag, "first": flag},
        "token_factored": {
            "stage": _one_of(*STAGES), "layers": _layers(config), "value_norm": flag, "bias": flag,
        },
        "shaped_attention": {"layers": _layers(config), "parallel": flag},
        "combined": {
            "widths": _parts(config.n_embd, config.n_embd // config.n_head),
            "ffn": _parts(config.n_inner or 4 * config.n_embd, 1),
            "outputs": _one_of(*OUTPUTS),
        },
    }  # fmt: skip


def _one_of(*known: Any) -> Rule:
    return (lambda value: type(value) in (str, bool) and value in known), ", ".join(map(str, known)).lower()


def _layers(config: GPT2Config) -> Rule:
    def fits(value: Any) -> bool:
        layers = value if isinstance(value, list) else []
        return bool(layers) and different(layers, lambda layer: 0 <= layer < config.n_layer, int)

    return fits, f"different layers within 0 to {config.n_layer - 1}"


def _parts(total: int, of: int) -> Rule:
    """As many widths as there are parts."""

    def fits(value: Any) -> bool:
        widths = value if isinstance(value, list) else []
        good = all(type(width) is int and width > 0 and width % of == 0 for width in widths)
        return len(widths) == 2 and good and sum(widths) == total

    return fits, f"two multiples of {of} that sum to {total}"


def different(values: list[Any], fits: Callable[[Any], bool], kind: type) -> bool:
    return all(type(value) is kind and fits(value) for value in values) and len(set(values)) == len(values)


def _check_blocks(where: str, config: GPT2CompressedConfig) -> None:
    taken: set[int] = set()
    for index, entry in enumerate(config.efficient_attention or []):
        if not isinstance(entry, dict):
            raise UserError(f"{where} has {entry!r:.80} as entry {index} of efficient_attention; allowed: a mapping")
        for key, (fits, allowed) in _attention_entry(config, entry).items():
            if key not in entry or not fits(entry[key]):
                given = f"{entry[key]!r:.80} as" if key in entry else "no"
                raise UserError(
                    f"{where} has {given} {key} in entry {index} of efficient_attention; allowed: {allowed}"
                )
        if taken & set(entry["layers"]):
            raise UserError(f"{where} has layer {min(taken & set(entry['layers']))} twice in efficient_attention")
        taken |= set(entry["layers"])


def _attention_entry(config: GPT2Config, entry: Mapping[str, Any]) -> dict[str, Rule]:
    """What every key of an entry of efficient_attention may hold: key -> (whether a value fits, in words)."""
    most, width = MOST, config.n_embd // config.n_head

    def whole(largest: int, of: int = 1) -> Rule:
        pairs = f", in steps of {of}" if of > 1 else ""
        return (lambda value: type(value) is int and of <= value <= largest and value % of == 0), (
            f"{of} to {largest}{pairs}"
        )

    kind, block, feature_map = (entry.get(key) for key in ("kind", "block", "feature_map"))
    knobs: dict[Any, dict[str, Rule]] = {
        "linformer": {
            "slots": whole(block if type(block) is int else most),
            "per_head": _one_of(True, False),
        },
        "nystromformer": {"landmarks": whole(most), "inverse": _one_of(*INVERSES)},
        "performer": {
            "feature_map": _one_of(*MAPS),
            "features": whole(most, 2 if feature_map in PAIRED else 1) if feature_map != "elu" else (
                lambda value: value == width, f"{width}, a head's width"
            ),
            "seed": (lambda value: type(value) is int and 0 <= value < 1 << 63, "0 or more"),
            "local": _one_of(True, False),
        },
    }  # fmt: skip
    return {
        "kind": _one_of(*KINDS),
        "layers": _layers(config),
        "block": whole(most),
        **(knobs.get(kind, {}) if isinstance(kind, str) else {}),
    }
