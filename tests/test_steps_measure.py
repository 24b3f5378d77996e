"""What a benchmark measures on, what it remembers, and what it says of what it could not measure."""

from __future__ import annotations

import dataclasses
import json

import pytest
from conftest import forced, make_text, tree
from datasets import Dataset

from compressor import artifacts, pipeline, recipe, report
from compressor.artifacts import provenance
from compressor.errors import UserError
from compressor.metrics import METRICS, Metric, MetricResult
from compressor.steps.measure import Measured, what_on

ORIGIN = provenance(seed=0, base_model="m", base_hash="", device="cpu", dtype="float32")


def counting(subject, data, *, progress, factor=1):
    """How many examples there are: what a task's metric is given."""
    rows = len(data.test) if hasattr(data, "test") else len(data)
    return [MetricResult("rows", rows * factor, "rows", True, rows, None, {"protocol": data.source})]


@pytest.fixture
def tasks(monkeypatch):
    """Metrics of the two kinds of task data, with a standard that cannot be fetched."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, kind in (("sorting", "labelled"), ("shortening", "summaries")):
        monkeypatch.setitem(
            METRICS, name, Metric(counting, frozenset({"factor"}), data=kind, standard="nobody/nothing")
        )


@pytest.fixture
def reviews(tmp_path):
    lines = make_text(60, seed=9).splitlines()
    file = tmp_path / "reviews.parquet"
    Dataset.from_dict({"text": lines, "label": [i % 2 for i in range(60)]}).to_parquet(file)
    return file


@pytest.fixture
def articles(tmp_path):
    lines = make_text(40, seed=8).splitlines()
    file = tmp_path / "articles.jsonl"
    file.write_text("".join(json.dumps({"article": a, "highlights": a[:9]}) + "\n" for a in lines))
    return file


def test_tasks_of_the_demo_are_its_own(tasks, session):
    texts, missing = what_on(["sorting", "shortening", "perplexity"], ["demo"], {}, pipeline.Columns(), session)
    assert [texts[name].source for name in texts] == ["demo"] * 3 and missing == {}
    assert (len(texts["sorting"].test), len(texts["shortening"])) == (500, 200)


def test_one_d_serves_what_it_can(tasks, session, notices, tiny_folder, reviews, articles, text_file):
    def chosen(sources, metrics=("sorting", "shortening", "perplexity")):
        texts, missing = what_on(list(metrics), [str(tiny_folder)], sources, pipeline.Columns(), session)
        return {name: text.source for name, text in texts.items()}, missing

    found, missing = chosen({"": str(reviews), "shortening": str(articles)})
    assert found == {"sorting": str(reviews), "shortening": str(articles), "perplexity": str(reviews)} and not missing
    found, missing = chosen({"": str(text_file), "sorting": str(reviews)})
    assert found == {"perplexity": str(text_file), "sorting": str(reviews)}
    assert "nobody/nothing" in missing["shortening"] and "could not be fetched" in missing["shortening"]
    found, missing = chosen({"sorting": str(reviews)})  # no text at all
    assert set(found) == {"sorting"} and set(missing) == {"shortening", "perplexity"}
    with pytest.raises(UserError, match="has no column for the label"):  # named for it: must be there
        chosen({"sorting": str(articles)})


def test_a_standard_stands_in_where_d_has_no_columns(
    tasks, session, notices, tiny_folder, reviews, text_file, monkeypatch
):
    monkeypatch.setitem(METRICS, "sorting", dataclasses.replace(METRICS["sorting"], standard=str(reviews)))
    texts, missing = what_on(
        ["perplexity", "sorting"], [str(tiny_folder)], {"": str(text_file)}, pipeline.Columns(), session
    )
    assert texts["sorting"].source == str(reviews) and not missing
    (notice,) = notices
    assert notice.startswith(f"sorting is measured on {reviews}, not on {text_file}: data") and "plain text" in notice


def test_the_column_and_the_split_that_are_given_hold_for_tasks_too(tasks, session, tiny_folder, reviews, tmp_path):
    table = Dataset.from_parquet(str(reviews)).rename_column("text", "text_of_mine")
    (tmp_path / "splits").mkdir()
    for name, rows in (("train", range(40)), ("validation", range(10, 60)), ("test", range(10))):
        table.select(rows).to_parquet(tmp_path / "splits" / f"{name}.parquet")
    columns = pipeline.Columns("text_of_mine", "validation")
    texts, _ = what_on(["sorting"], [str(tiny_folder)], {"": str(tmp_path / "splits")}, columns, session)
    assert texts["sorting"].test.split == "validation"
    with pytest.raises(UserError, match="has no column for the text"):
        what_on(["sorting"], [str(tiny_folder)], {"": str(tmp_path / "splits")}, pipeline.Columns(), session)


def test_a_task_without_data_is_a_gap_and_a_notice(tasks, session, notices, tiny_folder, tmp_path, text_file):
    made = pipeline.run_benchmark(
        [str(tiny_folder)], tmp_path / "out", ["sorting", "size", "perplexity"], {"": str(text_file)}, session
    )
    (gap,) = made.rows[0].gaps
    assert gap.metric == "sorting" and "could not be fetched" in gap.reason
    assert made.rows[0].find("parameters") and any("not measured: sorting" in notice for notice in notices)
    assert report.read(tmp_path / "out") == made
    with pytest.raises(UserError, match="is plain text; a task needs rows"):  # nothing else takes it
        pipeline.run_benchmark([str(tiny_folder)], tmp_path / "other", ["sorting"], {"": str(text_file)}, session)
    assert not (tmp_path / "other" / "report.json").exists()


def test_a_recipe_names_the_data_of_its_tasks(tasks, session, tiny_folder, reviews, articles, text_file, tmp_path):
    def record(source):
        return recipe.from_plain(
            {
                "model": str(tiny_folder),
                "data": str(text_file),
                "align": {"max_tokens": 500},
                "rewrites": [{"rewrite": "compressed_n", "n": 2, "start": 2, "collapse": "keep"}],
                "finetune": None,
                "benchmark": {"metrics": ["sorting", "size"], "data": {"sorting": str(source)}},
            }
        )

    with pytest.raises(UserError, match="has no column for the label"):
        pipeline.run(tmp_path / "run", record(articles), session)
    assert not (tmp_path / "run").exists()
    for _ in range(2):  # the second time there is nothing left to do
        made = pipeline.run(tmp_path / "run", record(reviews), session)
        assert [row.find("rows").value for row in made.rows] == [6, 6]


# ---------------------------------------------------------------- memory

RESULT = MetricResult("rows", 3.0, "rows", True, 3, {"low": 1.0}, {"protocol": "p"}, details=[{"text": "x"}])


def test_what_was_measured_comes_back(tmp_path):
    texts = {"sorting": type("T", (), {"fingerprint": "f"})()}
    memory = Measured(tmp_path / "measured.json", {"a": "1", "b": "2"}, texts, ORIGIN)
    assert memory.recall(["a"], "sorting", {"factor": 2}) is None
    memory.keep(["a"], "sorting", {"factor": 2}, [RESULT])
    memory.keep(["a", "b"], "latency", {}, [[RESULT], []])
    memory.keep(["(no model)"], "sorting", {}, {"majority": [RESULT]})

    def again(weights=("1", "2"), fingerprint="f", origin=ORIGIN):
        texts = {"sorting": type("T", (), {"fingerprint": fingerprint})()}
        return Measured(tmp_path / "measured.json", dict(zip("ab", weights, strict=True)), texts, origin)

    assert again().recall(["a"], "sorting", {"factor": 2}) == [RESULT]
    assert again().recall(["a", "b"], "latency", {}) == [[RESULT], []]
    assert again().recall(["(no model)"], "sorting", {}) == {"majority": [RESULT]}
    for other in (
        again(weights=("3", "2")),
        again(fingerprint="g"),
        again(origin=dataclasses.replace(ORIGIN, dtype="bfloat16")),
        again(origin=dataclasses.replace(ORIGIN, device="cuda:0")),
    ):
        assert other.recall(["a"], "sorting", {"factor": 2}) is None
    assert again().recall(["b"], "sorting", {"factor": 2}) is None  # other weights
    assert again().recall(["a"], "sorting", {"factor": 3}) is None


def test_a_killed_benchmark_goes_on(tasks, session, tiny_folder, reviews, tmp_path, monkeypatch):
    calls = []

    def measured(subject, data, *, progress, factor=1):
        calls.append(factor)
        if factor == 3 and len(calls) == 3:
            raise KeyboardInterrupt
        return counting(subject, data, progress=progress, factor=factor)

    monkeypatch.setitem(METRICS, "sorting", dataclasses.replace(METRICS["sorting"], run=measured))
    metrics = [{"metric": "sorting", "factor": factor} for factor in (1, 2, 3)]

    def go():
        return pipeline.run_benchmark([str(tiny_folder)], tmp_path / "out", metrics, {"": str(reviews)}, session)

    with pytest.raises(KeyboardInterrupt):
        go()
    assert set(tree(tmp_path / "out")) == {"measured.json"}
    made = go()
    assert calls == [1, 2, 3, 3] and [result.value for result in made.rows[0].results] == [6, 12, 18]
    assert "measured.json" not in tree(tmp_path / "out")


def test_force_measures_anew(tasks, session, tiny_folder, reviews, tmp_path):
    out = tmp_path / "out"
    pipeline.run_benchmark([str(tiny_folder)], out, ["sorting"], {"": str(reviews)}, session)
    artifacts.write_json(out / "measured.json", "measured", {"measured": {"what": "was left"}}, ORIGIN)
    pipeline.run_benchmark([str(tiny_folder)], out, ["sorting"], {"": str(reviews)}, forced(session))
    assert not (out / "measured.json").exists()


def test_models_without_what_is_measured_are_not_asked(recovered_run, tiny_folder, text_file, tmp_path, session):
    drafts = {"metric": "assisted", "prompts": 1, "prompt_tokens": 8, "new_tokens": 4, "repeats": 2, "max_tokens": 200}
    made = pipeline.run_benchmark([str(recovered_run)], tmp_path / "a", [drafts], {"": str(text_file)}, session)
    assert {row.name: bool(row.results) for row in made.rows} == {
        "original": False, "rewritten": True, "recovered": True,
    }  # fmt: skip
    assert not any(row.gaps for row in made.rows)
    assert "gap" not in (tmp_path / "a" / "report.md").read_text()
    with pytest.raises(UserError, match="no smaller models are nested in it"):  # nobody has it
        pipeline.run_benchmark([str(tiny_folder)], tmp_path / "b", [drafts], {"": str(text_file)}, session)
