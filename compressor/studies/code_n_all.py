"""merged_n and compressed_n for n = 4, 6, 8, 10 beside the original: what uniform FFNs and less depth cost.

The workflow is that of "Efficient Transformer Compression via Merged and Shared Feed-Forward Networks": sample text of
all variants; perplexity before and after the same fine-tuning; latency and speed-up; IMDb accuracy; ROUGE-L.
"""

from __future__ import annotations

from typing import Any

from .study import Member, Study

SIZES = (4, 6, 8, 10)
_BASELINES = ("benchmark.baselines=[pruned, dropped]",)  # of one member: each is trained as long as the member


def _compressed(n: int) -> dict[str, Any]:
    return {"rewrite": "compressed_n", "n": n, "collapse": "fit"}


CODE_N_ALL = Study(
    name="code_n_all",
    title="merged_n and compressed_n: quality, size and speed",
    recipe={
        "model": "demo",
        "data": "demo",
        "seed": 0,
        "align": {"method": "activation", "site": "pre", "pairs": "chain", "max_tokens": 4000},
        "search": {"strategy": "all", "race": True, "max_tokens": 16384},
        "finetune": {"train": "lora", "steps": 100, "batch_tokens": 4096, "learning_rate": 3e-3, "lora_rank": 64,
                     "lora_alpha": 64, "selection_tokens": 8192},
        "benchmark": {"metrics": [
            {"metric": "perplexity", "max_tokens": 32768},
            "size",
            {"metric": "latency", "batch": [1, 8]},
            {"metric": "imdb", "max_training": 1000, "max_examples": 500},
            {"metric": "rouge", "max_examples": 100},
            "generation",
        ]},
    },
    members=(
        *(Member(f"merged_{n}", {"rewrite": "merged_n", "n": n, "tie": True}) for n in SIZES),
        *(Member(f"compressed_{n}", _compressed(n), _BASELINES if n == 6 else ()) for n in SIZES),
    ),
    before=("perplexity", "size", "generation"),
    workflow=(
        "Sample text of the original and of every variant, the same prompts and seed: Samples.",
        "Perplexity of every variant before fine-tuning: Recovery, column before.",
        "The same fine-tuning (steps, batches, seed) for every variant and, as control, for the original: Recovery, "
        "How it was made.",
        "Perplexity after fine-tuning: Recovery, column after.",
        "All perplexities side by side, with errors and per word: Perplexity strided.",
        "Latency of merged, compressed and original in one process, prefill and decode apart: Prefill latency, Decode "
        "latency.",
        "Speed-up of compressed_n against the original: Size, quality and speed.",
        "IMDb accuracy of all, beside the majority class and a bag of words: IMDb.",
        "ROUGE-1/2/L of summaries of all, beside the first sentences and the prompt: Summaries.",
    ),
)  # fmt: skip
