"""What lies in a run folder, and which rows it gives to a benchmark."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import alignment, artifacts, data, fields, models, verify
from .alignment import Alignments
from .checkpoint import Checkpoint, structure_hash
from .errors import UserError

STEPS = ("control", "rewritten", "recovered")  # the models of a run, in the order of a table
BASELINES = "baselines"  # the folder of models that are there to be compared with, one of each kind below
BASELINE_KINDS = ("pruned", "dropped")
RECOVERED = "-recovered"  # what the name of a baseline ends in that got the run's recovery
SLICES = "slices"  # the folder of models that are cut out of those of a run
SLICED = {"before": "rewritten", "after": "recovered"}  # folder in it -> the step that its models are cut out of
SLICE, UNTRAINED = "slice ", " (rewritten)"  # what the name of a row begins with, and ends in before recovery
WINDOWS = "windows.json"


def is_run(path: str | Path) -> bool:
    """Whether this is a run folder: it has an alignment and is no model itself."""
    folder = Path(path).expanduser()
    return (folder / "alignment.json").is_file() and not (folder / "config.json").is_file()


@dataclass(frozen=True)
class Aligned:
    """The alignment of a run folder, and what a later step must know of how it was made."""

    alignments: Alignments
    tensors: str  # sha256 of alignment.safetensors: which alignment this is
    base_model: str
    base_hash: str
    seed: int
    dtype: str  # that it was computed in
    calibration: dict[
        str, Any
    ]  # what data.describe gives; "specs": a recipe's data, "named": each part as it was given


_FACTS: dict[str, Any] = {  # of the calibration text: key -> type
    "specs": str | dict,
    "named": dict,
    "fingerprint": str,
    "origins": list,
    "text_column": str | None,
    "split_given": str | None,
}


def aligned(path: str | Path) -> Aligned:
    """The alignment of a run folder. Raises UserError when there is none or it is damaged."""
    folder = Path(path).expanduser()
    alignments, origin = alignment.load(folder)
    try:
        facts = origin["data"]["calibration"]
        for key, kind in _FACTS.items():
            fields.typed("calibration", key, facts[key], kind)
        for row in alignments.solved:
            for key, value in dataclasses.asdict(row.quality).items():
                fields.typed("quality", key, value, float)
        for key, wanted in {"base_model": str, "base_hash": str, "seed": int, "dtype": str}.items():
            fields.typed("provenance", key, origin[key], wanted)
        tensors = artifacts.hash_files([folder / "alignment.safetensors"])
        return Aligned(
            alignments, tensors, origin["base_model"], origin["base_hash"], origin["seed"], origin["dtype"], facts
        )
    except (KeyError, TypeError, UserError) as error:
        raise UserError(
            f"{folder / 'alignment.json'} is damaged ({error}); make it anew with `gpt2-compress align --force`"
        ) from error


def steps(path: str | Path) -> dict[str, Path]:
    """The models that a run folder has: name of the step -> its folder."""
    folder = Path(path).expanduser()
    return {step: folder / step for step in STEPS if (folder / step / "config.json").is_file()}


def baselines(path: str | Path, kinds: Collection[str] = BASELINE_KINDS) -> dict[str, Path]:
    """The baseline models that a run folder has, of these kinds: name of the row -> its folder."""
    folder = Path(path).expanduser() / BASELINES
    names = [name for kind in BASELINE_KINDS if kind in kinds for name in (kind, kind + RECOVERED)]
    return {name: folder / name for name in names if (folder / name / "config.json").is_file()}


def slices(path: str | Path) -> dict[str, Path]:
    """The slices that a run folder has: name of the row -> its folder, those before recovery first, of each part the
    largest first."""
    found: dict[str, Path] = {}
    for state, ending in (("before", UNTRAINED), ("after", "")):
        place = Path(path).expanduser() / SLICES / state
        names = [config.parent.name for config in place.glob("[!.]*/config.json")]
        found |= {SLICE + name + ending: place / name for name in sorted(names, key=_falling)}
    return found


def _falling(name: str) -> list[tuple[str, list[int]]]:
    """What sorts slices by the parts that are smaller, then by how much is left, the most first."""
    parts = [part.partition("-") for part in name.split("_")]
    return [(part, [-int(number) for number in re.findall(r"\d+", left)]) for part, _, left in parts]


def check_baselines(words: Sequence[Any]) -> None:
    """Raise UserError for what is no list of different words."""
    wrong = [word for word in words if not isinstance(word, str) or not word.strip()]
    if wrong or len(set(words)) < len(words):
        raise UserError(
            f"baselines: {list(words)!r}; allowed: a list of different {', '.join(BASELINE_KINDS)} or MODELs"
        )


def made(found: Checkpoint) -> dict[str, Any] | None:
    """The report of the step that made a model; None where there is none."""
    return verify.made(found.folder, found.config)


# ---------------------------------------------------------------- rows of a benchmark


def rows(names: Sequence[str], others: Sequence[str] | None = None) -> dict[str, str]:
    """Row name -> MODEL, in order. A run folder gives its original and every model it has.

    others: kinds of baselines, which the runs give then and no other kinds, and MODELs that become rows of their own
    where they are none yet; None: every baseline that the runs have.
    """
    kinds = BASELINE_KINDS if others is None else [word for word in others if word in BASELINE_KINDS]
    found: dict[str, str] = {}
    places: dict[Path, str] = {}
    before = prefixes(names)

    def add(row: str, model: str) -> None:
        place = models.locate(model).resolve()
        if place in places:
            raise UserError(f"model {model} is named twice")
        found[row], places[place] = model, row

    for name in names:
        if not is_run(name):
            add(name, name)
            continue
        folder = Path(name).expanduser()
        base = aligned(folder).base_model
        made_here = steps(folder)
        if set(made_here) <= {"control"}:
            raise UserError(f"{name} has no rewritten model yet; `gpt2-compress rewrite --run {name}` makes one")
        if models.locate(base).resolve() not in places:
            add("original" if len(names) == 1 else base, base)
        for step, model in (made_here | slices(folder) | baselines(folder, kinds)).items():
            add(f"{before[name]}: {step}" if before[name] else step, str(model))
    for word in others or ():
        if word not in BASELINE_KINDS and models.locate(word).resolve() not in places:
            add(word, word)
    return found


def prefixes(names: Sequence[str]) -> dict[str, str]:
    """Run folder -> what stands before its rows: its own name, the whole path where two have one name; nothing where it
    is alone."""
    found: dict[str, str] = {}
    for name in filter(is_run, names):
        short = Path(name).expanduser().resolve().name
        found[name] = "" if len(names) == 1 else name if short in found.values() else short
    return found


def test_text(metric: str, names: Sequence[str], text_column: str | None, split: str | None) -> data.Text:
    """The test part of the data that the first run among `names` was made with, or the demo's for the demo."""
    run = next((name for name in names if is_run(name)), None)
    if run is not None:
        facts = aligned(run).calibration
        text = data.recipe_text(
            facts["specs"], "test", text_column=text_column or facts["text_column"], split=split or facts["split_given"]
        )
        return dataclasses.replace(text, source=str(facts["named"].get("test")))
    if all(name == "demo" for name in names):
        return data.text("demo", "test")
    raise UserError(f"metric {metric!r} needs data; give --data D or --data {metric}=D")


