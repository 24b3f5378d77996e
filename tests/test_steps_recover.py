"""Recovery in a run folder: what is trained and what is not, what is kept, refused and gone on with."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from functools import partial

import pytest
import torch
from conftest import forced, make_config, make_model, make_text, tree
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from compressor import artifacts, data, pipeline, training_state
from compressor.errors import UserError
from compressor.metrics.nll import token_nll
from compressor.models import open_model
from compressor.pipeline import Session
from compressor.recipe import Align, Finetune
from compressor.rewrites import from_record
from compressor.training_schedule import batch_rows

SETTINGS = Finetune(steps=4, batch_tokens=256, context=32, selection_tokens=320, evaluate_every=2, checkpoint_every=1,
                    learning_rate=1e-2, control=False)  # fmt: skip
WITH_CONTROL = dataclasses.replace(SETTINGS, control=True)
CUT = {"rewrite": "compressed_n", "n": 3, "start": 1, "collapse": "mean"}
TIMES = ("seconds", "training_seconds")


def changed(**settings):
    return dataclasses.replace(SETTINGS, **settings)


def tensors(folder):
    return load_file(folder / "model.safetensors")


def altered(before, after):
    """The names of the tensors of two folders that differ in a bit."""
    one, two = tensors(before), tensors(after)
    assert one.keys() == two.keys()
    return {name for name in one if not torch.equal(one[name], two[name])}


def lasting(run):
    """What is the same each time, to the bit: the report without its times."""
    files = tree(run)
    for name in [name for name in files if name.endswith(("recovered/report.json", "control/report.json"))]:
        report = json.loads(files[name])
        assert report["recovery"].keys() >= set(TIMES)
        report["recovery"] = {key: value for key, value in report["recovery"].items() if key not in TIMES}
        files[name] = report
    return files


@pytest.fixture(scope="session")
def _recovered_run(tmp_path_factory, _made_run):
    run = shutil.copytree(_made_run, tmp_path_factory.mktemp("recovered") / "run")
    pipeline.finetune(run, WITH_CONTROL, Session(device="cpu", quiet=True))
    return run


@pytest.fixture
def recovered_run(_recovered_run, tmp_path):
    """A run folder of its own: soft_shared, recovered/ by its deltas and control/."""
    return shutil.copytree(_recovered_run, tmp_path / "recovered")


@pytest.fixture
def cut_run(aligned_run, session):
    """A run folder with three blocks averaged into one: plain GPT-2."""
    pipeline.rewrite(aligned_run, [from_record(CUT)], session)
    return aligned_run


@pytest.fixture
def interrupted(interrupted_after):
    """A function: a command is interrupted right after so many checkpoints."""
    return partial(interrupted_after, training_state, "save")


def blocks_of(text_file, folder, part, tokens):
    """The blocks of a part of the text, taken without the run folder."""
    opened = open_model(str(folder), device="cpu")
    text = data.text(str(text_file), part)
    return data.token_blocks(text, opened.tokenizer, context=32, max_tokens=tokens, seed=0, evenly=True)


def nll(folder, blocks):
    """Nats per predicted token, by transformers' own loss over full logits."""
    model = open_model(str(folder), device="cpu").model
    labels = blocks.ids.masked_fill(~blocks.mask, -100)
    with torch.no_grad():
        return model(blocks.ids, attention_mask=blocks.mask.long(), labels=labels).loss.item()


# ---------------------------------------------------------------- what is trained


def test_deltas_are_trained_and_nothing_else(recovered_run):
    found = altered(recovered_run / "rewritten", recovered_run / "recovered")
    deltas = {name for name in tensors(recovered_run / "rewritten") if ".delta_" in name}
    assert found == deltas and len(deltas) == 3 * 2 * 2
    report = json.loads((recovered_run / "recovered" / "report.json").read_text())
    assert report["recovery"]["train"] == "deltas"
    assert report["recovery"]["trainable"] == 3 * 2 * 4 * (32 + 128)
    first, second = (json.loads((recovered_run / at / "config.json").read_text()) for at in ("rewritten", "recovered"))
    assert first == second


