"""The bars of tversky_scaling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..report import drawing, groups
from ..report.groups import Bar, Group
from ..report.pictures import Picture

Three = tuple[float, float, float]  # of GPT-2, of a TverskyGPT with shared banks, of one without


def more(after: float, before: float) -> float:
    """By how many per cent of `before` `after` is more; below 0: less."""
    return 100 * (after / before - 1)


def per_cent(value: float) -> str:
    return f"{value:+.1f} %"


def pictures(
    names: Sequence[str], counts: Sequence[Three], memory: Sequence[Three], papers: Sequence[Mapping[str, Any]]
) -> list[Picture]:
    """names: of the shapes. counts: their parameters; memory: in MiB. papers: records of the paper's settings."""
    millions = [(dense / 1e6, shared / 1e6, apart / 1e6) for dense, shared, apart in counts]
    with drawing.look():
        return [
            Picture(
                "tversky_parameters.png",
                "Parameters",
                "TverskyGPT whose layers share banks, and whose layers do not, beside GPT-2; per cent are of GPT-2. "
                "Each panel has its own scale.",
                groups.plot(_sizes(names, millions, 2), "millions of parameters"),
            ),
            Picture(
                "tversky_changes.png",
                "Changes in per cent",
                "On the right the reduction that the source is about, against its own larger variant; before it, both "
                "against GPT-2. One scale.",
                groups.plot(_changes(names, counts), "per cent", one_scale=True),
            ),
            Picture(
                "tversky_memory.png",
                "Memory of the parameters",
                "float32, 4 bytes a parameter, without activations and cache; per cent are of GPT-2. Each panel has "
                "its own scale.",
                groups.plot(_sizes(names, memory, 0), "MiB"),
            ),
            Picture(
                "tversky_paper.png",
                "The paper's totals",
                "GPT-2 small, and what arXiv 2506.11035 made of it, by count. One scale.",
                groups.plot([_paper(paper) for paper in papers], "millions of parameters", one_scale=True),
            ),
        ]


def _sizes(names: Sequence[str], sizes: Sequence[Three], decimals: int) -> list[Group]:
    found = []
    for name, (dense, shared, apart) in zip(names, sizes, strict=True):
        bars = (
            Bar("GPT-2", dense, f"{dense:,.{decimals}f}", "original"),
            Bar("shared", shared, f"{shared:,.{decimals}f}\n{per_cent(more(shared, dense))}", "own"),
            Bar("not shared", apart, f"{apart:,.{decimals}f}\n{per_cent(more(apart, dense))}", "beside"),
        )
        found.append(Group(name, bars))
    return found


def _changes(names: Sequence[str], counts: Sequence[Three]) -> list[Group]:
    changes = {
        ("Shared, more than GPT-2", "own"): [more(shared, dense) for dense, shared, _ in counts],
        ("Not shared, more than GPT-2", "beside"): [more(apart, dense) for dense, _, apart in counts],
        ("Shared, less than not shared", "own"): [-more(shared, apart) for _, shared, apart in counts],
    }
    lines = ["\n".join(name.rsplit(" ", 1)) for name in names]
    return [
        Group(title, tuple(Bar(name, value, f"{value:.1f} %", kind) for name, value in zip(lines, values, strict=True)))
        for (title, kind), values in changes.items()
    ]


def _paper(paper: Mapping[str, Any]) -> Group:
    before, after = paper["gpt2"] / 1e6, paper["tversky"] / 1e6
    change = per_cent(paper["against_gpt2_percent"])
    bars = (Bar("GPT-2", before, f"{before:.2f}", "original"), Bar("Tversky", after, f"{after:.2f}\n{change}", "own"))
    return Group(paper["replaced"], bars)
