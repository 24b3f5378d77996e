"""A report as report.html: one file that needs nothing else, for light and dark screens and for paper."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from .content import Content
from .layout import Table
from .pictures import Picture
from .tasks import Prompt

_GAP = re.compile(r"gap \[(\d+)\]")

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --grey: #6e7782; --grid: #e4e7ec; --paper: #fffffe; --page: #f5f6f8;
  --blue: #0072b2; --link: #0b5cad; --mark: #fff1d6; --edge: #b35900; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --grey: #99a2ad; --grid: #30353c; --paper: #191c20;
  --page: #101215; --blue: #3f9fe0; --link: #7ab8ff; --mark: #3b2c10; --edge: #f0a94b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 26px; line-height: 1.25; margin: 8px 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 0 0 10px; }
h3 { font-size: 15px; margin: 22px 0 6px; }
nav { font-size: 14px; margin: 0 0 18px; } nav a { margin-right: 14px; white-space: nowrap; }
a { color: var(--link); }
section { background: var(--paper); border: 1px solid var(--grid); border-radius: 8px; padding: 18px 20px;
  margin: 16px 0; }
.made, .note, figcaption { color: var(--grey); font-size: 13px; margin: 4px 0 10px; overflow-wrap: anywhere; }
ul { margin: 0; padding-left: 20px; } li { margin: 4px 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(240px, 1fr)); gap: 12px; margin: 0 0 16px; }
.tile { border: 1px solid var(--grid); border-radius: 8px; padding: 12px 14px; overflow-wrap: anywhere; }
.tile b { display: block; margin-bottom: 6px; }
.tile dl { display: flex; flex-wrap: wrap; gap: 8px 30px; margin: 0; }
.tile dl div { display: flex; flex-direction: column-reverse; }
.tile dd { font-variant-numeric: tabular-nums; font-weight: 600; font-size: 22px; line-height: 1.25; margin: 0; }
.tile dt { color: var(--grey); font-size: 13px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; min-width: 60%; }
th, td { padding: 5px 0 5px 12px; text-align: right; border-bottom: 1px solid var(--grid); vertical-align: top; }
th { font-weight: 600; vertical-align: bottom; } tbody th { font-weight: 400; vertical-align: top; }
th:first-child { text-align: left; min-width: 12em; padding-left: 0; overflow-wrap: anywhere; }
td, th span { white-space: nowrap; }
table.words th, table.words td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
table.words th:first-child { min-width: 4em; }
tr:first-child > th[scope=row] { font-weight: 600; } table.words tr > th[scope=row] { font-weight: 400; }
tr.apart { color: var(--grey); font-style: italic; }
a.gap { background: var(--mark); color: var(--edge); border-radius: 4px; padding: 0 6px; text-decoration: none; }
figure { margin: 0 0 26px; } figure:last-child { margin-bottom: 0; }
figure svg { display: block; width: 100%; height: auto; }
code, pre { font: 12.5px/1.5 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; margin: 4px 0 0; } .text pre { font: 13px/1.5 inherit; font-family: inherit; }
blockquote { margin: 18px 0 10px; padding: 6px 12px; border-left: 3px solid var(--grid); white-space: pre-wrap;
  overflow-wrap: anywhere; }
.texts { display: grid; grid-template-columns: repeat(auto-fit, minmax(260px, 1fr)); gap: 10px; }
.text { border: 1px solid var(--grid); border-radius: 6px; padding: 8px 10px; break-inside: avoid;
  overflow-wrap: anywhere; }
.text b { font-size: 13px; }
.loops { background: var(--mark); color: var(--edge); border-radius: 4px; padding: 0 6px; font-size: 12px;
  margin-left: 6px; }
@media print { :root { color-scheme: light; --ink: #000; --grey: #444; --grid: #ccc; --paper: #fff; --page: #fff; }
  section { border: 0; padding: 0; } nav { display: none; } figure, tr, .tile { break-inside: avoid; }
  h2, h3, figcaption { break-after: avoid; }
  main { max-width: none; padding: 0; } .wide { overflow: visible; }
  table { font-size: 9px; } td { white-space: normal; } }
"""


