"""Model cards: what they say, what they do not give away, whose they are."""

from __future__ import annotations

import dataclasses
import json
import shutil

import planted
import pytest
from conftest import forced, largest_file, tree
from huggingface_hub import ModelCard
from planted import imdb, latency, perplexity, rouge, row, size
from transformers import GPT2Config

from compressor import pipeline, run_folder
from compressor.benchmark import Gap, Report
from compressor.modeling import GPT2CompressedConfig
from compressor.models import find, open_model
from compressor.recipe import Finetune
from compressor.report.card import bare, card, command, measured_rows, signed, unedited
from compressor.rewrites import from_record
from compressor.steps import cards

BASE, OWN, CONTROL = "0" * 64, "1" * 64, "2" * 64  # weights
ORIGIN = {
    "version": "0.1.0",
    "command": "gpt2-compress run soft_shared model=/elsewhere/anna/secret/gpt2 --run /elsewhere/anna/runs/mine",
    "base_model": "/elsewhere/anna/secret/gpt2",
    "base_hash": BASE,
    "data": {
        "calibration": {"source": "/elsewhere/anna/secret/texts.txt"},
        "training": {"source": "/elsewhere/anna/secret/texts.txt"},
    },
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "device": "cpu",
    "dtype": "float32",
    "seed": 3,
}
MADE = {
    "rewrites": [{"rewrite": "soft_shared", "n": 4, "start": 4, "rank": 8}],
    "alignment": {"method": "activation", "tokens": 4000},
    "layers": 12,
    "layers_before": 12,
    "parameters": 110_529_792,
    "parameters_before": 124_439_808,
    "bytes": 442_119_168,
    "bytes_before": 497_759_232,
    "flops_per_token": 250_000_000,
    "flops_per_token_before": 247_064_064,
    "weights": OWN,
    "provenance": ORIGIN,
}
RECOVERED = {
    **MADE,
    "made_from": {"batch_tokens": 4096, "learning_rate": 3e-3, "lora_rank": 64, "distill": True},
    "recovery": {"train": "lora", "steps": 100, "best_step": 80},
    "selection_perplexity": {"before": 40.125, "after": 30.0},
}
SHARED = GPT2CompressedConfig(n_positions=1024)


def figures(name: str, weights: str, score: float, *gaps: Gap):
    secret = "/elsewhere/anna/secret/texts.txt"
    own = [*size(110_529_792), *perplexity(score, source=secret, split="test")]
    own += planted.extrapolation(score, {512: 1.1}, source=secret)
    return row(name, [*own, *latency(10, 1), *imdb(0.8), *rouge(0.2)], *gaps, weights=weights)


def measured(*gaps: Gap) -> Report:
    own = figures("x: recovered", OWN, 27.5, *gaps)
    return Report((figures("gpt2", BASE, 25.0), figures("x: control", CONTROL, 22.0), own), planted.ORIGIN)


def shown(*gaps: Gap) -> Report:
    """The rows that the card of the recovered model has."""
    rows = measured_rows(measured(*gaps), base=BASE, own=OWN, control=CONTROL)
    assert rows is not None
    return rows


