"""An imposed hierarchy: tokens of a vocabulary in groups by what they look like, such as word starts, case, digits.

Source: evintunador/hierarchical_embeddings, which groups characters; groups of byte-level BPE tokens are ours.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .errors import unknown

Strings = Sequence[str | None]  # of a vocabulary by token id; None: special, or no token


def token_strings(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> list[str | None]:
    """What every token of a model's vocabulary stands for; of bytes that are no whole character, U+FFFD."""
    special = set(tokenizer.all_special_ids)
    names = tokenizer.convert_ids_to_tokens(list(range(min(len(tokenizer), vocabulary))))
    found = [
        None if name is None or index in special else tokenizer.convert_tokens_to_string([name])
        for index, name in enumerate(names)
    ]
    return found + [None] * (vocabulary - len(found))


def _kind(string: str) -> str:
    """word | digits | punctuation (symbols too) | whitespace | other."""
    if string.isspace():
        return "whitespace"
    body = string.lstrip()
    if body.isalpha():
        return "word"
    if body.isdecimal():
        return "digits"
    signs = body.isprintable() and all(unicodedata.category(sign)[0] in "PS" for sign in body)
    return "punctuation" if signs and "\ufffd" not in body and body else "other"


def _word_start(string: str) -> str | None:
    if _kind(string) != "word":
        return None
    return "start" if string[0].isspace() else "inside"


def _case(string: str) -> str | None:
    """A single capital letter is Capitalised; UPPER are two or more."""
    body = string.strip()
    if _kind(string) != "word":
        return None
    if body.islower():
        return "lower"
    if body[0].isupper() and (len(body) == 1 or body[1:].islower()):
        return "Capitalised"
    return "UPPER" if body.isupper() else None


def _form(string: str) -> str:
    kind, case = _kind(string), _case(string)
    if kind != "word":
        return kind
    return "other" if case is None else f"{_word_start(string)} {case}"


# kind: word, digits, punctuation, whitespace, other. word_start: words that begin with a blank, and the rest of words.
# case: lower, Capitalised, UPPER. form: all of these at once.
SCHEMES: dict[str, Callable[[str], str | None]] = {
    "kind": _kind,
    "word_start": _word_start,
    "case": _case,
    "form": _form,
}


def imposed_groups(strings: Strings, scheme: str) -> tuple[Tensor, list[str]]:
    """(int64[vocabulary], names): the group of every token by a scheme of `SCHEMES`, -1 for a token in none. Raises
    UserError for another scheme."""
    if scheme not in SCHEMES:
        raise unknown("scheme", scheme, SCHEMES)
    found = [SCHEMES[scheme](string) if string else None for string in strings]
    names = sorted({name for name in found if name is not None})
    places = {name: index for index, name in enumerate(names)}
    return torch.tensor([-1 if name is None else places[name] for name in found], dtype=torch.int64), names
