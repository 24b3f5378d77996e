"""verify passes what is whole and names what was tampered with: never a traceback."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import make_config, make_model
from safetensors.torch import load_file, save_file

from compressor import verify as module
from compressor.errors import UserError
from compressor.models import open_model
from compressor.verify import made, verify


@pytest.fixture(scope="session")
def reopened(_made_run, tiny_folder):
    """What the fresh process says, once for the compressed and once for the plain model: it takes seconds."""
    return {
        "compressed": module._reopen(_made_run / "rewritten"),
        "plain": module._reopen(tiny_folder),
    }


@pytest.fixture
def known(monkeypatch, reopened):
    """A function: the fresh process says this from now on."""

    def known(kind, **changes):
        monkeypatch.setattr(module, "_reopen", lambda folder: {**reopened[kind], **changes})

    return known


def failed(folder) -> list[str]:
    return [check.name for check in verify(open_model(str(folder), device="cpu")) if not check.passed]


def change_json(path, change):
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_whole_models_pass_every_check(made_run, tiny_folder, known, reopened):
    known("compressed")
    checks = verify(open_model(str(made_run), device="cpu"))
    assert len(checks) == 14 and all(check.passed for check in checks), checks
    assert reopened["compressed"]["custom_code"] and not reopened["compressed"]["compressor_imported"]
    files = {path.name for path in (made_run / "rewritten").glob("*.py")}
    assert "shared_ffn.py" in files and set(reopened["compressed"]["second_save_files"]) == files
    known("plain")
    checks = verify(open_model(str(tiny_folder), device="cpu"))
    assert len(checks) == 11 and all(check.passed for check in checks), checks
    assert reopened["plain"]["model_class"] == "GPT2LMHeadModel" and not reopened["plain"]["custom_code"]


@pytest.mark.parametrize(
    ("answer", "check"),
    [
        ({"compressor_imported": True}, "opens without this package"),
        ({"missing": ["transformer.wte.weight"]}, "every tensor found, none left over"),
        ({"unexpected": ["x"]}, "every tensor found, none left over"),
        ({"cache_difference": 0.1}, "cached and uncached forward agree"),
        ({"cache_difference": float("nan")}, "cached and uncached forward agree"),
        ({"generation_equal": False}, "greedy generation is the same with and without cache"),
        ({"causality_difference": 0.1}, "no token sees a later one"),
        ({"parameters": 5}, "parameters"),
        ({"second_save_difference": 0.1}, "a second save opens too"),
        ({"second_save_files": []}, "a second save opens too"),
        ({"tokens": [1]}, "the tokenizer gives the same tokens"),
        ({"text": "x"}, "the tokenizer gives the same tokens"),
        ({"pickles": ["x.bin"]}, "no pickle"),
    ],
)
def test_every_check_can_fail(made_run, known, answer, check):
    known("compressed", **answer)
    assert check in failed(made_run)


def test_a_flipped_byte_of_a_weight(made_run, known):
    known("compressed")
    path = made_run / "rewritten" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-40_002] ^= 0x01  # an upper bit of the fraction of one number of one tensor
    path.write_bytes(content)
    assert "weight files are those that were made" in failed(made_run)


def test_a_report_of_another_model(made_run, known):
    known("compressed")
    path = made_run / "rewritten" / "report.json"
    kept = path.read_text()
    for change, check in (
        (lambda d: d["probe"]["logits"].__setitem__(0, 9.0), "logits equal those when it was made"),
        (lambda d: d["probe"]["logits"].pop(), "logits equal those when it was made"),
        (lambda d: d["probe"]["ids"].__setitem__(0, 9), "logits equal those when it was made"),
        (lambda d: d.update(parameters=9), "parameters equal those when it was made"),
        (lambda d: d.update(weights="9"), "weight files are those that were made"),
    ):
        change_json(path, change)
        assert failed(made_run) == [check]
        path.write_text(kept)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("probe"),
        lambda d: d.pop("weights"),
        lambda d: d.update(probe=[1]),
        lambda d: d["probe"].pop("logsumexp"),
        lambda d: d["probe"].update(logits=["a"]),
        lambda d: d.update(kind="report"),
        lambda d: d.update(schema=7),
        lambda d: d.pop("provenance"),
    ],
)
def test_a_damaged_report_is_one_line(made_run, known, change):
    known("compressed")
    change_json(made_run / "rewritten" / "report.json", change)
    with pytest.raises(UserError, match="gpt2-compress rewrite --force"):
        failed(made_run)


def test_a_foreign_models_report_is_its_own_business(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / "report.json").write_text("not even JSON")
    assert made(folder, make_config()) is None


def test_code_that_this_package_did_not_write_is_not_run(made_run, known):
    known("compressed")
    file = made_run / "rewritten" / "shared_ffn.py"
    own = file.read_bytes()
    file.write_bytes(own + b"\nimport os\n")
    with pytest.raises(UserError, match=r"shared_ffn.py is not the file that this package ships"):
        failed(made_run)
    assert all(check.passed for check in verify(open_model(str(made_run), device="cpu"), trust=True))
    file.write_bytes(own)
    (made_run / "rewritten" / "extra.py").write_text("")
    with pytest.raises(UserError, match=r"extra.py is not the file"):
        failed(made_run)
    (made_run / "rewritten" / "extra.py").unlink()
    change_json(made_run / "rewritten" / "config.json", lambda d: d["auto_map"].update(AutoConfig="someone/x--y.Z"))
    with pytest.raises(UserError, match="auto_map"):
        failed(made_run)


def test_what_does_not_open_in_a_fresh_process_is_one_line(made_run):
    """The real process: a modeling file is gone."""
    (made_run / "rewritten" / "shared_ffn.py").unlink()
    with pytest.raises(UserError) as error:
        failed(made_run)
    assert "does not open in a fresh process" in str(error.value) and "\n" not in str(error.value)


def test_configs_that_were_changed_are_refused_before_the_process_starts(made_run, monkeypatch):
    monkeypatch.setattr(module, "_reopen", lambda folder: pytest.fail("a process was started"))
    path = made_run / "rewritten" / "config.json"
    kept = path.read_text()
    for change in (
        lambda d: d.update(n_layer=7),
        lambda d: d.update(n_layer=5),
        lambda d: d.update(ffn_groups=None),
        lambda d: d["ffn_groups"][0].update(rank=5),
        lambda d: d["ffn_groups"][0].update(layers=[1, 2]),
        lambda d: d["ffn_groups"][0].update(bias="shared"),
        lambda d: d["ffn_groups"][0].pop("rank"),
        lambda d: d.update(ffn_groups="x"),
        lambda d: d.update(model_type="gpt2"),
    ):
        change_json(path, change)
        with pytest.raises(UserError):
            failed(made_run)
        path.write_text(kept)


# ---------------------------------------------------------------- bytes


def bytes_check(folder):
    opened = open_model(str(folder), device="cpu")
    return module._bytes(opened, sum(parameter.numel() for parameter in opened.model.parameters()))


def test_a_weight_stored_twice_is_found_in_the_bytes(made_run):
    path = made_run / "rewritten" / "model.safetensors"
    assert bytes_check(made_run).passed
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()  # tied: transformers reads it without a word
    save_file(tensors, path, metadata={"format": "pt"})
    check = bytes_check(made_run)
    assert not check.passed and f"{320 * 32 * 4:,} of other tensors" in check.detail


def test_what_foreign_checkpoints_hold_besides_is_not_held_against_them(tmp_path, tiny_folder):
    """`gpt2` itself stores its attention masks."""
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors |= {f"transformer.h.{i}.attn.bias": torch.zeros(1, 1, 64, 64) for i in range(6)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    check = bytes_check(folder)
    assert check.passed and f"{6 * 64 * 64 * 4:,} of other tensors" in check.detail


def test_shards_and_half_precision(tmp_path, tiny_tokenizer):
    model = make_model(make_config()).half()
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    tiny_tokenizer.save_pretrained(tmp_path)
    assert bytes_check(tmp_path).passed