def test_the_control_is_the_original_tuned_alike(recovered_run, tiny_folder):
    found = altered(tiny_folder, recovered_run / "control")
    assert found == {
        f"transformer.h.{layer}.{linear}.weight"
        for layer in range(6)
        for linear in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    control = AutoModelForCausalLM.from_pretrained(recovered_run / "control")
    assert type(control) is GPT2LMHeadModel and control.config.n_layer == 6
    own, other = (json.loads((recovered_run / at / "report.json").read_text()) for at in ("recovered", "control"))
    assert other["recovery"]["train"] == "lora" and other["parameters"] == other["parameters_before"]
    for key in ("steps", "tokens"):
        assert own["recovery"][key] == other["recovery"][key]
    for key in ("batch_tokens", "learning_rate", "seed", "training", "selection"):
        assert own["recovery"]["settings"][key] == other["recovery"]["settings"][key]


@pytest.mark.parametrize("train", ["auto", "full"])
def test_a_plain_model_stays_plain(cut_run, session, train):
    pipeline.finetune(cut_run, changed(train=train), session)
    found = altered(cut_run / "rewritten", cut_run / "recovered")
    names = set(tensors(cut_run / "rewritten"))
    adapted = {name for name in names if name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))}
    assert len(adapted) == 4 * 4 and found == (adapted if train == "auto" else names)
    model, info = AutoModelForCausalLM.from_pretrained(cut_run / "recovered", output_loading_info=True)
    assert type(model) is GPT2LMHeadModel and model.config.n_layer == 4
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not list((cut_run / "recovered").glob("*.py"))
    assert model.config.compression[0]["rewrite"] == "compressed_n"


def test_the_report_is_of_what_happened(recovered_run, tiny_folder, text_file):
    training = blocks_of(text_file, tiny_folder, "training", 4 * 256)
    selection = blocks_of(text_file, tiny_folder, "selection", 320)
    for start, name in ((recovered_run / "rewritten", "recovered"), (tiny_folder, "control")):
        report = json.loads((recovered_run / name / "report.json").read_text())
        done, score = report["recovery"], report["selection_perplexity"]
        assert [row["step"] for row in done["curve"]] == [1, 2, 3, 4]
        assert [row["step"] for row in done["evaluations"]] == [0, 2, 4]
        assert done["evaluations"][0]["tokens"] == int(selection.mask[:, 1:].sum())
        assert score["before"] == pytest.approx(math.exp(nll(start, selection)), rel=1e-4)
        assert score["after"] == pytest.approx(math.exp(nll(recovered_run / name, selection)), rel=1e-4)
        assert score["after"] < score["before"] and done["best_step"] > 0
        rows = batch_rows(len(training.ids), 8, 0, seed=0)
        first = dataclasses.replace(training, ids=training.ids[rows], mask=training.mask[rows])
        assert done["curve"][0]["nll"] == pytest.approx(nll(start, first), rel=2e-2)  # bfloat16 where it is fast
        assert done["tokens"] == int(training.mask[:, 1:].sum())
        facts = report["provenance"]["data"]
        assert set(facts) == {"calibration", "training", "selection"}
        assert facts["training"]["block_fingerprint"] == training.fingerprint == report["made_from"]["training"]
        assert facts["training"]["source"] == str(text_file)
        assert report["provenance"]["base_model"] == str(tiny_folder)


def test_nothing_else_is_left_nor_touched(recovered_run, made_run):
    names = {path.name for path in recovered_run.iterdir()}
    assert names == {"alignment.json", "alignment.safetensors", "rewritten", "recovered", "control"}
    before = tree(made_run)
    assert {name: content for name, content in tree(recovered_run).items() if name in before} == before


