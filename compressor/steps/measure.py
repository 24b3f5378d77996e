"""Step 6: models in, report.json, report.md and plots out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .. import artifacts, benchmark, data, examples, models, report, run_folder
from ..artifacts import Provenance
from ..benchmark import METRICS
from ..errors import UserError
from ..metrics import MetricResult
from ..models import Checkpoint, OpenModel
from ..session import ANYWHERE, Columns, Session, must_be_folder
from . import cards
from .story import stories

MEASURED = "measured.json"  # in --out, until the report is written
CLASSIFIERS = "classifiers"
_LOAD: dict[str, Callable[..., Any]] = {
    "text": partial(data.text, part="all"),
    "labelled": examples.labelled,
    "summaries": examples.summaries,
}


class _Opened(Mapping[str, OpenModel]):
    """Rows that are opened one after the other, so that only one model is in memory."""

    def __init__(self, rows: Mapping[str, str], session: Session):
        self._rows, self._session = dict(rows), session

    def __getitem__(self, name: str) -> OpenModel:
        return self._session.open(self._rows[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


class Measured(benchmark.Memory):
    """What was measured so far, in a file: a killed benchmark that is started again goes on.

    A figure is known by its metric and settings, the weights it was taken of, the text it was taken on, device, dtype.
    """

    def __init__(self, file: Path, weights: Mapping[str, str], texts: Mapping[str, Any], origin: Provenance):
        self.file, self.weights, self.texts, self.origin = file, weights, texts, origin
        stored = artifacts.read_json(file, "measured", "benchmark") if file.is_file() else {}
        self.stored: dict[str, Any] = stored.get("measured", {})

    def _key(self, rows: Sequence[str], metric: str, settings: Mapping[str, Any]) -> str:
        text = getattr(self.texts.get(metric), "fingerprint", None)
        weights = [self.weights.get(row, row) for row in rows]
        return json.dumps(
            [metric, settings, weights, text, self.origin.device, self.origin.dtype, self.origin.version],
            sort_keys=True,
        )

    def recall(self, rows: Sequence[str], metric: str, settings: Mapping[str, Any]) -> Any:
        found = self.stored.get(self._key(rows, metric, settings))
        return None if found is None else _results(found)

    def keep(self, rows: Sequence[str], metric: str, settings: Mapping[str, Any], measured: Any) -> None:
        self.stored[self._key(rows, metric, settings)] = _plain(measured)
        artifacts.write_json(self.file, "measured", {"measured": self.stored}, self.origin)


def _plain(measured: Any) -> Any:
    if isinstance(measured, MetricResult):
        return measured.to_dict()
    if isinstance(measured, Mapping):
        return {"rows": {name: _plain(item) for name, item in measured.items()}}
    return [_plain(item) for item in measured]


def _results(stored: Any) -> Any:
    if isinstance(stored, list):
        return [_results(item) for item in stored]
    return (
        {name: _results(item) for name, item in stored["rows"].items()}
        if "rows" in stored
        else MetricResult.from_dict(stored)
    )


def run_benchmark(
    names: Sequence[str],
    out: Path,
    metrics: Sequence[Any],
    sources: Mapping[str, str],
    session: Session,
    *,
    columns: Columns = ANYWHERE,
    baselines: Sequence[str] | None = None,
    rows: Mapping[str, str] | None = None,
    only: Mapping[str, Collection[str]] = MappingProxyType({}),
    title: str = "",
    workflow: Sequence[str] = (),
) -> benchmark.Report:
    """Step 6: measure models side by side; write report.json, report.md, report.html and plots into `out`.

    sources: metric -> D; the empty key is for every metric that has none of its own. baselines: which kinds of those
    that the runs have, and further MODELs, which become rows without figures where they cannot be had; None: all that
    the runs have. rows: name -> MODEL instead of all these. only: row -> the metrics it gets, where not all. title,
    workflow: what the report is to say besides. What an interrupted call has measured is not measured again.
    """
    out = Path(out)
    check_place(out, session)
    chosen = benchmark.check_metrics(metrics)
    for metric in sources:
        if metric and (metric not in dict(chosen) or METRICS[metric].data is None):
            raise UserError(
                f"data for {metric!r}, which is not measured here or needs none; measured: {_names(chosen)}"
            )
    rows, absent = rows_of(names, baselines, rows)
    found = {row: models.find(model) for row, model in rows.items()}  # every mistake before the first figure
    texts, missing = what_on(list(dict(chosen)), names, sources, columns, session)
    _warn(names, found, texts, session)
    weights = {row: artifacts.hash_files(list(item.files)) for row, item in found.items()}
    first = session.open(next(iter(rows.values())))
    described = {metric: data.describe(reported(text)) for metric, text in texts.items()}
    origin = session.origin(first, described)
    del first
    if out.is_dir():
        artifacts.sweep(out)
        if session.force:
            artifacts.remove(out / MEASURED)
            artifacts.remove(out / CLASSIFIERS)
    memory = Measured(out / MEASURED, weights, texts, origin)
    result = benchmark.benchmark(
        _Opened(rows, session),
        metrics,
        texts,
        origin=origin,
        quiet=session.silent,
        missing=missing,
        known={row: (rows[row], weights[row]) for row in rows},
        memory=memory,
        folder=out / CLASSIFIERS,
        only=_asked(only, found, list(dict(chosen))),
    )
    for reason in dict.fromkeys(f"{gap.metric}: {gap.reason}" for row in result.rows for gap in row.gaps):
        session.notice(f"warning: not measured: {reason}")
    for model, reason in absent.items():
        session.notice(f"warning: no figures of {model}: {reason}")
        gaps = tuple(benchmark.Gap(metric, settings, reason) for metric, settings in chosen)
        result = dataclasses.replace(result, rows=(*result.rows, benchmark.Row(model, model, (), gaps=gaps)))
    result = dataclasses.replace(result, title=title, workflow=tuple(workflow))
    cards.renew(names, result, session.notice)
    report.write(out, result, stories(names, session.notice))  # last: where it is, all is done
    artifacts.remove(out / MEASURED)
    return result


def _asked(
    only: Mapping[str, Collection[str]], found: Mapping[str, Checkpoint], metrics: Sequence[str]
) -> dict[str, Collection[str]]:
    """`only`, without what some models have and others have not: these are not asked for it. Where none has it, all
    are, and say why they have none."""
    asked = dict(only)
    for metric in metrics:
        has = METRICS[metric].measures
        without = [] if has is None else [row for row, item in found.items() if not has(item.config)]
        if len(without) < len(found):
            asked |= {row: set(asked.get(row, metrics)) - {metric} for row in without}
    return asked


def check_place(out: Path, session: Session) -> None:
    """Raise UserError for a folder that a report may not be written to."""
    must_be_folder(out)
    if (out / "config.json").is_file():
        raise UserError(f"{out} is a model's folder; give another --out")
    if (out / "report.json").exists() and not session.force:
        raise UserError(f"{out} has a report already; give another --out, or --force to replace it")


def rows_of(
    names: Sequence[str], baselines: Sequence[str] | None, rows: Mapping[str, str] | None = None
) -> tuple[dict[str, str], dict[str, str]]:
    """Row -> MODEL, and those of `baselines` that are MODELs and cannot be had -> why. rows: in place of those that
    `names` and the runs' own baselines give."""
    absent = {}
    for word in baselines or ():
        if word not in run_folder.BASELINE_KINDS:
            try:
                models.find(word)
            except UserError as error:
                absent[word] = str(error)
    there = None if baselines is None else [word for word in baselines if word not in absent]
    if rows is None:
        return run_folder.rows(names, there), absent
    return {**rows, **{word: word for word in there or () if word not in run_folder.BASELINE_KINDS}}, absent


