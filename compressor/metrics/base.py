"""The values every metric speaks in."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

Progress = Callable[[int, int], None]  # (done, total), in the metric's own units


@dataclass(frozen=True)
class MetricResult:
    """One number with everything needed to repeat it.

    metric: e.g. "perplexity"; unit: what one unit of `value` is; count: what it was taken over (scored tokens, files);
    spread: how sure the value is, with the method's name, or None; settings: among them always "protocol".
    """

    metric: str
    value: float
    unit: str
    higher_is_better: bool
    count: int
    spread: dict[str, Any] | None
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which knows no infinity and no NaN: such a value is null."""
        return {**asdict(self), "value": self.value if math.isfinite(self.value) else None}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> MetricResult:
        """The inverse of `to_dict`; null becomes NaN."""
        fields = {name: record[name] for name in cls.__dataclass_fields__}
        return cls(**{**fields, "value": math.nan if fields["value"] is None else fields["value"]})


@dataclass(frozen=True)
class Metric:
    """An entry of METRICS: `run(subject, data, progress=..., **settings)` measures an OpenModel.

    settings: the names it takes; needs_data: whether it measures on data (else `data` is None); together: whether it
    measures all models at once: `run(subjects, data, ...)` then gives one list of results a subject.
    """

    run: Callable[..., list[Any]]  # of MetricResult; together: of lists of them
    settings: frozenset[str]
    needs_data: bool
    together: bool = False
