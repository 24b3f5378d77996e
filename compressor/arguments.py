"""What stands behind an option, as a value. Raises argparse.ArgumentTypeError, which says what is allowed."""

from __future__ import annotations

import argparse
import math
from pathlib import Path


def seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 1 << 63:
        raise argparse.ArgumentTypeError(f"{text!r} is no seed; allowed: whole numbers from 0 to 2^63 - 1")
    return int(text)


def folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("'' is no folder")
    return Path(text)


def tokens(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: whole numbers from 2")
    return int(text)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: whole numbers from 1")
    return int(text)


def sizes(text: str) -> list[int]:
    return [positive(item) for item in text.split(",")]


def layer_or_word(text: str) -> str | int:
    return int(text) if text.isdecimal() else text


def share_or_number(text: str) -> int | float:
    try:
        number = float(text) if "." in text else int(text)
    except ValueError:
        number = 0
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: a whole number, or with a dot a share of the whole")
    return number


def each_layer(text: str) -> int | float | list[int | float]:
    values = [share_or_number(item) for item in text.split(",")]
    return values if len(values) > 1 else values[0]


def share(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: a number above 0, up to 1")
    return number
