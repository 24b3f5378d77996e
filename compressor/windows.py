"""Windows of consecutive blocks: what a rewrite is applied to, and step 3, the search for the best of them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from scipy.special import ndtr, stdtrit

from .errors import UserError, unknown

ANCHORS = ("first", "middle", "last")


@dataclass(frozen=True)
class Window:
    """`n` consecutive blocks from `start`; `anchor` is the layer whose neuron order the others take on."""

    start: int
    n: int
    anchor: int

    @property
    def layers(self) -> range:
        return range(self.start, self.start + self.n)


def middle_start(n_layer: int, n: int) -> int:
    """The start of the window of n in the middle of the model."""
    return (n_layer - n) // 2


def anchor_layer(anchor: str | int, start: int, n: int) -> int:
    """The anchor of a window as a layer. Raises UserError for an unknown rule or a layer outside the window."""
    if isinstance(anchor, int):
        if not start <= anchor < start + n:
            raise UserError(
                f"anchor {anchor} is outside the window; allowed: {start} to {start + n - 1}, or {', '.join(ANCHORS)}"
            )
        return anchor
    if anchor not in ANCHORS:
        raise unknown("anchor", str(anchor), ANCHORS)
    return {"first": start, "middle": start + (n - 1) // 2, "last": start + n - 1}[anchor]


def window(n_layer: int, start: int, n: int, anchor: str | int = "middle") -> Window:
    """One window. Raises UserError when it does not lie within the model's layers."""
    check_length(n_layer, n)
    if not 0 <= start <= n_layer - n:
        raise UserError(f"start {start} with n {n} is out of range for {n_layer} layers; allowed: 0 to {n_layer - n}")
    return Window(start, n, anchor_layer(anchor, start, n))


def tiles(n_layer: int, n: int, anchor: str | int = "middle") -> list[Window]:
    """The whole model in groups of n from layer 0; the last may be shorter, a rest of one layer stays as it is."""
    check_length(n_layer, n)
    if isinstance(anchor, int):
        raise UserError(f"anchor {anchor} with scope=tile: give a rule, one of {', '.join(ANCHORS)}")
    groups = [window(n_layer, start, min(n, n_layer - start), anchor) for start in range(0, n_layer, n)]
    return [group for group in groups if group.n > 1 or n == 1]


def check_length(n_layer: int, n: int) -> None:
    """Raises UserError unless a window of n fits into n_layer layers."""
    if not 1 <= n <= n_layer:
        raise UserError(f"n {n} is out of range for a model of {n_layer} layers; allowed: 1 to {n_layer}")


# ---------------------------------------------------------------- candidates

STRATEGIES = ("all", "middle", "random")
Plan = tuple[Window, ...]  # windows that do not overlap, in layer order; the empty plan is the original


def candidates(
    n_layer: int, n: int, anchor: str | int = "middle", *, strategy: str = "all", count: int = 1, seed: int = 0
) -> list[Window]:
    """The windows of n to look at, in layer order.

    all: every one that holds the anchor (a rule has one in each). middle: that in the middle. random: `count` of all,
    drawn without repetition by the seed. Raises UserError for an unknown strategy and for windows outside the model.
    """
    if strategy not in STRATEGIES:
        raise unknown("strategy", strategy, STRATEGIES)
    if strategy == "middle":
        return [window(n_layer, middle_start(n_layer, n), n, anchor)]
    check_length(n_layer, n)
    starts = [s for s in range(n_layer - n + 1) if not isinstance(anchor, int) or s <= anchor < s + n]
    if not starts:
        raise UserError(f"anchor {anchor} is out of range for {n_layer} layers; allowed: 0 to {n_layer - 1}")
    if strategy == "random":
        if not 1 <= count <= len(starts):
            raise UserError(f"count {count} is out of range for {len(starts)} windows; allowed: 1 to {len(starts)}")
        starts = sorted(random.Random(seed).sample(starts, count))
    return [window(n_layer, start, n, anchor) for start in starts]


# ---------------------------------------------------------------- scores


