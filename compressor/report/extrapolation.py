"""Perplexity by length, loss by position and text past the trained length: tables, and what they say in sentences."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from ..benchmark import Report, Row
from ..metrics import MetricResult
from . import layout
from .figures import MISSING, Gaps, number
from .layout import Table
from .reach import WINDOWS, Reach, positions, reaches
from .rows import listed, named, results

_EACH = 3  # so many models have a sentence each
_SAME = 1e-3  # nats; a cache that is off by more computes something else


def tables(report: Report, gaps: Gaps) -> Iterator[Table]:
    for reach in reaches(report, gaps):
        yield _by_length(reach, gaps)
        if any(positions(reach, row) for row in reach.rows):
            yield _by_position(reach)
        if reach.texts:
            yield _texts(reach, gaps)


def _by_length(reach: Reach, gaps: Gaps) -> Table:
    lines = [(row, windows) for row in reach.rows for windows in WINDOWS]
    columns: dict[str, Sequence[str]] = {
        "model": [row.name for row, _ in lines],
        "windows": [windows for _, windows in lines],
    }
    for length in reach.across:
        columns[f"{length:,} ({length / reach.trained:g}x)"] = [
            _length_cell(reach, row, windows, length, gaps) for row, windows in lines
        ]
    settings = next(iter(reach.lengths.values())).settings
    share = settings["stride_share"]
    note = (
        f"Perplexity of the same {settings['tokens'] - 1:,} tokens of {settings['source']} at every length; in "
        f"brackets its ratio to the same model's at {reach.trained:,}, the trained length, with its standard error. "
        f"Sliding windows advance by {share:g} of their length. Longer windows that do not overlap have fewer tokens "
        "near their beginning, where little is known, and gain by that alone: what the length itself is worth, sliding "
        f"windows show. Fingerprint {settings['fingerprint'][:12]}."
    )
    return layout.make(columns, "Perplexity by length", note)


def _length_cell(reach: Reach, row: Row, windows: str, length: int, gaps: Gaps) -> str:
    item = reach.perplexity(row, windows, length)
    if item is None:
        return reach.missing(row, gaps, length)
    changed = reach.change(row, windows, length)
    if changed is None or length == reach.trained:
        return number(item.value)
    ratio, error = changed
    return f"{number(item.value)} ({number(ratio, 3)}{'' if math.isnan(error) else f' ± {error:.3f}'})"


def _by_position(reach: Reach) -> Table:
    rows = [row for row in reach.rows if positions(reach, row)]
    bins = max((positions(reach, row) for row in rows), key=len)
    columns: dict[str, Sequence[str]] = {"model": [row.name for row in rows]}
    for place, item in enumerate(bins):
        columns[f"{item['first']:,} to {item['last']:,}"] = [
            f"{own[place]['nll'] - own[place]['others']:+.3f}"
            if len(own := positions(reach, row)) > place
            else f"takes {reach.takes(row):,} tokens"
            for row in rows
        ]
    note = (
        "By how many tokens stand before in a model's longest window: nats a token more than for the same tokens in "
        f"sliding windows of {reach.trained:,}. The first tokens of a window cost more; a model that loses its way far "
        "from there costs more again."
    )
    return layout.make(columns, "Loss by position in the window", note)


def _texts(reach: Reach, gaps: Gaps) -> Table:
    decodings = list(dict.fromkeys(decoding for decoding, _ in reach.texts))
    lines = [(row, decoding) for row in reach.rows for decoding in decodings]
    columns: dict[str, list[str]] = {
        "model": [*(row.name for row, _ in lines), "the text itself"],
        "decoding": [*(decoding for _, decoding in lines), MISSING],
    }
    settings = next(iter(reach.texts.values())).settings
    half, across = settings["prompt_tokens"], sorted({length for _, length in reach.texts})

    def add(header: str, length: int, show: Callable[[MetricResult], str], last: str = MISSING) -> None:
        found = [(row, reach.text(row, decoding, length)) for row, decoding in lines]
        columns[header] = [*(show(item) if item else reach.missing(row, gaps, length) for row, item in found), last]

    places = {length: f"tokens {length - half + 1:,} to {length:,}" for length in across}
    for length, where in places.items():
        own = next(way for (_, at), way in reach.texts.items() if at == length).settings["text_repetition"]
        add(f"{where}: repeated", length, lambda item: f"{item.value:.1%}", f"{own:.1%}")
    for length, where in places.items():
        add(f"{where}: loss", length, lambda item: number(item.settings["nll"], 3))
    add("cache off by", across[-1], _off)
    note = (
        f"{settings['prompts']} pieces of the text, {half:,} tokens each, continued with the cache to {across[-1]:,}. "
        "Repeated: the share of runs of 4 tokens in these places that stood there before. Loss: nats a token that the "
        "model gives its own text in one pass without cache. Cache off by: how many nats likelier than the token that "
        "was chosen with the cache another one is without it, at most; 0 up to rounding where both agree."
    )
    return layout.make(columns, "Text past the trained length", note, apart=1)


def _off(item: MetricResult) -> str:
    gap = item.settings["cache_gap"]
    return MISSING if gap is None else f"{gap:.0e}" if gap else "0"


# ---------------------------------------------------------------- sentences


def findings(report: Report, gaps: Gaps) -> Iterator[str]:
    for reach in reaches(report, gaps):
        beyond = [length for length in reach.across if length > reach.trained]
        able = [row for row in results(report) if row in reach.rows and _changes(reach, row, beyond, WINDOWS[0])]
        if len(able) <= _EACH:
            for row in able:
                told = [f"{_changes(reach, row, beyond, windows)} ({windows})" for windows in WINDOWS]
                yield (
                    f"{row.name}, perplexity beyond the {reach.trained:,} tokens it was trained at against its own "
                    f"there: {'; '.join(told)}."
                )
        else:
            farthest = beyond[-1]
            scored = [(changed[0], row.name) for row in able if (changed := reach.change(row, WINDOWS[0], farthest))]
            for (ratio, name), what in ((min(scored), "least"), (max(scored), "most")):
                yield (
                    f"Of {len(scored)} models, {name} loses {what} at {farthest:,} tokens: {ratio - 1:+.1%} (sliding) "
                    f"against its own at {reach.trained:,}."
                )
        limits: dict[int, list[str]] = {}
        for row in reach.rows:
            if beyond and (takes := reach.takes(row)) is not None and takes < beyond[-1]:
                limits.setdefault(takes, []).append(row.name)
        for takes, names in limits.items():
            yield f"{named(names)} {'takes' if len(names) == 1 else 'take'} no more than {takes:,} tokens."
        yield from _written(reach, able)


def _changes(reach: Reach, row: Row, beyond: Sequence[int], windows: str) -> str:
    """ "2x +1.2 % ± 0.3, 4x +2.0 % ± 0.5" """
    said = []
    for length in beyond:
        changed = reach.change(row, windows, length)
        if changed is not None:
            error = "" if math.isnan(changed[1]) else f" ± {100 * changed[1]:.1f}"
            said.append(f"{length / reach.trained:g}x {100 * (changed[0] - 1):+.1f}{error} %")
    return ", ".join(said)


def _written(reach: Reach, able: Sequence[Row]) -> Iterator[str]:
    """What the models wrote past the trained length, greedily."""
    length = max((length for decoding, length in reach.texts if decoding == "greedy"), default=0)
    found = {row.name: item for row in able if (item := reach.text(row, "greedy", length))}
    if not found or length <= reach.trained:
        return
    said = [f"{name} {item.value:.0%}" for name, item in found.items()]
    if len(said) <= _EACH:
        settings = next(iter(found.values())).settings
        yield (
            f"Written greedily, tokens {length - settings['prompt_tokens'] + 1:,} to {length:,} repeat runs of four: "
            f"{listed(said)}; the text itself {settings['text_repetition']:.0%}."
        )
    off = {name: item.settings["cache_gap"] for name, item in found.items() if item.settings["cache_gap"] > _SAME}
    if off:
        worst = max(off, key=off.__getitem__)
        yield f"The cache does not compute what the model does without it: {worst} is off by {off[worst]:.2g} nats."
    else:
        yield f"With the cache and without it the models choose the same tokens up to {length:,}."
