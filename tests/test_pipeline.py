"""Commands on run folders: what they write, refuse, keep, and say."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import forced, make_config, make_model, make_text
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from compressor import alignment, artifacts, modeling, models, pipeline, report, run_folder
from compressor.errors import UserError
from compressor.models import open_model
from compressor.pipeline import Session
from compressor.recipe import Align
from compressor.rewrites import from_record

SOFT = {"rewrite": "soft_shared", "n": 3, "start": 1, "rank": 4}
SHORT = [{"metric": "perplexity", "max_tokens": 300}]


def rewrite(run, session, *records):
    return pipeline.rewrite(run, [from_record(record) for record in records or (SOFT,)], session)


def tree(folder):
    """Every path below a folder, files with their bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def logits(folder):
    ids = torch.arange(30)[None] * 11 % 320
    with torch.no_grad():
        return open_model(str(folder), device="cpu").model(ids).logits


# ---------------------------------------------------------------- align


def test_an_alignment_says_what_it_is_of(made_run, tiny_folder, text_file):
    solved, origin = alignment.load(made_run)
    assert (solved.n_layer, solved.d_ff, solved.tokens, solved.method) == (6, 128, 1000, "activation")
    assert origin["base_model"] == str(tiny_folder) and origin["base_hash"] == open_model(str(tiny_folder)).hash
    facts = origin["data"]["calibration"]
    assert facts["specs"] == str(text_file) and facts["part"] == "calibration" and facts["tokens"] == 1000


@pytest.mark.parametrize("settings", [Align(method="none"), Align(method="weight"), Align(site="post", max_tokens=500)])
def test_other_ways_to_align(tmp_path, tiny_folder, text_file, session, settings):
    solved = pipeline.align(tmp_path / "run", str(tiny_folder), str(text_file), settings, session)
    stored, _ = alignment.load(tmp_path / "run")
    assert stored.method == settings.method and stored.site == (settings.site if solved.tokens else None)
    body = rewrite(tmp_path / "run", session)
    routes = {row["route"] for row in body["alignment"]["routes"]}
    assert routes == ({"identity"} if settings.method == "none" else {"direct"})


def test_direct_pairs_are_taken_where_they_are_and_said_so(tmp_path, tiny_folder, text_file, session):
    for pairs, routes in (("chain", ["chain", "direct", "direct", "chain"]), ("direct", ["direct"] * 4)):
        settings = Align(pairs=pairs, max_tokens=500)
        run = tmp_path / pairs
        pipeline.align(run, str(tiny_folder), str(text_file), settings, session, n=5 if pairs == "direct" else None)
        body = rewrite(run, session, {**SOFT, "n": 5, "start": 0})
        assert [row["route"] for row in body["alignment"]["routes"]] == routes


def test_the_same_seed_gives_the_same_files(tmp_path, tiny_folder, text_file, session):
    runs = [tmp_path / "one", tmp_path / "two"]
    for run in runs:
        pipeline.align(run, str(tiny_folder), str(text_file), Align(max_tokens=500), session)
        rewrite(run, session, {**SOFT, "base": "lsq"})
    for file in ("alignment.safetensors", "rewritten/model.safetensors", "rewritten/config.json"):
        assert (runs[0] / file).read_bytes() == (runs[1] / file).read_bytes(), file


def test_an_alignment_is_not_overwritten_unasked(made_run, tiny_folder, text_file, session):
    before = tree(made_run)
    with pytest.raises(UserError, match="has an alignment already"):
        pipeline.align(made_run, str(tiny_folder), str(text_file), Align(), session)
    assert tree(made_run) == before
    pipeline.align(made_run, str(tiny_folder), str(text_file), Align(max_tokens=600), forced(session))
    assert alignment.load(made_run)[0].tokens == 600


def test_a_forced_alignment_that_fails_keeps_the_old_one(made_run, tiny_folder, text_file, session, monkeypatch):
    before = tree(made_run)
    write_json = artifacts.write_json

    def fail(path, *arguments):  # the second of the two files
        if path.name == "alignment.json":
            raise OSError(28, "No space left on device")
        write_json(path, *arguments)

    monkeypatch.setattr(artifacts, "write_json", fail)
    with pytest.raises(UserError, match="No space left"):
        pipeline.align(made_run, str(tiny_folder), str(text_file), Align(max_tokens=600), forced(session))
    assert tree(made_run) == before


