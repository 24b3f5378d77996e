"""Slices of a nested model beside other models of about their size that had a recovery of their own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ..benchmark import Report, Row, comparable
from ..metrics import MetricResult
from .figures import MISSING, number, way_of
from .layout import Table
from .rows import is_slice, listed, member, part, recovered_from, results

TITLE = "Slices beside models of their size"
_NEAR = 1.2  # times as many parameters as a slice, or as few


@dataclass(frozen=True)
class Sized:
    """A row with what it is compared by."""

    row: Row
    parameters: float
    perplexity: MetricResult


def beside(report: Report) -> list[tuple[Sized, list[Sized]]]:
    """Each trained slice, and the other models that are nearer to its size than to that of any other slice."""
    known = [sized for row in results(report) if (sized := _sized(report, row)) is not None]
    slices = [one for one in known if is_slice(part(one.row.name)[1])]
    nests = {part(one.row.name)[0] for one in slices}
    others: dict[str, list[Sized]] = {one.row.name: [] for one in slices}
    for other in known:
        run, step = part(other.row.name)
        if is_slice(step) or (run in nests and step):
            continue
        for nest in sorted(nests):
            own = [one for one in slices if part(one.row.name)[0] == nest]
            nearest = min(own, key=lambda one: _far(one, other))
            if _far(nearest, other) <= math.log(_NEAR) and comparable(nearest.perplexity, other.perplexity):
                others[nearest.row.name].append(other)
    return [(one, others[one.row.name]) for one in slices]


def _far(one: Sized, other: Sized) -> float:
    return abs(math.log(other.parameters / one.parameters))


def _sized(report: Report, row: Row) -> Sized | None:
    way, count = way_of(report, row, "perplexity"), row.find("parameters")
    perplexity = way.find(row, "perplexity") if way else None
    if perplexity is None or count is None or not math.isfinite(perplexity.value):
        return None
    return Sized(row, count.value, perplexity)


def tables(report: Report) -> Iterator[Table]:
    """A line for each pair of a slice and a model of about its size; none where there is no such pair."""
    found = beside(report)
    if not any(others for _, others in found):
        return
    body: list[tuple[str, ...]] = []
    for one, others in found:
        own = (one.row.name, f"{one.parameters:,.0f}", _before(report, one), number(one.perplexity.value))
        for other in others:
            ratio = one.perplexity.value / other.perplexity.value
            parameters = f"{other.parameters / one.parameters:.3f}"
            body.append((*own, other.row.name, parameters, number(other.perplexity.value), number(ratio, 3)))
        if not others:
            body.append((*own, *[MISSING] * 4))
    header = (
        "slice", "parameters", "before", "perplexity", "beside", "its parameters / slice", "its perplexity",
        "slice / it",
    )  # fmt: skip
    note = (
        "Perplexity of what is cut out of one nested model, before and after its recovery, beside models that were "
        "recovered by themselves, each with the slice that is nearest in parameters."
    )
    yield Table(header, tuple(body), TITLE, note)


def _before(report: Report, one: Sized) -> str:
    run, step = part(one.row.name)
    start = recovered_from(step)
    before = member(report, run, start) if start else None
    item = _sized(report, before) if before else None
    return MISSING if item is None else number(item.perplexity.value)


def findings(report: Report) -> Iterator[str]:
    """How far each slice is from the models beside it, and whether larger slices are better."""
    found = beside(report)
    for one, others in found:
        own = one.perplexity.value
        said = [
            f"{other.row.name} {number(other.perplexity.value)} ({own / other.perplexity.value - 1:+.1%})"
            for other in others
        ]
        if said:
            yield f"{one.row.name}, perplexity {number(own)}, against models of its size: {listed(said)}."
    for nest in dict.fromkeys(part(one.row.name)[0] for one, _ in found):
        whole = member(report, nest, "recovered")
        sizes = [one for one, _ in found if part(one.row.name)[0] == nest]
        sizes += [item for item in [_sized(report, whole)] if item] if whole else []
        scores = [one.perplexity.value for one in sorted(sizes, key=lambda one: -one.parameters)]
        rising = scores == sorted(scores)
        if len(scores) > 1:
            yield (
                f"{nest or 'The nested model'} from its largest to its smallest size, perplexity "
                f"{', '.join(map(number, scores))}: {'a larger one is never worse' if rising else 'not in order'}."
            )
