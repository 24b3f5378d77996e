"""Token blocks against tokenisers whose ids are known and against tokenising the whole string."""

import hashlib
import itertools
import os
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from compressor import tokens
from compressor.data import Text, text
from compressor.errors import UserError
from compressor.tokens import TokenBlocks, first_tokens, like_lengths, padded, token_blocks

REAL = os.environ.get("GPT2_COMPRESS_TEST_DATA")
needs_real_data = pytest.mark.skipif(not REAL, reason="GPT2_COMPRESS_TEST_DATA is not set")


def a_text(*documents: str) -> Text:
    return Text(documents, "\n\n".join(documents), "here.txt", "calibration", "all", "0")


def counting(count: int) -> Text:
    """The text "0 1 2 ...": with `counter`, token i of it has the id i."""
    return a_text(" ".join(map(str, range(count))))


@pytest.fixture(scope="module")
def counter():
    """A tokeniser that reads a number as itself, whole words only."""
    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(400_000)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=16)


@pytest.fixture(scope="module")
def byte_level():
    """A GPT-2 tokeniser (byte-level BPE) that would add BOS and EOS and whose model is short."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([messy(1, 40_000)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.enable_truncation(8)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=16, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )


def messy(seed: int, length: int) -> str:
    """Words, contractions, digits, runs of every sort of blank: what GPT-2's pre-tokeniser treats specially."""
    dice = random.Random(seed)
    atoms = [
        "the ",
        "cat",
        " it's",
        "'ll ",
        "42",
        " 7",
        "\n",
        "\n\n",
        " \n",
        "\n ",
        "  ",
        "   ",
        "\t",
        "\r\n",
        "\u00a0",
        "\u2028",
        "\x1c",
        "!?",
        " ...",
        "caf\u00e9",
        "\u4e2d\u6587",
        "<|endoftext|>",
        "x" * 9,
        " =",
    ]
    return "".join(dice.choice(atoms) for _ in range(length))


def placed(blocks: TokenBlocks) -> list[range]:
    """Where the blocks lie in a `counting` text; asserts that each is one run and that pads are zeros at the end."""
    found = []
    for ids, mask in zip(blocks.ids.tolist(), blocks.mask.tolist(), strict=True):
        length = sum(mask)
        assert mask == [True] * length + [False] * (len(mask) - length)
        assert ids == list(range(ids[0], ids[0] + length)) + [0] * (len(ids) - length)
        found.append(range(ids[0], ids[0] + length))
    return found


# ---------------------------------------------------------------- in order


@pytest.mark.parametrize(
    ("count", "context", "max_tokens", "runs"),
    [
        (100, 10, 30, [(0, 10), (10, 20), (20, 30)]),
        (100, 10, 25, [(0, 10), (10, 20), (20, 25)]),
        (100, 10, 4, [(0, 4)]),
        (25, 10, None, [(0, 10), (10, 20), (20, 25)]),
        (25, 10, 1000, [(0, 10), (10, 20), (20, 25)]),
        (10, 10, None, [(0, 10)]),
    ],
)
def test_the_first_tokens_in_order(count, context, max_tokens, runs, counter):
    blocks = token_blocks(counting(count), counter, context=context, max_tokens=max_tokens, seed=0, evenly=False)
    assert placed(blocks) == [range(*run) for run in runs]
    assert blocks.tokens == sum(stop - start for start, stop in runs)
    assert blocks.ids.shape == blocks.mask.shape == (len(runs), context)
    assert (blocks.ids.dtype, blocks.mask.dtype) == (torch.int64, torch.bool)
    assert (blocks.source, blocks.part) == ("here.txt", "calibration")


# ---------------------------------------------------------------- evenly