@pytest.mark.parametrize("n", [7, 40_000_000])
def test_direct_pairs_are_checked_against_the_model_before_the_work(tmp_path, tiny_folder, text_file, session, n):
    with pytest.raises(UserError, match="allowed: 1 to 6"):
        settings = Align(pairs="direct")
        pipeline.align(tmp_path / "run", str(tiny_folder), str(text_file), settings, session, n=n)
    assert not (tmp_path / "run").exists()


def test_folders_that_are_no_place_for_a_run(tmp_path, tiny_folder, text_file, session):
    (tmp_path / "file").write_text("x")
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    before = tree(tmp_path)
    for place, said in ((tmp_path / "file", "is a file"), (model, "is a model's folder")):
        with pytest.raises(UserError, match=said):
            pipeline.align(place, str(tiny_folder), str(text_file), Align(), session)
    with pytest.raises(UserError, match="is a model's folder"):
        pipeline.run_benchmark([str(model)], model, ["size"], {}, forced(session))
    assert tree(tmp_path) == before


def test_a_compressed_model_is_not_compressed_again(made_run, tmp_path, text_file, session):
    with pytest.raises(UserError, match=r"export .* --dense"):
        pipeline.align(tmp_path / "run", str(made_run), str(text_file), Align(), session)
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- rewrite


def test_a_rewrite_writes_a_model_and_its_report(made_run, tiny_folder):
    names = {path.name for path in (made_run / "rewritten").iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "model.safetensors", "report.json", "README.md"),
        *("tokenizer.json", "tokenizer_config.json"),
        *({file.name for file in Path(modeling.__file__).parent.glob("*.py")} - {"__init__.py"}),
    }
    body = json.loads((made_run / "rewritten" / "report.json").read_text())
    assert body["kind"] == "rewrite" and body["rewrites"][0]["rank"] == 4
    assert body["provenance"]["base_model"] == str(tiny_folder)
    assert body["provenance"]["data"]["calibration"]["part"] == "calibration"


def test_no_two_tensors_of_a_shared_model_are_the_same(made_run):
    tensors = load_file(made_run / "rewritten" / "model.safetensors")
    digests = [tensor.numpy().tobytes() for tensor in tensors.values()]
    assert len(set(digests)) == len(digests)
    assert not [key for key in tensors if key.startswith("transformer.h.2.mlp") and key.endswith("weight")]
    assert sum(tensor.numel() for tensor in tensors.values()) * 4 == sum(map(len, digests))


def test_an_untied_head_stays_untied_and_the_ffns_stay_shared(tmp_path, tiny_tokenizer, text_file, session):
    model = make_model(make_config(tie_word_embeddings=False))
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    run = tmp_path / "run"
    pipeline.align(run, str(tmp_path / "model"), str(text_file), Align(max_tokens=500), session)
    body = rewrite(run, session)
    again = open_model(str(run), device="cpu").model
    assert not again.config.tie_word_embeddings and len(again.transformer.ffn_bank) == 1
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert sum(parameter.numel() for parameter in again.parameters()) == body["parameters"]
    assert body["parameters_before"] - body["parameters"] == 2 * (2 * 32 * 128) - 3 * 2 * 4 * (32 + 128)


