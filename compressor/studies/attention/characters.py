"""Text by characters: a tokenizer that has one token for each, and blocks of three parts that share no text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from ... import data
from ...errors import UserError
from ...session import ANYWHERE, Columns
from ...tokens import TokenBlocks, token_blocks

UNKNOWN = "\ufffd"  # token 0: any character that the training text lacks


@dataclass(frozen=True, eq=False)
class CharacterText:
    """Rows of `block_size` characters, all of them full, and what reads them."""

    tokenizer: PreTrainedTokenizerFast
    training: TokenBlocks
    selection: TokenBlocks
    test: TokenBlocks
    opening: str  # how the test part begins
    origin: dict[str, Any]  # part -> where it comes from, for JSON


def character_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Token 0 is UNKNOWN, then every character of a text in the order of their code points."""
    characters = [UNKNOWN, *sorted(set(text) - {UNKNOWN})]
    own = Tokenizer(WordLevel({character: index for index, character in enumerate(characters)}, unk_token=UNKNOWN))
    own.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    own.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=own, unk_token=UNKNOWN)


def character_text(
    given: str | Mapping[str, str],
    *,
    columns: Columns = ANYWHERE,
    block_size: int,
    training_rows: int,
    selection_rows: int,
    test_rows: int,
    seed: int,
) -> CharacterText:
    """At most so many rows of each part of a recipe's `data:`, drawn evenly over it with the seed; the alphabet is that
    of the whole training part. Raises UserError, one line, for a source that cannot be read or has no row of a part."""
    wanted = {"training": training_rows, "selection": selection_rows, "test": test_rows}
    texts = {
        part: data.recipe_text(given, part, text_column=columns.text_column, split=columns.split) for part in wanted
    }
    tokenizer = character_tokenizer(texts["training"].joined)
    blocks = {}
    for part, rows in wanted.items():
        there = len(texts[part].joined) // block_size
        if not there:
            raise UserError(
                f"the {part} part of {texts[part].source} has {len(texts[part].joined)} characters; allowed: "
                f"{block_size} (block_size) or more"
            )
        blocks[part] = token_blocks(
            texts[part], tokenizer, context=block_size, max_tokens=min(rows, there) * block_size, seed=seed, evenly=True
        )
    origin = {part: data.describe(text) for part, text in texts.items()}
    return CharacterText(tokenizer, **blocks, opening=texts["test"].joined[:block_size], origin=origin)
