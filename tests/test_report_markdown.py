"""report.md: all of it, and safe to render."""

from __future__ import annotations

import re

import planted
from planted import generation, imdb, perplexity, report, row, size

from compressor.benchmark import Gap
from compressor.report.content import content
from compressor.report.figures import Gaps
from compressor.report.layout import code, escaped, fenced
from compressor.report.markdown import document, terminal


def tables(text: str) -> list[list[str]]:
    return [block.splitlines() for block in text.split("\n\n") if block.startswith("| ")]


def test_tables_have_as_many_cells_in_each_line_whatever_a_model_is_called():
    whole = report(row("a|b `c` *d* <e>", [*size(100), *perplexity(20.0), *imdb(0.8)]), row("x" * 60, size(90)))
    for lines in tables(document(content(whole))):
        bars = [len(re.findall(r"(?<!\\)\|", line)) for line in lines]
        assert len(set(bars)) == 1 and len({len(line) for line in lines}) == 1
        assert re.fullmatch(r"\| -+:?( \| -+:?)* \|", lines[1])


def test_everything_stands_in_it():
    text = document(content(planted.study(), [planted.story("merged_4")]))
    heads = ["Summary", "Size, quality and speed", "Recovery", "Perplexity lm-eval", "Decode latency", "IMDb, probe",
             "Summaries, greedy", "Size", "Not measured", "Plots", "Samples", "How it was made"]  # fmt: skip
    places = [text.index(f"\n## {head}\n") for head in heads]
    assert places == sorted(places)
    assert "\n### Runs\n" in text and "\n### Data\n" in text
    assert "**merged\\_8" not in text and "(loops)" in text
    assert "gap \\[1\\]" in text and "context=256 is more than the 128 positions" in text
    assert "tf-idf (no model)" in text


def test_a_text_with_fences_and_long_lines_stays_a_block():
    written = ("```\n# no heading\n" + "word " * 60, "    indented\n\nlast")
    whole = report(row("original", generation(0.5, 0.0, written)))
    text = document(content(whole))
    block = text[text.index("````text") :]
    block = block[: block.index("\n````", 8)]
    assert "# no heading" in block and max(map(len, block.splitlines())) <= 100
    assert "    indented\n\nlast" in text


def test_pieces():
    assert escaped("a_b [1] <i> \\ `x`\n|") == "a_b \\[1\\] \\<i\\> \\\\ \\`x\\` \\|".replace("\\>", ">")
    assert code("a`b\nc|d") == "`ab c\\|d`"
    assert fenced("x").startswith("```text\n") and fenced("`````").startswith("``````text\n")


def test_the_terminal_says_why_something_is_missing():
    gap = Gap("perplexity", {"context": 4096}, "context=4096 is not allowed")
    whole = report(row("gpt2", [*size(100), *imdb(0.8)], gap), row("small", size(90), gap))
    text = terminal(whole, Gaps(whole))
    assert text.splitlines()[0].split()[:2] == ["model", "parameters"]
    assert "gap [1]" in text and text.endswith(
        "Not measured:\n[1] perplexity (context=4096) of gpt2, small: context=4096 is not allowed"
    )
    assert "|" not in text and "IMDb, probe: higher is better." in text
