"""Alignment of GPT-2 small against the straightforward way, in time; and its peak memory at 4,096 and 32,768 tokens.

    python -m benchmarks.align_speed [--repeats 3] [--out benchmarks/results/align_speed.md]

The task: align 4,000 tokens' activations for the windows of n = 4 layers from 0, 3, 6 and 8, and permute their FFNs.
Straightforward: call the model, store the activations of all layers; for each layer of each window np.corrcoef on the
stacked neurons of anchor and layer, an assignment, and a product with the dense permutation matrix for each weight: 12
pairs. Chain (the default): the 11 adjacent pairs, from which every window is composed. Direct (`--pairs direct --n 4`):
also every window's own pairs, 20 in all, which serve all nine windows of 4 as the straightforward way serves its four.
Random weights of GPT-2 small's shape; all in one process, interleaved, on the same batches.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import scipy
import torch
import transformers
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from compressor import alignment, gpt2
from compressor.windows import Window, window

STARTS, N, TOKENS, CONTEXT, BATCH_ROWS = (0, 3, 6, 8), 4, 4000, 500, 4
MEMORY_TOKENS, MEMORY_CONTEXT = (4096, 32768), 1024
SPEED_BAR, MEMORY_BAR = 3.0, 1.1

Batches = list[tuple[Tensor, Tensor]]


def small_model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config()).eval()


def token_batches(tokens: int, context: int, rows: int) -> Batches:
    ids = torch.randint(0, 50257, (tokens // context, context), generator=torch.Generator().manual_seed(1))
    return [(part, torch.ones_like(part, dtype=torch.bool)) for part in ids.split(rows)]


@contextmanager
def timed(stages: dict[str, float], stage: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    stages[stage] = stages.get(stage, 0.0) + time.perf_counter() - begin


# ---------------------------------------------------------------- the two ways


def ours(model: GPT2LMHeadModel, batches: Batches, windows: list[Window], pairs: str) -> tuple[dict[str, float], int]:
    """Seconds by stage, and the number of FFNs permuted."""
    stages: dict[str, float] = {}
    with timed(stages, "capture and correlation"), assignments_timed() as spans:
        alignments = alignment.align_activations(model, batches, pairs=pairs, n=N)
    stages["assignment"] = max(end for _, end in spans) - min(begin for begin, _ in spans)
    stages["capture and correlation"] -= stages["assignment"]
    with timed(stages, "permuting"):
        permuted = [
            alignment.permute_ffn(gpt2.ffn_weights(model, layer), alignments.to_anchor(layer, item.anchor))
            for item in windows
            for layer in item.layers
            if layer != item.anchor
        ]
    return stages, len(permuted)


@contextmanager
def assignments_timed() -> Iterator[list[tuple[float, float]]]:
    """Begin and end of every assignment that `alignment` solves, each in a thread."""
    spans: list[tuple[float, float]] = []
    original = alignment.assign

    def recording(similarity: Tensor) -> Tensor:
        begin = time.perf_counter()
        result = original(similarity)
        spans.append((begin, time.perf_counter()))
        return result

    with mock.patch.object(alignment, "assign", recording):
        yield spans


def straightforward(model: GPT2LMHeadModel, batches: Batches, windows: list[Window]) -> tuple[dict[str, float], int]:
    """Seconds by stage, and the number of FFNs permuted."""
    stages: dict[str, float] = {}
    stored: list[list[Tensor]] = [[] for _ in gpt2.blocks(model)]
    with timed(stages, "capture and correlation"):
        handles = [
            gpt2.ffn(model, layer).c_fc.register_forward_hook(
                lambda _module, _inputs, output, kept=kept: kept.append(output.flatten(0, 1))
            )
            for layer, kept in enumerate(stored)
        ]
        with torch.no_grad():
            for ids, _ in batches:
                model(ids, use_cache=False)
        for handle in handles:
            handle.remove()
        neurons = [torch.cat(kept).T.numpy() for kept in stored]  # [d_ff, tokens] a layer
    permuted = []
    for item in windows:
        for layer in item.layers:
            if layer == item.anchor:
                continue
            with timed(stages, "capture and correlation"):
                width = len(neurons[layer])
                correlation = np.corrcoef(np.concatenate([neurons[item.anchor], neurons[layer]]))[:width, width:]
            with timed(stages, "assignment"):
                _, columns = linear_sum_assignment(correlation, maximize=True)
            with timed(stages, "permuting"):
                matrix = torch.eye(width)[columns]
                fc_weight, fc_bias, proj_weight, proj_bias = gpt2.ffn_weights(model, layer)
                permuted.append((fc_weight @ matrix.T, matrix @ fc_bias, matrix @ proj_weight, proj_bias))
    return stages, len(permuted)


# ---------------------------------------------------------------- memory


def print_peak(tokens: int) -> None:
    """In a process of its own: bytes in use with the model loaded, and at most while aligning."""
    model = small_model()
    batches = token_batches(tokens, MEMORY_CONTEXT, 2)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    loaded = _memory("VmRSS")
    alignment.align_activations(model, batches)
    print(loaded, _memory("VmHWM"))


def _memory(name: str) -> int:
    """Bytes, as Linux counts them for this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def peak_above_model(tokens: int) -> int:
    """Bytes."""
    command = [sys.executable, "-m", "benchmarks.align_speed", "--peak-of", str(tokens)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    loaded, peak = map(int, answer.stdout.split())
    return peak - loaded


# ---------------------------------------------------------------- report


def compare(repeats: int) -> Iterator[str]:
    model, batches = small_model(), token_batches(TOKENS, CONTEXT, BATCH_ROWS)
    windows = [window(model.config.n_layer, start, N) for start in STARTS]
    ways: dict[str, Callable] = {
        "straightforward": straightforward,
        "chain": partial(ours, pairs="chain"),
        "direct": partial(ours, pairs="direct"),
    }
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    gpt2.trunk(model)(batches[0][0][:1])  # warm-up
    for repeat in range(repeats):
        for name, way in ways.items():
            stages, count = way(model, batches, windows)
            if count != len(STARTS) * (N - 1):
                raise SystemExit(f"{name} permuted {count} FFNs")
            runs[name].append(stages | {"end to end": sum(stages.values())})
            seconds = ", ".join(f"{stage} {value:.2f}" for stage, value in runs[name][-1].items())
            print(f"run {repeat + 1}, {name}: {seconds}", file=sys.stderr)
    yield "| seconds, median | straightforward | chain | faster by (least to most) | direct | faster by |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: |"
    for stage in runs["chain"][0]:
        theirs = [run[stage] for run in runs["straightforward"]]
        cells = [f"{statistics.median(theirs):.3f}"]
        for name in ("chain", "direct"):
            own = [run[stage] for run in runs[name]]
            ratios = [a / b for a, b in zip(theirs, own, strict=True)]
            cells += [
                f"{statistics.median(own):.3f}",
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            ]
        yield f"| {stage} | {' | '.join(cells)} |"
    yield f"\nBar: the chain, end to end, at least {SPEED_BAR:g} times faster. Runs: {repeats}, interleaved."


def memory() -> Iterator[str]:
    peaks = [peak_above_model(tokens) for tokens in MEMORY_TOKENS]
    yield "| tokens | peak memory above the loaded model, MiB |"
    yield "| ---: | ---: |"
    for tokens, peak in zip(MEMORY_TOKENS, peaks, strict=True):
        yield f"| {tokens:,} | {peak / 2**20:,.0f} |"
    yield f"\nRatio {peaks[1] / peaks[0]:.3f}; bar: at most {MEMORY_BAR:g}."
    yield "Most of it are two assignments at a time; how they overlap differs from run to run."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument("--out", type=Path, help="also write the Markdown here")
    parser.add_argument("--peak-of", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peak_of is not None:
        print_peak(given.peak_of)
        return
    versions = (
        f"torch {torch.__version__}, transformers {transformers.__version__}, scipy {scipy.__version__}, "
        f"numpy {np.__version__}"
    )
    lines = [
        "# Speed and memory of alignment",
        "",
        __doc__.split("\n\n")[2].strip(),
        "",
        f"{platform.machine()}, {torch.get_num_threads()} threads; {versions}.",
        "",
    ]
    load = os.getloadavg()[0]
    lines += [
        *compare(given.repeats),
        "",
        f"Load average of the machine: {load:.1f} before, {os.getloadavg()[0]:.1f} after. Above "
        f"{torch.get_num_threads()} other work ran beside it, and slowed the ways unevenly.",
    ]
    if not given.skip_memory:
        lines += ["", *memory()]
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if given.out is not None:
        given.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