def of_the_demo(names: Sequence[str]) -> bool:
    """Whether all of them are the embedded model, or runs of it on its own text."""
    return all(
        name == "demo"
        or (is_run(name) and (aligned(name).base_model, aligned(name).calibration["specs"]) == ("demo", "demo"))
        for name in names
    )


def warn_of_overlap(found: Mapping[str, Checkpoint], text: Any, notice: Callable[[str], None]) -> None:
    """Say so when a model was made with the text it is now measured on."""
    for row, checkpoint in found.items():
        report = made(checkpoint)
        for part, facts in (report["provenance"]["data"] if report else {}).items():
            if data.overlap(facts, data.describe(text)):
                notice(f"warning: {row} was made with this text as its {part} data; its figures flatter it")


def warn_of_twins(found: Mapping[str, Checkpoint], notice: Callable[[str], None]) -> None:
    """Rows that different rewrites made and that still have one structure differ in their weights only: say so.
    Baselines are meant to."""
    seen: dict[str, tuple[str, Any]] = {}
    for row, checkpoint in found.items():
        if checkpoint.folder.parent.name == BASELINES:
            continue
        made_by = getattr(checkpoint.config, "compression", None) or []
        other, made_other = seen.setdefault(structure_hash(checkpoint.config), (row, made_by))
        if made_by != made_other:
            notice(f"warning: {row} has the same structure as {other}: neither is smaller or faster than the other")


def warn_of_strangers(names: Sequence[str], notice: Callable[[str], None]) -> None:
    """Say so when a recovered model was made from another one than lies beside it now or was not tuned as the run's
    was, and when a baseline is for a rewritten model of another size."""
    for name in names:
        if not is_run(name):
            continue
        there = steps(name) | baselines(name)
        reports = {step: made(models.find(str(there[step]))) or {} for step in there}
        for row, folder in slices(name).items():
            step = SLICED["before" if row.endswith(UNTRAINED) else "after"]
            start, own = reports.get(step, {}).get("weights"), made(models.find(str(folder))) or {}
            if start is not None and own.get("made_from", {}).get("start", start) != start:
                notice(f"warning: {folder} was cut out of another {step} model than {there[step]} is now")
        rewritten, recovered = reports.get("rewritten", {}), reports.get("recovered", {}).get("made_from", {})
        for step, report in reports.items():
            before = "rewritten" if step == "recovered" else step.removesuffix(RECOVERED)
            own, start = report.get("made_from", {}), reports.get(before, {}).get("weights")
            if step != before and start is not None and own and own["start"] != start:
                notice(f"warning: {there[step]} was made from another {before} model than {there[before]} is now")
            size = report.get("counterpart", {})
            if rewritten and any(rewritten[key] != value for key, value in size.items()):
                notice(f"warning: {there[step]} is for a rewritten model of another size than {there['rewritten']}")
            different = [key for key in own if key not in ("start", "train") and recovered.get(key) != own[key]]
            if recovered and different and "start" in own and step != "recovered":
                notice(f"warning: {there[step]} was not tuned as recovered was ({', '.join(different)} differ)")
