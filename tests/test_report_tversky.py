"""Tversky projections in reports, cards and `inspect`: the planted figures, and nothing where there are none."""

from __future__ import annotations

import copy
import json

import planted
import pytest
from conftest import make_text
from matplotlib.text import Text
from planted import perplexity, report, row, size
from test_report_page import Page

from compressor import pipeline
from compressor.errors import UserError
from compressor.recipe import Align, Finetune
from compressor.report import tversky
from compressor.report.content import content
from compressor.report.drawing import look
from compressor.report.markdown import document as markdown
from compressor.report.page import document
from compressor.report.story import Story
from compressor.rewrites import from_record
from compressor.steps.story import stories

BANKS = [{"key": "shared_64", "width": 64, "features": 40, "dead_features": 3, "projections": 4}]


def projection(layer, target, **changed):
    fields = {
        "layer": layer,
        "target": target,
        "bank": "shared_64",
        "features_per_token": 19.5,
        "dead_features": 4,
        "prototypes": 1000,
        "empty_prototypes": 5,
        "constant_prototypes": 2,
        "dead_prototypes": 7,
        "theta": 1.0,
        "alpha": 0.5,
        "beta": 0.5,
        "linear": True,
        "asymmetry": 0.0,
    }
    return {**fields, **changed}


def made(rows):
    entry = {"rewrite": "tversky", "feature_key": "shared", "tokens": 4096, "banks": BANKS, "projections": rows}
    return {"diagnostics": [{"rewrite": "later", "what": 1}, entry]}


BEFORE = made([projection(layer, target) for target in ("q", "c_fc") for layer in (0, 1)])
AFTER = copy.deepcopy(BEFORE)
for index, item in enumerate(AFTER["diagnostics"][1]["projections"]):
    item |= {"theta": 1.25 - index / 100, "alpha": 0.375, "beta": 0.625, "linear": index == 0, "asymmetry": 0.03125}
REPORT = report(
    row("original", [*size(planted.SMALL), *perplexity(25.0)]),
    row("rewritten", [*size(110_529_792), *perplexity(40.0)]),
    row("recovered", [*size(110_529_792), *perplexity(27.5)]),
)


def told(run="", *given):
    given = given or (("rewritten", BEFORE), ("recovered", AFTER))
    return Story(run, diagnoses=tuple(tversky.diagnosis(body, name, "here") for name, body in given))


def test_a_table_for_each_model():
    before, after = tversky.tables([told()])
    assert (before.title, after.title) == ("rewritten", "recovered")
    assert [line[0] for line in before.body] == ["q of layer 0", "q of layer 1", "c_fc of layer 0", "c_fc of layer 1"]
    assert before.header == (
        "projection", "features per token", "dead features", "dead prototypes", "theta", "alpha", "beta", "linear",
        "asymmetry",
    )  # fmt: skip
    assert before.body[0][1:] == ("19.5 of 40", "4 of 40", "7 of 1,000", "1.000", "0.500", "0.500", "yes", "0.000")
    assert after.body[3][1:] == ("19.5 of 40", "4 of 40", "7 of 1,000", "1.220", "0.375", "0.625", "no", "0.031")
    assert "3 of 40 features, 28 of 4,000 prototypes" in before.note and "Linear still: 1 of 4" in after.note
    assert "Theta 1.220 to 1.250" in after.note
    assert [table.title for table in tversky.tables([told("mine")])] == ["mine: rewritten", "mine: recovered"]


def test_many_projections_are_shown_by_target():
    rows = [projection(layer, target, theta=1 + layer / 8) for target in ("q", "c_fc") for layer in range(13)]
    rows[3]["linear"] = False
    head = projection(None, "lm_head", asymmetry=None)
    (table,) = tversky.tables([told("", ("rewritten", made([row for row in rows if row["layer"] != 4] + [head])))])
    shown = {line[0]: line[1:] for line in table.body}
    assert list(shown) == ["q of layers 0-3, 5-12", "c_fc of layers 0-3, 5-12", "lm_head"]
    assert shown["q of layers 0-3, 5-12"][1:4] == ("48 of 480", "84 of 12,000", "1.000 to 2.500")
    assert shown["q of layers 0-3, 5-12"][6] == "11 of 12" and shown["lm_head"][7] == "-"


def test_a_report_shows_them_and_another_does_not():
    page = Page(document(content(REPORT, [told()])))
    assert "projections" in [item["id"] for item in page.all("section")] and len(page.all("svg")) == 2
    shown = " ".join(page.text)
    assert "1.220 to 1.250" in shown and "c_fc of layer 1" in shown and "28 of 4,000" in shown
    text = markdown(content(REPORT, [told()]))
    places = [text.index(part) for part in ("\n## Tversky projections\n", "\n### rewritten\n", "\n### recovered\n")]
    assert places == sorted(places) and "](tversky.png)" in text
    without = content(REPORT, [planted.story()])
    assert without.projections == () and "tversky.png" not in [picture.file for picture in without.pictures]
    assert "Tversky" not in markdown(without) + document(without)


