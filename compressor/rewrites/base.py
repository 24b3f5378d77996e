"""The seam: what a rewrite is. A new one is a file here and a line in `REWRITES`."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from .. import fields, gpt2
from ..alignment import Alignments
from ..capture import capture
from ..correlation import SecondMoments
from ..data import TokenBlocks
from ..errors import UserError
from ..windows import Window, anchor_layer, check_length, middle_start, tiles, window


@dataclass
class FitContext:
    """What a rewrite may use to fill its weights."""

    original: GPT2LMHeadModel
    alignments: Alignments
    calibration: TokenBlocks | None  # None: no statistics can be taken (shape and count work)
    generator: torch.Generator
    layers: dict[int, int]  # original layer -> layer of the result, for the layers that stay
    progress: Callable[[str], None] = lambda message: None

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Calibration batches on the model's device: ids int64[rows, context], mask bool[rows, context]."""
        if self.calibration is None:
            raise UserError("this rewrite is fitted on calibration text, and none was given; give --data")
        device = gpt2.device(self.original)
        for ids, mask in self.calibration.batches():
            yield ids.to(device), mask.to(device)

    def moments(self, layers: Sequence[int], site: str) -> dict[int, SecondMoments]:
        """Mean and covariance of a site of the original's FFNs, taken in one pass; 8 width^2 bytes a layer."""
        config = self.original.config
        width = config.n_embd if site in ("input", "output") else gpt2.d_ff(config)
        taken = {layer: SecondMoments(width, device=gpt2.device(self.original)) for layer in layers}
        self.progress(f"second moments of layers {layers[0]} to {layers[-1]} ({site})")
        capture(self.original, self.batches(), lambda layer, _, x: taken[layer].update(x), sites=(site,), layers=layers)
        return taken


@dataclass(frozen=True)
class Rewrite(ABC):
    """A change of structure and the fit that goes with it. Its fields are the recipe's parameters."""

    name: ClassVar[str]
    depth: ClassVar[bool] = False  # removes layers: its structure is applied after all others

    # ------------------------------------------------------------ structure

    @abstractmethod
    def sites(self, base: GPT2Config) -> frozenset[str]:
        """The leaves this rewrite takes over, such as "h.4.mlp.c_fc"; no other rewrite of the recipe may claim them."""

    @abstractmethod
    def config(self, base: GPT2Config) -> GPT2Config:
        """The structure of the result: a plain GPT2Config where GPT-2 can express it. Layers count as in `base`."""

    def check(self, base: GPT2Config) -> None:  # noqa: B027 (most have nothing to add)
        """Raise UserError for parameters that this model cannot take. Runs before anything else does."""

    def removed(self, base: GPT2Config) -> frozenset[int]:
        """The layers that the result no longer has."""
        return frozenset()

    def resolved(self, base: GPT2Config) -> Rewrite:
        """This rewrite with every choice that depends on the model made (rules become layers)."""
        return self

    # ------------------------------------------------------------ weights

    @abstractmethod
    def fit(self, model: GPT2LMHeadModel, context: FitContext) -> None:
        """Fill the weights of the freshly built model that this rewrite is responsible for."""

    # ------------------------------------------------------------ training and export

    def trainable(self, model: GPT2LMHeadModel) -> list[nn.Parameter]:
        """What `--train deltas` tunes."""
        return []

    def penalty(self, model: GPT2LMHeadModel) -> Tensor | None:
        """A term to add to the training loss, already normalised."""
        return None

    def on_step(self, model: GPT2LMHeadModel, progress: float) -> None:  # noqa: B027
        """Called at every training step with progress 0..1."""

    def fold(self, model: GPT2LMHeadModel) -> GPT2LMHeadModel | None:
        """The same function as a dense plain GPT-2, where this rewrite is linear; None where it is not."""
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

    def windows(self, base: GPT2Config) -> list[Window]:
        """The windows, in layer order."""
        if self.scope == "tile":
            return tiles(base.n_layer, self.n, self.anchor)
        start = middle_start(base.n_layer, self.n) if self.start is None else self.start
        if isinstance(start, str):
            raise UserError(f"{self.name}: start={start} needs a window search; give a layer")
        return [window(base.n_layer, start, self.n, self.anchor)]

    def check(self, base: GPT2Config) -> None:
        check_length(base.n_layer, self.n)
        if self.scope == "tile" and self.start is not None:
            raise UserError(f"{self.name}: start={self.start} with scope=tile; tiles begin at layer 0, leave start out")
        if self.start != "best":
            self.windows(base)

    def resolved(self, base: GPT2Config) -> Rewrite:
        check_length(base.n_layer, self.n)
        if self.scope == "tile" or self.start == "best":
            return self
        start = middle_start(base.n_layer, self.n) if self.start is None else int(self.start)
        return dataclasses.replace(self, start=start, anchor=anchor_layer(self.anchor, start, self.n))


FFN_SITES = ("ln_2", *(f"mlp.{linear}" for linear in gpt2.FFN_LINEARS))
BLOCK_SITES = ("ln_1", *(f"attn.{part}" for part in ("q", "k", "v", "o", "scores")), *FFN_SITES)


def sites_of(windows: Sequence[Window], leaves: Sequence[str]) -> frozenset[str]:
    """The leaves of every block of some windows."""
    return frozenset(f"h.{layer}.{leaf}" for item in windows for layer in item.layers for leaf in leaves)
