"""The measures of tasks and of text as `evaluate.Metric` classes that need no network: what their scripts on the hub
are fetched for stands here. Import this file where a measure is taken: evaluate takes a second to import.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from typing import Any

import evaluate
import numpy as np
from datasets import Features, Value
from scipy.stats import binomtest


class _Offline(evaluate.Metric):
    """evaluate.Metric that keeps its inputs in memory and leaves no folder in the user's cache."""

    inputs: dict[str, Any]  # input -> datasets feature

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as folder:  # evaluate makes a folder even where it writes nothing
            super().__init__(keep_in_memory=True, cache_dir=folder, seed=0)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "", citation="", features=Features(self.inputs), inputs_description=""
        )


class Perplexity(_Offline):
    """exp of the summed negative log-likelihoods over the count of units.

    compute(predictions=nll, units=None): nll in nats of every scored token; units: how many tokens or words they are
    spread over (default: one each). Gives {"perplexity": value, inf where it is beyond a float}.
    """

    inputs = {"predictions": Value("float64")}  # noqa: RUF012

    def _compute(self, predictions: Sequence[float], units: int | None = None) -> dict[str, float]:
        total = float(np.sum(np.asarray(predictions, dtype=np.float64)))
        mean = total / max(1, len(predictions) if units is None else units)
        return {"perplexity": math.exp(mean) if mean < 700 else math.inf if mean >= 700 else math.nan}


class Accuracy(_Offline):
    """The share of predictions that are right, with a 95 % confidence interval (Wilson, 1927: right also near 0 and 1).

    compute(predictions, references): class indices. Gives {"accuracy", "low", "high", "count"}.
    """

    inputs = {"predictions": Value("int64"), "references": Value("int64")}  # noqa: RUF012

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        right = int(np.sum(np.asarray(predictions) == np.asarray(references)))
        interval = binomtest(right, len(predictions)).proportion_ci(0.95, method="wilson")
        return {
            "accuracy": right / len(predictions),
            "low": float(interval.low),
            "high": float(interval.high),
            "count": len(predictions),
        }
