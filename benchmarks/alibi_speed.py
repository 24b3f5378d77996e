"""What ALiBi's bias costs in time and memory, by how it gets into attention.

    python benchmarks/alibi_speed.py [--lengths 512 1024 2048 4096] [--heads 12] [--head-dim 64] [--repeats 5]

The attention module alone, batch 1, random queries, keys and values, float32, one process, one thread, forms
interleaved; processor time, medians with quartiles, ratios by repeat. Memory: the most that was allocated at once in a
call, by PyTorch's profiler. "sdpa": no bias, PyTorch's fused kernel with is_causal. "widened": ours, the bias as four
numbers more in queries and keys. "mask": the bias with the causal mask in it, [1, heads, tokens, tokens], handed to the
fused kernel; "mask, kept": made once, as if all layers had the same slopes. "explicit": the way of the source, which
makes bias, scores and softmax in every call. Decode: one token after so many; "bias": ours, [1, heads, 1, tokens].
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from attention_speed import Form, forward, inputs, ratio, spread, times, trained
from torch import Tensor
from tversky_speed import peak

from compressor import models  # noqa: F401 (opens the package in its order)
from compressor.modeling.alibi import WIDER, AlibiSlopes

_FIRST = torch.zeros(1, dtype=torch.int64)
_sdpa = torch.nn.functional.scaled_dot_product_attention


def fused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return _sdpa(query, key, value, is_causal=query.shape[2] > 1)


def widened(slopes: AlibiSlopes, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scaling, causal = query.shape[-1] ** -0.5, query.shape[2] > 1
    query, key = slopes.widened(query, key, key.shape[2] - query.shape[2], 1.0, scaling, _FIRST)
    wide = torch.nn.functional.pad(value, (0, WIDER))
    return _sdpa(query, key, wide, is_causal=causal, scale=scaling)[..., :-WIDER]


def mask(slopes: AlibiSlopes, tokens: int) -> Tensor:
    behind = torch.arange(tokens) - torch.arange(tokens)[:, None]
    bias = slopes.slopes(1.0)[:, None, None] * behind
    assert slopes.first is not None
    bias = torch.cat([slopes.first[:, None, None].expand(-1, tokens, 1), bias[..., 1:]], -1)
    return bias.masked_fill(behind > 0, -math.inf)[None]


def masked(slopes: AlibiSlopes, query: Tensor, key: Tensor, value: Tensor, kept: Tensor | None = None) -> Tensor:
    return _sdpa(query, key, value, attn_mask=mask(slopes, query.shape[2]) if kept is None else kept)


def explicit(slopes: AlibiSlopes, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return (scores + mask(slopes, query.shape[2])).softmax(-1) @ value


def biased(slopes: AlibiSlopes, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return _sdpa(query, key, value, attn_mask=slopes.bias(query, key.shape[2], key.shape[2] - 1, 1.0, _FIRST))


def forms(slopes: AlibiSlopes, tokens: int) -> dict[str, Form]:
    kept = mask(slopes, tokens).detach()
    return {
        "sdpa": fused,
        "widened": partial(widened, slopes),
        "mask": partial(masked, slopes),
        "mask, kept": partial(masked, slopes, kept=kept),
        "explicit": partial(explicit, slopes),
    }


def against_length(title: str, slopes: AlibiSlopes, options: argparse.Namespace, way: Callable[..., Any]) -> None:
    print(f"\n### {title}\n")
    print("| tokens | form | median ms | quartiles ms | time / sdpa | peak MiB | memory / sdpa |")
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    for tokens in options.lengths:
        given = inputs(options, tokens)
        calls = {name: way(form, given) for name, form in forms(slopes, tokens).items()}
        found, held = times(calls, options.repeats), {name: peak(call) for name, call in calls.items()}
        for name, values in found.items():
            print(
                f"| {tokens} | {name} | {spread(values)} | {ratio(found, name, 'sdpa'):.2f} | "
                f"{held[name] / 2**20:.1f} | {held[name] / held['sdpa']:.1f} |"
            )


def decode(slopes: AlibiSlopes, options: argparse.Namespace) -> None:
    print("\n### Decode, one token after so many\n")
    print("| tokens before | form | median ms | quartiles ms | time / sdpa |")
    print("| ---: | --- | ---: | ---: | ---: |")
    for tokens in options.lengths:
        query, (_, key, value) = inputs(options, 1)[0], inputs(options, tokens)
        ways: dict[str, Form] = {"sdpa": fused, "bias": partial(biased, slopes), "widened": partial(widened, slopes)}
        with torch.no_grad():
            found = times({name: partial(form, query, key, value) for name, form in ways.items()}, 50)
        for name, values in found.items():
            print(f"| {tokens} | {name} | {spread(values)} | {ratio(found, name, 'sdpa'):.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    slopes = AlibiSlopes(options.heads, first=True)
    given = inputs(options, 300)
    apart = max(
        (form(*given) - explicit(slopes, *given)).abs().max().item() for form in list(forms(slopes, 300).values())[1:]
    )
    print(
        f"{options.heads} heads of {options.head_dim}, float32, 1 thread, {options.repeats} interleaved repeats; all "
        f"forms with a bias give the same up to {apart:.1e}"
    )
    against_length("Forward", slopes, options, forward)
    against_length("Forward and backward", slopes, options, trained)
    decode(slopes, options)


if __name__ == "__main__":
    main()
