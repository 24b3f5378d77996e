"""What attention in blocks costs in perplexity, by kind and knob: right after the rewrite, distilled, recovered.

    python benchmarks/attention_quality.py MODEL [--data D --test D] [--recover] [--out FILE.md] [--state FILE.json]

Every layer gets it, with exact blocks of --block tokens; the test is taken at the full context, of which the exact
blocks are a small part. "nothing": the completed blocks are not seen at all, which is what any kind must beat; "log s
left out": a summary weighs as much as one token. Distilled: --distill steps of each layer towards the original's
attention output, on calibration text. Recovered: after that adapters on every linear and what is new in the attention,
the same steps on the same batches in the same order with the same seed for all, the control among them; the best state
by selection text is kept. Calibration, selection, training and test text are disjoint.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from quality import Kept, quality_parser, show
from texts import open_texts
from tqdm import tqdm
from transformers import GPT2LMHeadModel

from compressor import alignment, gpt2, models
from compressor.finetune import finetune
from compressor.metrics.cache import cache_bytes
from compressor.metrics.size import parameters
from compressor.rewrites import from_record
from compressor.rewrites.compose import apply

_UNSEEN = -1e4  # a logarithm of a mass that is none


@dataclass(frozen=True)
class Row:
    """record: of the rewrite but for its name; log_mass: what takes the place of a linformer's own."""

    name: str
    record: dict[str, Any] | None = None
    log_mass: float | None = None
    distilled: bool = False
    recovered: bool = False


def rows(block: int, width: int) -> list[Row]:
    """The rows of the table, the control first. width: of a head."""

    def linformer(slots: int, name: str = "", **more: Any) -> Row:
        record = {"rewrite": "linformer", "block": block, "slots": slots}
        return Row(f"linformer, {slots} slots{name}", {**record, **more.pop("record", {})}, **more)

    def performer(feature_map: str, features: int, **more: Any) -> Row:
        record = {"rewrite": "performer", "block": block, "feature_map": feature_map, "features": features}
        return Row(f"performer, {feature_map}, {features} features", record, **more)

    found = [Row("control", recovered=True), linformer(1, name=": nothing", log_mass=_UNSEEN)]
    found[1] = Row("nothing", found[1].record, _UNSEEN, recovered=True)
    for slots in (1, 4, 8, 16, 32):
        found.append(linformer(slots, distilled=True, recovered=slots in (1, 8)))
        if slots in (1, 8):
            found.append(linformer(slots, name=", log s left out", log_mass=0.0))
    found.append(linformer(8, name=" a head", record={"per_head": True}, distilled=True))
    for landmarks in (8, 16, 32, 64):
        for inverse in ("none", "newton"):
            record = {"rewrite": "nystromformer", "block": block, "landmarks": landmarks, "inverse": inverse}
            name = f"nystromformer, {landmarks} landmarks" + (", pseudo-inverse" if inverse == "newton" else "")
            found.append(Row(name, record, recovered=landmarks == 16))
    found += [performer("favor+", count, recovered=count == 2 * width) for count in (width, 2 * width, 8 * width)]
    found.append(performer("favor_hyp", 2 * width))
    found += [performer("relu", 2 * width, distilled=True), performer("elu", width, distilled=True)]
    found.append(performer("learned", 2 * width, distilled=True, recovered=True))
    return found


