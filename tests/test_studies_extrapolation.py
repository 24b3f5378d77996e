"""The study of contexts beyond the trained one, on a tiny model: what its report has, where its steps stand in it."""

from __future__ import annotations

import dataclasses

import pytest

from compressor.report.content import content
from compressor.studies import STUDIES, run_study

SMALL = (
    "finetune.steps=4",
    "finetune.batch_tokens=128",
    "finetune.selection_tokens=256",
    "finetune.lora_rank=4",
    "benchmark.metrics=[{metric: perplexity, max_tokens: 600}, {metric: extrapolation, max_tokens: 600, prompts: 2}, "
    "size, {metric: latency, repeats: 2, warm_up: 0, new_tokens: 2}, {metric: generation, new_tokens: 16}]",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_folder, text_file):
    from compressor.pipeline import Session

    study = STUDIES["extrapolation"]
    assert [dict(member.rewrite)["slopes"] for member in study.members] == ["geometric", "fitted", "learned"]
    one = dataclasses.replace(study, members=study.members[:1])
    folder = tmp_path_factory.mktemp("studies") / "extrapolation"
    given = [f"model={tiny_folder}", f"data={text_file}", *SMALL]
    return folder, run_study(one, folder, given, Session(device="cpu", quiet=True))


def test_the_rewritten_model_goes_where_the_original_cannot(made):
    _, report = made
    original, control, before, after = report.rows
    for row, takes, longest in ((original, 64, 64), (control, 64, 64), (after, None, 256)):
        found = [item for item in row.results if item.metric == "length_perplexity"]
        assert {item.settings["takes"] for item in found} == {takes}
        assert max(item.settings["context"] for item in found) == longest
    assert before.find("length_perplexity") is None and before.find("perplexity") is not None
    gaps = [item.settings["cache_gap"] for item in after.results if item.settings.get("cache_gap") is not None]
    assert len(gaps) == 2 and max(gaps) < 1e-4, "greedy text to 64 and to 128 tokens"
    assert [row.find("parameters").settings["positions"] for row in (original, after)] == [64 * 32, 32]


def test_the_report_has_both_kinds_of_windows_and_a_plot(made):
    folder, _ = made
    written = (folder / "report.md").read_text()
    assert "takes 64 tokens" in written and "(cannot: takes 64 tokens)" in written
    assert "original and control take no more than 64 tokens." in written
    assert "alibi_geometric: recovered, perplexity beyond the 64 tokens it was trained at" in written
    assert (folder / "extrapolation.png").is_file()


def test_the_steps_of_its_workflow_name_sections_of_the_report(made):
    _, report = made
    told = content(report)
    sections = {table.title.split(", ")[0] for table in told.tables} | {"Samples"}
    for step in told.workflow:
        assert set(step.rstrip(".").rpartition(": ")[2].split(", ")) <= sections, step