def _names(chosen: Sequence[tuple[str, Any]]) -> str:
    return ", ".join(dict.fromkeys(name for name, _ in chosen))


def reported(text: Any) -> Any:
    """What the figures are taken on: the test part of a labelled source."""
    return text.test if isinstance(text, examples.Labelled) else text


def _warn(names: Sequence[str], found: Mapping[str, Checkpoint], texts: Mapping[str, Any], session: Session) -> None:
    for text in {text.fingerprint: reported(text) for text in texts.values()}.values():
        run_folder.warn_of_overlap(found, text, session.notice)
    run_folder.warn_of_twins(found, session.notice)
    run_folder.warn_of_strangers(names, session.notice)


# ---------------------------------------------------------------- what is measured on


def named_for(metric: str, spec: str, columns: Columns = ANYWHERE) -> Any:
    """What a metric measures on, of the D that was named for it. Raises UserError where that is none for it."""
    kind = METRICS[metric].data
    assert kind is not None
    return _LOAD[kind](spec, text_column=columns.text_column, split=columns.split)


def what_on(
    metrics: Sequence[str], names: Sequence[str], sources: Mapping[str, str], columns: Columns, session: Session
) -> tuple[dict[str, Any], dict[str, str]]:
    """metric -> what it is measured on, and metric -> why there is nothing.

    A D that was named for a metric must be there (UserError), and one that was named for all of them must serve it
    unless a metric on text takes it; then the metric's own standard is taken, with a notice, and where that cannot be
    had either, the metric is a gap.
    """
    texts: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for metric in metrics:
        kind = METRICS[metric].data
        if kind == "text":
            spec = sources.get(metric) or sources.get("")
            try:
                texts[metric] = (
                    run_folder.test_text(metric, names, columns.text_column, columns.split)
                    if spec is None
                    else named_for(metric, spec, columns)
                )
            except UserError as error:
                if spec is not None or len(metrics) == 1:
                    raise
                missing[metric] = str(error)
        elif kind is not None:
            spec = sources.get(metric)
            if spec is not None:
                texts[metric] = named_for(metric, spec, columns)
                continue
            given, reason = sources.get(""), ""
            if given is not None:
                try:
                    texts[metric] = named_for(metric, given, columns)
                    continue
                except UserError as error:
                    if not any(METRICS[other].data == "text" and not sources.get(other) for other in metrics):
                        raise
                    reason = str(error)
            standard = "demo" if run_folder.of_the_demo(names) else METRICS[metric].standard
            try:
                texts[metric] = named_for(metric, str(standard))
                if given is not None:
                    session.notice(f"{metric} is measured on {standard}, not on {given}: {reason}")
            except UserError as error:
                missing[metric] = "; and ".join(filter(None, [reason, str(error)]))
    return texts, missing
