"""How models are measured: one file a metric, one definition of each measure."""

from . import latency, perplexity, size
from .base import Metric, MetricResult, Progress

METRICS: dict[str, Metric] = {
    "latency": Metric(latency.measure, latency.SETTINGS, needs_data=False, together=True),
    "perplexity": Metric(perplexity.measure, perplexity.SETTINGS, needs_data=True),
    "size": Metric(size.measure, size.SETTINGS, needs_data=False),
}

__all__ = ["METRICS", "Metric", "MetricResult", "Progress"]
