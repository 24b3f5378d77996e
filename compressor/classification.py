"""A classification head on a language model: attached, trained with the recovery loop, judged, saved.

Training is of all weights, as the source system does it; the language model itself stays as it is.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from . import artifacts, gpt2
from .errors import UserError
from .metrics.base import Progress
from .metrics.nll import BATCH_TOKENS
from .modeling import GPT2CompressedConfig, GPT2CompressedForSequenceClassification
from .processes import ALONE
from .tokens import like_lengths, padded
from .training_loop import Evaluation, Loop, Step
from .training_loss import Objective
from .training_mode import attention_while_training, autocast_dtype, tokens_at_once, training
from .training_schedule import mixed_seed

_NOT_COUNTED = -100  # the label that torch's cross-entropy leaves out
_WEIGHT_DECAY, _CLIP = 0.01, 1.0  # as in recovery


# ---------------------------------------------------------------- the model


def padding_token(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> int:
    """What a batch is filled up with: the tokenizer's padding token, else its EOS.

    transformers' classifiers read the last token of a text that is not this one, so a text that ends with it is judged
    without that end, alone as in a batch. Raises UserError for a tokenizer that has neither.
    """
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(candidate, int) and candidate < vocabulary:
            return candidate
    raise UserError("a classifier needs a token to fill batches up with; this tokenizer has neither padding nor EOS")


def attach(model: GPT2LMHeadModel, classes: Sequence[str], pad: int, seed: int) -> GPT2ForSequenceClassification:
    """A classifier with a copy of the model's trunk and a head drawn with the seed.

    Raises UserError for weights that are neither float32 nor float64.
    """
    if model.dtype not in (torch.float32, torch.float64):
        given = str(model.dtype).removeprefix("torch.")
        raise UserError(f"a classifier is trained in float32, these weights are {given}; leave --dtype out")
    config = copy.deepcopy(model.config)
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: index for index, name in enumerate(classes)}
    config.problem_type = "single_label_classification"
    config.pad_token_id = pad
    compressed = isinstance(config, GPT2CompressedConfig)
    made: type = GPT2CompressedForSequenceClassification if compressed else GPT2ForSequenceClassification
    with torch.device("meta"):
        classifier: GPT2ForSequenceClassification = made(config)
    weights = {name: tensor.clone() for name, tensor in gpt2.trunk(model).state_dict().items()}
    gpt2.trunk(classifier).load_state_dict(weights, assign=True)
    head = torch.empty(len(classes), config.n_embd, dtype=model.dtype)
    head.normal_(0.0, config.initializer_range, generator=torch.Generator().manual_seed(mixed_seed(seed, 3)))
    classifier.score.weight = nn.Parameter(head.to(gpt2.device(model)))
    return classifier.requires_grad_(True).eval()


def save(
    classifier: GPT2ForSequenceClassification, tokenizer: PreTrainedTokenizerBase, context: int, folder: Path
) -> None:
    """A save_pretrained folder in the weights' own dtype, in place of what is there. Its tokenizer pads with the
    classifier's token and truncates where it was trained to read."""
    own = copy.deepcopy(tokenizer)
    own.pad_token = own.convert_ids_to_tokens(classifier.config.pad_token_id)  # type: ignore[arg-type]
    own.padding_side = own.truncation_side = "right"
    own.model_max_length = context
    with artifacts.new_folder(folder, force=True) as new:
        classifier.save_pretrained(new)
        own.save_pretrained(new)


# ---------------------------------------------------------------- rows


@dataclass(frozen=True, eq=False)
class LabelledRows:
    """Texts as token ids and the class of each, which is what is predicted."""

    sequences: Sequence[Tensor]  # int64[tokens] each
    labels: Tensor  # int64[rows]
    pad: int

    def __len__(self) -> int:
        return len(self.sequences)

    def count(self, rows: Sequence[int]) -> int:
        return len(rows)

    def passes(self, rows: Sequence[int], tokens: int) -> list[list[int]]:
        lengths = [len(self.sequences[row]) for row in rows]
        return [[rows[place] for place in batch] for batch in like_lengths(lengths, tokens)]

    def tensors(self, rows: Sequence[int], *, counted: bool = True) -> tuple[Tensor, Tensor | None, Tensor]:
        """ids int64[rows, longest]; mask bool[rows, longest], None where there is no pad; labels int64[rows]."""
        ids, mask = padded([self.sequences[row] for row in rows], self.pad)
        labels = self.labels[list(rows)] if counted else torch.full((len(rows),), _NOT_COUNTED)
        return ids, None if mask.all() else mask, labels

    def nll(self, model: PreTrainedModel, rows: Sequence[int]) -> float:
        logits = class_logits(model, self, rows)
        return float(functional.cross_entropy(logits.double(), self.labels[list(rows)], reduction="sum"))


