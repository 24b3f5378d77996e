"""report.html: one file that loads nothing, runs nothing and shows everything."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import planted
import pytest
from planted import generation, imdb, latency, perplexity, report, row, size

from compressor.artifacts import provenance
from compressor.benchmark import Gap, Report
from compressor.report.content import content
from compressor.report.page import document

EVIL = '<script>alert("x")</script>&amp;'
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Elements with their attributes, the text, and whether what was opened was closed."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def study() -> tuple[str, Page]:
    runs = [f"{kind}_{n}" for kind in ("merged", "compressed") for n in (4, 6, 8, 10)]
    told = [planted.story(run, alignment=planted.alignment(48, direct=6, tensors="one")) for run in runs]
    text = document(content(planted.study(), told))
    return text, Page(text)


def test_a_study_of_twenty_rows_is_one_small_file_that_needs_nothing(study):
    text, page = study
    assert len(text.encode()) < 3_000_000
    assert not page.all("script") and not page.all("iframe") and not page.all("img") and not page.all("object")
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "xlink:href", "action", "data", "poster"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes[name])
    style = text[text.index("<style>") : text.index("</style>")]
    assert "http" not in style and "@import" not in style and not re.search(r"url\((?!['\"]?#)", style)
    policy = next(item for item in page.all("meta") if item.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_everything_is_there(study):
    text, page = study
    assert [item["id"] for item in page.all("section")] == [
        "summary",
        "models",
        "tables",
        "missing",
        "plots",
        "samples",
        "made",
    ]
    assert len(page.all("figure")) == len(page.all("svg")) == 9
    assert all(item["role"] == "img" and item["aria-label"] for item in page.all("svg"))
    shown = " ".join(" ".join(page.text).split())
    for whole in planted.study().rows:
        assert shown.count(whole.name) > 5
    for words in (
        *planted.PROMPTS,
        "tf-idf (no model)",
        "lead-3 (no model)",
        "loops",
        "Made by gpt2-compress",
        "wikitext",
    ):
        assert words in shown
    assert "prefers-color-scheme: dark" in text and "@media print" in text


def test_links_lead_somewhere_and_no_identity_stands_twice(study):
    _, page = study
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {item["href"][1:] for item in page.all("a")}
    assert "gap-1" in targets and targets <= set(ids)


def test_gaps_are_marked_and_explained():
    gap = Gap("imdb", {"context": 256}, "context=256 is more than the 128 positions")
    whole = report(row("original", imdb(0.8)), row("short", size(100), gap))
    page = Page(document(content(whole)))
    assert {"class": "gap", "href": "#gap-1"} in page.all("a")
    shown = " ".join(page.text)
    assert "imdb (context=256)" in shown and "is more than the 128 positions" in shown
    assert ">0.000<" not in document(content(whole)) and "<td></td>" not in document(content(whole))


def test_what_users_name_stays_text():
    texts = (f"{EVIL} one", "</pre><img src=http://evil/x onerror=alert(1)>")
    rows = (
        row(EVIL, [*size(100), *perplexity(20.0), *latency(10, 1), *imdb(0.8)], Gap("rouge", {}, EVIL)),
        row(
            f"{EVIL}: recovered", [*size(90), *perplexity(21.0, source=EVIL), *generation(0.5, 0.5, texts, loops=True)]
        ),
    )
    data = {EVIL: {"source": EVIL, "fingerprint": EVIL}}
    origin = provenance(seed=0, base_model=EVIL, base_hash="", device="cpu", dtype=EVIL, data=data)
    whole = Report(rows, origin, ({"metric": "imdb", "context": EVIL},), (row(EVIL, imdb(0.5)),))
    page = Page(document(content(whole, [planted.story(EVIL, rewrites=({"rewrite": EVIL, "n": EVIL},))])))
    assert not page.all("script") and not page.all("img")
    assert "".join(page.text).count('<script>alert("x")') > 15


def test_the_parts_without_content_are_left_out():
    page = Page(document(content(report(row("gpt2", size(100))))))
    assert [item["id"] for item in page.all("section")] == ["summary", "models", "tables", "made"]
    assert not page.all("svg")


def test_the_same_page_each_time(study):
    small = report(*planted.study().rows[:4])
    assert document(content(small)) == document(content(small))
