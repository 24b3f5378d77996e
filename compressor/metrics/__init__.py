"""How models are measured: one file a metric, one definition of each measure."""

from . import latency, perplexity, size
from .base import Metric, MetricResult, Progress

METRICS: dict[str, Metric] = {
    "latency": Metric(latency.measure, latency.SETTINGS, together=True),
    "perplexity": Metric(perplexity.measure, perplexity.SETTINGS, data="text"),
    "size": Metric(size.measure, size.SETTINGS),
}

__all__ = ["METRICS", "Metric", "MetricResult", "Progress"]
