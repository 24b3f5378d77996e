"""Where a figure belongs: what its metric is called, which figures were taken in one way, and what is missing."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..benchmark import COMPARED_UNDER, Gap, Report, Row
from ..metrics import MetricResult

MISSING = "-"

# What the metrics that can be asked for give; one that is not named here gives a figure of its own name.
GIVES: dict[str, tuple[str, ...]] = {
    "size": ("parameters", "bytes", "flops_per_token", "cache_bytes"),
    "perplexity": ("perplexity", "word_perplexity"),
    "latency": ("prefill_latency", "decode_latency"),
    "extrapolation": ("length_perplexity", "repetition"),
    "assisted": ("acceptance", "tokens_per_pass", "assisted_speed_up", "same_text"),
    "imdb": ("imdb_accuracy",),
    "rouge": ("rouge1", "rouge2", "rougeL"),
    "generation": ("distinct1", "distinct2", "looping"),
}
TASKLESS = ("size", "perplexity", "latency", "extrapolation", "assisted")  # these have tables of their own
TITLES = {
    "imdb": "IMDb",
    "rouge": "Summaries",
    "generation": "Generation",
    "imdb_accuracy": "IMDb accuracy",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "distinct1": "distinct-1",
    "distinct2": "distinct-2",
    "looping": "looping",
    "prefill_latency": "prefill",
    "decode_latency": "decode",
}


def title(name: str) -> str:
    return TITLES.get(name, name.replace("_", " "))


def family(metric: str) -> str:
    """The metric of METRICS that gives figures of this name."""
    return next((asked for asked, given in GIVES.items() if metric in given), metric)


# ---------------------------------------------------------------- ways


@dataclass(frozen=True)
class Way:
    """How some figures of a family were taken; they may be compared with one another."""

    family: str
    settings: Mapping[str, Any]  # of one of the figures; of a gap where there is no figure
    key: str  # the same for all figures of this way; "" where there is none

    def find(self, row: Row, metric: str) -> MetricResult | None:
        return next(
            (item for item in row.results if item.metric == metric and self.key and _key(item) == self.key), None
        )


def _key(result: MetricResult, but: str = "process") -> str:
    settings = result.settings
    return json.dumps([settings.get(name) for name in COMPARED_UNDER if name != but], sort_keys=True, default=str)


def ways(report: Report, asked: str) -> list[Way]:
    """How the figures of a metric were taken: protocols in the order of the report, in each what most rows have first;
    a gap that none of them explains has one of its own. Latencies of several processes are one way: each row's is
    compared with the baseline's of its process."""
    found: dict[str, Way] = {}
    rows: dict[str, set[str]] = {}
    for row in report.rows:
        for result in row.results:
            if family(result.metric) == asked:
                found.setdefault(_key(result), Way(asked, result.settings, _key(result)))
                rows.setdefault(_key(result), set()).add(row.name)
    protocols = list(dict.fromkeys(way.settings.get("protocol") for way in found.values()))
    all_ways = sorted(
        found.values(), key=lambda way: (protocols.index(way.settings.get("protocol")), -len(rows[way.key]))
    )
    for row in report.rows:
        for gap in row.gaps:
            if gap.metric == asked and not any(_explains(gap, row, way) for way in all_ways):
                all_ways.append(Way(asked, gap.settings, ""))
    return all_ways


def way_of(report: Report, row: Row, metric: str) -> Way | None:
    """The first way in which both a row and the baseline have a figure of this metric."""
    both = (way for way in ways(report, family(metric)) if way.find(row, metric) and way.find(report.rows[0], metric))
    return next(both, None)


def _explains(gap: Gap, row: Row, way: Way) -> bool:
    """Whether the figure that a row lacks in this way is the one that the gap is of."""
    if gap.metric != way.family:
        return False
    if not way.key:
        return gap.settings == way.settings
    measured = any(way.find(row, metric) for metric in GIVES.get(gap.metric, (gap.metric,)))
    return not measured and _fits(gap.settings, way.settings)


def _fits(asked: Mapping[str, Any], taken: Mapping[str, Any]) -> bool:
    """Whether a figure with these settings may be what was asked for."""

    def same(wanted: Any, given: Any) -> bool:
        return given in wanted if isinstance(wanted, list) and not isinstance(given, list) else given == wanted

    return all(same(value, taken[name]) for name, value in asked.items() if name in taken)


# ---------------------------------------------------------------- gaps


@dataclass(frozen=True)
class Reason:
    """Why something could not be measured, and on which models."""

    number: int
    what: str
    models: tuple[str, ...]
    reason: str


class Gaps:
    """The gaps of a report, numbered in its order."""

    def __init__(self, report: Report):
        self._numbers: dict[tuple[str, str], int] = {}
        self._models: dict[tuple[str, str], list[str]] = {}
        for row in report.rows:
            for gap in row.gaps:
                self._numbers.setdefault(self._of(gap), len(self._numbers) + 1)
                self._models.setdefault(self._of(gap), []).append(row.name)

    @staticmethod
    def _of(gap: Gap) -> tuple[str, str]:
        settings = ", ".join(f"{name}={value}" for name, value in gap.settings.items())
        return gap.metric + (f" ({settings})" if settings else ""), gap.reason

    @property
    def reasons(self) -> list[Reason]:
        return [
            Reason(number, what, tuple(self._models[what, reason]), reason)
            for (what, reason), number in self._numbers.items()
        ]

    def mark(self, row: Row, way: Way) -> str:
        """What stands in the place of a figure that a row has not: "gap [2]", or a dash where it was not asked for."""
        gap = next((gap for gap in row.gaps if _explains(gap, row, way)), None)
        return MISSING if gap is None else f"gap [{self._numbers[self._of(gap)]}]"

    def has(self, row: Row, way: Way) -> bool:
        """Whether a row has a gap where it would have a figure."""
        return self.mark(row, way) != MISSING


# ---------------------------------------------------------------- numbers


def number(value: float, decimals: int = 2) -> str:
    return f"{value:,.{decimals}f}" if math.isfinite(value) else "not finite"


def scaled(value: float) -> str:
    """A count in thousands, millions or billions, one decimal: 497759232 -> "497.8 M"."""
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= factor:
            return f"{value / factor:.1f} {unit}"
    return f"{value:.0f} "


def interval(result: MetricResult) -> tuple[float, float] | None:
    """The 95 % interval of a figure; None where there is none."""
    spread = result.spread or {}
    low, high = spread.get("low"), spread.get("high")
    if not isinstance(low, int | float) or not isinstance(high, int | float):
        return None
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None


def decimals(values: Sequence[float]) -> int:
    """Shares need three decimals, larger figures two."""
    return 3 if all(abs(value) <= 1 for value in values if math.isfinite(value)) else 2


def overlap(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] <= other[1] and other[0] <= one[1]
