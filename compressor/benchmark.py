"""Step 6: run metrics on models, side by side; the first model is what the others are compared with."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from .artifacts import Provenance
from .errors import UserError, unknown
from .metrics import METRICS, MetricResult, Progress
from .models import OpenModel

# Installed as compressor.suites; in a source tree they lie where people look for them.
_SUITE_FOLDERS = (Path(__file__).parent / "suites", Path(__file__).parent.parent / "benchmarks" / "suites")
# Two figures are compared only where these of their settings are the same.
_COMPARED_UNDER = (
    "protocol",
    "context",
    "stride",
    "max_tokens",
    "detokenised",
    "joiner",
    "fingerprint",
    "part",
    "batch",
    "prompt_tokens",
    "new_tokens",
)


@dataclass(frozen=True)
class Row:
    """What was measured on one model."""

    name: str
    source: str
    results: tuple[MetricResult, ...]
    weights: str = ""  # sha256 over its weight files

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

    def ratio(self, row: Row, result: MetricResult) -> float | None:
        """`result` over the baseline's, where both are finite and measured in the same way, else None."""
        same = [other for other in self.rows[0].results if other.metric == result.metric and _comparable(other, result)]
        ratio = result.value / same[0].value if same and same[0].value else math.nan
        return ratio if math.isfinite(ratio) else None

    def to_dict(self) -> dict[str, Any]:
        """The body of report.json: `results` is flat, each with its `model`, `protocol` and `ratio` to the baseline."""
        return {
            "baseline": self.rows[0].name,
            "models": [{"name": row.name, "source": row.source, "weights": row.weights} for row in self.rows],
            "metrics": list(self.metrics),
            "results": [
                {
                    "model": row.name,
                    "protocol": result.settings["protocol"],
                    **result.to_dict(),
                    "ratio": self.ratio(row, result),
                }
                for row in self.rows
                for result in row.results
            ],
        }

    @classmethod
    def from_dict(cls, body: Mapping[str, Any]) -> Report:
        """The inverse of `to_dict`, given what `artifacts.read_json` returns."""
        rows = tuple(
            Row(
                model["name"],
                model["source"],
                tuple(MetricResult.from_dict(record) for record in body["results"] if record["model"] == model["name"]),
                model.get("weights", ""),
            )
            for model in body["models"]
        )
        return cls(rows, Provenance(**body["provenance"]), tuple(body.get("metrics", ())))


def _comparable(one: MetricResult, other: MetricResult) -> bool:
    per_unit = {"per token": ("tokens",), "per word": ("words",)}.get(one.unit, ())  # another tokenizer, other tokens
    return all(one.settings.get(name) == other.settings.get(name) for name in (*_COMPARED_UNDER, *per_unit))


def benchmark(
    models: Mapping[str, OpenModel],
    metrics: Sequence[str | Mapping[str, Any]],
    data: Mapping[str, Any],
    *,
    origin: Provenance,
    quiet: bool = False,
) -> Report:
    """Measure every model with every metric.

    models: name of the row -> model, the first one the baseline; read in order, so a mapping may open them as it goes.
    A metric that measures models together needs all of them open at once; it comes first, so that the mistakes in its
    settings do.
    metrics: names of METRICS, or {"metric": name, setting: value, ...}; the same metric may stand twice with other
    settings. data: metric -> what it measures on. Raises UserError for an unknown metric or setting and missing data.
    """
    if not models:
        raise UserError("no model to benchmark; give at least one MODEL")
    chosen = check_metrics(metrics)
    for metric, _ in chosen:
        if METRICS[metric].needs_data and metric not in data:
            raise UserError(f"metric {metric!r} needs data; give --data D or --data {metric}=D")
    together: dict[int, list[list[MetricResult]]] = {}  # place among `chosen` -> the results of each model
    if any(METRICS[metric].together for metric, _ in chosen):
        opened = list(models.values())
        for place, (metric, settings) in enumerate(chosen):
            if METRICS[metric].together:
                with _progress(metric, quiet) as progress:
                    together[place] = METRICS[metric].run(opened, data.get(metric), progress=progress, **settings)
        del opened  # the other metrics need one model at a time
    rows = []
    for index, (name, subject) in enumerate(models.items()):
        results: list[MetricResult] = []
        for place, (metric, settings) in enumerate(chosen):
            if place in together:
                results += together[place][index]
                continue
            with _progress(f"{name}: {metric}", quiet) as progress:
                results += METRICS[metric].run(subject, data.get(metric), progress=progress, **settings)
        rows.append(Row(name, subject.name, tuple(results), subject.hash))
    return Report(tuple(rows), origin, tuple({"metric": metric, **settings} for metric, settings in chosen))


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


def suites() -> list[str]:
    """The short names of the suites that come with the package."""
    return sorted({file.stem for folder in _SUITE_FOLDERS for file in folder.glob("*.yaml")})


def suite(name_or_path: str | Path) -> dict[str, Any]:
    """A suite by short name or from a .yaml file: {"description": text, "metrics": [{"metric": name, **settings}]}.

    Raises UserError for an unknown suite, key, metric or setting.
    """
    named = [folder / f"{name_or_path}.yaml" for folder in _SUITE_FOLDERS]
    path = next((file for file in [*named, Path(name_or_path)] if file.is_file()), None)
    if path is None:
        raise unknown("suite", str(name_or_path), [*suites(), "FILE.yaml"])
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"suite {path} is not readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or "metrics" not in content:
        raise UserError(f"suite {path} has no list of metrics; expected `metrics: [...]`")
    for key in content:
        if key not in ("description", "metrics"):
            raise unknown(f"key of suite {path}", str(key), ["description", "metrics"])
    chosen = check_metrics(content["metrics"])
    return {
        "description": str(content.get("description", "")).strip(),
        "metrics": [{"metric": metric, **settings} for metric, settings in chosen],
    }
