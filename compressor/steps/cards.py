"""Model cards: README.md beside a model, written with it and again with its figures, never over what a user wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import GPT2Config

from .. import artifacts, models, run_folder, verify
from ..benchmark import Report
from ..errors import UserError
from ..report.card import FILE, card, measured_rows, unedited
from ..session import Notice


def leave(folder: Path, config: GPT2Config, target: Path, notice: Notice, step: str | None = None) -> None:
    """Write the card of a model into the `folder` that is to become `target`; a README.md that lies in `target` and is
    no card as we wrote it is kept instead. step: what the model is, where the name of its folder does not say it."""
    made = verify.made(folder, config)
    assert made is not None  # it was written right before
    there = _edited(target / FILE)
    if there is not None:
        notice(f"{target / FILE} is not as it was written: kept, though the model is a new one")
    artifacts.write_bytes(folder / FILE, card(step or target.name, made, config).encode() if there is None else there)


def renew(names: Sequence[str], report: Report, notice: Notice) -> None:
    """Put the figures of a report into the cards of the runs that it is about; what cannot be written is said."""
    shared = next((row.weights for row in report.rows if row.name == "control"), None)  # of several runs
    for name in filter(run_folder.is_run, names):
        slices = run_folder.slices(name)
        there = run_folder.steps(name) | run_folder.baselines(name) | slices
        found = {step: models.find(str(folder)) for step, folder in there.items()}
        weights = {step: artifacts.hash_files(list(item.files)) for step, item in found.items()}
        for step, item in found.items():
            made = run_folder.made(item)
            if made is None:
                continue
            control = weights.get("control", shared)
            rows = measured_rows(report, base=made["provenance"]["base_hash"], own=weights[step], control=control)
            if rows is None:
                continue
            if _edited(item.folder / FILE) is not None:
                notice(f"{item.folder / FILE} is not as it was written: kept, without the new figures")
                continue
            state = verify.SLICE if step in slices else step
            try:
                artifacts.write_bytes(item.folder / FILE, card(state, made, item.config, rows).encode())
            except UserError as error:
                notice(f"warning: {error}")


def _edited(file: Path) -> bytes | None:
    """What a user wrote; None where there is nothing, or a card as it was written."""
    if not file.is_file():
        return None
    content = file.read_bytes()
    return None if unedited(content.decode("utf-8", "replace")) else content
