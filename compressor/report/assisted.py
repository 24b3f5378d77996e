"""A nested model written with its own slices as drafts: a line a draft, and whether it pays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..benchmark import Report, Row
from ..metrics import MetricResult
from .figures import MISSING, Gaps, Way, number, ways
from .layout import Table

_SHARED = ("protocol", "prompt_tokens", "new_tokens", "max_tokens", "fingerprint")
TITLE = "Written with drafts"


@dataclass(frozen=True)
class Drafted:
    """The whole model of a row with one of its slices as the draft."""

    row: Row
    draft: str
    accepted: MetricResult
    tokens: MetricResult
    speed: MetricResult
    same: MetricResult


def drafted(report: Report) -> list[list[Drafted]]:
    """What was measured, each set of settings by itself; the drafts of a model in their order."""
    found: dict[tuple, list[Drafted]] = {}
    for way in _ways(report):
        for row in report.rows:
            results = [
                way.find(row, name) for name in ("acceptance", "tokens_per_pass", "assisted_speed_up", "same_text")
            ]
            own = [item for item in results if item is not None]
            if len(own) == len(results):
                found.setdefault(_shared(way), []).append(Drafted(row, way.settings["draft"], *own))
    places = [row.name for row in report.rows]
    return [sorted(group, key=lambda item: places.index(item.row.name)) for group in found.values()]


def _ways(report: Report) -> list[Way]:
    return [way for way in ways(report, "assisted") if way.key]


def _shared(way: Way) -> tuple:
    return tuple(way.settings[name] for name in _SHARED)


def tables(report: Report, gaps: Gaps) -> Iterator[Table]:
    """One for every set of settings; models without a figure stand in it with the mark of their gap."""
    for group in drafted(report):
        settings = group[0].same.settings
        lines = [_line(item) for item in group]
        first = _ways(report)[0]
        there = {item.row.name for item in group}
        marks = [(row.name, mark) for row in report.rows if row.name not in there and (mark := _mark(row, first, gaps))]
        header = (
            "model", "draft", "accepted", "tokens a pass", "speed-up (least to most)", "ms a token", "without a draft",
            "same text",
        )  # fmt: skip
        body = [*lines, *((name, MISSING, mark, *[MISSING] * (len(header) - 3)) for name, mark in marks)]
        yield Table(header, tuple(body), TITLE, _how(settings))


def _line(item: Drafted) -> tuple[str, ...]:
    spread, times = item.speed.spread or {}, item.speed.settings
    same = f"{item.same.value:.0%}"
    if item.same.value < 1:
        same += f" (apart by {item.same.settings['gap']:.0e} nats)"
    return (
        item.row.name,
        item.draft,
        f"{item.accepted.value:.1%}",
        number(item.tokens.value),
        f"{item.speed.value:.2f}x ({spread['least']:.2f} to {spread['most']:.2f})",
        number(times["assisted_ms_per_token"]),
        number(times["plain_ms_per_token"]),
        same,
    )


def _mark(row: Row, way: Way, gaps: Gaps) -> str:
    mark = gaps.mark(row, way)
    return "" if mark == MISSING else mark


def _how(settings: dict) -> str:
    return (
        f"A slice drafts {settings['draft_tokens']} tokens at a time ({settings['schedule']}), the whole model takes "
        f"what it would write itself: greedy `generate`, {settings['prompts']} prompts of {settings['prompt_tokens']} "
        f"tokens of {settings['source']}, {settings['new_tokens']} new ones each, of which none may end the text. "
        "Accepted is the share of drafted tokens; a pass is one of the whole model. The speed-up is the median over "
        "repeats in which both ways took turns in one process. Same text is the share of continuations that are the "
        "same tokens without a draft; others differ first where two tokens are so near."
    )


def findings(report: Report) -> Iterator[str]:
    """A sentence a model: the draft that pays most, or that none does."""
    for group in drafted(report):
        for name in dict.fromkeys(item.row.name for item in group):
            yield from _told(name, [item for item in group if item.row.name == name])


def _told(name: str, found: Sequence[Drafted]) -> Iterator[str]:
    best = max(found, key=lambda item: item.speed.value)
    what = (
        f"{best.accepted.value:.0%} of its tokens are accepted, {best.tokens.value:.2f} tokens a pass of the whole "
        f"model, {best.speed.value:.2f}x as fast as without a draft"
    )
    if best.speed.value > 1:
        yield f"{name} writes fastest with its slice {best.draft} as the draft: {what}."
    else:
        yield f"{name} writes no faster with any of its slices as the draft; nearest is {best.draft}: {what}."
    other = [item for item in found if item.same.value < 1]
    if other:
        gap = max(item.same.settings["gap"] for item in other)
        shares = ", ".join(f"{item.draft} {item.same.value:.0%}" for item in other)
        yield (
            f"{name} with a draft does not always write the same tokens as without ({shares}): where "
            f"they first differ the two are at most {gap:.0e} nats apart."
        )
