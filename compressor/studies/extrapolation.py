"""alibi with each kind of slopes beside the original: perplexity and text below, at and beyond the trained context.

The original cannot run beyond its learned positions; what a model without them is worth there is measured against the
same model at the trained context, and that against the control. What ckerce/cleanGPT compares is in the same report:
parameters, memory and speed.
"""

from __future__ import annotations

from typing import Any

from .study import Member, Study

TRAINING: dict[str, Any] = {
    "train": "lora", "steps": 200, "batch_tokens": 4096, "learning_rate": 3e-3, "lora_rank": 64, "lora_alpha": 64,
    "distill": True, "selection_tokens": 8192,
}  # fmt: skip

EXTRAPOLATION = Study(
    name="extrapolation",
    title="alibi: contexts beyond the trained one",
    recipe={
        "model": "demo",
        "data": "demo",
        "seed": 0,
        "align": {"method": "none"},
        "finetune": TRAINING,
        "benchmark": {"metrics": [
            {"metric": "perplexity", "max_tokens": 32768},
            "extrapolation",
            "size",
            {"metric": "latency", "repeats": 5},
            "generation",
        ]},
    },
    members=tuple(
        Member(f"alibi_{slopes}", {"rewrite": "alibi", "slopes": slopes})
        for slopes in ("geometric", "fitted", "learned")
    ),
    before=("perplexity", "size"),
    workflow=(
        "The same distillation (steps, batches, seed) for every kind of slopes, during which learned positions fade "
        "out, and, without a rewrite, for the control: Recovery.",
        "Perplexity of the same tokens at 1/4, 1/2, 1, 2 and 4 times the trained context, in sliding windows and in "
        "windows that do not overlap: Perplexity by length.",
        "Whether tokens far from the beginning of a window cost more: Loss by position in the window.",
        "Text written to twice the trained length, with a cache: Text past the trained length, Samples.",
        "Parameters, among them those of positions, bytes and cache: Size.",
        "Time of a prompt and of a token within the trained context: Prefill latency, Decode latency.",
    ),
)  # fmt: skip
