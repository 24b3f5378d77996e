"""Every size nested in one checkpoint beside models of the same size recovered alone, and others of equal parameters.

    python benchmarks/matryoshka_quality.py MODEL [--data D --test D] [--ffn 0.5 ...] [--width ...] [--depth ...]
        [--head ...] [--train joint|sandwich|one] [--out FILE.md] [--state FILE.json]

Alone: the size is cut out of the rewritten model before any training and gets --steps of its own. Nested: one model
with all sizes, trained for what these and the whole model, alone, cost together: as many steps where each takes all
sizes (joint), as many times more steps as there are sizes where each takes one. Of equal parameters, for sizes of FFNs
alone: soft_shared in tiles, n the least that leaves room for deltas, whose rank fills it up; compressed_n of as many
blocks as come nearest. All rows train the same way with the same seed and keep their best state by selection text.
--teacher: all rows but the control learn from the original's predictions.
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
from transformers import GPT2Config, GPT2LMHeadModel

from compressor import alignment, gpt2, models
from compressor.finetune import finetune
from compressor.metrics.size import parameters
from compressor.modeling.nesting import FULL, Size
from compressor.rewrites import from_record
from compressor.rewrites.compose import apply, structure
from compressor.rewrites.matryoshka import trained_sizes


def main() -> None:
    parser = quality_parser(__doc__)
    for name in FULL:
        parser.add_argument(f"--{name}", type=float, nargs="*", default=[], metavar="SHARE")
    parser.add_argument("--train", nargs="+", default=["one"], choices=["joint", "sandwich", "one"])
    parser.add_argument("--inner", type=float, default=0.0)
    parser.add_argument("--teacher", action="store_true")
    parser.add_argument("--others", action="store_true", help="soft_shared and compressed_n too")
    parser.add_argument("--mode", default="lora", choices=["lora", "full"])
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    opened = models.open_model(options.model)
    config, context = opened.model.config, opened.model.config.n_positions
    texts = open_texts(opened, options.data, options.test, options.seed)
    calibration = texts.blocks("calibration", options.calibration_tokens, context)
    selection = texts.blocks("selection", 8192, context)
    aligned = alignment.align_activations(opened.model, calibration.batches())
    kept = Kept(options.state)
    about = [options.steps, options.batch_tokens, options.learning_rate, options.mode, options.teacher,
             options.test_tokens, options.calibration_tokens, options.seed]  # fmt: skip

    def test(model: GPT2LMHeadModel) -> float:
        return texts.perplexity(model, context, options.test_tokens)

    def made(record: dict[str, Any] | None) -> tuple[GPT2LMHeadModel, list[Any]]:
        model = models.open_model(options.model).model
        if record is None:
            return model, []
        rewrites = [from_record(record).resolved(config)]
        return apply(rewrites, model, aligned, calibration=calibration), rewrites

    def row(record: dict[str, Any] | None, times: int = 1) -> dict[str, Any]:
        """Perplexity of each size, or of the one model, before and after."""
        found = kept(json.dumps([record, times, *about]), partial(measured, record, times))
        tqdm.write(f"{record}: {found}", file=sys.stderr)
        return found

    def measured(record: dict[str, Any] | None, times: int) -> dict[str, Any]:
        model, rewrites = made(record)
        sizes = [*map(name_of, trained_sizes(model.config)[1:])] if is_nested(model) else []
        found = {"parameters": parameters(model), "before": tested(model, sizes)}
        steps = times * options.steps
        result = finetune(
            model, texts.blocks("training", steps * options.batch_tokens, context), selection, rewrites=rewrites,
            train=options.mode, steps=steps, batch_tokens=options.batch_tokens, learning_rate=options.learning_rate,
            seed=options.seed, rank=64, alpha=64.0,
            teacher=models.open_model(options.model).model if options.teacher and record is not None else None,
        )  # fmt: skip
        return {**found, "after": tested(model, sizes), "best": result.best_step, "seconds": result.seconds}

    def tested(model: Any, sizes: list[str]) -> dict[str, float]:
        return {"whole": test(model), **{name: test(model.slice(**choice_of(name))) for name in sizes}}

    parts = {name: getattr(options, name) or None for name in FULL}
    nested: dict[str, Any] = {"rewrite": "matryoshka", **parts, "inner": options.inner}
    whole = models.build(structure([from_record(nested).resolved(config)], config))
    sizes = trained_sizes(whole.config)
    control = row(None)
    runs = {
        train: row({**nested, "train": train}, len(sizes) if train == "one" else 1)
        for train in tqdm(options.train, desc="nested")
    }
    lines = []
    for size in tqdm(sizes[1:], desc="alone"):
        name = name_of(size)
        alone = row({**nested, "only": choice_of(name)})
        others = {}
        narrow = size._replace(ffn=sizes[0].ffn) == sizes[0]  # in nothing but its FFNs
        if options.others and narrow:
            records = {"soft_shared": shared_record(config, alone["parameters"]),
                       "compressed_n": shallow_record(config, alone["parameters"])}  # fmt: skip
            others = {other: (record, row(record)) for other, record in records.items()}
        lines.append((name, alone, others))
    text = table(options, control, runs, lines)
    show(text, options.out)


def is_nested(model: GPT2LMHeadModel) -> bool:
    entry: dict[str, Any] = getattr(model.config, "matryoshka", None) or {}
    return any(len(entry.get(name, ())) > 1 for name in FULL)


def name_of(size: Size) -> str:
    return f"ffn={size.ffn[0]} width={size.width} depth={size.depth} head={size.head}"


def choice_of(name: str) -> dict[str, int]:
    found = {key: int(value) for key, value in (word.split("=") for word in name.split())}
    if found["head"] == found["width"]:
        del found["head"]
    return found


def shared_record(config: GPT2Config, count: int) -> dict[str, Any]:
    """soft_shared of at most so many parameters."""
    d, ff, layers = config.n_embd, gpt2.d_ff(config), config.n_layer
    for n in range(2, layers + 1):
        record = {"rewrite": "soft_shared", "n": n, "rank": 0, "scope": "tile", "base": "lsq"}
        least = parameters(models.build(structure([from_record(record).resolved(config)], config)))
        if layers % n == 0 and least <= count:
            return {**record, "rank": (count - least) // (2 * layers * (d + ff))}
    raise ValueError(f"no soft_shared of {count:,} parameters")


def shallow_record(config: GPT2Config, count: int) -> dict[str, Any]:
    """compressed_n of about so many parameters."""

    def record(n: int) -> dict[str, Any]:
        return {"rewrite": "compressed_n", "n": n, "collapse": "fit"}

    def far(n: int) -> int:
        built = models.build(structure([from_record(record(n)).resolved(config)], config))
        return abs(parameters(built) - count)

    return record(min(range(2, config.n_layer + 1), key=far))


def table(options: argparse.Namespace, control: Any, runs: dict[str, Any], lines: list[Any]) -> str:
    told = [f"--data {Path(options.data).name}"] + ([f"--test {Path(options.test).name}"] if options.test else [])
    for name in FULL:
        if getattr(options, name):
            told.append(f"--{name} {' '.join(f'{share:g}' for share in getattr(options, name))}")
    told += [flag for flag, given in (("--teacher", options.teacher), ("--others", options.others)) if given]
    told += [f"--train {' '.join(options.train)}", f"--inner {options.inner:g}", f"--mode {options.mode}"]
    told += [f"--learning-rate {options.learning_rate:g}", f"--steps {options.steps}"]
    told += [f"--test-tokens {options.test_tokens}"]
    heads = [word for train in runs for word in (f"nested ({train})", "to alone")]
    text = [
        f"`python benchmarks/matryoshka_quality.py {Path(options.model).name} {' '.join(told)}`",
        "",
        f"Original {control['before']['whole']:.2f}, control {control['after']['whole']:.2f}; the whole model nested: "
        + ", ".join(f"{run['after']['whole']:.2f} ({train})" for train, run in runs.items()),
        "",
        f"| size | parameters | before | alone | {' | '.join(heads)} | soft_shared | compressed_n |",
        "| --- | " + "---: | " * (5 + len(heads)),
    ]
    for name, alone, others in lines:
        own = alone["after"]["whole"]
        cells = [name, f"{alone['parameters']:,}", f"{alone['before']['whole']:.2f}", f"{own:.2f}"]
        for run in runs.values():
            cells += [f"{run['after'][name]:.2f}", f"{run['after'][name] / own:.3f}"]
        for record, found in others.values():
            rank = f", rank {record['rank']}" if "rank" in record else ""
            cells.append(f"{found['after']['whole']:.2f} (n={record['n']}{rank}, {found['parameters']:,})")
        text.append("| " + " | ".join(cells + ["-"] * (2 - len(others))) + " |")
    return "\n".join(text)


if __name__ == "__main__":
    main()
