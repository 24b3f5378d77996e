"""WikiText's own markup: find its articles, undo its tokenisation, count its words.

The rules are those that lm-evaluation-harness applies to its `wikitext` task, so that numbers can be compared with it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_SPLIT_MARKS = {"@-@": "-", "@,@": ",", "@.@": "."}
_TITLE = re.compile(r"^ ?= (?!=).* = ?$", re.MULTILINE)
_CLOSE_UP = [  # what stands between a pair of these loses the blanks at its two ends
    (re.compile(r"\(\s*([^)]*?)\s*\)"), r"(\1)"),
    (re.compile(r"\[\s*([^\]]*?)\s*\]"), r"[\1]"),
    (re.compile(r"{\s*([^}]*?)\s*}"), r"{\1}"),
    (re.compile(r'"\s*([^"]*?)\s*"'), r'"\1"'),
    (re.compile(r"'\s*([^']*?)\s*'"), r"'\1'"),
]


def is_wikitext(documents: Sequence[str]) -> bool:
    """Whether the documents carry WikiText's markup (a title line or a split mark)."""
    return any(_TITLE.search(text) or any(f" {mark} " in text for mark in _SPLIT_MARKS) for text in documents)


def articles(documents: Sequence[str]) -> list[str]:
    """WikiText's articles, one string each, from its file or its lines (hub rows): a title line opens an article."""
    whole = documents[0] if len(documents) == 1 else "".join(text.removesuffix("\n") + "\n" for text in documents)
    found: list[list[str]] = [[]]
    for line in whole.split("\n"):
        collapsed = line.replace("= = =", "===").replace("= =", "==").strip()
        if collapsed.startswith("= ") and collapsed.endswith(" ="):
            found.append([])
        found[-1].append(line)
    return [text for text in map("\n".join, found) if text.strip()]


def detokenise(text: str) -> str:
    """The text as it was before WikiText split it into tokens. Removes blanks and the @ of split marks, nothing else,
    and reads a number N as 1."""
    text = text.replace("s '", "s'")
    for mark, character in _SPLIT_MARKS.items():
        text = text.replace(f" {mark} ", character)
    for character in ":;.!?,":
        text = text.replace(f" {character} ", f"{character} ")
    for pattern, replacement in _CLOSE_UP:
        text = pattern.sub(replacement, text)
    for equals in ("= = = =", "= = =", "= ="):
        text = text.replace(equals, equals.replace(" ", ""))
    text = text.replace(" ° ", "°").replace(" \n", "\n").replace("\n ", "\n")
    return text.replace(" N ", " 1 ").replace(" 's", "'s")


def words_begun(original: str, beginning: str) -> int:
    """How many whitespace words of `original` have begun where `beginning` ends.

    `beginning` is the start of the original or of its detokenised form; the two differ in blanks and in the @ of split
    marks only, so the visible characters tell the place.
    """
    visible = sum(map(len, beginning.split()))
    words = 0
    for word in original.split():
        if visible <= 0:
            break
        visible -= 1 if word in _SPLIT_MARKS else len(word)
        words += 1
    return words
