"""Files appear whole or not at all; what is replaced stays until its successor is in place."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess

import pytest
import torch
from conftest import largest_file

from compressor import artifacts
from compressor.artifacts import hash_files, new_files, new_folder, provenance, read_json, read_tensors, sweep
from compressor.errors import UserError

ORIGIN = provenance(
    seed=3, base_model="m", base_hash="h", device="cpu", dtype="float32", data={"calibration": {"a": 1}}
)


def tree(folder):
    """Every file below a folder with its bytes."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


# ---------------------------------------------------------------- files


def test_json_comes_back_with_its_provenance(tmp_path):
    artifacts.write_json(tmp_path / "new" / "x.json", "thing", {"value": 0.1, "word": "é"}, ORIGIN)
    document = read_json(tmp_path / "new" / "x.json", "thing", "align")
    assert document["value"] == 0.1 and document["word"] == "é" and document["schema"] == artifacts.SCHEMA
    made = document["provenance"]
    assert made["seed"] == 3 and made["base_hash"] == "h" and made["data"] == {"calibration": {"a": 1}}
    assert made["torch"] == torch.__version__ and made["command"] and made["version"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["x.json"]


def test_tensors_come_back_bit_for_bit(tmp_path):
    tensors = {"b": torch.arange(6).reshape(2, 3).T, "a": torch.tensor([1e-45, -0.0]), "h": torch.ones(2).half()}
    artifacts.write_tensors(tmp_path / "x.safetensors", tensors)
    back = read_tensors(tmp_path / "x.safetensors", "align")
    assert sorted(back) == ["a", "b", "h"]
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "does not exist; `gpt2-compress align` makes it"),
        ("{", "not readable JSON"),
        ("\xff", "not readable JSON"),
        ("[1]", "is list"),
        ('{"kind": "other", "schema": 1}', "('other', 1), expected ('thing', 1)"),
        ('{"kind": "thing", "schema": 99}', "('thing', 99), expected ('thing', 1)"),
    ],
)
def test_json_of_another_kind_is_refused_with_the_command_that_makes_it(tmp_path, content, said):
    if content is not None:
        (tmp_path / "x.json").write_bytes(content.encode("latin1"))
    with pytest.raises(UserError) as error:
        read_json(tmp_path / "x.json", "thing", "align")
    assert said in str(error.value) and "gpt2-compress align" in str(error.value) and "\n" not in str(error.value)


def test_damaged_tensors_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(UserError, match="does not exist"):
        read_tensors(path, "align")
    artifacts.write_tensors(path, {"a": torch.ones(100)})
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="damaged"):
        read_tensors(path, "align")


@pytest.mark.parametrize("old", [None, b"old"])
def test_a_write_that_fails_leaves_everything_as_it_was(tmp_path, old):
    path = tmp_path / "some" / "where" / "x.json"
    if old is not None:
        path.parent.mkdir(parents=True)
        path.write_bytes(old)
    before = tree(tmp_path), sorted(tmp_path.rglob("*"))
    with largest_file(1000), pytest.raises(UserError) as error:
        artifacts.write_bytes(path, bytes(2000))
    assert str(path) in str(error.value) and "partial" not in str(error.value)
    assert (tree(tmp_path), sorted(tmp_path.rglob("*"))) == before


