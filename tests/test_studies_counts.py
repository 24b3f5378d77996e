"""Studies that count: their figures, their report, and what they refuse."""

from __future__ import annotations

import dataclasses
import json

import pytest
from conftest import forced, tree
from test_tversky_gpt import SHAPES

from compressor import artifacts
from compressor.errors import UserError
from compressor.report.layout import make
from compressor.session import Columns
from compressor.studies import STUDIES
from compressor.studies.counts import CountStudy, run_counts
from compressor.studies.outcome import Outcome
from compressor.studies.tversky_pictures import per_cent

PICTURES = {"tversky_parameters.png", "tversky_changes.png", "tversky_memory.png", "tversky_paper.png"}


@pytest.fixture(scope="module")
def counted():
    return STUDIES["tversky_scaling"].count()


@pytest.fixture
def small() -> CountStudy:
    table = make({"what": ["a"], "count": ["1"]}, "Numbers", "how")
    return CountStudy("small", "A small count", lambda: Outcome({"a": 1}, (table,), ("a is 1",), ()))


# ---------------------------------------------------------------- tversky_scaling


def test_its_rows_are_the_arithmetic(counted):
    rows = counted.body["rows"]
    assert len(rows) == len(SHAPES) == 4
    for row, (d, layers, heads, gpt2, shared, apart) in zip(rows, SHAPES, strict=True):
        assert (row["n_embd"], row["n_layer"], row["n_head"]) == (d, layers, heads)
        assert (row["n_inner"], row["n_positions"], row["vocab_size"]) == (4 * d, 1024, 50257)
        assert row["parameters"] == {"gpt2": gpt2, "shared": shared, "not_shared": apart}
        assert row["memory_mb"] == {
            name: pytest.approx(4 * count / 1024 / 1024) for name, count in row["parameters"].items()
        }
        assert row["saved_by_sharing"] == apart - shared
        assert row["shared_against_gpt2_percent"] == pytest.approx(100 * (shared - gpt2) / gpt2)
        assert row["shared_against_not_shared_percent"] == pytest.approx(-100 * (apart - shared) / apart)
        assert row["banks"]["total_shared_params"] == shared - gpt2, "all that it has more than GPT-2"
    percents = [round(-row["shared_against_not_shared_percent"], 2) for row in rows]
    assert percents == [9.86, 22.69, 35.80, 45.06], "and not the 0.00 % of the source"
    assert [round(row["shared_against_gpt2_percent"], 1) for row in rows] == [3.8, 6.2, 8.7, 8.1]


def test_the_papers_rows(counted):
    found = [(row["gpt2"], row["tversky"], round(row["against_gpt2_percent"], 1)) for row in counted.body["paper"]]
    assert found == [
        (124_439_808, 81_139_968, -34.8),
        (163_037_184, 116_591_616, -28.5),
        (163_037_184, 175_620_096, 7.7),
    ]
    for row in counted.body["paper"]:
        assert round(row["tversky"] / 1e6, 2) == row["paper_tversky_millions"]
        assert round(row["gpt2"] / 1e6, 2) == row["paper_gpt2_millions"]


def test_its_tables_and_sentences_have_the_same_figures(counted):
    cells = {cell for table in counted.tables for line in table.body for cell in line}
    for row, paper in zip(counted.body["rows"], [*counted.body["paper"], None], strict=True):
        assert {f"{count:,}" for count in row["parameters"].values()} <= cells
        assert {f"{size:,.1f}" for size in row["memory_mb"].values()} <= cells
        assert {per_cent(row[name]) for name in row if name.endswith("_percent")} <= cells
        assert paper is None or f"{paper['tversky']:,}" in cells
    assert "by 3.8, 6.2, 8.7, 8.1 %" in counted.findings[0] and "9.9 to 45.1 %" in counted.findings[1]
    assert "takes 12.6 M operations" in counted.findings[2] and "took 9.4 M" in counted.findings[2]


def test_command_line(run, tmp_path):
    answer = run("study", "tversky_scaling", "--run", tmp_path / "s")
    assert answer.code == 0 and not answer.err
    line = next(line for line in answer.out.splitlines() if line.startswith("Small"))
    assert line.split()[2:] == [
        "7,357,312",
        "7,635,846",
        "+3.8",
        "%",
        "8,471,448",
        "+15.1",
        "%",
        "-9.9",
        "%",
        "835,602",
    ]
    made = tree(tmp_path / "s")
    assert set(made) == {"report.json", "report.md", "report.html", *PICTURES}
    assert all(made[name].startswith(b"\x89PNG") for name in PICTURES)
    text = made["report.md"].decode()
    assert "134,466,822" in text and "81,139,968" in text and all(f"]({name})" in text for name in PICTURES)
    assert "134,466,822" in made["report.html"].decode()
    again = run("study", "tversky_scaling", "--run", tmp_path / "s", "--force", "--json")
    body, stored = again.json, artifacts.read_json(tmp_path / "s" / "report.json", "study", "study")
    assert body["rows"] == stored["rows"] and stored["study"] == "tversky_scaling" and stored["provenance"]["version"]
    assert {name: tree(tmp_path / "s")[name] for name in PICTURES} == {name: made[name] for name in PICTURES}


# ---------------------------------------------------------------- any of them


def test_it_refuses_what_changes_nothing(small, tmp_path, session):
    for overrides, columns, said in (
        (["rank=8"], Columns(), "small counts fixed structures and takes no settings; given: rank=8"),
        (["seed=3"], Columns(), "given: seed=3"),
        ([], Columns(text_column="text"), "given: --text-column"),
        ([], Columns(split="test"), "given: --split"),
    ):
        with pytest.raises(UserError, match=said):
            run_counts(small, tmp_path / "s", overrides, session, columns=columns)
    assert not tree(tmp_path)


def test_a_folder_that_is_there_is_refused(small, tmp_path, session):
    run_counts(small, tmp_path / "s", [], session)
    before = tree(tmp_path / "s")
    assert set(before) == {"report.json", "report.md", "report.html"}
    with pytest.raises(UserError, match="exists already; give another --run, or --force"):
        run_counts(small, tmp_path / "s", [], session)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        run_counts(small, tmp_path / "file", [], forced(session))
    assert tree(tmp_path / "s") == before
    (tmp_path / "s" / "thesis.txt").write_text("years of work")
    other = dataclasses.replace(small, count=lambda: dataclasses.replace(small.count(), body={"a": 2}))
    run_counts(other, tmp_path / "s", [], forced(session))
    after = tree(tmp_path / "s")
    assert json.loads(after["report.json"])["a"] == 2 and after["thesis.txt"] == b"years of work"
    (tmp_path / "empty").mkdir()
    run_counts(small, tmp_path / "empty", [], session)
    assert set(tree(tmp_path / "empty")) == set(before)


def test_a_killed_one_leaves_nothing_in_the_way(small, tmp_path, session, monkeypatch):
    def killed(*given, **rest):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            run_counts(small, tmp_path / "s", [], session)
    run_counts(small, tmp_path / "s", [], session)
    assert "a is 1" in (tmp_path / "s" / "report.md").read_text()


def test_a_report_of_counts_is_no_benchmark(small, tmp_path, run, session):
    run_counts(small, tmp_path / "s", [], session)
    answer = run("report", tmp_path / "s", "--out", tmp_path / "all")
    assert answer.code == 2 and answer.err.count("\n") == 1
