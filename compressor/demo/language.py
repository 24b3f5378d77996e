"""The demo language as data: an endless stream of documents, and the rows of each kind and split.

A document's own text decides its split, so the splits share no document whatever the seeds are.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import Any

from compressor.demo import exercises, facts, letters, riddles, stories
from compressor.demo.articles import article
from compressor.demo.reviews import review
from compressor.demo.writer import Dice

KINDS = ("lm", "reviews", "summaries")
SPLITS = ("train", "validation", "test")
LM_CHARACTERS = {"train": 1_500_000, "validation": 300_000, "test": 300_000}
REVIEWS = {"train": 2000, "validation": 500, "test": 500}
SUMMARIES = {"train": 400, "validation": 100, "test": 200}
_SHARES = {"validation": range(0, 2), "test": range(2, 4), "train": range(4, 16)}  # of sixteen


def review_with_verdict(dice: Dice) -> tuple[str, str]:
    good = dice.chance(0.5)
    return review(dice, good), "\nVerdict: " + ("recommended." if good else "not recommended.")


def article_with_summary(dice: Dice) -> tuple[str, str]:
    document, summary = article(dice)
    return document, "\nIn short: " + summary


def _alone(write: Callable[[Dice], str]) -> Callable[[Dice], tuple[str, str]]:
    return lambda dice: (write(dice), "")


# What the "lm" mix is made of, each with its weight: a function that writes a document and what may follow it.
RECIPES: tuple[tuple[int, Callable[[Dice], tuple[str, str]]], ...] = (
    (5, _alone(stories.story)),
    (2, _alone(stories.market)),
    (2, _alone(stories.scene)),
    (3, _alone(letters.letter)),
    (2, _alone(letters.diary)),
    (4, article_with_summary),
    (4, review_with_verdict),
    (4, _alone(facts.facts)),
    (2, _alone(riddles.tracking)),
    (2, _alone(riddles.relations)),
    (2, _alone(exercises.sums)),
    (2, _alone(exercises.lists)),
    (2, _alone(riddles.calendar)),
    (2, _alone(riddles.logic)),
    (2, _alone(exercises.recipe)),
    (2, _alone(exercises.essay)),
)
_WHEEL = tuple(recipe for weight, recipe in RECIPES for _ in range(weight))


def split_of(text: str) -> str:
    """The split a document belongs to, by its text alone."""
    share = zlib.crc32(text.encode()) % 16
    return next(split for split, shares in _SHARES.items() if share in shares)


def stream(seed: int, split: str = "train") -> Iterator[str]:
    """Documents of the "lm" mix without end and without repeats, all of one split."""
    dice = Dice(seed)
    seen: set[str] = set()
    while True:
        text, ending = dice.pick(_WHEEL)(dice)
        if split_of(text) == split and text not in seen:
            seen.add(text)
            yield text + ending


def rows(kind: str, split: str) -> list[dict[str, Any]]:
    """The documents of one kind and split; the same on every call and machine."""
    for name, value, allowed in (("kind", kind, KINDS), ("split", split, SPLITS)):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}, must be one of {', '.join(allowed)}")
    return {"lm": _texts, "reviews": _reviews, "summaries": _summaries}[kind](split)


def _texts(split: str) -> list[dict[str, Any]]:
    out, size = [], 0
    for text in stream(101, split):
        out.append({"text": text})
        size += len(text)
        if size >= LM_CHARACTERS[split]:
            return out
    raise AssertionError("the stream does not end")


def _reviews(split: str) -> list[dict[str, Any]]:
    dice = Dice(202)
    found: dict[str, int] = {}
    while len(found) < REVIEWS[split]:
        label = len(found) % 2
        text = review(dice, label == 1)
        if split_of(text) == split:
            found.setdefault(text, label)
    return [{"text": text, "label": label} for text, label in found.items()]


def _summaries(split: str) -> list[dict[str, Any]]:
    dice = Dice(303)
    found: dict[str, str] = {}
    while len(found) < SUMMARIES[split]:
        document, summary = article(dice)
        if split_of(document) == split:
            found.setdefault(document, summary)
    return [{"document": document, "summary": summary} for document, summary in found.items()]
