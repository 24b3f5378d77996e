"""Several reports as one, in which nothing is compared that was not measured alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..artifacts import Provenance
from ..benchmark import Gap, Report, Row, comparable
from ..metrics import MetricResult
from .figures import family
from .rows import part

_TIMED = "latency"


def merge(reports: Mapping[str, Report], origin: Provenance) -> Report:
    """The rows of some runs in one report, each with its run's name before its own.

    The original is one row where all runs have the same weights for it; so is a control that all of them share, and a
    model without a step that several name alike. Latencies keep the process that measured them, and are compared with
    the original's in that process. A metric that a run was not measured with is a gap of its rows.
    """
    if len(reports) == 1:
        (only,) = reports.values()
        return dataclasses.replace(only, origin=origin)
    shared = {name: rows for name, rows in _by_name(reports).items() if _one(name, rows, reports)}
    asked = _asked(reports)
    merged: dict[str, Row] = {}
    for run, report in reports.items():
        for row in report.rows:
            own = _of_run(run, report, row, () if row.name in shared else asked)
            if row.name in shared:
                merged[row.name] = _both(merged[row.name], own) if row.name in merged else own
            else:
                merged[f"{run}: {row.name}"] = dataclasses.replace(own, name=f"{run}: {row.name}")
    run, base = next((run, report.rows[0].name) for run, report in reports.items())
    first = base if base in shared else f"{run}: {base}"
    order = sorted(merged.values(), key=lambda row: (row.name != first, row.name not in shared))
    return Report(tuple(order), origin, asked, tuple(_references(reports)))


def _by_name(reports: Mapping[str, Report]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for report in reports.values():
        for row in report.rows:
            found.setdefault(row.name, []).append(row)
    return found


def _one(name: str, rows: Sequence[Row], reports: Mapping[str, Report]) -> bool:
    """Whether rows of one name are one model that belongs to no run by itself."""
    if len({row.weights for row in rows}) > 1 or not rows[0].weights or len(rows) < 2:
        return False
    everywhere = len(rows) == len(reports)
    if any(report.rows[0].name == name for report in reports.values()):
        return everywhere and all(report.rows[0].name == name for report in reports.values())
    return everywhere if part(name) == ("", "control") else not part(name)[1]


def _of_run(run: str, report: Report, row: Row, asked: Sequence[Mapping[str, Any]]) -> Row:
    """A row whose latencies say which process they are of, with a gap for each metric that its run did not ask for."""
    results = tuple(
        dataclasses.replace(item, settings={**item.settings, "process": run}) if family(item.metric) == _TIMED else item
        for item in row.results
    )
    own = {str(entry["metric"]) for entry in report.metrics} | {family(item.metric) for item in row.results}
    missing = dict.fromkeys(str(entry["metric"]) for entry in asked if entry["metric"] not in own)
    gaps = tuple(Gap(metric, {}, f"not asked for in the benchmark of {run}") for metric in missing)
    return dataclasses.replace(row, results=results, gaps=row.gaps + gaps)


def _both(one: Row, other: Row) -> Row:
    """What two reports measured on one model; of two figures that were taken alike the first."""
    results = one.results + tuple(item for item in other.results if not any(_alike(item, old) for old in one.results))
    measured = {family(item.metric) for item in results}
    together = one.gaps + tuple(gap for gap in other.gaps if gap not in one.gaps)
    gaps = tuple(gap for gap in together if gap.metric not in measured)
    return dataclasses.replace(one, results=results, gaps=gaps)


def _alike(one: MetricResult, other: MetricResult) -> bool:
    return one.metric == other.metric and comparable(one, other)


def _asked(reports: Mapping[str, Report]) -> tuple[dict[str, Any], ...]:
    found: list[dict[str, Any]] = []
    for report in reports.values():
        found += [entry for entry in report.metrics if entry not in found]
    return tuple(found)


def _references(reports: Mapping[str, Report]) -> Iterator[Row]:
    found: dict[str, Row] = {}
    for report in reports.values():
        for row in report.references:
            found[row.name] = _both(found[row.name], row) if row.name in found else row
    yield from found.values()


def data(reports: Mapping[str, Report]) -> dict[str, Any]:
    """What all of them measured on: metric -> facts; the run stands before a metric that another run measured on other
    data."""
    found: dict[str, Any] = {}
    for run, report in reports.items():
        for metric, facts in report.origin.data.items():
            same = found.get(metric, facts).get("fingerprint") == facts.get("fingerprint")
            found[metric if same else f"{run}: {metric}"] = facts
    return found
