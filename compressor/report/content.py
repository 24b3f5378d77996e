"""What stands in a report, whatever it is rendered as."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artifacts import Provenance
from ..benchmark import Report
from . import assisted, extrapolation, hierarchy, layout, nested, tables, tasks, tversky
from .figures import MISSING, Gaps
from .layout import Table
from .pictures import Picture, pictures
from .rows import runs
from .story import Story
from .summary import Tile, findings, tiles
from .tasks import Prompt

DASH = f"{MISSING} stands where a figure was not asked for or has nothing to be compared with."


@dataclass(frozen=True)
class Content:
    """The parts of a report in their order; `main` is the table of all models."""

    title: str
    tiles: tuple[Tile, ...]
    findings: tuple[str, ...]
    workflow: tuple[str, ...]  # a study's
    main: Table
    tables: tuple[Table, ...]  # recovery, perplexity, lengths, latency, drafts, tasks, size
    missing: Table | None  # why each gap is there
    pictures: tuple[Picture, ...]
    prompts: tuple[Prompt, ...]
    origin: tuple[Table, ...]
    made: str  # by which versions, on what
    command: str
    projections: tuple[Table, ...] = ()  # of Tversky, one a model
    hierarchies: tuple[Table, ...] = ()  # of token embeddings by prefix, one a model

    @property
    def diagnosed(self) -> list[tuple[str, str, str, tuple[Table, ...]]]:
        """(key, title, note, tables) of what was diagnosed in the models of runs."""
        every = (
            ("projections", tversky.TITLE, tversky.NOTE, self.projections),
            ("hierarchies", hierarchy.TITLE, hierarchy.NOTE, self.hierarchies),
        )
        return [one for one in every if one[3]]


def content(report: Report, stories: Sequence[Story] = ()) -> Content:
    """Everything that a report says."""
    gaps = Gaps(report)
    main = tables.overview(report, gaps)
    note = (
        f"Ratios and speed-ups are to {report.rows[0].name}. Parameters are counted once where they are shared; bytes "
        f"are those of the weight files; FLOPs are those of a forward pass with the LM head. {DASH}"
    )
    recovery, size = tables.recoveries(report, gaps), tables.sizes(report, gaps)
    return Content(
        title=_title(report),
        tiles=tuple(tiles(report)),
        findings=tuple(findings(report, gaps)),
        workflow=report.workflow,
        main=Table(main.header, main.body, "Size, quality and speed", note),
        tables=(
            *([recovery] if recovery else ()),
            *nested.tables(report),
            *tables.perplexities(report, gaps),
            *extrapolation.tables(report, gaps),
            *tables.latencies(report, gaps),
            *assisted.tables(report, gaps),
            *(tasks.table(report, task, everything=True) for task in tasks.tasks(report, gaps)),
            *([size] if size else ()),
        ),
        missing=missing(gaps),
        pictures=tuple(pictures(report, gaps, stories)),
        prompts=tuple(tasks.prompts(report)),
        origin=tuple(_origin(report, stories)),
        made=made_by(report.origin),
        command=report.origin.command,
        projections=tuple(tversky.tables(stories)),
        hierarchies=tuple(hierarchy.tables(stories)),
    )


def _title(report: Report) -> str:
    """What a reader would call it."""
    if report.title:
        return report.title
    base = Path(report.origin.base_model).name or report.origin.base_model
    if runs(report):
        return f"{base} and what was made of it"
    return f"Benchmark of {base}" + (f" and {len(report.rows) - 1} more" if len(report.rows) > 1 else "")


def missing(gaps: Gaps) -> Table | None:
    """The reasons that the marks in the tables stand for; None where nothing is missing."""
    if not gaps.reasons:
        return None
    columns = {
        "gap": [f"[{item.number}]" for item in gaps.reasons],
        "figure": [item.what for item in gaps.reasons],
        "models": [", ".join(item.models) for item in gaps.reasons],
        "reason": [item.reason for item in gaps.reasons],
    }
    return layout.make(columns, "Not measured", words=True)


# ---------------------------------------------------------------- where it comes from


def _origin(report: Report, stories: Sequence[Story]) -> Iterator[Table]:
    rows = report.rows
    yield layout.make(
        {
            "model": [row.name for row in rows],
            "from": [row.source for row in rows],
            "sha256 of the weights": [row.weights[:12] or MISSING for row in rows],
        },
        "Models",
        words=True,
    )
    told = [story for story in stories if story.rewrites]
    if told:
        yield layout.make(
            {
                "run": [story.run or "this run" for story in told],
                "rewrites": [
                    "; ".join(f"{item['rewrite']}: {_named(item, 'rewrite')}" for item in story.rewrites)
                    for story in told
                ],
                "recovery": [_trained(story) for story in told],
            },
            "Runs",
            words=True,
        )
    data = report.origin.data
    if data:
        yield layout.make(
            {
                "data": list(data),
                "source": [str(facts.get("source", MISSING)) for facts in data.values()],
                "part": [str(facts.get("part", MISSING)) for facts in data.values()],
                "fingerprint": [str(facts.get("fingerprint", MISSING))[:12] for facts in data.values()],
            },
            "Data",
            words=True,
        )
    if report.metrics:
        yield layout.make(
            {
                "metric": [str(entry["metric"]) for entry in report.metrics],
                "settings": [_named(entry, "metric") or "defaults" for entry in report.metrics],
            },
            "Asked for",
            words=True,
        )
    found = {(item.metric, str(item.settings.get("protocol"))) for row in rows for item in row.results}
    yield layout.make(
        {"figure": [one for one, _ in sorted(found)], "protocol": [two for _, two in sorted(found)]},
        "Protocols",
        words=True,
    )


def _named(record: dict[str, Any], key: str) -> str:
    """A record without its name: "n=4, rank=8"."""
    return ", ".join(f"{name}={value}" for name, value in record.items() if name != key)


def _trained(story: Story) -> str:
    done = [f"{curve.name}: {curve.train}, {len(curve.steps)} steps, kept step {curve.best}" for curve in story.curves]
    return "; ".join(done) or "none"


def made_by(origin: Provenance) -> str:
    """The versions, the machine and the seed that something was made with."""
    commit = f" ({origin.commit})" if origin.commit else ""
    return (
        f"gpt2-compress {origin.version}{commit}, torch {origin.torch}, transformers {origin.transformers}, "
        f"{origin.device}, {origin.dtype}, {origin.threads} {'thread' if origin.threads == 1 else 'threads'}, seed "
        f"{origin.seed}"
    )
