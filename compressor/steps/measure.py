"""Step 6: models in, report.json, report.md and plots out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import artifacts, benchmark, data, models, report, run_folder
from ..errors import UserError
from ..models import OpenModel
from ..session import ANYWHERE, Columns, Session, must_be_folder


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


def run_benchmark(
    names: Sequence[str],
    out: Path,
    metrics: Sequence[Any],
    sources: Mapping[str, str],
    session: Session,
    *,
    columns: Columns = ANYWHERE,
) -> benchmark.Report:
    """Step 6: measure models side by side; write report.json, report.md and plots into `out`.

    sources: metric -> D; the empty key is for every metric that has none of its own.
    """
    out = Path(out)
    must_be_folder(out)
    if (out / "config.json").is_file():
        raise UserError(f"{out} is a model's folder; give another --out")
    if (out / "report.json").exists() and not session.force:
        raise UserError(f"{out} has a report already; give another --out, or --force to replace it")
    chosen = benchmark.check_metrics(metrics)
    for metric in sources:
        if metric and (metric not in dict(chosen) or not benchmark.METRICS[metric].needs_data):
            raise UserError(
                f"data for {metric!r}, which is not measured here or needs none; measured: {_names(chosen)}"
            )
    rows = run_folder.rows(names)
    found = {row: models.find(model) for row, model in rows.items()}  # every mistake before the first figure
    texts: dict[str, data.Text] = {}
    for metric, _ in chosen:
        if benchmark.METRICS[metric].needs_data and metric not in texts:
            texts[metric] = _text(metric, names, sources, columns)
    for text in {text.fingerprint: text for text in texts.values()}.values():
        run_folder.warn_of_overlap(found, text, session.notice)
    run_folder.warn_of_twins(found, session.notice)
    run_folder.warn_of_strangers(names, session.notice)
    first = session.open(next(iter(rows.values())))
    origin = session.origin(first, {metric: data.describe(text) for metric, text in texts.items()})
    del first
    result = benchmark.benchmark(_Opened(rows, session), metrics, texts, origin=origin, quiet=session.silent)
    if out.is_dir():
        artifacts.sweep(out)
    with artifacts.new_files(out) as folder:
        report.write(folder, result)
    return result


def _names(chosen: Sequence[tuple[str, Any]]) -> str:
    return ", ".join(dict.fromkeys(name for name, _ in chosen))


def _text(metric: str, names: Sequence[str], sources: Mapping[str, str], columns: Columns) -> data.Text:
    spec = sources.get(metric) or sources.get("")
    if spec is None:
        return run_folder.test_text(metric, names, columns.text_column, columns.split)
    return data.text(spec, "all", text_column=columns.text_column, split=columns.split)
