"""Decode time and cache against length: which lines there are, and when there is no plot."""

from __future__ import annotations

import dataclasses

import planted
from planted import latency, report, row

from compressor.report import lengths
from compressor.report.drawing import look
from compressor.report.figures import Gaps
from compressor.report.tables import latencies


def held(items, bytes_per_token):
    return [
        dataclasses.replace(item, settings={**item.settings, "cache_bytes_per_token": bytes_per_token})
        if item.metric == "decode_latency"
        else item
        for item in items
    ]


def at(decode, caches, **more):
    """Results at prompts of 256, 512 ... tokens."""
    found = []
    for index, cache in enumerate(caches):
        found += held(latency(100, decode * (index + 1), prompt=256 << index, **more), cache)
    return found


LONG = report(
    row("gpt2", [*at(4, [3072, 3072, 3072]), *at(9, [3072, 3072], batch=8)]),
    row("linformer", at(5, [400, 390, 384])),
    row("once", at(7, [100])),
)


def drawn(report):
    with look():
        return lengths.plot(report)


def test_a_line_for_every_model_with_two_lengths():
    time, memory = drawn(LONG).axes
    assert [[(line.get_label(), *line.get_xydata().tolist()) for line in axes.lines] for axes in (time, memory)] == [
        [("gpt2", [256, 4], [512, 8], [1024, 12]), ("linformer", [256, 5], [512, 10], [1024, 15])],
        [("gpt2", [256, 3072], [512, 3072], [1024, 3072]), ("linformer", [256, 400], [512, 390], [1024, 384])],
    ]
    assert [tick.get_text() for tick in time.get_xticklabels()] == ["256", "512", "1,024"]


def test_without_caches_there_is_the_time_alone():
    bare = report(row("gpt2", [*latency(1, 2), *latency(1, 3, prompt=512)]))
    assert len(drawn(bare).axes) == 1


def test_one_length_is_no_plot():
    assert drawn(report(row("gpt2", latency(1, 2)), row("other", latency(1, 2, batch=8)))) is None
    assert drawn(report(row("gpt2", planted.size(10)))) is None


def test_the_table_of_decode_has_caches_where_they_differ():
    prefill, decode = latencies(LONG, Gaps(LONG))
    assert not any("cache" in name for name in prefill.header)
    place = decode.header.index("prompt 512: cache, bytes a token")
    assert [line[place] for line in decode.body] == ["3,072", "390", "-"]
    same = report(row("gpt2", at(4, [3072, 3072])), row("other", at(4, [3072, 3072])))
    assert not any("cache" in name for table in latencies(same, Gaps(same)) for name in table.header)
