"""What the numbers say, in sentences that are computed from them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ..benchmark import Report, Row
from . import assisted, extrapolation, nested
from .figures import Gaps, Way, interval, number, overlap, title, way_of, ways
from .rows import counterparts, is_slice, listed, member, part, recovered_from, results
from .tables import REGIMES, first, sparse, speed_up
from .tasks import Figure, Task, tasks

_EACH = 3  # so many models have a sentence each; of more, the best are named


def findings(report: Report, gaps: Gaps) -> list[str]:
    """One-sentence findings. Each compares only what was measured in the same way."""
    return [
        _measured(report),
        *_perplexity(report),
        *nested.findings(report),
        *extrapolation.findings(report, gaps),
        *_speed(report),
        *assisted.findings(report),
        *(sentence for task in tasks(report, gaps) for sentence in _task(report, task)),
        *_missing(gaps),
    ]


@dataclass(frozen=True)
class Tile:
    """The few figures of a model that one looks at first: (value, what it is)."""

    name: str
    figures: tuple[tuple[str, str], ...]


def tiles(report: Report) -> list[Tile]:
    """One for each model that the report is about, where they are few."""
    shown = results(report)
    return [Tile(row.name, tuple(_tile(report, row))) for row in shown] if len(shown) <= _EACH else []


def _tile(report: Report, row: Row) -> Iterator[tuple[str, str]]:
    base = report.rows[0].name
    for metric, what in (("parameters", "of the parameters"), ("bytes", "of the bytes")):
        ratio = _of(report, row, metric)
        if ratio is not None:
            yield f"{ratio:.1%}", what
    way = way_of(report, row, "perplexity")
    ratio = _of(report, row, "perplexity", way) if way else None
    if ratio is not None:
        yield f"{ratio - 1:+.1%}", f"perplexity against {base}"
    way = first(ways(report, "latency"))
    for metric, regime in REGIMES.items():
        item = way.find(row, metric) if way else None
        if item is not None and report.ratio(row, item) is not None:
            yield speed_up(report, row, item), f"{regime} speed"


def _measured(report: Report) -> str:
    metrics = list(dict.fromkeys(str(entry["metric"]) for entry in report.metrics))
    models, references = len(report.rows), len(report.references)
    return (
        f"{models} {'model was' if models == 1 else 'models were'} measured"
        + (f" on {listed(metrics)}" if metrics else "")
        + (
            f", beside {references} {'baseline' if references == 1 else 'baselines'} without a model"
            if references
            else ""
        )
        + (f"; {report.rows[0].name} is what the others are compared with." if models > 1 else ".")
    )


# ---------------------------------------------------------------- perplexity and size


def _perplexity(report: Report) -> Iterator[str]:
    way = first(ways(report, "perplexity"))
    if way is None or not way.key:
        return
    base = report.rows[0].name
    if len(results(report)) <= _EACH:
        for row in results(report):
            yield from _one(report, row)
        yield from _baselines(report)
        return
    scored = [(row, ratio) for row in results(report) if (ratio := _of(report, row, "perplexity", way)) is not None]
    if scored:
        best = min(scored, key=lambda item: item[1])
        yield f"Of {len(scored)} models, {_said(report, *best, 'loses least')}."
        counted = [(count, item) for item in scored if (count := _of(report, item[0], "parameters")) is not None]
        if counted:
            small = min(counted, key=lambda item: item[0])[1]
            if small != best:
                yield f"Of {len(scored)} models, {_said(report, *small, 'is the smallest')}."
        beaten = sum(ratio <= 1 for _, ratio in scored)
        if beaten:
            yield f"{beaten} of them {'has' if beaten == 1 else 'have'} no higher perplexity than {base}."
    yield from _baselines(report)


def _baselines(report: Report) -> Iterator[str]:
    """Each model beside simpler ways to its size that got as much training."""
    for row in results(report):
        way = way_of(report, row, "perplexity")
        own = way.find(row, "perplexity") if way else None
        said = [
            f"{other.name} {number(score.value)} ({score.value / own.value - 1:+.1%} against it)"
            for other in counterparts(report, row)
            if way and own and (score := way.find(other, "perplexity")) and math.isfinite(score.value / own.value)
        ]
        if said and own:
            yield f"{row.name} ({number(own.value)}) beside simpler ways to its size: {listed(said)}."


def _one(report: Report, row: Row) -> Iterator[str]:
    """A model beside the original, its own state before recovery, and the control."""
    way = way_of(report, row, "perplexity")
    own, other = (way.find(item, "perplexity") if way else None for item in (row, report.rows[0]))
    ratio = report.ratio(row, own) if own else None
    if way and own and other and ratio is not None:
        yield (
            f"{row.name}{_size(report, row)}: perplexity {number(own.value)} against {number(other.value)} of "
            f"{report.rows[0].name} ({ratio - 1:+.1%}{_before(report, row, way)}){_control(report, row, way)}."
        )


def _said(report: Report, row: Row, ratio: float, what: str) -> str:
    return f"{row.name}{_size(report, row)} {what}: perplexity {ratio - 1:+.1%} against {report.rows[0].name}"


def _of(report: Report, row: Row, metric: str, way: Way | None = None) -> float | None:
    result = row.find(metric) if way is None else way.find(row, metric)
    return None if result is None else report.ratio(row, result)


def _size(report: Report, row: Row) -> str:
    count = row.find("parameters")
    ratio = None if count is None else report.ratio(row, count)
    if count is None or ratio is None:
        return ""
    if sparse(row):
        left = f"{count.settings['non_zero'] / count.value:.1%} of them not zero"
        return f" ({ratio:.1%} of the parameters, {left}: its file is no smaller)"
    return f" ({ratio:.1%} of the parameters)"


def _before(report: Report, row: Row, way: Way) -> str:
    run, step = part(row.name)
    start = recovered_from(step)
    before = member(report, run, start) if start else None
    ratio = None if before is None else _of(report, before, "perplexity", way)
    return "" if ratio is None else f"; before recovery {ratio - 1:+.1%}"


def _control(report: Report, row: Row, way: Way) -> str:
    run, step = part(row.name)
    control = member(report, run, "control") if step == "recovered" or is_slice(step) else None
    own, other = way.find(row, "perplexity"), way.find(control, "perplexity") if control else None
    if own is None or other is None or not other.value or not math.isfinite(own.value / other.value):
        return ""
    return (
        f"; against the control, the original tuned on the same budget ({number(other.value)}), it is at "
        f"{own.value / other.value - 1:+.1%}"
    )


# ---------------------------------------------------------------- speed


def _speed(report: Report) -> Iterator[str]:
    way = first(ways(report, "latency"))
    base = report.rows[0].name
    for metric, regime in REGIMES.items():
        timed = [
            (row, ratio)
            for row in results(report)
            if way is not None and (ratio := _of(report, row, metric, way)) is not None
        ]
        if not timed or way is None:
            continue
        noise = _noise(report, metric, way)
        unsure = "" if noise is None else f" (models of its own structure differ from it by {noise:.1%}: that is noise)"
        if len(timed) <= _EACH:
            said = []
            for row, ratio in timed:
                item = way.find(row, metric)
                assert item is not None
                same = noise is not None and abs(ratio - 1) <= noise
                said.append(
                    f"{row.name} {speed_up(report, row, item)}{' (no difference beyond noise)' if same else ''}"
                )
            yield f"{regime.capitalize()} speed against {base}{unsure}: {listed(said)}."
        else:
            fastest, ratio = min(timed, key=lambda item: item[1])
            yield f"{regime.capitalize()} is fastest with {fastest.name}, {1 / ratio:.2f}x as fast as {base}{unsure}."


def _noise(report: Report, metric: str, way: Way) -> float | None:
    """How far models of the original's structure are from it in time; None where there is none."""
    off = []
    for row in report.rows[1:]:
        step = part(row.name)[1]
        ratio = _of(report, row, metric, way) if step == "control" else None
        if ratio is not None:
            off.append(abs(ratio - 1))
    return max(off, default=None)


