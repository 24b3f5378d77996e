"""How far a model reaches: what was measured below and above its trained length, on the same tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..benchmark import Report, Row
from ..metrics import MetricResult
from .figures import Gaps, Way, ways

WINDOWS = ("sliding", "non-overlapping")
_SHARED = ("trained", "max_tokens", "fingerprint", "stride_share")


@dataclass(frozen=True)
class Reach:
    """What was measured below and above one trained length, on the same tokens of one text."""

    trained: int
    lengths: dict[tuple[str, int], Way]  # (windows, length), lengths ascending
    texts: dict[tuple[str, int], Way]  # (decoding, length) of text past the trained length
    rows: tuple[Row, ...]  # that were asked for it

    @property
    def across(self) -> list[int]:
        return sorted({length for _, length in self.lengths})

    def perplexity(self, row: Row, windows: str, length: int) -> MetricResult | None:
        way = self.lengths.get((windows, length))
        return way.find(row, "length_perplexity") if way else None

    def text(self, row: Row, decoding: str, length: int) -> MetricResult | None:
        way = self.texts.get((decoding, length))
        return way.find(row, "repetition") if way else None

    def takes(self, row: Row) -> int | None:
        """How many tokens a model takes at most; None for any number, and where nothing is known of it."""
        found = (way.find(row, "length_perplexity") for way in self.lengths.values())
        return next((item.settings["takes"] for item in found if item is not None), None)

    def change(self, row: Row, windows: str, length: int) -> tuple[float, float] | None:
        """Perplexity over the same model's at the trained length, and the error of that."""
        own, base = (self.perplexity(row, windows, at) for at in (length, self.trained))
        if own is None or base is None or not math.isfinite(own.value / base.value):
            return None
        return own.value / base.value, (own.spread or {}).get("ratio_error", math.nan)

    def missing(self, row: Row, gaps: Gaps, length: int) -> str:
        """What stands in the place of a figure that a model has not."""
        takes = self.takes(row)
        if takes is not None and takes < length:
            return f"takes {takes:,} tokens"
        return gaps.mark(row, next(iter(self.lengths.values())))


def reaches(report: Report, gaps: Gaps) -> list[Reach]:
    """Each way in which extrapolation was measured."""
    found: dict[tuple, tuple[dict, dict]] = {}
    for way in ways(report, "extrapolation"):
        if way.key:
            key = tuple(way.settings[name] for name in _SHARED)
            lengths, texts = found.setdefault(key, ({}, {}))
            own = lengths if "stride" in way.settings else texts
            own[way.settings["protocol"], way.settings["context"]] = way
    return [
        Reach(
            key[0],
            dict(sorted(lengths.items(), key=lambda item: item[0][1])),
            texts,
            tuple(
                row
                for row in report.rows
                if any(way.find(row, "length_perplexity") or gaps.has(row, way) for way in lengths.values())
            ),
        )
        for key, (lengths, texts) in found.items()
    ]


def positions(reach: Reach, row: Row) -> list[dict[str, Any]]:
    """The bins of `metrics.extrapolation.by_position` of a model's longest windows; [] where it has none."""
    found = (reach.perplexity(row, "non-overlapping", length) for length in reversed(reach.across))
    item = next(filter(None, found), None)
    return item.details or [] if item else []
