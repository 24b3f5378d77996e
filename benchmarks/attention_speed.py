"""What attention in blocks costs in time and memory against length, beside explicit attention and PyTorch's fused one.

    python benchmarks/attention_speed.py [--lengths 256 512 1024 2048 4096 8192] [--heads 6] [--head-dim 64]
                                         [--block 64] [--slots 8] [--landmarks 16] [--features 128] [--repeats 3]
                                         [--forms linformer] [--model-tokens 256]

The attention module alone (no linears), batch 1, random queries, keys and values laid out as a model's are, float32,
one process, one thread, forms interleaved; processor time of the process, which other work on the machine disturbs less
than the clock; medians with quartiles, ratios by repeat (of each repeat's own times, then their median). "explicit"
makes the matrix of all scores, masks it, takes the softmax and multiplies by the values; "sdpa" is
torch.nn.functional.scaled_dot_product_attention with is_causal. Memory is the most that was allocated at once in one
call beyond what was there before it, by PyTorch's profiler, buffers inside of BLAS excluded. The crossover with a form
is the length from which on its ratio stays under 1, interpolated between the logarithms of measured lengths. Decode is
one token after so many, with the state they left, beside sdpa over cached keys and values; `repeats` blocks of tokens,
so that completing blocks is counted. The last table is greedy decoding of a whole model, 4 layers 256 wide. The bar: at
8192 tokens linformer and performer at least 3 times as fast as explicit with a fifth of its memory.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel
from tversky_speed import peak

from compressor import models  # noqa: F401 (opens the package in its order)
from compressor.modeling import GPT2CompressedConfig, GPT2CompressedLMHeadModel
from compressor.modeling.block_attention import BlockAttention, Far, StateLayer
from compressor.modeling.linformer import LinformerFar
from compressor.modeling.nystromformer import NystromFar
from compressor.modeling.performer import PerformerFar

Form = Callable[..., Tensor]  # of query, key, value [batch, heads, tokens, head_dim]
BARRED = ("linformer", "performer, learned", "performer, favor+")


def explicit(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = query @ key.transpose(-1, -2)
    scores = scores * query.shape[-1] ** -0.5
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    scores = scores.masked_fill(later, -math.inf)
    return scores.softmax(-1) @ value


def fused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)


def fars(options: argparse.Namespace) -> dict[str, Far]:
    """What stands for completed blocks, by name."""
    heads, width, features = options.heads, options.head_dim, options.features
    found: dict[str, Far] = {
        "linformer": LinformerFar(1, options.block, options.slots),
        "nystromformer, none": NystromFar(options.landmarks, "none"),
        "nystromformer, newton": NystromFar(options.landmarks, "newton"),
        "performer, learned": PerformerFar(heads, width, features, "learned", 0, True),
        "performer, favor+": PerformerFar(heads, width, features, "favor+", 0, True),
        "performer, learned, all features": PerformerFar(heads, width, features, "learned", 0, False),
    }
    return {name: far for name, far in found.items() if options.forms in name}


def in_blocks(far: Far, options: argparse.Namespace) -> Callable[..., Tensor]:
    return partial(BlockAttention(options.block, far), scaling=options.head_dim**-0.5)


def inputs(options: argparse.Namespace, tokens: int) -> list[Tensor]:
    """query, key, value [1, heads, tokens, head_dim], from [1, tokens, heads, head_dim] as a model's are."""
    return [torch.randn(1, tokens, options.heads, options.head_dim).transpose(1, 2) for _ in range(3)]


def forward(form: Form, given: list[Tensor]) -> Callable[[], object]:
    def call() -> None:
        with torch.no_grad():
            form(*given)

    return call


def trained(form: Form, given: list[Tensor]) -> Callable[[], object]:
    def call() -> None:
        form(*(tensor.detach().requires_grad_() for tensor in given)).sum().backward()

    return call


# ---------------------------------------------------------------- measuring


