"""The values every metric speaks in."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ..errors import UserError

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
    details: Any = None  # what stands behind the number and is worth reading, such as texts; plain values

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which knows no infinity and no NaN: such a value is null."""
        record = {**asdict(self), "value": self.value if math.isfinite(self.value) else None}
        return record if self.details is not None else {key: record[key] for key in record if key != "details"}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> MetricResult:
        """The inverse of `to_dict`; null becomes NaN."""
        fields = {name: record[name] for name in cls.__dataclass_fields__ if name != "details"}
        fields["details"] = record.get("details")
        return cls(**{**fields, "value": math.nan if fields["value"] is None else fields["value"]})


@dataclass(frozen=True)
class Metric:
    """An entry of METRICS: `run(subject, data, progress=..., **settings)` measures an OpenModel.

    settings: the names it takes. data: what it measures on: "text" (data.Text), "labelled" (examples.Labelled),
    "summaries" (examples.Examples), None for nothing. standard: the D it takes where none is given. together: whether
    it measures all models at once: `run(subjects, data, ...)` then gives one list of results a subject. references:
    what is measured without any of the models, as baseline rows: `references(data, subject, **settings)` gives name ->
    results; `subject`, the first model, lends its tokenizer. saves: `run` and takes `folder`, a Path to leave models
    in, or None. measures: by its config, whether a model has what is measured; None: all have.
    """

    run: Callable[..., list[Any]]  # of MetricResult; together: of lists of them
    settings: frozenset[str]
    data: Literal["text", "labelled", "summaries"] | None = None
    standard: str | None = None
    together: bool = False
    references: Callable[..., dict[str, list[MetricResult]]] | None = None
    saves: bool = False
    measures: Callable[[Any], bool] | None = None


def whole(name: str, value: Any, low: int, high: int | None = None) -> int:
    """`value` where it is a whole number from `low` (to `high`). Raises UserError naming the setting otherwise."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        raise UserError(
            f"{name}={value!r} is not allowed; allowed: whole numbers from {low}"
            + (f" to {high}" if high is not None else "")
        )
    return value
