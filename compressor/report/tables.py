"""The tables of size, perplexity, speed and recovery."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..benchmark import Report, Row, comparable
from ..metrics import MetricResult
from . import layout
from .figures import MISSING, Gaps, Way, number, scaled, way_of, ways
from .layout import Table
from .rows import is_slice, member, named, pairs, part

ELSEWHERE = "see below"  # where a row's figure was taken in another way than the table's
SPARSE = 0.99  # a model with a smaller share of parameters that are not zero is one that zeros were made in
_SIZE = Way("size", {}, "any")  # a row has its size in one way only
REGIMES = {"prefill_latency": "prefill", "decode_latency": "decode"}


def overview(report: Report, gaps: Gaps) -> Table:
    """The main table: what one looks at first."""
    columns: dict[str, Sequence[str]] = {"model": [row.name for row in report.rows]}

    def add(header: str, metric: str, way: Way | None, show: Callable[[Row, MetricResult], str]) -> None:
        cells = [_cell(row, metric, way, gaps, show) for row in report.rows]
        if any(cell not in (MISSING, ELSEWHERE) for cell in cells):
            columns[header] = cells

    add("parameters", "parameters", _SIZE, lambda row, item: f"{item.value:,}")
    add("ratio", "parameters", _SIZE, lambda row, item: _ratio(report, row, item))
    if any(sparse(row) for row in report.rows):
        add("non-zero", "parameters", _SIZE, _non_zero)
    add("bytes", "bytes", _SIZE, lambda row, item: f"{scaled(item.value)}B")
    add("FLOPs/token", "flops_per_token", _SIZE, lambda row, item: scaled(item.value))
    perplexity = first(ways(report, "perplexity"))
    add("perplexity", "perplexity", perplexity, lambda row, item: number(item.value))
    add("perplexity ratio", "perplexity", perplexity, lambda row, item: _ratio(report, row, item))
    latency = first(ways(report, "latency"))
    for metric, regime in REGIMES.items():
        add(f"{regime} ms", metric, latency, lambda row, item: f"{item.value:.2f}")
        add(f"{regime} speed-up", metric, latency, lambda row, item: speed_up(report, row, item))
    return layout.make(columns)


def sizes(report: Report, gaps: Gaps) -> Table | None:
    """All that was counted; None where nothing was."""
    if not any(row.find("parameters") for row in report.rows):
        return None

    def column(metric: str, show: Callable[[Row, MetricResult], str]) -> list[str]:
        return [_cell(row, metric, _SIZE, gaps, show) for row in report.rows]

    columns = {
        "model": [row.name for row in report.rows],
        "parameters": column("parameters", lambda row, item: f"{item.value:,}"),
        "ratio": column("parameters", lambda row, item: _ratio(report, row, item)),
        "non-zero": column("parameters", _non_zero),
        "embeddings": column("parameters", lambda row, item: f"{item.settings['embedding_share']:.1%}"),
        **_positions(report),
        "bytes": column("bytes", lambda row, item: f"{item.value:,}"),
        "bytes ratio": column("bytes", lambda row, item: _ratio(report, row, item)),
        "FLOPs/token": column("flops_per_token", lambda row, item: f"{item.value:,}"),
        "FLOPs ratio": column("flops_per_token", lambda row, item: _ratio(report, row, item)),
    }
    note = "Sharing saves bytes, not operations. Zeros of a pruned model are stored like any other number."
    contexts = {item.settings["context"] for row in report.rows if (item := row.find("cache_bytes"))}
    if contexts:
        columns["cache"] = column("cache_bytes", lambda row, item: f"{scaled(item.value)}B")
        columns["cache ratio"] = column("cache_bytes", lambda row, item: _ratio(report, row, item))
        lengths = " or ".join(f"{context:,}" for context in sorted(contexts))
        note += f" Cache: the most that generation keeps for one sequence of {lengths} tokens."
    return layout.make(columns, "Size", note)


def _positions(report: Report) -> dict[str, list[str]]:
    """The parameters of positions and their share of all, where models differ in them."""
    found = [row.find("parameters") for row in report.rows]
    held = [(item.settings.get("positions"), item.value) if item else (None, 1) for item in found]
    if len({count for count, _ in held if count is not None}) < 2:
        return {}
    return {"positions": [MISSING if count is None else f"{count:,} ({count / of:.2%})" for count, of in held]}


def _non_zero(row: Row, item: MetricResult) -> str:
    return f"{item.settings['non_zero'] / item.value:.1%}"


def first(found: Sequence[Way]) -> Way | None:
    return found[0] if found else None


def _cell(row: Row, metric: str, way: Way | None, gaps: Gaps, show: Callable[[Row, MetricResult], str]) -> str:
    if way is None:
        return MISSING
    result = row.find(metric) if way.family == "size" else way.find(row, metric)
    if result is not None:
        return show(row, result)
    mark = gaps.mark(row, way)
    return ELSEWHERE if mark == MISSING and any(item.metric == metric for item in row.results) else mark


def _ratio(report: Report, row: Row, result: MetricResult) -> str:
    ratio = report.ratio(row, result)
    return MISSING if ratio is None else f"{ratio:,.3f}"


def speed_up(report: Report, row: Row, result: MetricResult) -> str:
    """How many times as fast as the baseline in the same process: "1.31x"."""
    ratio = report.ratio(row, result)
    return f"{1 / ratio:.2f}x" if ratio else MISSING


def sparse(row: Row) -> bool:
    """Whether a model was pruned by zeros, which its file stores like any other number. A rewritten model may have
    some of its own, in deltas that begin at 0."""
    count = row.find("parameters")
    return (
        count is not None
        and part(row.name)[1] not in ("rewritten", "recovered")
        and not is_slice(part(row.name)[1])
        and count.settings.get("non_zero", count.value) < SPARSE * count.value
    )


# ---------------------------------------------------------------- perplexity


def perplexities(report: Report, gaps: Gaps) -> list[Table]:
    """One table for every way in which perplexity was taken."""
    return [_perplexity(report, gaps, way) for way in ways(report, "perplexity")]


def _perplexity(report: Report, gaps: Gaps, way: Way) -> Table:
    token = [way.find(row, "perplexity") for row in report.rows]
    word = [way.find(row, "word_perplexity") for row in report.rows]
    rows = [row for row, *found in zip(report.rows, token, word, strict=True) if any(found) or gaps.has(row, way)]

    def column(metric: str, show: Callable[[Row, MetricResult], str]) -> list[str]:
        return [_cell(row, metric, way, gaps, show) for row in rows]

    def error(row: Row, item: MetricResult) -> str:
        return f"{item.spread['standard_error']:.2f}" if item.spread else MISSING

    columns = {
        "model": [row.name for row in rows],
        "perplexity": column("perplexity", lambda row, item: number(item.value)),
        "standard error": column("perplexity", error),
        "ratio": column("perplexity", lambda row, item: _ratio(report, row, item)),
        "word perplexity": column("word_perplexity", lambda row, item: number(item.value)),
        "word ratio": column("word_perplexity", lambda row, item: _ratio(report, row, item)),
        "scored tokens": column("perplexity", lambda row, item: f"{item.count:,}"),
    }
    return layout.make(columns, f"Perplexity {way.settings.get('protocol', 'strided')}", how(way))


def how(way: Way) -> str:
    """How a perplexity was taken, in one line."""
    settings = way.settings
    if not way.key:
        return "Not measured."
    part = f", {settings['part']} data" if settings.get("part") else ""
    return (
        f"Context {settings['context']}, stride {settings['stride']}, {settings['tokens']:,} tokens of "
        f"{settings['source']}{part}, fingerprint {settings['fingerprint'][:12]}."
    )


# ---------------------------------------------------------------- speed


def latencies(report: Report, gaps: Gaps) -> list[Table]:
    """Prefill and decode: median, 90th percentile and speed-up for every batch and prompt, one row a model (of a
    process: milliseconds of two processes are of two states of the machine)."""
    kinds = ways(report, "latency")
    tables = []
    for metric, regime in REGIMES.items():
        asked = [row for row in report.rows if any(way.find(row, metric) or gaps.has(row, way) for way in kinds)]
        lines = [(row, process) for row in asked for process in _processes(row, metric)]
        if not lines:
            continue
        columns = {"model": [row.name + (f" (with {process})" if process else "") for row, process in lines]}
        for way in kinds:
            found = [_of_process(row, metric, way, process) for row, process in lines]
            words = {"batch": "batch", "prompt_tokens": "prompt"}
            head = ", ".join(f"{word} {way.settings[name]}" for name, word in words.items() if name in way.settings)
            columns[f"{head}: ms (p90)".removeprefix(": ")] = [
                gaps.mark(row, way) if item is None else _timed(item)
                for (row, _), item in zip(lines, found, strict=True)
            ]
            columns[f"{head}: speed-up".removeprefix(": ")] = [
                gaps.mark(row, way) if item is None else speed_up(report, row, item)
                for (row, _), item in zip(lines, found, strict=True)
            ]
        columns |= _caches(lines, kinds, metric)
        left = [row.name for row in report.rows if row not in asked]
        others = f" Not asked of {named(left)}." if left else ""
        tables.append(layout.make(columns, f"{regime.capitalize()} latency", _clock(kinds[0], metric) + others))
    return tables


def _caches(lines: Sequence[tuple[Row, str]], kinds: Sequence[Way], metric: str) -> dict[str, list[str]]:
    """What each model keeps for a token, a column for every prompt; none where all keep the same for each."""
    columns = {}
    for way in kinds:
        found = [item.settings if (item := way.find(row, metric)) else {} for row, _ in lines]
        held = [settings.get("cache_bytes_per_token") for settings in found]
        if len({value for value in held if value is not None}) > 1:
            name = f"prompt {way.settings.get('prompt_tokens')}: cache, bytes a token"
            columns[name] = [MISSING if value is None else f"{value:,.0f}" for value in held]
    return columns


def _processes(row: Row, metric: str) -> list[str]:
    return list(dict.fromkeys(item.settings.get("process", "") for item in row.results if item.metric == metric)) or [
        ""
    ]


def _of_process(row: Row, metric: str, way: Way, process: str) -> MetricResult | None:
    own = [item for item in row.results if item.settings.get("process", "") == process]
    return way.find(Row(row.name, row.source, tuple(own)), metric)


def _timed(item: MetricResult) -> str:
    p90 = (item.spread or {}).get("p90")
    return number(item.value) + ("" if p90 is None else f" ({number(p90)})")


def _clock(way: Way, metric: str) -> str:
    settings = way.settings
    what = "a prefill" if metric == "prefill_latency" else "a step of one token for the whole batch"
    machine = ", ".join(str(settings[name]) for name in ("device", "dtype") if name in settings)
    repeats = f", {settings['repeats']} repeats" if "repeats" in settings else ""
    return (
        f"Medians of {what}{repeats}{', ' + machine if machine else ''}, models interleaved in one process. Rows of "
        "one structure (an original, its control) differ by noise."
    )


# ---------------------------------------------------------------- recovery


def recoveries(report: Report, gaps: Gaps) -> Table | None:
    """Before and after recovery, beside the original and the control; None where no model was measured both."""
    main = first(ways(report, "perplexity"))
    body = []
    for pair in pairs(report) if main is not None and main.key else ():
        way = way_of(report, pair.after, "perplexity") or main
        rows = [report.rows[0], member(report, pair.run, "control"), pair.before, pair.after]
        found = [way.find(row, "perplexity") if way and row else None for row in rows]
        original, control, before, after = found
        shown = (
            number(item.value) if item else gaps.mark(row, way) if row and way else "none"
            for row, item in zip(rows, found, strict=True)
        )
        ratios = (over(before, original), over(after, original), over(after, control))
        body.append((pair.name or "this run", *shown, *ratios))
    header = ("", "original", "control", "before", "after", "before / original", "after / original", "after / control")
    note = (
        "Perplexity before and after recovery. The control is the original tuned on the same budget: what recovery is "
        "worth shows against it."
    )
    return Table(header, tuple(body), "Recovery", note) if body else None


def over(one: MetricResult | None, other: MetricResult | None) -> str:
    """One figure over another that was taken in the same way."""
    if one is None or other is None or not other.value or not comparable(one, other):
        return MISSING
    return number(one.value / other.value, 3)
