"""Token blocks: the text of a part as rows of token ids, one context wide; and texts by themselves."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .errors import UserError

if TYPE_CHECKING:
    from .data import Text


@dataclass(frozen=True, eq=False)
class TokenBlocks:
    """Token ids in rows of one context; only counted tokens are real."""

    ids: Tensor  # int64[blocks, context]; pads hold 0
    mask: Tensor  # bool[blocks, context]; False = pad (only at the end of a row)
    source: str  # what the user named
    part: str  # calibration | selection | training | test | all
    fingerprint: str  # sha256 of the counted token ids, as int64 little-endian

    @property
    def tokens(self) -> int:
        """How many tokens count."""
        return int(self.mask.sum())

    def batches(self, tokens_per_batch: int = 2048) -> Iterator[tuple[Tensor, Tensor]]:
        """(ids, mask) of as many rows as fit into `tokens_per_batch`, at least one, in order."""
        rows = max(1, tokens_per_batch // self.ids.shape[1])
        yield from zip(self.ids.split(rows), self.mask.split(rows), strict=True)


def text_ids(tokenizer: PreTrainedTokenizerBase, vocabulary: int, text: str) -> list[int]:
    """Token ids of one string, without BOS or EOS. Raises UserError for ids that the model's vocabulary lacks."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    if ids and max(ids) >= vocabulary:
        raise UserError(
            f"the tokenizer gives token {max(ids)}, the model's vocabulary ends at {vocabulary - 1}: "
            "they do not belong together"
        )
    return ids


def token_blocks(
    text: Text, tokenizer: PreTrainedTokenizerBase, *, context: int, max_tokens: int | None, seed: int, evenly: bool
) -> TokenBlocks:
    """Disjoint blocks of `context` tokens, `max_tokens` in all (None: all there are), the last one padded.

    `evenly=False` takes the first tokens in order. `evenly=True` spreads the blocks over the whole text: the room that
    they leave is divided into as many equal strata as there are blocks, and the seed draws a shift in each; of a text
    too long to tokenise for that, pieces are first drawn in the same way. The ids are those of the joined text as one
    string, without BOS or EOS. Raises UserError when the text has fewer tokens than one block.
    """
    if context < 1 or (max_tokens is not None and max_tokens < 1):
        raise UserError(f"context is {context}, max_tokens {max_tokens}; allowed: 1 or more")
    generator = np.random.default_rng(seed)
    pieces = list(_pieces(text.joined))
    wanted = None if max_tokens is None else max(max_tokens, context)
    if evenly and wanted is not None:
        stream = _draw(pieces, tokenizer, wanted, generator)
    else:
        stream = _encode(pieces, tokenizer, wanted)
    if len(stream) < context:
        raise UserError(
            f"the {text.part} part of {text.source} has {len(stream)} tokens, one block needs {context}; "
            "give more text or a smaller context"
        )
    total = len(stream) if max_tokens is None else min(max_tokens, len(stream))
    count = -(-total // context)
    shifts = _shifts(count, len(stream) - total, generator) if evenly else np.zeros(count, np.int64)
    ids = np.zeros((count, context), np.int64)
    mask = np.zeros((count, context), np.bool_)
    for block, shift in enumerate(shifts):
        length = min(context, total - block * context)
        start = block * context + shift
        ids[block, :length] = stream[start : start + length]
        mask[block, :length] = True
    return TokenBlocks(
        ids=torch.from_numpy(ids),
        mask=torch.from_numpy(mask),
        source=text.source,
        part=text.part,
        fingerprint=hashlib.sha256(ids[mask].astype("<i8").tobytes()).hexdigest(),
    )


def _shifts(count: int, room: int, generator: np.random.Generator) -> np.ndarray:
    """int64[count], not decreasing, in 0..room: by how much each of `count` adjacent things moves to spread evenly
    without overlap; shift i is drawn from the i-th of `count` equal strata of the room."""
    strata = np.arange(count) + generator.random(count)
    return np.minimum(strata * (room + 1) / count, room).astype(np.int64)


# ---------------------------------------------------------------- tokenising long texts

# Up to this many characters a text is tokenised as one string. Beyond, where one string would take a gigabyte of memory
# each 8 MB, in pieces that begin with a blank or line end behind a visible character: there GPT-2's pre-tokeniser
# always cuts, so that the ids stay the same.
_ONE_STRING = 1 << 21
_PIECE = 1 << 16
_SAFE = re.compile(r"(?<=\S)[ \n]")
_CHARACTERS_PER_TOKEN = 32  # more than any prose has; `_draw` takes more text where it is not enough


def _pieces(string: str) -> Iterator[str]:
    start, least = 0, _PIECE if len(string) > _ONE_STRING else len(string)
    while start < len(string):
        found = _SAFE.search(string, start + least)
        stop = found.start() if found else len(string)
        yield string[start:stop]
        start = stop


def _encode(pieces: Iterable[str], tokenizer: PreTrainedTokenizerBase, wanted: int | None = None) -> np.ndarray:
    """int64[tokens] of the pieces in order; stops at `wanted` tokens or more."""
    remaining, streams, count = iter(pieces), [np.zeros(0, np.int64)], 0
    while wanted is None or count < wanted:
        batch = list(islice(remaining, 16))
        if not batch:
            break
        # verbose=False: no warning that a text is longer than the model's context
        rows = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        streams += [np.asarray(row, dtype=np.int64) for row in rows]
        count += sum(map(len, rows))
    return np.concatenate(streams)


def _draw(
    pieces: list[str], tokenizer: PreTrainedTokenizerBase, wanted: int, generator: np.random.Generator
) -> np.ndarray:
    """int64[tokens], at least `wanted` if there are as many, of pieces drawn evenly."""
    count = -(-max(_ONE_STRING, wanted * _CHARACTERS_PER_TOKEN) // _PIECE)
    while count < len(pieces):
        drawn = np.arange(count) + _shifts(count, len(pieces) - count, generator)
        stream = _encode([pieces[index] for index in drawn], tokenizer)
        if len(stream) >= wanted:
            return stream
        count *= 2
    return _encode(pieces, tokenizer)


# ---------------------------------------------------------------- texts of their own


def first_tokens(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, context: int, vocabulary: int
) -> list[Tensor]:
    """The first `context` tokens of each text, int64[tokens], as `text_ids` gives them."""
    return [torch.tensor(text_ids(tokenizer, vocabulary, text)[:context], dtype=torch.int64) for text in texts]


def like_lengths(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Sequences by their index, the longest first, in batches of at most `tokens` with their pads, at least one each:
    few pads, and what asks for most memory comes first."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    start = 0
    while start < len(order):
        stop = start + max(1, tokens // max(1, lengths[order[start]]))
        yield order[start:stop]
        start = stop


def padded(sequences: Sequence[Tensor], pad: int = 0) -> tuple[Tensor, Tensor]:
    """ids int64[rows, longest] with `pad` at the end of the shorter ones, mask bool[rows, longest], False = pad."""
    ids = torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True, padding_value=pad)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    return ids, torch.arange(ids.shape[1]) < lengths[:, None]
