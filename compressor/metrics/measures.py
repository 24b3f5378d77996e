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


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share (Wilson, 1927: right also near 0 and 1)."""
    interval = binomtest(right, count).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


class Accuracy(_Offline):
    """The share of predictions that are right, with its `wilson` interval.

    compute(predictions, references): class indices. Gives {"accuracy", "low", "high", "count"}.
    """

    inputs = {"predictions": Value("int64"), "references": Value("int64")}  # noqa: RUF012

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        right = int(np.sum(np.asarray(predictions) == np.asarray(references)))
        low, high = wilson(right, len(predictions))
        return {"accuracy": right / len(predictions), "low": low, "high": high, "count": len(predictions)}


class Rouge(_Offline):
    """ROUGE-1, ROUGE-2 and ROUGE-L (Lin, 2004) by rouge_score with Porter's stemmer: F1, averaged over the documents.

    rougeL is the longest common subsequence of the whole texts, not rougeLsum, which wants a sentence a line.
    compute(predictions, references, resamples=1000, seed=0): texts. Gives {"rouge1": {"f1", "low", "high"}, "rouge2":
    ..., "rougeL": ...}: the mean in 0..1 and its 95 % interval, the percentiles of the mean over documents drawn again
    with replacement; all three measures see the same draws. (rouge_score's own bootstrap draws from numpy's global
    state.)
    """

    names = ("rouge1", "rouge2", "rougeL")
    inputs = {"predictions": Value("string"), "references": Value("string")}  # noqa: RUF012

    def _compute(
        self, predictions: Sequence[str], references: Sequence[str], resamples: int = 1000, seed: int = 0
    ) -> dict[str, dict[str, float]]:
        from rouge_score.rouge_scorer import RougeScorer  # with nltk, which the other measures need not wait for

        scorer = RougeScorer(self.names, use_stemmer=True)
        scored = [scorer.score(target, prediction) for prediction, target in zip(predictions, references, strict=True)]
        f1 = np.array([[score[name].fmeasure for name in self.names] for score in scored])  # [documents, 3]
        generator, count = np.random.default_rng(seed), len(f1)
        means = np.stack([f1[generator.integers(0, count, count)].mean(0) for _ in range(resamples)])
        low, high = np.percentile(means, [2.5, 97.5], axis=0)
        return {
            name: {"f1": float(f1[:, place].mean()), "low": float(low[place]), "high": float(high[place])}
            for place, name in enumerate(self.names)
        }


class Distinct(_Offline):
    """The share of distinct n-grams among all n-grams of the texts (Li et al., 2016), n 1 and 2, words cut at blanks.

    compute(predictions): texts; no n-gram spans two of them. Gives {"distinct1", "distinct2"}, 0 where there is none.
    """

    inputs = {"predictions": Value("string")}  # noqa: RUF012

    def _compute(self, predictions: Sequence[str]) -> dict[str, float]:
        texts = [text.split() for text in predictions]
        found = {
            n: [tuple(words[start : start + n]) for words in texts for start in range(len(words) - n + 1)]
            for n in (1, 2)
        }
        return {f"distinct{n}": len(set(grams)) / max(1, len(grams)) for n, grams in found.items()}
