"""The search loop against tables of scores made up in advance: who wins, who is dropped, what is asked for again."""

from __future__ import annotations

import json
import math
import threading
from itertools import pairwise

import numpy as np
import pytest
from scipy import stats

from compressor.errors import UserError
from compressor.windows import (
    Candidate,
    Race,
    SearchResult,
    candidates,
    paired_difference,
    quantile,
    search,
    window,
)

N_LAYER, N, BLOCKS = 12, 4, 32
PLANS = [(item,) for item in candidates(N_LAYER, N)]
TOKENS = [63] * (BLOCKS - 1) + [31]


def table(means: list[float], noise: float = 0.02, seed: int = 0, tokens=TOKENS) -> dict:
    """Nats of each block of each plan: a block is hard or easy for all plans alike, and each plan differs a little."""
    rng = np.random.default_rng(seed)
    hard = rng.normal(4, 1, len(tokens))
    return {
        plan: (hard + mean + rng.normal(0, noise, len(tokens))) * np.array(tokens)
        for plan, mean in zip(PLANS, means, strict=True)
    }


class Scorer:
    """Looks scores up and remembers what it was asked."""

    def __init__(self, scores: dict, fail_after: int | None = None):
        self.scores, self.asked, self.fail_after = scores, [], fail_after

    def __call__(self, plans, blocks):
        assert [plan[0].start for plan in plans] == sorted(plan[0].start for plan in plans)
        for plan in plans:
            if self.fail_after is not None and len(self.asked) >= self.fail_after:
                raise KeyboardInterrupt
            self.asked.append((plan[0].start, blocks.start, blocks.stop))
            yield self.scores[plan][blocks.start : blocks.stop]

    @property
    def work(self) -> int:
        return sum(stop - start for _, start, stop in self.asked)


CLEAR = [3.0, 1.0, 0.3, 0.25, 0.2, 0.0, 0.22, 0.4, 1.2]


# ---------------------------------------------------------------- candidates


def test_candidates_are_every_window_that_fits():
    assert [item.start for item in candidates(12, 4)] == list(range(9))
    assert [(item.start, item.anchor) for item in candidates(5, 4, "last")] == [(0, 3), (1, 4)]
    assert [item.start for item in candidates(12, 12)] == [0]
    assert [item.start for item in candidates(12, 4, 6)] == [3, 4, 5, 6]  # those that hold the anchor
    assert candidates(12, 4, strategy="middle") == [window(12, 4, 4)]


def test_random_candidates_are_drawn_by_the_seed():
    drawn = [candidates(12, 4, strategy="random", seed=seed)[0].start for seed in range(200)]
    assert set(drawn) == set(range(9))
    assert candidates(12, 4, strategy="random", seed=3) == candidates(12, 4, strategy="random", seed=3)
    several = [item.start for item in candidates(12, 4, strategy="random", count=5, seed=1)]
    assert len(set(several)) == 5 and several == sorted(several)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: candidates(12, 4, strategy="al"), "unknown strategy 'al' (did you mean 'all'?)"),
        (lambda: candidates(12, 13), "n 13 is out of range"),
        (lambda: candidates(12, 4, 12), "anchor 12 is out of range for 12 layers; allowed: 0 to 11"),
        (lambda: candidates(12, 4, strategy="random", count=10), "count 10 is out of range for 9 windows"),
        (lambda: candidates(12, 4, 0, strategy="middle"), "anchor 0 is outside the window"),
        (lambda: Race(least=1), "least from 2"),
    ],
)
def test_what_cannot_be_searched_is_one_line(call, said):
    with pytest.raises(UserError) as error:
        call()
    assert said in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------- the whole table


def test_without_a_race_every_plan_is_scored_once_on_everything():
    scores = table(CLEAR)
    scorer = Scorer(scores)
    found = search(PLANS, TOKENS, scorer)
    assert scorer.asked == [(start, 0, BLOCKS) for start in range(9)]
    for plan, item in zip(PLANS, found.candidates, strict=True):
        assert (item.windows, item.blocks, item.tokens, item.dropped) == (plan, BLOCKS, sum(TOKENS), False)
        assert item.nll == pytest.approx(scores[plan].sum() / sum(TOKENS), rel=1e-12)
        assert item.perplexity == pytest.approx(math.exp(item.nll))
    assert found.winner.window.start == 5
    assert [item.window.start for item in found.ranking][:2] == [5, 4]


def test_the_order_of_plans_is_kept_and_the_scorer_gets_them_by_layer():
    found = search(PLANS[::-1], TOKENS, Scorer(table(CLEAR)))
    assert [item.windows for item in found.candidates] == PLANS[::-1] and found.winner.window.start == 5


def test_of_equal_scores_the_first_wins():
    equal = np.ones(BLOCKS)
    found = search(PLANS, TOKENS, Scorer(dict.fromkeys(PLANS, equal)))
    assert found.winner.window.start == 0
    assert all(item.indistinguishable for item in found.candidates[1:])


