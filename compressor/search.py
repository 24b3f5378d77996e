"""Step 3 on a real model: what the selection text says right after the very rewrite that will be used.

A window leaves the blocks below it as they are. So the hidden states of the selection text go through the model once,
block by block, and a candidate runs only what follows: the rewritten model's blocks from its window on, and the head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from . import gpt2
from .alignment import Alignments
from .data import TokenBlocks
from .errors import UserError
from .metrics.nll import hidden_nll
from .rewrites import Rewrite
from .rewrites.base import Statistics, WindowRewrite
from .rewrites.compose import apply, check, layer_map
from .windows import AllGather, Candidate, Keep, Plan, Race, SearchResult, Window, candidates, search

BATCH_TOKENS = 2048


def search_windows(
    rewrite: Rewrite,
    original: GPT2LMHeadModel,
    alignments: Alignments,
    selection: TokenBlocks,
    *,
    strategy: str = "all",
    count: int = 1,
    race: Race | None = None,
    calibration: TokenBlocks | None = None,
    others: Sequence[Rewrite] = (),
    seed: int = 0,
    known: Iterable[Candidate] = (),
    keep: Keep = lambda result: None,
    rank: int = 0,
    world: int = 1,
    all_gather: AllGather | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> SearchResult:
    """Score the windows that `rewrite` may take, whatever its own start is; the winner is where it does least harm.

    strategy, count, seed: see `windows.candidates`. race, known, keep, rank, world, all_gather: see `windows.search`.
    others: what else the recipe does, resolved; windows that overlap with it are left out. The original must be in
    evaluation mode. Raises UserError for a rewrite that has no window to search and what `candidates` refuses.
    """
    base = original.config
    found = allowed_windows(rewrite, base, others, strategy=strategy, count=count, seed=seed)
    scorer = PlanScorer(
        rewrite, original, alignments, selection, calibration=calibration, others=others, seed=seed, progress=progress
    )
    return search(
        [(window,) for window in found],
        scorer.block_tokens,
        scorer,
        race=race,
        known=known,
        keep=keep,
        rank=rank,
        world=world,
        all_gather=all_gather,
    )


def score_original(
    rewrite: Rewrite,
    original: GPT2LMHeadModel,
    alignments: Alignments,
    selection: TokenBlocks,
    *,
    calibration: TokenBlocks | None = None,
    others: Sequence[Rewrite] = (),
    seed: int = 0,
) -> Candidate:
    """The model as it is without the rewrite, as the empty plan: no competitor of the windows, but what each is to be
    measured by. Arguments as of `search_windows`."""
    scorer = PlanScorer(rewrite, original, alignments, selection, calibration=calibration, others=others, seed=seed)
    (nll,) = scorer([()], range(len(selection.ids)))
    return Candidate((), tuple(nll), sum(scorer.block_tokens))


def allowed_windows(
    rewrite: Rewrite,
    base: GPT2Config,
    others: Sequence[Rewrite] = (),
    *,
    n: int | None = None,
    strategy: str = "all",
    count: int = 1,
    seed: int = 0,
) -> list[Window]:
    """The windows of `n` (default: the rewrite's) that do not overlap with the sites of `others`, all checked.

    Raises UserError for a rewrite that has no window to search, what `windows.candidates` refuses, and no window left.
    """
    if not isinstance(rewrite, WindowRewrite) or rewrite.scope != "window":
        raise UserError(f"{rewrite.name} as given has no window to search for; leave the search out")
    n = rewrite.n if n is None else n
    found = candidates(base.n_layer, n, rewrite.anchor, strategy=strategy, count=count, seed=seed)
    taken = frozenset[str]().union(*(other.sites(base) for other in others))
    free = [window for window in found if not taken & placed(rewrite, window).sites(base)]
    if not free:
        raise UserError(f"{rewrite.name}: every window of n={n} overlaps with the other rewrites")
    for window in free:
        check([*others, placed(rewrite, window)], base)
    return free


def placed(rewrite: Rewrite, window: Window) -> Rewrite:
    """The rewrite of this window."""
    return dataclasses.replace(rewrite, start=window.start, n=window.n, anchor=window.anchor)  # type: ignore[call-arg]


class PlanScorer:
    """What `windows.search` is given: the NLL of each selection block right after a rewrite of a plan's windows.

    No model is copied: a candidate's model shares all that the rewrite leaves alone with the original. It is dropped
    when it has been scored on the last block, or is no longer among the plans (a race holds those still in it).
    """

    def __init__(
        self,
        rewrite: Rewrite,
        original: GPT2LMHeadModel,
        alignments: Alignments,
        selection: TokenBlocks,
        *,
        calibration: TokenBlocks | None = None,
        others: Sequence[Rewrite] = (),
        seed: int = 0,
        batch_tokens: int = BATCH_TOKENS,
        progress: Callable[[str], None] = lambda message: None,
    ):
        if original.training:
            raise ValueError("the original must be in evaluation mode")
        self.rewrite, self.original, self.alignments, self.selection = rewrite, original, alignments, selection
        self.calibration, self.others, self.seed, self.progress = calibration, tuple(others), seed, progress
        self._rows = max(1, batch_tokens // selection.ids.shape[1])
        self._layers = layer_map(self.others, original.config)
        self._others_layers = _layers_of(self.others, original.config)
        self._statistics = Statistics()
        self._models: dict[Plan, GPT2LMHeadModel] = {}
        self._host = self._apply(self.others) if self.others else original  # the model without any plan

    @property
    def block_tokens(self) -> tuple[int, ...]:
        """Tokens scored in each block: all but its first."""
        return tuple(self.selection.mask[:, 1:].sum(1).tolist())

    def model(self, plan: Plan) -> GPT2LMHeadModel:
        """The model that a plan makes."""
        if not plan:
            return self._host
        return self._apply([*self.others, *(placed(self.rewrite, window) for window in plan)])

    def __call__(self, plans: Sequence[Plan], blocks: range) -> Iterator[tuple[float, ...]]:
        """Nats summed over each block of the range, for each plan; plans by ascending first layer."""
        self._models = {plan: model for plan, model in self._models.items() if plan in plans}
        batches = self._batches(blocks)
        layer = 0
        for plan in plans:
            entry = self._layers[plan[0].start] if plan else self._host.config.n_layer
            if entry < layer:
                raise ValueError("plans must come by ascending first layer")
            self._advance(batches, layer, entry)
            layer = entry
            model = self._models.pop(plan, None)
            if model is None:
                self.progress(f"rewrite of {describe(plan)}")
                model = self.model(plan)
                if plan:
                    self._statistics.forget(plan[0].start, but=self._others_layers)
            self.progress(f"selection text after {describe(plan)}")
            yield self._nll(model, batches, entry)
            if blocks.stop < len(self.selection.ids):
                self._models[plan] = model

    def _apply(self, rewrites: Sequence[Rewrite]) -> GPT2LMHeadModel:
        return apply(
            rewrites,
            self.original,
            self.alignments,
            calibration=self.calibration,
            seed=self.seed,
            statistics=self._statistics,
        )

    @torch.no_grad()
    def _batches(self, blocks: range) -> list[_Batch]:
        device = gpt2.device(self.original)
        ids, mask = (tensor[blocks.start : blocks.stop] for tensor in (self.selection.ids, self.selection.mask))
        found = []
        for own_ids, own_mask in zip(ids.split(self._rows), mask.split(self._rows), strict=True):
            own_ids, own_mask = own_ids.to(device), own_mask.to(device)
            hidden = gpt2.embed(self._host, own_ids[:, :-1])  # the last token is a target only
            seen = None if own_mask.all() else own_mask[:, :-1].long()
            found.append(_Batch(own_ids[:, 1:], own_mask[:, 1:], seen, hidden))
        return found

    @torch.no_grad()
    def _advance(self, batches: Sequence[_Batch], start: int, stop: int) -> None:
        for batch in batches:
            batch.hidden = gpt2.run_blocks(self._host, batch.hidden, start, stop, batch.seen)

    @torch.no_grad()
    def _nll(self, model: GPT2LMHeadModel, batches: Sequence[_Batch], entry: int) -> tuple[float, ...]:
        sums: list[float] = []
        for batch in batches:
            hidden = gpt2.run_blocks(model, batch.hidden, entry, model.config.n_layer, batch.seen)
            hidden = gpt2.final_norm(model, hidden)[batch.wanted]
            nll = torch.zeros(batch.wanted.shape, dtype=torch.float64)
            nll[batch.wanted.cpu()] = hidden_nll(model, hidden, batch.targets[batch.wanted])
            sums += nll.sum(1).tolist()
        return tuple(sums)


@dataclasses.dataclass
class _Batch:
    """Some selection blocks on their way through the model."""

    targets: Tensor  # int64[rows, context - 1]
    wanted: Tensor  # bool[rows, context - 1], the targets that are real tokens
    seen: Tensor | None  # int64[rows, context - 1], the attention mask; None = no pads
    hidden: Tensor  # float[rows, context - 1, d], what enters the block reached


def describe(plan: Plan) -> str:
    """ "layers 4 to 7" """
    return ", ".join(f"layers {item.start} to {item.layers[-1]}" for item in plan) or "the original"


def _layers_of(rewrites: Sequence[Rewrite], base: GPT2Config) -> frozenset[int]:
    """The layers of the windows of some rewrites."""
    windows = [item for rewrite in rewrites if isinstance(rewrite, WindowRewrite) for item in rewrite.windows(base)]
    return frozenset(layer for item in windows for layer in item.layers)
