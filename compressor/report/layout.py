"""A table as a value, and as Markdown or plain text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_MARKUP = re.compile(r"([\\`*\[\]<|])")


@dataclass(frozen=True)
class Table:
    """Cells as text, the first column a name; `title` stands above, `note` says how its figures were taken.

    words: its cells are words, not figures. apart: so many of the last rows are no models.
    """

    header: tuple[str, ...]
    body: tuple[tuple[str, ...], ...]
    title: str = ""
    note: str = ""
    words: bool = False
    apart: int = 0


def make(
    columns: Mapping[str, Sequence[str]], title: str = "", note: str = "", *, words: bool = False, apart: int = 0
) -> Table:
    """A table of columns of one length."""
    return Table(tuple(columns), tuple(zip(*columns.values(), strict=True)), title, note, words, apart)


def plain(table: Table) -> str:
    """For a terminal: the first column to the left, the others to the right."""
    lines = [[_line(cell) for cell in line] for line in (table.header, *table.body)]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join(_aligned(line, widths, table)).rstrip() for line in lines)


def markdown(table: Table) -> str:
    lines = [[escaped(cell) for cell in line] for line in (table.header, *table.body)]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    rule = [
        "-" * width if table.words or not column else "-" * (width - 1) + ":" for column, width in enumerate(widths)
    ]
    lines = [_aligned(line, widths, table) for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])


def _aligned(line: Sequence[str], widths: Sequence[int], table: Table) -> list[str]:
    """Names and words to the left, figures to the right."""
    cells = enumerate(zip(line, widths, strict=True))
    return [text.rjust(width) if column and not table.words else text.ljust(width) for column, (text, width) in cells]


def _line(text: str) -> str:
    return " ".join(text.split())


def escaped(text: str) -> str:
    """One line of text that Markdown shows as it is, in a table too."""
    return _MARKUP.sub(r"\\\1", _line(text))


def code(text: str) -> str:
    """One line as inline code, in a table too."""
    return f"`{_line(text).replace('`', '').replace('|', chr(92) + '|')}`"


def fenced(text: str) -> str:
    """Several lines as they are."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"
