"""Sentences that are computed from the numbers: right, and not more than the numbers say."""

from __future__ import annotations

import planted
from planted import generation, imdb, latency, perplexity, report, rouge, row, size

from compressor.benchmark import Gap, Report
from compressor.report.figures import Gaps
from compressor.report.summary import findings, tiles


def said(whole: Report) -> str:
    return "\n".join(findings(whole, Gaps(whole)))


def run(**more: list) -> Report:
    """A run of 20 -> 50 -> 22 beside a control of 16, with further figures by row."""
    values = {"original": 20.0, "control": 16.0, "rewritten": 50.0, "recovered": 22.0}
    small = {"rewritten": 75, "recovered": 75}
    return report(
        *(
            row(name, [*size(small.get(name, 100)), *perplexity(value), *more.get(name, [])])
            for name, value in values.items()
        )
    )


def test_a_run_is_set_against_the_original_the_rewrite_and_the_control():
    text = said(run())
    assert "recovered (75.0% of the parameters): perplexity 22.00 against 20.00 of original (+10.0%; before" in text
    assert "before recovery +150.0%" in text and "tuned on the same budget (16.00), it is at +37.5%" in text
    assert "4 models were measured; original is what the others are compared with." in text


def test_a_model_is_set_against_simpler_ways_to_its_size():
    own = run()
    beside = (
        row("pruned", perplexity(90.0)),
        row("pruned-recovered", perplexity(20.9)),
        row("dropped-recovered", perplexity(33.0)),
    )
    text = said(report(*own.rows, *beside))
    assert (
        "recovered (22.00) beside simpler ways to its size: pruned-recovered 20.90 (-5.0% against it) and "
        "dropped-recovered 33.00 (+50.0% against it)." in text
    )


def test_speed_within_the_noise_of_equal_models_is_no_speed_up():
    def timed(recovered: float) -> str:
        figures = {"original": latency(100, 10), "control": latency(100, 10.5), "recovered": latency(100, recovered)}
        return said(run(**figures))

    assert "Decode speed against original (models of its own structure differ from it by 5.0%" in timed(9.7)
    assert "recovered 1.03x (no difference beyond noise)" in timed(9.7)
    assert "recovered 2.00x." in timed(5.0)


def test_intervals_that_overlap_are_said_to():
    near = said(run(original=imdb(0.86), recovered=imdb(0.84)))
    assert "IMDb accuracy: original 0.860, recovered 0.840; their 95 % intervals overlap." in near
    far = said(run(original=imdb(0.86), recovered=imdb(0.70)))
    assert "recovered 0.700, and their 95 % intervals do not overlap." in far


def test_a_model_that_beats_no_baseline_is_named():
    whole = run(original=[*imdb(0.86), *rouge(0.25)], recovered=[*imdb(0.80), *rouge(0.35)])
    text = said(Report(whole.rows, whole.origin, (), planted.references()))
    assert "IMDb accuracy: recovered does no better than tf-idf (0.820), which is no model." in text
    assert "ROUGE-L: original does no better than lead-3 (0.248), which is no model." in text
    assert "majority" not in text and "prompt echo" not in text and "4 baselines without a model" in text


def test_loops_and_gaps_are_not_hidden():
    looping = generation(0.2, 0.75, ("a a a", "b b b"), loops=True)
    text = said(run(original=generation(0.7, 0.0, ("a", "b")), recovered=looping))
    assert "1 of 2 models end in a loop in some of their texts, recovered most often (75%)." in text
    missing = report(row("original", size(100), Gap("imdb", {}, "no data")))
    assert "Not everything could be measured, see Not measured: imdb." in said(missing)


def test_of_many_models_the_best_and_the_smallest_are_named():
    text = said(planted.study())
    assert "Of 9 models, merged_4: recovered (88.6% of the parameters) loses least" in text
    assert "Of 9 models, compressed_10: recovered (48.7% of the parameters) is the smallest" in text
    assert "beside simpler ways to its size: compressed_6: pruned-recovered" in text
    assert len(text.splitlines()) < 16


def test_a_pruned_model_is_not_called_small():
    whole = report(
        row("original", [*size(1000), *perplexity(20)]), row("thinned", [*size(1000, non_zero=600), *perplexity(30)])
    )
    assert "thinned (100.0% of the parameters, 60.0% of them not zero: its file is no smaller)" in said(whole)


def test_tiles_of_few_models_only():
    (tile,) = tiles(run(original=latency(100, 10), recovered=latency(80, 5)))
    assert tile.name == "recovered"
    assert dict((what, value) for value, what in tile.figures) == {
        "of the parameters": "75.0%",
        "of the bytes": "75.0%",
        "perplexity against original": "+10.0%",
        "prefill speed": "1.25x",
        "decode speed": "2.00x",
    }
    assert tiles(planted.study()) == []