def test_the_picture_holds_every_figure():
    with look():
        figure = tversky.plot([Story("plain"), told("mine")])
        assert tversky.plot([Story("plain")]) is None
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == [f"mine: {name}" for name in ("theta", "alpha", "beta", "dead features, %", "dead prototypes, %",
                                                   "asymmetry")]  # fmt: skip
    lines = {(line.get_linestyle(), tuple(line.get_xdata()), tuple(line.get_ydata())) for line in figure.axes[0].lines}
    assert {(style, ys) for style, _, ys in lines} == {
        ("--", (1.0, 1.0)), ("-", (1.25, 1.24)), ("-", (1.23, 1.22)),
    }  # fmt: skip
    assert {xs for _, xs, _ in lines} == {(0, 1)}
    assert all(tuple(line.get_ydata()) == (10.0, 10.0) for line in figure.axes[3].lines)
    assert next(tuple(line.get_ydata()) for line in figure.axes[4].lines) == pytest.approx((0.7, 0.7))
    legend = {text.get_text() for text in figure.legends[0].findobj(Text)}
    assert {"q", "c_fc"} <= legend


@pytest.mark.parametrize(
    "damage",
    [
        lambda body: body.update(diagnostics=7),
        lambda body: body.update(diagnostics=[7]),
        lambda body: body["diagnostics"][1].pop("tokens"),
        lambda body: body["diagnostics"][1].update(banks=[]),
        lambda body: body["diagnostics"][1].update(projections=[]),
        lambda body: body["diagnostics"][1].update(projections=None),
        lambda body: body["diagnostics"][1]["projections"][0].update(theta="1"),
        lambda body: body["diagnostics"][1]["projections"][0].update(bank="other"),
        lambda body: body["diagnostics"][1]["projections"][0].pop("beta"),
        lambda body: body["diagnostics"][1]["banks"][0].update(more=1),
    ],
)
def test_what_is_damaged_is_one_line(damage):
    body = copy.deepcopy(BEFORE)
    damage(body)
    with pytest.raises(UserError, match=r"diagnostics.*there/report\.json|there/report\.json.*diagnostics") as caught:
        tversky.diagnosis(body, "rewritten", "there/report.json")
    assert "\n" not in str(caught.value)
    assert tversky.diagnosis({}, "rewritten", "there") is None


# ---------------------------------------------------------------- of a run


def test_a_run_tells_of_its_projections(tmp_path, tiny_folder, session, run):
    text, folder = tmp_path / "text.txt", tmp_path / "run"
    text.write_text(make_text(400))
    pipeline.align(folder, str(tiny_folder), str(text), Align(max_tokens=300), session)
    given = {"rewrite": "tversky", "targets": ["q", "c_fc"], "layers": [1, 2], "bank_size": 0.5}
    pipeline.rewrite(folder, [from_record(given)], session)
    settings = Finetune(steps=2, batch_tokens=128, context=32, selection_tokens=128, control=False)
    pipeline.finetune(folder, settings, session)
    (story,) = stories([str(folder)], pytest.fail)
    assert [found.name for found in story.diagnoses] == ["rewritten", "recovered"]
    stored = json.loads((folder / "recovered" / "report.json").read_text())["diagnostics"][0]
    assert [row.theta for row in story.diagnoses[1].projections] == [row["theta"] for row in stored["projections"]]
    said = run("inspect", folder / "recovered").out
    assert (
        "feature bank     features_32: 16 features and their opposites of width 32 for q of layers 1-2, c_fc of" in said
    )
    assert "diagnosis        4 projections with 1 bank of features" in said and "linear still: no" in said
    body = run("inspect", folder / "recovered", "--json").json
    assert body["feature_banks"] == [
        {"key": "features_32", "features": 16, "width": 32, "antipodal": True,
         "projections": [[1, "q"], [1, "c_fc"], [2, "q"], [2, "c_fc"]]}
    ]  # fmt: skip
    assert body["diagnostics"][0] == stored
    card = (folder / "recovered" / "README.md").read_text()
    assert "## Tversky projections\n\n- 4 projections with 1 bank of features" in card
    assert run("benchmark", folder, "--out", folder, "--metrics", "size").code == 0
    assert (folder / "tversky.png").is_file() and "### recovered" in (folder / "report.md").read_text()
    path = folder / "recovered" / "report.json"
    path.write_text(path.read_text().replace('"theta": ', '"theta": "" , "was": '))
    said = run("inspect", folder / "recovered")
    assert said.code == 2 and said.err.count("\n") == 1 and "diagnostics" in said.err


def test_plain_models_show_nothing(run, made_run, tiny_folder):
    for path in (tiny_folder, made_run / "rewritten"):
        assert "feature bank" not in (said := run("inspect", path).out) and "diagnosis" not in said
    assert "Tversky" not in (made_run / "rewritten" / "README.md").read_text()
