"""What every form of a Tversky projection costs in time and memory, beside nn.Linear and the naive broadcast.

    python benchmarks/tversky_speed.py [--tokens 1024] [--width 768] [--out 3072] [--features 384] [--repeats 15]
                                       [--slow-repeats 5] [--naive-tokens 8] [--threads 2] [--forms antipodal]

One projection of GPT-2 small's c_fc with prototype features, random weights, float32, one process, forms interleaved;
median and quartiles, ratios of medians to nn.Linear's, forward in evaluation (what prototypes alone decide is kept) and
forward with backward in training. alpha is moved, so that a similarity is no dot product any more, except where it says
so. Memory is the most that was allocated at once in one call beyond what was there before it, by PyTorch's profiler:
activations, gradients and temporaries, not weights, inputs, or buffers inside of BLAS. The naive way makes the tensor
tokens x prototypes x features; it gets fewer tokens, and both give the same numbers. The bar: contrast product/product,
antipodal, at half the width as features, within 3x of nn.Linear in time and memory.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from compressor import models  # noqa: F401 (opens the package in its order)
from compressor.modeling.tversky import TverskyProjection

CONTRAST = [
    ("product", "product", True), ("product", "product", False), ("product", "ignorematch", False),
    ("product", "ignorematch", True), ("mean", "ignorematch", False), ("gmean", "ignorematch", False),
]  # fmt: skip
SLOW = [
    ("product", "subtractmatch", False), ("min", "product", True), ("min", "subtractmatch", False),
    ("max", "ignorematch", False), ("softmin", "product", False), ("softmin", "product", True),
]  # fmt: skip
RATIO = [("product", "product", True), ("product", "ignorematch", False)]
SLOW_RATIO = [("min", "subtractmatch", False), ("min", "subtractmatch", True), ("softmin", "subtractmatch", False)]
LINEAR = ", linear still"

Calls = Mapping[str, Callable[[], object]]


def projections(options: argparse.Namespace, slow: bool) -> dict[str, nn.Module]:
    """nn.Linear, then the forms of matrix products or the others, by name."""
    found: dict[str, nn.Module] = {"nn.Linear": nn.Linear(options.width, options.out)}
    for form, several in (("contrast", SLOW if slow else CONTRAST), ("ratio", SLOW_RATIO if slow else RATIO)):
        for intersection, difference, antipodal in several:
            name = f"{form} {intersection}/{difference}" + (", antipodal" if antipodal else "")
            words: dict[str, Any] = {
                "form": form,
                "intersection": intersection,
                "difference": difference,
                "antipodal": antipodal,
            }
            for ending in ("", LINEAR) if not found.keys() - {"nn.Linear"} and not slow else ("",):
                alpha = 0.5 if ending else 0.7
                made = TverskyProjection(
                    options.width, options.out, options.features,
                    **words, prototypes="features", non_negative=form == "ratio", alpha=alpha,
                )  # fmt: skip
                found[name + ending] = made
    return {name: made for name, made in found.items() if name == "nn.Linear" or options.forms in name}


def naive(projection: TverskyProjection, x: Tensor) -> Tensor:
    """The formulas over a tensor of tokens x prototypes x features."""
    assert projection.bank is not None
    z, u = projection.measure(x, projection.bank), projection.prototype_features(projection.bank)
    if projection.antipodal:
        z, u = torch.cat([z, -z], 1), torch.cat([u, -u], 1)
    theta, alpha, beta = projection.strengths(projection.bank)
    z = z[:, None, :]
    a, p = z.relu(), u.relu()
    both = (z > 0) & (u > 0)
    meet = {
        "product": lambda: a * p,
        "min": lambda: torch.minimum(a, p),
        "max": lambda: torch.maximum(a, p) * both,
        "mean": lambda: (a + p) / 2 * both,
        "gmean": lambda: torch.where(both, a * p, 1).sqrt() * both,
        "softmin": lambda: torch.where(both, -torch.logaddexp(-z, -u), 0),
    }[projection.intersection]()
    differ: Mapping[str, Callable[[], tuple[Tensor, Tensor]]] = {
        "product": lambda: (a * (-u).relu(), (-z).relu() * p),
        "ignorematch": lambda: (a * (u <= 0), p * (z <= 0)),
        "subtractmatch": lambda: ((a - p).relu(), (p - a).relu()),
    }
    common, (only_x, only_p) = theta * meet.sum(-1), (part.sum(-1) for part in differ[projection.difference]())
    apart = alpha * only_x + beta * only_p
    similarity = common - apart if projection.form == "contrast" else common / (common + apart + projection.offset)
    return similarity + projection.bias


# ---------------------------------------------------------------- measuring


def times(calls: Calls, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each call, interleaved; the first round warms up."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if repeat:
                found[name].append((time.perf_counter() - start) * 1e3)
    return found


def peak(call: Callable[[], object]) -> int:
    """The most bytes that were allocated at once while it ran, beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    results = seen.profiler.kineto_results if seen.profiler else None
    assert results is not None
    now = most = 0
    for event in sorted(results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def forward(module: nn.Module, x: Tensor) -> Callable[[], object]:
    def call() -> None:
        module.eval()
        with torch.no_grad():
            module(x)

    return call


def trained(module: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
    def call() -> None:
        module.train()
        run(x.detach().requires_grad_()).sum().backward()
        module.zero_grad()

    return call


def table(title: str, calls: Calls, repeats: int, base: str) -> None:
    """One line a call, with ratios to `base`."""
    print(f"\n### {title}\n")
    print("| form | median ms | quartiles ms | time ratio | peak MiB | memory ratio |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    measured, bytes_of = times(calls, repeats), {name: peak(call) for name, call in calls.items()}
    quarters = torch.tensor([0.25, 0.5, 0.75])
    found = {name: torch.tensor(values).quantile(quarters).tolist() for name, values in measured.items()}
    for name, (low, middle, high) in found.items():
        share, memory = middle / found[base][1], bytes_of[name] / max(1, bytes_of[base])
        print(
            f"| {name} | {middle:.2f} | {low:.2f} to {high:.2f} | {share:.2f} | {bytes_of[name] / 2**20:.1f} | "
            f"{memory:.2f} |"
        )


def both_ways(title: str, modules: Mapping[str, nn.Module], x: Tensor, repeats: int) -> None:
    table(f"{title}, forward", {name: forward(item, x) for name, item in modules.items()}, repeats, "nn.Linear")
    calls = {name: trained(item, item, x) for name, item in modules.items()}
    table(f"{title}, forward and backward", calls, repeats, "nn.Linear")


def against_naive(modules: Mapping[str, nn.Module], x: Tensor, repeats: int) -> None:
    """Each form beside its formula written out; raises where they do not agree."""
    for name, module in modules.items():
        if not isinstance(module, TverskyProjection) or LINEAR in name:
            continue
        with torch.no_grad():
            torch.testing.assert_close(module.eval()(x), naive(module, x), rtol=1e-3, atol=1e-3)

        def broadcast(x: Tensor, module: TverskyProjection = module) -> Tensor:
            return naive(module, x)

        calls = {"ours": trained(module, module, x), "naive": trained(module, broadcast, x)}
        table(f"{name}, {len(x)} tokens, forward and backward", calls, repeats, "naive")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--out", type=int, default=3072)
    parser.add_argument("--features", type=int, default=384)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--slow-repeats", type=int, default=5, help="of what is no matrix product, and the naive way")
    parser.add_argument("--naive-tokens", type=int, default=8, help="0: no naive way")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--forms", default="", help="only forms whose name holds this")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(
        f"{options.width} -> {options.out}, {options.features} features, float32, {options.threads} threads, "
        f"{options.repeats} interleaved repeats ({options.slow_repeats} of what is no matrix product)"
    )
    x = torch.randn(options.tokens, options.width)
    fast, slow = projections(options, slow=False), projections(options, slow=True)
    both_ways(f"Matrix products, {options.tokens} tokens", fast, x, options.repeats)
    if len(slow) > 1:
        both_ways(f"Others, {options.tokens} tokens", slow, x, options.slow_repeats)
    calls = {name: forward(item, x[:1]) for name, item in (fast | slow).items()}
    table("Decode, 1 token", calls, 10 * options.repeats, "nn.Linear")
    if options.naive_tokens:
        against_naive(fast | slow, x[: options.naive_tokens], options.slow_repeats)


if __name__ == "__main__":
    main()