def main() -> None:
    parser = quality_parser(__doc__)
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--distill", type=int, default=50, help="steps")
    parser.add_argument("--recover", action="store_true")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--context", type=int, help="in training and in the test, without overlap; default: all")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    opened = models.open_model(options.model)
    config = opened.model.config
    context = options.context or config.n_positions
    texts = open_texts(opened, options.data, options.test, options.seed)
    calibration, selection = texts.blocks("calibration", 16384, context), texts.blocks("selection", 8192, context)
    training = texts.blocks("training", options.steps * options.batch_tokens, context)
    unaligned = alignment.identity(config)
    kept = Kept(options.state)

    def test(model: GPT2LMHeadModel) -> float:
        return texts.perplexity(model, context, options.test_tokens)

    def made(row: Row, steps: int) -> tuple[GPT2LMHeadModel, list[Any]]:
        model = models.open_model(options.model).model
        if row.record is None:
            return model, []
        record = {**row.record, "distill_steps": steps} if steps else row.record
        rewrites = [from_record(record).resolved(config)]
        model = apply(rewrites, model, unaligned, calibration=calibration)
        if row.log_mass is not None:
            for layer in range(config.n_layer):
                far = gpt2.attention(model, layer).scores.far
                gpt2.put(far, "log_mass", torch.full_like(far.log_mass, row.log_mass))
        return model, rewrites

    def before(row: Row) -> dict[str, Any]:
        model, _ = made(row, 0)
        sizes = {"parameters": parameters(model), "cache": cache_bytes(model.config, context, 4)}
        return {"value": test(model), **sizes}

    def distilled(row: Row, steps: int) -> float:
        return test(made(row, steps)[0])

    def recovered(row: Row, steps: int) -> dict[str, Any]:
        model, rewrites = made(row, steps)
        result = finetune(
            model, training, selection, rewrites=[] if row.log_mass is not None else rewrites, train="lora",
            steps=options.steps, batch_tokens=options.batch_tokens, learning_rate=options.learning_rate,
            seed=options.seed, rank=64, alpha=64.0,
        )  # fmt: skip
        return {"value": test(model), "best": result.best_step}

    lines: list[Any] = []
    for row in tqdm(rows(options.block, config.n_embd // config.n_head), desc="rows"):
        told = None if row.record is None else from_record(row.record).resolved(config).record()
        key = json.dumps([told, row.log_mass, context, options.test_tokens])
        recipe = [options.distill, options.steps, options.batch_tokens, options.learning_rate, options.seed]
        steps = options.distill if row.distilled else 0
        line = [kept(key, partial(before, row)), None, None]
        if steps:
            line[1] = kept(f"distilled {steps} {key}", partial(distilled, row, steps))
        if options.recover and row.recovered:
            line[2] = kept(f"{recipe} {key}", partial(recovered, row, steps))
        tqdm.write(f"{row.name}: {line}", file=sys.stderr)
        lines.append((row, *line))
    text = table(lines, options, context)
    show(text, options.out)


def table(lines: list[Any], options: argparse.Namespace, context: int) -> str:
    told = [f"--data {Path(options.data).name}"] + ([f"--test {Path(options.test).name}"] if options.test else [])
    told += [f"--block {options.block}"] + (["--recover"] if options.recover else [])
    told += [f"--test-tokens {options.test_tokens}"]
    original, control = lines[0][1], lines[0][3]
    text = [
        f"{Path(options.model).name}; test: the first {options.test_tokens:,} tokens, context {context} without "
        f"overlap; exact blocks of {options.block}; distilled: {options.distill} steps; recovery: {options.steps} "
        f"steps of {options.batch_tokens:,} tokens.",
        "",
        f"`python benchmarks/attention_quality.py {Path(options.model).name} {' '.join(told)}`",
        "",
        "| attention | more parameters | cache | before | to the original | distilled | recovered | to the control |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row, found, distilled, recovered in lines:
        after = f"{recovered['value']:.2f}" if recovered else "-"
        ratio = f"{recovered['value'] / control['value']:.3f}" if recovered and control else "-"
        text.append(
            f"| {row.name} | {found['parameters'] - original['parameters']:,} | "
            f"{found['cache'] / original['cache']:.3f} | {found['value']:.2f} | "
            f"{found['value'] / original['value']:.3f} | "
            f"{'-' if distilled is None or math.isnan(distilled) else f'{distilled:.2f}'} | {after} | {ratio} |"
        )
    return "\n".join(text)


if __name__ == "__main__":
    main()
