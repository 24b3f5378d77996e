"""What losses of groups of tokens are worth to models whose logits are made of a prefix of the final state.

    python benchmarks/hierarchy_quality.py MODEL [--data D --test D] [--out FILE.md] [--state FILE.json]

Sizes `--head` are nested, then recovered: the same steps on the same batches with the same seed for all, adapters of
rank 64 on every linear, the best state by the selection text's next tokens. For each prefix: perplexity of next tokens,
and of next groups (exp of the mean -log of the probability of the next token's group, by the imposed scheme `form`).
Then what clusterings find in the prefixes of the embeddings, before any recovery: scikit-learn's DBSCAN on cosines as
they are and after the mean is taken off, and the package's own. Calibration, selection, training and test text are
disjoint.
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
from sklearn.cluster import DBSCAN
from texts import Texts, open_texts
from torch import Tensor
from tqdm import tqdm
from transformers import GPT2LMHeadModel

from compressor import alignment, gpt2, models
from compressor.embedding_clusters import agreement, directions, emergent_groups
from compressor.finetune import finetune
from compressor.group_loss import group_losses
from compressor.rewrites import from_record
from compressor.rewrites.compose import apply
from compressor.rewrites.matryoshka import trained_sizes
from compressor.token_groups import imposed_groups, token_strings

WEIGHTS = (0.1, 1.0)
MEASURED = "form"  # the scheme that groups are scored by


def variants(prefixes: int) -> dict[str, dict[str, Any] | None]:
    """The settings of groups by name; kind by prefix: coarser groups for all prefixes but the longest."""
    found: dict[str, dict[str, Any] | None] = {"none": None}
    for weight in WEIGHTS:
        found[f"imposed, form, {weight:g}"] = {"kind": "imposed", "scheme": "form", "weight": weight}
        found[f"emergent, {weight:g}"] = {"kind": "emergent", "weight": weight}
    schemes = ["form", *["kind"] * (prefixes - 1)]
    found["imposed, kind by prefix, 1"] = {"kind": "imposed", "scheme": schemes, "weight": 1.0}
    return found


def main() -> None:
    parser = quality_parser(__doc__, steps=20, batch_tokens=2048, test_tokens=16384)
    parser.add_argument("--head", nargs="+", type=float, default=[0.5, 0.25, 0.125])
    parser.add_argument("--variants", nargs="*", help="default: all; none given: the clusterings alone")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    opened = models.open_model(options.model)
    config, context = opened.model.config, opened.model.config.n_positions
    strings = token_strings(opened.tokenizer, config.vocab_size)
    scored = imposed_groups(strings, MEASURED)[0]
    texts = open_texts(opened, options.data, options.test, options.seed)
    calibration = texts.blocks("calibration", options.calibration_tokens, context)
    selection = texts.blocks("selection", 4096, context)
    training = texts.blocks("training", options.steps * options.batch_tokens, context)
    kept = Kept(options.state)
    about = [vars(options)[name] for name in ("head", "steps", "batch_tokens", "learning_rate", "test_tokens", "seed")]

    def nested(groups: dict[str, Any] | None) -> tuple[Any, Any]:
        nest = {"rewrite": "matryoshka", "ffn": None, "head": options.head, "train": "joint", "inner": 0.5}
        rewrite = from_record({**nest, "groups": groups}).resolved(config)
        original = models.open_model(options.model).model
        return apply([rewrite], original, alignment.identity(config), calibration=calibration), rewrite

    def measured(groups: dict[str, Any] | None, train: bool) -> list[Any]:
        model, rewrite = nested(groups)
        if train:
            finetune(
                model, training, selection, rewrites=[rewrite], train="lora", steps=options.steps, strings=strings,
                batch_tokens=options.batch_tokens, learning_rate=options.learning_rate, seed=options.seed, rank=64,
                alpha=64.0, evaluate_every=max(1, options.steps // 2),
            )  # fmt: skip
        found = []
        for size in trained_sizes(model.config):
            cut = model.slice(head=size.head)
            value = texts.perplexity(cut, context, options.test_tokens)
            found.append([size.head, value, groups_perplexity(cut, scored, texts, context, options.test_tokens)])
        return found

    rows = []
    wanted: dict[str, tuple[dict[str, Any] | None, bool]] = {"before recovery": (None, False)}
    every = variants(len(options.head))
    asked = list(every) if options.variants is None else options.variants
    wanted = {**wanted, **{name: (every[name], True) for name in asked}} if asked else {}
    for name, (groups, train) in tqdm(wanted.items(), desc="rows"):
        found = kept(json.dumps([name, *about]), partial(measured, groups, train))
        tqdm.write(f"{name}: {found}", file=sys.stderr)
        rows.append((name, found))
    embeddings = gpt2.embeddings(nested(None)[0]).detach()
    measures = [*table(rows, options, context), ""] if rows else []
    text = "\n".join([*measures, *clusterings(embeddings, scored, options.head)])
    show(text, options.out)


@torch.no_grad()
def groups_perplexity(model: GPT2LMHeadModel, groups: Tensor, texts: Texts, context: int, tokens: int) -> float:
    """Of next groups on the test text, in the windows of perplexity."""
    blocks, total, count = texts.blocks("test", tokens, context), 0.0, 0
    for ids, mask in blocks.batches():
        hidden = gpt2.trunk(model)(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        states, head = gpt2.head_product(model, hidden.flatten(0, 1))
        real = mask[:, 1:].reshape(-1)
        targets = ids[:, 1:].reshape(-1)[real]
        total += float(group_losses(states[real], head, targets, groups))
        count += len(targets)
    return math.exp(total / count)


def table(rows: list[Any], options: argparse.Namespace, context: int) -> list[str]:
    sizes = [row[0] for row in rows[0][1]]
    text = [
        f"{Path(options.model).name}; test: {options.test_tokens:,} tokens, context {context} without overlap; "
        f"recovery: {options.steps} steps of {options.batch_tokens:,} tokens, all sizes at once; perplexity "
        f"of next tokens / of next groups ({MEASURED}) by the coordinates that logits are made of.",
        "",
        f"`python benchmarks/hierarchy_quality.py {Path(options.model).name} --data {Path(options.data).name} --steps "
        f"{options.steps} --test-tokens {options.test_tokens}`",
        "",
        f"| loss of groups, weight | {' | '.join(map(str, sizes))} |",
        f"| --- |{' ---: |' * len(sizes)}",
    ]
    for name, found in rows:
        text.append(f"| {name} | {' | '.join(f'{value:.3f} / {groups:.3f}' for _, value, groups in found)} |")
    return text


def clusterings(embeddings: Tensor, groups: Tensor, shares: list[float]) -> list[str]:
    text = [
        "| coordinates | mean cosine | clusters by | similarity | clusters | the largest | in a cluster "
        "| purity (chance) | NMI | AMI |",
        "| ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    width = embeddings.shape[1]
    for prefix in [width, *(round(share * width) for share in shares)]:
        own = embeddings[:, :prefix]
        raw = torch.nn.functional.normalize(own, dim=1)
        mean = float((raw.sum(0).square().sum() - len(raw)) / (len(raw) * (len(raw) - 1)))
        for similarity in (0.5, 0.7, 0.9):
            found = {
                "DBSCAN": _dbscan(raw, similarity),
                "DBSCAN without the mean": _dbscan(torch.from_numpy(directions(own)), similarity),
                "mutual neighbours": emergent_groups(own, minimum_similarity=similarity, minimum_group_size=3),
            }
            for name, clusters in found.items():
                sizes = torch.bincount(clusters[clusters >= 0])
                met = agreement(clusters, groups)
                told = "- | - | -"
                if met is not None:
                    told = f"{met.purity:.2f} ({met.chance:.2f}) | {met.nmi:.2f} | {met.ami:.2f}"
                largest, share = int(sizes.max()) if len(sizes) else 0, float((clusters >= 0).float().mean())
                text.append(
                    f"| {prefix} | {mean:.2f} | {name} | {similarity:g} | {len(sizes)} | {largest:,} | {share:.0%} "
                    f"| {told} |"
                )
    return text


def _dbscan(x: Tensor, similarity: float) -> Tensor:
    return torch.from_numpy(DBSCAN(eps=1 - similarity, min_samples=3, metric="cosine").fit_predict(x.numpy()))


if __name__ == "__main__":
    main()
