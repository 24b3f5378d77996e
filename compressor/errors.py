"""What a user did wrong, said in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake of the user, said in one line: what, what was given, what is allowed. Exit code 2."""


def suggestion(word: str, allowed: Iterable[str]) -> str:
    """ " (did you mean X?)" when `word` is close to an allowed word, else an empty string."""
    close = difflib.get_close_matches(str(word), list(allowed), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def unknown(kind: str, word: str, allowed: Iterable[str]) -> UserError:
    """The error for a word that is not on a list: names the list and the nearest entry."""
    names = sorted(allowed)
    return UserError(f"unknown {kind} {word!r}{suggestion(word, names)}; allowed: {', '.join(names)}")
