"""Tables and plot: what stands in them, whether they can be read, whether they come back from disk."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from matplotlib.image import imread

from compressor import report as module
from compressor.artifacts import provenance
from compressor.benchmark import Report, Row
from compressor.errors import UserError
from compressor.metrics import MetricResult
from compressor.report import PLOT, document, plot, read, scaled, table, write

ORIGIN = provenance(seed=0, base_model="gpt2", base_hash="", device="cpu", dtype="float32")


def make_row(name: str, parameters: int, perplexity: float, protocols=("strided",)) -> Row:
    results = [
        MetricResult(
            "parameters",
            parameters,
            "parameters",
            False,
            1,
            None,
            {
                "protocol": "unique storages",
                "embeddings": 39_383_808,
                "embedding_share": 39_383_808 / parameters,
                "non_zero": parameters // 2,
            },
        ),
        MetricResult("bytes", 4 * parameters, "bytes", False, 1, None, {"protocol": "weight files"}),
        MetricResult("flops_per_token", 247_064_064, "operations per token", False, 12, None, {"protocol": "forward"}),
    ]
    for protocol in protocols:
        settings = {
            "protocol": protocol,
            "context": 1024,
            "stride": 512,
            "tokens": 16_384,
            "words": 14_000,
            "source": "wikitext",
            "part": "test",
            "fingerprint": "ab" * 32,
        }
        spread = None if math.isnan(perplexity) else {"standard_error": perplexity / 100, "method": "delta method"}
        results += [
            MetricResult("perplexity", perplexity, "per token", False, 16_383, spread, settings),
            MetricResult("word_perplexity", 1500 * perplexity, "per word", False, 16_383, spread, settings),
        ]
    return Row(name, f"runs/{name}", tuple(results))


def make_report(*rows: Row) -> Report:
    return Report(rows, ORIGIN)


BEFORE_AFTER = make_report(
    make_row("gpt2", 124_439_808, 25.1678),
    make_row("soft_shared", 110_529_792, 28.0),
    make_row("control", 124_439_808, 22.1),
)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_markdown_table_says_before_and_after():
    header, rule, before, after, *_ = table(BEFORE_AFTER, markdown=True).splitlines()
    assert cells(header) == [
        "model",
        "parameters",
        "ratio",
        "non-zero",
        "embeddings",
        "bytes",
        "FLOPs/token",
        "perplexity",
        "perplexity ratio",
    ]
    assert all(cell.strip("-") in ("", ":") for cell in cells(rule))
    assert cells(before) == ["gpt2", "124,439,808", "1.000", "50.0%", "31.6%", "497.8 MB", "247.1 M", "25.17", "1.000"]
    assert cells(after) == [
        "soft_shared",
        "110,529,792",
        "0.888",
        "50.0%",
        "35.6%",
        "442.1 MB",
        "247.1 M",
        "28.00",
        "1.113",
    ]


def test_word_perplexity_and_error_stand_beside():
    text = table(BEFORE_AFTER, markdown=True)
    line = next(line for line in text.splitlines() if "42,000.00" in line)
    assert cells(line) == ["soft_shared", "28.00", "0.28", "1.113", "42,000.00", "1.113", "16,383"]
    assert "Perplexity strided: context 1024, stride 512, 16,384 tokens of wikitext, test data" in text


@pytest.mark.parametrize("markdown", [False, True])
def test_thirty_rows_stay_aligned(markdown):
    rows = [
        make_row(
            f"variant {'x' * (index % 17)} {index}", 124_439_808 - index * 10 ** (index % 7), 25 + 3.0 ** (index % 9)
        )
        for index in range(30)
    ]
    lines = table(make_report(*rows), markdown=markdown).split("\n\n")[0].splitlines()
    assert len(lines) == 32
    if markdown:
        assert len({tuple(at for at, letter in enumerate(line) if letter == "|") for line in lines}) == 1
    else:
        assert len({len(line) for line in lines}) == 1 and len(lines[0]) < 130  # numbers end in one column


def test_terminal_table_has_one_table_a_protocol():
    rows = [
        make_row("gpt2", 124_439_808, 25.0, ("strided", "lm-eval")),
        make_row("merged", 110_000_000, 30.0, ("strided", "lm-eval")),
    ]
    text = table(make_report(*rows))
    assert text.count("parameters") == 1 and "|" not in text
    assert text.index("Perplexity strided:") < text.index("Perplexity lm-eval:") < text.index("word perplexity")
    assert "Perplexity" not in table(make_report(Row("gpt2", "gpt2", rows[0].results[:3])))


def test_what_was_not_measured_is_a_dash_and_what_is_not_finite_is_said():
    broken = make_row("broken", 110_000_000, math.nan)
    text = table(make_report(make_row("gpt2", 124_439_808, 25.0), broken, Row("bare", "bare", ())), markdown=True)
    lines = text.splitlines()
    assert cells(lines[3])[-2:] == ["not finite", "-"]
    assert cells(lines[4]) == ["bare", *["-"] * 8]


def test_names_cannot_break_the_markdown():
    text = document(make_report(make_row("a|b", 124_439_808, 25.0)))
    line = next(line for line in text.splitlines() if line.startswith("| a"))
    assert line.replace("\\|", "").count("|") == 10


@pytest.mark.parametrize(
    ("value", "shown"), [(497_759_232, "497.8 M"), (1_557_611_200, "1.6 G"), (9_990, "10.0 k"), (12, "12 ")]
)
def test_scaled(value, shown):
    assert scaled(value) == shown


# ---------------------------------------------------------------- on disk


def test_write_and_read_are_inverse(tmp_path: Path):
    write(tmp_path, BEFORE_AFTER)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([PLOT, "report.json", "report.md"])
    assert read(tmp_path) == BEFORE_AFTER
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["kind"] == "report" and stored["provenance"]["base_model"] == "gpt2"
    values = [record["value"] for record in stored["results"] if record["metric"] == "perplexity"]
    assert values == [25.1678, 28.0, 22.1]
    page = (tmp_path / "report.md").read_text()
    assert f"]({PLOT})" in page and "`runs/soft_shared`" in page and ORIGIN.torch in page


def test_without_perplexity_there_is_no_plot(tmp_path: Path):
    bare = make_report(*(Row(row.name, row.source, row.results[:3]) for row in BEFORE_AFTER.rows))
    write(tmp_path, bare)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md"]
    assert "![" not in (tmp_path / "report.md").read_text()
    assert plot(make_report(BEFORE_AFTER.rows[0])) is None


def test_not_finite_survives_the_disk(tmp_path: Path):
    write(tmp_path, make_report(make_row("gpt2", 124_439_808, 25.0), make_row("broken", 110_000_000, math.nan)))
    assert "NaN" not in (tmp_path / "report.json").read_text()
    assert math.isnan(read(tmp_path).rows[1].find("perplexity").value)


def test_a_missing_report_is_one_line(tmp_path: Path):
    with pytest.raises(UserError, match="`gpt2-compress benchmark` makes it"):
        read(tmp_path)


# ---------------------------------------------------------------- plot


def crowd(count: int) -> Report:
    return make_report(
        make_row("gpt2", 124_439_808, 25.0),
        *(make_row(f"soft_shared start={index}", 110_529_792, 27.0 + index / 4) for index in range(count - 1)),
    )


def labels_of(report: Report) -> tuple[list, list[str]]:
    """Extents of the labels that the plot sets beside its points, and all its texts."""
    figures = []
    original = module._label
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_label", lambda axes, points: (figures.append(axes.figure), original(axes, points)))
        assert plot(report) is not None
    axes = figures[0].axes[0]
    texts = [note for note in axes.texts if note.xycoords == "data"]
    inside = axes.get_window_extent()
    boxes = [super(type(note), note).get_window_extent(figures[0].canvas.get_renderer()) for note in texts]
    assert all(inside.contains(box.x0, box.y0) and inside.contains(box.x1, box.y1) for box in boxes)
    return boxes, [note.get_text() for note in axes.texts]


@pytest.mark.parametrize("count", [2, 4, 10, 30])
def test_labels_do_not_overlap(count):
    boxes, texts = labels_of(crowd(count))
    assert len(boxes) == count
    assert not any(one.overlaps(other) for index, one in enumerate(boxes) for other in boxes[:index])
    assert any("gpt2 (baseline)" in text for text in texts)


def test_the_plot_is_a_picture_and_the_same_each_time():
    content = plot(BEFORE_AFTER)
    picture = imread(io.BytesIO(content))
    assert picture.shape[0] > 400 and picture.shape[1] > 800 and picture[..., :3].std() > 0.05
    assert plot(BEFORE_AFTER) == content


def test_wide_ratios_are_drawn_on_a_log_scale_and_long_names_are_cut():
    rows = make_report(make_row("gpt2", 124_439_808, 25.0), make_row("p" * 80, 100_000_000, 25_000.0))
    _, texts = labels_of(rows)
    assert any(text.startswith("…") and len(text) == 40 for text in texts)


def test_latency_has_a_table_with_its_ratio():
    def row(name: str, milliseconds: float) -> Row:
        settings = {"protocol": "greedy", "batch": 2, "prompt_tokens": 64, "new_tokens": 8}
        result = MetricResult("decode_latency", milliseconds, "ms per step", False, 10, {"p90": 9.5}, settings)
        return Row(name, name, (result,))

    both = Report((row("original", 8.0), row("shallow", 6.0)), ORIGIN)
    header, _, *body = table(both).splitlines()
    assert header.split() == ["model", "decode", "ms", "decode", "ratio"]
    assert body[1].split() == ["shallow", "6.00", "0.750"] and len(body) == 2  # one kind: the main table says it all
    shown = table(both, markdown=True).replace("|", " ")
    assert [line.split() for line in shown.splitlines() if line.split()[:1] == ["shallow"]][-1] == [
        "shallow", "decode", "2", "64", "6.00", "9.50", "0.750",
    ]  # fmt: skip
    assert "Latency" not in table(Report((make_row("original", 100, 2.0),), ORIGIN))
