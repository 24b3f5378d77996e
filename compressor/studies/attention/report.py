"""The tables of study attention."""

from __future__ import annotations

from collections.abc import Callable

from ...report import layout
from ...report.layout import Table
from ..outcome import Outcome
from .figures import MIB, Cost, Match, Measured
from .findings import findings
from .kinds import SDPA
from .pictures import pictures


def report_of(measured: Measured) -> Outcome:
    return Outcome(
        body=measured.body(),
        tables=(
            _times(measured),
            _memory(measured),
            _caches(measured),
            _knobs(measured),
            *_likeness(measured),
        ),
        findings=tuple(findings(measured)),
        pictures=tuple(pictures(measured)),
    )


# ---------------------------------------------------------------- tables


def _times(measured: Measured) -> Table:
    settings = measured.settings
    return _by_length(
        measured,
        "Time of a forward pass, ms",
        lambda cost: f"{_short(cost.median_ms)} ±{_short((cost.high_ms - cost.low_ms) / 2)}",
        f"Median of {settings['repeats']} runs, all attentions taking turns in one process, after one that warmed up; "
        f"± half the distance of the quartiles. Batch 1, {settings['heads']} heads of {settings['head_dim']}, blocks "
        f"of {settings['block']} tokens, the attention alone: query, key, value -> output.",
    )


def _memory(measured: Measured) -> Table:
    return _by_length(
        measured,
        "Peak memory of a forward pass, MiB",
        lambda cost: _short(cost.peak_bytes / MIB),
        "The most that was allocated at once beyond the inputs; the output is in it.",
    )


def _caches(measured: Measured) -> Table:
    return _by_length(
        measured,
        "Cache, bytes per token",
        lambda cost: f"{cost.cache_per_token:,.0f}",
        "What is kept for the next token, over the tokens so far, when the block under way is all but full. Vanilla "
        "and sdpa keep keys and values; nystromformer keeps its landmarks too, with newton also queries.",
    )


def _by_length(measured: Measured, title: str, cell: Callable[[Cost], str], note: str) -> Table:
    columns = {"attention": [kind.name for kind in measured.main]}
    for length in measured.lengths:
        found = measured.at(length)
        columns[f"{length:,}"] = [cell(found[kind]) for kind in measured.main]
    return layout.make(columns, title, note)


def _knobs(measured: Measured) -> Table:
    length = measured.settings["knob_length"]
    found = measured.at(length)
    base = found[SDPA]
    columns = {
        "attention": [kind.name for kind in found],
        "ms": [_short(cost.median_ms) for cost in found.values()],
        "quartiles": [f"{_short(cost.low_ms)} to {_short(cost.high_ms)}" for cost in found.values()],
        "to sdpa": [f"{cost.median_ms / base.median_ms:.2f}" for cost in found.values()],
        "peak MiB": [_short(cost.peak_bytes / MIB) for cost in found.values()],
        "memory to sdpa": [f"{cost.peak_bytes / base.peak_bytes:.2f}" for cost in found.values()],
        "cache, bytes per token": [f"{cost.cache_per_token:,.0f}" for cost in found.values()],
    }
    return layout.make(columns, f"Knobs at {length:,} tokens", "As above, every size of every knob.")


def _likeness(measured: Measured) -> list[Table]:
    """A table a measure, a column for the heads."""
    return [
        _by_heads(measured, lambda match: f"{match.frobenius:.3f}", "Matrix error",
                  "Frobenius norm of the difference to the exact attention matrix, over that of the exact one, mean "
                  "over heads. Nothing is trained. block alone has no far part; uniform looks at neither queries nor "
                  "keys; no log-mass: a summary weighs as one token; no window: the own block is features too. Lengths "
                  f"of queries and keys, with the factor of the scores: {_norms(measured)}."),
        _by_heads(measured, lambda match: f"{match.variation:.3f}", "Total variation",
                  "The share of attention that is elsewhere: half the sum of |difference| of a row, mean over rows."),
        _by_heads(measured, lambda match: f"{match.cosine:.3f}", "Cosine of the matrices", "Each head as one vector."),
        _by_heads(measured, lambda match: f"{match.row_sum:.1e}", "Row sums", "Mean distance from 1."),
        _by_heads(measured, lambda match: f"{match.output_error:.3f}", "Output error",
                  "Norm of the difference to the exact output, over that of the exact one."),
        _by_heads(measured, lambda match: f"{match.output_cosine:.3f}", "Cosine of the outputs",
                  "Each head as one vector: high where the matrices differ, since outputs are means of many values."),
        _by_heads(measured, lambda match: f"{match.cache_bytes / 1024:,.0f}", "Cache of these heads, KiB",
                  "For all but one of the tokens."),
    ]  # fmt: skip


def _by_heads(measured: Measured, cell: Callable[[Match], str], title: str, note: str) -> Table:
    found = {heads: measured.on(heads) for heads in measured.heads}
    names = next(iter(found.values()))
    columns = {"attention": [kind.name for kind in names]}
    for heads, matches in found.items():
        columns[heads.removeprefix("random, ")] = [cell(matches[kind]) for kind in names]
    return layout.make(columns, title, note)


def _norms(measured: Measured) -> str:
    return "; ".join(f"{heads} {query:.1f} and {key:.1f}" for heads, (query, key) in measured.norms.items())


def _short(value: float) -> str:
    """Three figures."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
