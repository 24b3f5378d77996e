"""Accuracy on labelled texts, such as IMDb's: of a linear probe of the frozen model, or of the model fine-tuned.

A text is its first `context` tokens, unaltered. What is chosen is chosen on the selection part; the test part is only
predicted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, unknown
from ..examples import Examples, Labelled
from ..gpt2 import longest
from ..models import OpenModel
from ..tokens import first_tokens
from .base import MetricResult, Progress, whole
from .nll import BATCH_TOKENS
from .probe import features, fit_probe, fit_words

HEADS = ("probe", "finetune")
_CONTEXT = 256  # where the model has room for it
_TUNING = {"epochs": 1, "seeds": 3, "batch_rows": 16}
_RATE = 0.08  # learning rate times d: of those tried the best at d 128 and 256, and 1e-4 for GPT-2 small
SETTINGS = frozenset({"head", "context", "max_training", "max_examples", "batch_tokens", "learning_rate", *_TUNING})


def measure(
    subject: OpenModel, data: Labelled, *, folder: Path | None = None, progress: Progress | None = None, **settings: Any
) -> list[MetricResult]:
    """`imdb_accuracy`: the share of the test texts whose class is found, with its 95 % Wilson interval.

    settings: head="probe" (a logistic regression on the final states of the frozen trunk, deterministic) or "finetune"
    (a classification head; a copy of the model is trained as a whole). context=256, or as many tokens as the model
    takes. max_training, max_examples: at most so many training rows (and a quarter of it as selection rows) and test
    rows; all of them by default. batch_tokens: of a forward pass. For finetune only: epochs=1; seeds=3, how many
    trainings, of which the value is the mean; batch_rows=16, of a step; learning_rate=0.08 / d.
    folder: where finetune saves the classifier that did best on the selection part.

    Raises UserError for settings that are not allowed and for data that leaves a part without one of the classes.
    """
    asked = _asked(subject, data, **settings)
    if asked.head == "probe":
        return [_probe(subject, asked, progress)]
    return [_finetune(subject, asked, folder, progress)]


def references(data: Labelled, subject: OpenModel, **settings: Any) -> dict[str, list[MetricResult]]:
    """What needs no model, on the same rows: the majority of the training part, and a logistic regression on the tf-idf
    of words and pairs of words. `subject` lends its tokenizer: they read the same first `context` tokens."""
    asked = _asked(subject, data, **settings)
    training, selection, test = ([*_texts(subject, part, asked.context)] for part in asked.parts)
    words = fit_words(training, asked.training.targets, selection, asked.selection.targets)
    majority = max(range(len(asked.test.classes)), key=asked.training.targets.count)
    return {
        "majority class": [_result(asked, [[majority] * len(test)])],
        "tf-idf": [_result(asked, [words.predict(test)], C=words.best_params_["regression__C"])],
    }


# ---------------------------------------------------------------- what is asked for


@dataclass(frozen=True)
class _Asked:
    """Checked settings with their values, and the rows that they leave."""

    head: str
    context: int
    batch_tokens: int
    tuning: dict[str, Any]  # finetune: of _TUNING
    training: Examples
    selection: Examples
    test: Examples

    @property
    def parts(self) -> tuple[Examples, Examples, Examples]:
        return self.training, self.selection, self.test


def _asked(
    subject: OpenModel,
    data: Labelled,
    *,
    head: str = "probe",
    context: int | None = None,
    max_training: int | None = None,
    max_examples: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    **tuning: Any,
) -> _Asked:
    if head not in HEADS:
        raise unknown("head of imdb", str(head), HEADS)
    if tuning and head != "finetune":
        raise UserError(f"{next(iter(tuning))} is a setting of head 'finetune'; the head is {head!r}")
    if head == "finetune":
        tuning = {**_TUNING, "learning_rate": _RATE / subject.model.config.n_embd, **tuning}
    for name, value in tuning.items():
        if name != "learning_rate":
            whole(name, value, 1)
        elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise UserError(f"learning_rate={value!r} is not allowed; allowed: numbers above 0")
    for name, value in (("max_training", max_training), ("max_examples", max_examples)):
        if value is not None:
            whole(name, value, 1)
    positions = subject.model.config.n_positions
    asked = _Asked(
        head=head,
        context=whole(
            "context", min(_CONTEXT, positions) if context is None else context, 1, longest(subject.model.config)
        ),
        batch_tokens=whole("batch_tokens", batch_tokens, 1),
        tuning=tuning,
        training=data.training.first(max_training),
        selection=data.selection.first(None if max_training is None else max_training // 4),
        test=data.test.first(max_examples),
    )
    for part in (asked.training, asked.selection):
        if len(set(part.targets)) < len(part.classes):
            raise UserError(
                f"max_training={max_training} leaves a {part.part} part of {len(part)} rows, which lacks one of the "
                f"{len(part.classes)} classes; give more"
            )
    return asked


def _tokens(subject: OpenModel, part: Examples, context: int) -> list[Tensor]:
    return first_tokens(part.texts, subject.tokenizer, context=context, vocabulary=subject.model.config.vocab_size)


def _texts(subject: OpenModel, part: Examples, context: int) -> list[str]:
    """The texts as far as models read them."""
    return [
        text if len(ids) < context else str(subject.tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False))
        for text, ids in zip(part.texts, _tokens(subject, part, context), strict=True)
    ]


# ---------------------------------------------------------------- heads


def _probe(subject: OpenModel, asked: _Asked, progress: Progress | None) -> MetricResult:
    sequences = [ids for part in asked.parts for ids in _tokens(subject, part, asked.context)]
    found = features(subject.model, sequences, batch_tokens=asked.batch_tokens, progress=progress)
    first, second = len(asked.training), len(asked.training) + len(asked.selection)
    probe = fit_probe(found[:first], asked.training.targets, found[first:second], asked.selection.targets)
    chosen = probe.best_params_
    return _result(
        asked, [probe.predict(found[second:])], C=chosen["regression__C"], features=chosen["view__kw_args"]["read"]
    )


def _finetune(subject: OpenModel, asked: _Asked, folder: Path | None, progress: Progress | None) -> MetricResult:
    from .. import classification  # it imports this package

    pad = classification.padding_token(subject.tokenizer, subject.model.config.vocab_size)
    training, selection, test = (
        classification.LabelledRows(_tokens(subject, part, asked.context), torch.tensor(part.targets), pad)
        for part in asked.parts
    )
    tuning = {name: value for name, value in asked.tuning.items() if name != "seeds"}
    seeds = asked.tuning["seeds"]
    predicted: list[list[int]] = []
    details: list[dict[str, Any]] = []
    best: Any = None
    for seed in range(seeds):
        classifier = classification.attach(subject.model, asked.test.classes, pad, seed)

        def move(step: int, steps: int, seed: int = seed) -> None:
            if progress is not None:
                progress(seed * steps + step, seeds * steps)

        trained = classification.train(classifier, training, selection, **tuning, seed=seed, progress=move)
        predicted.append(
            classification.class_logits(classifier, test, batch_tokens=asked.batch_tokens).argmax(1).tolist()
        )
        if best is None or trained.selection_nll < min(record["selection_nll"] for record in details):
            best = classifier.cpu()
        del classifier  # of all seeds only the best is held
        details.append(
            {
                "seed": seed,
                "accuracy": _accuracy(predicted[-1], asked.test),
                "selection_nll": trained.selection_nll,
                "best_step": trained.best_step,
                "steps": trained.steps,
            }
        )
    if folder is not None:
        classification.save(best, subject.tokenizer, asked.context, folder)
    saved = None if folder is None else folder.name
    return _result(asked, predicted, details=details, **asked.tuning, classifier=saved)


# ---------------------------------------------------------------- the result


def _accuracy(predicted: Sequence[int], test: Examples) -> float:
    from .measures import Accuracy

    return Accuracy().compute(predictions=predicted, references=test.targets)["accuracy"]


def _result(asked: _Asked, predicted: Sequence[Sequence[int]], *, details: Any = None, **chosen: Any) -> MetricResult:
    """predicted: the classes of the test rows, by each training."""
    from .measures import wilson

    each = [_accuracy(classes, asked.test) for classes in predicted]
    low, high = wilson(round(mean(each) * len(asked.test)), len(asked.test))
    spread: dict[str, Any] = {"low": low, "high": high, "method": "95 % Wilson interval"}
    if details is not None:
        spread.update(seeds=each, std=stdev(each) if len(each) > 1 else None)
    settings = {
        "protocol": asked.head,
        "context": asked.context,
        "training": len(asked.training),
        "selection": len(asked.selection),
        **chosen,
        "source": asked.test.source,
        "part": asked.test.part,
        "split": asked.test.split,
        "fingerprint": Labelled(*asked.parts).fingerprint,
    }
    return MetricResult("imdb_accuracy", mean(each), "share of texts", True, len(asked.test), spread, settings, details)
