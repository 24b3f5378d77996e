"""What `report.write` leaves in a folder, and whether it comes back."""

from __future__ import annotations

import json
import math
from pathlib import Path

import planted
import pytest
from conftest import largest_file, tree
from test_report_hierarchy import told

from compressor.artifacts import provenance, write_json
from compressor.benchmark import Gap, Report
from compressor.errors import UserError
from compressor.report import FILES, read, table, write

PLOT = "perplexity_by_parameters.png"
SMALL = planted.report(
    planted.row("gpt2", [*planted.size(planted.SMALL), *planted.perplexity(25.1678)]),
    planted.row("rewritten", [*planted.size(110_529_792), *planted.perplexity(28.0)]),
)


def bare(report: Report) -> Report:
    return planted.report(*(planted.row(row.name, list(row.results[:3])) for row in report.rows))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_write_and_read_are_inverse(tmp_path: Path):
    write(tmp_path, SMALL)
    assert names(tmp_path) == {PLOT, "report.json", "report.md", "report.html"}
    assert read(tmp_path) == SMALL
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["kind"] == "report" and stored["provenance"]["base_model"] == "gpt2"
    assert [record["value"] for record in stored["results"] if record["metric"] == "perplexity"] == [25.1678, 28.0]


def test_everything_that_is_written_is_on_the_list_and_pictures_lie_beside_the_page(tmp_path: Path):
    full = planted.study()
    few = Report(full.rows[:4] + full.rows[-1:], full.origin, full.metrics, full.references)
    other = planted.task("readability", 0.4, protocol="whole text")
    more = [other, *planted.latency(200, 12, prompt=512), *planted.extrapolation(20, {512: 1.1})]
    more += planted.assisted({"ffn-64": (0.6, 3.5, 0.94)})
    rows = tuple(planted.row(row.name, [*row.results, *more], *row.gaps) for row in few.rows)
    write(
        tmp_path,
        Report(rows, few.origin, few.metrics, few.references),
        [planted.story("merged_4", diagnoses=(planted.diagnosis(),), hierarchies=told().hierarchies)],
    )
    assert names(tmp_path) == set(FILES)
    text = (tmp_path / "report.md").read_text()
    for file in FILES:
        assert (f"]({file})" in text) == file.endswith(".png")


def test_a_new_report_takes_the_old_ones_plots_away_and_leaves_the_rest(tmp_path: Path):
    write(tmp_path, SMALL, [planted.story()])
    (tmp_path / "notes.png").write_text("mine")
    assert {"windows.png", "recovery.png", "alignment.png", PLOT} < names(tmp_path)
    write(tmp_path, bare(SMALL))
    assert names(tmp_path) == {"report.json", "report.md", "report.html", "notes.png"}
    assert "![" not in (tmp_path / "report.md").read_text()


def test_the_same_report_gives_the_same_bytes(tmp_path: Path):
    for folder in (tmp_path / "one", tmp_path / "two"):
        write(folder, SMALL, [planted.story()])
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_a_full_disk_leaves_what_was_there(tmp_path: Path):
    write(tmp_path, SMALL)
    before = tree(tmp_path)
    with largest_file(2_000), pytest.raises(UserError, match="cannot write"):
        write(tmp_path, bare(SMALL))
    assert tree(tmp_path) == before


def test_not_finite_survives_the_disk(tmp_path: Path):
    broken = planted.row("broken", [*planted.size(planted.SMALL), *planted.perplexity(math.nan)])
    write(tmp_path, planted.report(SMALL.rows[0], broken))
    assert "NaN" not in (tmp_path / "report.json").read_text()
    assert math.isnan(read(tmp_path).rows[1].find("perplexity").value)
    assert "not finite" in (tmp_path / "report.md").read_text()


def test_a_report_of_an_earlier_version_can_be_read_and_written(tmp_path: Path):
    body = SMALL.to_dict()
    for key in ("metrics", "references", "gaps"):
        del body[key]
    write_json(
        tmp_path / "report.json",
        "report",
        body,
        provenance(seed=0, base_model="gpt2", base_hash="", device="cpu", dtype="float32"),
    )
    again = read(tmp_path)
    assert [row.name for row in again.rows] == ["gpt2", "rewritten"]
    write(tmp_path / "new", again)
    assert table(again)


def test_a_missing_report_is_one_line(tmp_path: Path):
    with pytest.raises(UserError, match="`gpt2-compress benchmark` makes it"):
        read(tmp_path)


def test_gaps_and_references_come_back(tmp_path: Path):
    gap = Gap("imdb", {"head": "probe"}, "no data")
    both = planted.report(planted.row("gpt2", planted.size(planted.SMALL), gap), references=planted.references())
    write(tmp_path, both)
    again = read(tmp_path)
    assert again.rows[0].gaps == (gap,)
    assert [row.name for row in again.references] == ["majority class", "tf-idf", "lead-3", "prompt echo"]
