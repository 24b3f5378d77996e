"""What nesting costs while training, and what slices save: against the same models cut out.

    python benchmarks/matryoshka_speed.py [--width 768] [--layers 12] [--rows 2] [--context 256] [--repeats 5]

Random weights, float32, one process, one thread, forms interleaved; processor time, medians with quartiles, ratios by
repeat. A pass: forward and backward of next tokens, by the training's own loss. "nested": the size as recovery runs it,
a slice of the whole model's parameters, which the gradients go back to; "cut out": that size as a model of its own. A
mask over the whole model, the straightforward way, would take the whole model's time. "Cutting out": in the whole
model's memory where its width is the whole one, and as a copy. Memory: the most that was allocated at once, by
PyTorch's profiler.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from attention_speed import ratio, spread, times
from transformers import GPT2Config, GPT2LMHeadModel
from tversky_speed import peak

from compressor import alignment, models  # noqa: F401 (opens the package in its order)
from compressor.data import TokenBlocks
from compressor.modeling.nesting import Size
from compressor.nested_training import NestedObjective
from compressor.rewrites import from_record
from compressor.rewrites.base import Nest
from compressor.rewrites.compose import apply
from compressor.rewrites.matryoshka import chosen_by, trained_sizes
from compressor.slicing import cut, name
from compressor.training_loss import TokenObjective


def nested_model(options: argparse.Namespace) -> Any:
    config = GPT2Config(
        n_embd=options.width, n_layer=options.layers, n_head=12, n_positions=options.context, vocab_size=50257
    )
    original = GPT2LMHeadModel(config).eval()
    ids = torch.randint(0, config.vocab_size, (4, options.context))
    blocks = TokenBlocks(ids, torch.ones_like(ids, dtype=torch.bool), "random", "calibration", "random")
    record = {"rewrite": "matryoshka", "ffn": [0.5, 0.125], "width": [0.5], "depth": [0.5], "head": [0.5]}
    rewrite = from_record(record).resolved(config)
    return apply([rewrite], original, alignment.identity(config), calibration=blocks)


def passing(objective: TokenObjective, ids: torch.Tensor) -> Callable[[], None]:
    def call() -> None:
        objective(ids, None, False)[0].backward()
        objective.zero_grad(set_to_none=True)

    return call


def _whole(model: Any) -> Size:
    return trained_sizes(model.config)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nested_model(options)
    ids = torch.randint(0, model.config.vocab_size, (options.rows, options.context))
    print(
        f"{options.layers} layers, d = {options.width}, {options.rows} rows of {options.context} tokens, 1 thread, "
        f"{options.repeats} interleaved repeats\n\n### A training pass\n"
    )
    print("| size | form | median ms | quartiles ms | time / cut out | time / the whole model |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    whole = passing(TokenObjective(model, None, 0.0, (), None), ids)
    for size in trained_sizes(model.config)[1:]:
        objective = NestedObjective(model, None, 0.0, (), None, nest=Nest((_whole(model), size), "one", 0.0), seed=0)
        objective.sizes = (size,)
        alone = TokenObjective(cut(model, size), None, 0.0, (), None)
        forms = {"whole": whole, "cut out": passing(alone, ids), "nested": passing(objective, ids)}
        found = times(forms, options.repeats)
        title = name(model.config, size)
        for form in ("cut out", "nested"):
            by = f"{ratio(found, form, 'cut out'):.2f} | {ratio(found, form, 'whole'):.2f}"
            print(f"| {title} | {form} | {spread(found[form])} | {by} |", flush=True)
    print("\n### Cutting out\n")
    print("| size | form | median ms | quartiles ms | peak MiB |\n| --- | --- | ---: | ---: | ---: |")
    for size in trained_sizes(model.config)[1:]:
        slice_it = partial(model.slice, **chosen_by(size, model.config.n_embd))
        ways: dict[str, Callable[[], Any]] = {"slice": slice_it, "copy": partial(cut, model, size)}
        found, title = times(ways, options.repeats), name(model.config, size)
        for form, call in ways.items():
            print(f"| {title} | {form} | {spread(found[form])} | {peak(call) / 2**20:.1f} |", flush=True)


if __name__ == "__main__":
    main()
