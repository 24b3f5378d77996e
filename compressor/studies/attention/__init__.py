"""study attention: what causal attentions take and how like softmax they are; and a small GPT trained with each."""

from .study import ATTENTION

__all__ = ["ATTENTION"]