def test_a_forced_rewrite_that_fails_keeps_the_old_one(made_run, session, monkeypatch):
    before = tree(made_run)
    with pytest.raises(UserError, match="exists already"):
        rewrite(made_run, session)
    monkeypatch.setattr(artifacts, "write_json", lambda *arguments: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(UserError, match="cannot write"):
        rewrite(made_run, forced(session), {**SOFT, "rank": 2})
    assert tree(made_run) == before
    monkeypatch.undo()
    rewrite(made_run, forced(session), {**SOFT, "rank": 2})
    assert open_model(str(made_run)).model.config.ffn_groups[0]["rank"] == 2
    assert sorted(path.name for path in made_run.iterdir()) == ["alignment.json", "alignment.safetensors", "rewritten"]


def test_what_a_killed_step_left_goes_at_the_next_start(aligned_run, session):
    (aligned_run / (artifacts._UNFINISHED + "rewritten")).mkdir()
    (aligned_run / (artifacts._UNFINISHED + "rewritten") / "model.safetensors").write_text("half")
    rewrite(aligned_run, session)
    assert not list(aligned_run.glob(".*"))


def test_the_alignment_of_another_model_is_refused(tmp_path, tiny_folder, text_file, session):
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    run = tmp_path / "run"
    pipeline.align(run, str(model), str(text_file), Align(max_tokens=500), session)
    make_model(make_config(), seed=1).save_pretrained(model)
    before = tree(run)
    with pytest.raises(UserError, match="is of another model"):
        rewrite(run, session)
    shutil.rmtree(model)
    with pytest.raises(UserError, match="does not exist"):
        rewrite(run, session)
    assert tree(run) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("quality"),
        lambda d: d["quality"][0].pop("anchor"),
        lambda d: d["quality"][0].update(matched="well"),
        lambda d: d["quality"][0].update(layer=5),
        lambda d: d.update(d_ff=64),
        lambda d: d.pop("provenance"),
        lambda d: d["provenance"].pop("base_model"),
        lambda d: d["provenance"].update(base_model=3),
        lambda d: d["provenance"].update(data={}),
        lambda d: d["provenance"].update(data=None),
        lambda d: d["provenance"]["data"]["calibration"].pop("specs"),
        lambda d: d["provenance"]["data"]["calibration"].update(split_given=[]),
    ],
)
def test_a_damaged_alignment_is_one_line(aligned_run, session, change):
    path = aligned_run / "alignment.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    for command in (lambda: rewrite(aligned_run, session), lambda: pipeline.inspect(str(aligned_run))):
        with pytest.raises(UserError, match="gpt2-compress align") as error:
            command()
        assert "\n" not in str(error.value)


def test_a_text_that_changed_since_the_alignment_is_refused(tmp_path, tiny_folder, text_file, session):
    text = shutil.copy(text_file, tmp_path / "text.txt")
    pipeline.align(tmp_path / "run", str(tiny_folder), str(text), Align(max_tokens=500), session)
    text.write_text("Another beginning. " + text_file.read_text())
    with pytest.raises(UserError, match="has changed since the alignment was made"):
        rewrite(tmp_path / "run", session)


def test_a_run_serves_from_any_folder(tmp_path, tiny_folder, text_file, session, monkeypatch):
    """The model and the text were named by relative paths."""
    shutil.copytree(tiny_folder, tmp_path / "model")
    shutil.copy(text_file, tmp_path / "text.txt")
    monkeypatch.chdir(tmp_path)
    pipeline.align(tmp_path / "run", "model", "text.txt", Align(max_tokens=500), session)
    os.mkdir("elsewhere")
    monkeypatch.chdir("elsewhere")
    rewrite(tmp_path / "run", session)
    result = pipeline.run_benchmark(["../run"], tmp_path / "out", SHORT, {}, session)
    assert [row.name for row in result.rows] == ["original", "rewritten"]
    assert result.rows[0].find("perplexity").settings["source"] == "text.txt"  # as the user named it


def test_the_middle_window_is_taken_with_a_notice(aligned_run, session, notices):
    rewrite(aligned_run, session, {"rewrite": "compressed_n", "n": 3, "collapse": "mean"})
    (notice,) = notices
    assert "no --start given" in notice and "middle window" in notice and "layer 1" in notice
    notices.clear()
    rewrite(aligned_run, forced(session), {"rewrite": "compressed_n", "n": 3, "collapse": "mean", "scope": "tile"})
    rewrite(aligned_run, forced(session), {"rewrite": "compressed_n", "n": 3, "collapse": "mean", "start": 1})
    assert notices == []


def test_several_rewrites_count_original_layers(aligned_run, session):
    records = [{**SOFT, "n": 2, "start": 4}, {"rewrite": "compressed_n", "n": 3, "start": 0, "collapse": "keep"}]
    body = rewrite(aligned_run, session, *records)
    assert body["layers"] == 4 and open_model(str(aligned_run)).model.config.ffn_groups[0]["layers"] == [2, 3]
    before = tree(aligned_run)
    with pytest.raises(UserError, match=r"rewrites.0 \(soft_shared\) and rewrites.1 \(compressed_n\) both take over"):
        rewrite(aligned_run, forced(session), {**SOFT, "start": 2}, records[1])
    assert tree(aligned_run) == before


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_probe_in_the_report_is_of_what_was_saved(tmp_path, tiny_tokenizer, text_file, session, dtype):
    """With --dtype too: the files keep their own."""
    make_model(make_config()).half().save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    session = dataclasses.replace(session, dtype=dtype)
    pipeline.align(tmp_path / "run", str(tmp_path / "model"), str(text_file), Align(max_tokens=300), session)
    body = rewrite(tmp_path / "run", session)
    opened = open_model(str(tmp_path / "run"), device="cpu")
    assert opened.stored_dtype == torch.float16
    ids = torch.tensor([body["probe"]["ids"]])
    assert opened.model(ids).logits[0].logsumexp(-1).tolist() == pytest.approx(body["probe"]["logsumexp"], rel=1e-5)