def test_a_folder_that_cannot_be_made_is_the_users_to_mend(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write"):
        artifacts.write_bytes(tmp_path / "file" / "x.json", b"x")
    with pytest.raises(UserError, match="cannot write"), new_files(tmp_path / "file" / "deeper"):
        pass
    assert tree(tmp_path) == {"file": b"x"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_the_users_to_mend(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UserError, match="cannot write"):
            artifacts.write_bytes(tmp_path / "x.json", b"x")
    finally:
        tmp_path.chmod(0o700)


# ---------------------------------------------------------------- folders


def test_a_new_folder_appears_when_it_is_complete(tmp_path):
    with new_folder(tmp_path / "runs" / "out") as folder:
        (folder / "a").write_text("1")
        assert not (tmp_path / "runs" / "out").exists()
    assert tree(tmp_path) == {"runs/out/a": b"1"}


def test_an_existing_folder_is_replaced_only_when_asked_to(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("1")
    with pytest.raises(UserError, match="--force"), new_folder(tmp_path / "out"):
        pass
    assert tree(tmp_path) == {"out/old": b"1"}
    with new_folder(tmp_path / "out", force=True) as folder:
        (folder / "new").write_text("2")
    assert tree(tmp_path) == {"out/new": b"2"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        UserError("something else"),
        KeyboardInterrupt(),
        Exception("No space left on device (os error 28)"),  # tokenizers
    ],
)
def test_force_keeps_the_old_folder_when_the_new_one_fails(tmp_path, failure):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("1")
    with (
        pytest.raises(KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else UserError),
        new_folder(tmp_path / "out", force=True) as folder,
    ):
        (folder / "new").write_text("2")
        raise failure
    assert tree(tmp_path) == {"out/old": b"1"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_bug_is_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(Exception, match="a bug") as error, new_folder(tmp_path / "out"):
        raise Exception("a bug")
    assert not isinstance(error.value, UserError)


def test_force_puts_the_old_folder_back_when_the_last_rename_fails(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("1")
    rename = os.replace

    def refuse(source, target):
        if os.path.basename(source).startswith(artifacts._UNFINISHED):
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UserError, match="Input/output"), new_folder(tmp_path / "out", force=True) as folder:
        (folder / "new").write_text("2")
    assert tree(tmp_path) == {"out/old": b"1"}


def test_files_of_one_step_appear_together_or_not_at_all(tmp_path):
    (tmp_path / "a.json").write_text("old")
    (tmp_path / "kept").write_text("kept")
    before = tree(tmp_path)
    with pytest.raises(UserError) as error, new_files(tmp_path) as folder:
        artifacts.write_bytes(folder / "a.json", b"new")
        with largest_file(10):
            artifacts.write_bytes(folder / "b.safetensors", bytes(100))
    assert str(tmp_path / "b.safetensors") in str(error.value) and tree(tmp_path) == before
    with new_files(tmp_path) as folder:
        artifacts.write_bytes(folder / "a.json", b"new")
        artifacts.write_bytes(folder / "b.safetensors", b"b")
    assert tree(tmp_path) == {"a.json": b"new", "b.safetensors": b"b", "kept": b"kept"}
    with pytest.raises(RuntimeError), new_files(tmp_path / "not" / "there") as folder:
        raise RuntimeError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.safetensors", "kept"]


def test_files_that_are_not_written_anew_go_when_the_others_come(tmp_path):
    for name in ("old.png", "both.png", "notes"):
        (tmp_path / name).write_text("old")
    before = tree(tmp_path)
    names = ("old.png", "both.png", "never.png", "facts.json")
    with pytest.raises(RuntimeError), new_files(tmp_path, instead_of=names) as folder:
        artifacts.write_bytes(folder / "both.png", b"new")
        raise RuntimeError
    assert tree(tmp_path) == before
    with new_files(tmp_path, instead_of=names) as folder:
        artifacts.write_bytes(folder / "both.png", b"new")
        artifacts.write_bytes(folder / "facts.json", b"{}")
    assert tree(tmp_path) == {"both.png": b"new", "facts.json": b"{}", "notes": b"old"}


def test_files_do_not_replace_a_folder(tmp_path):
    (tmp_path / "b").mkdir()
    with pytest.raises(UserError, match="folder of that name"), new_files(tmp_path) as folder:
        (folder / "a").write_text("1")
        (folder / "b").write_text("1")
    assert tree(tmp_path) == {}


def test_sweep_clears_what_a_killed_step_left_and_brings_back_what_it_was_replacing(tmp_path):
    """A kill between the two renames of `new_folder`, and one while files are written."""
    (tmp_path / "mine").write_text("mine")
    (tmp_path / (artifacts._REPLACED + "out")).mkdir()
    (tmp_path / (artifacts._REPLACED + "out") / "old").write_text("1")
    (tmp_path / (artifacts._UNFINISHED + "out")).mkdir()
    (tmp_path / (artifacts._UNFINISHED + "x.json")).write_text("half")
    (tmp_path / (artifacts._REPLACED + "done")).mkdir()
    (tmp_path / "done").mkdir()
    sweep(tmp_path)
    assert tree(tmp_path) == {"mine": b"mine", "out/old": b"1"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["done", "mine", "out"]


# ---------------------------------------------------------------- provenance


def test_hash_is_over_contents_in_name_order(tmp_path):
    for name, content in (("b", b"2"), ("a", b"1")):
        (tmp_path / name).write_bytes(content)
    expected = hashlib.sha256(hashlib.sha256(b"1").digest() + hashlib.sha256(b"2").digest()).hexdigest()
    assert hash_files([tmp_path / "b", tmp_path / "a"]) == expected
    (tmp_path / "a").write_bytes(b"3")
    assert hash_files([tmp_path / "a", tmp_path / "b"]) != expected


def test_a_command_can_be_given_to_a_shell_again(monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["/usr/bin/gpt2-compress", "run", "benchmark.metrics=[{metric: size}]", "--run", "my runs"]
    )
    command = provenance(seed=0, base_model="", base_hash="", device="cpu", dtype="float32").command
    assert command == "gpt2-compress run 'benchmark.metrics=[{metric: size}]' --run 'my runs'"


def test_provenance_needs_no_git(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: pytest.fail("git was run"))
    assert provenance(seed=0, base_model="", base_hash="", device="cpu", dtype="float32").commit is None
    assert json.dumps(ORIGIN.data)
