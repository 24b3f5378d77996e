"""The comparison from scratch as tables, sentences, curves and samples."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ...metrics.generation import loops
from ...metrics.nll import standard_error
from ...report import drawing, layout
from ...report.figures import MISSING
from ...report.layout import Table
from ...report.pictures import Picture
from ...report.tasks import Prompt, Sample

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .scratch import Trained
    from .scratch_speed import Times

_LEARNED = 0.1  # nats per character: what has learned more than pairs
_NO_LEAK = 1e-4  # of a logit: rounding


def behind(one: Trained, vanilla: Trained) -> tuple[float, float]:
    """How many nats per character of the test text one is above vanilla, and half the width of the 95 % interval of
    that, from the differences of rows (inf with one row)."""
    rows = torch.tensor(one.test_rows, dtype=torch.float64) - torch.tensor(vanilla.test_rows, dtype=torch.float64)
    error = standard_error(rows, 1)
    return float(rows.mean()), math.inf if error is None else 1.96 * error


def _vanilla(made: Sequence[Trained]) -> Trained | None:
    return next((one for one in made if one.attention_type == "vanilla"), None)


def _spread(ratios: Sequence[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def _names(names: Sequence[str]) -> str:
    return ", ".join(names) if names else "none"


# ---------------------------------------------------------------- tables


def tables(
    made: Sequence[Trained], times: Times, settings: Mapping[str, Any], counts: Mapping[str, float]
) -> tuple[Table, ...]:
    vanilla = _vanilla(made)
    against = [
        MISSING if vanilla is None or one is vanilla else "{:+.4f} ± {:.4f}".format(*behind(one, vanilla))
        for one in made
    ]
    medians = [times.median(one.attention_type) for one in made]
    spread = [
        MISSING if vanilla is None or one is vanilla else _spread(times.ratios(one.attention_type, "vanilla"))
        for one in made
    ]
    losses = [*(one.test for one in made), *counts.values()]
    no_model = [MISSING] * len(counts)
    columns = {
        "attention": [*(one.attention_type for one in made), *(f"counts of {name}" for name in counts)],
        "nats per character": [f"{loss:.4f}" for loss in losses],
        "bits": [f"{loss / math.log(2):.4f}" for loss in losses],
        "against vanilla": [*against, *no_model],
        "selection": [*(f"{min(loss for _, loss in one.evaluations):.4f}" for one in made), *no_model],
        "kept": [*(str(one.best) for one in made), *no_model],
        "parameters": [*(f"{one.parameters:,}" for one in made), *no_model],
        "ms/iteration": [*(f"{1000 * seconds:.1f}" for seconds in medians), *no_model],
        "times vanilla's": [*spread, *no_model],
        "characters/s": [
            *(f"{settings['batch_size'] * settings['block_size'] / one:,.0f}" for one in medians),
            *no_model,
        ],
    }
    how = made[0].how
    note = (
        f"Loss of the test text, {settings['test_characters']:,} characters predicted in {len(made[0].test_rows)} rows "
        f"of {settings['block_size']}; against vanilla: with the 95 % interval of that text, row by row, and of one "
        "seed. Selection: the same loss of the text by which the kept iteration was chosen. All have the same seed, "
        "first weights, batches and iterations. Times are of an iteration (forward, backward, optimiser), taken apart "
        f"from the training with the types in turns in one process: the median of {times.count} rounds, and how many "
        f"times as long as vanilla in the round, median and extremes. On {how['device']} with {how['threads']} "
        f"{'thread' if how['threads'] == 1 else 'threads'}, products in {how['autocast']}; {made[0].attention_type} "
        f"trains with {how['attention']} attention."
    )
    own = {**settings, **settings["attention_config"]}
    names = ("block_size", "max_iters", "batch_size", "learning_rate", "n_layer", "n_head", "n_embd", "block",
             "vocabulary", "linformer_k", "nystrom_landmarks", "inverse", "performer_features", "feature_map",
             "seed")  # fmt: skip
    chosen = layout.make(
        {"setting": list(names), "value": [str(own[name]) for name in names]},
        "Settings of the training from scratch",
        words=True,
    )
    title = f"Trained from scratch, {len(made)} kinds of attention"
    return layout.make(columns, title, note, apart=len(counts)), chosen


# ---------------------------------------------------------------- findings


def findings(
    made: Sequence[Trained], times: Times, settings: Mapping[str, Any], counts: Mapping[str, float]
) -> Iterator[str]:
    vanilla = _vanilla(made)
    others = [one for one in made if one is not vanilla]
    first = vanilla or made[0]
    iterations = f"{settings['max_iters']:,} iterations of {settings['batch_size']} x {settings['block_size']}"
    yield (
        f"From scratch, after {iterations} characters, {first.attention_type} has {first.test:.3f} nats "
        f"({first.test / math.log(2):.3f} bits) per character of the test text; counts of "
        f"{' and '.join(f'{name} {loss:.3f}' for name, loss in counts.items())}."
    )
    short = [one.attention_type for one in made if one.test > min(counts.values()) - _LEARNED]
    if short:
        yield (
            f"No more than {_LEARNED} nats better than counts of pairs: {', '.join(short)}. Losses of so short a "
            "training tell which attention learns to look beyond the character before first, not which ends lower; "
            "raise max_iters for that."
        )
    if vanilla is not None and others:
        gaps = {one.attention_type: behind(one, vanilla) for one in others}
        told = ", ".join(f"{name} {gap:+.3f} ± {half:.3f}" for name, (gap, half) in gaps.items())
        equal = [name for name, (gap, half) in gaps.items() if gap <= half]
        yield (
            f"Test loss against vanilla's: {told}. No worse than vanilla, as far as this text and one seed tell: "
            f"{_names(equal)}."
        )
        better = [name for name, (gap, half) in gaps.items() if gap < -half]
        if better:
            yield (
                f"Lower than vanilla's: {', '.join(better)}, with the same iterations and learning rate for all, not "
                "the best of each. That they learn sooner here does not show that they end lower: with more iterations "
                "or another rate the order may be another."
            )
        ratios = {one.attention_type: times.ratios(one.attention_type, "vanilla") for one in others}
        told = ", ".join(f"{name} {statistics.median(own):.2f}" for name, own in ratios.items())
        faster = [name for name, own in ratios.items() if own[-1] < 1]
        both = [name for name in equal if name in faster]
        yield (
            f"An iteration at block_size {settings['block_size']} takes vanilla {1000 * times.median('vanilla'):.0f} "
            f"ms, and of that {told} times as long. Faster in every round: {_names(faster)}; faster and no worse: "
            f"{_names(both)}."
        )
        more = {one.attention_type: one.parameters - vanilla.parameters for one in others}
        told = ", ".join(f"{name} {count:+,}" for name, count in more.items())
        yield f"Parameters against vanilla's {vanilla.parameters:,}: {told}."
    seeing = {one.attention_type: one.leak for one in made if one.leak > _NO_LEAK}
    if seeing:
        yield f"Sees the future: {', '.join(f'{name} (a logit moves by {most:.1e})' for name, most in seeing.items())}."
    else:
        most = max(one.leak for one in made)
        moves = f"by more than {most:.0e}" if most else "at all"
        yield f"After training a changed character moves no logit before it {moves}: these are language models' losses."


# ---------------------------------------------------------------- samples


def prompt(made: Sequence[Trained], opening: str, top_k: int, seed: int) -> Prompt:
    """What each type wrote after the same opening with the same random numbers."""
    samples = tuple(Sample(one.attention_type, one.sample, loops([ord(sign) for sign in one.sample])) for one in made)
    return Prompt(opening, f"top-k {top_k} characters", seed, samples)


# ---------------------------------------------------------------- curves


def pictures(made: Sequence[Trained], times: Times) -> tuple[Picture, ...]:
    vanilla = _vanilla(made)
    compared = vanilla is not None and len(made) > 1
    with drawing.look():
        figure, axes = drawing.panels(3 if compared else 2, 3.2)
        for one, (colour, style) in zip(made, _looks(made), strict=True):
            name = one.attention_type
            axes[0].plot(*zip(*one.steps, strict=True), color=colour, linewidth=0.7, alpha=0.4)
            _line(axes[0], [(step, loss) for step, loss in one.evaluations], colour, style, name)
            _line(axes[1], [(step * times.median(name), loss) for step, loss in one.evaluations], colour, style, name)
            if vanilla is not None and compared:
                below = {step: loss for step, loss in vanilla.evaluations}
                _line(axes[2], [(step, loss - below[step]) for step, loss in one.evaluations], colour, style, name)
        for panel, head, across in zip(
            axes,
            ("Loss by iteration", "Loss by time", "Loss above vanilla's"),
            ("iteration", "seconds of training", "iteration"),
            strict=False,
        ):
            panel.set_title(head)
            panel.set_xlabel(across)
        axes[0].set_ylabel("nats per character")
        low, high = _range(made)
        axes[0].set_ylim(low, high)
        axes[1].set_ylim(low, high)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=4)
    caption = (
        "Thin: loss of the training batches. Thick: loss of the selection text, from its second evaluation on. Time is "
        "the iterations times the median seconds of one, evaluations apart."
    )
    if compared:
        caption += " On the right the selection text's loss minus vanilla's after the same iterations."
    return (Picture("attention_scratch.png", "Training from scratch", caption, figure),)


def _range(made: Sequence[Trained]) -> tuple[float, float]:
    """What the curves are seen in: without the start, beside which all that follows looks alike."""
    after = [loss for one in made for _, loss in one.evaluations[1:]]
    least = min([*after, *(loss for one in made for _, loss in one.steps)])
    room = 0.05 * (max(after) - least)
    return least - room, max(after) + 3 * room


def _looks(made: Sequence[Trained]) -> list[tuple[str, str]]:
    """Colour and line of each; vanilla's is ink, and broken, so that what lies on it is seen."""
    colours = iter(drawing.COLOURS)
    return [(drawing.INK, "--") if one.attention_type == "vanilla" else (next(colours), "-") for one in made]


def _line(axes: Axes, points: Sequence[tuple[float, float]], colour: str, style: str, name: str) -> None:
    axes.plot(
        *zip(*points, strict=True), color=colour, linestyle=style, linewidth=1.5, marker="o", markersize=3.5, label=name
    )
