"""Baselines in a run folder: what they are, that they are tuned as the run was, kept, gone on with and refused."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
from conftest import forced, make_text, tree
from safetensors.torch import load_file

from compressor import artifacts, pipeline, run_folder, training_state
from compressor.errors import UserError
from compressor.metrics.size import non_zero, parameters
from compressor.models import find, open_model, probe
from compressor.pipeline import Session
from compressor.recipe import Finetune, load
from compressor.rewrites import from_record
from compressor.steps import baselines

SETTINGS = Finetune(steps=4, batch_tokens=256, context=32, selection_tokens=320, evaluate_every=2, checkpoint_every=1,
                    learning_rate=1e-2)  # fmt: skip
CUT = {"rewrite": "compressed_n", "n": 3, "start": 1, "collapse": "mean"}
SIZE = [{"metric": "perplexity", "max_tokens": 300}, "size"]
ALL = ["pruned", "pruned-recovered", "dropped", "dropped-recovered"]
BLOCK = 12 * 32 * 32 + 9 * 32 + 4 * 32


@pytest.fixture(scope="session")
def _cut_run(tmp_path_factory, _made_run):
    run = shutil.copytree(_made_run, tmp_path_factory.mktemp("cut") / "run", ignore=shutil.ignore_patterns("rewritten"))
    session = Session(device="cpu", quiet=True, seed=3)
    pipeline.rewrite(run, [from_record(CUT)], session)
    pipeline.finetune(run, SETTINGS, session)
    return run


@pytest.fixture(scope="session")
def _full_run(tmp_path_factory, _cut_run):
    run = shutil.copytree(_cut_run, tmp_path_factory.mktemp("full") / "run")
    assert list(baselines.make(run, ["pruned", "dropped"], Session(device="cpu", seed=3), recovery=SETTINGS)) == ALL
    return run


@pytest.fixture
def cut_run(_cut_run, tmp_path):
    """A run folder of its own: three blocks averaged into one, recovered/ and control/, seed 3."""
    return shutil.copytree(_cut_run, tmp_path / "cut")


@pytest.fixture
def full_run(_full_run, tmp_path):
    """The same with all baselines."""
    return shutil.copytree(_full_run, tmp_path / "full")


@pytest.fixture
def session(notices):
    return Session(device="cpu", quiet=True, seed=3, notice=notices.append)


def tensors(folder):
    return load_file(folder / "model.safetensors")


def report(folder):
    return json.loads((folder / "report.json").read_text())


def lasting(folder):
    return {name: content for name, content in tree(folder).items() if name.endswith((".safetensors", "config.json"))}


# ---------------------------------------------------------------- what they are


def test_as_many_parameters_or_as_few_blocks_as_the_rewritten_model(full_run, tiny_folder):
    rewritten, original = (open_model(str(folder)).model for folder in (full_run / "rewritten", tiny_folder))
    made = {name: open_model(str(full_run / "baselines" / name)).model for name in ALL}
    for name in ("pruned", "pruned-recovered"):
        assert non_zero(made[name]) == parameters(rewritten) < parameters(made[name]) == parameters(original)
    for name in ("dropped", "dropped-recovered"):
        assert made[name].config.n_layer == rewritten.config.n_layer == 4
        assert parameters(made[name]) == parameters(rewritten)
    (record,) = made["dropped"].config.compression
    assert record["rewrite"] == "dropped_n" and len(record["layers"]) == 2
    body = report(full_run / "baselines" / "dropped")
    assert body["kind"] == "baseline" and body["rewrites"] == [record] and body["asked"][0]["layers"] is None
    assert body["counterpart"] == {"layers": 4, "parameters": parameters(rewritten)}
    own = tensors(full_run / "baselines" / "pruned")
    magnitudes = np.concatenate(
        [np.abs(tensor.numpy().ravel()) for name, tensor in tensors(tiny_folder).items()
         if name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))]
    )  # fmt: skip
    least = np.sort(magnitudes)[parameters(original) - parameters(rewritten)]
    kept = [tensor[tensor != 0].abs().min() for name, tensor in own.items() if ".c_fc.weight" in name]
    assert min(kept) >= least


def test_they_are_tuned_as_the_run_was(full_run):
    recovered, control = (report(full_run / name)["recovery"] for name in ("recovered", "control"))
    for kind in ("pruned", "dropped"):
        body = report(full_run / "baselines" / f"{kind}-recovered")
        own = body["recovery"]
        assert body["kind"] == "recovery" and own["train"] == control["train"] == "lora"
        assert (own["steps"], own["tokens"]) == (recovered["steps"], recovered["tokens"])
        for key in ("batch_tokens", "learning_rate", "seed", "training", "selection", "warm_up", "rank"):
            assert own["settings"][key] == recovered["settings"][key], key
        assert body["made_from"]["start"] == report(full_run / "baselines" / kind)["weights"]
        assert body["selection_perplexity"]["after"] < body["selection_perplexity"]["before"]
        before, after = (tensors(full_run / "baselines" / name) for name in (kind, f"{kind}-recovered"))
        changed = {name for name in before if not before[name].equal(after[name])}
        assert changed and all(name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")) for name in changed)
        if kind == "pruned":
            assert all(((tensor == 0) == (after[name] == 0)).all() for name, tensor in before.items())
    assert not (full_run / "baselines" / "checkpoints").exists() and not list((full_run / "baselines").glob(".*"))


def test_a_distilled_run_has_distilled_baselines_and_one_trained_whole_whole_ones(cut_run, session):
    settings = dataclasses.replace(SETTINGS, train="full", distill=True, mix=0.5, steps=2)
    baselines.make(cut_run, ["dropped"], session, recovery=settings)
    own = report(cut_run / "baselines" / "dropped-recovered")["recovery"]["settings"]
    assert (own["train"], own["distill"], own["mix"], own["steps"]) == ("full", True, 0.5, 2)


def test_where_no_block_is_lacking_as_many_as_save_as_much(made_run, session, notices):
    """soft_shared: three FFNs in one, two dozen thousand parameters less, which is about one block."""
    made = baselines.make(made_run, ["pruned", "dropped"], session)
    assert list(made) == ["pruned", "dropped"]
    saved = 2 * 2 * 32 * 128 - 3 * 2 * 4 * (32 + 128)
    assert round(saved / BLOCK) == 1 and report(made["dropped"])["layers"] == 5
    count = report(made_run / "rewritten")["parameters"]
    assert report(made["pruned"])["non_zero"] == count
    (notice,) = notices
    assert f"has all 6 blocks and {count:,} parameters; the original without 1 comes nearest" in notice


def test_what_saves_nothing_has_no_counterpart(aligned_run, session, notices):
    pipeline.rewrite(aligned_run, [from_record({"rewrite": "merged_n", "n": 3, "start": 1})], session)
    assert baselines.make(aligned_run, ["pruned", "dropped"], session) == {}
    assert notices == [f"no baseline {kind}: the rewritten model saves no parameters" for kind in ("pruned", "dropped")]
    notices.clear()
    half = {"rewrite": "soft_shared", "n": 2, "start": 1, "rank": 8}
    pipeline.rewrite(aligned_run, [from_record(half)], forced(session))
    assert list(baselines.make(aligned_run, ["pruned", "dropped"], session)) == ["pruned"]
    assert notices == ["no baseline dropped: the rewritten model has all blocks and saves less than half of one"]


# ---------------------------------------------------------------- what is there already


def test_what_is_there_stays_unless_it_was_made_otherwise(full_run, session):
    before = tree(full_run)
    again = {"recovery": SETTINGS}
    assert list(baselines.make(full_run, ["dropped", "pruned"], session, **again)) == ALL
    assert tree(full_run) == before
    with pytest.raises(UserError, match=r"dropped-recovered was made with steps=4, now it is 2; --force"):
        baselines.make(full_run, ["dropped"], session, recovery=dataclasses.replace(SETTINGS, steps=2))
    assert tree(full_run) == before
    pipeline.rewrite(full_run, [from_record({**CUT, "n": 2})], forced(session))
    for kind in ("pruned", "dropped"):
        with pytest.raises(UserError, match=rf"{kind} was made otherwise \(rewrite differ\); --force makes it anew"):
            baselines.make(full_run, [kind], session)
    baselines.make(full_run, ["dropped"], forced(session), recovery=dataclasses.replace(SETTINGS, steps=2))
    assert report(full_run / "baselines" / "dropped")["layers"] == 5
    assert report(full_run / "baselines" / "dropped-recovered")["made_from"]["steps"] == 2


def test_interrupted_ones_go_on_to_the_same_bytes(cut_run, full_run, session, interrupted_after):
    def command():
        baselines.make(cut_run, ["pruned", "dropped"], session, recovery=SETTINGS)

    interrupted_after(artifacts, "write_json", 1, command)  # the first report, not yet in its place
    assert not (cut_run / "baselines" / "pruned").exists()
    interrupted_after(artifacts, "write_json", 2, command)
    assert [path.name for path in (cut_run / "baselines").iterdir()] == ["pruned"]
    interrupted_after(training_state, "save", 3, command)
    assert (cut_run / "baselines" / "checkpoints" / "pruned-recovered" / "state").exists()
    interrupted_after(training_state, "save", 3, command)
    command()
    assert lasting(cut_run / "baselines") == lasting(full_run / "baselines")
    assert not (cut_run / "baselines" / "checkpoints").exists()


def test_a_folder_that_is_something_else_is_kept(cut_run, session):
    target = shutil.copytree(cut_run / "control", cut_run / "baselines" / "pruned")
    before = tree(target)
    with pytest.raises(UserError, match="was made otherwise"):
        baselines.make(cut_run, ["pruned"], session)
    assert tree(target) == before


@pytest.mark.parametrize("kinds", [["prune"], ["pruned", "distilgpt2"]])
def test_unknown_kinds(cut_run, session, kinds):
    with pytest.raises(UserError, match=r"unknown baseline .* allowed: dropped, pruned"):
        baselines.make(cut_run, kinds, session)


def test_a_run_without_a_rewritten_model(aligned_run, session):
    with pytest.raises(UserError, match="has no rewritten model yet"):
        baselines.make(aligned_run, ["pruned"], session)


def test_none_is_recovered_on_other_text_than_the_run_was(cut_run, session, notices, tmp_path):
    (tmp_path / "other.txt").write_text(make_text(700, seed=9))
    made = baselines.make(cut_run, ["dropped"], session, recovery=SETTINGS, source=str(tmp_path / "other.txt"))
    assert list(made) == ["dropped"]
    (said,) = [note for note in notices if "no baseline is recovered" in note]
    assert "training and selection text" in said


def test_the_budget_of_a_run_is_read_from_its_recovered_model(cut_run, made_run):
    settings, seed = baselines.budget(cut_run)
    assert seed == 3
    without = {"train": "lora", "control": True, "checkpoint_every": 25}
    assert settings == dataclasses.replace(SETTINGS, **without)
    assert baselines.budget(made_run) is None


# ---------------------------------------------------------------- rows


def test_rows_of_a_benchmark(full_run, cut_run, tiny_folder, tmp_path, notices, session):
    steps = ["original", "control", "rewritten", "recovered"]
    assert list(run_folder.rows([str(full_run)])) == [*steps, *ALL]
    assert list(run_folder.rows([str(full_run)], ["dropped"])) == [*steps, *ALL[2:]]
    assert list(run_folder.rows([str(full_run)], [])) == steps
    other = shutil.copytree(tiny_folder, tmp_path / "other")
    assert list(run_folder.rows([str(full_run)], [str(other), str(tiny_folder)])) == [*steps, str(other)]
    both = list(run_folder.rows([str(full_run), str(cut_run)], ["pruned"]))
    assert both[1:] == [f"full: {step}" for step in (*steps[1:], *ALL[:2])] + [f"cut: {step}" for step in steps[1:]]
    result = pipeline.run_benchmark([str(full_run)], tmp_path / "out", ["size"], {}, session)
    assert [row.name for row in result.rows] == [*steps, *ALL] and notices == []
    count = {row.name: row.find("parameters") for row in result.rows}
    assert count["pruned-recovered"].settings["non_zero"] == count["rewritten"].value == count["dropped"].value


def test_baselines_that_no_longer_belong_to_the_run_are_warned_of(full_run, session, notices):
    def warnings():
        notices.clear()
        run_folder.warn_of_strangers([str(full_run)], notices.append)
        return {note.removeprefix(f"warning: {full_run}/") for note in notices if "baselines/" in note}

    assert warnings() == set()
    pipeline.finetune(full_run, dataclasses.replace(SETTINGS, steps=2), forced(session))
    differ = "was not tuned as recovered was (steps, training differ)"
    assert warnings() == {f"baselines/{kind}-recovered {differ}" for kind in ("pruned", "dropped")}
    pipeline.rewrite(full_run, [from_record({**CUT, "n": 2})], forced(session))
    size = f"is for a rewritten model of another size than {full_run / 'rewritten'}"
    assert warnings() >= {f"baselines/{kind} {size}" for kind in ("pruned", "dropped")}
    shutil.copytree(full_run / "control", full_run / "baselines" / "dropped", dirs_exist_ok=True)
    assert any("was made from another dropped model than" in note for note in warnings())


def test_a_benchmark_makes_them_once(run, cut_run, tmp_path):
    words = ["benchmark", cut_run, "--baselines", "dropped,pruned", "--metrics", "size", "--device", "cpu", "--json"]
    said = run(*words, "--out", tmp_path / "a")
    assert said.code == 0, said.err
    steps = ["original", "control", "rewritten", "recovered"]
    assert [model["name"] for model in said.json["models"]] == [*steps, *ALL]
    assert report(cut_run / "baselines" / "dropped-recovered")["made_from"]["seed"] == 3  # the run's, not the command's
    assert "made by          dropped_n:" in run("inspect", cut_run / "baselines" / "dropped").out


def test_they_are_what_their_reports_say(full_run):
    for name in ("pruned", "dropped-recovered"):
        opened = open_model(str(full_run / "baselines" / name), device="cpu")
        made = run_folder.made(find(str(opened.folder)))
        assert made["weights"] == opened.hash and made["parameters"] == parameters(opened.model)
        assert probe(opened.model)["logits"] == pytest.approx(made["probe"]["logits"], abs=1e-5)
    damaged = full_run / "baselines" / "pruned" / "report.json"
    damaged.write_text(damaged.read_text().replace('"weights"', '"weight"'))
    with pytest.raises(UserError, match=r"damaged \(weights\); make it anew with `gpt2-compress benchmark --baselines"):
        run_folder.made(find(str(damaged.parent)))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("{model} --baselines pruned", "baselines pruned are those of a run folder, and none is given"),
        ("{run} --baselines pruned,pruned", "allowed: a list of different pruned, dropped or MODELs"),
        ("{run} --baselines pruned,,dropped", "allowed: a list of different"),
        ("{run} --baselines pruned --metrics speed", "unknown metric 'speed'"),
        ("{run} --baselines pruned,./none", "./none does not exist"),
    ],
)
def test_mistakes_before_any_work(refused, cut_run, tiny_folder, tmp_path, words, said):
    given = words.format(run=cut_run, model=tiny_folder).split()
    assert said in refused("benchmark", *given, "--out", tmp_path / "out")


# ---------------------------------------------------------------- recipes


def keys(tiny_folder, text_file, *more):
    return [f"model={tiny_folder}", f"data={text_file}", "search=null", "n=3", "start=1", "collapse=mean",
            "align.max_tokens=600", "finetune.steps=2", "finetune.batch_tokens=256", "finetune.selection_tokens=256",
            "finetune.control=false", "benchmark.metrics=[size]", *more]  # fmt: skip


def test_a_recipe_with_baselines(tmp_path, tiny_folder, text_file, session, notices):
    chosen = load("compressed_4", keys(tiny_folder, text_file, "benchmark.baselines=[dropped, ./none]", "seed=4"))
    assert load("compressed_4", ["benchmark.baselines=[dropped]"]).record()["benchmark"]["baselines"] == ["dropped"]
    result = pipeline.run(tmp_path / "run", chosen, session)
    names = [row.name for row in result.rows]
    assert names == ["original", "rewritten", "recovered", "dropped", "dropped-recovered", "./none"]
    (gap,) = result.rows[-1].gaps
    assert result.rows[-1].results == () and gap.metric == "size" and "./none does not exist" in gap.reason
    assert any("no figures of ./none" in notice for notice in notices)
    assert report(tmp_path / "run" / "baselines" / "dropped-recovered")["made_from"]["seed"] == 4
    before = tree(tmp_path / "run")
    baselines.make(tmp_path / "run", ["pruned"], dataclasses.replace(session, seed=4))  # no row of this recipe's report
    assert pipeline.run(tmp_path / "run", chosen, session) == result
    pruned = {name for name in tree(tmp_path / "run") if name.startswith("baselines/pruned")}
    assert {name: data for name, data in tree(tmp_path / "run").items() if name not in pruned} == before
    pipeline._clear(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []  # --force makes all of it anew


def test_baselines_may_be_the_rewrite_of_a_run(tmp_path, tiny_folder, text_file, session):
    (tmp_path / "prune.yaml").write_text(
        f"model: {tiny_folder}\ndata: {text_file}\nalign: {{method: none}}\nsearch: null\n"
        "rewrites: [{rewrite: pruned, parameters: 60k}]\n"
        "finetune: {steps: 2, batch_tokens: 256, selection_tokens: 256, control: false}\nbenchmark: {metrics: [size]}\n"
    )
    for more in ((), ("rewrites=[{rewrite: dropped_n, n: 3}]", "seed=1", "finetune=null")):
        chosen = load(str(tmp_path / "prune.yaml"), more)
        run = tmp_path / f"run{chosen.seed}"
        result = pipeline.run(run, chosen, session)
        before = tree(run)
        assert pipeline.run(run, chosen, session) == result and tree(run) == before
        count = {row.name: row.find("parameters") for row in result.rows}
        if chosen.seed:
            assert len(report(run / "rewritten")["rewrites"][0]["layers"]) == 2
            assert count["original"].value - count["rewritten"].value == 2 * BLOCK
        else:
            assert count["recovered"].settings["non_zero"] == count["rewritten"].settings["non_zero"] == 60_000
