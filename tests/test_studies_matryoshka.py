"""The study of nested sizes, on a tiny model: its budgets, who is as large as whom, what its report has."""

from __future__ import annotations

import dataclasses

import pytest
from transformers import GPT2Config

from compressor import models, recipe
from compressor.errors import UserError
from compressor.metrics.size import parameters
from compressor.report.content import content
from compressor.rewrites import from_record
from compressor.rewrites.compose import structure
from compressor.studies import STUDIES, run_study

STUDY = STUDIES["matryoshka"]
SMALL = (
    "finetune.steps=2",
    "finetune.batch_tokens=128",
    "finetune.selection_tokens=256",
    "finetune.lora_rank=4",
    "align.max_tokens=500",
    "search.strategy=middle",
    "search.max_tokens=256",
    "benchmark.metrics=[{metric: perplexity, max_tokens: 400}, size, {metric: latency, repeats: 2, warm_up: 0, "
    "new_tokens: 2}, {metric: assisted, prompts: 1, prompt_tokens: 8, new_tokens: 8, repeats: 2, max_tokens: 200}]",
)


def made_parameters(record: dict, config: GPT2Config) -> int:
    placed = {**record, "start": 0} if record["rewrite"] == "compressed_n" else record
    return parameters(models.build(structure([from_record(placed).resolved(config)], config)))


def test_members_are_as_large_as_the_slices_they_stand_beside():
    config = GPT2Config(n_layer=12, n_embd=96, vocab_size=500, n_positions=64, bos_token_id=0, eos_token_id=0)
    whole = made_parameters({"rewrite": "soft_shared", "n": 1, "start": 0, "rank": 0}, config)
    found = {member.name: member for member in STUDY.members(STUDY.recipe, config)}
    assert list(found) == [
        *(f"single_ffn_{part}" for part in (2, 4, 8)), "nested", *(f"soft_shared_{part}" for part in (2, 4, 8)),
        *(f"compressed_{part}" for part in (2, 4, 8)),
    ]  # fmt: skip
    assert found["nested"].rewrite["ffn"] == [192, 96, 48]
    of_deltas, of_a_block = 12 * 2 * (96 + 384), 12 * 96**2 + 13 * 96
    for part in (2, 4, 8):
        left = 384 // part
        wanted = whole - 12 * (384 - left) * (2 * 96 + 1)  # a neuron is a column, a bias and a row
        single, shared, fewer = (
            made_parameters(dict(found[f"{kind}_{part}"].rewrite), config)
            for kind in ("single_ffn", "soft_shared", "compressed")
        )
        assert single == wanted
        assert 0 <= wanted - shared < of_deltas, "another rank would be more"
        assert abs(fewer - wanted) <= of_a_block / 2
        assert found[f"soft_shared_{part}"].rewrite["rank"] > 0


def test_the_nested_model_has_the_steps_of_the_separate_ones_together():
    small = GPT2Config(n_layer=2, n_embd=32, n_head=2)
    given = recipe.overridden({**STUDY.recipe, "finetune": dict(STUDY.recipe["finetune"])}, ["finetune.steps=30"])
    for shared, steps in ((STUDY.recipe, 100), (given, 30)):
        found = {}
        for member in STUDY.members(shared, small):
            record = {**shared, "finetune": dict(shared["finetune"]), "rewrites": [dict(member.rewrite)]}
            found[member.name] = recipe.from_plain(recipe.overridden(record, member.changes))
        nested = found.pop("nested")
        assert nested.slices == "all" and nested.rewrites[0].train == "one"
        assert nested.finetune.steps == 4 * steps, "three sizes and the whole, which is the control's"
        assert {own.finetune.steps for own in found.values()} == {steps}
    assert not any(
        "steps" in change for m in STUDY.members({**STUDY.recipe, "finetune": None}, small) for change in m.changes
    )


def test_a_small_model_that_nothing_makes_as_small_has_what_is_nearest():
    found = {m.name: dict(m.rewrite) for m in STUDY.members(STUDY.recipe, GPT2Config(n_layer=2, n_embd=32, n_head=2))}
    assert found["soft_shared_8"] | {"n": 2, "rank": 0} == found["soft_shared_8"]
    with pytest.raises(UserError, match="the model has 1 layer; allowed: 2 or more"):
        STUDY.members(STUDY.recipe, GPT2Config(n_layer=1))


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_folder, text_file):
    from compressor.pipeline import Session

    def few(shared, config):
        return tuple(m for m in STUDY.members(shared, config) if m.name in ("single_ffn_2", "nested"))

    folder = tmp_path_factory.mktemp("studies") / "matryoshka"
    given = [f"model={tiny_folder}", f"data={text_file}", *SMALL]
    return folder, run_study(dataclasses.replace(STUDY, members=few), folder, given, Session(device="cpu", quiet=True))


def test_rows_are_the_sizes_before_and_after(made):
    _, report = made
    slices = [f"slice ffn-{width}" for width in (64, 32, 16)]
    assert [row.name for row in report.rows] == [
        "original", "control", "single_ffn_2: rewritten", "single_ffn_2: recovered", "nested: rewritten",
        "nested: recovered", *(f"nested: {name} (rewritten)" for name in slices),
        *(f"nested: {name}" for name in slices),
    ]  # fmt: skip
    rows = {row.name: row for row in report.rows}
    alone, cut = rows["single_ffn_2: rewritten"], rows["nested: slice ffn-64 (rewritten)"]
    assert alone.find("perplexity").value == pytest.approx(cut.find("perplexity").value, rel=1e-5), "the same slice"
    assert alone.find("parameters").value == cut.find("parameters").value
    assert rows["nested: slice ffn-64"].find("perplexity").value != cut.find("perplexity").value
    for name, row in rows.items():
        drafts = {item.settings["draft"] for item in row.results if item.metric == "acceptance"}
        nested = name in ("nested: rewritten", "nested: recovered")
        assert drafts == ({"ffn-64", "ffn-32", "ffn-16"} if nested else set())
        assert not row.gaps
        assert (row.find("decode_latency") is None) == name.endswith(("rewritten", "(rewritten)"))


def test_the_report_compares_slices_with_models_of_their_size(made):
    folder, report = made
    written = (folder / "report.md").read_text()
    values = {row.name: row.find("perplexity").value for row in report.rows}
    ratio = values["nested: slice ffn-64"] / values["single_ffn_2: recovered"]
    line = next(
        line for line in written.splitlines() if line.startswith("| nested: slice ffn-64 |") and "single" in line
    )
    assert line.split("|")[-2].strip() == f"{ratio:.3f}" and line.split("|")[6].strip() == "1.000"
    assert "nested from its largest to its smallest size" in written
    assert (folder / "assisted.png").is_file()


def test_the_steps_of_its_workflow_name_sections_of_the_report(made):
    _, report = made
    told = content(report)
    sections = {table.title.split(", ")[0] for table in told.tables} | {"How it was made"}
    for step in told.workflow:
        assert set(step.rstrip(".").rpartition(": ")[2].split(", ")) <= sections, step
