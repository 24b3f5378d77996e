"""What each rewrite costs after recovery, beside the original tuned on the same budget: one table.

    python benchmarks/recovery_quality.py MODEL --data D --test D [--out FILE.md] [--state FILE.json]

Calibration, selection and training text are disjoint parts of D. One alignment serves all rows; the window is the
middle one. Every row trains the same steps on the same batches in the same order with the same seed and keeps its best
state by the selection text, which may be the start. The controls are the original trained in each mode; adapters (lora)
have rank 8 and alpha 16 where nothing is said, alpha 64 where rank is 64; ratios are to the control with the
lowest perplexity of all, which flatters no row.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from quality import Kept, quality_parser, show
from texts import open_texts
from tqdm import tqdm

from compressor import alignment, models
from compressor.finetune import finetune
from compressor.metrics.size import parameters
from compressor.rewrites import from_record
from compressor.rewrites.compose import apply

LORA, WIDE, FULL, DELTAS = ("lora", 3e-3), ("lora", 3e-3, 64, 64.0), ("full", 1e-4), ("deltas", 3e-3)
# rewrite, aligned, (train, learning rate, rank and alpha of adapters if not 8, 16), distilled
Row = tuple[dict[str, Any] | None, bool, tuple[Any, ...], bool]


def rows() -> list[Row]:
    def soft(rank: int) -> dict[str, Any]:
        return {"rewrite": "soft_shared", "n": 4, "rank": rank, "base": "lsq", "delta_init": "asvd"}

    def merged(n: int) -> dict[str, Any]:
        return {"rewrite": "merged_n", "n": n, "tie": True}

    def compressed(n: int, collapse: str = "fit") -> dict[str, Any]:
        return {"rewrite": "compressed_n", "n": n, "collapse": collapse}

    shapes = [soft(0), soft(8), soft(32), merged(4), merged(10), compressed(4), compressed(6), compressed(10)]
    controls: list[Row] = [(None, True, way, False) for way in (LORA, WIDE, FULL, ("lora", 1e-3))]
    main: list[Row] = [(record, True, way, False) for record in shapes for way in (LORA, WIDE)]
    unaligned: list[Row] = [
        (soft(8), False, LORA, False),
        (merged(4), False, LORA, False),
        (compressed(4, "mean"), True, LORA, False),
        (compressed(4, "mean"), False, LORA, False),
    ]
    distilled: list[Row] = [(merged(10), True, LORA, True), (compressed(6), True, LORA, True)]
    ways: list[Row] = [(soft(8), True, way, False) for way in (DELTAS, ("lora", 6e-3), FULL)]
    return [*controls, *main, *unaligned, *distilled, *ways]


def main() -> None:
    parser = quality_parser(__doc__)
    parser.add_argument("--context", type=int, default=256, help="in training and in the test, which has no overlap")
    parser.add_argument("--selection-tokens", type=int, default=8192)
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    opened = models.open_model(options.model)
    texts = open_texts(opened, options.data, options.test, options.seed)
    calibration = texts.blocks("calibration", 16384, opened.model.config.n_positions)
    training = texts.blocks("training", options.steps * options.batch_tokens, options.context)
    selection = texts.blocks("selection", options.selection_tokens, options.context)
    aligned = alignment.align_activations(opened.model, calibration.batches())
    unaligned = alignment.identity(opened.model.config)
    kept = Kept(options.state)

    def test(model: Any) -> float:
        return texts.perplexity(model, options.context, options.test_tokens)

    def key(row: Row) -> str:
        return json.dumps([*row, options.steps, options.batch_tokens, options.context, options.seed])

    def as_is() -> dict[str, Any]:
        return {"after": test(opened.model), "parameters": parameters(opened.model)}

    def measured(row: Row) -> dict[str, Any]:
        record, use_aligned, (train, rate, *wide), distilled = row
        model, rewrites = models.open_model(options.model).model, []
        if record is not None:
            rewrites = [from_record(record).resolved(model.config)]
            model = apply(rewrites, model, aligned if use_aligned else unaligned, calibration=calibration)
        start = json.dumps(["before", record, use_aligned, options.context])
        before = original["after"] if record is None else kept(start, lambda: {"after": test(model)})["after"]
        result = finetune(
            model, training, selection, rewrites=rewrites, train=train, steps=options.steps,
            batch_tokens=options.batch_tokens, learning_rate=rate, teacher=opened.model if distilled else None,
            seed=options.seed, **dict(zip(("rank", "alpha"), wide, strict=False)),
        )  # fmt: skip
        return {
            "before": before,
            "after": test(model),
            "parameters": parameters(model),
            "trained": result.trainable,
            "best": result.best_step,
            "selection": [math.exp(row.nll) for row in result.evaluations],
            "rate": result.tokens / result.training_seconds,
        }

    original = kept("original", as_is)
    for row in tqdm(rows(), desc="recoveries"):
        found = kept(key(row), partial(measured, row))
        tqdm.write(f"{row}: {found['before']:.2f} -> {found['after']:.2f}", file=sys.stderr)
    text = table(kept.done, key, options, opened.name, training, texts.parts)
    show(text, options.out)


def table(done: dict[str, Any], key: Any, options: argparse.Namespace, name: str, training: Any, texts: Any) -> str:
    original = done["original"]["after"]
    found = {key(row): row for row in rows()}
    control = min(done[k]["after"] for k, row in found.items() if row[0] is None)
    lines = [
        "# Recovery",
        "",
        (__doc__ or "").split("\n\n", 2)[2].strip(),
        "",
        f"{Path(name).name}; {options.steps} steps of {options.batch_tokens:,} tokens ({training.tokens:,} in all, "
        f"context {options.context}); test: the first {options.test_tokens:,} tokens, context "
        f"{options.context} without overlap; AdamW, cosine, penalty 1e-4, seed {options.seed}; torch "
        f"{torch.__version__}. Selection: {options.selection_tokens:,} tokens. Best control: {control:.2f}.",
        "",
        "`python benchmarks/recovery_quality.py MODEL "
        f"--data {Path(options.data).name} --test {Path(options.test).name}`",
        "",
        f"Test text {texts['test'].fingerprint[:12]}, training text {texts['training'].fingerprint[:12]}.",
        "",
        "| model | settings | aligned | train | learning rate | teacher | parameters | trained | before | after | "
        "to the control | best step |",
        "| --- | --- | --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        f"| original | | | | | | {done['original']['parameters']:,} | | {original:.2f} | {original:.2f} | "
        f"{original / control:.3f} | |",
    ]
    for k, (record, use_aligned, (train, rate, *wide), distilled) in found.items():
        item = done[k]
        knobs = "" if record is None else ", ".join(f"{n}={v}" for n, v in record.items() if n != "rewrite")
        word = "" if record is None else "-" if record.get("collapse") == "fit" else "yes" if use_aligned else "no"
        way = f"{train}, rank {wide[0]}" if wide else train
        lines.append(
            f"| {'control' if record is None else record['rewrite']} | {knobs} | {word} | {way} | {rate:g} | "
            f"{'original' if distilled else ''} | {item['parameters']:,} | {item['trained']:,} | "
            f"{item['before']:.2f} | {item['after']:.2f} | {item['after'] / control:.3f} | {item['best']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
