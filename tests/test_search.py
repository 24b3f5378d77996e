"""The search on a real (toy) model against one full evaluation of one finished rewrite a candidate."""

from __future__ import annotations

import dataclasses
import itertools
import math
from unittest import mock

import pytest
import torch
from toy import toy_alignment, toy_blocks, toy_gpt2

from compressor import gpt2
from compressor.errors import UserError
from compressor.metrics.nll import token_nll
from compressor.metrics.size import parameters
from compressor.plans import Choice, best_plans, most_saved, search_plan
from compressor.rewrites import base as rewrites_base
from compressor.rewrites import from_record
from compressor.rewrites.base import Statistics
from compressor.rewrites.compose import apply
from compressor.search import PlanScorer, allowed_windows, placed, search_windows
from compressor.windows import Race, Window, window

RECORDS = [
    {"rewrite": "soft_shared", "n": 3, "rank": 4},
    {"rewrite": "soft_shared", "n": 2, "rank": 3, "base": "lsq"},
    {"rewrite": "soft_shared", "n": 2, "rank": 2, "delta_init": "lora", "anchor": "last"},
    {"rewrite": "merged_n", "n": 3, "tie": True},
    {"rewrite": "merged_n", "n": 2, "average": "activation-weighted"},
    {"rewrite": "compressed_n", "n": 3, "collapse": "fit"},
    {"rewrite": "compressed_n", "n": 4, "collapse": "sum", "anchor": "first"},
]
SOFT = from_record(RECORDS[0])


@pytest.fixture(scope="module")
def original():
    return toy_gpt2(n_layer=8, n_positions=32, n_embd=16, n_head=2)


@pytest.fixture(scope="module")
def alignments(original):
    return toy_alignment(original)


@pytest.fixture(scope="module")
def calibration(original):
    return toy_blocks(original.config, rows=6)


@pytest.fixture(scope="module")
def selection(original):
    return toy_blocks(original.config, rows=9, seed=5)  # the last row is half pads


def full_evaluation(model, selection) -> torch.Tensor:
    """float64[blocks]: each block on its own through the whole model, as transformers runs it."""
    rows = zip(selection.ids.split(1), selection.mask.split(1), strict=True)
    return torch.cat([token_nll(model, ids, mask).sum(1) for ids, mask in rows])


# ---------------------------------------------------------------- the scores


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: "-".join(str(value) for value in record.values()))
def test_scores_are_those_of_a_full_evaluation_of_each_finished_rewrite(
    record, original, alignments, calibration, selection
):
    rewrite = from_record(record)
    found = search_windows(rewrite, original, alignments, selection, calibration=calibration)
    assert [item.window.start for item in found.candidates] == list(range(8 - record["n"] + 1))
    for item in found.candidates:
        finished = dataclasses.replace(rewrite, start=item.window.start).resolved(original.config)
        model = apply([finished], original, alignments, calibration=calibration)
        expected = full_evaluation(model, selection)
        assert item.block_nll == pytest.approx(expected.tolist(), rel=1e-6)
        assert item.tokens == int(selection.mask.sum()) - len(selection.ids)
        assert item.perplexity == pytest.approx(math.exp(expected.sum() / item.tokens), rel=1e-6)
    assert len({round(item.nll, 4) for item in found.candidates}) > 1


def test_the_same_batches_give_the_same_bits(original, alignments, calibration, selection):
    whole = dataclasses.replace(selection, ids=selection.ids[:8], mask=selection.mask[:8])  # without the padded row
    found = search_windows(SOFT, original, alignments, whole, calibration=calibration)
    for item in found.candidates:
        model = apply([placed(SOFT, item.window)], original, alignments, calibration=calibration)
        nll = token_nll(model, whole.ids, whole.mask).sum(1)
        assert item.block_nll == tuple(nll.tolist())


def test_what_stands_in_pads_does_not_matter(original, alignments, calibration, selection):
    other = dataclasses.replace(selection, ids=selection.ids.masked_fill(~selection.mask, 42))
    one, two = (
        search_windows(SOFT, original, alignments, blocks, calibration=calibration) for blocks in (selection, other)
    )
    assert one == two