def table(text: str) -> list[list[str]]:
    """The cells of all tables."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| "]


def of(text: str) -> ModelCard:
    found = ModelCard(text)
    found.validate = None  # asks the hub
    return found


# ---------------------------------------------------------------- what it says


def test_the_metadata_are_what_the_hub_reads():
    data = of(card("recovered", RECOVERED, SHARED, shown())).data
    assert (data.library_name, data.pipeline_tag, data.base_model) == ("transformers", "text-generation", None)
    assert data.tags == ["gpt2-compress", "gpt2", "soft_shared", "custom_code"]
    results = {(item.task_type, item.dataset_name, item.metric_type): item.metric_value for item in data.eval_results}
    assert results["text-generation", "texts.txt", "perplexity"] == 27.5
    assert results["text-classification", "demo", "accuracy"] == 0.8
    assert results["summarization", "demo", "rougeL"] == pytest.approx(0.16)
    plain = of(card("rewritten", MADE, GPT2Config())).data
    assert "custom_code" not in plain.tags and not plain.eval_results


@pytest.mark.parametrize(
    ("base", "named"),
    [("gpt2", "gpt2"), ("openai-community/gpt2", "openai-community/gpt2"), ("demo", None), ("/x/y/gpt2", None)],
)
def test_a_base_model_is_named_where_it_is_on_the_hub(base, named):
    made = {**MADE, "provenance": {**ORIGIN, "base_model": base}}
    assert of(card("rewritten", made, SHARED)).data.base_model == named


def test_what_was_done_and_what_came_out():
    text = card("recovered", RECOVERED, SHARED)
    assert "the FFNs of a window share one base and keep a low-rank difference each" in text
    assert "n = 4, start = 4, rank = 8" in text and "matched by activation on 4,000 tokens of texts.txt" in text
    assert (
        "Trained for 100 steps of 4,096 tokens of texts.txt: lora (rank 64, merged at the end), learning rate 0.003, "
        "learning also from the original's predictions. The state of step 80 was kept, the best on the selection text: "
        "perplexity 40.12 -> 30.00." in text
    )
    rows = {name: cells for name, *cells in table(text)}
    assert rows["parameters"] == ["124,439,808", "110,529,792", "0.888"]
    assert rows["bytes"] == ["497,759,232", "442,119,168", "0.888"]
    assert "The context of 1024 tokens" in text and "biases" in text
    assert "seed 3" in text and "## Figures" not in text
    assert "tuned on the budget" not in text and "trained on the budget" in card("control", RECOVERED, GPT2Config())


def test_how_it_is_opened():
    own = card("rewritten", MADE, SHARED)
    assert "trust_remote_code=True" in own and "import compressor" in own
    plain = card("rewritten", MADE, GPT2Config())
    assert "trust_remote_code" not in plain and "AutoModelForCausalLM.from_pretrained" in plain


def test_the_figures_of_a_benchmark():
    text = card("recovered", RECOVERED, SHARED, shown(Gap("generation", {}, "/elsewhere/anna/secret is full")))
    text = text[text.index("## Figures") :]
    lines = table(text)
    assert [line[0] for line in lines[2:5]] == ["original", "control", "this model"]
    assert "27.50" in lines[4] and "1.100" in lines[4]
    assert "### Perplexity by length" in text and "30.25 (1.100 ± 0.004)" in text
    assert "### IMDb, probe" in text and "### Summaries, greedy" in text and "could not be measured" in text
    assert measured_rows(measured(), base="9", own=OWN, control=None) is None
    assert measured_rows(measured(), base=BASE, own="9", control=None) is None
    tuned = measured_rows(measured(), base=BASE, own=CONTROL, control=CONTROL)
    assert [item.name for item in tuned.rows] == ["original", "this model"]


def test_no_place_of_this_machine_is_given_away():
    rows = shown(Gap("generation", {}, "/elsewhere/anna/secret is full"))
    for text in (card("recovered", RECOVERED, SHARED, rows), card("rewritten", MADE, SHARED)):
        assert "anna" not in text and "/home" not in text
        assert "`gpt2-compress run soft_shared model=gpt2 --run mine`" in text


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("run soft_shared model=openai-community/gpt2", "run soft_shared model=openai-community/gpt2"),
        ("rewrite --run runs/mine --rank 8", "rewrite --run mine --rank 8"),
        ("align --data ~/my/a.txt --run=x/y", "align --data a.txt --run=y"),
        ("align --model '/my models/gpt2 a' --data /d/x.jsonl", "align --model 'gpt2 a' --data x.jsonl"),
        ("run x data=corpus/a.txt", "run x data=a.txt"),
        ("run it's", "run 'it'\"'\"'s'"),
    ],
)
def test_commands_without_places(given, shown):
    assert command(given) == shown


def test_bare_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one" / "two").mkdir(parents=True)
    names = {
        "/a/b": "b",
        "./b": "b",
        "~/b/": "b",
        "a/b/c": "c",
        "a/b": "a/b",
        "one/two": "two",
        "gpt2": "gpt2",
        "a/b.csv": "b.csv",
    }
    assert {name: bare(name) for name in names} == names


# ---------------------------------------------------------------- whose it is


def test_a_card_is_ours_as_long_as_nobody_has_changed_a_letter():
    text = card("rewritten", MADE, SHARED)
    assert unedited(text) and unedited(signed("x"))
    for other in (
        text.replace("biases", "wonders"),
        text + "More.\n",
        text.rsplit("<!--", 1)[0],
        "# Mine\n",
        "",
        text.replace("sha256 ", "sha256 0", 1),
    ):
        assert not unedited(other)


SETTINGS = Finetune(steps=2, batch_tokens=128, context=32, selection_tokens=128, learning_rate=1e-2, control=True)


@pytest.fixture(scope="module")
def _whole_run(tmp_path_factory, _made_run):
    run = shutil.copytree(_made_run, tmp_path_factory.mktemp("card") / "mine")
    pipeline.finetune(run, SETTINGS, pipeline.Session(device="cpu", quiet=True))
    return run


@pytest.fixture
def whole_run(_whole_run, tmp_path):
    return shutil.copytree(_whole_run, tmp_path / "mine")


def test_every_model_of_a_run_has_a_card_and_a_benchmark_renews_them(whole_run, tmp_path, session, tiny_folder):
    before = tree(whole_run)
    steps = run_folder.steps(whole_run)
    assert list(steps) == ["control", "rewritten", "recovered"]
    for step, folder in steps.items():
        text = (folder / "README.md").read_text()
        assert unedited(text) and str(tiny_folder.parent) not in text and "## Figures" not in text
        assert ("Trained for 2 steps" in text) == (step != "rewritten")
        assert ("soft_shared" in of(text).data.tags) == (step != "control")
        assert "| layers          |" in text and " - |" not in text  # before and after are known
    pipeline.run_benchmark([str(whole_run)], tmp_path / "out", ["size"], {}, session)
    after = tree(whole_run)
    assert {name for name in after if before.get(name) != after[name]} == {f"{step}/README.md" for step in steps}
    for step, folder in steps.items():
        text = (folder / "README.md").read_text()
        names = ["original", "this model"] if step == "control" else ["original", "control", "this model"]
        assert [line[0] for line in table(text[text.index("## Figures") :])][2:] == names
        stored = json.loads((folder / "report.json").read_text())
        assert unedited(text) and stored["weights"] == open_model(str(folder)).hash
    assert all(check.passed for check in pipeline.verify_model(str(whole_run), session))


def test_what_a_user_wrote_is_kept_and_said(whole_run, tmp_path, session, notices):
    mine = whole_run / "recovered" / "README.md"
    mine.write_text(mine.read_text().replace("biases", "wonders"))
    content = mine.read_bytes()
    pipeline.run_benchmark([str(whole_run)], tmp_path / "out", ["size"], {}, session)
    assert mine.read_bytes() == content and any("kept, without the new figures" in said for said in notices)
    assert "## Figures" in (whole_run / "rewritten" / "README.md").read_text()
    pipeline.finetune(whole_run, SETTINGS, forced(session))
    assert mine.read_bytes() == content and any("kept, though the model is a new one" in said for said in notices)
    record = {"rewrite": "soft_shared", "n": 2, "start": 0, "rank": 2}
    (whole_run / "rewritten" / "README.md").write_text("# Mine\n")
    pipeline.rewrite(whole_run, [from_record(record)], forced(session))
    assert (whole_run / "rewritten" / "README.md").read_text() == "# Mine\n"
    mine.unlink()
    pipeline.finetune(whole_run, SETTINGS, forced(session))
    assert "n = 2" in mine.read_text()


def test_a_card_that_cannot_be_written_ends_nothing(whole_run, tmp_path, session, notices):
    report = pipeline.run_benchmark([str(whole_run)], tmp_path / "out", ["size"], {}, session)
    before = tree(whole_run)
    with largest_file(100):
        cards.renew([str(whole_run)], dataclasses.replace(report, rows=report.rows), session.notice)
    assert tree(whole_run) == before and sum("cannot write" in said for said in notices) == 3


def test_a_model_that_this_package_did_not_make_gets_no_card(tmp_path, tiny_folder, session):
    pipeline.run_benchmark([str(tiny_folder)], tmp_path / "out", ["size"], {}, session)
    assert not (tiny_folder / "README.md").exists() and find(str(tiny_folder))
