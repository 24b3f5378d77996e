"""Task tables: values, intervals, baselines without a model; and what the models wrote."""

from __future__ import annotations

import dataclasses

import planted
from planted import generation, imdb, report, rouge, row, task

from compressor.benchmark import Gap, Row
from compressor.report.figures import Gaps
from compressor.report.layout import Table
from compressor.report.tasks import prompts, table, tasks


def only(whole, *, everything: bool = True) -> Table:
    (found,) = tasks(whole, Gaps(whole))
    return table(whole, found, everything=everything)


def test_value_interval_difference_and_count():
    whole = report(row("original", imdb(0.86)), row("small", imdb(0.8)), references=planted.references()[:2])
    shown = only(whole)
    assert shown.header == ("model", "IMDb accuracy", "95 % interval", "difference", "n")
    assert shown.body == (
        ("original", "0.860", "0.840 to 0.880", "+0.000", "500"),
        ("small", "0.800", "0.780 to 0.820", "-0.060", "500"),
        ("majority class (no model)", "0.500", "-", "-0.360", "500"),
        ("tf-idf (no model)", "0.820", "0.800 to 0.840", "-0.040", "500"),
    )
    assert shown.apart == 2 and shown.title == "IMDb, probe"
    assert (
        "Higher is better" in shown.note
        and "95 % bootstrap over documents" in shown.note
        and "cdcdcdcdcdcd" in shown.note
    )


def test_without_intervals_there_is_no_column_for_them():
    whole = report(row("original", [task("imdb_accuracy", 0.8, 0, protocol="probe")]))
    assert only(whole).header == ("model", "IMDb accuracy", "difference", "n")


def test_three_measures_stand_in_one_table_and_the_terminals_has_no_intervals():
    whole = report(row("original", rouge(0.3)), row("small", rouge(0.2)))
    long, short = only(whole), only(whole, everything=False)
    assert [head for head in long.header if "interval" in head] == [f"95 % interval ROUGE-{kind}" for kind in "12L"]
    assert short.header == (
        "model", "ROUGE-1", "difference ROUGE-1", "ROUGE-2", "difference ROUGE-2", "ROUGE-L", "difference ROUGE-L", "n",
    )  # fmt: skip
    assert short.body[1] == ("small", "0.200", "-0.100", "0.080", "-0.040", "0.160", "-0.080", "500")


def test_two_protocols_are_two_tables_and_baselines_stand_in_both():
    whole = report(
        row("original", [*imdb(0.8), *imdb(0.9, "finetune")]),
        row("small", [*imdb(0.7), *imdb(0.8, "finetune")]),
        references=planted.references()[:1],
    )
    probe, finetune = tasks(whole, Gaps(whole))
    for found, best in ((probe, "0.800"), (finetune, "0.900")):
        body = table(whole, found, everything=True).body
        assert body[0][1] == best and body[-1][:2] == ("majority class (no model)", "0.500")


def test_a_baseline_on_other_text_is_not_set_against_the_original():
    other = task("imdb_accuracy", 0.5, protocol="no model")
    other.settings["fingerprint"] = "77" * 32
    whole = report(row("original", imdb(0.8)), references=(Row("majority class", "", (other,)),))
    assert only(whole).body[-1][3] == "-"


def test_figures_taken_differently_have_no_difference():
    (longer,) = imdb(0.9)
    longer.settings["context"] = 512
    whole = report(row("original", imdb(0.8)), row("long", [longer]))
    first, second = (table(whole, found, everything=True) for found in tasks(whole, Gaps(whole)))
    assert [line[0] for line in first.body] == ["original"] and first.note.endswith("Not asked of long.")
    assert second.body == (("long", "0.900", "0.880 to 0.920", "-", "500"),)


def test_gaps_are_marked_where_the_figure_would_stand():
    gap = Gap("imdb", {"head": "probe"}, "context too long")
    whole = report(row("original", imdb(0.8)), row("short", [], gap))
    assert only(whole).body[1] == ("short", "gap [1]", "-", "-", "-")
    nobody = report(row("original", [], Gap("rouge", {}, "no data")), row("small", [], Gap("rouge", {}, "no data")))
    shown = only(nobody)
    assert [line[1:] for line in shown.body] == [("gap [1]", "-") * 3 + ("-",)] * 2  # of ROUGE-1, -2, -L
    assert shown.title == "Summaries" and shown.note == "Not measured."


def test_a_metric_that_nobody_knows_has_a_table_too():
    whole = report(row("original", [task("readability", 61.5, 2.0, protocol="whole text", higher=False)]))
    shown = only(whole)
    assert shown.header[1] == "readability" and shown.body[0][1] == "61.50" and "Lower is better" in shown.note


def test_samples_stand_side_by_side_once_each():
    whole = report(
        row("original", generation(0.7, 0.0, ("one", "two"))),
        row("small", generation(0.2, 0.5, ("one one one", "three"), loops=True)),
    )
    first, second = prompts(whole)
    assert (first.prompt, first.how) == (planted.PROMPTS[0], "top-k 40, seed 0")
    assert [(item.model, item.text, item.loops) for item in first.samples] == [
        ("original", "one", False), ("small", "one one one", True),
    ]  # fmt: skip
    assert [item.text for item in second.samples] == ["two", "three"]
    twice = whole.rows[0].results[1]
    again = report(row("original", [twice, type(twice)(**{**vars(twice), "metric": "looping"})]))
    assert len(prompts(again)[0].samples) == 1


def test_summaries_stand_beside_what_people_wrote():
    def summarised(text: str):
        written = [{"document": "A long article", "reference": "In short.", "generated": text}]
        return [task("rougeL", 0.2, protocol="TL;DR, greedy", details=written)]

    (only,) = prompts(report(row("original", summarised("one")), row("small", summarised("two"))))
    assert (only.prompt, only.how) == ("A long article …", "summary")
    assert [(item.model, item.text) for item in only.samples] == [
        ("(written by people)", "In short."), ("original", "one"), ("small", "two"),
    ]  # fmt: skip


def test_models_that_were_not_asked_are_named_not_shown():
    rows = [row("original", imdb(0.8)), *(row(f"m{index}: rewritten", []) for index in range(5))]
    shown = only(report(*rows))
    assert len(shown.body) == 1 and shown.note.endswith("Not asked of 5 models.")


def test_details_that_are_no_texts_are_left_alone():
    for details in ({"a": 1}, [1, "x"], [{"prompt": "p"}], [{"prompt": 3, "text": "t"}], "text"):
        figure = task("distinct2", 0.5, protocol="p", details=details)
        assert prompts(report(row("original", [figure]))) == []


def test_the_caps_of_a_task_are_said():
    def measured(cut):
        found = imdb(0.8)[0]
        settings = {**found.settings, "context": 256, "training": 400, "selection": 100, "cut": cut, "seeds": None}
        return [dataclasses.replace(found, settings=settings)]

    said = only(report(row("original", measured(0.25)), row("small", measured(1.0)))).note
    assert "Context 256 tokens, 400 training texts, 100 selection texts, documents cut 25% to 100%." in said
    assert "seeds" not in said
    assert "tokens" not in only(report(row("original", imdb(0.8)))).note
