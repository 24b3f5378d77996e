"""What the steps after `align` take from a run folder: the model, and the text of a part as token blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GPT2Config, PreTrainedTokenizerBase

from .. import data
from ..data import TokenBlocks
from ..errors import UserError
from ..facts import FIT_TOKENS
from ..models import OpenModel
from ..run_folder import Aligned
from ..session import ANYWHERE, Columns, Session


def open_base(run: Path, aligned: Aligned, session: Session) -> OpenModel:
    """The model that the alignment of a run is of. Raises UserError when it has changed since."""
    base = session.open(aligned.base_model)
    if base.hash != aligned.base_hash:
        raise UserError(
            f"the alignment in {run} is of another model than {base.name} is now (its weights differ); "
            "make it anew with `gpt2-compress align --force`"
        )
    return base


def calibration_blocks(base: OpenModel, aligned: Aligned) -> TokenBlocks:
    """The calibration text that the alignment was made on, more of it where the part has more."""
    facts = aligned.calibration
    text = data.recipe_text(facts["specs"], "calibration", text_column=facts["text_column"], split=facts["split_given"])
    if text.fingerprint != facts["fingerprint"]:
        raise UserError(
            f"the calibration text of {text.source} has changed since the alignment was made; "
            "make it anew with `gpt2-compress align --force`"
        )
    return data.token_blocks(
        text,
        base.tokenizer,
        context=base.model.config.n_positions,
        max_tokens=FIT_TOKENS,
        seed=aligned.seed,
        evenly=True,
    )


@dataclasses.dataclass(frozen=True)
class Part:
    """Blocks of a part, and what the provenance keeps of their text."""

    blocks: TokenBlocks
    facts: dict[str, Any]


def part(
    name: str,
    config: GPT2Config,
    tokenizer: PreTrainedTokenizerBase,
    aligned: Aligned,
    source: str | Mapping[str, str] | None,
    columns: Columns = ANYWHERE,
    *,
    context: int,
    max_tokens: int,
    seed: int,
) -> Part:
    """The blocks of a part of `source`, by default of the data that the run's alignment was made with, drawn evenly.

    Raises UserError for a context beyond the model's positions and for text that the calibration shares.
    """
    room = config.n_positions
    if not 2 <= context <= room:
        raise UserError(f"context is {context}; allowed: 2 to {room}, the positions of the model")
    facts = aligned.calibration
    if source is None:
        source = facts["specs"]
        columns = Columns(columns.text_column or facts["text_column"], columns.split or facts["split_given"])
    text = data.recipe_text(source, name, text_column=columns.text_column, split=columns.split)
    if data.overlap(data.describe(text), facts):
        raise UserError(
            f"the {name} text ({text.source}, {text.split}) shares text with the calibration text of this run "
            f"({facts['source']}, {facts['split']}); give other data"
        )
    blocks = data.token_blocks(text, tokenizer, context=context, max_tokens=max_tokens, seed=seed, evenly=True)
    named = facts["named"][name] if source is facts["specs"] else text.source
    described = {**data.describe(text), "source": str(named), "tokens": blocks.tokens, "context": context}
    return Part(blocks, {**described, "block_fingerprint": blocks.fingerprint})
