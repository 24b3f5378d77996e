"""Groups of tokens by what they look like, against words by hand."""

from __future__ import annotations

import pytest
from transformers import GPT2Tokenizer

from compressor.errors import UserError
from compressor.token_groups import SCHEMES, imposed_groups, token_strings

BY_HAND = {  # kind, word_start, case, form
    " the": ("word", "start", "lower", "start lower"),
    "The": ("word", "inside", "Capitalised", "inside Capitalised"),
    " The": ("word", "start", "Capitalised", "start Capitalised"),
    " USA": ("word", "start", "UPPER", "start UPPER"),
    "ing": ("word", "inside", "lower", "inside lower"),
    "A": ("word", "inside", "Capitalised", "inside Capitalised"),
    " iPhone": ("word", "start", None, "other"),
    " Émile": ("word", "start", "Capitalised", "start Capitalised"),
    "中": ("word", "inside", None, "other"),
    "123": ("digits", None, None, "digits"),
    " 7": ("digits", None, None, "digits"),
    "...": ("punctuation", None, None, "punctuation"),
    " $": ("punctuation", None, None, "punctuation"),
    "\n": ("whitespace", None, None, "whitespace"),
    " ": ("whitespace", None, None, "whitespace"),
    "'s": ("other", None, None, "other"),
    "3rd": ("other", None, None, "other"),
    "\ufffd": ("other", None, None, "other"),
    None: (None, None, None, None),
}


@pytest.mark.parametrize("place, scheme", list(enumerate(("kind", "word_start", "case", "form"))))
def test_groups_by_hand(place, scheme):
    groups, names = imposed_groups(list(BY_HAND), scheme)
    assert [None if group < 0 else names[group] for group in groups.tolist()] == [
        row[place] for row in BY_HAND.values()
    ]
    assert str(groups.dtype) == "torch.int64" and len(SCHEMES) == 4


def test_byte_level_tokens_are_read_as_text():
    """GPT-2's tokenizer spells a blank as a letter, and so bytes that are no character."""
    end, spelled = "<|endoftext|>", ["Ġthe", "The", "123", "...", "Ċ", "ĠUSA", "Ģ"]
    vocabulary = {token: index for index, token in enumerate([end, *spelled])}
    tokenizer = GPT2Tokenizer(vocab=vocabulary, merges=[], bos_token=end, eos_token=end, unk_token=end)
    strings = token_strings(tokenizer, 10)
    assert strings == [None, " the", "The", "123", "...", "\n", " USA", "\ufffd", None, None]
    assert token_strings(tokenizer, 4) == strings[:4]
    groups, names = imposed_groups(strings, "form")
    assert [names[group] if group >= 0 else None for group in groups.tolist()] == [
        None, "start lower", "inside Capitalised", "digits", "punctuation", "whitespace", "start UPPER", "other", None,
        None,
    ]  # fmt: skip


def test_an_unknown_scheme_is_one_line():
    with pytest.raises(UserError, match="scheme") as error:
        imposed_groups([" the"], "shape")
    assert "\n" not in str(error.value)
