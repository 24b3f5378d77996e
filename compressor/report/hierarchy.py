"""What prefixes of token embeddings know of what tokens look like: clusters beside imposed groups, maps of cosines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .. import fields
from ..errors import UserError
from . import layout
from .drawing import INK, canvas, short
from .figures import MISSING
from .layout import Table
from .story import CosineMap, Hierarchy, Met, Prefix, Story

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE = "Hierarchies of token embeddings"
NOTE = (
    "Clusters are tokens whose embeddings, cut to their first coordinates and without the mean over the vocabulary, "
    "are among each other's nearest and at least as alike as told. Purity: the share of clustered tokens that look "
    "like most of their cluster, and by chance, as one cluster of all of them has it; NMI: normalised mutual "
    "information, and adjusted, with what chance gives taken off. Tokens look alike by kind (word, digits, "
    "punctuation, whitespace, other), word start (with a blank before, or not), case, or form, which is all of these."
)
CAPTION = (
    "Cosines of token embeddings cut to their first coordinates, without the mean over the vocabulary; lines part the "
    "sets of tokens."
)


def hierarchy(made: Mapping[str, Any], name: str, place: str) -> Hierarchy | None:
    """What the report.json of a model tells of the prefixes of its embeddings; None where it has none. Raises
    UserError, which names `place`, for a damaged one."""
    try:
        told = [entry for entry in made.get("diagnostics", ()) if entry["rewrite"] == "matryoshka"]
        if not told:
            return None
        entry, owner = told[0], f"the diagnostics in {place}"
        prefixes = []
        for row in entry["prefixes"]:
            met = {
                scheme: None if item is None else fields.from_record(Met, item, owner)
                for scheme, item in row["agreement"].items()
            }
            prefixes.append(fields.from_record(Prefix, {**row, "agreement": met}, owner))
        shown = fields.from_record(CosineMap, entry["map"], owner)
        found = Hierarchy(
            name,
            int(entry["vocabulary"]),
            float(entry["minimum_similarity"]),
            int(entry["minimum_group_size"]),
            tuple(prefixes),
            shown,
        )
        count = len(shown.tokens)
        square = all(len(rows) == count and all(len(row) == count for row in rows) for rows in shown.cosines)
        fits = square and all(-2 < float(value) < 2 for rows in shown.cosines for row in rows for value in row)
        fits = fits and len(shown.cosines) == len(prefixes) and sum(size for _, size in shown.sets) == count
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{place} is damaged (diagnostics: {error!r}); make it anew with --force") from error
    if not prefixes or not fits:
        raise UserError(f"{place} is damaged (diagnostics: prefixes without their maps); make it anew with --force")
    return found


# ---------------------------------------------------------------- tables


def tables(stories: Sequence[Story]) -> list[Table]:
    """One for each model that has prefixes."""
    return [_table(story.run, found) for story in stories for found in story.hierarchies]


def _table(run: str, found: Hierarchy) -> Table:
    columns = {
        "coordinates": [str(row.coordinates) for row in found.prefixes],
        "mean cosine": [f"{row.mean_cosine:.3f}" for row in found.prefixes],
        "clusters": [f"{row.clusters:,}" for row in found.prefixes],
        "the largest": [f"{row.largest:,}" for row in found.prefixes],
        "in a cluster": [f"{row.clustered:,}" for row in found.prefixes],
    }
    for scheme in found.prefixes[0].agreement:
        met = [row.agreement.get(scheme) for row in found.prefixes]
        name = scheme.replace("_", " ")
        columns[f"{name}: purity (chance)"] = [
            MISSING if one is None else f"{one.purity:.2f} ({one.chance:.2f})" for one in met
        ]
        columns[f"{name}: NMI (adjusted)"] = [
            MISSING if one is None else f"{one.nmi:.2f} ({one.ami:.2f})" for one in met
        ]
    title = f"{run}: {found.name}" if run else found.name
    note = (
        f"{found.vocabulary:,} tokens; clusters of {found.minimum_group_size} or more at a cosine of "
        f"{found.minimum_similarity:g} or more."
    )
    return layout.make(columns, title, note)


# ---------------------------------------------------------------- picture

_WIDTH, _TITLE = 8.6, 0.5  # inches of the maps of a line, and of what stands over them


def plot(stories: Sequence[Story]) -> Figure | None:
    """A line of maps for each model, one a prefix; None where there is none. Draw it within `drawing.look`."""
    told = [(story.run, found) for story in stories for found in story.hierarchies if found.map.tokens]
    if not told:
        return None
    columns = max(len(found.prefixes) for _, found in told)
    figure = canvas((_WIDTH / max(3, columns) + _TITLE) * len(told))
    axes = figure.subplots(len(told), columns, squeeze=False)
    shade: Any = None
    for line, (run, found) in zip(axes, told, strict=True):
        for place, panel in enumerate(line):
            if place >= len(found.prefixes):
                panel.set_visible(False)
                continue
            shade = _map(panel, found, place)
            of = f"{short(run)}, {found.name}: " if run else f"{found.name}: "
            panel.set_title(f"{of if place == 0 else ''}{found.prefixes[place].coordinates} coordinates")
        _names(line[0], found.map)
    figure.colorbar(shade, ax=axes, shrink=0.7, label="cosine")
    return figure


def _map(axes: Axes, found: Hierarchy, place: int) -> Any:
    shade = axes.imshow(found.map.cosines[place], cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    axes.grid(visible=False)
    edge = 0
    for _, count in found.map.sets[:-1]:
        edge += count
        for draw in (axes.axhline, axes.axvline):
            draw(edge - 0.5, color=INK, linewidth=0.5)
    axes.set_xticks([])
    axes.set_yticks([])
    return shade


def _names(axes: Axes, shown: CosineMap) -> None:
    """Each set beside its rows."""
    middles, start = [], 0
    for _, count in shown.sets:
        middles.append(start + (count - 1) / 2)
        start += count
    axes.set_yticks(middles, [name for name, _ in shown.sets], fontsize=7)
    axes.tick_params(axis="y", length=0)
