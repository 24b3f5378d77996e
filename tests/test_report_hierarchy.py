"""Hierarchies of token embeddings in reports: the planted figures, and nothing where there are none."""

from __future__ import annotations

import copy

import numpy as np
import planted
import pytest
from conftest import make_text
from planted import perplexity, report, row, size
from test_report_page import Page

from compressor import pipeline
from compressor.errors import UserError
from compressor.recipe import Align, Finetune
from compressor.report import hierarchy
from compressor.report.content import content
from compressor.report.drawing import look
from compressor.report.markdown import document as markdown
from compressor.report.page import document
from compressor.report.story import Story
from compressor.rewrites import from_record
from compressor.steps.story import stories

MET = {"tokens": 50, "purity": 0.75, "chance": 0.5, "nmi": 0.25, "ami": 0.125}
COSINES = [[1.0, 0.25, -0.5], [0.25, 1.0, 0.0], [-0.5, 0.0, 1.0]]


def prefix(coordinates, **changed):
    fields = {"coordinates": coordinates, "mean_cosine": 0.375, "clusters": 7, "largest": 1200, "clustered": 2000}
    return {**fields, "agreement": {"word_start": dict(MET), "form": None}, **changed}


MADE = {
    "diagnostics": [
        {"rewrite": "later", "what": 1},
        {
            "rewrite": "matryoshka",
            "minimum_similarity": 0.7,
            "minimum_group_size": 3,
            "vocabulary": 8192,
            "prefixes": [prefix(128), prefix(64, clusters=9)],
            "map": {"tokens": ["a", "e", "#"], "sets": [["vowels", 2], ["symbols", 1]], "cosines": [COSINES, COSINES]},
        },
    ]
}
REPORT = report(
    row("original", [*size(planted.SMALL), *perplexity(25.0)]),
    row("rewritten", [*size(110_529_792), *perplexity(40.0)]),
)


def told(run=""):
    return Story(run, hierarchies=(hierarchy.hierarchy(MADE, "rewritten", "here"),))


def test_a_table_for_each_model():
    (table,) = hierarchy.tables([told("mine"), Story("plain")])
    assert table.title == "mine: rewritten"
    assert table.header[:5] == ("coordinates", "mean cosine", "clusters", "the largest", "in a cluster")
    assert table.header[5:7] == ("word start: purity (chance)", "word start: NMI (adjusted)")
    assert table.body[1] == ("64", "0.375", "9", "1,200", "2,000", "0.75 (0.50)", "0.25 (0.12)", "-", "-")
    assert "8,192 tokens; clusters of 3 or more at a cosine of 0.7" in table.note


def test_a_report_shows_them_and_another_does_not():
    page = Page(document(content(REPORT, [told()])))
    assert "hierarchies" in [item["id"] for item in page.all("section")]
    assert "0.75 (0.50)" in " ".join(page.text)
    text = markdown(content(REPORT, [told()]))
    assert text.index(f"\n## {hierarchy.TITLE}\n") < text.index("\n### rewritten\n") < text.index("](hierarchy.png)")
    without = content(REPORT, [planted.story()])
    assert without.hierarchies == () and hierarchy.TITLE not in markdown(without) + document(without)


def test_the_picture_holds_every_cosine():
    with look():
        figure = hierarchy.plot([Story("plain"), told("mine")])
        assert hierarchy.plot([Story("plain")]) is None
    maps = figure.axes[:2]
    assert [axes.get_title(loc="left") for axes in maps] == ["mine, rewritten: 128 coordinates", "64 coordinates"]
    assert all(np.array_equal(axes.images[0].get_array(), COSINES) for axes in maps)
    assert [text.get_text() for text in maps[0].get_yticklabels()] == ["vowels", "symbols"]
    assert next(tuple(line.get_ydata()) for line in maps[1].lines) == (1.5, 1.5)


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: entry.pop("prefixes"),
        lambda entry: entry.update(prefixes=[]),
        lambda entry: entry["prefixes"][0].update(clusters="7"),
        lambda entry: entry["prefixes"][0]["agreement"]["word_start"].pop("nmi"),
        lambda entry: entry["map"]["cosines"].pop(),
        lambda entry: entry["map"]["cosines"][0].pop(),
        lambda entry: entry["map"]["cosines"][0][0].__setitem__(0, "one"),
        lambda entry: entry["map"]["tokens"].append("more"),
        lambda entry: entry["map"].update(sets=7),
    ],
)
def test_what_is_damaged_is_one_line(damage):
    body = copy.deepcopy(MADE)
    damage(body["diagnostics"][1])
    with pytest.raises(UserError, match=r"diagnostics.*there/report\.json|there/report\.json.*diagnostics") as caught:
        hierarchy.hierarchy(body, "rewritten", "there/report.json")
    assert "\n" not in str(caught.value)
    assert hierarchy.hierarchy({}, "rewritten", "there") is None


def test_a_run_trains_by_groups_and_tells_of_them(tmp_path, tiny_folder, session, run):
    """Through the commands: the tokenizer's strings reach the loss, and figures of both models the report."""
    text, folder = tmp_path / "text.txt", tmp_path / "run"
    text.write_text(make_text(400))
    pipeline.align(folder, str(tiny_folder), str(text), Align(max_tokens=300), session)
    given = {"rewrite": "matryoshka", "ffn": None, "head": [0.5], "groups": {"kind": "imposed", "scheme": "kind"}}
    pipeline.rewrite(folder, [from_record(given)], session)
    settings = Finetune(steps=2, batch_tokens=128, context=32, selection_tokens=128, control=False)
    pipeline.finetune(folder, settings, session)
    (story,) = stories([str(folder)], pytest.fail)
    assert [found.name for found in story.hierarchies] == ["rewritten", "recovered"]
    assert [len(found.prefixes) for found in story.hierarchies] == [2, 2]
    assert run("benchmark", folder, "--out", folder, "--metrics", "size").code == 0
    assert (folder / "hierarchy.png").is_file() and hierarchy.TITLE in (folder / "report.md").read_text()