def test_the_original_as_teacher(made_run, tiny_folder, text_file, session):
    settings = changed(distill=True, mix=0.5, steps=1, autocast="none", batch_tokens=64, penalty=0.0)
    body = pipeline.finetune(made_run, settings, session)["recovered"]
    assert body["made_from"]["distill"] and body["recovery"]["settings"]["mix"] == 0.5
    assert not (made_run / "control").exists()
    blocks = blocks_of(text_file, tiny_folder, "training", 64)
    rows = batch_rows(len(blocks.ids), 2, 0, seed=0)
    with torch.no_grad():
        teacher, own = (
            open_model(str(folder), device="cpu").model(blocks.ids[rows]).logits[:, :-1].log_softmax(-1)
            for folder in (tiny_folder, made_run / "rewritten")
        )
    divergence = (teacher.exp() * (teacher - own)).sum(-1).mean().item()
    assert body["recovery"]["curve"][0]["divergence"] == pytest.approx(divergence, rel=1e-3)


def test_half_precision_files_stay_half_precision(tmp_path, tiny_tokenizer, text_file, session):
    make_model(make_config()).half().save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    run = tmp_path / "run"
    pipeline.align(run, str(tmp_path / "model"), str(text_file), Align(max_tokens=300), session)
    pipeline.rewrite(run, [from_record({"rewrite": "soft_shared", "n": 3, "start": 1, "rank": 4})], session)
    bodies = pipeline.finetune(run, WITH_CONTROL, session)
    for name, body in bodies.items():
        stored = tensors(run / name)
        assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
        assert all(torch.isfinite(tensor).all() for tensor in stored.values())
        opened = open_model(str(run / name), device="cpu")
        assert opened.stored_dtype == torch.float16 and opened.hash == body["weights"]
        probed = opened.model(torch.tensor([body["probe"]["ids"]])).logits[0].logsumexp(-1)
        assert probed.tolist() == pytest.approx(body["probe"]["logsumexp"], rel=1e-5)
        assert body["selection_perplexity"]["after"] < body["selection_perplexity"]["before"]


# ---------------------------------------------------------------- what others see


def test_a_recovered_model_is_verified(recovered_run, session):
    checks = pipeline.verify_model(str(recovered_run), session)
    assert all(check.passed for check in checks), [check for check in checks if not check.passed]
    assert {"weight files are those that were made", "logits equal those when it was made"} <= {
        check.name for check in checks
    }


