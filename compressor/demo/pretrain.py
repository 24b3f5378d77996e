"""Pretrain the demo model on the demo language: the tokenizer, then the twelve layers, every document seen once.

    python -m compressor.demo.pretrain --out build/demo

Two optimisers share the parameters. The matrices of the blocks take orthogonalised momentum steps (Muon), which move
all their directions alike and so give every layer something to do early; embeddings, norms and biases take AdamW.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

from compressor.demo.language import stream

END = "<|endoftext|>"
CONTEXT = 256
VOCABULARY = 2048


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train; the same values and seed give the same run."""

    steps: int = 1500
    batch: int = 16  # sequences of CONTEXT tokens
    matrix_rate: float = 0.02  # Muon, for the matrices of the blocks
    rate: float = 3e-3  # AdamW, for all else
    warmup: int = 100
    weight_decay: float = 0.02
    clip: float = 1.0
    seed: int = 0
    bf16: bool = True


def train_tokenizer(folder: Path, seed: int, documents: int = 8000) -> GPT2Tokenizer:
    """A byte-level BPE of VOCABULARY tokens, saved so that AutoTokenizer opens it as a GPT2Tokenizer."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        islice(stream(seed), documents), vocab_size=VOCABULARY, special_tokens=[END], show_progress=False
    )
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save_model(str(folder))
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    tokenizer = GPT2Tokenizer(vocab=files[0], merges=files[1], model_max_length=CONTEXT)
    tokenizer.save_pretrained(folder)
    return tokenizer


def build_model(end: int, seed: int) -> GPT2LMHeadModel:
    """The untrained model, in float32."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=CONTEXT,
        n_embd=128,
        n_layer=12,
        n_head=4,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    config._attn_implementation = "eager"  # its backward is the faster one on a CPU
    return GPT2LMHeadModel(config)


def batches(tokenizer: GPT2Tokenizer, seed: int, split: str, batch: int) -> Iterator[torch.Tensor]:
    """int64[batch, CONTEXT + 1]: one, two or three documents with blank lines between them, then END, and so on."""
    documents = stream(seed, split)
    need = batch * CONTEXT + 1
    pending: list[int] = []
    while True:
        while len(pending) < need:
            texts = ["\n\n".join(islice(documents, 1 + index % 3)) for index in range(30)]
            for ids in tokenizer(texts, verbose=False)["input_ids"]:
                pending += [*ids, tokenizer.eos_token_id]
        ids = torch.tensor(pending[:need])
        yield torch.stack([ids[i * CONTEXT : (i + 1) * CONTEXT + 1] for i in range(batch)])
        pending = pending[need - 1 :]


def loss_of(model: GPT2LMHeadModel, block: torch.Tensor, bf16: bool) -> torch.Tensor:
    """Mean next-token loss, in nats."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        logits = model(block[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), block[:, 1:].flatten())


@torch.no_grad()
def perplexity(model: GPT2LMHeadModel, blocks: list[torch.Tensor]) -> float:
    """Perplexity over blocks, in float32."""
    return math.exp(sum(loss_of(model, block, False).item() for block in blocks) / len(blocks))


def optimizers(model: GPT2LMHeadModel, schedule: Schedule) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the rest."""
    matrices = [p for p in model.transformer.h.parameters() if p.ndim == 2]
    taken = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in taken]
    return [
        torch.optim.Muon(matrices, lr=schedule.matrix_rate, weight_decay=schedule.weight_decay),
        torch.optim.AdamW(rest, lr=schedule.rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def factor(step: int, schedule: Schedule) -> float:
    """The share of the full rate at a step: linear warm-up, then a cosine to a fiftieth."""
    if step < schedule.warmup:
        return (step + 1) / schedule.warmup
    done = (step - schedule.warmup) / max(1, schedule.steps - schedule.warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))


def train(
    model: GPT2LMHeadModel,
    tokenizer: GPT2Tokenizer,
    schedule: Schedule,
    report: Callable[[int], None],
) -> None:
    """Train in place, calling report with the number of steps made after each."""
    fresh = batches(tokenizer, schedule.seed + 2, "train", schedule.batch)
    both = optimizers(model, schedule)
    bases = [optimizer.param_groups[0]["lr"] for optimizer in both]
    bar = tqdm(range(schedule.steps), file=sys.stderr, mininterval=10)
    for step in bar:
        for optimizer, base in zip(both, bases, strict=True):
            optimizer.param_groups[0]["lr"] = base * factor(step, schedule)
        loss = loss_of(model, next(fresh), schedule.bf16)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), schedule.clip)
        for optimizer in both:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        report(step + 1)


def save(model: GPT2LMHeadModel, folder: Path) -> None:
    """Write the model in float16; the one being trained stays as it is."""
    half: Any = copy.deepcopy(model)
    half.to(torch.float16).save_pretrained(folder)


def steps_within(minutes: float, tokenizer: GPT2Tokenizer, schedule: Schedule, trial: int = 12) -> int:
    """How many steps fit into the minutes, by the speed of a trial model after its first steps."""
    model = build_model(tokenizer.eos_token_id, schedule.seed)
    train(model, tokenizer, replace(schedule, steps=3), lambda _: None)
    began = time.perf_counter()
    train(model, tokenizer, replace(schedule, steps=trial), lambda _: None)
    return max(1, int(minutes * 60 * trial / (time.perf_counter() - began)))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m compressor.demo.pretrain", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write the checkpoint to")
    parser.add_argument("--seed", type=int, default=Schedule.seed)
    parser.add_argument("--steps", type=int, default=Schedule.steps)
    parser.add_argument("--minutes", type=float, help="take as many steps as this machine makes in about this time")
    options = parser.parse_args()
    schedule = Schedule(steps=options.steps, seed=options.seed)
    began, cpu = time.time(), time.process_time()
    tokenizer = train_tokenizer(options.out, schedule.seed + 2)
    if options.minutes is not None:
        schedule = replace(schedule, steps=steps_within(options.minutes, tokenizer, schedule))
    model = build_model(tokenizer.eos_token_id, schedule.seed)
    validation = list(islice(batches(tokenizer, schedule.seed + 1, "validation", 16), 6))

    def report(steps: int) -> None:
        if steps % 100 == 0:
            tqdm.write(f"step {steps}: validation perplexity {perplexity(model, validation):.3f}", file=sys.stderr)
            save(model, options.out)

    train(model, tokenizer, schedule, report)
    reached = perplexity(model, validation)
    save(model, options.out)
    facts = {
        "schedule": asdict(schedule),
        "tokens": schedule.steps * schedule.batch * CONTEXT,
        "validation_perplexity": round(reached, 4),
        "wall_seconds": round(time.time() - began),
        "cpu_seconds": round(time.process_time() - cpu),
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