@dataclass(frozen=True)
class Candidate:
    """A plan and its score: negative log-likelihoods on the first so many selection blocks."""

    windows: Plan
    block_nll: tuple[float, ...]  # nats, summed over each block
    tokens: int  # scored in these blocks
    dropped: bool = False  # by the race; its score is of the blocks until then
    behind: float = 0.0  # nats per token more than the winner, on the blocks that both have seen
    error: float | None = None  # paired standard error of `behind`; None for the winner and with fewer than two blocks
    indistinguishable: bool = False  # `behind` is within what two standard errors of a normal are in Student's t

    @property
    def window(self) -> Window:
        """The window of a plan of one."""
        (only,) = self.windows
        return only

    @property
    def blocks(self) -> int:
        return len(self.block_nll)

    @property
    def nll(self) -> float:
        """Nats per token; infinite where the model gave no finite number, and without a block."""
        mean = math.fsum(self.block_nll) / self.tokens if self.tokens else math.inf
        return mean if math.isfinite(mean) else math.inf

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll) if self.nll < 700 else math.inf

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which knows no infinity and no NaN: such a value is null."""
        return {
            "windows": [asdict(item) for item in self.windows],
            "perplexity": _finite(self.perplexity),
            "nll": _finite(self.nll),
            "tokens": self.tokens,
            "blocks": self.blocks,
            "dropped": self.dropped,
            "behind": _finite(self.behind),
            "error": None if self.error is None else _finite(self.error),
            "indistinguishable": self.indistinguishable,
            "block_nll": [_finite(value) for value in self.block_nll],
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Candidate:
        """The inverse of `to_dict`; a null among the blocks becomes infinite."""
        return cls(
            windows=tuple(Window(**item) for item in record["windows"]),
            block_nll=tuple(math.inf if value is None else value for value in record["block_nll"]),
            behind=math.inf if record["behind"] is None else record["behind"],
            **{name: record[name] for name in ("tokens", "dropped", "error", "indistinguishable")},
        )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class SearchResult:
    """The score table, in the order in which the plans were given."""

    candidates: tuple[Candidate, ...]
    block_tokens: tuple[int, ...]  # tokens scored in each selection block

    @property
    def winner(self) -> Candidate:
        """The lowest score among those on the most blocks; of equals the first."""
        most = max(item.blocks for item in self.candidates)
        return min((item for item in self.candidates if item.blocks == most), key=lambda item: item.nll)

    @property
    def ranking(self) -> list[Candidate]:
        """The winner first, then by how far they are behind it."""
        winner = self.winner
        return [winner, *sorted((item for item in self.candidates if item is not winner), key=lambda item: item.behind)]


def paired_difference(
    own: Sequence[float], other: Sequence[float], tokens: Sequence[int]
) -> tuple[float, float | None]:
    """Mean of own - other in nats per token on the blocks that both have, and its standard error (a ratio estimator
    over blocks: the last may be shorter). No error with fewer than two blocks; infinite where a score is not finite."""
    blocks = min(len(own), len(other))
    total = sum(tokens[:blocks])
    differences = [a - b for a, b in zip(own[:blocks], other[:blocks], strict=True)]
    if not total or not all(map(math.isfinite, differences)):
        return math.inf, None
    mean = math.fsum(differences) / total
    if blocks < 2:
        return mean, None
    squares = math.fsum((d - mean * n) ** 2 for d, n in zip(differences, tokens, strict=False))
    return mean, math.sqrt(blocks / (blocks - 1) * squares) / total


def quantile(errors: float, blocks: int) -> float:
    """How many standard errors of a mean over so many blocks are as unlikely as `errors` of a normal (Student's t)."""
    return float(stdtrit(blocks - 1, ndtr(errors)))


# ---------------------------------------------------------------- search

# The NLL of each block of a range for each of some plans: yields one sequence of sums (nats) a plan, in their order.
# Plans come by ascending first layer, so that the scorer can go through the model once.
Score = Callable[[Sequence[Plan], range], Iterator[Sequence[float]]]
AllGather = Callable[[Any], list[Any]]  # one process's object -> those of all processes, by rank
Keep = Callable[[SearchResult], None]


@dataclass(frozen=True)
class Race:
    """When a candidate is dropped: as soon as it can hardly catch up with the leader on the blocks that are left.

    That is when its mean difference on the same blocks exceeds `errors` standard errors of what it will be on all of
    them (Student's t where blocks are few). Looked at after `least` blocks, then whenever they are `growth` times as
    many. Where nine windows are all alike, the defaults lose the best of them in 5 to 6 % of the cases, to one within
    its noise (errors=3: 1 %, at about 0.8 of the speed).
    """

    errors: float = 2.5
    least: int = 4
    growth: float = 1.25

    def __post_init__(self) -> None:
        if self.errors <= 0 or self.least < 2 or self.growth <= 1:
            raise UserError(f"race: {self}; allowed: errors above 0, least from 2, growth above 1")


def search(
    plans: Sequence[Plan],
    block_tokens: Sequence[int],
    score: Score,
    *,
    race: Race | None = None,
    known: Iterable[Candidate] = (),
    keep: Keep = lambda result: None,
    rank: int = 0,
    world: int = 1,
    all_gather: AllGather | None = None,
) -> SearchResult:
    """Score every plan on all blocks, or in a race only as long as it may still win.

    block_tokens: tokens scored in each block. known: scores of an earlier search on the same blocks, which are not
    taken again. keep: called after each plan that this process has scored, with the table as far as it knows it.
    rank, world, all_gather: the plans are shared among `world` processes; all of them return the same table, that of
    one process. Raises UserError when no plan has a finite score.
    """
    if not plans or not block_tokens:
        raise ValueError("nothing to search")
    if world > 1 and all_gather is None:
        raise ValueError("several processes need all_gather")
    table: dict[Plan, list[float]] = {plan: [] for plan in plans}
    for item in known:
        if item.windows in table and len(item.block_nll) > len(table[item.windows]):
            table[item.windows] = list(item.block_nll)[: len(block_tokens)]
    own = set(list(table)[rank::world])
    dropped: set[Plan] = set()

    def result() -> SearchResult:
        return _result(table, dropped, tuple(block_tokens))

    def take(live: Sequence[Plan], stop: int) -> None:
        missing = [plan for plan in live if plan in own and len(table[plan]) < stop]
        for start in sorted({len(table[plan]) for plan in missing}):
            group = sorted((plan for plan in missing if len(table[plan]) == start), key=first_layer)
            for plan, values in zip(group, score(group, range(start, stop)), strict=True):
                table[plan] += map(float, values)
                keep(result())
        if all_gather is not None:
            for part in all_gather([(plan, table[plan]) for plan in live if plan in own]):
                table.update(part)

    live, total = list(table), len(block_tokens)
    stop = total if race is None else min(race.least, total)
    while True:
        take(live, stop)
        if race is None or stop == total:
            break
        nll = {plan: Candidate(plan, tuple(table[plan][:stop]), sum(block_tokens[:stop])).nll for plan in live}
        leader = min(live, key=lambda plan: nll[plan])
        dropped |= {
            plan for plan in live if plan != leader and _beaten(table[plan][:stop], table[leader], block_tokens, race)
        }
        live = [plan for plan in live if plan not in dropped]
        stop = total if len(live) == 1 else min(total, max(stop + 1, math.ceil(stop * race.growth)))
    if dropped and not math.isfinite(result().winner.nll):  # the leader broke down later: nobody was behind it
        dropped.clear()
        take(list(table), total)
    found = result()
    if not math.isfinite(found.winner.nll):
        raise UserError("no window has a finite score; the model gives NaN or infinite numbers, try --dtype float32")
    return found


def first_layer(plan: Plan) -> float:
    """Where a plan begins to differ from the original."""
    return plan[0].start if plan else math.inf


def _beaten(own: Sequence[float], leader: Sequence[float], tokens: Sequence[int], race: Race) -> bool:
    behind, error = paired_difference(own, leader, tokens)
    left = 1 - sum(tokens[: len(own)]) / sum(tokens)  # the blocks are all there will be: a finite population
    return behind > 0 and (error is None or behind > quantile(race.errors, len(own)) * error * math.sqrt(left))


def _result(table: Mapping[Plan, Sequence[float]], dropped: set[Plan], tokens: tuple[int, ...]) -> SearchResult:
    bare = [
        Candidate(plan, tuple(nll), sum(tokens[: len(nll)]), plan in dropped and len(nll) < len(tokens))
        for plan, nll in table.items()
    ]
    return SearchResult(compared(bare, SearchResult(tuple(bare), tokens).winner, tokens), tokens)


def compared(table: Iterable[Candidate], winner: Candidate, tokens: Sequence[int]) -> tuple[Candidate, ...]:
    """The candidates with how far each is behind `winner`, one of them, and whether it can be told from it."""
    found = []
    for item in table:
        behind, error, near = 0.0, None, False
        if item.windows != winner.windows:
            behind, error = paired_difference(item.block_nll, winner.block_nll, tokens)
            near = error is not None and abs(behind) <= quantile(2, min(item.blocks, winner.blocks)) * error
        found.append(replace(item, behind=behind, error=error, indistinguishable=near))
    return tuple(found)