def test_a_run_means_its_recovered_model(recovered_run, tmp_path, session):
    body = pipeline.inspect(str(recovered_run))
    report = json.loads((recovered_run / "recovered" / "report.json").read_text())
    assert body["folder"] == str(recovered_run / "recovered")
    assert body["parameters"] == report["parameters"] < body["parameters_before"] == report["parameters_before"]
    assert body["bytes"] == (recovered_run / "recovered" / "model.safetensors").stat().st_size == report["bytes"]
    assert body["compression"][0]["rewrite"] == "soft_shared" and "alignment" in body
    pipeline.export(str(recovered_run), tmp_path / "dense", session)
    ids = torch.arange(30)[None] * 11 % 320
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    recovered = open_model(str(recovered_run / "recovered"), device="cpu").model
    torch.testing.assert_close(dense(ids).logits, recovered(ids).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(
        dense(ids).logits, open_model(str(recovered_run / "rewritten"), device="cpu").model(ids).logits, atol=1e-3
    )


def test_a_table_of_all_models_of_a_run(recovered_run, tmp_path, tiny_folder, session, notices):
    metrics = [{"metric": "perplexity", "max_tokens": 300}, "size"]
    result = pipeline.run_benchmark([str(recovered_run)], tmp_path / "out", metrics, {}, session)
    assert [row.name for row in result.rows] == ["original", "control", "rewritten", "recovered"]
    assert [row.source for row in result.rows] == [
        str(folder)
        for folder in (tiny_folder, *(recovered_run / name for name in ("control", "rewritten", "recovered")))
    ]
    size = [row.find("parameters").value for row in result.rows]
    assert size[0] == size[1] > size[2] == size[3]
    perplexity = [row.find("perplexity").value for row in result.rows]
    assert perplexity[1] < perplexity[0] and perplexity[3] < perplexity[2]
    assert not [note for note in notices if "made with this text" in note]


def test_a_benchmark_on_the_training_text_is_warned_of(recovered_run, text_file, tmp_path, session, notices):
    metrics = [{"metric": "perplexity", "max_tokens": 100}]
    pipeline.run_benchmark([str(recovered_run)], tmp_path / "out", metrics, {"": str(text_file)}, session)
    for row in ("recovered", "control"):
        for part in ("training", "selection"):
            assert f"warning: {row} was made with this text as its {part} data; its figures flatter it" in notices


def test_models_that_no_longer_belong_together_are_warned_of(recovered_run, tmp_path, session, notices):
    def warnings(out):
        notices.clear()
        pipeline.run_benchmark([str(recovered_run)], tmp_path / out, ["size"], {}, session)
        return [note.removeprefix(f"warning: {recovered_run}/") for note in notices if str(recovered_run) in note]

    assert warnings("a") == []
    pipeline.finetune(recovered_run, changed(steps=2), forced(session))
    budget = "control was not tuned as recovered was (steps, training differ)"
    assert warnings("b") == [budget]
    notices.clear()
    pipeline.rewrite(
        recovered_run, [from_record({"rewrite": "soft_shared", "n": 2, "rank": 2, "start": 0})], forced(session)
    )
    (notice,) = notices
    assert f"{recovered_run / 'recovered'} is of the rewritten model that was here before" in notice
    other = f"recovered was made from another rewritten model than {recovered_run / 'rewritten'} is now"
    assert warnings("c") == [budget, other]


# ---------------------------------------------------------------- what is there already


def test_results_are_not_overwritten_unasked(recovered_run, session):
    before = tree(recovered_run)
    with pytest.raises(UserError, match=r"recovered exists already; --force replaces it, --resume keeps it"):
        pipeline.finetune(recovered_run, SETTINGS, session)
    shutil.rmtree(recovered_run / "recovered")
    with pytest.raises(UserError, match="control exists already"):
        pipeline.finetune(recovered_run, WITH_CONTROL, session)
    assert tree(recovered_run) == {key: value for key, value in before.items() if not key.startswith("recovered")}
    body = pipeline.finetune(recovered_run, dataclasses.replace(WITH_CONTROL, steps=2), forced(session))
    assert {name: len(part["recovery"]["curve"]) for name, part in body.items()} == {"recovered": 2, "control": 2}


def test_the_same_again_gives_the_same_bits(recovered_run, made_run, session):
    pipeline.finetune(made_run, WITH_CONTROL, session)
    assert lasting(made_run) == lasting(recovered_run)


def test_what_is_finished_is_kept_and_what_is_not_goes_on(recovered_run, made_run, session, interrupted):
    """Interrupted after 2 of the control's 4 steps; everything else is there."""
    interrupted(4 + 2, lambda: pipeline.finetune(made_run, WITH_CONTROL, session))
    assert {path.name for path in made_run.iterdir()} >= {"recovered", "checkpoints"}
    assert not (made_run / "control").exists()
    kept = {path: path.stat().st_mtime_ns for path in (made_run / "recovered").iterdir()}
    with pytest.raises(UserError, match="recovered exists already"):
        pipeline.finetune(made_run, WITH_CONTROL, session)
    with pytest.raises(UserError, match="the checkpoint of an interrupted recovery; --resume with"):
        shutil.move(made_run / "recovered", made_run / "aside")
        try:
            pipeline.finetune(made_run, WITH_CONTROL, session)
        finally:
            shutil.move(made_run / "aside", made_run / "recovered")
    trained = []
    bodies = counted_steps(trained, lambda: pipeline.finetune(made_run, WITH_CONTROL, session, resume=True))
    assert trained == [2, 3]  # of the control; the first is step 0
    assert {path: path.stat().st_mtime_ns for path in (made_run / "recovered").iterdir()} == kept
    assert lasting(made_run) == lasting(recovered_run)
    report = json.loads((made_run / "recovered" / "report.json").read_text())
    assert bodies["recovered"] == {name: report[name] for name in bodies["recovered"]}
    assert bodies["recovered"].keys() == bodies["control"].keys()  # of a kept one as of a fresh one


def counted_steps(trained, command):
    """Runs a command; the steps that are really made go into `trained`."""
    from compressor.training_loop import Loop

    real = Loop._train

    def counted(self):
        trained.append(self.step)
        real(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "_train", counted)
        return command()


@pytest.mark.parametrize("after", [1, 4])
def test_an_interrupted_training_goes_on_to_the_same_bits(recovered_run, made_run, session, interrupted, after):
    """After the last step, too, when only the saving was left."""
    interrupted(after, lambda: pipeline.finetune(made_run, SETTINGS, session))
    assert not (made_run / "recovered").exists()
    trained = []
    counted_steps(trained, lambda: pipeline.finetune(made_run, changed(checkpoint_every=3), session, resume=True))
    assert trained == list(range(after, 4)) and not (made_run / "checkpoints").exists()
    whole = lasting(recovered_run)
    assert lasting(made_run) == {name: content for name, content in whole.items() if not name.startswith("control")}


def test_a_forced_training_does_not_go_on(made_run, recovered_run, session, interrupted):
    interrupted(2, lambda: pipeline.finetune(made_run, changed(learning_rate=1e-3), session))
    trained = []
    counted_steps(trained, lambda: pipeline.finetune(made_run, SETTINGS, forced(session)))
    assert trained == [0, 1, 2, 3] and not (made_run / "checkpoints").exists()
    assert tensors(made_run / "recovered").keys() and not altered(made_run / "recovered", recovered_run / "recovered")


def test_a_control_is_added_later(recovered_run, made_run, session):
    pipeline.finetune(made_run, SETTINGS, session)
    trained = []
    counted_steps(trained, lambda: pipeline.finetune(made_run, WITH_CONTROL, session, resume=True))
    assert trained == [0, 1, 2, 3] and lasting(made_run) == lasting(recovered_run)


OTHER = {
    "steps": {"settings": changed(steps=5)},
    "learning_rate": {"settings": changed(learning_rate=1e-3)},
    "distill": {"settings": changed(distill=True)},
    "training": {"settings": changed(context=64)},
    "seed": {"seed": 1},
    "other text": {"text": make_text(400, seed=4)},
}


@pytest.mark.parametrize("case", OTHER)
def test_going_on_otherwise_is_refused_and_loses_nothing(recovered_run, tmp_path, session, case):
    other = dict(OTHER[case])
    if "seed" in other:
        session = dataclasses.replace(session, seed=other["seed"])
    source = None
    if "text" in other:
        (tmp_path / "other.txt").write_text(other["text"])
        source = str(tmp_path / "other.txt")
    settings = dataclasses.replace(other.get("settings", SETTINGS), control=True)
    before = tree(recovered_run)
    with pytest.raises(UserError, match=r"was made with .*; --force makes it anew") as error:
        pipeline.finetune(recovered_run, settings, session, source=source, resume=True)
    assert "\n" not in str(error.value) and tree(recovered_run) == before


def test_a_seed_that_changes_no_text_is_another_training(made_run, tmp_path, session):
    """All of the text is used either way; the batches come in another order."""
    (tmp_path / "short.txt").write_text(make_text(60, seed=4))
    settings = changed(steps=2, batch_tokens=2000, selection_tokens=2000)
    other = dataclasses.replace(session, seed=1)
    first = pipeline.finetune(made_run, settings, session, source=str(tmp_path / "short.txt"))["recovered"]
    with pytest.raises(UserError, match="seed=0, now it is 1"):
        pipeline.finetune(made_run, settings, other, source=str(tmp_path / "short.txt"), resume=True)
    again = pipeline.finetune(made_run, settings, forced(other), source=str(tmp_path / "short.txt"))["recovered"]
    assert again["made_from"] == {**first["made_from"], "seed": 1}


@pytest.mark.parametrize("case", ["steps", "seed", "other text"])
def test_a_checkpoint_of_another_training_is_refused_and_kept(made_run, tmp_path, session, interrupted, case):
    interrupted(2, lambda: pipeline.finetune(made_run, SETTINGS, session))
    (tmp_path / "other.txt").write_text(make_text(400, seed=4))
    before = tree(made_run)
    with pytest.raises(UserError, match="holds a training with") as error:
        pipeline.finetune(
            made_run,
            changed(steps=5) if case == "steps" else SETTINGS,
            dataclasses.replace(session, seed=1) if case == "seed" else session,
            source=str(tmp_path / "other.txt") if case == "other text" else None,
            resume=True,
        )
    assert "\n" not in str(error.value) and tree(made_run) == before


def test_a_control_made_otherwise_is_found_before_the_training(recovered_run, session, monkeypatch):
    shutil.rmtree(recovered_run / "recovered")
    before = tree(recovered_run)
    monkeypatch.setattr("compressor.training_loop.Loop._train", lambda self: pytest.fail("trained"))
    settings = dataclasses.replace(WITH_CONTROL, learning_rate=1e-3)
    with pytest.raises(UserError, match=r"control was made with learning_rate=0.01, now it is 0.001"):
        pipeline.finetune(recovered_run, settings, session, resume=True)
    assert tree(recovered_run) == before


def test_a_recovery_of_another_rewrite_is_not_gone_on_with(recovered_run, session):
    pipeline.rewrite(recovered_run, [from_record({"rewrite": "soft_shared", "n": 2, "rank": 2})], forced(session))
    before = tree(recovered_run)
    with pytest.raises(UserError, match="was made with start="):
        pipeline.finetune(recovered_run, WITH_CONTROL, session, resume=True)
    assert tree(recovered_run) == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_text("{"),
        lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), "made_from": 3})),
        lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), "kind": "rewrite"})),
    ],
    ids=["gone", "cut off", "made from nothing", "of a rewrite"],
)
def test_a_damaged_result_is_not_gone_on_with(recovered_run, session, damage):
    damage(recovered_run / "control" / "report.json")
    before = tree(recovered_run)
    with pytest.raises(UserError, match="--force") as error:
        pipeline.finetune(recovered_run, WITH_CONTROL, session, resume=True)
    assert "control" in str(error.value) and "\n" not in str(error.value) and tree(recovered_run) == before


