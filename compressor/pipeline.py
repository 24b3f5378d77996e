"""The whole pipeline: one function a command, and `run`, which does all of them and goes on where it was interrupted.

The steps are in steps/, one file each; `plan` and `inspect`, which write nothing, in facts.py; the printing in cli.py.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from . import artifacts, benchmark, data, models, report, run_folder, slicing
from .benchmark import Report
from .errors import UserError
from .facts import inspect, placed_somewhere, plan
from .finetune import resolve_train
from .recipe import Recipe, from_plain, parse_yaml
from .rewrites import Rewrite
from .rewrites.compose import check, structure
from .search import allowed_windows
from .session import ANYWHERE, Columns, Session, lasting_specs, must_be_folder
from .steps import baselines
from .steps.align import align
from .steps.gather import gather
from .steps.measure import CLASSIFIERS, MEASURED, check_place, named_for, reported, rows_of, run_benchmark, what_on
from .steps.prove import export, verify_model
from .steps.recover import CHECKPOINTS, finetune
from .steps.rewrite import rewrite
from .steps.search import found_windows, search, search_context, searched_with, windows_file
from .steps.slice import make as make_slices
from .steps.slice import slice_model

__all__ = [
    "Columns",
    "Session",
    "align",
    "compare",
    "export",
    "finetune",
    "gather",
    "inspect",
    "make",
    "plan",
    "rewrite",
    "run",
    "run_benchmark",
    "search",
    "slice_model",
    "verify_model",
]

RECIPE = "recipe.yaml"
# What `run --force` makes anew; whatever else lies in the folder is not its own.
_MADE = (*report.FILES, MEASURED, CLASSIFIERS, CHECKPOINTS, run_folder.BASELINES, run_folder.SLICES, *run_folder.STEPS,
         run_folder.WINDOWS, "alignment.json", "alignment.safetensors", RECIPE)  # fmt: skip


def run(folder: Path, recipe: Recipe, session: Session, *, columns: Columns = ANYWHERE) -> Report:
    """Every step of a recipe, into one run folder; returns its report.

    Finished steps stay as they are and an interrupted one goes on, so that a killed run that is started again ends in
    the same files. Raises UserError, before anything is written, for what the recipe, the model or the data do not
    allow, and for a folder that holds another recipe's run or a step that was made otherwise, unless session.force,
    which makes all of it anew.
    """
    folder = Path(folder)
    make(folder, recipe, session, columns=columns)
    session = dataclasses.replace(session, seed=recipe.seed, force=False)  # what was there is gone or stays
    with session.alone() as here:
        if here:
            _benchmark(folder, recipe, session)
    return report.read(folder)


def make(
    folder: Path, recipe: Recipe, session: Session, *, columns: Columns = ANYWHERE, lender: Path | None = None
) -> None:
    """The steps of a recipe up to the benchmark, as `run` does them. lender: a run folder whose alignment is the one
    that this recipe makes, so that it need not be made again."""
    session = dataclasses.replace(session, seed=recipe.seed)
    must_be_folder(folder)
    _check(recipe, session, columns)
    with session.alone() as here:
        if here:
            _claim(folder, recipe, session)
    session = dataclasses.replace(session, force=False)
    with session.alone() as here:
        if here and lender is not None and not (folder / "alignment.json").is_file():
            _borrow(folder, lender)
    _align(folder, recipe, session, columns)
    _search(folder, recipe, session)
    with session.alone() as here:
        if here:
            _rewrite(folder, recipe, session)
    if recipe.finetune is not None:
        finetune(folder, recipe.finetune, session, resume=True)
    if recipe.slices is not None:
        with session.alone() as here:
            if here:
                make_slices(folder, recipe.slices, session)
    kinds = [word for word in recipe.benchmark.baselines if word in run_folder.BASELINE_KINDS]
    if kinds:
        baselines.make(folder, kinds, session, recovery=recipe.finetune)


def _borrow(folder: Path, lender: Path) -> None:
    with artifacts.new_files(folder) as new:
        for name in ("alignment.safetensors", "alignment.json"):
            shutil.copyfile(lender / name, new / name)


def _check(recipe: Recipe, session: Session, columns: Columns) -> None:
    """Every mistake that can be seen before the first step."""
    models.parse_device(session.device)
    dtype = models.parse_dtype(session.dtype)
    found = models.find(recipe.model)
    config = found.config
    check(recipe.rewrites, config)
    somewhere = placed_somewhere(recipe.rewrites, config)
    result = models.build(structure(somewhere, config))
    if recipe.slices is not None:
        slicing.sizes(result.config, recipe.slices)
    contexts = {"calibration": config.n_positions, "test": 2}  # of one block of each part that is needed
    place, settings = _searched(recipe), recipe.search
    if place is not None and settings is not None:
        contexts["selection"] = search_context(settings, config)
        others = [item for index, item in enumerate(somewhere) if index != place]
        if settings.target_parameters is None:
            drawn = {"strategy": settings.strategy, "count": settings.count, "seed": recipe.seed}
            allowed_windows(recipe.rewrites[place], config, others, **drawn)  # type: ignore[arg-type]
    if recipe.finetune is not None:
        if dtype not in (torch.float32, torch.float64):
            raise UserError(f"recovery trains float32 weights; leave --dtype {session.dtype} out, bfloat16 is autocast")
        resolve_train(recipe.finetune.train, result, somewhere)
        contexts["training"] = recipe.finetune.context or config.n_positions
        contexts["selection"] = max(contexts["training"], contexts.get("selection", 2))
    for part, context in contexts.items():
        if context > config.n_positions:
            raise UserError(f"the context for {part} text is {context}; allowed: 2 to {config.n_positions}")
    tokenizer = models.open_tokenizer(recipe.model, found.folder, config)
    described: dict[str, dict[str, Any]] = {}
    for part, context in contexts.items():
        text = data.recipe_text(recipe.data, part, text_column=columns.text_column, split=columns.split)
        data.token_blocks(text, tokenizer, context=context, max_tokens=context, seed=0, evenly=False)
        for other, facts in described.items():
            if data.overlap(facts, data.describe(text)):
                raise UserError(f"data.{other} and data.{part} share text ({text.source}); give each its own")
        described[part] = data.describe(text)
    for metric, source in recipe.benchmark.data.items():
        named_for(metric, source)


def _searched(recipe: Recipe) -> int | None:
    """Which rewrite of a recipe the search is for."""
    return next((index for index, item in enumerate(recipe.rewrites) if getattr(item, "start", None) == "best"), None)


def _claim(folder: Path, recipe: Recipe, session: Session) -> None:
    """Write recipe.yaml, or find the same one there. Raises UserError for a folder with something else in it."""
    stored = folder / RECIPE
    if (folder / "config.json").is_file():
        raise UserError(f"{folder} is a model's folder; give another --run")
    if folder.is_dir():
        artifacts.sweep(folder)  # first: what a kill left is neither something else nor to come back later
    if session.force:
        _clear(folder)
    elif stored.is_file():
        earlier = _with_defaults(parse_yaml(stored.read_text(encoding="utf-8"), str(stored)))
        now = parse_yaml(recipe.dump(), "the recipe")
        if earlier != now:
            differ = [key for key in now if not isinstance(earlier, dict) or earlier.get(key) != now[key]]
            raise UserError(
                f"{folder} holds a run of another recipe ({', '.join(differ) or 'other keys'} differ); give another "
                "--run, or --force to make all of it anew"
            )
    elif folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} exists already and is no run of a recipe; give another --run, or --force")
    if not stored.is_file():
        artifacts.write_bytes(stored, recipe.dump().encode())


def _with_defaults(stored: Any) -> Any:
    """A stored recipe with what recipes have gained since; as it is where it is none."""
    try:
        return parse_yaml(from_plain(stored).dump(), "the stored recipe") if isinstance(stored, dict) else stored
    except UserError:
        return stored


def _clear(folder: Path) -> None:
    for name in _MADE:
        artifacts.remove(folder / name)


def _align(folder: Path, recipe: Recipe, session: Session, columns: Columns) -> None:
    there = (folder / "alignment.json").is_file()
    session.processes.wait()  # all have looked
    if not there:
        align(folder, recipe.model, recipe.data, recipe.align, session, columns=columns)
        return
    aligned = run_folder.aligned(folder)
    facts, solved, wanted = aligned.calibration, aligned.alignments, recipe.align
    same = {
        "model": aligned.base_hash == artifacts.hash_files(list(models.find(recipe.model).files)),
        "data": facts["specs"] == lasting_specs(recipe.data),
        "text column or split": (facts["text_column"], facts["split_given"]) == (columns.text_column, columns.split),
        "dtype": aligned.dtype == _dtype(session),
        "seed": aligned.seed == recipe.seed,
        "max_tokens": facts.get("max_tokens") == wanted.max_tokens,
        "method": solved.method == wanted.method,
        "site": solved.site == (wanted.site if wanted.method == "activation" else None),
        "pairs": solved.pairs == (solved.pairs if wanted.method == "none" else wanted.pairs),
    }
    _refuse(folder / "alignment.json", same)


def _search(folder: Path, recipe: Recipe, session: Session) -> None:
    index = _searched(recipe)
    if index is None or recipe.search is None:
        return
    others = [item for place, item in enumerate(recipe.rewrites) if place != index]
    aligned = run_folder.aligned(folder)
    if found_windows(folder, recipe.rewrites[index], aligned) is not None:
        config = models.find(recipe.model).config
        then = searched_with(folder)
        same = {
            "settings": then["settings"] == dataclasses.asdict(recipe.search),
            "seed": then["seed"] == recipe.seed,
            "dtype": then["dtype"] == _dtype(session),
            "others": then["others"] == [item.resolved(config).record() for item in others],
        }
        _refuse(windows_file(folder), same)
        return
    search(folder, recipe.rewrites[index], recipe.search, session, others=others)


def _rewrite(folder: Path, recipe: Recipe, session: Session) -> None:
    config = models.find(recipe.model).config
    # a recipe says where: without a start, in the middle
    chosen: list[Rewrite] = [
        item if getattr(item, "start", 0) == "best" else item.resolved(config) for item in recipe.rewrites
    ]
    made = run_folder.steps(folder).get("rewritten")
    if made is None:
        rewrite(folder, chosen, session)
        return
    aligned = run_folder.aligned(folder)
    wanted = [record for item in chosen for record in _records(folder, item, aligned)]
    then = run_folder.made(models.find(str(made)))
    same = {
        "rewrites": then is not None and then.get("asked", then["rewrites"]) == wanted,
        "alignment": then is not None and then["alignment"]["tensors"] == aligned.tensors,
        "seed": then is not None and then["provenance"]["seed"] == recipe.seed,
        "dtype": then is not None and then["provenance"]["dtype"] == _dtype(session),
    }
    _refuse(made, same)


def _dtype(session: Session) -> str:
    return str(models.parse_dtype(session.dtype)).removeprefix("torch.")


def _records(folder: Path, item: Rewrite, aligned: run_folder.Aligned) -> list[dict[str, Any]]:
    plan = found_windows(folder, item, aligned) if getattr(item, "start", None) == "best" else None
    if plan is None:
        return [item.record()]
    return [{**item.record(), "start": window.start, "n": window.n, "anchor": window.anchor} for window in plan]


def _refuse(made: Path, same: dict[str, bool]) -> None:
    """What a standalone command made in between is not silently replaced, nor built upon."""
    different = [name for name, alike in same.items() if not alike]
    if different:
        raise UserError(
            f"{made} is not what this recipe makes ({', '.join(different)} differ); give another --run, or --force to "
            "make all of it anew"
        )


def _benchmark(folder: Path, recipe: Recipe, session: Session) -> None:
    if (folder / "report.json").is_file():
        earlier = report.read(folder)
        rows, absent = rows_of([str(folder)], recipe.benchmark.baselines)
        now = {row: artifacts.hash_files(list(models.find(model).files)) for row, model in rows.items()}
        metrics = [
            {"metric": metric, **settings} for metric, settings in benchmark.check_metrics(recipe.benchmark.metrics)
        ]
        measured = [entry["metric"] for entry in metrics]
        texts, _ = what_on(measured, [str(folder)], recipe.benchmark.data, ANYWHERE, session)
        test = {metric: reported(text).fingerprint for metric, text in texts.items()}
        same = (
            {row.name for row in earlier.rows} == now.keys() | absent.keys()
            and all(row.weights in ("", now.get(row.name, row.weights)) for row in earlier.rows)
            and list(earlier.metrics) == metrics
            and {metric: facts["fingerprint"] for metric, facts in earlier.origin.data.items()} == test
        )
        if not same:
            raise UserError(
                f"{folder / 'report.json'} is another report than this recipe's; move it away and run again"
            )
        artifacts.remove(folder / MEASURED)  # killed between the report and this
        return
    asked = recipe.benchmark
    run_benchmark([str(folder)], folder, asked.metrics, asked.data, session, baselines=asked.baselines)


def compare(
    names: Sequence[str],
    out: Path,
    metrics: Sequence[Any],
    sources: Mapping[str, str],
    session: Session,
    *,
    columns: Columns = ANYWHERE,
    others: Sequence[str] = (),
) -> Report:
    """`run_benchmark`, with baselines: kinds of them, which each run folder among `names` gets where it has none yet,
    recovered as the run was, and MODELs. Without any, those that the runs have."""
    run_folder.check_baselines(others)
    runs = [name for name in names if run_folder.is_run(name)]
    kinds = [word for word in others if word in run_folder.BASELINE_KINDS]
    if kinds and not runs:
        raise UserError(f"baselines {', '.join(kinds)} are those of a run folder, and none is given")
    check_place(Path(out), session)
    benchmark.check_metrics(metrics)
    for model in [word for word in (*names, *others) if others and word not in kinds]:
        models.find(model)  # every mistake before the work
    for run in map(Path, runs if kinds else ()):
        spent = baselines.budget(run)
        settings, seed = (None, session.seed) if spent is None else spent
        as_the_run = dataclasses.replace(session, seed=seed, dtype=run_folder.aligned(run).dtype)
        baselines.make(run, kinds, as_the_run, recovery=settings)
    return run_benchmark(names, out, metrics, sources, session, columns=columns, baselines=list(others) or None)


def run_name(recipe: str) -> Path:
    """Where `run` puts a recipe's run unless told."""
    return Path("runs") / Path(recipe).stem