# ---------------------------------------------------------------- export


def test_export_is_plain_gpt2_and_computes_the_same(made_run, tmp_path, session):
    body = pipeline.export(str(made_run), tmp_path / "dense", session)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert type(dense) is GPT2LMHeadModel and not list((tmp_path / "dense").glob("*.py"))
    assert "auto_map" not in (tmp_path / "dense" / "config.json").read_text()
    torch.testing.assert_close(logits(tmp_path / "dense"), logits(made_run), rtol=1e-5, atol=1e-5)
    assert body["parameters"] == sum(parameter.numel() for parameter in dense.parameters()) > body["parameters_before"]
    assert body["bytes"] == (tmp_path / "dense" / "model.safetensors").stat().st_size
    again = tmp_path / "again"
    pipeline.align(again, str(tmp_path / "dense"), "demo", Align(method="none"), session)  # a plain one to start from


def test_export_of_similarities_while_they_are_dot_products(aligned_run, tmp_path, session):
    record = {"rewrite": "tversky", "targets": ["q", "c_fc", "lm_head"], "bank_size": 0.5}
    rewrite(aligned_run, session, record)
    pipeline.export(str(aligned_run), tmp_path / "dense", session)
    dense = open_model(str(tmp_path / "dense"), device="cpu")
    assert dense.plain and not dense.model.config.tie_word_embeddings  # the head is of half the rank
    torch.testing.assert_close(logits(tmp_path / "dense"), logits(aligned_run), rtol=1e-4, atol=1e-4)
    moved = open_model(str(aligned_run), device="cpu")
    with torch.no_grad():
        moved.model.transformer.h[2].mlp.c_fc.scalars.theta.fill_(1.25)
    models.save(moved.model, tmp_path / "moved", moved.tokenizer, torch.float32)
    with pytest.raises(UserError, match=r"tversky c_fc of layer 2 is not linear.*theta 1\.25, alpha \+ beta 1\)"):
        pipeline.export(str(tmp_path / "moved"), tmp_path / "none", session)
    assert not (tmp_path / "none").exists()


def test_export_replaces_a_models_folder_only(made_run, tmp_path, session, monkeypatch):
    before = tree(made_run)
    with pytest.raises(UserError, match="exists already"):
        pipeline.export(str(made_run), made_run, session)
    for out in (made_run, tmp_path, ".", "/"):
        monkeypatch.chdir(made_run)
        with pytest.raises(UserError, match="is no model's folder and is not replaced"):
            pipeline.export(str(made_run), out, forced(session))
    assert tree(made_run) == before
    pipeline.export(str(made_run), made_run / "dense", session)
    pipeline.export(str(made_run), made_run / "dense", forced(session))
    (tmp_path / "empty").mkdir()
    pipeline.export(str(made_run), tmp_path / "empty", forced(session))


# ---------------------------------------------------------------- benchmark


