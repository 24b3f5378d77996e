"""What stands on a command line: options of the command, key=value, and `--rank 8` for `rank=8`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .commands import Parser, build
from .errors import UserError, suggestion, unknown

_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of a command line and its key=value overrides. Raises UserError."""
    parser, commands = build()
    place = next((index for index, word in enumerate(arguments) if not word.startswith("-")), None)
    if place is None or any(word in ("-h", "--help", "--version") for word in arguments[:place]):
        return parser.parse_args(arguments), []  # help, the version, or no command
    command, rest = arguments[place], arguments[place + 1 :]
    if command not in commands:
        raise unknown("command", command, commands)
    rest, overrides = _take_keys(commands[command], rest)
    return parser.parse_args([*arguments[:place], command, *rest]), overrides


def _take_keys(parser: Parser, arguments: list[str]) -> tuple[list[str], list[str]]:
    """Splits what a command's own options are from key=value, which may stand anywhere, and from --key value."""
    own, overrides = [], []
    known = parser.values
    remaining = iter(arguments)
    for word in remaining:
        name = word.partition("=")[0]
        if word == "--":
            own += [word, *remaining]
        elif name in known:
            own.append(word)
            if known[name] and "=" not in word:
                own += [value for value in [next(remaining, None)] if value is not None]
        elif parser.takes_keys and _OVERRIDE.match(word):
            overrides.append(word)
        elif word.startswith("--"):
            overrides.append(_key_of(parser, word, remaining))
        else:
            own.append(word)
    return own, overrides


def _key_of(parser: Parser, word: str, remaining: Iterator[str]) -> str:
    """`--delta-init svd` as `delta_init=svd`."""
    name, given, value = word.partition("=")
    key = name.removeprefix("--").replace("-", "_")
    if not parser.takes_keys or not re.fullmatch(r"[A-Za-z_]\w*", key):
        raise UserError(f"unknown option {name}{suggestion(name, parser.values)}; see `{parser.prog} --help`")
    if not given:
        value = next(remaining, "")
    if not value or value.startswith("--"):
        near = suggestion(name, parser.values)
        raise UserError(f"unknown option {name}{near}" if near else f"{name} needs a value, as in {name} 8")
    return f"{key}={value}"


def rewrite_record(rewrite: str, overrides: Sequence[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """A rewrite as a recipe has it, of its name, what options gave and key=value."""
    record = {"rewrite": rewrite, **given}
    return {**record, **keys(overrides, record)}


def keys(overrides: Sequence[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """key=value as plain values. Raises UserError for a key that was given already."""
    from . import recipe  # not with --help: it loads torch

    values: dict[str, Any] = {}
    for override in overrides:
        key, _, text = override.partition("=")
        if key in given or key in values:
            raise UserError(f"{override}: {key} is {({**given, **values})[key]!r} already; give it once")
        values[key] = recipe.parse_yaml(text, override)
    return values
