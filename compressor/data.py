"""The text of a part (calibration, selection, training, test) of a source; its token blocks come from tokens.py.

Where a part lies in its source, in percent of the rows (of the characters for a .txt), in order:

| the source has               | calibration  | selection          | training      | test                 |
| ---------------------------- | ------------ | ------------------ | ------------- | -------------------- |
| train, validation, test      | train 0-10   | validation         | train 10-100  | test                 |
| train, test (as imdb)        | train 0-10   | train 10-20        | train 20-100  | test                 |
| validation, test             | the same, with validation for train                                        |
| train, validation            | train 0-10   | validation 0-50    | train 10-100  | validation 50-100    |
| one split, or none           | 0-8          | 80-90              | 8-80          | 90-100               |

No two parts of a source share a row. Further splits (`unsupervised`) are used by naming one: it is then cut as a source
of one split.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import UserError, unknown
from .sources import SPLITS, Rows, Source, origin, parse, splits, strings
from .tokens import TokenBlocks, token_blocks

__all__ = [
    "PARTS",
    "Cut",
    "Source",
    "Text",
    "TokenBlocks",
    "chosen_splits",
    "cuts",
    "describe",
    "fingerprint",
    "overlap",
    "parse",
    "recipe_text",
    "specs",
    "text",
    "token_blocks",
]

PARTS = ("calibration", "selection", "training", "test")
JOINER = "\n\n"  # between rows: a blank line
_BLANK = re.compile(r"\s")
_OWN_SPLIT = {"calibration": "train", "training": "train", "selection": "validation", "test": "test", "all": "test"}


@dataclass(frozen=True)
class Text:
    """The text of one part of one source."""

    documents: tuple[str, ...]  # rows; a .txt is one document
    joined: str  # documents with a blank line between them
    source: str  # what the user named
    part: str  # calibration | selection | training | test | all
    split: str  # where it lies in the source: "train[0%:10%]"
    fingerprint: str  # sha256 of the documents, each with its length before it
    origins: tuple[tuple[str, int, int], ...] = ()  # (which split of which source or files, from %, to %)


@dataclass(frozen=True)
class Cut:
    """A slice of a split, in percent of its rows (of its characters for a .txt)."""

    split: str
    start: int = 0
    stop: int = 100

    def __str__(self) -> str:
        return self.split if (self.start, self.stop) == (0, 100) else f"{self.split}[{self.start}%:{self.stop}%]"


# ---------------------------------------------------------------- which text


def cuts(named: Collection[str]) -> dict[str, Cut]:
    """Where each part lies in a source with the splits `named`: the table on top of this file. No two overlap."""
    if len(named) == 1:
        (only,) = named
        return {
            "calibration": Cut(only, 0, 8),
            "training": Cut(only, 8, 80),
            "selection": Cut(only, 80, 90),
            "test": Cut(only, 90, 100),
        }
    main = "train" if "train" in named else "validation"
    if "test" not in named:
        selection, training, test = Cut("validation", 0, 50), Cut(main, 10), Cut("validation", 50)
    elif len(named) == 2:
        selection, training, test = Cut(main, 10, 20), Cut(main, 20), Cut("test")
    else:
        selection, training, test = Cut("validation"), Cut(main, 10), Cut("test")
    return {"calibration": Cut(main, 0, 10), "selection": selection, "training": training, "test": test}


def text(
    spec: str, part: str, *, text_column: str | None = None, split: str | None = None, alone: bool = False
) -> Text:
    """The text of one part of the source `spec`, or of the source as a whole.

    `part="all"` is the test split if the source has one, else all of it. `alone=True` says that no other part is taken
    from this source: the part is then its whole fitting split (train for calibration and training, validation for
    selection, test for test), else all of it. `split` makes the source one of a single split. Raises UserError, one
    line, for a source that is not there or cannot be read, a split or column it lacks, and a part without text.
    """
    if part not in (*PARTS, "all"):
        raise unknown("data part", part, (*PARTS, "all"))
    source = parse(spec)
    stored = splits(source)
    named = chosen_splits(source, stored, split)
    if part != "all" and not alone:
        chosen = [cuts(named)[part]]
    else:
        own = _OWN_SPLIT[part]
        chosen = [Cut(own)] if own in named else [Cut(name) for name in named]
    documents: list[str] = []
    for cut in chosen:
        documents += _take(stored[cut.split](), cut, source, text_column)
    where = "+".join(str(cut) for cut in chosen)
    if not any(document.strip() for document in documents):
        raise UserError(f"the {part} part of {spec} ({where}) has no text; give a longer source")
    return Text(
        documents=tuple(documents),
        joined=JOINER.join(documents),
        source=spec,
        part=part,
        split=where,
        fingerprint=fingerprint(documents),
        origins=tuple((origin(source, cut.split), cut.start, cut.stop) for cut in chosen),
    )


def chosen_splits(source: Source, stored: Collection[str], split: str | None) -> list[str]:
    """The splits of a source that are used: `split`, else those of SPLITS that it has, else its only one."""
    if split is not None:
        if split not in stored:
            raise unknown(f"split of data {source.name!r}", split, stored)
        return [split]
    named = [name for name in SPLITS if name in stored] or list(stored)
    if named[0] not in SPLITS and len(named) > 1:
        raise UserError(
            f"data {source.name!r} has no train, validation or test split; give --split, one of: {', '.join(named)}"
        )
    return named


def _take(rows: Rows, cut: Cut, source: Source, text_column: str | None) -> list[str]:
    if not isinstance(rows, str):
        start, stop = (len(rows) * percent // 100 for percent in (cut.start, cut.stop))
        return strings(rows, source, text_column, start, stop)
    piece = rows[_boundary(rows, cut.start) : _boundary(rows, cut.stop)]
    return [piece] if piece else []


def _boundary(string: str, percent: int) -> int:
    """Where a string is cut: behind the first line end within 2 % after `percent`, else before the first blank within
    8 %, else right there. No two cuts of `cuts` are nearer than 8 %, so they stay in order."""
    if percent == 0:
        return 0
    nominal, near, far = (len(string) * p // 100 for p in (percent, percent + 2, percent + 8))
    line_end = string.find("\n", nominal, near)
    blank = _BLANK.search(string, nominal, far)
    return line_end + 1 if line_end >= 0 else blank.start() if blank else nominal


def fingerprint(documents: Iterable[str]) -> str:
    """sha256 of strings, each with its length before it."""
    digest = hashlib.sha256()
    for document in documents:
        content = document.encode("utf-8", "surrogatepass")
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def describe(piece: Text) -> dict[str, Any]:
    """What the provenance keeps of a text, for JSON."""
    return {
        "source": piece.source,
        "part": piece.part,
        "split": piece.split,
        "fingerprint": piece.fingerprint,
        "documents": len(piece.documents),
        "origins": [list(place) for place in piece.origins],
    }


def overlap(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two texts, as `describe` gives them, share text: the same text, or cuts of one split that cross.

    The same files under other names are recognised; texts that merely repeat each other's sentences are not.
    """
    return first["fingerprint"] == second["fingerprint"] or any(
        where == there and start < end and begin < stop
        for where, start, stop in first["origins"]
        for there, begin, end in second["origins"]
    )


