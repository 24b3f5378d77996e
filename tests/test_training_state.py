"""The stored state: whole or not there, and only for the training that wrote it."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch

from compressor import artifacts, training_state
from compressor.errors import UserError
from compressor.training_state import StateFolder, TrainingState

SETTINGS = {"steps": 9, "learning_rate": 1e-3, "penalty": None}


def folder(path, base_hash="abc") -> StateFolder:
    origin = artifacts.provenance(seed=0, base_model="base", base_hash=base_hash, device="cpu", dtype="float32")
    return StateFolder(path, origin)


def state(step: int) -> TrainingState:
    def tensors(add):
        return {"h.0.b": torch.full((2, 3), step + add), "a": torch.full((1,), step - add)}

    return TrainingState(
        step, {"settings": SETTINGS, "curve": [0.1 * step]}, tensors(0.5), tensors(1.5), tensors(2.5), tensors(3.5)
    )


def assert_equal(found: TrainingState | None, expected: TrainingState) -> None:
    assert found is not None and found.step == expected.step and found.facts["curve"] == expected.facts["curve"]
    for group in ("parameters", "first_moments", "second_moments", "best"):
        mine, theirs = getattr(found, group), getattr(expected, group)
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_what_was_saved_comes_back(tmp_path):
    place = folder(tmp_path / "checkpoints")
    assert training_state.load(place, SETTINGS) is None
    for step in (1, 2):
        training_state.save(place, state(step))
        assert_equal(training_state.load(place, SETTINGS), state(step))
    files = sorted(file.name for file in place.state.iterdir())
    assert files == ["state.json", "state.safetensors"] and sorted(place.path.iterdir()) == [place.state]


@pytest.mark.parametrize("moment", ["write_tensors", "write_json", "_take_place"])
@pytest.mark.parametrize("after", [False, True])
def test_a_kill_at_any_moment_leaves_a_whole_state(tmp_path, monkeypatch, moment, after):
    """What lies on the disk just before and after each act of the second save is opened as a killed run's would be."""
    place, killed = folder(tmp_path / "checkpoints"), folder(tmp_path / "killed")
    training_state.save(place, state(1))
    act = getattr(artifacts, moment)

    def watched(*arguments, **named):
        if after:
            act(*arguments, **named)
        shutil.copytree(place.path, killed.path)
        if not after:
            act(*arguments, **named)

    monkeypatch.setattr(artifacts, moment, watched)
    training_state.save(place, state(2))
    monkeypatch.undo()
    assert_equal(training_state.load(killed, SETTINGS), state(2 if (moment, after) == ("_take_place", True) else 1))
    assert [file.name for file in killed.path.iterdir()] == ["state"], "what was unfinished is swept"
    training_state.save(killed, state(3))
    assert_equal(training_state.load(killed, SETTINGS), state(3))


def test_a_kill_while_the_new_state_takes_the_old_ones_place(tmp_path, monkeypatch):
    place, killed = folder(tmp_path / "checkpoints"), folder(tmp_path / "killed")
    training_state.save(place, state(1))
    replace = artifacts.os.replace

    def watched(source, target):
        replace(source, target)
        if "replaced" in str(target):
            shutil.copytree(place.path, killed.path)

    monkeypatch.setattr(artifacts.os, "replace", watched)
    training_state.save(place, state(2))
    monkeypatch.undo()
    assert not killed.state.exists()
    assert_equal(training_state.load(killed, SETTINGS), state(1))


def test_another_model_or_other_settings_are_refused(tmp_path):
    place = folder(tmp_path / "checkpoints")
    training_state.save(place, state(4))
    with pytest.raises(UserError, match="of another model"):
        training_state.load(folder(place.path, "other"), SETTINGS)
    with pytest.raises(UserError, match=r"learning_rate=0\.001, now it is 0\.1; .*--force"):
        training_state.load(place, {**SETTINGS, "learning_rate": 0.1})


def test_remove_leaves_what_is_not_its_own(tmp_path):
    place = folder(tmp_path / "checkpoints")
    training_state.remove(place)
    training_state.save(place, state(1))
    training_state.remove(place)
    assert not place.path.exists()
    training_state.save(place, dataclasses.replace(state(1), best={}))
    (place.path / "mine.txt").write_text("x")
    training_state.remove(place)
    assert [file.name for file in place.path.iterdir()] == ["mine.txt"]
