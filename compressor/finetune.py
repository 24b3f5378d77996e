"""Recovery: a short training after a rewrite, by next tokens or a teacher, on one process or many.

This file says what is trained and what comes out; training_loop.py makes the steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from . import gpt2, lora
from .data import TokenBlocks
from .errors import UserError, unknown
from .fractal_training import DividedObjective, stream_rows
from .nested_training import NestedObjective
from .processes import LAUNCH, accelerator, processes
from .rewrites import Rewrite
from .rewrites.base import Divided
from .token_groups import Strings
from .training_loop import Evaluation, Loop, Step
from .training_loss import TokenObjective
from .training_mode import attention_while_training, autocast_dtype, tokens_at_once, training, zeros_held
from .training_rows import TokenRows
from .training_schedule import mixed_seed
from .training_state import StateFolder

__all__ = ["TRAIN", "Evaluation", "Recovery", "StateFolder", "Step", "control_train", "finetune", "resolve_train"]

TRAIN = ("auto", "deltas", "lora", "full")


@dataclass(frozen=True)
class Recovery:
    """What a recovery did. The model holds the state of `best_step`."""

    train: str  # deltas | lora | full
    trainable: int  # how many parameters were trained
    steps: int
    best_step: int  # 0: no step made it better
    curve: tuple[Step, ...]
    evaluations: tuple[Evaluation, ...]
    tokens: int  # predicted in training, by all processes
    seconds: float  # in all
    training_seconds: float  # of the steps alone
    settings: dict[str, Any]  # everything needed to repeat it


# ---------------------------------------------------------------- rules


def resolve_train(train: str, model: GPT2LMHeadModel, rewrites: Sequence[Rewrite]) -> str:
    """deltas | lora | full. auto: deltas where the model has any, else lora.

    The control is the same call on the original with no rewrites: auto gives lora there, and for a table made with
    `deltas` the control runs `auto` (`control_train`). Raises UserError for deltas where there are none.
    """
    if train not in TRAIN:
        raise unknown("train", train, TRAIN)
    deltas = any(rewrite.trainable(model) for rewrite in rewrites)
    if train == "deltas" and not deltas:
        raise UserError("train is 'deltas', and this model has none; allowed for it: auto, lora, full")
    return train if train != "auto" else "deltas" if deltas else "lora"


def control_train(train: str) -> str:
    """The mode of the control of a recovery in mode `train`: the original has no deltas, so lora stands for them."""
    return "auto" if train == "deltas" else train


# ---------------------------------------------------------------- the stage


def finetune(
    model: GPT2LMHeadModel,
    blocks: TokenBlocks,
    evaluation: TokenBlocks | None,
    *,
    rewrites: Sequence[Rewrite] = (),
    train: str = "auto",
    steps: int = 100,
    batch_tokens: int = 4096,
    learning_rate: float = 1e-3,
    penalty: float = 1e-4,
    teacher: GPT2LMHeadModel | None = None,
    strings: Strings | None = None,
    mix: float = 1.0,
    warm_up: int | None = None,
    weight_decay: float = 0.01,
    clip: float = 1.0,
    dropout: bool = False,
    rank: int = lora.RANK,
    alpha: float = lora.ALPHA,
    seed: int = 0,
    evaluate_every: int | None = None,
    checkpoint_every: int | None = None,
    state_folder: StateFolder | None = None,
    resume: bool = False,
    autocast: str = "auto",
    forward_tokens: int | None = None,
    progress: Callable[[Step], None] = lambda step: None,
) -> Recovery:
    """Train the model in place and leave it in its best state by the NLL on `evaluation`, the start included.

    model: float32 (or float64) weights on one device; with several processes it moves to the process's own. Its
    structure and, but for the trained parameters, its bits stay as they are, up to what a rewrite takes away at the end
    (`finish`); adapters of `lora` are merged then.
    blocks: training text; evaluation: selection text, None to keep the last state unseen.
    train: auto | deltas | lora | full, see `resolve_train`. batch_tokens: of one step over all processes, in whole
    rows. Loss: summed NLL over the batch's predicted tokens (pads never count) + `penalty` times the mean of the
    rewrites' penalties; with a teacher (1 - mix) NLL + mix KL(teacher || model) instead of NLL (the teacher moves to
    the model's device).
    strings: what the tokens of the vocabulary stand for, which imposed groups of a nested model are made of.
    warm_up: steps (default 5 %). weight_decay: on matrices only. dropout: as the model's config has it, else none.
    evaluate_every: steps (default a fifth of them). autocast: auto | bfloat16 | none. forward_tokens: how many a
    forward pass takes (default by device). checkpoint_every, state_folder, resume: the state is stored after so many
    steps and after the last; it stays until the caller, who has the result safe, calls `training_state.remove`.
    Rewrites that anneal (`on_step`) are what they are to be at the end only, so their best state is the last.

    Raises UserError for settings that are not allowed, a stored state of other settings, a model spread over devices
    or wrapped, and a loss that is not a finite number.
    """
    _check_models(model, teacher)
    mode = resolve_train(train, model, rewrites)
    if teacher is model or (teacher is not None and mode != "deltas" and _memory_of(teacher) & _memory_of(model)):
        raise ValueError("the teacher shares memory with the model: it would be changed too")
    if checkpoint_every is not None and state_folder is None:
        raise ValueError("checkpoint_every needs a state_folder")
    if not blocks.mask[:, 1:].any():
        raise UserError(f"the {blocks.part} part of {blocks.source} has no token to predict; give more text")
    shared = processes()
    device = gpt2.device(model) if shared.world == 1 else accelerator().device
    model.to(device)  # type: ignore[arg-type]
    width = blocks.ids.shape[1]
    low = autocast_dtype(autocast, device) if model.dtype == torch.float32 else None  # what products are computed in
    settings: dict[str, Any] = {
        "train": mode,
        "steps": steps,
        "batch_tokens": batch_tokens,
        "learning_rate": learning_rate,
        "penalty": penalty,
        "distill": teacher is not None,
        "mix": mix if teacher is not None else 0.0,
        "warm_up": math.ceil(steps / 20) if warm_up is None else warm_up,
        "weight_decay": weight_decay,
        "clip": clip,
        "dropout": dropout,
        "rank": rank if mode == "lora" else None,
        "alpha": alpha if mode == "lora" else None,
        "seed": seed,
        "evaluate_every": max(1, steps // 5) if evaluate_every is None else evaluate_every,
        "autocast": str(low or model.dtype).removeprefix("torch."),
        "training": blocks.fingerprint,
        "selection": evaluation.fingerprint if evaluation is not None else None,
    }
    _check_numbers({**settings, "checkpoint_every": checkpoint_every, "forward_tokens": forward_tokens})
    attention = attention_while_training(model, width, low)
    zeros = [item for rewrite in rewrites for item in rewrite.zeros(model)]
    nests = [nest for rewrite in rewrites if (nest := rewrite.nest(model)) is not None]
    if nests:  # how several models in one are trained is no other setting's
        settings["rewrites"] = [rewrite.record() for rewrite in rewrites]
    at_once = 1
    with _trainable(model, mode, rewrites, settings, zeros) as parameters:
        given = model, teacher, settings["mix"], rewrites if penalty else (), low
        objective = TokenObjective(*given)
        rows, judged = TokenRows(blocks), None if evaluation is None else TokenRows(evaluation)
        for nest in nests:
            if isinstance(nest, Divided):
                objective, at_once = DividedObjective(*given, divided=nest), 1 + nest.parts[-1].level
                rows, judged = stream_rows(model, nest, blocks, evaluation, seed=seed)
            else:
                objective = NestedObjective(*given, nest=nest, seed=seed, strings=strings)
                at_once = objective.at_once
        loop = Loop(
            objective=objective,
            parameters=parameters,
            training=rows,
            selection=judged,
            rewrites=rewrites,
            settings=settings,
            processes=shared,
            device=device,
            rows=max(1, batch_tokens // width),
            forward_tokens=forward_tokens or max(1, tokens_at_once(device) // at_once),
            progress=progress,
        )
        with ExitStack() as switched:
            switched.enter_context(training(model, list(parameters.values()), attention=attention, dropout=dropout))
            switched.enter_context(zeros_held(zeros))
            if teacher is not None:
                teacher.to(device)  # type: ignore[arg-type]
                own = teacher.config._attn_implementation
                switched.enter_context(training(teacher, [], attention=own, dropout=False))
            loop.begin(state_folder, resume)
            loop.run(state_folder, checkpoint_every)
            loop.restore_best()
        trainable = sum(parameter.numel() for parameter in parameters.values())
    for rewrite in rewrites:
        rewrite.finish(model)
    return Recovery(
        train=mode,
        trainable=trainable,
        steps=steps,
        best_step=loop.best_step,
        curve=tuple(loop.curve),
        evaluations=tuple(loop.evaluations),
        tokens=loop.tokens,
        seconds=loop.seconds,
        training_seconds=loop.training_seconds,
        settings={
            **settings,
            "attention": attention,
            "processes": shared.world,
            "device": device.type,
            "threads": torch.get_num_threads(),
        },
    )


def _check_models(model: GPT2LMHeadModel, teacher: GPT2LMHeadModel | None) -> None:
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise UserError(f"the model is wrapped in {type(model).__name__}; for several devices start {LAUNCH}")
    if len({parameter.device for parameter in model.parameters()}) > 1:
        raise UserError(f"the model is spread over several devices; for several devices start {LAUNCH}")
    if model.dtype not in (torch.float32, torch.float64):
        given = str(model.dtype).removeprefix("torch.")
        raise UserError(f"recovery trains float32 weights, these are {given}; leave --dtype out, bfloat16 is autocast")
    if teacher is not None and teacher.config.vocab_size != model.config.vocab_size:
        raise UserError(
            f"the teacher has {teacher.config.vocab_size} tokens, the model {model.config.vocab_size}; "
            "distillation needs the same vocabulary"
        )


# setting -> the least it may be, and the most
_RANGES = {
    "steps": (1, math.inf),
    "batch_tokens": (1, math.inf),
    "evaluate_every": (1, math.inf),
    "checkpoint_every": (1, math.inf),
    "forward_tokens": (1, math.inf),
    "warm_up": (0, math.inf),
    "learning_rate": (0, math.inf),
    "penalty": (0, math.inf),
    "weight_decay": (0, math.inf),
    "clip": (0, math.inf),
    "mix": (0, 1),
}


def _check_numbers(settings: Mapping[str, Any]) -> None:
    for name, (least, most) in _RANGES.items():
        value = settings[name]
        if value is not None and not least <= value <= most:  # NaN is neither
            allowed = f"{least} or more" if most == math.inf else f"{least} to {most}"
            raise UserError(f"{name} is {value}; allowed: {allowed}")


def _memory_of(model: GPT2LMHeadModel) -> set[int]:
    return {parameter.data_ptr() for parameter in model.parameters()}


@contextmanager
def _trainable(
    model: GPT2LMHeadModel,
    mode: str,
    rewrites: Sequence[Rewrite],
    settings: dict[str, Any],
    zeros: Sequence[tuple[nn.Parameter, Tensor]],
) -> Iterator[dict[str, nn.Parameter]]:
    """The parameters to train by name; adapters are merged at a good end and dropped at a bad one."""
    if mode == "lora":
        generator = torch.Generator().manual_seed(mixed_seed(settings["seed"], 1))
        rank, alpha = settings["rank"], settings["alpha"]
        wanted = lora.attach(model, rank=rank, alpha=alpha, generator=generator, zeros=zeros)
    elif mode == "deltas":
        wanted = [parameter for rewrite in rewrites for parameter in rewrite.trainable(model)]
    else:
        wanted = list(model.parameters())
    if mode != "full":
        wanted = [*wanted, *(parameter for rewrite in rewrites for parameter in rewrite.beside_adapters(model))]
    chosen = {id(parameter) for parameter in wanted}
    try:
        yield {name: parameter for name, parameter in model.named_parameters() if id(parameter) in chosen}
        if mode == "lora":
            lora.merge(model)
    finally:
        if mode == "lora":
            lora.detach(model)
