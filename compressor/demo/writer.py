"""Dice, templates and the people of a document: what every kind of text in the demo language is written with.

Only ``random.Random.random`` is used, whose sequence Python guarantees: the same seed gives the same text everywhere.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from compressor.demo import lexicon

T = TypeVar("T")


class Dice:
    """A seeded source of choices."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed).random

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self.random() * len(options))]

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def between(self, low: int, high: int) -> int:
        """An integer from low to high, both included."""
        return low + int(self.random() * (high - low + 1))

    def shuffled(self, options: Sequence[T]) -> list[T]:
        pool = list(options)
        for i in range(len(pool) - 1, 0, -1):
            j = int(self.random() * (i + 1))
            pool[i], pool[j] = pool[j], pool[i]
        return pool

    def sample(self, options: Sequence[T], count: int) -> list[T]:
        """count different options; quick for short samples of long lists."""
        pool: list[T] = []
        while len(pool) < count:
            option = self.pick(options)
            if option not in pool:
                pool.append(option)
        return pool


@dataclass(frozen=True)
class Town:
    """A place whose facts are the same in every document."""

    name: str
    county: str
    river: str
    product: str
    building: str


@dataclass(frozen=True)
class Person:
    """Somebody in one document: the facts stated early and used late."""

    name: str
    surname: str
    woman: bool
    job: str
    town: Town
    age: int

    he = property(lambda self: "she" if self.woman else "he")
    him = property(lambda self: "her" if self.woman else "him")
    his = property(lambda self: "her" if self.woman else "his")
    himself = property(lambda self: "herself" if self.woman else "himself")
    man = property(lambda self: "woman" if self.woman else "man")
    title = property(lambda self: "Miss" if self.woman else "Mister")
    full = property(lambda self: f"{self.name} {self.surname}")
    years = property(lambda self: lexicon.number(self.age))
    place = property(lambda self: lexicon.JOBS[self.job][0])
    tool = property(lambda self: lexicon.JOBS[self.job][1])
    made = property(lambda self: lexicon.JOBS[self.job][2])
    goods = property(lambda self: lexicon.JOBS[self.job][3])
    style = property(lambda self: lexicon.JOBS[self.job][4])


def _towns() -> tuple[Town, ...]:
    starts = lexicon.words(
        "Ash Birch Cold Elm Fair Gran Hazel King Lang Mill North Oak Ox Pen Red Salt Stone Thorn Wil Win"
    )
    ends = lexicon.words("bridge ford bury ton wick mouth ham field")
    buildings = lexicon.LISTS["building"]
    return tuple(
        Town(
            name=starts[i % 20] + ends[(i * 3 + i // 20) % 8],
            county=lexicon.COUNTIES[i * 7 % 10],
            river=lexicon.RIVERS[(i * 11 + i // 24) % 24],
            product=lexicon.PRODUCTS[(i * 13 + i // 20 * 3) % 20],
            building=buildings[(i * 5 + i // 12) % 12],
        )
        for i in range(80)
    )


TOWNS = _towns()
JOB_NAMES = tuple(lexicon.JOBS)


def people(dice: Dice, count: int, town: Town | None = None) -> list[Person]:
    """count people with different first names and jobs, of one town when it is given."""
    women, men = dice.sample(lexicon.WOMEN, count), dice.sample(lexicon.MEN, count)
    jobs, surnames = dice.sample(JOB_NAMES, count), dice.sample(lexicon.SURNAMES, count)
    group = []
    for i in range(count):
        woman = dice.chance(0.5)
        name = women[i] if woman else men[i]
        group.append(Person(name, surnames[i], woman, jobs[i], town or dice.pick(TOWNS), dice.between(19, 79)))
    return group


# A parsed template: literal text, ("field",) for a name in braces, or a list of alternatives, each itself parsed.
_Part = Any


@functools.cache
def _parse(template: str) -> tuple[_Part, ...]:
    """Split "[a|b {name}] c" into parts; alternatives nest."""
    parts, rest = _parse_until(template, 0, "")
    assert rest == len(template), template
    return parts


def _parse_until(text: str, at: int, stops: str) -> tuple[tuple[_Part, ...], int]:
    parts: list[_Part] = []
    literal = ""
    while at < len(text) and text[at] not in stops:
        if text[at] == "[":
            options, mark = [], "|"
            at += 1
            while mark == "|":
                option, at = _parse_until(text, at, "|]")
                options.append(option)
                mark = text[at]
                at += 1
            parts += [literal, options] if literal else [options]
            literal = ""
        elif text[at] == "{":
            end = text.index("}", at)
            parts += [literal, (text[at + 1 : end],)] if literal else [(text[at + 1 : end],)]
            literal, at = "", end + 1
        else:
            literal += text[at]
            at += 1
    if literal:
        parts.append(literal)
    return tuple(parts), at


class Writer:
    """Fills templates of one document.

    ``{name}`` is a value given by keyword or set in ``facts`` (``{p.job}`` an attribute of one), else a word drawn from
    the list of that name in ``lexicon.LISTS``; ``[a|b|]`` is one of the alternatives, which may nest.
    """

    def __init__(self, dice: Dice, **facts: Any) -> None:
        self.dice = dice
        self.facts = facts

    def __call__(self, template: str, **more: Any) -> str:
        facts = {**self.facts, **more} if more else self.facts
        out: list[str] = []
        self._fill(_parse(template), facts, out)
        return "".join(out)

    def one_of(self, templates: Sequence[str], **more: Any) -> str:
        return self(self.dice.pick(templates), **more)

    def some(self, templates: Sequence[str], count: int, **more: Any) -> list[str]:
        """count different templates, in random order, filled."""
        return [self(template, **more) for template in self.dice.shuffled(templates)[:count]]

    def _fill(self, parts: tuple[_Part, ...], facts: dict[str, Any], out: list[str]) -> None:
        for part in parts:
            if isinstance(part, str):
                out.append(part)
            elif isinstance(part, list):
                self._fill(self.dice.pick(part), facts, out)
            else:
                out.append(self._value(part[0], facts))

    def _value(self, field: str, facts: dict[str, Any]) -> str:
        name, *attributes = field.split(".")
        if name in facts:
            return str(functools.reduce(getattr, attributes, facts[name]))
        return self.dice.pick(lexicon.LISTS[name])


_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiouAEIOU]|hones)")
_OPENING = re.compile(r'(^|[.!?] |\n|(?:(?<=\s)|(?<=^))")([a-z])')
_QUOTED = re.compile(r'(")([,.])(?=\s|$)')  # the comma goes inside the quotation
_SPACES = re.compile(r"  +")


def finish(text: str) -> str:
    """Settle what a template cannot know: "an" before vowels, capitals at the start of sentences and quotations."""
    text = _SPACES.sub(" ", text).replace(" .", ".").replace(" ,", ",").strip()
    text = _ARTICLE.sub(r"\1n ", text)
    text = _QUOTED.sub(r"\2\1", text)
    return _OPENING.sub(lambda match: match[1] + match[2].upper(), text)


def listed(words: Sequence[str], joint: str = "and") -> str:
    """["a", "b", "c"] -> "a, b and c"."""
    if len(words) == 1:
        return words[0]
    return ", ".join(words[:-1]) + f" {joint} {words[-1]}"
