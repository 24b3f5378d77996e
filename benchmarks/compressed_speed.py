"""Does compressed_n get as fast as its block count says? Prefill and decode beside a prediction.

    python -m benchmarks.compressed_speed [--repeats 15] [--prompt 256] [--out FILE.md]

GPT-2-small shape, random weights, one process, models interleaved by the latency metric. What embeddings, last norm and
head cost is measured on the same model without blocks; a model of b blocks is predicted to take that + b / 12 of what
the 12 blocks of the original take.
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from compressor.alignment import identity
from compressor.metrics.latency import interleaved
from compressor.rewrites.compose import apply
from compressor.rewrites.compressed_n import CompressedN

SIZES, BAR = (4, 6, 8, 10), 0.10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--out", type=Path, help="also write the Markdown here")
    given = parser.parse_args()
    torch.manual_seed(0)
    original = GPT2LMHeadModel(GPT2Config()).eval()
    bare = GPT2LMHeadModel(GPT2Config(n_layer=1)).eval()
    bare.transformer.h = torch.nn.ModuleList()  # embeddings, last norm and head alone
    models = {"original": original, "no blocks": bare}
    for n in SIZES:
        rewrite = CompressedN(n=n, collapse="keep").resolved(original.config)
        models[f"compressed_{n}"] = apply([rewrite], original, identity(original.config))
    seconds = interleaved(
        list(models.values()), given.batch, given.prompt, given.new_tokens, repeats=given.repeats, warm_up=2
    )
    seconds[:, 1] /= given.new_tokens
    lines = [
        "# Speed of compressed_n",
        "",
        (__doc__ or "").split("\n\n")[2].strip(),
        "",
        "`python -m benchmarks.compressed_speed`",
        "",
        f"Batch {given.batch}, prompt {given.prompt}, {given.new_tokens} new tokens, {given.repeats} repeats, float32, "
        f"{torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}.",
        "",
        "| regime | model | blocks | median ms | predicted ms | measured / predicted | ratio to the original |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    worst = 0.0
    for regime, name_of in enumerate(("prefill", "decode")):
        milliseconds = {name: 1e3 * float(np.median(row[regime])) for name, row in zip(models, seconds, strict=True)}
        fixed, whole = milliseconds["no blocks"], milliseconds["original"]
        for name, model in models.items():
            blocks = len(model.transformer.h)
            predicted = fixed + blocks / 12 * (whole - fixed)
            # every repeat against the prediction from the same repeat: a slow minute hits all of them
            index = list(models).index(name)
            both = seconds[[1, 0], regime]
            ratio = float(np.median(seconds[index, regime] / (both[0] + blocks / 12 * (both[1] - both[0]))))
            if name.startswith("compressed"):
                worst = max(worst, abs(ratio - 1))
            lines.append(
                f"| {name_of} | {name} | {blocks} | {milliseconds[name]:.2f} | {predicted:.2f} | {ratio:.3f} | "
                f"{milliseconds[name] / whole:.3f} |"
            )
    lines += ["", f"Furthest from the prediction: {worst:.1%}; bar: {BAR:.0%}."]
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if given.out is not None:
        given.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
