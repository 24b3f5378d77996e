"""What the rewrites of a model have to tell of it, for the report.json beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase

from ..capture import Batch
from ..data import TokenBlocks
from ..errors import UserError
from ..rewrites import Rewrite
from ..session import Notice
from ..token_groups import token_strings

TOKENS = 4096  # of the calibration text, blocks evenly over all of it


def diagnostics(
    rewrites: Sequence[Rewrite],
    model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerBase,
    calibration: Callable[[], TokenBlocks],
    notice: Notice,
) -> dict[str, Any]:
    """{"diagnostics": one entry for each rewrite that has any}, empty where none has.

    calibration: opens the text. It may be gone: then that is said, and nothing else is lost.
    """

    def batches() -> Iterator[Batch]:
        blocks = calibration()
        every = max(1, blocks.tokens // TOKENS)
        yield from dataclasses.replace(blocks, ids=blocks.ids[::every], mask=blocks.mask[::every]).batches()

    strings = token_strings(tokenizer, model.config.vocab_size)
    try:
        found = [(rewrite.name, rewrite.diagnose(model, batches(), strings)) for rewrite in rewrites]
    except UserError as error:
        notice(f"warning: no diagnostics: {error}")
        return {}
    told = [{"rewrite": name, **body} for name, body in found if body is not None]
    return {"diagnostics": told} if told else {}