@pytest.mark.parametrize(
    ("count", "context", "max_tokens"),
    [
        (1000, 10, 100),
        (1000, 10, 95),
        (1000, 10, 999),
        (1000, 10, 1000),
        (1000, 10, 5000),
        (1000, 10, None),
        (1000, 512, 1000),
        (1000, 10, 3),
        (1000, 7, 1),
        (10, 10, 10),
        (101, 10, 100),
        (101, 10, 101),
        (30_011, 64, 4000),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_evenly_drawn_blocks(count, context, max_tokens, seed, counter):
    blocks = token_blocks(counting(count), counter, context=context, max_tokens=max_tokens, seed=seed, evenly=True)
    runs = placed(blocks)
    assert blocks.tokens == min(max_tokens or count, count)
    assert all(len(run) == context for run in runs[:-1]) and 1 <= len(runs[-1]) <= context
    assert runs[0].start >= 0 and runs[-1].stop <= count
    assert all(before.stop <= after.start for before, after in itertools.pairwise(runs))  # in order, none overlap
    # evenly: no gap is longer than two strata of the unused room, and one stratum at either end
    stratum = (count - blocks.tokens) / len(runs) + 1
    assert all(after.start - before.stop <= 2 * stratum for before, after in itertools.pairwise(runs))
    assert runs[0].start <= stratum and count - runs[-1].stop <= stratum


def test_the_seed_decides_and_nothing_else(counter):
    def drawn(seed):
        return token_blocks(counting(5000), counter, context=10, max_tokens=200, seed=seed, evenly=True)

    state = np.random.get_state()[1].copy(), torch.random.get_rng_state()
    assert torch.equal(drawn(3).ids, drawn(3).ids) and drawn(3).fingerprint == drawn(3).fingerprint
    assert len({drawn(seed).fingerprint for seed in range(5)}) == 5
    assert np.array_equal(np.random.get_state()[1], state[0]) and torch.equal(torch.random.get_rng_state(), state[1])


def test_every_place_can_be_drawn(counter):
    # one block of one token out of five: each place comes up
    places = [
        placed(token_blocks(counting(5), counter, context=1, max_tokens=1, seed=seed, evenly=True))[0].start
        for seed in range(300)
    ]
    counts = np.bincount(places, minlength=5)
    assert len(counts) == 5 and counts.min() > 30


# ---------------------------------------------------------------- fingerprint, batches, errors


@pytest.mark.parametrize("evenly", [False, True])
def test_the_fingerprint_is_of_the_counted_ids(evenly, counter):
    blocks = token_blocks(counting(500), counter, context=10, max_tokens=25, seed=0, evenly=evenly)
    counted = [token for run in placed(blocks) for token in run]
    assert blocks.fingerprint == hashlib.sha256(struct.pack(f"<{len(counted)}q", *counted)).hexdigest()


@pytest.mark.parametrize(("per_batch", "sizes"), [(30, [3, 3, 1]), (39, [3, 3, 1]), (5, [1] * 7), (2048, [7])])
def test_batches(per_batch, sizes, counter):
    blocks = token_blocks(counting(65), counter, context=10, max_tokens=None, seed=0, evenly=False)
    batches = list(blocks.batches(per_batch))
    assert [len(ids) for ids, _ in batches] == sizes
    assert torch.equal(torch.cat([ids for ids, _ in batches]), blocks.ids)
    assert torch.equal(torch.cat([mask for _, mask in batches]), blocks.mask)


@pytest.mark.parametrize("evenly", [False, True])
@pytest.mark.parametrize("max_tokens", [None, 5, 1000])
def test_less_than_a_block_is_one_line(evenly, max_tokens, counter):
    with pytest.raises(UserError) as error:
        token_blocks(counting(37), counter, context=512, max_tokens=max_tokens, seed=0, evenly=evenly)
    assert str(error.value) == (
        "the calibration part of here.txt has 37 tokens, one block needs 512; give more text or a smaller context"
    )


@pytest.mark.parametrize(("context", "max_tokens"), [(0, None), (10, 0), (10, -1)])
def test_no_tokens_at_all_is_one_line(context, max_tokens, counter):
    with pytest.raises(UserError, match="allowed: 1 or more"):
        token_blocks(counting(37), counter, context=context, max_tokens=max_tokens, seed=0, evenly=False)


# ---------------------------------------------------------------- tokenising


def whole(joined: str, tokenizer) -> list[int]:
    """The ids of one string, straight from the backend."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    return backend.encode(joined, add_special_tokens=False).ids


def counted(blocks: TokenBlocks) -> list[int]:
    return blocks.ids[blocks.mask].tolist()


def test_one_string_without_special_tokens_truncation_or_warning(byte_level, caplog):
    joined = messy(2, 3000)
    byte_level.deprecation_warnings.clear()
    transformers.logging.enable_propagation()
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_warning()
    try:
        blocks = token_blocks(a_text(joined), byte_level, context=16, max_tokens=None, seed=0, evenly=False)
        assert not caplog.records
        byte_level([joined])  # where it is not silenced: "sequence length is longer than the specified maximum"
        assert "longer than" in caplog.text
    finally:
        transformers.logging.disable_propagation()
        transformers.logging.set_verbosity(level)
    assert counted(blocks) == whole(joined, byte_level)
    assert byte_level.decode(counted(blocks), clean_up_tokenization_spaces=False) == joined


def test_the_joiner_is_tokenised_as_part_of_the_string(byte_level):
    documents = tuple(messy(seed, 40) for seed in range(20))
    blocks = token_blocks(a_text(*documents), byte_level, context=4, max_tokens=None, seed=0, evenly=False)
    assert counted(blocks) == whole("\n\n".join(documents), byte_level)


@pytest.mark.parametrize("piece", [1, 7, 100, 5000])
def test_a_long_text_in_pieces_gives_the_ids_of_one_string(piece, byte_level, monkeypatch):
    monkeypatch.setattr(tokens, "_ONE_STRING", 10)
    monkeypatch.setattr(tokens, "_PIECE", piece)
    joined = messy(3, 4000)
    assert len(list(tokens._pieces(joined))) > 2
    ids = whole(joined, byte_level)
    for max_tokens in (None, 1000, 16):
        blocks = token_blocks(a_text(joined), byte_level, context=4, max_tokens=max_tokens, seed=0, evenly=False)
        assert counted(blocks) == ids[:max_tokens]
    unbroken = "x" * 500
    blocks = token_blocks(a_text(unbroken), byte_level, context=4, max_tokens=None, seed=0, evenly=False)
    assert counted(blocks) == whole(unbroken, byte_level)


class Watched:
    """Counts the characters that a tokeniser is given."""

    def __init__(self, tokenizer):
        self.tokenizer, self.characters = tokenizer, 0

    def __call__(self, batch, **options):
        self.characters += sum(map(len, batch))
        return self.tokenizer(batch, **options)


@pytest.mark.parametrize("evenly", [False, True])
def test_of_a_long_text_only_what_is_needed_is_tokenised(evenly, counter, monkeypatch):
    monkeypatch.setattr(tokens, "_ONE_STRING", 20_000)
    monkeypatch.setattr(tokens, "_PIECE", 200)
    piece, watched = counting(100_000), Watched(counter)
    blocks = token_blocks(piece, watched, context=10, max_tokens=300, seed=1, evenly=evenly)
    assert blocks.tokens == 300 and watched.characters < 30_000 < len(piece.joined) / 10
    ids = counted(blocks)
    assert ids == sorted(set(ids))  # in order, nothing twice
    if evenly:  # from all over the text
        assert np.histogram(ids, bins=10, range=(0, 100_000))[0].min() >= 10
    else:
        assert ids == list(range(300))


@pytest.mark.parametrize("max_tokens", [5_000, 19_999, 20_000, 30_000])
def test_more_pieces_are_drawn_until_the_tokens_suffice(max_tokens, counter, monkeypatch):
    monkeypatch.setattr(tokens, "_ONE_STRING", 100)
    monkeypatch.setattr(tokens, "_PIECE", 50)
    monkeypatch.setattr(tokens, "_CHARACTERS_PER_TOKEN", 1)  # the numbers have about 6
    blocks = token_blocks(counting(20_000), counter, context=10, max_tokens=max_tokens, seed=1, evenly=True)
    ids = counted(blocks)
    assert len(ids) == min(max_tokens, 20_000) and ids == sorted(set(ids))


@needs_real_data
def test_real_text_with_a_real_tokeniser():
    tokenizer = AutoTokenizer.from_pretrained(Path(REAL) / "reference" / "gpt2-reviews")
    for name, part in (
        ("wikitext-2/validation.txt", "calibration"),
        ("imdb/unlabelled.parquet", "calibration"),
        ("imdb", "selection"),
    ):
        piece = text(str(Path(REAL) / "data" / name), part)
        blocks = token_blocks(piece, tokenizer, context=512, max_tokens=4000, seed=0, evenly=False)
        assert counted(blocks) == whole(piece.joined, tokenizer)[:4000]
        drawn = token_blocks(piece, tokenizer, context=512, max_tokens=4000, seed=0, evenly=True)
        assert drawn.ids.shape == (8, 512) and drawn.tokens == 4000 and drawn.mask[:-1].all()


@needs_real_data
def test_real_text_in_pieces(monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(Path(REAL) / "reference" / "gpt2-reviews")
    for name in ("wikitext-2/validation.txt", "imdb/unlabelled.parquet"):
        joined = text(str(Path(REAL) / "data" / name), "selection").joined[:300_000]
        monkeypatch.setattr(tokens, "_ONE_STRING", 10)
        monkeypatch.setattr(tokens, "_PIECE", 100)
        blocks = token_blocks(a_text(joined), tokenizer, context=512, max_tokens=None, seed=0, evenly=False)
        assert counted(blocks) == whole(joined, tokenizer)


# ---------------------------------------------------------------- texts of their own


def test_the_first_tokens_of_a_text_are_those_of_the_whole(byte_level):
    texts = ["A short one", messy(3, 400), messy(4, 90)]
    whole_ids = [byte_level.encode(text, add_special_tokens=False) for text in texts]
    before = byte_level.backend_tokenizer.to_str()
    found = first_tokens(texts, byte_level, context=50, vocabulary=len(byte_level))
    assert [ids.tolist() for ids in found] == [ids[:50] for ids in whole_ids]
    assert byte_level.backend_tokenizer.to_str() == before, "it would truncate from now on"
    with pytest.raises(UserError, match="they do not belong together"):
        first_tokens(texts, byte_level, context=50, vocabulary=3)


@pytest.mark.parametrize("tokens", [1, 7, 20, 1000])
def test_batches_of_like_length(tokens):
    lengths = np.random.default_rng(0).integers(1, 15, 40).tolist()
    batches = list(like_lengths(lengths, tokens))
    assert sorted(index for batch in batches for index in batch) == list(range(40))
    seen = [lengths[index] for batch in batches for index in batch]
    assert seen == sorted(lengths, reverse=True)
    for batch in batches:
        assert len(batch) == 1 or len(batch) * lengths[batch[0]] <= tokens
    assert list(like_lengths([], tokens)) == []


def test_padded_at_the_end():
    ids, mask = padded([torch.tensor([5, 6, 9]), torch.tensor([9])], pad=9)
    assert ids.tolist() == [[5, 6, 9], [9, 9, 9]] and ids.dtype == torch.int64
    assert mask.tolist() == [[True] * 3, [True, False, False]]