def test_the_paired_error_is_that_of_a_linear_estimate():
    """Blocks of one length: the textbook standard error of a mean of differences. Unequal: a bootstrap."""
    rng = np.random.default_rng(1)
    own, other = rng.normal(40, 8, 50), rng.normal(39, 8, 50)
    mean, error = paired_difference(own, other, [10] * 50)
    assert mean == pytest.approx((own - other).mean() / 10)
    assert error == pytest.approx(stats.sem(own - other) / 10)
    tokens = rng.integers(4, 30, 400)
    own = rng.normal(4, 0.5, 400) * tokens
    other = np.full(400, 3.9) * tokens
    mean, error = paired_difference(own, other, tokens.tolist())
    picks = rng.integers(0, 400, (4000, 400))
    boot = (own - other)[picks].sum(1) / tokens[picks].sum(1)
    assert mean == pytest.approx((own - other).sum() / tokens.sum()) and error == pytest.approx(boot.std(), rel=0.1)
    assert paired_difference([1.0], [0.5], [1]) == (0.5, None)
    assert paired_difference([1.0, math.nan], [0.5, 1], [1, 1]) == (math.inf, None)


def test_the_quantile_is_students():
    assert quantile(3, 4) == pytest.approx(stats.t.ppf(stats.norm.cdf(3), 3))
    assert quantile(3, 4) > 9 and quantile(3, 10_000) == pytest.approx(3, abs=0.01)


def test_noise_is_not_reported_as_a_choice():
    means = [1.0, 0.5, 0.3, 0.001, 0.0, 0.001, 0.3, 0.5, 1.0]  # three alike: 0.001 apart with 0.02 / sqrt(32) of noise
    found = search(PLANS, TOKENS, Scorer(table(means)))
    near = {item.window.start for item in found.candidates if item.indistinguishable}
    assert near | {found.winner.window.start} == {3, 4, 5}
    assert not found.winner.indistinguishable and found.winner.error is None and found.winner.behind == 0
    for item in found.ranking[1:]:
        assert item.behind == pytest.approx(item.nll - found.winner.nll, abs=1e-12) and item.error is not None
        assert 0.3 < item.error / (0.02 * math.sqrt(2 / BLOCKS)) < 3


def test_models_that_give_no_number_lose():
    scores = table(CLEAR)
    scores[PLANS[5]] = scores[PLANS[5]].copy()
    scores[PLANS[5]][7] = math.nan
    for race in (None, Race()):
        found = search(PLANS, TOKENS, Scorer(scores), race=race)
        assert found.winner.window.start == 4
        broken = found.candidates[5]
        assert broken.perplexity == math.inf and not broken.indistinguishable
        assert json.loads(json.dumps(broken.to_dict(), allow_nan=False))["perplexity"] is None
    with pytest.raises(UserError, match="no window has a finite score"):
        search(PLANS, TOKENS, Scorer(dict.fromkeys(PLANS, np.full(BLOCKS, math.nan))), race=Race())


# ---------------------------------------------------------------- race


def test_a_race_finds_the_same_winner_with_its_exact_score_for_a_third_of_the_work():
    scores = table(CLEAR)
    whole, scorer = search(PLANS, TOKENS, Scorer(scores)), Scorer(scores)
    found = search(PLANS, TOKENS, scorer, race=Race())
    assert found.winner.window == whole.winner.window
    assert found.winner.block_nll == whole.winner.block_nll  # not only close
    assert scorer.work * 3 <= len(PLANS) * BLOCKS
    for item, full in zip(found.candidates, whole.candidates, strict=True):
        assert item.dropped == (item.blocks < BLOCKS) and item.block_nll == full.block_nll[: item.blocks]
        assert item.tokens == sum(TOKENS[: item.blocks])
        if item.dropped:
            left = 1 - item.tokens / sum(TOKENS)
            assert item.behind > 3 * item.error * math.sqrt(left)
            assert item.indistinguishable == (item.behind <= quantile(2, item.blocks) * item.error)


def test_no_block_is_scored_twice_and_rounds_grow():
    scorer = Scorer(table([0.01 * index for index in range(9)], noise=0.05))
    search(PLANS, TOKENS, scorer, race=Race(least=4, growth=2))
    for start in range(9):
        ranges = [(a, b) for asked, a, b in scorer.asked if asked == start]
        assert ranges[0][0] == 0 and all(a[1] == b[0] for a, b in pairwise(ranges))
        assert {b for _, b in ranges} <= {4, 8, 16, 32}
    assert len({a for _, a, _ in scorer.asked}) > 1


