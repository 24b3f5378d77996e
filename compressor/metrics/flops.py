"""Floating-point operations of a forward pass, by formula."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from transformers import GPT2Config, PreTrainedModel

from ..gpt2 import d_ff
from ..modeling.performer import PAIRED
from ..modeling.streams import STAGES
from ..modeling.tversky_layers import tversky_places


def flops_per_token(model: PreTrainedModel | GPT2Config, context: int | None = None) -> int:
    """Floating-point operations of a forward pass per token (a multiply-add is 2), with the LM head.

    Per layer 8 d^2 for attention's linears, 4 d d_ff for the FFN, 4 r (d + d_ff) for low-rank deltas of rank r, and
    2 context d for the causal scores and their weighted sum (a token sees context / 2 others on average). Norms,
    activations, softmax, biases and look-ups are not counted. Sharing an FFN saves none of it. context: default
    n_positions.

    A Tversky projection in place of a linear or an FFN, of K features (rows of its bank) and m prototypes, takes 2 in K
    to measure the features, once for queries, keys and values of one bank, and 2 K m for each matrix product of its
    form: 2 of an antipodal bank with products, 1 where theta = alpha + beta is fixed (learnable ones may part); 2 of
    products, and of product and ignorematch, without an antipode. Minima and subtractmatch take 3 for each token,
    prototype and feature (difference, size, sum), softmin 8 for each sign (5 for what goes beyond the minimum). What
    depends on prototypes and features alone is made once and kept. Sharing a bank saves none of it.

    Of models side by side each part's linears take what they would alone, glue over d takes 2 d^2.

    Values and outputs of streams that only mix heads take 2 n_head d in the place of 2 d^2; none is nothing.

    Attention in blocks: see `_attention`. A nested model in another basis takes 2 d k more for what leads to the
    head, and 2 k for each token of the vocabulary, of k coordinates; layers may differ in neurons.
    A part of the heads takes its share of what attention does.
    """
    config = model if isinstance(model, GPT2Config) else cast(GPT2Config, model.config)
    context = config.n_positions if context is None else context
    d, ff = config.n_embd, d_ff(config)
    layer = 8 * d * d + 4 * d * ff
    scores = config.n_layer * 2 * context * d + sum(
        len(entry["layers"]) * (_attention(config, entry, context) - 2 * context * d)
        for entry in getattr(config, "efficient_attention", None) or []
    )
    deltas = sum(
        len(group["layers"]) * 4 * group["rank"] * (d + ff) for group in getattr(config, "ffn_groups", None) or []
    )
    kinds = (_tversky_flops, _stream_flops, _nested_flops, _parts_flops)
    rest = deltas + 2 * d * config.vocab_size + sum(more(config) for more in kinds)
    fractal = getattr(config, "fractal", None)
    gone = config.n_head - fractal["heads"] if fractal else 0  # heads
    return config.n_layer * layer + scores + rest - gone * (config.n_layer * 8 * d * d + scores) // config.n_head


def _stream_flops(config: GPT2Config) -> int:
    """What values and outputs of other kinds than linears take, less what linears would."""
    d, entry = config.n_embd, getattr(config, "token_factored", None)
    if not entry:
        return 0
    takes = {"kron": 2 * config.n_head * d, "identity": 0}
    return len(entry["layers"]) * sum(takes[kind] - 2 * d * d for kind in STAGES[entry["stage"]] if kind in takes)


def _nested_flops(config: GPT2Config) -> int:
    """What a nested model, or a slice of one, takes more than GPT-2 of its width and widest FFN."""
    d, entry = config.n_embd, getattr(config, "matryoshka", None)
    if not entry:
        return 0
    more = sum(4 * d * (ff - d_ff(config)) for ff in entry["ffn_of_layers"] or [])
    if entry["rotated"]:
        coordinates = entry["head"][0]
        more += 2 * d * coordinates - 2 * (d - coordinates) * config.vocab_size
    return more


def _parts_flops(config: GPT2Config) -> int:
    """What the linears of models side by side and their glue take, less what linears over all parts would."""
    d, ff, entry = config.n_embd, d_ff(config), getattr(config, "combined", None)
    if not entry:
        return 0
    squares = sum(width * width for width in entry["widths"]) - d * d
    across = sum(width * own for width, own in zip(entry["widths"], entry["ffn"], strict=True)) - d * ff
    layer = 6 * squares + 2 * across
    if entry["outputs"] != "dense":
        layer += 2 * squares + 2 * across
    if entry["outputs"] == "glued":
        layer += 4 * d * d
    return config.n_layer * layer + 2 * d * d


def _tversky_flops(config: GPT2Config) -> int:
    """What Tversky projections take, less what they take the place of."""
    more, measured = 0, set()
    for (layer, target), place in tversky_places(config).items():
        width, out = place.widths
        shares = (layer, place.key) if target in ("q", "k", "v") else None
        if shares is None or shares not in measured:
            more += 2 * width * place.features
        measured.add(shares)
        products, others = _operations(place.entry)
        more += (2 * products + others) * place.features * out
        more -= 4 * width * d_ff(config) if target == "mlp_block" else 2 * width * out
    return more


def _operations(entry: Mapping[str, Any]) -> tuple[int, int]:
    """Matrix products of a form (one for each function of the measured features), and its other operations for each
    prototype and feature of the bank."""
    intersection, difference, ratio = entry["intersection"], entry["difference"], entry["form"] == "ratio"
    signs = (1, -1) if entry["antipodal"] else (1,)
    kinds = {"product": ["salience"], "gmean": ["root"], "mean": ["salience", "has"], "max": ["salience", "has"]}
    common = {(kind, sign) for sign in signs for kind in kinds.get(intersection, [])}
    apart = set()
    if difference == "product":
        apart = {("salience", 1), ("salience", -1)}
    elif difference == "ignorematch":
        apart = {(kind, sign) for sign in signs for kind in ("salience", "has")}
    products = len(common) + len(apart) if ratio else len(common | apart)  # a ratio keeps them apart
    linear = not entry["learn_scalars"] and entry["theta"] == entry["alpha"] + entry["beta"]
    if entry["antipodal"] and intersection == difference == "product" and linear and not ratio:
        products = 1
    others = 3 if intersection in ("min", "max") or difference == "subtractmatch" else 0
    others += 8 * len(signs) if intersection == "softmin" else 0
    return products, others


def _attention(config: GPT2Config, entry: Mapping[str, Any], context: int) -> int:
    """Scores and weighted sums of attention in blocks of c tokens, for a token and layer, on average over `context`.

    Exact within a block: 2 c d. Over completed blocks, of which a token has p = (context - c) / 2 c before it:
    linformer 4 r d for r summaries of its block and 4 r d for those of each block before; nystromformer 4 m d for m
    landmarks, and with the pseudo-inverse 4 m d for each token of the prefix once a block, and 48 m^3 a head; performer
    2 d for every feature of the query, of the key, of the state that the key is added to and of the reading.
    """
    d, heads, block = config.n_embd, config.n_head, min(entry["block"], context)
    before = (context - block) / (2 * block)  # completed blocks
    seen = 1 - block / context  # tokens that have any
    near: float = 2 * block * d
    if entry["kind"] == "linformer":
        far = 4 * entry["slots"] * d * (before + (before > 0))
    elif entry["kind"] == "nystromformer":
        landmarks = entry["landmarks"]
        far = seen * 4 * landmarks * d
        if entry["inverse"] == "newton":
            far += 4 * landmarks * d * before + seen * (
                48 * landmarks**3 * heads / block + 2 * landmarks**2 * d / block
            )
    else:
        features = entry["features"]
        maps = 0 if entry["feature_map"] == "elu" else 4 * d * features
        if entry["feature_map"] in PAIRED:
            maps //= 2  # of each direction w also -w
        far = maps + 4 * d * features
        if not entry["local"]:
            near = block * (features * heads + d)
        elif not before:
            far = 0
    return round(near + far)
