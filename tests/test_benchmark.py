"""Models side by side: what is measured, what is compared, what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

from compressor import suite
from compressor.artifacts import provenance
from compressor.benchmark import Report, Row, benchmark, check_metrics
from compressor.data import Text
from compressor.errors import UserError
from compressor.metrics import METRICS, Metric
from compressor.metrics.perplexity import perplexity
from compressor.models import OpenModel

TEXT = Text(
    documents=("A text of some forty characters, scored.",),
    joined="A text of some forty characters, scored.",
    source="planted",
    part="test",
    split="all",
    fingerprint="f" * 64,
)
ORIGIN = provenance(seed=0, base_model="one", base_hash="", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def opened(tmp_path_factory) -> dict[str, OpenModel]:
    letters = {letter: index for index, letter in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = GPT2Tokenizer(vocab={**letters, "<|endoftext|>": 256}, merges=[])
    merged = GPT2Tokenizer(vocab={**letters, "so": 256, "<|endoftext|>": 257}, merges=[("s", "o")])
    models = {}
    for name, layers, vocabulary in (("one", 2, 257), ("two", 1, 257), ("other words", 1, 258)):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocabulary,
                n_positions=16,
                n_embd=24,
                n_layer=layers,
                n_head=2,
                initializer_range=0.3,
                bos_token_id=0,
                eos_token_id=0,
            )
        ).eval()
        folder = tmp_path_factory.mktemp("models") / name
        model.save_pretrained(folder)
        models[name] = OpenModel(
            name=str(folder),
            folder=folder,
            hash="",
            model=model,
            tokenizer=tokenizer if vocabulary == 257 else merged,
            stored_dtype=torch.float32,
        )
    return models


def test_rows_hold_what_the_metrics_give_in_order(opened):
    models = {name: opened[name] for name in ("one", "two")}
    report = benchmark(
        models, ["size", {"metric": "perplexity", "context": 8}], {"perplexity": TEXT}, origin=ORIGIN, quiet=True
    )
    assert [row.name for row in report.rows] == ["one", "two"] and report.rows[0].source == opened["one"].name
    for row in report.rows:
        assert [result.metric for result in row.results] == [
            "parameters",
            "bytes",
            "flops_per_token",
            "cache_bytes",
            "perplexity",
            "word_perplexity",
        ]
        alone, _ = perplexity(opened[row.name].model, opened[row.name].tokenizer, TEXT, context=8)
        assert row.find("perplexity") == alone
    first, second = (row.find("perplexity") for row in report.rows)
    assert report.ratio(report.rows[1], second) == second.value / first.value != 1
    assert report.ratio(report.rows[0], first) == 1


def test_json_body_is_flat_and_comes_back(opened):
    report = benchmark(
        {"one": opened["one"], "two": opened["two"]},
        ["size", "perplexity", {"metric": "perplexity", "protocol": "lm-eval"}],
        {"perplexity": TEXT},
        origin=ORIGIN,
        quiet=True,
    )
    body = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert len(body["results"]) == 2 * 8 and body["baseline"] == "one"
    assert {
        "model",
        "protocol",
        "metric",
        "value",
        "unit",
        "higher_is_better",
        "count",
        "spread",
        "settings",
        "ratio",
    } == set(body["results"][0])
    found = {(record["model"], record["metric"], record["protocol"]): record for record in body["results"]}
    assert found["two", "perplexity", "lm-eval"]["ratio"] == pytest.approx(
        found["two", "perplexity", "lm-eval"]["value"] / found["one", "perplexity", "lm-eval"]["value"]
    )
    assert found["two", "parameters", "unique storages"]["ratio"] < 1
    assert Report.from_dict({**body, "provenance": vars(ORIGIN)}) == report


def test_perplexities_taken_differently_are_not_compared(opened):
    report = benchmark(
        {name: opened[name] for name in ("one", "other words")},
        ["perplexity"],
        {"perplexity": TEXT},
        origin=ORIGIN,
        quiet=True,
    )
    token, word = report.rows[1].results
    assert report.ratio(report.rows[1], token) is None  # its tokens are others
    assert report.ratio(report.rows[1], word) == word.value / report.rows[0].results[1].value
    one = benchmark(
        {"one": opened["one"]},
        [{"metric": "perplexity", "stride": 4}, "perplexity"],
        {"perplexity": TEXT},
        origin=ORIGIN,
        quiet=True,
    )
    assert [one.ratio(one.rows[0], result) for result in one.rows[0].results] == [1, 1, 1, 1]
    moved = Report((one.rows[0], Row("x", "x", report.rows[0].results)), ORIGIN)
    assert moved.ratio(moved.rows[1], report.rows[0].results[0]) == 1  # matched with the one of the same stride


def test_a_ratio_to_what_is_not_finite_is_none(opened):
    report = benchmark({"one": opened["one"]}, ["perplexity"], {"perplexity": TEXT}, origin=ORIGIN, quiet=True)
    token = report.rows[0].results[0]
    broken = type(token)(**{**vars(token), "value": math.inf})
    rows = (Row("a", "a", (broken,)), Row("b", "b", (token,)))
    report = Report(rows, ORIGIN)
    assert report.ratio(rows[1], token) in (0, None) and report.ratio(rows[0], broken) is None


def test_models_are_opened_one_after_the_other(opened):
    class Opening(dict):
        order: list = []  # noqa: RUF012

        def __getitem__(self, name):
            self.order.append(name)
            return super().__getitem__(name)

    models, seen, run = Opening(one=opened["one"], two=opened["two"]), [], METRICS["size"].run

    def watched(*given, **settings):
        seen.append(list(models.order))
        return run(*given, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METRICS, "size", Metric(watched, frozenset()))
        benchmark(models, ["size"], {}, origin=ORIGIN, quiet=True)
    assert seen == [["one"], ["one", "two"]]


def test_progress_goes_to_stderr_unless_quiet(opened, capsys):
    for quiet in (False, True):
        benchmark({"one": opened["one"]}, ["perplexity"], {"perplexity": TEXT}, origin=ORIGIN, quiet=quiet)
        said = capsys.readouterr()
        assert said.out == "" and (said.err == "") == quiet


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (
            ["perplexitty"],
            r"unknown metric 'perplexitty' \(did you mean 'perplexity'\?\); allowed: .*latency, perplexity, .*size",
        ),
        (
            [{"metric": "perplexity", "strid": 4}],
            r"unknown setting of metric perplexity 'strid' \(did you mean 'stride'",
        ),
        ([{"protocol": "strided"}], "names no metric"),
        ([3], "names no metric"),
        ([], "is not a list of metrics"),
        ("size", "is not a list of metrics"),
        (["size", "size"], "'size' stands twice with the same settings"),
    ],
)
def test_bad_metrics_are_one_line(opened, metrics, message):
    with pytest.raises(UserError, match=message) as caught:
        benchmark(opened, metrics, {}, origin=ORIGIN, quiet=True)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_measured_is_a_named_gap_and_ends_nothing(opened):
    models = {name: opened[name] for name in ("one", "two")}
    asked = ["perplexity", {"metric": "perplexity", "context": 17}, "size"]
    report = benchmark(models, asked, {"perplexity": TEXT}, origin=ORIGIN, quiet=True)
    for row in report.rows:
        assert row.find("perplexity") and row.find("parameters")
        (gap,) = row.gaps
        assert (gap.metric, gap.settings) == ("perplexity", {"context": 17})
        assert "context=17 is not allowed; allowed: whole numbers from 1 to 16" in gap.reason
    body = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert [(gap["model"], gap["metric"]) for gap in body["gaps"]] == [("one", "perplexity"), ("two", "perplexity")]
    assert Report.from_dict({**body, "provenance": vars(ORIGIN)}) == report
    for missing, reason in (({}, "no data; give --data perplexity=D"), ({"perplexity": "no such hub"}, "no such hub")):
        report = benchmark(models, asked, {}, origin=ORIGIN, quiet=True, missing=missing)
        assert [gap.reason for gap in report.rows[1].gaps] == [reason] * 2 and report.rows[1].find("bytes")


def test_a_gap_of_one_model_is_not_the_others(opened):
    def only_one_layer(subject, data, *, progress):
        if subject.model.config.n_layer > 1:
            raise UserError("too deep")
        return METRICS["size"].run(subject, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METRICS, "perplexity", Metric(only_one_layer, frozenset()))
        report = benchmark({n: opened[n] for n in ("one", "two")}, ["perplexity"], {}, origin=ORIGIN, quiet=True)
    assert [len(row.gaps) for row in report.rows] == [1, 0] and report.rows[1].find("parameters")


@pytest.mark.parametrize("row", ["/elsewhere/my-gpt2", "../my-gpt2", "..", "merged_4: recovered", "a/b/c", "", "~/x"])
def test_what_a_metric_leaves_has_a_folder_below_the_given_one(opened, tmp_path, row):
    left = []

    def leave(subject, data, *, progress, folder, seed=0):
        left.append(folder)
        return METRICS["size"].run(subject, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METRICS, "perplexity", Metric(leave, frozenset({"seed"}), saves=True))
        asked = [{"metric": "perplexity", "seed": seed} for seed in (0, 1)]
        benchmark({row: opened["one"], "two": opened["two"]}, asked, {}, origin=ORIGIN, quiet=True, folder=tmp_path)
    assert len(set(left)) == 4 and all(folder.parent == tmp_path and folder.name.strip(".") for folder in left)


def test_a_metric_that_gives_nothing_is_a_gap(opened):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METRICS, "perplexity", Metric(lambda *given, **rest: [], frozenset()))
        report = benchmark({"one": opened["one"]}, ["perplexity", "size"], {}, origin=ORIGIN, quiet=True)
    assert [gap.metric for gap in report.rows[0].gaps] == ["perplexity"]


def test_baselines_without_a_model_come_from_the_first_model_that_can_be_measured(opened):
    def measured(subject, data, *, progress):
        if subject.model.config.n_layer > 1:
            raise UserError("too deep")
        return METRICS["size"].run(subject, data)

    def references(data, subject):
        return {"nothing": METRICS["size"].run(subject, None)}

    def broken(data, subject):
        raise UserError("no words")

    models = {name: opened[name] for name in ("one", "two")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METRICS, "perplexity", Metric(measured, frozenset(), references=references, data="text"))
        report = benchmark(models, ["perplexity"], {"perplexity": TEXT}, origin=ORIGIN, quiet=True)
        assert [row.name for row in report.references] == ["nothing"]
        patch.setitem(METRICS, "perplexity", Metric(measured, frozenset(), references=broken, data="text"))
        report = benchmark(models, ["perplexity"], {"perplexity": TEXT}, origin=ORIGIN, quiet=True)
    assert report.references == () and report.rows[1].find("parameters")
    assert report.rows[1].gaps[0].reason == "baselines without a model: no words"


def test_nothing_measured_at_all_is_an_error(opened):
    with pytest.raises(UserError, match="perplexity: no data; give --data perplexity=D"):
        benchmark({"one": opened["one"]}, ["perplexity"], {}, origin=ORIGIN, quiet=True)


def test_missing_models_are_one_line(opened):
    with pytest.raises(UserError, match="no model to benchmark"):
        benchmark({}, ["size"], {}, origin=ORIGIN, quiet=True)


# ---------------------------------------------------------------- suites


@pytest.mark.parametrize("name", ["quick", "full"])
def test_suites_of_the_package_can_be_run(name, opened):
    assert name in suite.names()
    content = suite.load(name)
    assert content["description"] and check_metrics(content["metrics"])
    report = benchmark({"one": opened["one"]}, content["metrics"], {"perplexity": TEXT}, origin=ORIGIN, quiet=True)
    measured = {result.metric for result in report.rows[0].results}
    assert measured == {"perplexity", "word_perplexity", "parameters", "bytes", "flops_per_token", "cache_bytes",
                        "prefill_latency", "decode_latency"}  # fmt: skip


def test_a_suite_may_be_a_file(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text("metrics:\n  - size\n  - {metric: perplexity, max_tokens: 100}\n", encoding="utf-8")
    assert suite.load(path) == {
        "description": "",
        "metrics": [{"metric": "size"}, {"metric": "perplexity", "max_tokens": 100}],
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("metrics: [size]\nmodel: gpt2\n", r"unknown key of suite .* 'model'; allowed: description, metrics"),
        ("metric: [size]\n", "has no list of metrics"),
        ("- size\n", "has no list of metrics"),
        ("metrics: [perplexiti]\n", "unknown metric 'perplexiti'"),
        ("metrics: [{metric: size, rank: 3}]\n", "unknown setting of metric size 'rank'"),
        ("metrics: [\n", "is not readable YAML"),
    ],
)
def test_bad_suites_are_one_line(tmp_path: Path, content, message):
    path = tmp_path / "bad.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        suite.load(path)
    assert "\n" not in str(caught.value)


def test_an_unknown_suite_is_one_line():
    message = r"unknown suite 'quik' \(did you mean 'quick'\?\); allowed: FILE.yaml, full, quick"
    with pytest.raises(UserError, match=message):
        suite.load("quik")
