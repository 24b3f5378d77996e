"""The search in a run folder: what windows.json holds, how it goes on when interrupted, what a rewrite takes of it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from functools import partial

import pytest
from conftest import forced, make_text, tree

from compressor import artifacts, data, pipeline, run_folder
from compressor.errors import UserError
from compressor.facts import FIT_TOKENS
from compressor.metrics.nll import token_nll
from compressor.metrics.size import parameters
from compressor.models import open_model
from compressor.pipeline import Session
from compressor.recipe import Align, Search
from compressor.rewrites import from_record
from compressor.rewrites.compose import apply
from compressor.search import PlanScorer, search_windows
from compressor.windows import Race, middle_start, window

SOFT = {"rewrite": "soft_shared", "n": 3, "rank": 4}
CUT = {"rewrite": "compressed_n", "n": 2, "collapse": "keep"}
TIED = {"rewrite": "merged_n", "n": 2, "tie": True}
SHORT = Search(max_tokens=1000, context=32)
ROUNDED = ("perplexity", "nll", "behind", "error", "block_nll")
FFN = 2 * 32 * 128 + 32 + 128  # of one layer of the tiny model: what merged_n stores once


def search(run, session, record=SOFT, settings=SHORT, **rest):
    return pipeline.search(run, from_record(record), settings, session, **rest)


def rewrite(run, session, *records):
    return pipeline.rewrite(run, [from_record(record) for record in records], session)


def starts(body):
    return [[item["start"] for item in row["windows"]] for row in body["candidates"]]


def change(path, edit):
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))


@pytest.fixture(scope="session")
def _searched_run(tmp_path_factory, _made_run):
    run = tmp_path_factory.mktemp("searched") / "run"
    shutil.copytree(_made_run, run, ignore=shutil.ignore_patterns("rewritten"))
    search(run, Session(device="cpu", quiet=True))
    return run


@pytest.fixture
def searched_run(_searched_run, tmp_path):
    """A run folder of its own with an alignment and a finished search for SOFT."""
    return shutil.copytree(_searched_run, tmp_path / "searched")


@pytest.fixture
def scored(monkeypatch):
    """The plans that are really run, each with its range of blocks."""
    seen, call = [], PlanScorer.__call__

    def counted(self, plans, blocks):
        for plan, values in zip(plans, call(self, plans, blocks), strict=True):
            seen.append((plan, blocks))
            yield values

    monkeypatch.setattr(PlanScorer, "__call__", counted)
    return seen


@pytest.fixture
def interrupted(interrupted_after):
    """A function: a command is interrupted right after so many files were written."""
    return partial(interrupted_after, artifacts, "write_json")


def blocks_of(text_file, tiny_folder, part, context, max_tokens, seed=0):
    """The blocks of a part of the text, taken without the run folder."""
    opened = open_model(str(tiny_folder), device="cpu")
    text = data.text(str(text_file), part)
    return data.token_blocks(
        text, opened.tokenizer, context=context, max_tokens=max_tokens, seed=seed, evenly=True
    )  # fmt: skip


# ---------------------------------------------------------------- the scores


@pytest.mark.parametrize("record", [SOFT, CUT], ids=lambda record: record["rewrite"])
def test_scores_are_those_of_a_full_evaluation_of_each_rewrite(aligned_run, tiny_folder, text_file, session, record):
    body = search(aligned_run, session, record)
    original = open_model(str(tiny_folder), device="cpu").model
    alignments = run_folder.aligned(aligned_run).alignments
    calibration = blocks_of(text_file, tiny_folder, "calibration", 64, FIT_TOKENS)
    selection = blocks_of(text_file, tiny_folder, "selection", 32, 1000)
    expected = {}
    for start in range(6 - record["n"] + 1):
        rewritten = apply(
            [from_record({**record, "start": start}).resolved(original.config)],
            original,
            alignments,
            calibration=calibration,
        )
        nll = token_nll(rewritten, selection.ids, selection.mask).sum(1)
        expected[start] = nll.tolist()
    assert starts(body) == [[start] for start in expected] and body["complete"]
    for row, wanted in zip(body["candidates"], expected.values(), strict=True):
        assert row["block_nll"] == pytest.approx(wanted, rel=1e-6)
        assert row["tokens"] == int(selection.mask[:, 1:].sum()) == sum(body["block_tokens"])
    whole = token_nll(original, selection.ids, selection.mask).sum(1).tolist()
    assert body["original"]["block_nll"] == pytest.approx(whole, rel=1e-6) and body["original"]["windows"] == []
    best = min(expected, key=lambda start: sum(expected[start]))
    behind = (sum(whole) - sum(expected[best])) / sum(body["block_tokens"])
    assert body["original"]["behind"] == pytest.approx(behind, rel=1e-4)
    assert [item["start"] for item in body["winner"]] == [best]
    for row, wanted in zip(body["candidates"], expected.values(), strict=True):
        behind = (sum(wanted) - sum(expected[best])) / row["tokens"]
        assert row["behind"] == pytest.approx(behind, rel=1e-4, abs=1e-9)


def test_the_file_holds_what_the_stage_gives(aligned_run, tiny_folder, text_file, session):
    body = search(aligned_run, session, settings=dataclasses.replace(SHORT, race=True))
    found = search_windows(
        from_record(SOFT),
        open_model(str(tiny_folder), device="cpu").model,
        run_folder.aligned(aligned_run).alignments,
        blocks_of(text_file, tiny_folder, "selection", 32, 1000),
        calibration=blocks_of(text_file, tiny_folder, "calibration", 64, FIT_TOKENS),
        race=Race(),
    )
    assert body["candidates"] == [item.to_dict() for item in found.candidates]
    assert body["winner"] == [dataclasses.asdict(found.winner.window)]
    assert any(row["dropped"] for row in body["candidates"])
    stored = artifacts.read_json(aligned_run / "windows.json", "windows", "search")
    assert {key: stored[key] for key in body} == body and stored["settings"]["race"] is True
    facts = stored["provenance"]["data"]
    assert (facts["selection"]["part"], facts["selection"]["tokens"]) == ("selection", 1000)
    assert facts["selection"]["source"] == str(text_file) and facts["calibration"]["part"] == "calibration"


def test_other_selection_text_is_taken_from_where_it_is_named(aligned_run, tiny_folder, tmp_path, session):
    other = tmp_path / "other.txt"
    other.write_text(make_text(300, seed=4))
    body = search(aligned_run, session, source=str(other), settings=dataclasses.replace(SHORT, strategy="middle"))
    blocks = blocks_of(other, tiny_folder, "selection", 32, 1000)
    assert body["scored"]["selection"] == blocks.fingerprint
    assert body["block_tokens"] == blocks.mask[:, 1:].sum(1).tolist()


def test_the_rest_of_a_recipe_is_kept_clear_of(aligned_run, session):
    body = search(aligned_run, session, {**SOFT, "n": 2}, others=[from_record({**CUT, "start": 2})])
    assert starts(body) == [[0], [4]]
    assert [item["start"] for item in body["scored"]["others"]] == [2]


def test_which_windows(aligned_run, session):
    def searched(**settings):
        return starts(search(aligned_run, forced(session), settings=dataclasses.replace(SHORT, **settings)))

    assert searched(strategy="middle") == [[middle_start(6, 3)]]
    drawn = searched(strategy="random", count=2)
    assert len(drawn) == 2 and drawn == sorted(drawn) and all(0 <= start <= 3 for (start,) in drawn)
    assert searched(strategy="random", count=2) == drawn
    with pytest.raises(UserError, match="count 5 is out of range for 4 windows"):
        searched(strategy="random", count=5)


# ---------------------------------------------------------------- interrupted


@pytest.mark.parametrize(
    ("settings", "after"),
    [
        (SHORT, 3),
        (dataclasses.replace(SHORT, race=True), 5),
        (dataclasses.replace(SHORT, target_parameters=1, sizes=[2]), 9),  # among the plans
    ],
    ids=["all", "race", "plans"],
)
def test_an_interrupted_search_goes_on(
    aligned_run, tmp_path, tiny_folder, session, scored, interrupted, settings, after
):
    record = SOFT
    if settings.target_parameters:
        whole = parameters(open_model(str(tiny_folder), device="cpu").model)
        record, settings = TIED, dataclasses.replace(settings, target_parameters=whole - 2 * FFN)
    other = shutil.copytree(aligned_run, tmp_path / "other")
    search(other, session, record, settings)
    whole_work = list(scored)
    scored.clear()
    interrupted(after, lambda: search(aligned_run, session, record, settings))
    stored = json.loads((aligned_run / "windows.json").read_text())
    assert not stored["complete"] and stored["winner"] is None
    assert len(scored) == after and sum(row["blocks"] for row in stored["candidates"]) > 0
    search(aligned_run, session, record, settings)
    assert sorted(scored, key=str) == sorted(whole_work, key=str) and len(set(scored)) == len(scored)
    assert (aligned_run / "windows.json").read_bytes() == (other / "windows.json").read_bytes()


def test_a_finished_search_is_not_done_again(searched_run, session, scored):
    before = tree(searched_run)
    search(searched_run, session)
    assert scored == [] and tree(searched_run) == before
    search(searched_run, forced(session))
    assert [plan for plan, _ in scored].count(()) == 1  # the original, beside the four windows
    assert len(scored) == 5 and tree(searched_run) == before


def test_a_race_is_gone_on_with_to_the_whole_table(aligned_run, searched_run, session, scored):
    search(aligned_run, session, settings=dataclasses.replace(SHORT, race=True))
    raced = sum(len(blocks) for _, blocks in scored)
    body = search(aligned_run, session)
    stored = json.loads((searched_run / "windows.json").read_text())
    assert body["winner"] == stored["winner"]
    for row, other in zip(body["candidates"], stored["candidates"], strict=True):
        # blocks scored in other batches are the same up to rounding
        assert row["block_nll"] == pytest.approx(other["block_nll"], rel=1e-6)
        assert {**row, **dict.fromkeys(ROUNDED)} == {**other, **dict.fromkeys(ROUNDED)}
    total = sum(len(blocks) for _, blocks in scored)
    assert total == 5 * len(body["block_tokens"]) and raced < total  # the original was scored once
    assert body["original"]["nll"] == stored["original"]["nll"]


def test_another_search_is_refused_and_loses_nothing(searched_run, tiny_folder, text_file, tmp_path, session):
    other = tmp_path / "other.txt"
    other.write_text(make_text(300, seed=4))
    again = shutil.copytree(searched_run, tmp_path / "again")
    pipeline.align(again, str(tiny_folder), str(text_file), Align(max_tokens=600), forced(session))
    before = {run: tree(run) for run in (searched_run, again)}
    for said, run, owner, changes in (
        ("rewrite", searched_run, session, {"record": {**SOFT, "rank": 3}}),
        ("seed", searched_run, dataclasses.replace(session, seed=1), {}),
        ("selection", searched_run, session, {"source": str(other)}),
        ("selection", searched_run, session, {"settings": dataclasses.replace(SHORT, max_tokens=900)}),
        ("context", searched_run, session, {"settings": dataclasses.replace(SHORT, context=64)}),
        ("others", searched_run, session, {"others": [from_record({**CUT, "start": 4})]}),
        ("alignment", again, session, {}),
    ):
        with pytest.raises(UserError, match="is of another search") as error:
            search(run, owner, **changes)
        assert said in str(error.value).partition("(")[2].partition("differ")[0] and "\n" not in str(error.value)
        assert tree(run) == before[run]
    body = search(searched_run, forced(session), {**SOFT, "rank": 3})
    assert body["scored"]["rewrite"]["rank"] == 3 and body["complete"]


def test_a_forced_search_that_is_interrupted_early_keeps_the_old_one(searched_run, session, monkeypatch):
    before = tree(searched_run)
    monkeypatch.setattr(PlanScorer, "__call__", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        search(searched_run, forced(session), {**SOFT, "rank": 3})
    assert tree(searched_run) == before


# ---------------------------------------------------------------- a target size


def test_several_windows_down_to_a_target(aligned_run, tiny_folder, session, notices):
    whole = parameters(open_model(str(tiny_folder), device="cpu").model)
    target = whole - 3 * FFN  # one window of 2 saves one FFN: three of them, or longer ones
    settings = dataclasses.replace(SHORT, target_parameters=str(target), sizes=[2, 3])
    body = search(aligned_run, session, TIED, settings)
    assert body["complete"] and len(body["winner"]) >= 2 and [] in starts(body)
    assert len(body["plans"]) == 5 and all(plan["parameters"] <= target for plan in body["plans"])
    best = min(body["plans"], key=lambda plan: plan["measured"])
    assert best["windows"] == body["winner"]
    measured = next(row for row in body["candidates"] if row["windows"] == body["winner"])
    assert measured["nll"] == best["measured"]
    # all against the plan that wins, not against a single window, or the original, that harms less
    assert min(row["nll"] for row in body["candidates"]) < best["measured"]
    for row in body["candidates"]:
        assert row["behind"] == pytest.approx(row["nll"] - best["measured"], abs=1e-9)

    near = sum(row["indistinguishable"] for row in body["candidates"] if row["windows"])
    assert len(notices) == 1 and f"best on this selection text: {near};" in notices[0]
    notices.clear()

    made = rewrite(aligned_run, session, {**TIED, "start": "best"})
    assert notices == []
    assert [[item[key] for key in ("start", "n", "anchor")] for item in made["rewrites"]] == [
        [item[key] for key in ("start", "n", "anchor")] for item in body["winner"]
    ]
    assert made["parameters"] == best["parameters"] <= target
    assert parameters(open_model(str(aligned_run), device="cpu").model) == made["parameters"]


# ---------------------------------------------------------------- what a rewrite takes of it


def test_a_rewrite_without_a_start_takes_what_was_found(searched_run, session, notices):
    winner = json.loads((searched_run / "windows.json").read_text())["winner"][0]
    made = rewrite(searched_run, session, SOFT)
    assert {key: made["rewrites"][0][key] for key in ("start", "n", "anchor")} == winner
    (notice,) = notices
    assert "no --start given" in notice and f"layers {winner['start']} to {winner['start'] + 2}" in notice
    notices.clear()
    best = rewrite(searched_run, forced(session), {**SOFT, "start": "best"})
    assert best["weights"] == made["weights"] and notices == []
    other = (winner["start"] + 1) % 4
    assert rewrite(searched_run, forced(session), {**SOFT, "start": other})["rewrites"][0]["start"] == other


def test_the_window_that_wins_need_not_be_the_middle_one(searched_run, session):
    """Else the tests here could not tell them apart: the file is told to prefer the last."""
    last = dataclasses.asdict(window(6, 3, 3))
    change(searched_run / "windows.json", lambda document: document.update(winner=[last]))
    assert rewrite(searched_run, session, SOFT)["rewrites"][0]["start"] == 3 != middle_start(6, 3)


def _another_alignment(run, tiny_folder, text_file, session):
    pipeline.align(run, str(tiny_folder), str(text_file), Align(max_tokens=600), forced(session))


UNFIT = {
    "none": (SOFT, lambda run, *rest: (run / "windows.json").unlink()),
    "of another rank": ({**SOFT, "rank": 3}, lambda *rest: None),
    "of another rewrite": ({**CUT, "n": 3}, lambda *rest: None),
    "of another alignment": (SOFT, _another_alignment),
    "unfinished": (SOFT, lambda run, *rest: change(run / "windows.json", lambda d: d.update(complete=False))),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_search_that_does_not_fit_is_not_taken(searched_run, tiny_folder, text_file, session, notices, case):
    record, spoil = UNFIT[case]
    if (searched_run / "windows.json").is_file():  # a winner that the middle window is not
        change(searched_run / "windows.json", lambda d: d.update(winner=[dataclasses.asdict(window(6, 3, 3))]))
    spoil(searched_run, tiny_folder, text_file, session)
    before = tree(searched_run)
    with pytest.raises(UserError, match=r"start=best, but .* has no finished search") as error:
        rewrite(searched_run, session, {**record, "start": "best"})
    assert f"gpt2-compress search --run {searched_run}" in str(error.value) and "\n" not in str(error.value)
    assert tree(searched_run) == before and notices == []
    made = rewrite(searched_run, session, record)
    assert made["rewrites"][0]["start"] == middle_start(6, 3)
    (notice,) = notices
    assert "middle window" in notice


# ---------------------------------------------------------------- mistakes and damage


DAMAGES = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:300]),
    "empty": lambda path: path.write_bytes(b""),
    "not text": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "a list": lambda path: path.write_text("[]"),
    "another kind": lambda path: change(path, lambda d: d.update(kind="alignment")),
    "another schema": lambda path: change(path, lambda d: d.update(schema=99)),
    **{
        name: lambda path, edit=edit: change(path, edit)
        for name, edit in {
            "no scores": lambda d: d.pop("candidates"),
            "nothing of what was scored": lambda d: d.pop("scored"),
            "scored of another type": lambda d: d.update(scored=[]),
            "no alignment": lambda d: d["scored"].pop("alignment"),
            "no base": lambda d: d["scored"].pop("base"),
            "no rewrite": lambda d: d["scored"].pop("rewrite"),
            "a rewrite that is none": lambda d: d["scored"].update(rewrite={"rewrite": "softly"}),
            "a rewrite of another type": lambda d: d["scored"].update(rewrite=3),
            "no settings": lambda d: d.pop("settings"),
            "complete of another type": lambda d: d.update(complete="yes"),
            "no winner": lambda d: d.update(winner=None),
            "an empty winner": lambda d: d.update(winner=[]),
            "a winner of another type": lambda d: d.update(winner=[3]),
            "a winner without an anchor": lambda d: d["winner"][0].pop("anchor"),
            "a winner that starts at a word": lambda d: d["winner"][0].update(start="first"),
            "a winner that starts at a fraction": lambda d: d["winner"][0].update(start=1.5),
            "a winner outside the model": lambda d: d["winner"][0].update(start=40, anchor=41),
            "winners that overlap": lambda d: d.update(winner=d["winner"] * 2),
            "a candidate without scores": lambda d: d["candidates"][0].pop("block_nll"),
            "scores of another type": lambda d: d["candidates"][0].update(block_nll="well"),
            "a score of another type": lambda d: d["candidates"][0].update(block_nll=["well"]),
            "a candidate that is a list": lambda d: d.update(candidates=[[]]),
        }.items()
    },
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_file_is_one_line(searched_run, session, case):
    DAMAGES[case](searched_run / "windows.json")
    before = tree(searched_run)
    for start in ("best", None):
        with pytest.raises(UserError) as error:
            rewrite(searched_run, session, {**SOFT, "start": start})
        assert "windows.json" in str(error.value) and "gpt2-compress search --force" in str(error.value)
        assert "\n" not in str(error.value) and tree(searched_run) == before


@pytest.mark.parametrize("case", ["cut off", "another kind", "no scores", "a score of another type", "no settings"])
def test_a_search_does_not_build_on_a_damaged_file_unless_forced(searched_run, session, case):
    path = searched_run / "windows.json"
    whole = path.read_bytes()
    DAMAGES[case](path)
    before = tree(searched_run)
    with pytest.raises(UserError, match="search --force"):
        search(searched_run, session)
    assert tree(searched_run) == before
    search(searched_run, forced(session))
    assert path.read_bytes() == whole


def test_what_cannot_be_searched(aligned_run, text_file, tmp_path, session):
    (tmp_path / "short.txt").write_text(make_text(3))
    overlapping = {"selection": str(text_file)}  # the only part from there: all of it
    before = tree(aligned_run)
    for said, changes in (
        ("soft_shared as given has no window to search for", {"record": {**SOFT, "scope": "tile"}}),
        ("context is 65; allowed: 2 to 64", {"settings": dataclasses.replace(SHORT, context=65)}),
        ("context is 1; allowed: 2 to 64", {"settings": dataclasses.replace(SHORT, context=1)}),
        ("n 7 is out of range", {"record": {**SOFT, "n": 7}}),
        ("rank 99 is out of range", {"record": {**SOFT, "rank": 99}}),
        ("unknown strategy 'best'", {"settings": dataclasses.replace(SHORT, strategy="best")}),
        ("every window of n=3 overlaps", {"others": [from_record({**CUT, "n": 4, "start": 1})]}),
        ("shares text with the calibration text", {"source": {**dict.fromkeys(data.PARTS, "demo"), **overlapping}}),
        ("one block needs 64", {"source": str(tmp_path / "short.txt"), "settings": Search(context=64)}),
        ("there is no such file", {"source": str(tmp_path / "none.txt")}),
    ):
        with pytest.raises(UserError) as error:
            search(aligned_run, session, **changes)
        assert said in str(error.value) and "\n" not in str(error.value)
        assert tree(aligned_run) == before


def test_a_narrower_search_does_not_lose_the_scores_of_a_wider_one(aligned_run, session):
    rewrite = from_record({"rewrite": "soft_shared", "n": 4, "rank": 2, "delta_init": "svd", "base": "mean"})
    pipeline.search(aligned_run, rewrite, Search(strategy="middle", max_tokens=256, context=32), session)
    wide = pipeline.search(aligned_run, rewrite, Search(max_tokens=256, context=32), session)
    assert len(wide["candidates"]) == 3
    before = (aligned_run / "windows.json").read_bytes()
    with pytest.raises(UserError, match="has 2 windows or plans that this search would not look at"):
        pipeline.search(aligned_run, rewrite, Search(strategy="middle", max_tokens=256, context=32), session)
    assert (aligned_run / "windows.json").read_bytes() == before
