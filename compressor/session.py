"""What every command shares: where to compute, what to say, how later steps find what this one was given."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from . import artifacts, data, models
from .artifacts import Provenance
from .errors import UserError
from .models import OpenModel
from .processes import ALONE, Processes, accelerator

Notice = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Session:
    """What every command shares."""

    device: str | None = None
    dtype: str | None = None
    seed: int = 0
    force: bool = False
    quiet: bool = False
    notice: Notice = lambda message: None
    processes: Processes = ALONE

    @property
    def main(self) -> bool:
        """Whether this process writes and prints."""
        return self.processes.main

    @property
    def silent(self) -> bool:
        """No progress bars: they are not wanted, stderr is no terminal, or another process shows them."""
        return self.quiet or not self.main or not sys.stderr.isatty()

    def open(self, name: str) -> OpenModel:
        device = self.device
        if device is None and self.processes.world > 1:  # each its own
            device = str(accelerator().device)
        return models.open_model(name, device=device, dtype=self.dtype)

    def origin(self, base: OpenModel, texts: Mapping[str, Any]) -> Provenance:
        return artifacts.provenance(
            seed=self.seed,
            base_model=lasting(base.name),
            base_hash=base.hash,
            data=texts,
            device=str(next(base.model.parameters()).device),
            dtype=str(base.model.dtype).removeprefix("torch."),
        )

    def bar(self, title: str, total: int | None = None, unit: str = "token") -> tqdm:
        return tqdm(desc=title, total=total, unit=unit, disable=self.silent, leave=False, dynamic_ncols=True)

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """What one process does while the others wait: gives whether this one does it."""
        if self.main:
            yield True
        self.processes.wait()
        if not self.main:
            yield False


@dataclasses.dataclass(frozen=True)
class Columns:
    """Where the text of a data source is."""

    text_column: str | None = None
    split: str | None = None


ANYWHERE = Columns()  # the column and the splits are found by name


def lasting(name: str) -> str:
    """A MODEL as later steps name it, from whichever folder they run: a local one by its absolute path."""
    folder = os.path.expanduser(name)
    return os.path.abspath(folder) if name != "demo" and os.path.isdir(folder) else name


def lasting_data(spec: str) -> str:
    """The same for a D."""
    source = data.parse(spec)
    return source.target if source.kind in ("file", "folder") else spec


def lasting_specs(data_given: str | Mapping[str, str]) -> str | dict[str, str]:
    """The same for a recipe's `data:`."""
    if isinstance(data_given, str):
        return lasting_data(data_given)
    return {part: lasting_data(spec) for part, spec in data.specs(data_given).items()}


def may_be_replaced(out: Path, force: bool) -> None:
    """A folder that a model is to be written to: nothing is there, or, with force, a model or nothing in it."""
    model = out.is_dir() and ((out / "config.json").is_file() or not any(out.iterdir()))
    if force and out.exists() and not model:
        raise UserError(f"{out} is no model's folder and is not replaced; give another folder")
    if out.exists() and not force:
        raise UserError(f"{out} exists already; give another folder or --force to replace it")


def must_be_folder(path: Path) -> None:
    """Said before the work, not after it."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; give a folder")
