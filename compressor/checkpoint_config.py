"""config.json of a GPT-2: read, and refused in one line where no model can be built from it."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, GPT2Config
from transformers.activations import ACT2FN

from .checkpoint_attention import MOST, check_attention, different
from .checkpoint_nesting import check_nesting, check_parts
from .errors import UserError
from .modeling import GPT2CompressedConfig
from .modeling.tversky import DIFFERENCES, FORMS, INTERSECTIONS, PROTOTYPES, SCALARS
from .modeling.tversky_layers import FFN_TARGETS, HEAD_TARGET, TARGETS, tversky_places

# Far beyond any GPT-2: what a damaged config may say must not be built.
_LARGEST = {"n_layer": 1000, **dict.fromkeys(("n_head", "n_embd", "n_positions", "vocab_size", "n_inner"), MOST)}


def read_config(name: str, folder: Path) -> GPT2Config:
    """The configuration of a GPT-2 checkpoint. Raises UserError for anything else."""
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{name}: config.json cannot be read ({error})") from error
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if kind not in (GPT2Config.model_type, GPT2CompressedConfig.model_type):
        raise UserError(f"{name} is not a GPT-2: its model_type is {kind!r}; allowed: 'gpt2', 'gpt2_compressed'")
    check_keys(f"{name}: config.json", raw)
    if raw.get("add_cross_attention"):
        raise UserError(f"{name} has cross-attention; only decoder-only GPT-2 language models can be compressed")
    if raw.get("quantization_config"):
        raise UserError(f"{name} is quantised; give the float checkpoint that it was made from")
    if raw.get("per_layer_config"):
        raise UserError(f"{name} has a per_layer_config; only a GPT-2 whose layers are all alike can be compressed")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, TypeError, LookupError, AttributeError, OSError, StrictDataclassError) as error:
        raise UserError(
            f"{name}: config.json is not a valid GPT-2 configuration ({' '.join(str(error).split())})"
        ) from error
    check_config(f"{name}: config.json", config)
    return config


def check_keys(where: str, keys: Collection[str]) -> None:
    """Raises UserError for a misspelt key: transformers accepts it silently and builds another model than is meant."""
    known = set(GPT2CompressedConfig().to_dict()) | set(GPT2Config.attribute_map)
    for key in keys:
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.85)
        if key not in known and close and close[0] not in keys:
            raise UserError(f"{where} has {key!r}, which GPT-2 does not know (did you mean {close[0]!r}?)")


def check_config(where: str, config: GPT2Config) -> None:
    """Raises UserError for values of which no GPT-2 can be made."""
    for key, most in _LARGEST.items():
        value = getattr(config, key)
        if value is not None and not 1 <= value <= most:
            raise UserError(f"{where} has {key} {value}; allowed: 1 to {most}")
    for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        if not 0 <= getattr(config, key) <= 1:
            raise UserError(f"{where} has {key} {getattr(config, key)}; allowed: 0 to 1")
    if config.n_embd % config.n_head:
        raise UserError(f"{where} has n_embd {config.n_embd}, which n_head {config.n_head} does not divide")
    if config.activation_function not in ACT2FN:
        raise UserError(f"{where} has the unknown activation_function {config.activation_function!r}")
    records = getattr(config, "compression", None) or []
    if not isinstance(records, list) or not all(
        isinstance(record, dict) and isinstance(record.get("rewrite"), str) for record in records
    ):
        raise UserError(f"{where} has compression {records!r}; allowed: a list of rewrites")
    if isinstance(config, GPT2CompressedConfig):
        for key in ("ffn_groups", "tversky", "efficient_attention"):
            if not isinstance(getattr(config, key), list | None):
                raise UserError(f"{where} has {getattr(config, key)!r:.80} as {key}; allowed: a list")
        for index, entry in enumerate(config.ffn_groups or []):
            if not _is_group(entry, config.n_layer):
                raise UserError(
                    f"{where} has {entry!r} as entry {index} of ffn_groups; allowed: layers within "
                    f"0 to {config.n_layer - 1}, start, rank from 0, bias per_layer or shared"
                )
        shared = [layer for entry in config.ffn_groups or [] for layer in entry["layers"]]
        if len(shared) != len(set(shared)):
            raise UserError(f"{where} has a layer twice in ffn_groups")
        _check_tversky(where, config)
        check_attention(where, config)  # asks where Tversky projections are
        check_nesting(where, config)
        check_parts(where, config)


def _is_group(entry: Any, n_layer: int) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(layers := entry.get("layers"), list)
        and bool(layers)
        and all(type(layer) is int and 0 <= layer < n_layer for layer in layers)
        and type(entry.get("start")) is int
        and type(rank := entry.get("rank")) is int
        and rank >= 0
        and entry.get("bias") in ("per_layer", "shared")
    )


# ---------------------------------------------------------------- tversky


def _check_tversky(where: str, config: GPT2CompressedConfig) -> None:
    taken: dict[tuple[int | None, str], int] = {}
    entries = config.tversky or []
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise UserError(f"{where} has {entry!r:.80} as entry {index} of tversky; allowed: a mapping")
        for key, (fits, allowed) in _entry(config, entry).items():
            if key not in entry or not fits(entry[key]):
                given = f"{entry[key]!r:.80} as" if key in entry else "no"
                raise UserError(f"{where} has {given} {key} in entry {index} of tversky; allowed: {allowed}")
        faults = [fault for fault, there in _contradictions(entry).items() if there]
        if faults:
            raise UserError(f"{where} has {faults[0]} in entry {index} of tversky")
    shared = {layer for group in config.ffn_groups or [] for layer in group["layers"]}
    for index, entry in enumerate(entries):
        heads = [(None, target) for target in entry["targets"] if target == HEAD_TARGET]
        blocks = [
            (layer, target)
            for group in entry["groups"]
            for layer in group
            for target in entry["targets"]
            if target != HEAD_TARGET
        ]
        for layer, target in [*heads, *blocks]:
            rivals = {target}
            if target in FFN_TARGETS:
                rivals |= set(FFN_TARGETS if target == "mlp_block" else ["mlp_block"])
            if (target in FFN_TARGETS and layer in shared) or any((layer, rival) in taken for rival in rivals):
                what = target if layer is None else f"{target} of layer {layer}"
                raise UserError(f"{where} has {what} in entry {index} of tversky, which is taken over already")
        taken |= dict.fromkeys([*heads, *blocks], index)
    owners: dict[str, tuple[int, int]] = {}
    for (layer, target), place in tversky_places(config).items():
        own = taken[layer, target], place.widths[0]
        if owners.setdefault(place.key, own) != own:
            raise UserError(f"{where} has two feature banks {place.key} in tversky; give feature_keys apart")


def _entry(config: GPT2Config, entry: Mapping[str, Any]) -> dict[str, tuple[Callable[[Any], bool], str]]:
    """What every key of an entry may hold: key -> (whether a value fits, in words)."""
    d, layers = config.n_embd, config.n_layer
    d_ff = config.n_inner if config.n_inner is not None else 4 * d
    targets = entry.get("targets")
    words = targets if isinstance(targets, list) else []
    widths = sorted({d_ff if target == "mlp_out" else d for target in words})
    most = _LARGEST["n_embd"]

    def one_of(*known: str) -> tuple[Callable[[Any], bool], str]:
        return (lambda value: isinstance(value, str) and value in known), ", ".join(known)

    def are_targets(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and different(value, lambda item: item in TARGETS, str)

    def are_groups(value: Any) -> bool:
        if not isinstance(value, list) or not all(isinstance(group, list) and group for group in value):
            return False
        every = [layer for group in value for layer in group]
        return different(every, lambda layer: 0 <= layer < layers, int) and bool(every or words == [HEAD_TARGET])

    def are_features(value: Any) -> bool:
        return isinstance(value, dict) and all(
            type(count := value.get(str(width))) is int and 1 <= count <= most for width in widths
        )

    flags = ("antipodal", "normalize", "scale", "bias", "learn_scalars", "share_scalars", "non_negative")
    number: tuple[Callable[[Any], bool], str] = (
        lambda value: type(value) in (int, float) and -1e9 <= value <= 1e9, "a number within -1e9 to 1e9",
    )  # fmt: skip
    return {
        "targets": (are_targets, f"a list of different ones of {', '.join(TARGETS)}"),
        "groups": (are_groups, f"lists of layers within 0 to {layers - 1}, none of them twice"),
        "features": (are_features, f"1 to {most} features for every width of {', '.join(map(str, widths))}"),
        "feature_key": (
            lambda value: isinstance(value, str) and re.fullmatch(r"[A-Za-z]\w*", value, re.ASCII) is not None,
            "a letter, then letters, digits, _",
        ),
        "share": one_of("none", "layer", "window", "global"),
        "form": one_of(*FORMS),
        "intersection": one_of(*INTERSECTIONS),
        "difference": one_of(*DIFFERENCES),
        "prototypes": one_of(*PROTOTYPES),
        **{key: ((lambda value: isinstance(value, bool)), "true, false") for key in flags},
        **dict.fromkeys(("offset", *SCALARS), number),
    }


def _contradictions(entry: Mapping[str, Any]) -> dict[str, bool]:
    """Settings that do not go together -> whether the entry has them."""
    ratio, sums = entry["form"] == "ratio", entry["intersection"] in ("product", "mean", "gmean")
    return {
        "form ratio without non_negative and an offset above 0": ratio
        and not (entry["non_negative"] and entry["offset"] > 0),
        "non_negative with scalars below 0": entry["non_negative"] and min(entry[key] for key in SCALARS) < 0,
        "normalize with prototypes features": entry["normalize"]
        and entry["prototypes"] == "features"
        and entry["targets"] != [HEAD_TARGET],
        "mlp_block beside a linear of the FFN": "mlp_block" in entry["targets"]
        and len(set(FFN_TARGETS) & set(entry["targets"])) > 1,
        f"{HEAD_TARGET} with a form that is no contrast of matrix products": HEAD_TARGET in entry["targets"]
        and (ratio or not sums or entry["difference"] == "subtractmatch"),
    }
