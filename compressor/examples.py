"""The rows of a task: labelled texts and documents with their summaries, found by the names of their columns.

Rows are ordered by a hash of their text (classes evenly mixed), so that the first so many of them are a fair sample
whatever the order of the source: the hub's `imdb` is sorted by label.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .data import chosen_splits, fingerprint
from .errors import UserError
from .sources import TEXT_COLUMNS, Rows, Source, origin, parse, splits

LABEL_COLUMNS = ("label", "sentiment", "class", "target")
PAIRS = (("document", "summary"), ("article", "highlights"), ("dialogue", "summary"), ("text", "summary"))
_SELECTION, _TEST = 10, 10  # percent that is set aside where a source has no split for it


@dataclass(frozen=True)
class Examples:
    """Texts and what belongs to each of them."""

    texts: tuple[str, ...]
    targets: tuple[Any, ...]  # labelled: the index of the class; summaries: the summary
    source: str  # what the user named
    part: str  # training | selection | test
    split: str  # where it lies in the source
    fingerprint: str  # sha256 over texts and targets
    origins: tuple[tuple[str, int, int], ...]  # as of data.Text
    classes: tuple[str, ...] = ()  # labelled: the name of each class, in the order of the labels

    @property
    def documents(self) -> tuple[str, ...]:
        """The texts, under the name that data.describe asks for."""
        return self.texts

    def __len__(self) -> int:
        return len(self.texts)

    def first(self, count: int | None) -> Examples:
        """The first `count` rows, all where it is None or more than there are."""
        if count is None or count >= len(self):
            return self
        texts, targets = self.texts[:count], self.targets[:count]
        return replace(self, texts=texts, targets=targets, fingerprint=_fingerprint(texts, targets))


@dataclass(frozen=True)
class Labelled:
    """The parts of a labelled source; no text is in two of them."""

    training: Examples
    selection: Examples
    test: Examples

    @property
    def source(self) -> str:
        return self.test.source

    @property
    def fingerprint(self) -> str:
        """sha256 of all three."""
        return hashlib.sha256(
            "".join(part.fingerprint for part in (self.training, self.selection, self.test)).encode()
        ).hexdigest()


def labelled(spec: str, *, text_column: str | None = None, split: str | None = None) -> Labelled:
    """Texts with a class each: of imdb, a file or a folder with the columns text and label.

    test: the test split; selection: the validation split, else a tenth of the training rows; training: the rest. Of a
    source of one split a tenth is the test part, and of what is left likewise. A text that stands in two parts is left
    out of training before selection, and of selection before test; a row without a text or a label is left out. Raises
    UserError for a source without such columns, and for training and selection parts that lack a class.
    """
    source = parse(spec)
    stored = splits(source, "reviews")
    named = chosen_splits(source, stored, split)
    rows = {name: _labelled_rows(stored[name](), source, text_column) for name in named}
    classes = sorted(
        {label for part in rows.values() for _, label in part}, key=lambda label: (str(type(label)), label)
    )
    if len(classes) < 2:
        raise UserError(f"data {spec!r} has the class {classes[0]!r} only; allowed: two classes or more")
    main = "train" if "train" in rows else next(iter(rows))
    ordered = {name: _mixed([(text, classes.index(label)) for text, label in part]) for name, part in rows.items()}
    rest, where = ordered[main], {"training": main}
    if "test" in rows and main != "test":
        test, where["test"] = ordered["test"], "test"
    elif "validation" in rows and main != "validation":
        test, where["test"] = ordered["validation"], "validation"
    else:
        (test, rest), where["test"] = _cut(rest, _TEST), main
    if "validation" in rows and where["test"] != "validation" and main != "validation":
        selection, where["selection"] = ordered["validation"], "validation"
    else:
        (selection, rest), where["selection"] = _cut(rest, _SELECTION), main
    selection = _without(selection, test)
    found = {"training": _without(_without(rest, test), selection), "selection": selection, "test": test}
    for part, own in found.items():
        if not own or (part != "test" and {label for _, label in own} != set(range(len(classes)))):
            raise UserError(f"the {part} part of {spec} has {len(own)} rows and not every class; give more rows")
    names = tuple(map(str, classes))
    return Labelled(**{part: _examples(own, source, part, [where[part]], names) for part, own in found.items()})


def summaries(spec: str, *, text_column: str | None = None, split: str | None = None) -> Examples:
    """Documents with their summaries: the test split of a source, else all of it.

    Columns: one of PAIRS, or `text_column` and `summary`. Rows without text on either side are left out. Raises
    UserError where there are none.
    """
    source = parse(spec)
    stored = splits(source, "summaries")
    named = chosen_splits(source, stored, split)
    named = ["test"] if "test" in named else named
    pairs: list[tuple[str, str]] = []
    for name in named:
        rows = _table(stored[name](), source)
        document, summary = _pair(rows, source, text_column)
        pairs += [
            (one, two) for one, two in zip(rows[document], rows[summary], strict=True) if _text(one) and _text(two)
        ]
    if not pairs:
        raise UserError(f"data {spec!r} has no row with a document and its summary")
    return _examples(sorted(pairs, key=lambda pair: _digest(*pair)), source, "test", named)


# ---------------------------------------------------------------- columns


def _table(rows: Rows, source: Source) -> Any:
    if isinstance(rows, str):
        raise UserError(f"data {source.name!r} is plain text; a task needs rows with columns (.parquet .jsonl .csv)")
    return rows


def _labelled_rows(rows: Rows, source: Source, text_column: str | None) -> list[tuple[str, Any]]:
    table = _table(rows, source)
    text = _column(table, source, (text_column,) if text_column else TEXT_COLUMNS, "text")
    label = _column(table, source, LABEL_COLUMNS, "label")
    both = zip(table[text], map(_class, table[label]), strict=True)
    found = [(one, two) for one, two in both if two is not None and _text(one)]
    if not all(isinstance(value, str) or (isinstance(value, int) and value >= 0) for _, value in found):
        raise UserError(f"column {label!r} of data {source.name!r} holds no classes; allowed: words or numbers from 0")
    if not found:
        raise UserError(f"data {source.name!r} has no row with a text and a label")
    return found


def _class(value: Any) -> Any:
    """A label as a word or a whole number (pandas makes floats of them where one is missing); None: there is none."""
    if isinstance(value, float):
        return None if value != value else int(value) if value.is_integer() else value
    return None if isinstance(value, str) and not value.strip() else value


def _column(table: Any, source: Source, names: Sequence[str], what: str) -> str:
    for name in names:
        if name in table.column_names:
            return name
    raise UserError(
        f"data {source.name!r} has no column for the {what} (looked for {', '.join(names)}); its columns: "
        f"{', '.join(table.column_names)}"
    )


def _pair(table: Any, source: Source, text_column: str | None) -> tuple[str, str]:
    pairs = [(text_column, "summary"), (text_column, "highlights")] if text_column else PAIRS
    for document, summary in pairs:
        if document in table.column_names and summary in table.column_names:
            return document, summary
    raise UserError(
        f"data {source.name!r} has no columns of documents and summaries "
        f"({', '.join('/'.join(pair) for pair in pairs)}); its columns: {', '.join(table.column_names)}"
    )


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


# ---------------------------------------------------------------- order


def _digest(*strings: str) -> bytes:
    return hashlib.sha256("\0".join(strings).encode("utf-8", "surrogatepass")).digest()


def _mixed(rows: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    """By a hash of the text, the classes at their shares in every stretch."""
    by_class: dict[int, list[tuple[str, int]]] = {}
    for row in sorted(rows, key=lambda row: _digest(row[0])):
        by_class.setdefault(row[1], []).append(row)
    placed = [
        ((place + 0.5) / len(own), label, row) for label, own in by_class.items() for place, row in enumerate(own)
    ]
    return [row for _, _, row in sorted(placed)]


def _cut(rows: list[tuple[str, int]], percent: int) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """(so many percent of the rows, those of the rest that repeat none of their texts)."""
    place = len(rows) * percent // 100
    return rows[:place], _without(rows[place:], rows[:place])


def _without(rows: list[tuple[str, int]], others: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """The rows whose text stands in none of the others."""
    texts = {text for text, _ in others}
    return [row for row in rows if row[0] not in texts]


def _examples(
    rows: Sequence[tuple[str, Any]],
    source: Source,
    part: str,
    named: Sequence[str],
    classes: tuple[str, ...] = (),
) -> Examples:
    texts, targets = tuple(text for text, _ in rows), tuple(target for _, target in rows)
    return Examples(
        texts=texts,
        targets=targets,
        source=source.name,
        part=part,
        split="+".join(named),
        fingerprint=_fingerprint(texts, targets),
        origins=tuple((origin(source, name), 0, 100) for name in named),
        classes=classes,
    )


def _fingerprint(texts: Sequence[str], targets: Sequence[Any]) -> str:
    return fingerprint([part for text, target in zip(texts, targets, strict=True) for part in (text, str(target))])