def test_a_save_that_fails_is_gone_on_from(made_run, recovered_run, session, monkeypatch):
    """The checkpoint of the last step is there until the result is."""
    real = artifacts.write_json

    def fail(path, *arguments):
        if path.parent.name.endswith("recovered"):
            raise OSError(28, "No space left on device")
        real(path, *arguments)

    before = tree(made_run)
    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "write_json", fail)
        with pytest.raises(UserError, match=r"cannot write .*recovered: No space left"):
            pipeline.finetune(made_run, SETTINGS, session)
    assert {name: content for name, content in tree(made_run).items() if not name.startswith("checkpoints")} == before
    trained = []
    counted_steps(trained, lambda: pipeline.finetune(made_run, SETTINGS, session, resume=True))
    assert trained == [] and not altered(made_run / "recovered", recovered_run / "recovered")


# ---------------------------------------------------------------- mistakes


def test_what_cannot_be_trained(made_run, cut_run, tiny_folder, text_file, tmp_path, session):
    (tmp_path / "short.txt").write_text(make_text(3))
    overlapping = {**dict.fromkeys(data.PARTS, "demo"), "training": str(text_file)}
    before = tree(made_run), tree(cut_run)
    for said, run, settings, rest in (
        ("train is 'deltas', and this model has none", cut_run, changed(train="deltas"), {}),
        ("context is 65; allowed: 2 to 64", made_run, changed(context=65), {}),
        ("shares text with the calibration text", made_run, SETTINGS, {"source": overlapping}),
        ("one block needs 32", made_run, SETTINGS, {"source": str(tmp_path / "short.txt")}),
        ("there is no such file", made_run, SETTINGS, {"source": str(tmp_path / "none.txt")}),
    ):
        with pytest.raises(UserError) as error:
            pipeline.finetune(run, settings, session, **rest)
        assert said in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="recovery trains float32 weights, these are bfloat16"):
        pipeline.finetune(made_run, SETTINGS, dataclasses.replace(session, dtype="bfloat16"))
    assert (tree(made_run), tree(cut_run)) == before


