"""Studies: members that share a model, alignments and one control; one report; an interrupted one goes on."""

from __future__ import annotations

import copy
import dataclasses
import json

import planted
import pytest
from conftest import forced, tree

from compressor import pipeline, recipe
from compressor.errors import UserError
from compressor.metrics import METRICS
from compressor.report.content import content
from compressor.studies import STUDIES, Member, Study, run_study
from compressor.studies.study import rows


@pytest.fixture
def small(tiny_folder, text_file) -> Study:
    """Three members in two ways of aligning, on a tiny model."""
    return Study(
        name="small",
        title="A small study",
        recipe={
            "model": str(tiny_folder),
            "data": str(text_file),
            "align": {"max_tokens": 500},
            "search": {"max_tokens": 500},
            "finetune": {"train": "lora", "steps": 2, "batch_tokens": 128, "selection_tokens": 256},
            "benchmark": {"metrics": [{"metric": "perplexity", "max_tokens": 300}, "size"]},
        },
        members=(
            Member("merged", {"rewrite": "merged_n", "n": 2, "start": 2}),
            Member("cut", {"rewrite": "compressed_n", "n": 2, "start": 2, "collapse": "keep"}),
            Member("unaligned", {"rewrite": "merged_n", "n": 2, "start": 2}, ["align.method=none"]),
        ),
        before=("perplexity",),
        workflow=("Measure <all> of it: Size.", "Look at it."),
    )


def test_members_share_alignments_and_one_control(small, tmp_path, session, monkeypatch):
    made, real = [], pipeline.align
    monkeypatch.setattr(
        pipeline, "align", lambda run, *given, **rest: (made.append(run.name), real(run, *given, **rest))
    )
    told: list[str] = []
    report = run_study(small, tmp_path / "s", [], session, tell=told.append)
    assert made == ["merged", "unaligned"] and told == ["merged", "cut", "unaligned", "benchmark"]
    assert [row.name for row in report.rows] == [
        "original", "control", "merged: rewritten", "merged: recovered", "cut: rewritten", "cut: recovered",
        "unaligned: rewritten", "unaligned: recovered",
    ]  # fmt: skip
    found = tree(tmp_path / "s")
    assert found["merged/alignment.safetensors"] == found["cut/alignment.safetensors"]
    assert found["merged/alignment.safetensors"] != found["unaligned/alignment.safetensors"]
    assert [name for name in found if name.endswith("control/model.safetensors")] == [
        "merged/control/model.safetensors"
    ]
    for row in report.rows:  # what came right out of a rewrite gets `before` only
        assert (row.find("parameters") is None) == row.name.endswith(": rewritten")
        assert row.find("perplexity") is not None and not row.gaps
    assert len({row.find("perplexity").value for row in report.rows}) == len(report.rows)
    written = (tmp_path / "s" / "report.md").read_text()
    assert written.startswith("# A small study\n")
    assert r"1. Measure \<all> of it: Size." + "\n2. Look at it." in written
    page = (tmp_path / "s" / "report.html").read_text()
    assert "<li>Measure &lt;all&gt; of it: Size.</li>" in page and "<h1>A small study</h1>" in page


def test_a_member_is_what_a_run_of_its_recipe_makes(small, tmp_path, session):
    run_study(small, tmp_path / "s", [], session)
    whole = recipe.from_plain(
        {**small.recipe, "rewrites": [dict(small.members[1].rewrite)],
         "finetune": {**small.recipe["finetune"], "control": False}}
    )  # fmt: skip
    pipeline.run(tmp_path / "alone", whole, session)
    alone, member = tree(tmp_path / "alone"), tree(tmp_path / "s" / "cut")
    for name in ("rewritten/model.safetensors", "recovered/model.safetensors", "recipe.yaml"):
        assert alone[name] == member[name], name


