"""What two residual streams cost in perplexity, stage by stage: right after the rewrite, distilled, recovered.

    python benchmarks/token_factored_quality.py MODEL [--data D --test D] [--recover] [--teacher] [--out FILE.md]
        [--state FILE.json]

Every layer gets the stage. Distilled: --distill steps of each layer's attention towards the original's hidden states
after its block, on calibration text. Recovered: after that adapters on every linear, and what is no linear, the same
steps on the same batches in the same order with the same seed for all, the control among them; --teacher: towards the
original's logits in the place of next tokens, but for the control. "+ alibi": learned positions fade out too. The best
state by selection text is kept. Calibration, selection, training and test text are disjoint.
"""

from __future__ import annotations

import argparse
import json
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
from compressor.metrics.flops import flops_per_token
from compressor.metrics.size import parameters
from compressor.rewrites import from_record
from compressor.rewrites.compose import apply

CONTROL, ALIBI = "control", " + alibi"
STAGES = ("exact", "v_from_xt", "kron_v", "kron_o", "kron", "identity")
ROWS = (*STAGES, f"kron{ALIBI}", f"identity{ALIBI}")  # the last is the source's own model


def main() -> None:
    parser = quality_parser(__doc__)
    parser.add_argument("--stages", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--distill", type=int, default=50, help="steps; 0: none")
    parser.add_argument("--recover", action="store_true")
    parser.add_argument("--teacher", action="store_true", help="recover towards the original's logits")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--context", type=int, help="in training and in the test, without overlap; default: all")
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    opened = models.open_model(options.model)
    config = opened.model.config
    context = options.context or config.n_positions
    texts = open_texts(opened, options.data, options.test, options.seed)
    calibration, selection = (
        texts.blocks("calibration", options.calibration_tokens, context),
        texts.blocks("selection", 8192, context),
    )
    training = texts.blocks("training", options.steps * options.batch_tokens, context)
    unaligned = alignment.identity(config)
    kept = Kept(options.state)
    about = [context, options.test_tokens, options.calibration_tokens, options.seed]
    recipe = [options.steps, options.batch_tokens, options.learning_rate, options.teacher]

    def key(*what: Any) -> str:
        return json.dumps([*what, *about])

    def test(model: GPT2LMHeadModel) -> float:
        return texts.perplexity(model, context, options.test_tokens)

    def made(stage: str, steps: int) -> tuple[GPT2LMHeadModel, list[Any]]:
        model = models.open_model(options.model).model
        if stage == CONTROL:
            return model, []
        record = {"rewrite": "token_factored", "stage": stage.removesuffix(ALIBI), "distill_steps": steps}
        rewrites = [from_record(record).resolved(config)]
        if stage.endswith(ALIBI):
            rewrites.append(from_record({"rewrite": "alibi"}))
        return apply(rewrites, model, unaligned, calibration=calibration), rewrites

    def before(stage: str) -> dict[str, Any]:
        model, _ = made(stage, 0)
        return {"value": test(model), "parameters": parameters(model), "flops": flops_per_token(model.config, context)}

    def distilled(stage: str, steps: int) -> float:
        return test(made(stage, steps)[0])

    def recovered(stage: str, steps: int) -> dict[str, Any]:
        model, rewrites = made(stage, steps)
        result = finetune(
            model, training, selection, rewrites=rewrites, train="lora", steps=options.steps,
            batch_tokens=options.batch_tokens, learning_rate=options.learning_rate, seed=options.seed, rank=64,
            alpha=64.0,
            teacher=models.open_model(options.model).model if options.teacher and stage != CONTROL else None,
        )  # fmt: skip
        return {"value": test(model), "best": result.best_step}

    lines = []
    for stage in tqdm([CONTROL, *options.stages], desc="rows"):
        steps = 0 if stage in (CONTROL, "exact") else options.distill
        line = [kept(key(stage), partial(before, stage)), None, None]
        if steps:
            line[1] = kept(key(stage, steps), partial(distilled, stage, steps))
        if options.recover:
            line[2] = kept(key(stage, steps, recipe), partial(recovered, stage, steps))
        tqdm.write(f"{stage}: {line}", file=sys.stderr)
        lines.append((stage, *line))
    text = table(lines, options, context)
    show(text, options.out)


def table(lines: list[Any], options: argparse.Namespace, context: int) -> str:
    told = [f"--data {Path(options.data).name}"] + ([f"--test {Path(options.test).name}"] if options.test else [])
    told += [flag for flag, given in (("--recover", options.recover), ("--teacher", options.teacher)) if given]
    told += [f"--distill {options.distill}", f"--test-tokens {options.test_tokens}"]
    original, control = lines[0][1], lines[0][3]
    text = [
        f"{Path(options.model).name}; test: the first {options.test_tokens:,} tokens, context {context} without "
        f"overlap; distilled: {options.distill} steps a layer on {options.calibration_tokens:,} tokens; recovery: "
        f"{options.steps} steps of {options.batch_tokens:,} tokens.",
        "",
        f"`python benchmarks/token_factored_quality.py {Path(options.model).name} {' '.join(told)}`",
        "",
        "| stage | more parameters | operations a token | before | distilled | recovered | to the control |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for stage, found, distilled, recovered in lines:
        after = f"{recovered['value']:.2f}" if recovered else "-"
        ratio = f"{recovered['value'] / control['value']:.3f}" if recovered else "-"
        text.append(
            f"| {stage} | {found['parameters'] - original['parameters']:,} | {found['flops'] / original['flops']:.3f} "
            f"| {found['value']:.2f} | {'-' if distilled is None else f'{distilled:.2f}'} "
            f"| {after} | {ratio} |"
        )
    return "\n".join(text)


if __name__ == "__main__":
    main()
