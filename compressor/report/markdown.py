"""A report as report.md, and as what a terminal shows."""

from __future__ import annotations

import textwrap

from ..benchmark import Report
from . import assisted, extrapolation, nested, tables, tasks
from .content import Content, missing
from .figures import Gaps, ways
from .layout import Table, code, escaped, fenced, markdown, plain

_WIDTH = 100  # of samples: a line that is not wrapped has to be scrolled


def document(told: Content) -> str:
    """report.md, whose plots lie beside it."""
    parts = [f"# {escaped(told.title)}", "## Summary", "\n".join(f"- {escaped(line)}" for line in told.findings)]
    if told.workflow:
        parts += ["## Workflow", "\n".join(f"{n}. {escaped(step)}" for n, step in enumerate(told.workflow, 1))]
    for table in (told.main, *told.tables):
        parts += _section(table)
    for _, title, note, own in told.diagnosed:
        parts += [f"## {title}", escaped(note)]
        for table in own:
            parts += _section(table, "###")
    if told.missing:
        parts += _section(told.missing)
    if told.pictures:
        parts.append("## Plots")
    for picture in told.pictures:
        parts += [f"### {picture.title}", f"![{picture.title}]({picture.file})", escaped(picture.caption)]
    if told.prompts:
        parts.append("## Samples")
    for prompt in told.prompts:
        parts += (
            [f"### After {code(prompt.prompt)}", escaped(prompt.how)]
            if prompt.how
            else [f"### After {code(prompt.prompt)}"]
        )
        for sample in prompt.samples:
            parts += [f"**{escaped(sample.model)}**{' (loops)' if sample.loops else ''}", fenced(_wrapped(sample.text))]
    parts += ["## How it was made", f"Made by {told.made}:", code(told.command)]
    for table in told.origin:
        parts += _section(table, "###")
    return "\n\n".join(parts) + "\n"


def _section(table: Table, head: str = "##") -> list[str]:
    parts = [f"{head} {escaped(table.title)}", escaped(table.note), markdown(table)]
    return [part for part in parts if part]


def _wrapped(text: str) -> str:
    lines = [
        textwrap.wrap(line, _WIDTH, replace_whitespace=False, drop_whitespace=False) or [""]
        for line in text.splitlines()
    ]
    return "\n".join(line.rstrip() for wrapped in lines for line in wrapped)


def terminal(report: Report, gaps: Gaps) -> str:
    """The main table, then what it has no room for, and why anything is missing."""
    parts = [plain(tables.overview(report, gaps))]
    for index, table in enumerate(tables.perplexities(report, gaps)):
        parts.append(headed(table) if index else _head(table))  # the main table has the first
    parts += map(headed, nested.tables(report))
    parts += map(headed, extrapolation.tables(report, gaps))
    if len(ways(report, "latency")) > 1:  # the main table has the first kind
        parts += map(headed, tables.latencies(report, gaps))
    parts += map(headed, assisted.tables(report, gaps))
    parts += [headed(tasks.table(report, task, everything=False)) for task in tasks.tasks(report, gaps)]
    absent = missing(gaps)
    if absent:
        parts.append(
            "Not measured:\n" + "\n".join(f"{number} {what} of {who}: {why}" for number, what, who, why in absent.body)
        )
    return "\n\n".join(parts)


def _head(table: Table) -> str:
    return f"{table.title}: {table.note[:1].lower()}{table.note[1:]}" if table.note else f"{table.title}:"


def headed(table: Table) -> str:
    """A table for a terminal under its title and note."""
    return f"{_head(table)}\n\n{plain(table)}"