def test_a_run_without_a_rewritten_model_says_what_makes_one(aligned_run, tmp_path, session):
    before = tree(tmp_path)
    with pytest.raises(UserError, match=f"`gpt2-compress rewrite --run {aligned_run}` makes one"):
        pipeline.finetune(aligned_run, SETTINGS, session)
    with pytest.raises(UserError, match="gpt2-compress align"):
        pipeline.finetune(tmp_path / "none", SETTINGS, session)
    assert tree(tmp_path) == before


def test_a_training_that_diverges_is_one_line_and_keeps_the_old_result(recovered_run, session):
    before = tree(recovered_run)
    with pytest.raises(UserError, match="not a finite number with learning_rate=") as error:
        pipeline.finetune(recovered_run, changed(train="full", learning_rate=1e30), forced(session))
    assert "\n" not in str(error.value)
    after = {name: content for name, content in tree(recovered_run).items() if not name.startswith("checkpoints")}
    assert after == before


def test_the_nll_of_these_tests_is_that_of_the_package(tiny_folder, text_file):
    blocks = blocks_of(text_file, tiny_folder, "selection", 300)  # the last row is padded
    model = open_model(str(tiny_folder), device="cpu").model
    own = token_nll(model, blocks.ids, blocks.mask).sum().item() / int(blocks.mask[:, 1:].sum())
    assert nll(tiny_folder, blocks) == pytest.approx(own, rel=1e-5)


