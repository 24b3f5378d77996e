"""Tasks: their tables with intervals and baselines that are no models, and the texts that models wrote."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..benchmark import Report, Row, comparable
from ..metrics import MetricResult
from . import layout
from .figures import GIVES, MISSING, TASKLESS, Gaps, Way, decimals, family, interval, number, title, ways
from .layout import Table
from .rows import named

NO_MODEL = " (no model)"


@dataclass(frozen=True)
class Figure:
    """What a row has of a task: a result, or the mark of a gap."""

    name: str
    result: MetricResult | None
    mark: str
    model: bool  # else a baseline that is no model


@dataclass(frozen=True)
class Task:
    """The figures of one task taken in one way, metric by metric: the models in order, then what is no model."""

    family: str
    way: Way
    columns: dict[str, tuple[Figure, ...]]  # metric -> a figure a row
    others: tuple[str, ...] = ()  # models that were not asked for it

    @property
    def title(self) -> str:
        protocol = self.way.settings.get("protocol")
        return f"{title(self.family)}, {protocol}" if protocol else title(self.family)

    @property
    def sample(self) -> MetricResult | None:
        return next((item.result for column in self.columns.values() for item in column if item.result), None)


def tasks(report: Report, gaps: Gaps) -> list[Task]:
    """The tasks of a report, each way they were taken in by itself."""
    figures = [item for row in (*report.rows, *report.references) for item in row.results]
    asked = [family(item.metric) for item in figures] + [gap.metric for row in report.rows for gap in row.gaps]
    return [
        task
        for name in dict.fromkeys(asked)
        if name not in TASKLESS
        for task in _of_family(report, gaps, name)
    ]  # fmt: skip


def _of_family(report: Report, gaps: Gaps, name: str) -> Iterator[Task]:
    found = ways(report, name)
    if not found:  # nothing but baselines
        return
    for index, way in enumerate(found):
        there = [metric for row in report.rows for metric in _metrics(row, name) if way.find(row, metric)]
        metrics = list(dict.fromkeys(there)) or list(GIVES.get(name, (name,)))
        columns: dict[str, tuple[Figure, ...]] = {}
        asked = [row for row in report.rows if any(way.find(row, metric) for metric in metrics) or gaps.has(row, way)]
        for metric in metrics:
            models = [_figure(row, way, metric, gaps) for row in asked]
            others = [
                Figure(row.name, item, MISSING, False)
                for row in report.references
                if (item := _reference(row, metric, found, index)) is not None
            ]
            columns[metric] = (*models, *others)
        yield Task(name, way, columns, tuple(row.name for row in report.rows if row not in asked))


def _metrics(row: Row, name: str) -> list[str]:
    return [item.metric for item in row.results if family(item.metric) == name]


def _figure(row: Row, way: Way, metric: str, gaps: Gaps) -> Figure:
    result = way.find(row, metric)
    return Figure(row.name, result, MISSING if result else gaps.mark(row, way), True)


def _reference(row: Row, metric: str, found: Sequence[Way], index: int) -> MetricResult | None:
    """A baseline's figure belongs beside the models' on the same text, whatever it calls its own protocol; one that
    belongs to none of the ways stands with the first."""
    for item in row.results:
        if item.metric == metric:
            on = [place for place, way in enumerate(found) if _same_text(item, way)]
            if index in on or (not on and index == 0):
                return item
    return None


def _same_text(item: MetricResult, way: Way) -> bool:
    one, other = item.settings.get("fingerprint"), way.settings.get("fingerprint")
    return None in (one, other) or one == other


# ---------------------------------------------------------------- tables


def table(report: Report, task: Task, *, everything: bool) -> Table:
    """Value, 95 % interval, number of examples and difference to the original; without `everything` a table of several
    metrics leaves the intervals out."""
    rows = next(iter(task.columns.values()))
    several = len(task.columns) > 1
    columns: dict[str, Sequence[str]] = {"model": [item.name + ("" if item.model else NO_MODEL) for item in rows]}
    for metric, figures in task.columns.items():
        shown = decimals([item.result.value for item in figures if item.result])
        columns[title(metric)] = [number(item.result.value, shown) if item.result else item.mark for item in figures]
        tail = f" {title(metric)}" if several else ""
        intervals = [_interval(item.result, shown) for item in figures]
        if (everything or not several) and set(intervals) != {MISSING}:
            columns[f"95 % interval{tail}"] = intervals
        columns[f"difference{tail}"] = [_difference(report, item, shown) for item in figures]
    columns["n"] = [f"{item.result.count:,}" if item.result else MISSING for item in rows]
    return layout.make(columns, task.title, _how(task), apart=sum(not item.model for item in rows))


def _interval(result: MetricResult | None, shown: int) -> str:
    found = interval(result) if result else None
    return MISSING if found is None else f"{number(found[0], shown)} to {number(found[1], shown)}"


def _difference(report: Report, figure: Figure, shown: int) -> str:
    """To the original; a baseline that is no model is set against it where both saw the same text."""
    if figure.result is None:
        return MISSING
    base = next(
        (
            item
            for item in report.rows[0].results
            if item.metric == figure.result.metric
            and (comparable(item, figure.result) if figure.model else _text_of(item) == _text_of(figure.result))
        ),
        None,
    )
    return MISSING if base is None else f"{figure.result.value - base.value:+,.{shown}f}"


def _text_of(result: MetricResult) -> Any:
    return result.settings.get("fingerprint")


def _how(task: Task) -> str:
    sample = task.sample
    without = f" Not asked of {named(task.others)}." if task.others else ""
    if sample is None:
        return f"Not measured.{without}"
    settings, spread = sample.settings, sample.spread or {}
    better = "Higher is better" if sample.higher_is_better else "Lower is better"
    if len({item.result.higher_is_better for column in task.columns.values() for item in column if item.result}) > 1:
        better = "Differences are to the original"
    fingerprint = f", fingerprint {settings['fingerprint'][:12]}" if settings.get("fingerprint") else ""
    on = f" On {settings['source']}{fingerprint}." if settings.get("source") else ""
    method = f" Intervals: {spread['method']}." if spread.get("method") else ""
    return f"{better}.{on}{_conditions(task)}{method}{without}"


# setting of a result -> how it reads; those that differ from model to model are given as a range
_CONDITIONS = {
    "context": "context {} tokens",
    "training": "{} training texts",
    "selection": "{} selection texts",
    "epochs": "{} epochs",
    "seeds": "{} seeds",
    "new_tokens": "{} new tokens",
    "sentences": "first {} sentences scored",
}
_SHARES = {"cut": "documents cut {}", "ended": "ended by themselves {}", "empty": "nothing written {}"}


def _conditions(task: Task) -> str:
    """Under which caps the figures of a task were taken, and what befell the texts."""
    settings = [
        item.result.settings for column in task.columns.values() for item in column if item.result and item.model
    ]
    said = []
    for name, words in (_CONDITIONS | _SHARES).items():
        values = [own[name] for own in settings if isinstance(own.get(name), int | float)]
        if values:
            low, high = (f"{value:.0%}" if name in _SHARES else f"{value:,}" for value in (min(values), max(values)))
            said.append(words.format(low if low == high else f"{low} to {high}"))
    joined = ", ".join(said)
    return f" {joined[0].upper()}{joined[1:]}." if joined else ""


# ---------------------------------------------------------------- samples


@dataclass(frozen=True)
class Sample:
    """What one model wrote after a prompt."""

    model: str
    text: str
    loops: bool


@dataclass(frozen=True)
class Prompt:
    """A prompt and what the models made of it."""

    prompt: str
    decoding: str
    seed: Any
    samples: tuple[Sample, ...]

    @property
    def how(self) -> str:
        return ", ".join(filter(None, [self.decoding, "" if self.seed is None else f"seed {self.seed}"]))


def prompts(report: Report) -> list[Prompt]:
    """What the models wrote, side by side, in the order in which the prompts were given."""
    found: dict[tuple[str, str, str], list[Sample]] = {}
    seeds: dict[tuple[str, str, str], Any] = {}
    for row in report.rows:
        for record in (
            *_records(row, "generation", "prompt", "text"),
            *_records(row, "extrapolation", "prompt", "text"),
        ):
            key = (record["prompt"], str(record.get("decoding", "")), str(record.get("seed", "")))
            seeds[key] = record.get("seed")
            sample = Sample(row.name, record["text"], bool(record.get("loops")))
            if sample not in found.setdefault(key, []):  # several figures may stand on the same texts
                found[key].append(sample)
        for record in _records(row, "rouge", "document", "reference", "generated"):
            key = (f"{record['document']} …", "summary", "")
            found.setdefault(key, [Sample("(written by people)", record["reference"], False)])
            found[key].append(Sample(row.name, record["generated"], False))
    return [Prompt(key[0], key[1], seeds.get(key), tuple(samples)) for key, samples in found.items()]


def _records(row: Row, asked: str, *keys: str) -> list[dict[str, str]]:
    """What stands behind a row's figures, where it is texts under these keys."""
    return [
        record
        for result in row.results
        if family(result.metric) == asked and isinstance(result.details, list)
        for record in result.details
        if isinstance(record, dict) and all(isinstance(record.get(key), str) for key in keys)
    ]
