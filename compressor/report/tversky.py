"""What became of Tversky projections: theta, alpha, beta, what is dead, how asymmetric they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .. import fields
from ..errors import UserError
from ..modeling.tversky import SCALARS
from . import layout
from .drawing import COLOURS, GREY, INK, PAPER, canvas, short
from .figures import MISSING
from .layout import Table
from .story import Bank, Diagnosis, Projection, Story

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ROWS = 24  # of more projections a table shows the layers of a target together
_TINTS = (*COLOURS, INK, GREY)  # of the targets, in their order
_MARKERS = "o^sDvP<X"


def diagnosis(made: Mapping[str, Any], name: str, place: str) -> Diagnosis | None:
    """What the report.json of a model tells of its Tversky projections; None where it has none. Raises UserError, which
    names `place`, for a damaged one."""
    try:
        told = [entry for entry in made.get("diagnostics", ()) if entry["rewrite"] == "tversky"]
        if not told:
            return None
        owner = f"the diagnostics in {place}"
        found = Diagnosis(
            name,
            int(told[0]["tokens"]),
            tuple(fields.from_record(Bank, row, owner) for entry in told for row in entry["banks"]),
            tuple(fields.from_record(Projection, row, owner) for entry in told for row in entry["projections"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{place} is damaged (diagnostics: {error!r}); make it anew with --force") from error
    keys = {bank.key for bank in found.banks}
    if not found.projections or {item.bank for item in found.projections} != keys:
        raise UserError(f"{place} is damaged (diagnostics: projections without a bank); make it anew with --force")
    return found


# ---------------------------------------------------------------- words


def summary(found: Diagnosis) -> list[str]:
    """A few lines, for a card and a terminal."""
    banks, rows = found.banks, found.projections
    counted = "bank" if len(banks) == 1 else "banks"
    return [
        f"{len(rows)} projections with {len(banks)} {counted} of features, on {found.tokens:,} tokens of calibration "
        f"text",
        f"dead: {_dead(sum(bank.dead_features for bank in banks), sum(bank.features for bank in banks))} features, "
        f"{_dead(sum(row.dead_prototypes for row in rows), sum(row.prototypes for row in rows))} prototypes",
        ", ".join(f"{name} {_range([getattr(row, name) for row in rows])}" for name in SCALARS),
        f"linear still: {_linear(rows)}; asymmetry {_range([row.asymmetry for row in rows])}",
    ]


def _dead(dead: int, count: int) -> str:
    return f"{dead:,} of {count:,}"


def _range(values: Sequence[float | None]) -> str:
    numbers = [value for value in values if value is not None]
    if not numbers:
        return MISSING
    low, high = (f"{value:.3f}" for value in (min(numbers), max(numbers)))
    return low if low == high else f"{low} to {high}"


def _linear(rows: Sequence[Projection]) -> str:
    count = sum(row.linear for row in rows)
    return "yes" if count == len(rows) else "no" if not count else f"{count} of {len(rows)}"


# ---------------------------------------------------------------- tables


def tables(stories: Sequence[Story]) -> list[Table]:
    """One for each model that has projections."""
    return [_table(story.run, found) for story in stories for found in story.diagnoses]


def _table(run: str, found: Diagnosis) -> Table:
    each = len(found.projections) <= _ROWS
    groups: dict[tuple[int | None, str], list[Projection]] = {}
    for row in found.projections:
        groups.setdefault((row.layer if each else None, row.target), []).append(row)
    shown = list(groups.values())

    def column(show: Callable[[list[Projection]], str]) -> list[str]:
        return [show(rows) for rows in shown]

    columns = {
        "projection": column(_named),
        "features per token": column(
            lambda rows: (
                f"{sum(row.features_per_token for row in rows) / len(rows):,.1f} of {found.features(rows[0]):,}"
            )
        ),
        "dead features": column(
            lambda rows: _dead(sum(row.dead_features for row in rows), sum(map(found.features, rows)))
        ),
        "dead prototypes": column(
            lambda rows: _dead(sum(row.dead_prototypes for row in rows), sum(row.prototypes for row in rows))
        ),
        "theta": column(lambda rows: _range([row.theta for row in rows])),
        "alpha": column(lambda rows: _range([row.alpha for row in rows])),
        "beta": column(lambda rows: _range([row.beta for row in rows])),
        "linear": column(_linear),
        "asymmetry": column(lambda rows: _range([row.asymmetry for row in rows])),
    }
    title = f"{run}: {found.name}" if run else found.name
    return layout.make(columns, title, ". ".join(line[0].upper() + line[1:] for line in summary(found)) + ".")


def _named(rows: Sequence[Projection]) -> str:
    layers = [row.layer for row in rows if row.layer is not None]
    return rows[0].target + (f" of {layers_named(layers)}" if layers else "")


def layers_named(layers: Sequence[int]) -> str:
    """ "layers 0-2, 5" """
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    parts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(parts)}"


TITLE = "Tversky projections"
NOTE = (
    "A feature is present in a token where its product with the input is above 0 (of an antipodal bank one of f and -f "
    "nearly always is), dead where it never is; a prototype is dead where it has no feature or its similarity never "
    "varies. Asymmetry: mean |S(a, b) - S(b, a)| over mean |S| of prototypes."
)


# ---------------------------------------------------------------- picture

_PANELS: tuple[tuple[str, Callable[[Diagnosis, Projection], float | None]], ...] = (
    ("theta", lambda found, row: row.theta),
    ("alpha", lambda found, row: row.alpha),
    ("beta", lambda found, row: row.beta),
    ("dead features, %", lambda found, row: 100 * row.dead_features / found.features(row)),
    ("dead prototypes, %", lambda found, row: 100 * row.dead_prototypes / row.prototypes),
    ("asymmetry", lambda found, row: row.asymmetry),
)


def plot(stories: Sequence[Story]) -> Figure | None:
    """Six panels a run, by layer; None without projections. Draw it within `drawing.look`."""
    from matplotlib.lines import Line2D

    told = [story for story in stories if story.diagnoses]
    if not told:
        return None
    targets = list(
        dict.fromkeys(row.target for story in told for found in story.diagnoses for row in found.projections)
    )
    figure = canvas(4.2 * len(told))
    axes = figure.subplots(2 * len(told), 3, squeeze=False)
    for place, story in enumerate(told):
        panels = axes[2 * place : 2 * place + 2].flatten().tolist()
        for panel, (title, value) in zip(panels, _PANELS, strict=True):
            _panel(panel, story, targets, value)
            if title not in SCALARS:  # shares of nothing, or sizes: from 0
                panel.set_ylim(0, max(panel.get_ylim()[1], 0.01))
            panel.set_title(f"{short(story.run)}: {title}" if story.run else title)
    marks = [
        Line2D([], [], color=tint, marker=marker, markersize=4, label=target)
        for target, tint, marker in zip(targets, _TINTS, _MARKERS, strict=False)
    ]
    figure.legend(handles=marks, loc="outside upper right", ncols=len(marks))
    return figure


def _panel(
    axes: Axes, story: Story, targets: Sequence[str], value: Callable[[Diagnosis, Projection], float | None]
) -> None:
    layers = sorted({row.layer for found in story.diagnoses for row in found.projections if row.layer is not None})
    head = layers[-1] + 1.6 if layers else 0  # where the head stands
    for found in story.diagnoses:
        before = found.name == "rewritten"
        for target, tint, marker in zip(targets, _TINTS, _MARKERS, strict=False):
            points = [
                (head if row.layer is None else row.layer, height)
                for row in found.projections
                if row.target == target and (height := value(found, row)) is not None
            ]
            axes.plot(
                *zip(*sorted(points), strict=True) if points else ((), ()),
                color=tint,
                marker=marker,
                markersize=4,
                markerfacecolor=PAPER if before else tint,
                linestyle=(0, (4, 3)) if before else "-",
                linewidth=0.9 if before else 1.2,
                alpha=0.6 if before else 1,
            )
    ticks: list[float] = [*layers[:: 1 + len(layers) // 13]]
    names = [str(layer) for layer in ticks]
    if any(row.layer is None for found in story.diagnoses for row in found.projections):
        ticks, names = [*ticks, head], [*names, "head"]
    axes.set_xticks(ticks, names)
    axes.set_xlim(min(ticks) - 0.5, max([*layers, *ticks]) + 0.5)


CAPTION = (
    "By layer. Dashed and hollow: right after the rewrite; solid: after recovery. The start is a dot product where "
    "theta = alpha + beta; the further they part, the less linear the layer has become. Dead features and prototypes "
    "do no work on the calibration text."
)
