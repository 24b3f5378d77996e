"""Where a recovery stands, on disk: tensors and facts in one folder that is replaced as a whole.

The folder is written beside the old one and renamed into its place, so that whenever a run is killed there is one
complete state, never tensors of one step with facts of another.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from . import artifacts
from .artifacts import Provenance
from .errors import UserError

KIND = "training_state"


@dataclass(frozen=True)
class StateFolder:
    """Where a recovery keeps its state, and of what; `origin.base_hash` is of the model that is being trained."""

    path: Path
    origin: Provenance

    @property
    def state(self) -> Path:
        return Path(self.path) / "state"


@dataclass(frozen=True)
class TrainingState:
    """All that is needed to go on as if nothing had happened (the random numbers follow from seed, step and rank)."""

    step: int  # steps done
    facts: dict[str, Any]  # what JSON can hold: settings, curve, evaluations, times
    parameters: dict[str, Tensor]  # the trained ones, by their names in the model
    first_moments: dict[str, Tensor]  # AdamW's
    second_moments: dict[str, Tensor]
    best: dict[str, Tensor]  # the trained parameters at the best step
    objective: dict[str, Tensor] = field(default_factory=dict)  # what else the loss depends on


_GROUPS = ("parameters", "first_moments", "second_moments", "best", "objective")


def save(folder: StateFolder, state: TrainingState) -> None:
    """Replace the stored state. Raises UserError when the disk refuses; the old state is there then."""
    tensors = {f"{group}/{name}": tensor for group in _GROUPS for name, tensor in getattr(state, group).items()}
    with artifacts.new_folder(folder.state, force=True) as new:
        artifacts.write_tensors(new / "state.safetensors", tensors)
        artifacts.write_json(new / "state.json", KIND, {"step": state.step, **state.facts}, folder.origin)


def load(folder: StateFolder, settings: Mapping[str, Any]) -> TrainingState | None:
    """The stored state, None when there is none. Raises UserError when it is of another model or other settings."""
    if not Path(folder.path).is_dir():
        return None
    artifacts.sweep(folder.path)
    if not folder.state.is_dir():
        return None
    facts = artifacts.read_json(folder.state / "state.json", KIND, "finetune")
    stored = facts.pop("provenance")
    if stored["base_hash"] != folder.origin.base_hash:
        raise UserError(
            f"{folder.path} holds the training state of another model ({stored['base_model']}); --force begins anew"
        )
    for name, value in settings.items():
        if facts["settings"].get(name) != value:
            raise UserError(
                f"{folder.path} holds a training with {name}={facts['settings'].get(name)}, now it is {value}; "
                "give the same, or --force to begin anew"
            )
    groups: dict[str, dict[str, Tensor]] = {group: {} for group in _GROUPS}
    for key, tensor in artifacts.read_tensors(folder.state / "state.safetensors", "finetune").items():
        group, name = key.split("/", 1)
        groups[group][name] = tensor
    return TrainingState(facts["step"], facts, **groups)


def remove(folder: StateFolder) -> None:
    """Forget the stored state: the recovered model is safe on disk, or another training begins."""
    if Path(folder.path).is_dir():
        artifacts.sweep(folder.path)
        artifacts.remove(folder.state)
        with suppress(OSError):  # something else lies there
            Path(folder.path).rmdir()
