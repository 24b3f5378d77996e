"""Causal attentions beside each other, on the attention alone: what each takes, and how like exact softmax it is.

After klaipher/GPTAttentionsComparison, whose Linformer and Nystroemformer saw the future, whose Performer was no
estimate of softmax, and which compared outputs behind a random projection; here all are causal, the matrices are
compared, and time is that of all attentions taking turns in one process.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from ... import data, models
from ...artifacts import Provenance
from ...errors import UserError
from ...finetune import Step
from ...modeling.block_attention import BlockAttention, implied_weights
from ...modeling.performer import PerformerFar
from ...models import OpenModel
from ...rewrites.performer import missing_mass
from ...session import Columns, Session
from ..measured import Kept, MeasuredStudy
from ..outcome import Outcome, joined
from .character_models import TYPES
from .cost import cache_bytes, peak_bytes, times
from .figures import Cost, Match, Measured
from .inputs import Heads, chosen_layers, model_heads, random_heads
from .kinds import UNIFORM, Attend, Kind, attention_of, kinds, middle, only_likeness
from .likeness import exact_matrix, likeness, uniform_matrix
from .report import report_of
from .scratch import checked, from_scratch

SCRATCH = "from_scratch"  # the folder of what is trained


@dataclass(frozen=True)
class AttentionSettings:
    """lengths: of time and memory, for `heads` random heads of `head_dim`, batch 1. All sizes of the knobs (slots,
    landmarks, features) are measured at knob_length, the middle ones at every length. Matrices are of matrix_length
    tokens: of matrix_heads random heads, independent ones of each norm and correlated ones of the middle norm, and of
    layers of the model on `data`, as far as its positions go.

    attention_types: of what is trained from scratch, [] for nothing; scratch_block: its exact block; the other fields
    from block_size on are those of `from_scratch`."""

    lengths: list = field(default_factory=lambda: [256, 512, 1024, 2048, 4096, 8192])
    knob_length: int = 2048
    repeats: int = 10
    heads: int = 6
    head_dim: int = 64
    block: int = 64
    slots: list = field(default_factory=lambda: [1, 8, 32])
    landmarks: list = field(default_factory=lambda: [16, 32, 64])
    features: list = field(default_factory=lambda: [64, 128, 256])
    matrix_length: int = 1024
    matrix_heads: int = 2
    norms: list = field(default_factory=lambda: [4, 8, 16])
    correlations: list = field(default_factory=lambda: [0.9, 0.98])
    model: str = "demo"
    data: str = "demo"
    layers: list | None = None  # null: first, middle, last
    attention_types: list = field(default_factory=lambda: list(TYPES))
    block_size: int = 256
    max_iters: int = 2000
    batch_size: int = 4
    learning_rate: float = 1e-2
    n_layer: int = 2
    n_head: int = 2
    n_embd: int = 64
    scratch_block: int = 32
    attention_config: dict | None = None
    prompt: str | None = None

    def __post_init__(self) -> None:
        for name in ("lengths", "slots", "landmarks", "features"):
            _whole_numbers(name, getattr(self, name), 2 if name == "lengths" else 1)
        if self.layers is not None:
            _whole_numbers("layers", self.layers, 0)
        leasts = {"repeats": 1, "heads": 1, "head_dim": 1, "block": 1, "matrix_length": 2, "matrix_heads": 1}
        for name, least in leasts.items():
            if getattr(self, name) < least:
                raise UserError(f"attention: {name} is {getattr(self, name)}; allowed: {least} or more")
        if self.knob_length not in self.lengths:
            raise UserError(f"attention: knob_length is {self.knob_length}; allowed: one of lengths, {self.lengths}")
        if max(self.slots) > self.block:
            raise UserError(f"attention: slots is {self.slots}; allowed: 1 to {self.block} (block)")
        if any(size % 2 for size in self.features):
            raise UserError(f"attention: features is {self.features}; allowed: even numbers, some maps take pairs")
        if not self.norms:
            raise UserError("attention: norms is []; allowed: one or more numbers above 0")
        _numbers("norms", self.norms, lambda value: value > 0, "above 0")
        _numbers("correlations", self.correlations, lambda value: 0 < value < 1, "between 0 and 1")


def _whole_numbers(name: str, given: list, least: int) -> None:
    if not given or any(type(item) is not int or item < least for item in given) or given != sorted(set(given)):
        raise UserError(f"attention: {name} is {given}; allowed: ascending whole numbers from {least}")


def _numbers(name: str, given: list, fits: Callable[[float], bool], allowed: str) -> None:
    if any(type(item) not in (int, float) or not fits(item) for item in given) or len(set(given)) < len(given):
        raise UserError(f"attention: {name} is {given}; allowed: different numbers {allowed}")


@dataclass(frozen=True)
class _Subject:
    """The model whose heads are looked at, and one block of text."""

    base: OpenModel
    layers: list[int]
    ids: torch.Tensor
    columns: Columns


def _begin(settings: AttentionSettings, session: Session, columns: Columns) -> tuple[_Subject, Provenance]:
    if settings.attention_types:
        checked(**_scratch(settings), seed=session.seed)  # before anything is measured
    base = session.open(settings.model)
    layers = chosen_layers(settings.layers, base)
    text = data.recipe_text(settings.data, "calibration", text_column=columns.text_column, split=columns.split)
    context = min(settings.matrix_length, base.model.config.n_positions)
    if context <= settings.block:  # all attentions would be exact
        raise UserError(
            f"attention: block is {settings.block}; allowed: 1 to {context - 1}, below matrix_length and the positions "
            f"of {base.name}"
        )
    blocks = data.token_blocks(
        text, base.tokenizer, context=context, max_tokens=context, seed=session.seed, evenly=True
    )
    facts = {**data.describe(text), "tokens": blocks.tokens, "context": context}
    return _Subject(base, layers, blocks.ids, columns), session.origin(base, {"calibration": facts})


def _measure(settings: AttentionSettings, subject: _Subject, kept: Kept, session: Session) -> Outcome:
    every = kinds(settings.slots, settings.landmarks, settings.features)
    compared = [*every, *only_likeness(settings.slots, settings.features)]
    plans = {length: every if length == settings.knob_length else middle(every) for length in settings.lengths}
    inputs = _inputs(settings, subject, session)
    runs = {_at(length): (settings.repeats + 2) * len(plan) for length, plan in plans.items()}
    runs |= {heads.name: len(compared) for heads in inputs}
    total = sum(count for name, count in runs.items() if name not in kept.records)
    costs: list[Cost] = []
    matches: list[Match] = []
    with session.bar("attention", total=total, unit="run") as bar:
        for length, plan in plans.items():
            found = kept.get(_at(length), partial(_costs, settings, length, plan, session, bar.update))
            costs += (Cost(kind, length, **found[kind.name]) for kind in plan)
        for heads in inputs:
            found = kept.get(heads.name, partial(_matches, settings, heads, compared, session, bar.update))
            matches += (Match(kind=kind, heads=heads.name, **found[kind.name]) for kind in (*compared, UNIFORM))
    norms = {heads.name: heads.norms for heads in inputs}
    measured = report_of(Measured(dataclasses.asdict(settings), tuple(costs), tuple(matches), norms))
    return joined([measured, *_from_scratch(settings, subject, kept, session)])


def _scratch(settings: AttentionSettings) -> dict[str, Any]:
    """The settings of `from_scratch`."""
    names = ("attention_types", "block_size", "max_iters", "batch_size", "learning_rate", "n_layer", "n_head", "n_embd",
             "attention_config", "prompt")  # fmt: skip
    return {**{name: getattr(settings, name) for name in names}, "block": settings.scratch_block}


def _from_scratch(settings: AttentionSettings, subject: _Subject, kept: Kept, session: Session) -> list[Outcome]:
    if not settings.attention_types:
        return []
    total = settings.max_iters * len(settings.attention_types)
    with session.bar("from scratch", total=total, unit="step") as bar:

        def progress(attention_type: str, step: Step) -> None:
            bar.set_description(f"from scratch, {attention_type}", refresh=False)
            bar.update()

        made = from_scratch(
            settings.data,
            **_scratch(settings),
            seed=session.seed,
            device=session.device,
            columns=subject.columns,
            state=kept.file.parent / SCRATCH,
            progress=progress,
        )
    return [made]


def _at(length: int) -> str:
    return f"{length} tokens"


ATTENTION = MeasuredStudy(
    "attention", "Causal attentions: time, memory, likeness", AttentionSettings, _begin, _measure, (SCRATCH,)
)


# ---------------------------------------------------------------- measuring


@torch.no_grad()
def _costs(
    settings: AttentionSettings, length: int, plan: list[Kind], session: Session, step: Callable[[], object]
) -> dict[str, Any]:
    """Of each kind at a length, all taking turns."""
    shape = (1, settings.heads, length, settings.head_dim)
    generator = torch.Generator().manual_seed(session.seed)
    given = random_heads(shape, generator, norm=math.sqrt(settings.head_dim)).to(*_place(session))
    made = {kind.name: _made(settings, kind, given, session) for kind in plan}
    calls = {name: partial(_call, attend, given) for name, attend in made.items()}
    seconds = times(calls, settings.repeats, given.query.device, step=step)
    part = given.first(length - 1)  # the block under way is all but full: the most that is kept
    found = {}
    for name, attend in made.items():
        low, median, high = np.percentile(seconds[name], [25, 50, 75]).tolist()
        found[name] = {
            "low_ms": 1e3 * low,
            "median_ms": 1e3 * median,
            "high_ms": 1e3 * high,
            "peak_bytes": peak_bytes(calls[name], given.query.device),
            "cache_bytes": cache_bytes(attend, part.query, part.key, part.value, part.scaling),
        }
        step()
    return found


@torch.no_grad()
def _matches(
    settings: AttentionSettings, heads: Heads, compared: list[Kind], session: Session, step: Callable[[], object]
) -> dict[str, Any]:
    """Of each kind, and of uniform attention, on these heads."""
    given = heads.to(*_place(session))
    exact = exact_matrix(given.query, given.key, given.scaling)
    part = given.first(given.tokens - 1)
    found = {}
    for kind in compared:
        attend = _made(settings, kind, given, session)
        matrix = implied_weights(attend, given.query, given.key, scaling=given.scaling).float()
        figures = likeness(matrix, exact, given.value, _call(attend, given))
        kept = cache_bytes(attend, part.query, part.key, part.value, part.scaling)
        found[kind.name] = {**dataclasses.asdict(figures), "cache_bytes": kept}
        step()
    uniform = likeness(uniform_matrix(exact), exact, given.value)
    found[UNIFORM.name] = {**dataclasses.asdict(uniform), "cache_bytes": 0}
    return found


def _made(settings: AttentionSettings, kind: Kind, given: Heads, session: Session) -> Attend:
    """Of features that estimate no softmax the far part weighs as much as a rewrite lets it begin with: what these very
    heads ask for in the mean."""
    _, heads, tokens, head_dim = given.query.shape
    device, dtype = _place(session)
    attend = attention_of(kind, heads, head_dim, settings.block, session.seed)
    if not isinstance(attend, BlockAttention):
        return attend
    attend.to(device, dtype)
    far, whole = attend.far, tokens // settings.block * settings.block
    if isinstance(far, PerformerFar) and far.gain is not None and whole >= 2 * settings.block:
        query, key, value = (part[:, :, :whole].unflatten(2, (-1, settings.block)) for part in given.parts)
        far.gain.copy_(missing_mass(far, query, key, value, given.scaling).mean((0, 2, 3)))
    return attend


def _call(attend: Attend, given: Heads) -> torch.Tensor:
    return attend(*given.parts, scaling=given.scaling)


def _place(session: Session) -> tuple[torch.device, torch.dtype]:
    return models.parse_device(session.device), models.parse_dtype(session.dtype)


# ---------------------------------------------------------------- inputs


def _inputs(settings: AttentionSettings, subject: _Subject, session: Session) -> list[Heads]:
    generator = torch.Generator().manual_seed(session.seed)
    shape = (1, settings.matrix_heads, settings.matrix_length, settings.head_dim)
    norm = settings.norms[len(settings.norms) // 2]
    return [
        *(random_heads(shape, generator, norm=norm) for norm in settings.norms),
        *(random_heads(shape, generator, norm=norm, correlation=value) for value in settings.correlations),
        *model_heads(subject.base, subject.ids, subject.layers),
    ]
