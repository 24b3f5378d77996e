"""How models are measured: one file a metric, one definition of each measure."""

from .. import slicing
from . import assisted, extrapolation, generation, imdb, latency, perplexity, rouge, size
from .base import Metric, MetricResult, Progress

METRICS: dict[str, Metric] = {
    "assisted": Metric(assisted.measure, assisted.SETTINGS, data="text", measures=slicing.is_nested),
    "extrapolation": Metric(extrapolation.measure, extrapolation.SETTINGS, data="text"),
    "generation": Metric(generation.measure, generation.SETTINGS),
    "imdb": Metric(
        imdb.measure, imdb.SETTINGS, data="labelled", standard="imdb", references=imdb.references, saves=True
    ),
    "latency": Metric(latency.measure, latency.SETTINGS, together=True),
    "perplexity": Metric(perplexity.measure, perplexity.SETTINGS, data="text"),
    "rouge": Metric(
        rouge.measure, rouge.SETTINGS, data="summaries", standard="cnn_dailymail", references=rouge.references
    ),
    "size": Metric(size.measure, size.SETTINGS),
}

__all__ = ["METRICS", "Metric", "MetricResult", "Progress"]
