"""Parameters and file bytes on the real GPT-2-small shape (random weights): predicted, counted, on disk.

python benchmarks/counts.py [--out FILE.md]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
import transformers
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

from compressor import models
from compressor.alignment import identity
from compressor.metrics.size import parameters, predicted_bytes, weight_bytes
from compressor.rewrites import from_record
from compressor.rewrites.compose import apply, structure

EXPECTED = {
    ("soft_shared", 4): 110_529_792,
    **{("merged_n", n): count for n, count in ((4, 110_272_512), (6, 100_827_648), (8, 91_382_784), (10, 81_937_920))},
    **{
        ("compressed_n", n): count
        for n, count in ((4, 103_176_192), (6, 89_000_448), (8, 74_824_704), (10, 60_648_960))
    },
}
FIELDS: dict[str, dict] = {
    "soft_shared": {"rank": 8, "delta_init": "svd"},
    "merged_n": {"tie": True},
    "compressed_n": {"collapse": "mean"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    original = GPT2LMHeadModel(GPT2Config()).eval()
    lines = [
        "| rewrite | n | closed form | plan | unique storages | predicted bytes | bytes on disk | header |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (name, n), expected in tqdm(EXPECTED.items()):
        rewrite = from_record({"rewrite": name, "n": n, **FIELDS[name]}).resolved(original.config)
        plan = parameters(models.build(structure([rewrite], original.config)))
        model = apply([rewrite], original, identity(original.config))
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            size = weight_bytes(Path(folder))
        count, predicted = parameters(model), predicted_bytes(parameters(model), torch.float32)
        if not expected == plan == count or not 0 <= size - predicted < 65536:
            raise SystemExit(f"{name} n={n}: expected {expected:,}, plan {plan:,}, counted {count:,}, {size:,} bytes")
        lines.append(
            f"| {name} | {n} | {expected:,} | {plan:,} | {count:,} | {predicted:,} | {size:,} | {size - predicted:,} |"
        )
    document = "\n".join(["# Counts on the GPT-2-small shape", "", "`python benchmarks/counts.py`", "", *lines]) + "\n"
    print(document)
    if options.out:
        options.out.write_text(document, encoding="utf-8")


if __name__ == "__main__":
    main()
