"""How much each layer matters: test perplexity when the FFN of one layer is left out.

python -m compressor.demo.ablation [MODEL_DIR] [--tokens 32768]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoTokenizer, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase

from compressor.demo import CHECKPOINT, rows


def blocks_of(tokenizer: PreTrainedTokenizerBase, split: str, tokens: int, context: int) -> torch.Tensor:
    """int64[blocks, context]: the first tokens of a split, documents joined by blank lines."""
    text = "\n\n".join(row["text"] for row in rows("lm", split))
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"][:tokens])
    return ids[: len(ids) // context * context].view(-1, context)


@torch.no_grad()
def perplexity(model: PreTrainedModel, blocks: torch.Tensor, batch: int = 16) -> float:
    """Perplexity of the tokens of each block after its first, in float32."""
    total = 0.0
    for ids in blocks.split(batch):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / (blocks.shape[0] * (blocks.shape[1] - 1)))


@contextmanager
def without_ffn(model: GPT2LMHeadModel, layer: int) -> Iterator[None]:
    """The FFN of a layer adds nothing to the residual stream while this is open."""
    ffn = model.get_submodule(f"transformer.h.{layer}.mlp")
    handle = ffn.register_forward_hook(lambda _module, _inputs, output: torch.zeros_like(output))
    try:
        yield
    finally:
        handle.remove()


def table(model: GPT2LMHeadModel, blocks: torch.Tensor) -> str:
    """One Markdown row a layer: the perplexity without its FFN, and its ratio to the whole model's."""
    whole = perplexity(model, blocks)
    lines = ["| FFN left out | perplexity | ratio |", "| --- | ---: | ---: |", f"| none | {whole:.3f} | 1 |"]
    for layer in range(model.config.n_layer):
        with without_ffn(model, layer):
            reached = perplexity(model, blocks)
        lines.append(f"| layer {layer} | {reached:.3f} | {reached / whole:.4f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m compressor.demo.ablation", description="Test perplexity without the FFN of each layer."
    )
    parser.add_argument("model", nargs="?", type=Path, default=CHECKPOINT, help="a GPT-2 folder; the demo by default")
    parser.add_argument("--tokens", type=int, default=32768, help="how many tokens of the demo's test text to use")
    options = parser.parse_args()
    model = GPT2LMHeadModel.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    print(table(model, blocks_of(tokenizer, "test", options.tokens, model.config.n_positions)))


if __name__ == "__main__":
    main()