@pytest.mark.parametrize("race", [Race(least=2), Race(least=3, growth=3, errors=0.5)])
def test_a_race_scores_the_winner_exactly(race, original, alignments, calibration, selection):
    whole = search_windows(SOFT, original, alignments, selection, calibration=calibration)
    raced = search_windows(SOFT, original, alignments, selection, calibration=calibration, race=race)
    for full, part in zip(whole.candidates, raced.candidates, strict=True):
        assert part.block_nll == pytest.approx(full.block_nll[: part.blocks], rel=1e-6)
    assert raced.winner.blocks == len(selection.ids)
    if race.errors < 1:  # nearly all noise is a decision then
        assert any(item.dropped for item in raced.candidates)


def test_the_rest_of_the_recipe_is_done_too(original, alignments, calibration, selection):
    """A depth change below and a shared FFN above: candidates are scored with both, and keep clear of them."""
    others = [
        from_record({"rewrite": "compressed_n", "n": 2, "start": 0, "collapse": "fit"}).resolved(original.config),
        from_record({"rewrite": "merged_n", "n": 2, "start": 6, "tie": True}).resolved(original.config),
    ]
    rewrite = from_record({"rewrite": "soft_shared", "n": 2, "rank": 3, "base": "lsq"})
    found = search_windows(rewrite, original, alignments, selection, calibration=calibration, others=others)
    assert [item.window.start for item in found.candidates] == [2, 3, 4]
    for item in found.candidates:
        model = apply([*others, placed(rewrite, item.window)], original, alignments, calibration=calibration)
        assert item.block_nll == pytest.approx(full_evaluation(model, selection).tolist(), rel=1e-6)


# ---------------------------------------------------------------- what a candidate costs


def counting(scorer):
    """The layers of every block that runs from here on."""
    ran, real = [], gpt2.run_blocks

    def run(model, hidden, start, stop, *rest):
        ran.append(("host" if model is scorer._host else "candidate", start, stop, len(hidden)))
        return real(model, hidden, start, stop, *rest)

    return ran, mock.patch.object(gpt2, "run_blocks", run)


def test_blocks_below_the_windows_run_once(original, alignments, selection):
    rewrite = from_record({"rewrite": "merged_n", "n": 3})
    scorer = PlanScorer(rewrite, original, alignments, selection)
    ran, patched = counting(scorer)
    with patched:
        list(scorer([(item,) for item in allowed_windows(rewrite, original.config)], range(9)))
    assert [(start, stop) for who, start, stop, _ in ran if who == "host"] == [(0, 0)] + [(i, i + 1) for i in range(5)]
    assert [(start, stop) for who, start, stop, _ in ran if who == "candidate"] == [(start, 8) for start in range(6)]


def storages(model) -> dict[int, int]:
    return {tensor.untyped_storage().data_ptr(): tensor.numel() for tensor in model.state_dict().values()}


@pytest.mark.parametrize("record", RECORDS)
def test_a_candidate_costs_only_its_own_new_tensors(record, original, alignments, calibration, selection):
    rewrite = from_record(record)
    scorer = PlanScorer(rewrite, original, alignments, selection, calibration=calibration)
    theirs = storages(original)
    for item in allowed_windows(rewrite, original.config):
        model = scorer.model((item,))
        own = {pointer: count for pointer, count in storages(model).items() if pointer not in theirs}
        layers = [model.config.n_layer - original.config.n_layer + layer for layer in range(item.layers.stop, 8)]
        for old, new in zip(range(item.layers.stop, 8), layers, strict=True):
            for name, tensor in gpt2.block_tensors(model, new).items():
                assert tensor.data_ptr() == gpt2.block_tensors(original, old)[name].data_ptr()
        block = sum(tensor.numel() for tensor in gpt2.block_tensors(original, 0).values())
        assert 0 < sum(own.values()) <= item.n * block + 2 * item.n * record.get("rank", 0) * 5 * 16


def test_only_plans_of_a_race_are_held(original, alignments, selection):
    rewrite = from_record({"rewrite": "merged_n", "n": 3})
    scorer = PlanScorer(rewrite, original, alignments, selection)
    plans = [(item,) for item in allowed_windows(rewrite, original.config)]
    with mock.patch("compressor.search.apply", side_effect=apply) as applied:
        list(scorer(plans, range(0, 4)))
        assert list(scorer._models) == plans
        list(scorer(plans[2:4], range(4, 6)))
        assert list(scorer._models) == plans[2:4]
        list(scorer(plans[3:4], range(6, 9)))
        assert scorer._models == {}
    assert applied.call_count == len(plans)  # rewritten once each


