"""The seam: what a rewrite is. A new one is a file here and a line in `REWRITES`."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from .. import fields, gpt2
from ..alignment import Alignments
from ..capture import Batch, capture
from ..correlation import SecondMoments
from ..data import TokenBlocks
from ..errors import UserError
from ..modeling.fractal import Part
from ..modeling.nesting import Size
from ..token_groups import Strings
from ..windows import Window, anchor_layer, check_length, middle_start, tiles, window
from .hierarchy import Emergent, Imposed


@dataclass
class Statistics:
    """What fits of one original on one calibration text have in common, taken once: moments by layer and site, and the
    hidden states that enter a layer, one tensor a calibration batch."""

    moments: dict[tuple[int, str], SecondMoments] = field(default_factory=dict)
    states: dict[int, list[Tensor]] = field(default_factory=dict)

    def forget(self, below: int, *, but: Collection[int] = ()) -> None:
        """Drop the moments of the layers below one, which no later fit of a search asks for."""
        for layer, site in list(self.moments):
            if layer < below and layer not in but:
                del self.moments[layer, site]


@dataclass
class FitContext:
    """What a rewrite may use to fill its weights."""

    original: GPT2LMHeadModel
    alignments: Alignments
    calibration: TokenBlocks | None  # None: no statistics can be taken (shape and count work)
    generator: torch.Generator
    layers: dict[int, int]  # original layer -> layer of the result, for the layers that stay
    progress: Callable[[str], None] = lambda message: None
    statistics: Statistics | None = None  # shared with other fits; None: nothing outlives its use

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Calibration batches on the model's device: ids int64[rows, context], mask bool[rows, context]."""
        if self.calibration is None:
            raise UserError("this rewrite is fitted on calibration text, and none was given; give --data")
        device = gpt2.device(self.original)
        for ids, mask in self.calibration.batches():
            yield ids.to(device), mask.to(device)

    @torch.no_grad()
    def entering(self, layer: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Calibration batches as the hidden states that enter a block of the original: float[rows, context, d], mask
        bool[rows, context]. Shared statistics keep them, and go on from where an earlier call left off below."""
        if self.statistics is None:
            for ids, mask in self.batches():
                yield gpt2.run_blocks(self.original, gpt2.embed(self.original, ids), 0, layer), mask
            return
        states = self.statistics.states
        if layer not in states:
            below = max((known for known in states if known < layer), default=None)
            held = [gpt2.embed(self.original, ids) for ids, _ in self.batches()] if below is None else states.pop(below)
            states[layer] = [gpt2.run_blocks(self.original, hidden, below or 0, layer) for hidden in held]
        yield from ((hidden, mask) for hidden, (_, mask) in zip(states[layer], self.batches(), strict=True))

    def moments(self, layers: Sequence[int], site: str) -> dict[int, SecondMoments]:
        """Mean and covariance of a site of the original's blocks (see `capture`), in one pass; 8 width^2 bytes each."""
        known = {} if self.statistics is None else self.statistics.moments
        missing = [layer for layer in layers if (layer, site) not in known]
        if missing:
            config = self.original.config
            width = gpt2.d_ff(config) if site in ("pre", "post") else config.n_embd
            taken = {(layer, site): SecondMoments(width, device=gpt2.device(self.original)) for layer in missing}
            self.progress(f"second moments of layers {missing[0]} to {missing[-1]} ({site})")
            capture(
                self.original,
                self.entering(min(missing)),
                lambda layer, where, x: taken[layer, where].update(x),
                sites=(site,),
                layers=missing,
                start=min(missing),
            )
            known.update(taken)
        return {layer: known[layer, site] for layer in layers}


@dataclass(frozen=True)
class Nest:
    """Sizes of one model that are trained together, the whole one first.

    train: joint, all of them at every step; sandwich, the first, the smallest and one drawn; one, each in its turn.
    inner: the share of the whole size's own predictions, as KL, in the loss of the others; next tokens have the rest.
    groups: of tokens, whose loss sizes that read a prefix of the final state learn by too.
    """

    sizes: tuple[Size, ...]
    train: str
    inner: float
    groups: Imposed | Emergent | None = None


@dataclass(frozen=True)
class Divided:
    """Models side by side in one, trained together with it.

    stream: what makes a block of text a part's own, its place among the blocks of a step (rows) or what it is like
    (cluster). share: own, a part learns from its own blocks alone; all. inner: as of Nest.
    """

    parts: tuple[Part, ...]
    stream: str
    share: str
    inner: float


@dataclass(frozen=True)
class Rewrite(ABC):
    """A change of structure and the fit that goes with it. Its fields are the recipe's parameters."""

    name: ClassVar[str]

    # ------------------------------------------------------------ structure

    @abstractmethod
    def sites(self, base: GPT2Config) -> frozenset[str]:
        """The leaves this rewrite takes over, such as "h.4.mlp.c_fc"; no other rewrite of the recipe may claim them."""

    def config(self, base: GPT2Config) -> GPT2Config:
        """The structure of the result before any layer is removed: a plain GPT2Config where GPT-2 can express it."""
        return base

    def check(self, base: GPT2Config) -> None:  # noqa: B027 (most have nothing to add)
        """Raise UserError for parameters that this model cannot take. Runs before anything else does."""

    def removed(self, base: GPT2Config) -> frozenset[int]:
        """The layers that the result no longer has. They are taken out after the structures of all rewrites."""
        return frozenset()

    def resolved(self, base: GPT2Config) -> Rewrite:
        """This rewrite with every choice that depends on the model's config made (rules become layers)."""
        return self

    @property
    def undecided(self) -> bool:
        """Whether text has yet to say which layers it takes: a search (start=best), or the calibration (`chosen`)."""
        return False

    def supposed(self, base: GPT2Config, taken: frozenset[str]) -> Rewrite:
        """With some choice in place of the one that calibration text will make, clear of the sites `taken`: what a
        plan counts with. Raises UserError where there is no room."""
        return self

    def chosen(self, context: FitContext, taken: frozenset[str]) -> Rewrite:
        """With every choice that depends on calibration text made, clear of the sites `taken` by other rewrites."""
        return self

    # ------------------------------------------------------------ weights

    @abstractmethod
    def fit(self, model: GPT2LMHeadModel, context: FitContext) -> None:
        """Fill the weights of the freshly built model that this rewrite is responsible for."""

    # ------------------------------------------------------------ training and export

    def trainable(self, model: GPT2LMHeadModel) -> list[nn.Parameter]:
        """What `--train deltas` tunes."""
        return []

    def zeros(self, model: GPT2LMHeadModel) -> list[tuple[nn.Parameter, Tensor]]:
        """Weights of linears with a mask (bool, of their shape) of the entries that every training must leave at 0."""
        return []

    def beside_adapters(self, model: GPT2LMHeadModel) -> list[nn.Parameter]:
        """What `--train deltas` and `--train lora` tune too: parameters of no linear, which adapters stand for."""
        return []

    def penalty(self, model: GPT2LMHeadModel) -> Tensor | None:
        """A term to add to the training loss, already normalised."""
        return None

    def nest(self, model: GPT2LMHeadModel) -> Nest | Divided | None:
        """The sizes or parts of a model that a recovery trains together; None where it is one model."""
        return None

    def on_step(self, model: GPT2LMHeadModel, progress: float) -> None:  # noqa: B027
        """Called at every training step with progress 0..1, which is 1 at the last."""

    def anneals(self, model: GPT2LMHeadModel) -> bool:
        """Whether `on_step` changes this model: what it is before the last step is not what it is to be."""
        return type(self).on_step is not Rewrite.on_step

    def finish(self, model: GPT2LMHeadModel) -> None:  # noqa: B027
        """Called once when a recovery ends: takes away, in place, what was there for the way only."""

    def finished(self, config: GPT2Config) -> GPT2Config:
        """The structure of a result of this rewrite when a recovery has ended."""
        return config

    def fold(self, model: GPT2LMHeadModel) -> GPT2LMHeadModel | None:
        """The same function without this rewrite's structure: plain GPT-2 where no other has one. None where it has
        none of its own. Raises UserError, which says why, where it is not linear."""
        return None

    def diagnose(
        self, model: GPT2LMHeadModel, batches: Iterable[Batch], strings: Strings = ()
    ) -> dict[str, Any] | None:
        """What a reader of its report should know of a model made by this rewrite, found on calibration text (ids and
        mask as `capture` takes them); values of JSON. strings: what the tokens of the vocabulary stand for. None where
        there is nothing; then no batch is asked for."""
        return None

    @classmethod
    @abstractmethod
    def neutral(cls, base: GPT2Config) -> Rewrite | None:
        """The setting that reproduces the original, None if there is none."""

    # ------------------------------------------------------------ records

    def record(self) -> dict[str, Any]:
        """The fields as config.json and the recipe hold them."""
        return {"rewrite": self.name, **dataclasses.asdict(self)}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Rewrite:
        """The rewrite of a record's fields. Raises UserError for an unknown key or a wrong type."""
        return fields.from_record(cls, {key: value for key, value in record.items() if key != "rewrite"}, cls.name)


@dataclass(frozen=True)
class WindowRewrite(Rewrite):
    """A rewrite of windows of n consecutive blocks: one from `start`, or the whole model in tiles."""

    n: int = 4
    start: int | Literal["best"] | None = None  # None: the middle window
    anchor: int | Literal["first", "middle", "last"] = "middle"
    scope: Literal["window", "tile"] = "window"

    @property
    def undecided(self) -> bool:
        return self.start == "best"

    def windows(self, base: GPT2Config) -> list[Window]:
        """The windows, in layer order."""
        if self.scope == "tile":
            return tiles(base.n_layer, self.n, self.anchor)
        start = middle_start(base.n_layer, self.n) if self.start is None else self.start
        if isinstance(start, str):
            raise UserError(f"{self.name}: start={start} needs a window search; give a layer")
        return [window(base.n_layer, start, self.n, self.anchor)]

    def layers(self, base: GPT2Config) -> list[int]:
        """The layers of all windows."""
        return [layer for item in self.windows(base) for layer in item.layers]

    def check(self, base: GPT2Config) -> None:
        check_length(base.n_layer, self.n)
        if self.scope == "tile" and self.start is not None:
            raise UserError(f"{self.name}: start={self.start} with scope=tile; tiles begin at layer 0, leave start out")
        if not self.undecided:
            self.windows(base)

    def resolved(self, base: GPT2Config) -> Rewrite:
        check_length(base.n_layer, self.n)
        if self.scope == "tile" or self.undecided:
            return self
        start = middle_start(base.n_layer, self.n) if self.start is None else int(self.start)
        return dataclasses.replace(self, start=start, anchor=anchor_layer(self.anchor, start, self.n))


LINEAR_SITES = (*(f"attn.{part}" for part in "qkvo"), *(f"mlp.{linear}" for linear in gpt2.FFN_LINEARS))
FFN_SITES = ("ln_2", *(f"mlp.{linear}" for linear in gpt2.FFN_LINEARS))
BLOCK_SITES = ("ln_1", "attn.scores", "ln_2", *LINEAR_SITES)


def sites_of(layers: Iterable[int], leaves: Sequence[str]) -> frozenset[str]:
    """The leaves of every block of some layers."""
    return frozenset(f"h.{layer}.{leaf}" for layer in layers for leaf in leaves)


def layers_of(layers: list | None, base: GPT2Config) -> list[int]:
    """The layers that a rewrite's `layers` stands for, ascending; None is all."""
    return list(range(base.n_layer)) if layers is None else sorted(layers)


def check_layers(name: str, layers: list | None, base: GPT2Config) -> None:
    """Raises UserError, which names the rewrite, for `layers` that are not different ones of the model; None is all."""
    if layers is not None and (
        not layers
        or any(type(layer) is not int or not 0 <= layer < base.n_layer for layer in layers)
        or len(set(layers)) < len(layers)
    ):
        raise UserError(f"{name}: layers is {layers}; allowed: different layers from 0 to {base.n_layer - 1}")