def times(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of processor time of each call, interleaved; the first round warms up."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if repeat:
                found[name].append((time.process_time() - start) * 1e3)
    return found


# ---------------------------------------------------------------- tables


def ratio(found: Mapping[str, list[float]], name: str, base: str) -> float:
    """Median of the ratios of the same repeat: what slows the machine for a while slows both."""
    return float((torch.tensor(found[name]) / torch.tensor(found[base])).median())


def spread(values: list[float]) -> str:
    low, middle, high = torch.tensor(values).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    return f"{middle:.2f} | {low:.2f} to {high:.2f}"


def against_length(
    title: str, forms: Mapping[str, Form], options: argparse.Namespace, way: Callable[[Form, list[Tensor]], Callable]
) -> None:
    """Every form at every length, then where each crosses the fused one, and the bar."""
    print(f"\n### {title}\n")
    print("| tokens | form | median ms | quartiles ms | time / sdpa | explicit / time | peak MiB | explicit / peak |")
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    to_fused: dict[str, list[float]] = {name: [] for name in forms}
    bars: list[str] = []
    for tokens in options.lengths:
        given = inputs(options, tokens)
        calls = {name: way(form, given) for name, form in forms.items()}
        found, bytes_of = times(calls, options.repeats), {name: peak(call) for name, call in calls.items()}
        for name, values in found.items():
            to_fused[name].append(ratio(found, name, "sdpa"))
            faster, smaller = ratio(found, "explicit", name), bytes_of["explicit"] / bytes_of[name]
            print(
                f"| {tokens} | {name} | {spread(values)} | {to_fused[name][-1]:.2f} | {faster:.2f} | "
                f"{bytes_of[name] / 2**20:.1f} | {smaller:.1f} |"
            )
            if name in BARRED and tokens == max(options.lengths):
                met = "met" if faster >= 3 and smaller >= 5 else "missed"
                bars.append(f"{name} {faster:.1f}x faster, {smaller:.1f}x less memory ({met})")
    print(f"\nBeside explicit attention at {max(options.lengths)} tokens (bar: 3x and 5x): {'; '.join(bars)}.")
    crossings = (f"{name} {crossover(options.lengths, ratios)}" for name, ratios in to_fused.items())
    print(f"\nTokens from which on it is faster than sdpa: {'; '.join(list(crossings)[2:])}.")


def crossover(lengths: list[int], ratios: list[float]) -> str:
    above = [place for place, value in enumerate(ratios) if value >= 1]
    if not above:
        return f"under {lengths[0]}"
    if above[-1] == len(lengths) - 1:
        return f"none up to {lengths[-1]}"
    low, high = (math.log(ratios[above[-1] + step]) for step in (0, 1))
    one, two = (math.log(lengths[above[-1] + step]) for step in (0, 1))
    return f"about {math.exp(one + (two - one) * low / (low - high)):.0f}"


def decode(found_fars: Mapping[str, Far], options: argparse.Namespace) -> None:
    """One token after so many, and what is held for it."""
    print("\n### Decode, one token after so many\n")
    print(
        "| tokens before | form | median ms | quartiles ms | time / sdpa | KiB held | bytes per token | held / sdpa |"
    )
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for tokens in (512, 2048, 8192):
        before, new = inputs(options, tokens), inputs(options, 1)
        layers = {name: StateLayer() for name in found_fars}
        cache, steps = DynamicCache(), options.repeats * options.block

        def attend(cache: DynamicCache = cache, new: list[Tensor] = new) -> None:
            torch.nn.functional.scaled_dot_product_attention(new[0], *cache.update(new[1], new[2], 0))

        calls: dict[str, Callable[[], object]] = {"sdpa": attend}
        with torch.no_grad():
            cache.update(before[1], before[2], 0)
            held = {"sdpa": 2 * before[1].numel() * before[1].element_size()}
            for name, far in found_fars.items():
                form = in_blocks(far, options)
                form(*before, layer=layers[name])
                held[name] = sum(tensor.numel() * tensor.element_size() for tensor in layers[name].state.values())

                calls[name] = partial(form, *new, layer=layers[name])
            found = times(calls, steps)
        for name, values in found.items():
            print(
                f"| {tokens} | {name} | {spread(values)} | {ratio(found, name, 'sdpa'):.2f} | "
                f"{held[name] / 2**10:.0f} | {held[name] / tokens:.0f} | {held[name] / held['sdpa']:.3f} |"
            )


def whole_model(options: argparse.Namespace) -> None:
    """Milliseconds a token of greedy decoding, which is what Python and small calls cost as well."""
    tokens, prompt = options.model_tokens, torch.randint(0, 1000, (1, 64))
    base = {"n_layer": 4, "n_embd": 256, "n_head": 4, "vocab_size": 1000, "n_positions": 64 + tokens}
    common = {"layers": [0, 1, 2, 3], "block": options.block}
    entries = {
        "linformer": {"kind": "linformer", "slots": options.slots, "per_head": False},
        "nystromformer, none": {"kind": "nystromformer", "landmarks": options.landmarks, "inverse": "none"},
        "performer, learned": {"kind": "performer", "features": 128, "feature_map": "learned", "seed": 0,
                               "local": True},
    }  # fmt: skip
    made: dict[str, torch.nn.Module] = {"GPT-2": GPT2LMHeadModel(GPT2Config(**base))}
    for name, entry in entries.items():
        config = GPT2CompressedConfig(**base, efficient_attention=[{**entry, **common}])
        made[name] = GPT2CompressedLMHeadModel(config)

    def generates(model: torch.nn.Module) -> Callable[[], object]:
        words = {"do_sample": False, "min_new_tokens": tokens, "max_new_tokens": tokens, "pad_token_id": 0}
        return lambda: model.generate(prompt, **words)  # type: ignore[operator]

    found = times({name: generates(model.eval()) for name, model in made.items()}, options.repeats)
    print(f"\n### generate(), {tokens} new tokens after {prompt.shape[1]}, 4 layers 256 wide\n")
    print("| model | median ms per token | quartiles ms | time / GPT-2 |")
    print("| --- | ---: | ---: | ---: |")
    each = {name: [value / tokens for value in values] for name, values in found.items()}
    for name, values in each.items():
        print(f"| {name} | {spread(values)} | {ratio(each, name, 'GPT-2'):.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--landmarks", type=int, default=16)
    parser.add_argument("--features", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--forms", default="", help="only forms whose name holds this")
    parser.add_argument("--model-tokens", type=int, default=256, help="of the whole model; 0: no whole model")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(
        f"{options.heads} heads of {options.head_dim}, block {options.block}, {options.slots} slots, "
        f"{options.landmarks} landmarks, {options.features} features, float32, 1 thread, "
        f"{options.repeats} interleaved repeats"
    )
    own = fars(options)
    forms: dict[str, Form] = {"explicit": explicit, "sdpa": fused}
    forms.update({name: in_blocks(far, options) for name, far in own.items()})
    against_length("Forward", forms, options, forward)
    against_length("Forward and backward", forms, options, trained)
    decode(own, options)
    if options.model_tokens:
        whole_model(options)


if __name__ == "__main__":
    main()