def test_a_forced_recovery_that_is_interrupted_goes_on_although_an_older_result_is_there(
    recovered_run, made_run, session, interrupted
):
    older = dataclasses.replace(WITH_CONTROL, steps=1, control=False)
    pipeline.finetune(made_run, older, session)
    forced = dataclasses.replace(session, force=True)
    interrupted(2, lambda: pipeline.finetune(made_run, WITH_CONTROL, forced))
    assert (made_run / "recovered" / "config.json").exists() and (made_run / "checkpoints" / "recovered").exists()
    pipeline.finetune(made_run, WITH_CONTROL, session, resume=True)
    assert lasting(made_run) == lasting(recovered_run)


def test_training_text_may_not_be_what_the_best_state_is_chosen_on(made_run, tmp_path, session):
    other = tmp_path / "other.txt"
    other.write_text(make_text(300, seed=9))
    same = tmp_path / "same.txt"
    same.write_text(other.read_text())
    parts = dict.fromkeys(("calibration", "test"), str(made_run)) | {"training": str(other), "selection": str(same)}
    parts |= {"calibration": "demo", "test": "demo"}
    with pytest.raises(
        UserError, match=r"training text .*other\.txt.* and the selection text .*same\.txt.* share text"
    ):
        pipeline.finetune(made_run, Finetune(steps=1, control=False), session, source=parts)


def test_no_clipping_is_not_a_gradient_of_nothing(made_run, session):
    settings = Finetune(steps=2, batch_tokens=128, selection_tokens=128, clip=0.0, learning_rate=1e-2, control=False)
    done = pipeline.finetune(made_run, settings, session)["recovered"]["recovery"]
    assert len({row["nll"] for row in done["evaluations"]}) == 3


def test_a_training_on_short_rows_says_what_it_leaves_untrained(cut_run, session, notices):
    pipeline.finetune(cut_run, changed(steps=1, context=16), session)
    (said,) = [note for note in notices if "positions" in note]
    assert "context=16 trains that many" in said and "measure at context=16" in said
    notices.clear()
    pipeline.finetune(cut_run, changed(steps=1, context=None), forced(session))
    assert not [note for note in notices if "positions" in note]


def test_a_recovery_of_another_way_to_train_is_not_kept(made_run, session):
    """How a nested model learns leaves its weights before the training as they are."""
    nested = {"rewrite": "matryoshka", "ffn": [0.5]}
    pipeline.rewrite(made_run, [from_record(nested)], dataclasses.replace(session, force=True))
    pipeline.finetune(made_run, SETTINGS, session)
    assert pipeline.finetune(made_run, SETTINGS, session, resume=True)
    pipeline.rewrite(made_run, [from_record({**nested, "inner": 0.25})], dataclasses.replace(session, force=True))
    with pytest.raises(UserError, match=r"was made with rewrites .*'inner': 0.0.* now it is .*'inner': 0.25"):
        pipeline.finetune(made_run, SETTINGS, session, resume=True)
