"""Step 3 for a target size: several windows jointly.

The harm of single windows is added up, as if windows did not interact; dynamic programming finds the sets of windows
that save enough for the least of it; the best few are then rewritten and measured for real.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from transformers import GPT2LMHeadModel

from . import models
from .alignment import Alignments
from .data import TokenBlocks
from .errors import UserError
from .fields import parameter_count
from .metrics.size import parameters
from .rewrites import Rewrite
from .rewrites.compose import structure
from .search import PlanScorer, allowed_windows, placed
from .windows import AllGather, Candidate, Keep, Plan, Race, SearchResult, Window, compared, search


@dataclass(frozen=True)
class Estimate:
    """A plan before it is measured."""

    windows: Plan
    nll: float  # nats per token: the original's plus the harm of each window alone
    parameters: int  # of the model it makes


@dataclass(frozen=True)
class PlanResult:
    """What a search for a target size found."""

    singles: SearchResult  # each window alone, and the original as the empty plan
    estimates: tuple[Estimate, ...]  # the best plans by added harm, the least first
    verified: SearchResult  # the same plans, really rewritten

    @property
    def best(self) -> Estimate:
        """The plan with the lowest measured score, with its size."""
        windows = self.verified.winner.windows
        return next(item for item in self.estimates if item.windows == windows)

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """Single windows and plans, each once, and how far behind the best plan they are: less than 0 is possible."""
        both = {item.windows: item for item in (*self.singles.candidates, *self.verified.candidates)}
        return compared(both.values(), self.verified.winner, self.verified.block_tokens)


def search_plan(
    rewrite: Rewrite,
    original: GPT2LMHeadModel,
    alignments: Alignments,
    selection: TokenBlocks,
    target_parameters: int | float | str,
    *,
    sizes: Sequence[int] | None = None,
    top: int = 5,
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
) -> PlanResult:
    """The windows to rewrite so that the model has `target_parameters` or fewer, with the least harm.

    sizes: the `n` that windows may have (default: the rewrite's own). top: how many plans are measured. race: among
    these; single windows are all scored on the whole selection text, for their scores are added up. Otherwise as
    `search.search_windows`; `known` and what `keep` is given hold single windows and plans. Raises UserError for a
    target that no plan reaches.
    """
    target, base, known = parameter_count("target_parameters", target_parameters), original.config, tuple(known)

    def size(plan: Plan) -> int:
        made = [*others, *(placed(rewrite, window) for window in plan)]
        return parameters(models.build(structure(made, base)))

    whole = size(())
    if target >= whole:
        raise UserError(f"target_parameters={target:,} is no reduction; the model has {whole:,} without any window")
    windows = [
        window
        for n in (sorted(set(sizes)) if sizes else [None])
        for window in allowed_windows(rewrite, base, others, n=n)
    ]
    saved = {window: whole - size((window,)) for window in windows}
    least = whole - most_saved([Choice(window, 0.0, saved[window]) for window in windows])
    if target < least:
        lengths = " or ".join(str(n) for n in sorted({window.n for window in windows}))
        raise UserError(
            f"target_parameters={target:,} is out of reach for {rewrite.name} with windows of n={lengths}; "
            f"allowed: {least:,} or more"
        )
    scorer = PlanScorer(
        rewrite, original, alignments, selection, calibration=calibration, others=others, seed=seed, progress=progress
    )

    def score(plans: Sequence[Plan], race: Race | None, keep: Keep) -> SearchResult:
        return search(
            plans,
            scorer.block_tokens,
            scorer,
            race=race,
            known=known,
            keep=keep,
            rank=rank,
            world=world,
            all_gather=all_gather,
        )

    singles = score([(), *((window,) for window in windows)], None, keep)
    nll = {item.windows: item.nll for item in singles.candidates}
    choices = [Choice(window, nll[window,] - nll[()], saved[window]) for window in windows]
    found = best_plans(choices, whole - target, top)
    if not found:
        raise UserError("no plan has a finite score; the model gives NaN or infinite numbers, try --dtype float32")
    estimates = []
    for chosen in found:
        plan = tuple(choice.window for choice in chosen)
        estimates.append(Estimate(plan, nll[()] + math.fsum(choice.cost for choice in chosen), size(plan)))
    known = (*known, *singles.candidates)
    verified = score(
        [item.windows for item in estimates],
        race,
        lambda result: keep(SearchResult((*singles.candidates, *result.candidates), result.block_tokens)),
    )
    return PlanResult(singles, tuple(estimates), verified)


# ---------------------------------------------------------------- which windows


@dataclass(frozen=True)
class Choice:
    """A window that a plan may have: what it costs (nats per token) and how many parameters it saves."""

    window: Window
    cost: float
    saved: int


def best_plans(choices: Sequence[Choice], needed: int, count: int) -> list[tuple[Choice, ...]]:
    """The `count` cheapest sets of windows that do not overlap and save `needed` parameters or more, cheapest first,
    costs taken as additive. Exact: dynamic programming over layers and parameters saved, with the best of each state.
    Empty when none saves so much."""
    last = max((item.window.layers.stop for item in choices), default=0)
    # per layer: parameters saved below it (more than needed is needed) -> the cheapest plans, as (cost, choices)
    best: list[dict[int, list[tuple[float, tuple[Choice, ...]]]]] = [{0: [(0.0, ())]}]
    for layer in range(1, last + 1):
        here = {saved: list(plans) for saved, plans in best[layer - 1].items()}
        for choice in choices:
            if choice.window.layers.stop == layer and math.isfinite(choice.cost):
                for saved, plans in best[choice.window.start].items():
                    reached = min(needed, saved + choice.saved)
                    here.setdefault(reached, []).extend((cost + choice.cost, (*own, choice)) for cost, own in plans)
        best.append({saved: sorted(plans, key=_by_cost)[:count] for saved, plans in here.items()})
    return [plan for _, plan in best[-1].get(max(needed, 0), [])]


def most_saved(choices: Sequence[Choice]) -> int:
    """The most parameters that windows which do not overlap can save."""
    best = [0]
    for layer in range(1, max((item.window.layers.stop for item in choices), default=0) + 1):
        ending = (best[item.window.start] + item.saved for item in choices if item.window.layers.stop == layer)
        best.append(max(best[-1], *ending, 0))
    return best[-1]


def _by_cost(entry: tuple[float, tuple[Choice, ...]]) -> tuple[float, tuple[int, ...]]:
    cost, plan = entry
    return cost, tuple(choice.window.start for choice in plan)
