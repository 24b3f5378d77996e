"""`report RUN ...`: the reports of several runs in one, from the command line."""

from __future__ import annotations

import json
import shutil

import planted
import pytest
from conftest import tree
from planted import perplexity, row, size

from compressor import report
from compressor.benchmark import Report
from compressor.steps.story import stories


def written(folder, after: float, original: str = "0", **changed):
    rows = (
        row("original", [*size(100), *perplexity(20.0, **changed)], weights=original),
        row("recovered", [*size(80), *perplexity(after, **changed)], weights=f"r{after}"),
    )
    report.write(folder, Report(rows, planted.ORIGIN, ({"metric": "size"}, {"metric": "perplexity"})))
    return folder


def test_two_reports_become_one(run, tmp_path):
    one, two = written(tmp_path / "one", 22.0), written(tmp_path / "two", 24.0)
    said = run("report", one, two, "--out", tmp_path / "both")
    assert said.code == 0 and said.err == ""
    assert [line.split()[:2] for line in said.out.splitlines()[2:5]] == [
        ["original", "100"], ["one:", "recovered"], ["two:", "recovered"],
    ]  # fmt: skip
    assert f"written to {tmp_path / 'both'}: report.html" in said.out
    names = {path.name for path in (tmp_path / "both").iterdir()}
    assert names == {"report.json", "report.md", "report.html", "perplexity_by_parameters.png"}
    again = run("report", one, two, "--out", tmp_path / "both", "--force", "--json")
    assert [item["ratio"] for item in again.json["results"] if item["metric"] == "perplexity"] == [1, 1.1, 1.2]


def test_one_report_is_drawn_anew_with_the_story_of_its_run(run, made_run, tmp_path):
    written(made_run, 22.0)
    before = tree(made_run)
    assert run("report", made_run, "--out", tmp_path / "new").code == 0
    assert tree(made_run) == before
    assert (tmp_path / "new" / "alignment.png").is_file() and report.read(tmp_path / "new").rows[1].name == "recovered"
    assert "soft_shared" in (tmp_path / "new" / "report.md").read_text()


def test_mistakes_are_one_line(refused, made_run, tmp_path):
    one, two = written(tmp_path / "one", 22.0), written(tmp_path / "two", 24.0)
    said = refused("report", one, made_run, "--out", tmp_path / "out")
    assert f"{made_run} has no report.json; `gpt2-compress benchmark {made_run} --out {made_run}` makes it" in said
    assert "is no folder" in refused("report", tmp_path / "none", "--out", tmp_path / "out")
    assert "named twice" in refused("report", one, f"{one}/", "--out", tmp_path / "out")
    assert "whose own report would be lost" in refused("report", one, two, "--out", one, "--force")
    assert "has a report already" in refused("report", one, "--out", two)
    assert "expected ('report', 1)" in refused("report", made_run / "rewritten", "--out", tmp_path / "out")
    assert "is a model's folder" in refused("report", one, "--out", made_run / "rewritten")
    assert "required: RUN" in refused("report", "--out", tmp_path / "out")
    assert "required: --out" in refused("report", one)


def test_what_cannot_be_compared_is_said(run, tmp_path):
    one = written(tmp_path / "one", 22.0)
    two = written(tmp_path / "two", 24.0, original="1", fingerprint="77" * 32)
    document = json.loads((two / "report.json").read_text())
    document["provenance"]["data"]["perplexity"]["fingerprint"] = "77" * 32
    document["provenance"]["version"] = "9"
    (two / "report.json").write_text(json.dumps(document))
    said = run("report", one, two, "--out", tmp_path / "both")
    assert "two began from another original" in said.err and "perplexity was taken on different text" in said.err
    assert "measured by other versions" in said.err
    assert [result["ratio"] for result in json.loads((tmp_path / "both" / "report.json").read_text())["results"]
            if result["model"] == "two: recovered" and result["metric"] == "perplexity"] == [None]  # fmt: skip


def test_two_runs_of_one_name_keep_apart(run, tmp_path):
    one, two = written(tmp_path / "a" / "x", 22.0), written(tmp_path / "b" / "x", 24.0)
    assert run("report", one, two, "--out", tmp_path / "both").code == 0
    assert [row.name for row in report.read(tmp_path / "both").rows] == [
        "original",
        "x: recovered",
        f"{two}: recovered",
    ]


# ---------------------------------------------------------------- stories


def test_the_story_of_a_run(made_run):
    (told,) = stories([str(made_run)], pytest.fail)
    assert told.run == "" and told.rewrites[0]["rewrite"] == "soft_shared" and told.search is None and told.curves == ()
    stored = json.loads((made_run / "alignment.json").read_text())
    assert [(pair.anchor, pair.layer, pair.matched) for pair in told.alignment.pairs] == [
        (item["anchor"], item["layer"], item["matched"]) for item in stored["quality"]
    ]
    assert told.alignment.n_layer == 6 and told.alignment.measure == "correlation"
    assert [item.run for item in stories([str(made_run), "demo"], pytest.fail)] == ["made"]
    assert stories(["demo"], pytest.fail) == []


def test_what_is_damaged_is_said_and_ends_nothing(run, made_run, tmp_path, notices):
    (made_run / "windows.json").write_text("{}")
    (told,) = stories([str(made_run)], notices.append)
    assert told.search is None and told.alignment is not None
    assert len(notices) == 1 and "the report has no plot of this" in notices[0] and "windows.json" in notices[0]
    said = run("benchmark", made_run, "--out", tmp_path / "out", "--metrics", "size")
    assert said.code == 0 and "windows.json" in said.err and (tmp_path / "out" / "alignment.png").is_file()


def test_a_search_and_a_recovery_are_told(run, made_run, tmp_path):
    shutil.rmtree(made_run / "rewritten")
    words = ["--run", made_run, "--rewrite", "soft_shared", "n=4", "rank=2"]
    assert run("search", *words, "--max-tokens", 600, "--context", 32).code == 0
    assert run("rewrite", *words, "--best").code == 0
    keys = ["batch_tokens=128", "context=32", "selection_tokens=128"]
    assert run("finetune", "--run", made_run, "--steps", 3, *keys).code == 0
    (told,) = stories([str(made_run)], pytest.fail)
    stored = json.loads((made_run / "windows.json").read_text())
    singles = [item for item in told.search.candidates if item.windows]
    assert [item.window.start for item in singles] == [0, 1, 2]
    (whole,) = (item for item in told.search.candidates if not item.windows)
    assert whole.nll == stored["original"]["nll"]
    assert told.search.winner[0].start == stored["winner"][0]["start"]
    (curve,) = told.curves
    done = json.loads((made_run / "recovered" / "report.json").read_text())["recovery"]
    assert curve.steps == tuple((item["step"], item["nll"]) for item in done["curve"]) and len(curve.steps) == 3
    assert run("benchmark", made_run, "--out", made_run, "--metrics", "size").code == 0
    assert {"windows.png", "recovery.png", "alignment.png"} < {path.name for path in made_run.iterdir()}