@pytest.mark.parametrize("after", [1, 3, 5])
def test_an_interrupted_study_goes_on(small, tmp_path, session, after, monkeypatch):
    whole = run_study(small, tmp_path / "whole", [], session)
    counted, real = [0], METRICS["perplexity"]

    def measured(*given, **rest):
        counted[0] += 1
        if counted[0] == after:
            raise KeyboardInterrupt
        return real.run(*given, **rest)

    with monkeypatch.context() as patch:
        patch.setitem(METRICS, "perplexity", dataclasses.replace(real, run=measured))
        with pytest.raises(KeyboardInterrupt):
            run_study(small, tmp_path / "s", [], session)
    assert not (tmp_path / "s" / "report.json").exists()
    made = tree(tmp_path / "s")
    counted[0] = -100
    with monkeypatch.context() as patch:
        patch.setitem(METRICS, "perplexity", dataclasses.replace(real, run=measured))
        again = run_study(small, tmp_path / "s", [], session)
    assert counted[0] + 100 == 8 - (after - 1), "what was measured is not measured again"
    assert [row.results for row in again.rows] == [row.results for row in whole.rows]
    later = tree(tmp_path / "s")
    assert ("measured.json" in made) == (after > 1) and "measured.json" not in later
    figures_came = ("measured.json", "README.md")
    assert all(later[name] == content for name, content in made.items() if not name.endswith(figures_came))


def test_what_is_finished_stays(small, tmp_path, session, monkeypatch):
    run_study(small, tmp_path / "s", [], session)
    before = tree(tmp_path / "s")
    for name in ("align", "rewrite", "run_benchmark"):
        monkeypatch.setattr(pipeline, name, lambda *given, **rest: pytest.fail("done already"))
    run_study(small, tmp_path / "s", [], session)
    assert tree(tmp_path / "s") == before


def test_another_study_is_refused_and_loses_nothing(small, tmp_path, session):
    run_study(small, tmp_path / "s", [], session)
    before = tree(tmp_path / "s")
    with pytest.raises(UserError, match="holds another study, or this one of another recipe"):
        run_study(small, tmp_path / "s", ["finetune.steps=3"], session)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is no study"):
        run_study(small, tmp_path / "mine", [], session)
    assert tree(tmp_path / "s") == before
    run_study(small, tmp_path / "s", ["finetune.steps=3"], forced(session))
    assert json.loads((tmp_path / "s" / "cut" / "recovered" / "report.json").read_text())["recovery"]["steps"] == 3


def test_without_recovery_there_is_no_control(small, tmp_path, session):
    report = run_study(small, tmp_path / "s", ["finetune=null"], session)
    assert [row.name for row in report.rows] == [
        "original", "merged: rewritten", "cut: rewritten", "unaligned: rewritten"
    ]  # fmt: skip
    assert all(row.find("parameters") for row in report.rows)


def test_the_workflow_of_the_source_has_nine_steps_and_names_sections_of_the_report():
    told = content(planted.study())
    sections = {table.title.split(", ")[0] for table in told.tables} | {"Samples", "How it was made"}
    steps = STUDIES["code_n_all"].workflow
    assert len(steps) == 9
    for step in steps:
        named = step.rstrip(".").rpartition(": ")[2].replace(", column before", "").replace(", column after", "")
        assert named == told.main.title or set(named.split(", ")) <= sections, step


@pytest.mark.parametrize("name", [name for name, study in STUDIES.items() if isinstance(study, Study)])
def test_every_study_can_be_run_on_the_demo(name):
    """Its recipes are sound; running them takes too long here."""
    study = STUDIES[name]
    members = study.of(study.recipe)
    recipes = {
        member.name: recipe.from_plain(
            recipe.overridden({**copy.deepcopy(dict(study.recipe)), "rewrites": [dict(member.rewrite)]}, member.changes)
        )
        for member in members
    }
    assert len(recipes) == len(members) == len({str(own.record()) for own in recipes.values()})
    assert set(study.before) <= set(METRICS)
    assert len(rows(pipeline.Path("s"), recipes)) == 2 + 2 * len(recipes)


def test_command_line(run):
    answer = run("study", "code_n_al")
    assert answer.code == 2 and "unknown study 'code_n_al' (did you mean 'code_n_all'?)" in answer.err
    answer = run("study", "code_n_all", "rank=8")
    assert answer.code == 2 and "rank is a field of a rewrite, and these are given already" in answer.err


def test_slices_of_members_are_rows(tmp_path):
    given = {"model": "demo", "rewrites": [{"rewrite": "matryoshka"}]}
    recipes = {name: recipe.from_plain(given) for name in ("a", "b")}
    for place in ("a/slices/after/ffn-256", "a/slices/after/ffn-64", "a/slices/before/ffn-256"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "config.json").write_text("{}")
    assert list(rows(tmp_path, recipes)) == [
        "original", "control", "a: rewritten", "a: recovered", "a: slice ffn-256 (rewritten)", "a: slice ffn-256",
        "a: slice ffn-64", "b: rewritten", "b: recovered",
    ]  # fmt: skip
