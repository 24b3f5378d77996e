"""Linear probes: features of texts from a frozen trunk, and the logistic regression that reads them."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from .. import gpt2
from ..errors import UserError
from ..tokens import like_lengths, padded
from .base import Progress
from .nll import BATCH_TOKENS

if TYPE_CHECKING:  # a second to import
    from sklearn.model_selection import GridSearchCV

LAST, MEAN = 0, 1
_WORD = r"\b\w\w+\b|[^\w\s]"  # scikit-learn's, and signs: a text may have no word of two letters
_READ = {"last token and mean": [LAST, MEAN], "mean": [MEAN], "last token": [LAST]}
_PROBE_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of standardised features; the inverse of the L2 penalty
_WORD_STRENGTHS = (1e-1, 1.0, 1e1, 1e2, 1e3)  # of tf-idf rows, which are of length 1


def features(
    model: PreTrainedModel,
    sequences: Sequence[Tensor],
    *,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
) -> np.ndarray:
    """float64[texts, 2, d]: the trunk's final state of each text's last token, and the mean over all its tokens.

    sequences: int64[tokens] each, one token or more. Texts of like length run together; no head is run.
    """
    device = gpt2.device(model)
    found = np.empty((len(sequences), 2, model.config.n_embd))
    done = 0
    with torch.no_grad(), gpt2.evaluating(model), gpt2.fused_activations(model):
        for batch in like_lengths([len(sequence) for sequence in sequences], batch_tokens):
            ids, mask = (tensor.to(device) for tensor in padded([sequences[index] for index in batch]))
            output = gpt2.trunk(model)(input_ids=ids, attention_mask=mask.long(), use_cache=False)
            hidden, lengths = output.last_hidden_state.float(), mask.sum(1)
            found[batch, LAST] = hidden[torch.arange(len(batch), device=device), lengths - 1].cpu()
            found[batch, MEAN] = (hidden.masked_fill(~mask[..., None], 0).sum(1) / lengths[:, None]).cpu()
            done += len(batch)
            if progress is not None:
                progress(done, len(sequences))
    if not np.isfinite(found).all():
        raise UserError("the model's final states are not finite numbers; there is nothing to probe")
    return found


def _view(features: np.ndarray, read: str) -> np.ndarray:
    return features[:, _READ[read]].reshape(len(features), -1)


def fit_probe(
    training: np.ndarray, classes: Sequence[int], selection: np.ndarray, others: Sequence[int]
) -> GridSearchCV:
    """A logistic regression on standardised features, float64[texts, 2, d]; chosen: C, and whether it reads the last
    token's, the mean or both (where a text was cut, its last token is any)."""
    from sklearn.preprocessing import FunctionTransformer, StandardScaler

    return _chosen(
        [("view", FunctionTransformer(_view)), ("scale", StandardScaler())],
        {"view__kw_args": [{"read": read} for read in _READ], "regression__C": _PROBE_STRENGTHS},
        np.concatenate([training, selection]),
        classes,
        others,
    )


def fit_words(
    training: Sequence[str], classes: Sequence[int], selection: Sequence[str], others: Sequence[int]
) -> GridSearchCV:
    """A logistic regression on the tf-idf of words and pairs of words; chosen: C."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    with tempfile.TemporaryDirectory() as memory:  # one count of the words for every C
        return _chosen(
            [("words", TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=_WORD))],
            {"regression__C": _WORD_STRENGTHS},
            [*training, *selection],
            classes,
            others,
            memory=memory,
        )


def _chosen(
    steps: list[tuple[str, Any]],
    grid: dict[str, Any],
    texts: Any,
    training: Sequence[int],
    selection: Sequence[int],
    memory: str | None = None,
) -> GridSearchCV:
    """The candidate of least loss on the selection rows of those fitted on the training rows (equal ones: the first of
    the grid), then fitted on both. texts: training rows, then selection rows; every class stands in both."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, PredefinedSplit
    from sklearn.pipeline import Pipeline

    split = PredefinedSplit([-1] * len(training) + [0] * len(selection))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # where C is large; the selection part judges that too
        model = Pipeline([*steps, ("regression", LogisticRegression(max_iter=1000))], memory=memory)
        search = GridSearchCV(model, grid, scoring="neg_log_loss", cv=split, error_score="raise")
        return search.fit(texts, [*training, *selection])