# ---------------------------------------------------------------- a recipe's `data:`


def specs(data: str | Mapping[str, str]) -> dict[str, str]:
    """The D of each part: a recipe's `data:` is one D for all, or a mapping with exactly the four PARTS as keys."""
    if isinstance(data, str):
        return dict.fromkeys(PARTS, data)
    if not isinstance(data, Mapping):
        raise UserError(f"data is {data!r}; allowed: one D, or a mapping with a D each for {', '.join(PARTS)}")
    for part, spec in data.items():
        if part not in PARTS:
            raise unknown("data part", str(part), PARTS)
        if not isinstance(spec, str):
            raise UserError(f"data.{part} is {spec!r}; allowed: a D as a string")
    missing = [part for part in PARTS if part not in data]
    if missing:
        raise UserError(f"data has no {', '.join(missing)}; it needs a D each for {', '.join(PARTS)}")
    return {part: data[part] for part in PARTS}


def recipe_text(
    data: str | Mapping[str, str], part: str, *, text_column: str | None = None, split: str | None = None
) -> Text:
    """The text of one part as a recipe's `data:` gives it.

    A source that serves several parts is cut for them as usual, so that they stay disjoint; a source that serves this
    part only is used as a whole (`alone` of `text`).
    """
    named = specs(data)
    if part not in named:
        raise unknown("data part", part, PARTS)
    sources = [parse(spec) for spec in named.values()]
    return text(named[part], part, text_column=text_column, split=split, alone=sources.count(parse(named[part])) == 1)
