"""The texts that the scripts of quality share: calibration, selection, training and test, which are disjoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import GPT2LMHeadModel

from compressor import data
from compressor.metrics.perplexity import perplexity
from compressor.models import OpenModel


@dataclass(frozen=True)
class Texts:
    """Of every part, for one model."""

    opened: OpenModel
    parts: dict[str, data.Text]
    seed: int

    def blocks(self, part: str, tokens: int, context: int) -> data.TokenBlocks:
        """So many tokens of a part, drawn evenly."""
        return data.token_blocks(
            self.parts[part], self.opened.tokenizer, context=context, max_tokens=tokens, seed=self.seed, evenly=True
        )

    def perplexity(self, model: GPT2LMHeadModel, context: int, tokens: int) -> float:
        """Of the first so many tokens of the test text, in windows that do not overlap."""
        return perplexity(
            model, self.opened.tokenizer, self.parts["test"], context=context, stride=context, max_tokens=tokens
        )[0].value


def open_texts(opened: OpenModel, source: str, test: str | None, seed: int) -> Texts:
    """test: a source of its own; None for the test part of `source`."""
    sources: dict[str, Any] = dict.fromkeys(("calibration", "selection", "training"), source)
    sources["test"] = test or source
    return Texts(opened, {part: data.recipe_text(sources, part) for part in sources}, seed)