def document(told: Content) -> str:
    """The whole page. It loads nothing and runs nothing; all that a user named is escaped."""
    sections = [
        ("summary", "Summary", _summary(told)),
        ("workflow", "Workflow", _workflow(told.workflow)),
        ("models", told.main.title, _table(told.main)),
        ("tables", "Tables", "\n".join(_titled(table) for table in told.tables)),
        *((key, title, _diagnosed(note, own)) for key, title, note, own in told.diagnosed),
        ("missing", "Not measured", _missing(told.missing) if told.missing else ""),
        ("plots", "Plots", "\n".join(map(_figure, told.pictures))),
        ("samples", "Samples", "\n".join(map(_prompt, told.prompts))),
        ("made", "How it was made", _made(told)),
    ]
    there = [section for section in sections if section[2]]
    links = "\n".join(f'<a href="#{name}">{escape(title)}</a>' for name, title, _ in there)
    body = "\n".join(
        f'<section id="{name}">\n<h2>{escape(title)}</h2>\n{content}\n</section>' for name, title, content in there
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{escape(told.title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>{escape(told.title)}</h1>
<p class="made">{escape(told.made)}</p>
<nav>
{links}
</nav>
{body}
</main>
</body>
</html>
"""


def _summary(told: Content) -> str:
    tiles = "\n".join(
        f'<div class="tile"><b>{escape(tile.name)}</b><dl>'
        + "".join(f"<div><dt>{escape(what)}</dt><dd>{escape(value)}</dd></div>" for value, what in tile.figures)
        + "</dl></div>"
        for tile in told.tiles
    )
    found = "\n".join(f"<li>{escape(line)}</li>" for line in told.findings)
    return (f'<div class="tiles">\n{tiles}\n</div>\n' if tiles else "") + f"<ul>\n{found}\n</ul>"


def _workflow(steps: Sequence[str]) -> str:
    items = "\n".join(f"<li>{escape(step)}</li>" for step in steps)
    return f"<ol>\n{items}\n</ol>" if steps else ""


def _note(table: Table) -> str:
    return f'<p class="note">{escape(table.note)}</p>\n' if table.note else ""


def _titled(table: Table) -> str:
    return f"<h3>{escape(table.title)}</h3>\n{_table(table)}"


def _table(table: Table, anchors: bool = False) -> str:
    head = "".join(f'<th scope="col">{_words(cell)}</th>' for cell in table.header)
    lines = []
    for place, (name, *cells) in enumerate(table.body):
        apart = ' class="apart"' if place >= len(table.body) - table.apart else ""
        anchor = f' id="gap-{name.strip("[]")}"' if anchors else ""
        marked = "".join(f"<td>{_cell(cell)}</td>" for cell in cells)
        lines.append(f'<tr{apart}{anchor}><th scope="row">{escape(name)}</th>{marked}</tr>')
    kind = ' class="words"' if table.words else ""
    body = "\n".join(lines)
    return (
        f'{_note(table)}<div class="wide"><table{kind}>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def _cell(text: str) -> str:
    gap = _GAP.fullmatch(text)
    return f'<a class="gap" href="#gap-{gap[1]}">gap {gap[1]}</a>' if gap else escape(text)


def _words(text: str) -> str:
    """Words that no line may cut at their hyphens."""
    return " ".join(f"<span>{escape(word)}</span>" for word in text.split())


def _diagnosed(note: str, tables: Sequence[Table]) -> str:
    shown = "\n".join(map(_titled, tables))
    return f'<p class="note">{escape(note)}</p>\n{shown}'


def _missing(table: Table) -> str:
    return _table(table, anchors=True)


def _figure(picture: Picture) -> str:
    label = f'<svg role="img" aria-label="{escape(picture.title)}"'
    drawing = picture.svg().replace("<svg", label, 1)
    title, caption = escape(picture.title), escape(picture.caption)
    return f"<figure>\n<h3>{title}</h3>\n<figcaption>{caption}</figcaption>\n{drawing}\n</figure>"


def _prompt(prompt: Prompt) -> str:
    texts = "\n".join(
        f'<div class="text"><b>{escape(sample.model)}</b>'
        + ('<span class="loops">loops</span>' if sample.loops else "")
        + f"<pre>{escape(sample.text)}</pre></div>"
        for sample in prompt.samples
    )
    how = f'<p class="note">{escape(prompt.how)}</p>\n' if prompt.how else ""
    return f'<blockquote>{escape(prompt.prompt)}</blockquote>\n{how}<div class="texts">\n{texts}\n</div>'


def _made(told: Content) -> str:
    tables = "\n".join(map(_titled, told.origin))
    return f"<p>Made by {escape(told.made)}, with</p>\n<pre>{escape(told.command)}</pre>\n{tables}"
