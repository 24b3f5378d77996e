"""How many tokens a second recovery trains on, beside the straightforward way: transformers' Trainer.

    python benchmarks/recovery_speed.py [--shape demo] [--train full] [--steps 8] [--rounds 5] [--threads 2]

The same model, rows, batch, precision, optimiser (AdamW, cosine, clipping at 1) and trained parameters on both sides,
dropout off, random weights and tokens. Both run in one process by turns; a step's time is from the end of the step
before it, the first two steps of every turn are not counted. The median over all steps, the ratio by turns.
The last losses stand beside each other: both did the same work.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Sequence

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    logging,
)

from compressor.alignment import identity
from compressor.data import TokenBlocks
from compressor.finetune import finetune
from compressor.rewrites import Rewrite
from compressor.rewrites.compose import apply
from compressor.rewrites.soft_shared import SoftShared

SHAPES = {  # layers, d, heads, context, vocabulary, rows of a forward pass, rows of a step
    "tiny": (3, 32, 2, 32, 128, 4, 8),
    "demo": (12, 128, 4, 256, 2048, 8, 16),
    "gpt2": (12, 768, 12, 1024, 50257, 2, 4),
}
SKIPPED = 2  # steps at the start of a turn that are not counted


class Clock(TrainerCallback):
    """When each step of the Trainer ended, and the losses it logged."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.losses: list[float] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.ends.append(time.perf_counter())

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self.losses += [logs["loss"]] if logs and "loss" in logs else []


def ours(
    model: GPT2LMHeadModel, blocks: TokenBlocks, rewrites: Sequence[Rewrite], options: argparse.Namespace
) -> tuple[list[float], float]:
    """Seconds of each counted step, and the last loss."""
    ends: list[float] = []
    rows, together = SHAPES[options.shape][5:]
    result = finetune(
        model,
        blocks,
        None,
        rewrites=rewrites,
        train=options.train,
        steps=options.steps + SKIPPED,
        batch_tokens=together * blocks.ids.shape[1],
        forward_tokens=rows * blocks.ids.shape[1],
        learning_rate=options.learning_rate,
        penalty=0.0,
        warm_up=0,
        autocast=options.autocast,
        progress=lambda step: ends.append(time.perf_counter()),
    )
    return durations(ends), result.curve[-1].nll


def theirs(
    model: GPT2LMHeadModel, blocks: TokenBlocks, rewrites: Sequence[Rewrite], options: argparse.Namespace
) -> tuple[list[float], float]:
    """The same of the Trainer."""
    if options.train == "deltas":
        model.requires_grad_(False)
        for rewrite in rewrites:
            for parameter in rewrite.trainable(model):
                parameter.requires_grad_(True)
    rows, together = SHAPES[options.shape][5:]
    clock = Clock()
    labels = blocks.ids.clone()
    labels[:, 0] = -100  # never predicted, but the Trainer would divide by it
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=options.steps + SKIPPED,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=together // rows,
            learning_rate=options.learning_rate,
            lr_scheduler_type="cosine",
            weight_decay=0.01,
            max_grad_norm=1.0,
            bf16=options.autocast == "bfloat16",
            use_cpu=not torch.cuda.is_available(),
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=[{"input_ids": row, "labels": label} for row, label in zip(blocks.ids, labels, strict=True)],
            data_collator=default_data_collator,
            callbacks=[clock],
        )
        trainer.pop_callback(next(type(c) for c in trainer.callback_handler.callbacks if "Print" in type(c).__name__))
        trainer.train()
    return durations(clock.ends), clock.losses[-1]


def durations(ends: list[float]) -> list[float]:
    return [end - begin for begin, end in zip(ends[SKIPPED - 1 :], ends[SKIPPED:], strict=False)]


def subject(options: argparse.Namespace) -> tuple[GPT2LMHeadModel, TokenBlocks, list[Rewrite]]:
    """A soft-shared model of the shape (a plain one for full training), random tokens, its rewrites."""
    layers, d, heads, context, vocabulary, _, together = SHAPES[options.shape]
    config = GPT2Config(
        n_layer=layers,
        n_embd=d,
        n_head=heads,
        n_positions=context,
        vocab_size=vocabulary,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    rewrites: list[Rewrite] = []
    if options.train == "deltas":
        rewrites = [SoftShared(n=min(4, layers), rank=8, delta_init="svd").resolved(config)]
        model = apply(rewrites, model, identity(config))
    ids = torch.randint(0, vocabulary, (together, context))  # one batch: both sides see the same
    blocks = TokenBlocks(ids, torch.ones_like(ids, dtype=torch.bool), "random", "training", "random")
    return model, blocks, rewrites


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="demo")
    parser.add_argument("--train", choices=("full", "deltas"), default="full")
    parser.add_argument("--autocast", choices=("bfloat16", "none"), default="bfloat16")
    parser.add_argument("--steps", type=int, default=8, help="counted steps of a turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    model, blocks, rewrites = subject(options)
    tokens = SHAPES[options.shape][6] * SHAPES[options.shape][3]
    ways = {"ours": ours, "Trainer": theirs}
    times: dict[str, list[float]] = {name: [] for name in ways}
    ratios: list[float] = []
    for turn in range(options.rounds):
        medians = {}
        for name in ways if turn % 2 == 0 else reversed(ways):
            taken, loss = ways[name](copy.deepcopy(model), blocks, rewrites, options)
            times[name] += taken
            medians[name] = statistics.median(taken)
            print(f"round {turn + 1}: {name:8} {tokens / medians[name]:9.0f} tokens/s, last loss {loss:.4f}")
        ratios.append(medians["Trainer"] / medians["ours"])
    print(f"shape {options.shape}, train {options.train}, autocast {options.autocast}, {options.threads} threads")
    for name, taken in times.items():
        print(f"{name:8} median {tokens / statistics.median(taken):9.0f} tokens/s over {len(taken)} steps")
    print(f"ours / Trainer: median of rounds {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")


if __name__ == "__main__":
    main()