def test_statistics_of_the_calibration_text_are_taken_once(original, alignments, calibration, selection):
    taken, ran, capture, run = [], [], rewrites_base.capture, gpt2.run_blocks

    def counted(model, batches, consumer, *, sites, layers, **rest):
        taken.extend(itertools.product(layers, sites))
        return capture(model, batches, consumer, sites=sites, layers=layers, **rest)

    def counted_run(model, hidden, start, stop, *rest):
        if model is original and hidden.shape[1] == calibration.ids.shape[1]:
            ran.extend(range(start, stop))
        return run(model, hidden, start, stop, *rest)

    with mock.patch.object(rewrites_base, "capture", counted), mock.patch.object(gpt2, "run_blocks", counted_run):
        search_windows(SOFT, original, alignments, selection, calibration=calibration)
    assert sorted(taken) == sorted(itertools.product(range(8), ("input", "post")))
    assert len(ran) <= 3 * 8 + 3  # one candidate at a time, from the embeddings: 2 * (3 + 4 + ... + 8) = 66


def test_statistics_below_the_window_are_let_go(original, alignments, calibration, selection):
    scorer = PlanScorer(SOFT, original, alignments, selection, calibration=calibration)
    plans = [(item,) for item in allowed_windows(SOFT, original.config)]
    for plan in scorer(plans, range(9)):
        assert plan
        assert len({layer for layer, _ in scorer._statistics.moments}) == 3
        assert len(scorer._statistics.states) <= 2


@pytest.mark.parametrize("record", [RECORDS[0], RECORDS[1], RECORDS[4], RECORDS[5]])
def test_shared_statistics_change_no_bit(record, original, alignments, calibration):
    shared = Statistics()
    for start in (4, 1, 5, 0, 2):
        rewrite = from_record({**record, "start": start}).resolved(original.config)
        alone = apply([rewrite], original, alignments, calibration=calibration).state_dict()
        together = apply([rewrite], original, alignments, calibration=calibration, statistics=shared).state_dict()
        assert all(torch.equal(alone[name], together[name]) for name in alone)


def test_the_original_is_left_as_it_was(original, alignments, calibration, selection):
    before = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    search_windows(SOFT, original, alignments, selection, calibration=calibration, race=Race(least=2))
    assert all(torch.equal(before[name], tensor) for name, tensor in original.state_dict().items())
    assert torch.is_grad_enabled()


# ---------------------------------------------------------------- strategies and mistakes


def test_strategies(original, alignments, calibration, selection):
    def starts(**settings):
        found = search_windows(SOFT, original, alignments, selection, calibration=calibration, **settings)
        return [item.window.start for item in found.candidates]

    assert starts(strategy="middle") == [2]
    assert starts(strategy="random", seed=4) == starts(strategy="random", seed=4)
    assert len(starts(strategy="random", count=3)) == 3


@pytest.mark.parametrize(
    ("record", "others", "said"),
    [
        ({"n": 3, "scope": "tile"}, [], "soft_shared as given has no window to search for"),
        ({"n": 9}, [], "n 9 is out of range for a model of 8 layers"),
        ({"n": 3, "rank": 99}, [], "rank 99 is out of range"),
        (
            {"n": 3},
            [{"rewrite": "merged_n", "n": 2, "start": start} for start in (0, 3, 6)],
            "every window of n=3 overlaps",
        ),
    ],
)
def test_what_cannot_be_searched_is_one_line(original, record, others, said):
    others = [from_record(other).resolved(original.config) for other in others]
    with pytest.raises(UserError) as error:
        allowed_windows(from_record({"rewrite": "soft_shared", **record}), original.config, others)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_model_in_training_mode_is_refused(alignments, selection):
    model = toy_gpt2(n_layer=8, n_positions=32, n_embd=16, n_head=2).train()
    with pytest.raises(ValueError, match="evaluation mode"):
        PlanScorer(SOFT, model, alignments, selection)


# ---------------------------------------------------------------- several windows jointly


