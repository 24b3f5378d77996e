"""Step 6: run metrics on models, side by side; the first model is what the others are compared with."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from tqdm import tqdm

from .artifacts import Provenance
from .errors import UserError, unknown
from .metrics import METRICS, MetricResult, Progress
from .models import OpenModel

# Two figures are compared only where these of their settings are the same.
COMPARED_UNDER = (
    "protocol",
    "context",
    "trained",
    "stride",
    "max_tokens",
    "detokenised",
    "joiner",
    "fingerprint",
    "part",
    "batch",
    "prompt_tokens",
    "new_tokens",
    "draft",
    "prompt",
    "sentences",
    "epochs",
    "seeds",
    "batch_rows",
    "learning_rate",
    "process",  # of latencies that came together from several reports: which one measured them
)


@dataclass(frozen=True)
class Gap:
    """A metric that could not be measured on a model, and why."""

    metric: str
    settings: dict[str, Any]
    reason: str


@dataclass(frozen=True)
class Row:
    """What was measured on one model."""

    name: str
    source: str
    results: tuple[MetricResult, ...]
    weights: str = ""  # sha256 over its weight files
    gaps: tuple[Gap, ...] = ()

    def find(self, metric: str, protocol: str | None = None) -> MetricResult | None:
        """The first result of a metric, under a protocol where one is given."""
        return next(
            (
                result
                for result in self.results
                if result.metric == metric and protocol in (None, result.settings["protocol"])
            ),
            None,
        )


@dataclass(frozen=True)
class Report:
    """Rows in the order they were given; the first is the baseline."""

    rows: tuple[Row, ...]
    origin: Provenance
    metrics: tuple[dict[str, Any], ...] = ()  # what was asked for: {"metric": name, setting: value, ...}
    references: tuple[Row, ...] = ()  # what is measured without a model: majority class, first sentences
    title: str = ""  # of a study
    workflow: tuple[str, ...] = ()  # a study's steps, and where the report has what came of each

    def baseline(self, result: MetricResult) -> MetricResult | None:
        """The first row's figure of the same metric that was measured in the same way, else None."""
        return next(
            (other for other in self.rows[0].results if other.metric == result.metric and comparable(other, result)),
            None,
        )

    def ratio(self, row: Row, result: MetricResult) -> float | None:
        """`result` over the baseline's, where both are finite and measured in the same way, else None."""
        base = self.baseline(result)
        ratio = result.value / base.value if base is not None and base.value else math.nan
        return ratio if math.isfinite(ratio) else None

    def to_dict(self) -> dict[str, Any]:
        """The body of report.json: `results` is flat, each with its `model`, `protocol` and `ratio` to the baseline;
        `references` likewise; `gaps` name what could not be measured."""
        return {
            "baseline": self.rows[0].name,
            "models": [{"name": row.name, "source": row.source, "weights": row.weights} for row in self.rows],
            "metrics": list(self.metrics),
            "results": self._flat(self.rows),
            "references": self._flat(self.references),
            "gaps": [{"model": row.name, **dataclasses.asdict(gap)} for row in self.rows for gap in row.gaps],
            "title": self.title,
            "workflow": list(self.workflow),
        }

    def _flat(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        return [
            {
                "model": row.name,
                "protocol": result.settings["protocol"],
                **result.to_dict(),
                "ratio": self.ratio(row, result),
            }
            for row in rows
            for result in row.results
        ]

    @classmethod
    def from_dict(cls, body: Mapping[str, Any]) -> Report:
        """The inverse of `to_dict`, given what `artifacts.read_json` returns."""

        def results(records: Sequence[Mapping[str, Any]], name: str) -> tuple[MetricResult, ...]:
            return tuple(MetricResult.from_dict(record) for record in records if record["model"] == name)

        gaps = body.get("gaps", ())
        rows = tuple(
            Row(
                model["name"],
                model["source"],
                results(body["results"], model["name"]),
                model.get("weights", ""),
                tuple(
                    Gap(gap["metric"], gap["settings"], gap["reason"]) for gap in gaps if gap["model"] == model["name"]
                ),
            )
            for model in body["models"]
        )
        given = body.get("references", ())
        references = tuple(
            Row(name, "", results(given, name)) for name in dict.fromkeys(record["model"] for record in given)
        )
        return cls(
            rows,
            Provenance(**body["provenance"]),
            tuple(body.get("metrics", ())),
            references,
            body.get("title", ""),
            tuple(body.get("workflow", ())),
        )


def comparable(one: MetricResult, other: MetricResult) -> bool:
    """Whether two figures of one metric were measured in the same way."""
    per_unit = {"per token": ("tokens",), "per word": ("words",)}.get(one.unit, ())  # another tokenizer, other tokens
    return all(one.settings.get(name) == other.settings.get(name) for name in (*COMPARED_UNDER, *per_unit))


class Memory:
    """What an earlier, interrupted benchmark has measured. This one knows nothing and keeps nothing."""

    def recall(self, rows: Sequence[str], metric: str, settings: Mapping[str, Any]) -> Any:
        """What was kept for a metric with these settings on these rows together; None where nothing was."""

    def keep(self, rows: Sequence[str], metric: str, settings: Mapping[str, Any], measured: Any) -> None:
        """`measured`: what the metric gave, lists and mappings of MetricResults."""


def benchmark(
    models: Mapping[str, OpenModel],
    metrics: Sequence[str | Mapping[str, Any]],
    data: Mapping[str, Any],
    *,
    origin: Provenance,
    quiet: bool = False,
    missing: Mapping[str, str] = MappingProxyType({}),
    known: Mapping[str, tuple[str, str]] | None = None,
    memory: Memory | None = None,
    folder: Path | None = None,
    only: Mapping[str, Collection[str]] = MappingProxyType({}),
) -> Report:
    """Measure every model with every metric.

    models: name of the row -> model, the first one the baseline; read in order, so a mapping may open them as it goes.
    A metric that measures models together needs all of them open at once; it comes first.
    metrics: names of METRICS, or {"metric": name, setting: value, ...}; the same metric may stand twice with other
    settings. data: metric -> what it measures on; missing: metric -> why it has none. known: row -> (source, hash of
    the weights), so that a model of which all is remembered need not be opened. folder: where metrics that train
    models leave them, a folder a row. only: row -> the metrics it gets, for rows that are not to get all of them.

    What cannot be measured becomes a Gap of its row and ends nothing. Raises UserError for an unknown metric or
    setting, and where nothing at all could be measured.
    """
    if not models:
        raise UserError("no model to benchmark; give at least one MODEL")
    chosen = check_metrics(metrics)
    memory = memory or Memory()

    def attempt(rows: Sequence[str], metric: str, settings: dict[str, Any], subject: Callable[[], Any]) -> Any:
        """What a metric gives for some rows, from memory where that has it; a Gap where it cannot be measured."""
        if METRICS[metric].data is not None and metric not in data:
            return Gap(metric, settings, missing.get(metric) or f"no data; give --data {metric}=D")
        remembered = memory.recall(rows, metric, settings)
        if remembered is not None:
            return remembered
        extra: dict[str, Any] = {}
        if METRICS[metric].saves:
            extra["folder"] = None if folder is None else folder / _folder_name(rows[0], metric, settings)
        try:
            with _progress(": ".join([*rows[: len(rows) == 1], metric]), quiet) as progress:
                measured = METRICS[metric].run(subject(), data.get(metric), progress=progress, **settings, **extra)
        except (UserError, torch.OutOfMemoryError) as error:
            return Gap(metric, settings, " ".join(str(error).split()))
        if not measured:
            return Gap(metric, settings, "its settings leave nothing to measure")
        memory.keep(rows, metric, settings, measured)
        return measured

    names = list(models)
    together: dict[int, Any] = {}  # place among `chosen` -> the results of each model, or a Gap
    held: list[OpenModel] = []

    def all_of_them(rows: Sequence[str]) -> list[OpenModel]:
        held[:] = held or [models[name] for name in rows]
        return held

    for place, (metric, settings) in enumerate(chosen):
        if METRICS[metric].together:
            those = [name for name in names if metric in only.get(name, METRICS)]
            found = attempt(those, metric, settings, partial(all_of_them, those))
            together[place] = found if isinstance(found, Gap) else dict(zip(those, found, strict=True))
    held.clear()  # the other metrics need one model at a time
    rows: list[Row] = []
    references: dict[str, list[MetricResult]] = {}
    compared: set[int] = set()  # places whose references are there
    for name in names:
        subject = cache(partial(models.__getitem__, name))
        results: list[MetricResult] = []
        gaps: list[Gap] = []
        for place, (metric, settings) in enumerate(chosen):
            if metric not in only.get(name, METRICS):
                continue
            found = together.get(place) or attempt([name], metric, settings, subject)
            if isinstance(found, Gap):
                gaps.append(found)
            else:
                results += found[name] if place in together else found
            if METRICS[metric].references is not None and place not in compared and not isinstance(found, Gap):
                compared.add(place)
                others = _references(name, metric, settings, data, subject, memory)
                if isinstance(others, Gap):
                    gaps.append(others)
                    continue
                for reference, figures in others.items():
                    references.setdefault(reference, []).extend(figures)
        source, weights = known[name] if known is not None else (subject().name, subject().hash)
        rows.append(Row(name, source, tuple(results), weights, tuple(gaps)))
    if not any(row.results for row in rows):
        raise UserError("; ".join(dict.fromkeys(f"{gap.metric}: {gap.reason}" for row in rows for gap in row.gaps)))
    return Report(
        tuple(rows),
        origin,
        tuple({"metric": metric, **settings} for metric, settings in chosen),
        tuple(Row(name, "", tuple(figures)) for name, figures in references.items()),
    )


def _references(
    first: str,
    metric: str,
    settings: dict[str, Any],
    data: Mapping[str, Any],
    subject: Callable[[], Any],
    memory: Memory,
) -> dict[str, list[MetricResult]] | Gap:
    rows = ["(no model)", first]  # whose tokenizer cuts the texts
    found = memory.recall(rows, metric, settings)
    if found is None:
        measure = METRICS[metric].references
        assert measure is not None
        try:
            found = measure(data[metric], subject(), **settings)
        except UserError as error:
            return Gap(metric, settings, f"baselines without a model: {error}")
        memory.keep(rows, metric, settings, found)
    return found


def _folder_name(row: str, metric: str, settings: Mapping[str, Any]) -> str:
    """A folder of its own for what a metric leaves of a row, which may be named by a path. One component, always."""
    readable = re.sub(r"[^\w-]+", "-", row).strip("-")[-60:]
    which = hashlib.sha256(json.dumps([row, metric, settings], sort_keys=True).encode()).hexdigest()[:8]
    return f"{readable or metric}-{which}"


@contextmanager
def _progress(title: str, quiet: bool) -> Iterator[Progress]:
    """A bar on stderr that a metric moves by calling it with (done, total)."""
    with tqdm(desc=title, disable=quiet, leave=False, dynamic_ncols=True) as bar:

        def move(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield move


# ---------------------------------------------------------------- what to measure


def check_metrics(metrics: Sequence[str | Mapping[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """(metric, settings) of each entry. Raises UserError for what METRICS does not know and an entry given twice."""
    if isinstance(metrics, str) or not isinstance(metrics, Sequence) or not metrics:
        raise UserError(f"metrics: {metrics!r} is not a list of metrics; allowed: {', '.join(sorted(METRICS))}")
    chosen: list[tuple[str, dict[str, Any]]] = []
    for entry in metrics:
        if not isinstance(entry, str) and not (isinstance(entry, Mapping) and "metric" in entry):
            raise UserError(f"metrics: {entry!r} names no metric; expected a name or {{metric: NAME, SETTING: VALUE}}")
        record = {"metric": entry} if isinstance(entry, str) else dict(entry)
        metric = str(record.pop("metric"))
        if metric not in METRICS:
            raise unknown("metric", metric, METRICS)
        for setting in record:
            if setting not in METRICS[metric].settings:
                raise unknown(f"setting of metric {metric}", str(setting), METRICS[metric].settings)
        if (metric, record) in chosen:
            raise UserError(f"metrics: {metric!r} stands twice with the same settings")
        chosen.append((metric, record))
    return chosen