# ---------------------------------------------------------------- tasks


def _task(report: Report, task: Task) -> Iterator[str]:
    if task.family == "generation":
        yield from _loops(task)
        return
    metric = list(task.columns)[-1]  # ROUGE-L of the three
    figures = {item.name: item for item in task.columns[metric]}
    base = figures.get(report.rows[0].name)
    measured = [figures[row.name] for row in results(report) if row.name in figures and figures[row.name].result]
    if not measured or base is None or base.result is None:
        return
    own = interval(base.result)
    apart = [item for item in measured if own and (other := _interval(item)) and not overlap(own, other)]
    name, shown = title(metric), f"{base.result.value:.3f}"
    if len(measured) <= _EACH:
        said = [
            f"{item.name} {item.result.value:.3f}"
            + (", and their 95 % intervals do not overlap" if item in apart else "")
            for item in measured
            if item.result
        ]
        told = "" if apart or own is None else "; their 95 % intervals overlap"
        yield f"{name}: {report.rows[0].name} {shown}, {listed(said)}{told}."
    elif own is not None:
        yield (
            f"{name}: for {len(apart)} of {len(measured)} models the 95 % interval does not overlap with that of "
            f"{report.rows[0].name} ({shown})."
        )
    yield from _beaten(task, metric, name)


def _beaten(task: Task, metric: str, name: str) -> Iterator[str]:
    """Baselines without a model that a model does not beat: what the task then measures is doubtful."""
    models = [item for item in task.columns[metric] if item.model and item.result]
    for reference in (item for item in task.columns[metric] if not item.model and item.result):
        assert reference.result is not None
        sign = 1 if reference.result.higher_is_better else -1
        behind = [
            item.name for item in models if item.result and sign * (item.result.value - reference.result.value) <= 0
        ]
        if behind:
            who = listed(behind) if len(behind) <= _EACH else f"{len(behind)} of {len(models)} models"
            yield (
                f"{name}: {who} {'does' if len(behind) == 1 else 'do'} no better than {reference.name} "
                f"({reference.result.value:.3f}), which is no model."
            )


def _interval(figure: Figure) -> tuple[float, float] | None:
    return interval(figure.result) if figure.result else None


def _loops(task: Task) -> Iterator[str]:
    measured = {item.name: item.result.value for item in task.columns.get("looping", ()) if item.result}
    looping = [name for name, share in measured.items() if share > 0]
    if looping:
        worst = max(looping, key=measured.__getitem__)
        yield (
            f"{len(looping)} of {len(measured)} models end in a loop in some of their texts, {worst} most often "
            f"({measured[worst]:.0%})."
        )


def _missing(gaps: Gaps) -> Iterator[str]:
    if gaps.reasons:
        what = list(dict.fromkeys(reason.what for reason in gaps.reasons))
        yield f"Not everything could be measured, see Not measured: {listed(what)}."