def test_the_cheapest_sets_of_windows_are_found():
    """Against all sets of windows, for random costs and sizes."""
    chooser = torch.Generator().manual_seed(0)
    for _ in range(20):
        windows = [window(9, start, n) for n in (2, 3) for start in range(9 - n + 1)]
        costs = torch.randn(len(windows), generator=chooser).tolist()
        saved = torch.randint(1, 9, (len(windows),), generator=chooser).tolist()
        choices = [Choice(*item) for item in zip(windows, costs, saved, strict=True)]
        everything = [
            (sum(item.cost for item in subset), sum(item.saved for item in subset), {item.window for item in subset})
            for size in range(1, 5)
            for subset in itertools.combinations(choices, size)
            if all(not set(a.window.layers) & set(b.window.layers) for a, b in itertools.combinations(subset, 2))
        ]
        assert most_saved(choices) == max(total for _, total, _ in everything)
        for needed in (1, 6, 14, 40):
            reaching = sorted((entry for entry in everything if entry[1] >= needed), key=lambda entry: entry[0])
            found = best_plans(choices, needed, 4)
            assert [{item.window for item in plan} for plan in found] == [plan for _, _, plan in reaching[:4]]
            for plan in found:
                assert [item.window.start for item in plan] == sorted(item.window.start for item in plan)


def test_a_plan_is_verified_by_a_real_joint_rewrite(original, alignments, calibration, selection):
    rewrite = from_record({"rewrite": "soft_shared", "n": 2, "rank": 1})
    one = parameters(apply([placed(rewrite, Window(0, 2, 0))], original, alignments, calibration=calibration))
    target = parameters(original) - 2 * (parameters(original) - one)
    kept = []
    found = search_plan(
        rewrite, original, alignments, selection, target, top=3, calibration=calibration, keep=kept.append
    )
    assert found.singles.candidates[0].windows == ()
    full = full_evaluation(original, selection)
    assert found.singles.candidates[0].block_nll == pytest.approx(full.tolist(), rel=1e-6)
    nll = {item.windows: item.nll for item in found.singles.candidates}
    assert len(found.estimates) == len(found.verified.candidates) == 3
    for estimate, item in zip(found.estimates, found.verified.candidates, strict=True):
        assert estimate.windows == item.windows and len(item.windows) >= 2
        made = [placed(rewrite, part) for part in item.windows]
        model = apply(made, original, alignments, calibration=calibration)
        assert parameters(model) == estimate.parameters <= target
        assert item.block_nll == pytest.approx(full_evaluation(model, selection).tolist(), rel=1e-6)
        harm = sum(nll[part,] - nll[()] for part in item.windows)
        assert estimate.nll == pytest.approx(nll[()] + harm)
    assert found.best.windows == found.verified.winner.windows
    assert {item.windows for item in kept[-1].candidates} >= {item.windows for item in found.verified.candidates}
    with mock.patch("compressor.search.apply", side_effect=AssertionError):  # all is known
        again = search_plan(
            rewrite, original, alignments, selection, target, top=3, calibration=calibration, known=kept[-1].candidates
        )
    assert again == found


def test_depth_and_several_lengths(original, alignments, calibration, selection):
    rewrite = from_record({"rewrite": "compressed_n", "n": 2, "collapse": "keep"})
    block = parameters(original) - parameters(apply([placed(rewrite, Window(0, 2, 0))], original, alignments))
    target = parameters(original) - 3 * block
    found = search_plan(rewrite, original, alignments, selection, target, sizes=(2, 3), calibration=calibration)
    assert {sum(item.n - 1 for item in estimate.windows) for estimate in found.estimates} <= {3, 4}
    for item in found.verified.candidates:
        model = apply([placed(rewrite, part) for part in item.windows], original, alignments)
        assert item.block_nll == pytest.approx(full_evaluation(model, selection).tolist(), rel=1e-6)


def test_targets_out_of_reach_are_one_line(original, alignments, selection):
    for target, said in (
        (10**9, "is no reduction; the model has"),
        (5000, "is out of reach for merged_n with windows of n=2; allowed: "),
    ):
        rewrite = from_record({"rewrite": "merged_n", "n": 2, "tie": True})
        with pytest.raises(UserError) as error:
            search_plan(rewrite, original, alignments, selection, target)
        assert said in str(error.value) and "\n" not in str(error.value)
    least = int(str(error.value).split("allowed: ")[1].split()[0].replace(",", ""))
    merged = [placed(rewrite, Window(start, 2, start)) for start in (0, 2, 4, 6)]
    assert least == parameters(apply(merged, original, alignments))
