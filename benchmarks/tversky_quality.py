"""What a Tversky bank of K features costs, before and after recovery, beside soft_shared and plain SVD of equal size.

    python benchmarks/tversky_quality.py MODEL [--data D --test D] [--recover] [--out FILE.md] [--state FILE.json]

K is a part of the input's width. Shared: one bank for all layers; unshared: each projection's own. pca, asvd: the
features, with prototypes by least squares; svd: the plain truncated SVD of the weights in the same structure (no text
is used). soft_shared: the smallest window that reaches the parameters of the unshared row, of the rank that comes
nearest to it. Calibration, selection, training and test text are disjoint. Every recovery runs the same steps on the
same batches in the same order with the same seed and keeps its best state by the selection text: tversky rows train
banks, prototypes and scalars (`deltas`), soft_shared and the control adapters (`lora`).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from quality import Kept, quality_parser, show
from texts import open_texts
from tqdm import tqdm
from transformers import GPT2Config

from compressor import alignment, models
from compressor.finetune import finetune
from compressor.metrics.size import parameters
from compressor.rewrites import from_record
from compressor.rewrites.compose import apply, structure

PARTS = (1.0, 0.75, 0.5, 0.375, 0.25)
Row = tuple[str, float | None, dict[str, Any] | None, bool]  # name, K / d, rewrite, recovered too


def rows(config: GPT2Config, targets: list[str]) -> list[Row]:
    found: list[Row] = [("control", None, None, True)]
    for part in PARTS:
        common = {"rewrite": "tversky", "targets": targets, "bank_size": part}
        for share, word in (("none", "unshared"), ("global", "shared")):
            for basis in ("pca", "asvd"):
                record = {**common, "share": share, "basis": basis}
                found.append((f"tversky, {word}, {basis}", part, record, basis == "asvd"))
            if part < 1:
                record = {**common, "share": share, "basis": "svd", "refit": False}
                found.append((f"plain SVD, {word}", part, record, share == "none"))
            matched = as_large(config, size(config, {**common, "share": share}))
            if matched is not None:
                found.append((f"soft_shared, as large as {word}", part, matched, True))
    return found


def size(config: GPT2Config, record: dict[str, Any] | None) -> int:
    """Parameters of the model that a rewrite makes."""
    rewrites = [] if record is None else [from_record(record).resolved(config)]
    return parameters(models.build(structure(rewrites, config)))


def as_large(config: GPT2Config, wanted: int) -> dict[str, Any] | None:
    """The soft_shared of the smallest window and the rank that come nearest to a parameter count; None: none does."""
    for n in range(2, config.n_layer + 1):
        record = {"rewrite": "soft_shared", "n": n, "rank": 0, "base": "lsq", "delta_init": "asvd"}
        none, one = size(config, record), size(config, {**record, "rank": 1})
        if none <= wanted < size(config, None):
            return {**record, "rank": round((wanted - none) / (one - none))}
    return None


def main() -> None:
    parser = quality_parser(__doc__)
    parser.add_argument("--targets", default="c_fc", help="with commas between")
    parser.add_argument("--recover", action="store_true")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of tversky rows; others 3e-3")
    parser.add_argument("--context", type=int, default=256, help="in training and in the test, which has no overlap")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    opened = models.open_model(options.model)
    config, targets = opened.model.config, options.targets.split(",")
    texts = open_texts(opened, options.data, options.test, options.seed)
    calibration = texts.blocks("calibration", 16384, config.n_positions)
    training, selection = (
        texts.blocks("training", options.steps * options.batch_tokens, options.context),
        texts.blocks("selection", 8192, options.context),
    )
    aligned = alignment.align_activations(opened.model, calibration.batches())
    kept = Kept(options.state)

    def test(model: Any) -> float:
        return texts.perplexity(model, options.context, options.test_tokens)

    def key(row: Row, *more: Any) -> str:
        return json.dumps([row[2], options.context, options.test_tokens, *more])

    def made(record: dict[str, Any] | None) -> tuple[Any, list[Any]]:
        model = models.open_model(options.model).model
        if record is None:
            return model, []
        rewrites = [from_record(record).resolved(config)]
        return apply(rewrites, model, aligned, calibration=calibration), rewrites

    def before(record: dict[str, Any] | None) -> dict[str, Any]:
        model, _ = made(record)
        return {"value": test(model), "parameters": parameters(model)}

    def recovered(record: dict[str, Any] | None, train: Any, rate: float) -> dict[str, Any]:
        model, rewrites = made(record)
        result = finetune(
            model, training, selection, rewrites=rewrites, train=train, steps=options.steps,
            batch_tokens=options.batch_tokens, learning_rate=rate, seed=options.seed, rank=64, alpha=64.0,
        )  # fmt: skip
        return {"value": test(model), "best": result.best_step, "trained": result.trainable}

    original = kept("original", partial(test, opened.model))
    lines: list[Any] = []
    for row in tqdm(rows(config, targets), desc="rows"):
        name, part, record, wanted = row
        train, rate = ("deltas", options.learning_rate) if record and record["rewrite"] == "tversky" else ("lora", 3e-3)
        after = key(row, options.steps, options.batch_tokens, train, rate, options.seed)
        start, end = kept(key(row), partial(before, record)), None
        if options.recover and wanted:
            end = kept(after, partial(recovered, record, train, rate))
        tqdm.write(f"{name} {part}: {start['value']:.2f} {end and round(end['value'], 2)}", file=sys.stderr)
        lines.append((row, start, end))
    control = next((end["value"] for row, _, end in lines if row[2] is None and end), math.nan)
    text = table(lines, original, control, options)
    show(text, options.out)


def table(lines: list[Any], original: float, control: float, options: argparse.Namespace) -> str:
    told = [f"--data {Path(options.data).name}"] + ([f"--test {Path(options.test).name}"] if options.test else [])
    told += [f"--targets {options.targets}"] + (["--recover"] if options.recover else [])
    text = [
        f"{Path(options.model).name}, targets {options.targets}; test: the first {options.test_tokens:,} tokens, "
        f"context {options.context} without overlap; recovery: {options.steps} steps of "
        f"{options.batch_tokens:,} tokens.",
        "",
        f"`python benchmarks/tversky_quality.py {Path(options.model).name} {' '.join(told)}`",
        "",
        "| model | K / d | parameters | before | to the original | after | to the control | best step |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (name, part, record, _), start, end in lines:
        if record and record["rewrite"] == "soft_shared":
            name = f"{name}: n={record['n']}, rank {record['rank']}"
        after = f"{end['value']:.2f} | {end['value'] / control:.3f} | {end['best']}" if end else "- | - | -"
        text.append(
            f"| {name} | {'' if part is None else part} | {start['parameters']:,} | {start['value']:.2f} | "
            f"{start['value'] / original:.3f} | {after} |"
        )
    return "\n".join(text)


if __name__ == "__main__":
    main()