def test_a_run_gives_its_original_and_its_rewritten_model(made_run, tmp_path, session, notices, tiny_folder):
    result = pipeline.run_benchmark([str(made_run)], tmp_path / "out", [*SHORT, "size"], {}, session)
    assert [row.name for row in result.rows] == ["original", "rewritten"]
    assert [row.source for row in result.rows] == [str(tiny_folder), str(made_run / "rewritten")]
    assert result.rows[1].find("parameters").value < result.rows[0].find("parameters").value
    assert result.rows[0].find("perplexity").settings["part"] == "test" and notices == []
    assert report.read(tmp_path / "out").to_dict() == result.to_dict()
    assert {"report.json", "report.md"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_names_of_rows(made_run, tmp_path, tiny_folder, session):
    twin = shutil.copytree(made_run, tmp_path / "other" / "made")
    rows = run_folder.rows([str(made_run), str(twin)])
    assert rows == {
        str(tiny_folder): str(tiny_folder),
        "made: rewritten": str(made_run / "rewritten"),
        f"{twin}: rewritten": str(twin / "rewritten"),
    }
    assert run_folder.rows([str(tiny_folder), str(made_run)]) == {
        str(tiny_folder): str(tiny_folder),
        "made: rewritten": str(made_run / "rewritten"),
    }
    for names in ([str(tiny_folder)] * 2, [str(tiny_folder), str(tiny_folder) + "/"], [str(made_run)] * 2):
        with pytest.raises(UserError, match="is named twice"):
            run_folder.rows(names)


def test_a_run_without_a_model_has_nothing_to_compare(aligned_run, tmp_path, session):
    with pytest.raises(UserError, match="gpt2-compress rewrite"):
        pipeline.run_benchmark([str(aligned_run)], tmp_path / "out", ["size"], {}, session)
    assert not (tmp_path / "out").exists()


def test_text_that_a_model_was_made_with_is_warned_of(made_run, tmp_path, text_file, session, notices):
    pipeline.run_benchmark([str(made_run)], tmp_path / "a", SHORT, {"": str(text_file)}, session)
    assert [note for note in notices if "rewritten was made with this text as its calibration data" in note]
    assert len(notices) == 1
    notices.clear()
    (tmp_path / "fresh.txt").write_text(make_text(60, seed=5))
    pipeline.run_benchmark([str(made_run)], tmp_path / "b", SHORT, {"perplexity": str(tmp_path / "fresh.txt")}, session)
    assert notices == []


def test_models_of_one_structure_are_warned_of(aligned_run, tmp_path, session, notices):
    rewrite(aligned_run, session, {"rewrite": "merged_n", "n": 3, "start": 1})  # untied: as large as before
    pipeline.run_benchmark([str(aligned_run)], tmp_path / "a", ["size"], {}, session)
    assert notices == [
        "warning: rewritten has the same structure as original: neither is smaller or faster than the other"
    ]


def test_every_mistake_before_the_first_figure(made_run, tmp_path, tiny_folder, text_file, session, monkeypatch):
    monkeypatch.setattr("compressor.benchmark.benchmark", lambda *a, **k: pytest.fail("measured"))
    broken = shutil.copytree(tiny_folder, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"short")
    before = tree(tmp_path)
    for names, metrics, sources, said in (
        ([str(tiny_folder), str(broken)], ["size"], {}, "damaged"),
        ([str(tiny_folder), str(tmp_path / "none")], ["size"], {}, "does not exist"),
        ([str(tiny_folder)], ["perplexity"], {}, "needs data"),
        ([str(tiny_folder)], ["perplexity"], {"": str(tmp_path / "none.txt")}, "no such file"),
        ([str(tiny_folder)], ["perplexty"], {}, "did you mean"),
    ):
        with pytest.raises(UserError, match=said):
            pipeline.run_benchmark(names, tmp_path / "out", metrics, sources, session)
    assert tree(tmp_path) == before


def test_a_report_is_not_overwritten_unasked_nor_lost(made_run, tmp_path, session, monkeypatch):
    out = tmp_path / "out"
    pipeline.run_benchmark([str(made_run)], out, ["size"], {}, session)
    before = tree(out)
    with pytest.raises(UserError, match="has a report already"):
        pipeline.run_benchmark([str(made_run)], out, ["size"], {}, session)
    real = artifacts.write_bytes

    def full(path, content):
        if path.name == "report.md":
            raise OSError(28, "full")
        real(path, content)

    monkeypatch.setattr(artifacts, "write_bytes", full)
    with pytest.raises(UserError, match="cannot write"):
        pipeline.run_benchmark([str(made_run)], out, SHORT, {}, forced(session))
    assert {name: content for name, content in tree(out).items() if name != "measured.json"} == before


# ---------------------------------------------------------------- demo


@pytest.mark.parametrize(
    ("terminal", "quiet", "drawn"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_bars_are_drawn_on_a_terminal_only(monkeypatch, terminal, quiet, drawn):
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
    with Session(quiet=quiet).bar("x") as bar:
        assert bar.disable is not drawn
