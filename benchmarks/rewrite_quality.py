"""What each rewrite costs right after it, before any recovery: one table.

    python benchmarks/rewrite_quality.py MODEL --calibration D --selection D --test D [--out FILE.md]

One alignment serves all rows. The window is the middle one; `best start` rows take the start with the lowest perplexity
on the selection text and are then measured, like all others, on the test text.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from quality import Kept, show
from tqdm import tqdm
from transformers import GPT2Config

from compressor import alignment, data, models
from compressor.metrics.perplexity import perplexity
from compressor.metrics.size import non_zero, parameters
from compressor.rewrites import from_record
from compressor.rewrites.compose import apply, structure

SIZES = (4, 6, 8, 10)


def records(config: GPT2Config) -> list[tuple[dict[str, Any], bool | None]]:
    """(rewrite record, aligned) of every row; None: alignment plays no part."""
    rows: list[tuple[dict[str, Any], bool | None]] = []
    for aligned in (True, False):
        for rank in (0, 8, 32):
            for base, delta_init in (("mean", "svd"), ("mean", "asvd"), ("lsq", "asvd")):
                record = {"rewrite": "soft_shared", "n": 4, "rank": rank, "base": base, "delta_init": delta_init}
                rows.append((record, aligned))
        for n in SIZES:
            for average in ("mean", "activation-weighted"):
                rows.append(({"rewrite": "merged_n", "n": n, "tie": True, "average": average}, aligned))
            for collapse in ("mean", "sum", "laco"):
                rows.append(({"rewrite": "compressed_n", "n": n, "collapse": collapse}, aligned))
    for n in SIZES:
        for collapse in ("keep", "fit"):
            rows.append(({"rewrite": "compressed_n", "n": n, "collapse": collapse}, None))
    for n in SIZES:  # baselines: as many blocks, as many parameters that are not 0
        as_many = parameters(models.build(structure([from_record({"rewrite": "compressed_n", "n": n})], config)))
        rows += [({"rewrite": "dropped_n", "n": n}, None), ({"rewrite": "pruned", "parameters": as_many}, None)]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    for part in ("calibration", "selection", "test"):
        parser.add_argument(f"--{part}", required=True)
    parser.add_argument("--max-tokens", type=int, default=65536, help="of the test text")
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument("--selection-tokens", type=int, default=16384)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--only", action="append", help="rows whose rewrite has this name; may stand several times")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--state", type=Path, help="rows that are done are kept here; a killed run goes on")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()

    opened = models.open_model(options.model)
    sources = {
        "calibration": options.calibration,
        "selection": options.selection,
        "training": options.selection,
        "test": options.test,
    }
    texts = {part: data.recipe_text(sources, part) for part in ("calibration", "selection", "test")}
    blocks = data.token_blocks(
        texts["calibration"],
        opened.tokenizer,
        context=opened.model.config.n_positions,
        max_tokens=options.calibration_tokens,
        seed=0,
        evenly=True,
    )
    started = time.perf_counter()
    aligned = alignment.align_activations(opened.model, blocks.batches())
    unaligned = alignment.identity(opened.model.config)

    def score(model: Any, part: str, tokens: int) -> float:
        return perplexity(
            model, opened.tokenizer, texts[part], context=options.context, stride=options.context, max_tokens=tokens
        )[0].value

    def make(record: dict[str, Any], use: alignment.Alignments) -> Any:
        rewrite = from_record(record).resolved(opened.model.config)
        return apply([rewrite], opened.model, use, calibration=blocks)

    base = score(opened.model, "test", options.max_tokens)
    size = parameters(opened.model)
    lines = [f"| original | | | {size:,} | {base:.2f} | 1.000 |"]

    kept = Kept(options.state)

    def add(record: dict[str, Any], use_aligned: bool | None, note: str = "") -> None:
        key = json.dumps([record, use_aligned, options.max_tokens, options.context])
        lines.append(kept(key, partial(line, record, use_aligned, note)))
        tqdm.write(lines[-1], file=sys.stderr)

    def line(record: dict[str, Any], use_aligned: bool | None, note: str) -> str:
        model = make(record, aligned if use_aligned is not False else unaligned)
        value = score(model, "test", options.max_tokens)
        if record["rewrite"] == "dropped_n":
            record = model.config.compression[0]  # with the layers that were chosen
        knobs = ", ".join(f"{key}={setting}" for key, setting in record.items() if key != "rewrite") + note
        word = {True: "yes", False: "no", None: "-"}[use_aligned]
        return f"| {record['rewrite']} | {knobs} | {word} | {non_zero(model):,} | {value:.2f} | {value / base:.3f} |"

    chosen = [row for row in records(opened.model.config) if options.only is None or row[0]["rewrite"] in options.only]
    for record, use_aligned in tqdm(chosen, desc="rewrites"):
        add(record, use_aligned)
    if options.only is None or "compressed_n" in options.only:
        n_layer = opened.model.config.n_layer
        for n in tqdm(SIZES, desc="best starts"):
            record = {"rewrite": "compressed_n", "n": n, "collapse": "fit"}
            starts = {
                start: score(make({**record, "start": start}, aligned), "selection", options.selection_tokens)
                for start in range(n_layer - n + 1)
            }
            add({**record, "start": min(starts, key=lambda start: starts[start])}, None, " (best start)")

    source = {
        part: f"{Path(text.source).parent.name}/{Path(text.source).stem} {text.split}" for part, text in texts.items()
    }
    head = [
        "# Rewrites before recovery",
        "",
        f"`{Path(sys.argv[0]).name} {Path(options.model).name}`: calibration {blocks.tokens:,} tokens of "
        f"{source['calibration']}, selection {options.selection_tokens:,} of {source['selection']}, test first "
        f"{options.max_tokens:,} tokens of {source['test']} (fingerprint {texts['test'].fingerprint[:12]}). "
        f"Perplexity: protocol strided, context {options.context}, stride {options.context}, summed NLL "
        f"over counted tokens. Window: the middle one, anchor middle. float32, seed 0, "
        f"{time.perf_counter() - started:.0f} s.",
        "",
        "| rewrite | fields | aligned | parameters not 0 | perplexity | ratio |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    show("\n".join([*head, *lines]), options.out)


if __name__ == "__main__":
    main()
