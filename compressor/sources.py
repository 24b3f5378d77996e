"""What a D names, and how it is read: a data set of the hub, local files, a folder of them, the demo."""

from __future__ import annotations

import glob
import importlib.util
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from .artifacts import hash_files
from .errors import UserError, suggestion

if TYPE_CHECKING:  # importing datasets takes a second, and a .txt does not need it
    from datasets import Dataset

SHORT_NAMES = {
    "wikitext": ("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "imdb": ("stanfordnlp/imdb", None),
    "cnn_dailymail": ("abisee/cnn_dailymail", "3.0.0"),
}
SUFFIXES = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
SPLITS = ("train", "validation", "test")
TEXT_COLUMNS = ("text", "content", "document", "article", "dialogue", "sentence")

Rows: TypeAlias = "Dataset | str"  # a table of rows, or the one unaltered string of a .txt

_ALLOWED = "a local " + " ".join(SUFFIXES) + ", a folder of them, NAME[:CONFIG] on the hub, or demo"
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_ALIASES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
# `test-0001` and `dev2` name a split, `testimonials` and `device` do not
_STEM = re.compile(rf"({'|'.join(sorted(_ALIASES, key=len, reverse=True))})(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """One data source; equal however it is spelled: `wikitext` is `Salesforce/wikitext:wikitext-2-raw-v1`."""

    name: str = field(compare=False)  # what the user wrote
    kind: Literal["hub", "file", "folder", "demo"]
    target: str  # name on the hub, or absolute path
    config: str | None = None


def parse(spec: str) -> Source:
    """Read a D: `NAME[:CONFIG]`, a local file, a folder or `demo`.

    `demo` and the short names come first (a folder of that name is `./imdb`), then what exists on the disk, then the
    hub. Raises UserError for a word that looks like a path (a known suffix, a leading `.`, `/` or `~`, more than one
    slash, or a slash behind an existing folder) where nothing is, for a file of another type, and for what can be no
    name on the hub. Nothing is read or fetched.
    """
    name, colon, config = spec.partition(":")
    if spec == "demo":
        return Source(spec, "demo", spec)
    if name in SHORT_NAMES and (config or not colon):
        target, default = SHORT_NAMES[name]
        return Source(spec, "hub", target, config or default)
    path = os.path.abspath(os.path.expanduser(spec))
    if spec and os.path.isdir(path):
        return Source(spec, "folder", path)
    if spec and os.path.isfile(path):
        if Path(spec).suffix.lower() not in SUFFIXES:
            raise UserError(f"data {spec!r} is a file of another type; allowed: {_ALLOWED}")
        return Source(spec, "file", path)
    if _looks_like_path(spec):
        folder, leaf = os.path.split(path)
        near = suggestion(leaf, os.listdir(folder)) if os.path.isdir(folder) and os.access(folder, os.R_OK) else ""
        raise UserError(f"data {spec!r}: there is no such file or folder{near}")
    if not _HUB_NAME.fullmatch(name) or bool(colon) != bool(config) or name == "demo" or _is_file_format(name):
        raise UserError(f"data {spec!r} names nothing; allowed: {_ALLOWED}")
    return Source(spec, "hub", name, config or None)


def _looks_like_path(spec: str) -> bool:
    return (
        spec.startswith((".", "/", "~"))
        or spec.endswith("/")
        or "\\" in spec
        or spec.count("/") > 1
        or Path(spec).suffix.lower() in SUFFIXES
        or ("/" in spec and os.path.isdir(os.path.dirname(spec)))
    )


def _is_file_format(name: str) -> bool:
    """`text`, `json` and the like: no data sets; under these names datasets would read the current folder."""
    return name.isidentifier() and importlib.util.find_spec(f"datasets.packaged_modules.{name}") is not None


def splits(source: Source, kind: str = "lm") -> dict[str, Callable[[], Rows]]:
    """The splits of a source by name; calling one reads it. kind: which rows of the demo (demo.KINDS).

    `valid`, `val`, `dev`, `training` and `testing` are called by the names of SPLITS. A file is one split, `all`. In a
    folder the beginning of a file's stem names its split (`train-00001.parquet`, `dev.txt`); a file with another stem
    is a split of its own name, and all of them together are `train` where no file has a name of SPLITS. Several .txt of
    one split are one string, joined with a blank line in name order. Raises UserError for what cannot be read.
    """
    if source.kind == "hub":
        return _hub(source)
    if source.kind == "demo":
        return {split: partial(_demo, kind, split) for split in SPLITS}
    if source.kind == "file":
        return {"all": partial(_read, [Path(source.target)])}
    return {split: partial(_read, files) for split, files in _folder(source).items()}


def origin(source: Source, split: str) -> str:
    """What a split is, whatever it is called: its place on the hub or in the demo, or a hash of its files."""
    if source.kind == "file":
        return hash_files([Path(source.target)])
    if source.kind == "folder":
        return hash_files(_folder(source)[split])
    return f"{source.kind}:{source.target}:{source.config or ''}:{split}"


def _hub(source: Source) -> dict[str, Callable[[], Rows]]:
    import datasets
    from huggingface_hub.errors import HTTPError

    try:
        stored = datasets.load_dataset(source.target, source.config)
    # RuntimeError: loading scripts are no longer run; ValueError: unknown config; the rest: not there, no way there
    except (datasets.exceptions.DatasetsError, HTTPError, OSError, ValueError, RuntimeError) as error:
        offline = datasets.config.HF_HUB_OFFLINE
        raise UserError(
            f"data {source.name!r} is not in the cache and could not be fetched ({_one_line(error)}); give "
            f"a local file, or {'unset HF_HUB_OFFLINE' if offline else 'check the name and the network'}"
        ) from error
    named: dict[str, Callable[[], Rows]] = {}
    for split in sorted(stored, key=lambda split: split not in SPLITS):  # an exact name goes before its alias
        canonical = _ALIASES.get(split, split)
        named[split if canonical in named else canonical] = partial(stored.__getitem__, split)
    return named


def _demo(kind: str, split: str) -> Rows:
    from datasets import Dataset

    from . import demo

    return Dataset.from_list(demo.rows(kind, split))


def _folder(source: Source) -> dict[str, list[Path]]:
    try:
        files = sorted(
            path
            for path in Path(source.target).iterdir()
            if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
        )
    except OSError as error:
        raise UserError(f"cannot read folder {source.name}: {_one_line(error)}") from error
    if not files:
        raise UserError(f"folder {source.name} holds no data file; allowed: {' '.join(SUFFIXES)}")
    named: dict[str, list[Path]] = {}
    for path in files:
        match = _STEM.match(path.stem)
        named.setdefault(_ALIASES[match[1].lower()] if match else path.stem, []).append(path)
    return named if set(named) & set(SPLITS) else {**named, "train": files}


def _read(files: list[Path]) -> Rows:
    kinds = {SUFFIXES[path.suffix.lower()] for path in files}
    if len(kinds) > 1:
        raise UserError(f"the files of one split must be of one type, not {', '.join(path.name for path in files)}")
    kind = kinds.pop()
    if kind != "text":
        return _table(kind, files)
    strings = []
    for path in files:
        try:
            strings.append(path.read_bytes().decode("utf-8"))  # not read_text(): it would turn \r\n into \n
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {path}: {_one_line(error)}; a .txt must be UTF-8 text") from error
    return "\n\n".join(strings)


def _table(kind: str, files: list[Path]) -> Dataset:
    import datasets
    import pyarrow

    # else the text "NA" or "null" of a CSV would be read as missing
    options = {"keep_default_na": False} if kind == "csv" else {}
    given = ", ".join(str(path) for path in files)
    if not any(path.stat().st_size for path in files):
        raise UserError(f"{given} is empty; give text")
    # not load_dataset(): it tells the hub of every local read, and waits for it where there is no network
    read = {
        "csv": datasets.Dataset.from_csv,
        "json": datasets.Dataset.from_json,
        "parquet": datasets.Dataset.from_parquet,
    }[kind]
    try:
        with tempfile.TemporaryDirectory() as cache, _silent_datasets():  # no copy of a user's file stays in the cache
            return read([glob.escape(str(path)) for path in files], cache_dir=cache, keep_in_memory=True, **options)
    except (datasets.exceptions.DatasetsError, pyarrow.ArrowException, OSError, ValueError, StopIteration) as error:
        raise UserError(f"cannot read {given} as {kind} with rows: {_one_line(error)}") from error


@contextmanager
def _silent_datasets() -> Iterator[None]:
    """Without the progress bars and error logs of datasets: a user's mistake is one line."""
    import datasets

    bars, level = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()


def _one_line(error: BaseException) -> str:
    """An error of a library in one line; the cause says more than datasets' own wrapping."""
    words = str(error.__cause__ or error).split()
    return " ".join(words)[:300] or type(error).__name__


def strings(rows: Dataset, source: Source, text_column: str | None, start: int, stop: int) -> list[str]:
    """The text column of rows start..stop-1.

    The column is `text_column`, else the first of TEXT_COLUMNS that exists, else the only string column. Raises
    UserError when there is no such column, or it holds anything but strings.
    """
    import pyarrow

    kinds = {name: getattr(feature, "dtype", None) for name, feature in rows.features.items()}
    texts = [name for name, kind in kinds.items() if kind in ("string", "large_string")]
    known = [name for name in TEXT_COLUMNS if name in kinds]
    listed = ", ".join(kinds)
    if text_column is not None and text_column not in kinds:
        raise UserError(f"data {source.name!r} has no column {text_column!r}; its columns: {listed}")
    if text_column is None and not known and len(texts) != 1:
        raise UserError(f"data {source.name!r}: which column is the text? Give --text-column, one of: {listed}")
    column = text_column if text_column is not None else known[0] if known else texts[0]
    if column not in texts:
        raise UserError(
            f"column {column!r} of data {source.name!r} does not hold strings; columns that do: "
            f"{', '.join(texts) or 'none'}"
        )
    try:
        values = rows.select_columns([column])[start:stop][column]
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"cannot read column {column!r} of data {source.name!r}: {_one_line(error)}") from error
    if None in values:
        raise UserError(
            f"column {column!r} of data {source.name!r} has no text in row {start + values.index(None)}; "
            "give a string in every row"
        )
    return values
