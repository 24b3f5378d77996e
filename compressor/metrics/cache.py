"""What generation keeps of the tokens before: the cache of keys and values, or of states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import GPT2Config


def cache_bytes(config: GPT2Config, context: int | None = None, itemsize: int = 4) -> int:
    """The most bytes that the caches of all layers hold for one sequence of up to `context` tokens (default
    n_positions). itemsize: bytes of a number of the dtype that is computed in, default float32's.

    Softmax over all tokens keeps 2 d numbers a token, a part of the heads its share. Attention in blocks of c tokens
    keeps as many for the block under way, and for the completed ones: linformer 2 d for each summary, nystromformer 2 d
    a token (3 d with the pseudo-inverse, which needs queries) and the landmarks' keys, values and sizes (the latter two
    float32), performer head_dim + 2 float32 for each feature of each head, whatever the length.
    """
    context = config.n_positions if context is None else context
    entries = getattr(config, "efficient_attention", None) or []
    plain = config.n_layer - sum(len(entry["layers"]) for entry in entries)
    fractal = getattr(config, "fractal", None)
    kept = config.n_embd // config.n_head * fractal["heads"] if fractal else config.n_embd
    found = plain * 2 * kept * context * itemsize
    for entry in entries:
        last = range(max(0, context - entry["block"]), context + 1)  # a block is completed once in these
        found += len(entry["layers"]) * max(_of_layer(config, entry, tokens, itemsize) for tokens in last)
    return found


def _of_layer(config: GPT2Config, entry: Mapping[str, Any], tokens: int, itemsize: int) -> int:
    d, block = config.n_embd, entry["block"]
    completed, under_way = divmod(tokens, block)
    kept = 3 if entry["kind"] == "nystromformer" and entry["inverse"] == "newton" else 2  # queries too
    own = kept * d * under_way * itemsize
    if entry["kind"] == "linformer":
        return own + 2 * d * entry["slots"] * completed * itemsize
    if entry["kind"] == "nystromformer":
        landmarks = (completed > 0) * entry["landmarks"] * (d * itemsize + 4 * d + 4)
        return own + kept * d * block * completed * itemsize + landmarks
    return own + (completed > 0) * (d + 2 * config.n_head) * entry["features"] * 4
