"""What models side by side in one are worth: perplexity of the whole and of every part, before and after recovery.

    python benchmarks/fractal_quality.py MODEL [--data D --test D] [--split 2 --levels 2] [--variants KEY=VALUE,... ...]
        [--train lora] [--steps 40] [--out FILE.md] [--state FILE.json]

A variant is a setting of the rewrite, such as groups=mixed,share=all; "control" is the model itself, trained as whole
models are. All take the same steps on the same batches in the same order with the same seed; the best state by
selection text is kept. A level's figure is the geometric mean over its parts, in parentheses the best and the worst of
them. Own: each part on the test text that is like its own stream, where streams are clusters. Calibration, selection,
training and test text are disjoint.
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
from transformers import GPT2LMHeadModel

from compressor import alignment, models
from compressor.finetune import finetune
from compressor.fractal_training import mean_embeddings, of_part
from compressor.metrics.flops import flops_per_token
from compressor.metrics.size import parameters
from compressor.modeling.fractal import parts_of_levels
from compressor.rewrites import from_record
from compressor.rewrites.compose import apply
from compressor.rewrites.partition import divide, fall_into
from compressor.training_rows import TokenRows

CONTROL = "control"
VARIANTS = ("", "share=all", "stream=cluster")


def main() -> None:
    parser = quality_parser(__doc__, steps=40, test_tokens=16384)
    parser.add_argument("--split", type=int, default=2)
    parser.add_argument("--levels", type=int, default=2)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument("--train", default="lora")
    parser.add_argument("--rank", type=int, default=64, help="of adapters")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--context", type=int, help="in training and in the test, without overlap; default: all")
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    opened = models.open_model(options.model)
    config = opened.model.config
    context = options.context or config.n_positions
    texts = open_texts(opened, options.data, options.test, options.seed)
    calibration, selection, training, test = (
        texts.blocks(part, tokens, context)
        for part, tokens in (
            ("calibration", options.calibration_tokens),
            ("selection", 4096),
            ("training", options.steps * options.batch_tokens),
            ("test", options.test_tokens),
        )
    )
    smallest = options.split**options.levels
    division, _ = divide(mean_embeddings(opened.model, training), smallest)
    streams = fall_into(division, mean_embeddings(opened.model, test), smallest)

    def perplexity(model: GPT2LMHeadModel, rows: list[int] | None = None) -> float | None:
        chosen = range(len(test.ids)) if rows is None else rows
        nll = TokenRows(test).nll(model, chosen)
        return math.exp(nll / TokenRows(test).count(chosen)) if len(chosen) else None

    def measured(model: Any) -> dict[str, Any]:
        found: dict[str, Any] = {"whole": perplexity(model), "parts": {}}
        for part in parts_of_levels(model.config) if getattr(model.config, "fractal", None) else []:
            cut = model.part(part.level, part.place)
            own = of_part(streams, part, model.config).nonzero()[:, 0].tolist()
            found["parts"][part.name] = {
                "all": perplexity(cut), "own": perplexity(cut, own), "whole_there": perplexity(model, own),
                "parameters": parameters(cut), "flops": flops_per_token(cut, context),
            }  # fmt: skip
        return found

    def row(variant: str) -> dict[str, Any]:
        model = models.open_model(options.model).model
        rewrites = []
        if variant != CONTROL:
            fields = dict(item.split("=") for item in variant.split(",") if item)
            given: dict[str, Any] = {key: float(value) if key == "inner" else value for key, value in fields.items()}
            record = {"rewrite": "fractal", "split": options.split, "levels": options.levels, **given}
            rewrites = [from_record(record).resolved(config)]
            model = apply(rewrites, model, alignment.identity(config), calibration=calibration)
        found = {"before": measured(model), "parameters": parameters(model), "flops": flops_per_token(model, context)}
        result = finetune(
            model, training, selection, rewrites=rewrites, train=options.train, steps=options.steps,
            batch_tokens=options.batch_tokens, learning_rate=options.learning_rate, seed=options.seed,
            rank=options.rank, alpha=float(options.rank),
        )  # fmt: skip
        return {**found, "after": measured(model), "seconds": result.seconds, "best": result.best_step}

    kept = Kept(options.state)
    about = [options.split, options.levels, options.train, options.rank, options.steps, options.batch_tokens]
    about += [options.learning_rate, context, options.calibration_tokens, options.test_tokens, options.seed]
    lines = []
    for variant in tqdm([CONTROL, *options.variants], desc="rows"):
        found = kept(json.dumps([variant, *about]), partial(row, variant))
        lines.append((variant, found))
        tqdm.write(f"{variant}: {told(found)}", file=sys.stderr)
    text = table(lines, options, context)
    show(text, options.out)


def level(found: dict[str, Any], number: int, which: str) -> str:
    """The geometric mean over a level's parts, and its ends."""
    values = [part[which] for name, part in found["parts"].items() if name.startswith(f"{number}_") and part[which]]
    if not values:
        return "-"
    mean = math.exp(sum(map(math.log, values)) / len(values))
    return f"{mean:.2f} ({min(values):.2f} to {max(values):.2f})"


def told(found: dict[str, Any]) -> dict[str, Any]:
    levels = sorted({int(name.split("_")[0]) for name in found["before"]["parts"]})
    return {
        when: [f"{found[when]['whole']:.2f}", *(level(found[when], number, "all") for number in levels),
               *(level(found[when], number, "own") for number in levels)]
        for when in ("before", "after")
    } | {"seconds": round(found["seconds"]), "best": found["best"]}  # fmt: skip


def table(lines: list[Any], options: argparse.Namespace, context: int) -> str:
    levels = range(1, options.levels + 1)
    given = " ".join(f'"{variant}"' for variant in options.variants)
    heads = [f"level {number}" for number in levels] + [f"level {number}, own" for number in levels]
    text = [
        f"{Path(options.model).name}; split {options.split}, levels {options.levels}; test: {options.test_tokens:,} "
        f"tokens, context {context} without overlap; recovery ({options.train}): {options.steps} steps of "
        f"{options.batch_tokens:,} tokens.",
        "",
        f"`python benchmarks/fractal_quality.py {Path(options.model).name} --steps {options.steps} --batch-tokens "
        f"{options.batch_tokens} --context {context} --test-tokens {options.test_tokens} --variants {given}`",
        "",
        f"| variant | | whole | {' | '.join(heads)} |",
        f"| --- | --- | ---: |{' ---: |' * len(heads)}",
    ]
    for variant, found in lines:
        for when in ("before", "after"):
            cells = [level(found[when], number, which) for which in ("all", "own") for number in levels]
            name = variant or "as it is"
            text.append(f"| {name} | {when} | {found[when]['whole']:.2f} | {' | '.join(cells)} |")
    parts = lines[-1][1]["after"]["parts"]
    for number in levels if parts else ():
        part = parts[f"{number}_0"]
        told = f"{part['parameters']:,} parameters, {part['flops']:,} operations a token"
        text += ["", f"A part of level {number}: {told} (the model: {lines[0][1]['flops']:,} operations)."]
    return "\n".join(text)


if __name__ == "__main__":
    main()