def class_logits(
    model: PreTrainedModel,
    rows: LabelledRows,
    wanted: Sequence[int] | None = None,
    *,
    batch_tokens: int = BATCH_TOKENS,
) -> Tensor:
    """float[rows, classes] on the CPU, of the rows `wanted` in that order (all), in evaluation mode."""
    wanted = range(len(rows)) if wanted is None else wanted
    device = gpt2.device(model)
    found: dict[int, Tensor] = {}
    with torch.no_grad(), gpt2.evaluating(model), gpt2.fused_activations(model):
        for batch in rows.passes(wanted, batch_tokens):
            ids, mask, _ = rows.tensors(batch)
            found.update(zip(batch, _logits(model, ids, mask, device).cpu(), strict=True))
    logits = torch.stack([found[row] for row in wanted])
    if not logits.isfinite().all():
        raise UserError("the classifier's logits are not finite numbers")
    return logits


def _logits(model: PreTrainedModel, ids: Tensor, mask: Tensor | None, device: torch.device) -> Tensor:
    """transformers' own forward: what is measured is what whoever opens the saved model gets."""
    attention_mask = None if mask is None else mask.long().to(device)
    return model(input_ids=ids.to(device), attention_mask=attention_mask, use_cache=False).logits


# ---------------------------------------------------------------- training


class LabelObjective(Objective):
    """Of the class of each text."""

    def __init__(self, model: PreTrainedModel, low: torch.dtype | None):
        super().__init__()
        self.model, self.low = model, low

    def forward(
        self, ids: Tensor, mask: Tensor | None, labels: Tensor, with_penalty: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As of Objective, without a penalty. ids: int64[rows, longest]; mask: bool of the same shape, None when there
        is no pad; labels: int64[rows]."""
        with torch.autocast(ids.device.type, dtype=self.low, enabled=self.low is not None):
            logits = _logits(self.model, ids, mask, ids.device)
        least = torch.float64 if logits.dtype == torch.float64 else torch.float32
        nll = functional.cross_entropy(logits.to(least), labels, ignore_index=_NOT_COUNTED, reduction="sum")
        return nll, torch.stack([nll.detach(), torch.zeros_like(nll.detach())]), None


@dataclass(frozen=True)
class Training:
    """What a training did. The classifier holds the state of `best_step`."""

    steps: int
    best_step: int  # 0: no step made it better
    curve: tuple[Step, ...]
    evaluations: tuple[Evaluation, ...]

    @property
    def selection_nll(self) -> float:
        """Of the best state, in nats per text."""
        return min(evaluation.nll for evaluation in self.evaluations)


def train(
    classifier: GPT2ForSequenceClassification,
    rows: LabelledRows,
    selection: LabelledRows,
    *,
    epochs: int,
    batch_rows: int,
    learning_rate: float,
    seed: int,
    autocast: str = "auto",
    forward_tokens: int | None = None,
    progress: Progress = lambda step, steps: None,
) -> Training:
    """Train all weights in place, with the config's dropout, and leave the best state by the NLL on `selection`.

    The seed fixes the order of the rows and the dropout. Optimiser, schedule, clipping and precision are those of
    recovery. autocast: auto | bfloat16 | none. forward_tokens: how many a forward pass takes (default by device).
    Raises UserError for a loss that is not a finite number.
    """
    device = gpt2.device(classifier)
    low = autocast_dtype(autocast, device) if classifier.dtype == torch.float32 else None
    steps = math.ceil(len(rows) * epochs / batch_rows)  # the last one may take up rows of the epoch after
    attention = attention_while_training(classifier, max(map(len, rows.sequences)), low)
    loop = Loop(
        objective=LabelObjective(classifier, low),
        parameters=dict(classifier.named_parameters()),
        training=rows,
        selection=selection,
        rewrites=(),
        settings={
            "steps": steps,
            "learning_rate": learning_rate,
            "penalty": 0.0,
            "warm_up": math.ceil(steps / 20),
            "weight_decay": _WEIGHT_DECAY,
            "clip": _CLIP,
            "dropout": True,
            "seed": seed,
            "evaluate_every": math.ceil(steps / 3),
        },
        processes=ALONE,  # a benchmark runs in one process, whatever started it
        device=device,
        rows=batch_rows,
        forward_tokens=forward_tokens or tokens_at_once(device),
        progress=lambda step: progress(step.step, steps),
    )
    with training(classifier, list(loop.parameters.values()), attention=attention, dropout=True):
        loop.begin(None, False)
        loop.run(None, None)
        loop.restore_best()
    return Training(steps, loop.best_step, tuple(loop.curve), tuple(loop.evaluations))