def test_a_race_hardly_ever_loses_the_best():
    """Windows that are alike: dropping the true best is as rare as Student's t says, looks and rivals together."""
    lost = 0
    for seed in range(300):
        scores = table([0.0] * 9, noise=0.05, seed=seed)
        best = min(PLANS, key=lambda plan: scores[plan].sum())
        found = search(PLANS, TOKENS, Scorer(scores), race=Race())
        lost += found.winner.windows != best
    assert lost <= 21  # 7 %, and then to one within 2.5 standard errors of it


def test_a_race_on_few_blocks_is_no_race():
    scores = {plan: values[:3] for plan, values in table(CLEAR).items()}
    scorer = Scorer(scores)
    found = search(PLANS, TOKENS[:3], scorer, race=Race(least=4))
    assert scorer.asked == [(start, 0, 3) for start in range(9)] and not any(item.dropped for item in found.candidates)


def test_unpaired_noise_would_not_have_decided():
    """Blocks differ by far more than plans do; only the pairing shows who is behind."""
    scores = table([0.05] * 5 + [0.0] + [0.05] * 3, noise=0.01)
    spread = (scores[PLANS[0]] / TOKENS).std() / math.sqrt(BLOCKS)
    assert spread > 0.1  # 0.05 apart is within half a standard error of each score
    scorer = Scorer(scores)
    assert search(PLANS, TOKENS, scorer, race=Race()).winner.window.start == 5
    assert scorer.work * 2 < len(PLANS) * BLOCKS


# ---------------------------------------------------------------- killed and gone on


@pytest.mark.parametrize("race", [None, Race()])
@pytest.mark.parametrize("killed_after", [0, 1, 5, 11])
def test_a_killed_search_goes_on_where_it_was(race, killed_after):
    scores, kept = table(CLEAR), []
    whole, whole_scorer = search(PLANS, TOKENS, Scorer(scores), race=race), Scorer(scores)
    search(PLANS, TOKENS, whole_scorer, race=race)
    first = Scorer(scores, fail_after=killed_after)
    if killed_after < len(whole_scorer.asked):
        with pytest.raises(KeyboardInterrupt):
            search(PLANS, TOKENS, first, race=race, keep=lambda result: kept.append(result.candidates))
        assert len(kept) == killed_after
    on_disk = json.loads(json.dumps([item.to_dict() for item in kept[-1]] if kept else []))
    second = Scorer(scores)
    found = search(PLANS, TOKENS, second, race=race, known=[Candidate.from_dict(item) for item in on_disk])
    assert found == whole
    assert first.asked + second.asked == whole_scorer.asked or killed_after >= len(whole_scorer.asked)


def test_scores_of_a_race_are_gone_on_with_when_the_whole_table_is_wanted():
    scores = table(CLEAR)
    raced, scorer = search(PLANS, TOKENS, Scorer(scores), race=Race()), Scorer(scores)
    found = search(PLANS, TOKENS, scorer, known=raced.candidates)
    assert found == search(PLANS, TOKENS, Scorer(scores))
    assert scorer.work == sum(BLOCKS - item.blocks for item in raced.candidates)


def test_what_is_kept_names_the_leader_so_far():
    kept: list[SearchResult] = []
    search(PLANS, TOKENS, Scorer(table(CLEAR)), keep=kept.append)
    assert [result.winner.window.start for result in kept] == [0, 1, 2, 3, 4, 5, 5, 5, 5]
    assert [sum(item.blocks > 0 for item in result.candidates) for result in kept] == list(range(1, 10))


def test_candidates_come_back_from_json():
    for item in search(PLANS, TOKENS, Scorer(table(CLEAR)), race=Race()).candidates:
        assert Candidate.from_dict(json.loads(json.dumps(item.to_dict(), allow_nan=False))) == item


# ---------------------------------------------------------------- several processes


@pytest.mark.parametrize("race", [None, Race()])
@pytest.mark.parametrize("world", [2, 4, 11])
def test_several_processes_make_the_table_of_one(race, world):
    scores = table(CLEAR)
    alone, box, barrier = search(PLANS, TOKENS, Scorer(scores), race=race), [None] * world, threading.Barrier(world)
    results, scorers = [None] * world, [Scorer(scores) for _ in range(world)]

    def process(rank):
        def all_gather(part):
            box[rank] = json.dumps([[plan[0].start, list(map(float, nll))] for plan, nll in part])
            barrier.wait()
            everything = [[(PLANS[start], nll) for start, nll in json.loads(sent)] for sent in box]
            barrier.wait()
            return everything

        results[rank] = search(PLANS, TOKENS, scorers[rank], race=race, rank=rank, world=world, all_gather=all_gather)

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert all(result == alone for result in results)
    assert sum(scorer.work for scorer in scorers) == sum(item.blocks for item in alone.candidates)
    if world <= len(PLANS):
        assert max(scorer.work for scorer in scorers) < sum(item.blocks for item in alone.candidates)


def test_several_processes_need_a_way_to_talk():
    with pytest.raises(ValueError, match="all_gather"):
        search(PLANS, TOKENS, Scorer(table(CLEAR)), world=2)
