"""Which slice of a nested model a budget buys, by measured perplexity."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from .. import data, slicing
from ..errors import UserError
from ..metrics import latency
from ..metrics.perplexity import perplexity
from ..modeling.nesting import Size, full_size
from ..models import OpenModel
from ..rewrites.matryoshka import chosen_by, trained_sizes
from ..session import Columns, Session
from ..slice_choice import Budget, Candidate, best, combined, front, mixes, within, worth_measuring

TOKENS = 16384  # that perplexity is taken on
_TOGETHER = 8  # slices that are timed beside the whole model at once
_REPEATS, _WARM_UP = 5, 1


def choose(
    opened: OpenModel, budget: Budget, text: data.Text, session: Session, *, max_tokens: int = TOKENS
) -> tuple[Size, dict[str, Any]]:
    """The slice with the lowest perplexity on `text` (strided, its first `max_tokens`) within the budget, and what was
    measured as plain values.

    Looked at are the trained sizes, what is smaller in two ways at once, and Mix'n'Match. Parameters are counted from
    configs; latencies, of a generation of fixed length, only where the budget has one; what is over it is measured no
    further, but for the perplexity of the whole model, which the others are to be compared with. Raises UserError for a
    budget below the smallest.
    """
    config = opened.model.config
    trained = trained_sizes(config)
    every = _counted(config, combined(trained))
    if budget.parameters is not None:
        counts = {item.size: float(item.parameters) for item in every}
        every += _counted(config, mixes(counts, budget.parameters))
        _least(every, budget)
    fit = [item for item in every if within(item, budget)]
    settings: dict[str, Any] = {}
    if budget.latency is not None:
        fit, settings = _timed(opened, fit, session)
        times = {item.size: item.latency or math.inf for item in fit}
        new = _counted(config, [size for size in mixes(times, budget.latency, spare=1) if size not in times])
        fit += _timed(opened, [item for item in new if within(item, budget)], session)[0]
        _least(fit, budget)
    chosen = worth_measuring([item for item in fit if within(item, budget)], trained)
    whole = next(item for item in (*fit, *every) if item.size == full_size(config))
    wanted = [whole, *(item for item in chosen if item != whole)]
    scored = []
    with session.bar("perplexity", len(wanted), "slice") as bar:
        for item in wanted:
            bar.set_postfix_str(item.name)
            result = perplexity(_slice(opened, item.size), opened.tokenizer, text, max_tokens=max_tokens)[0]
            scored.append(dataclasses.replace(item, perplexity=result.value))
            bar.update()
    picked = best(scored, budget)
    if picked is None:
        raise UserError(f"no slice has a finite perplexity on {text.source}; give other --data, or --dtype float32")
    best_ones = front(scored)
    rows = [
        {
            "slice": item.name,
            "parameters": item.parameters,
            "latency": item.latency,
            "perplexity": item.perplexity if item.scored else None,
            "within": within(item, budget),
            "front": item in best_ones,
            "picked": item is picked,
        }
        for item in sorted(scored, key=lambda item: (-item.parameters, item.name))
    ]
    described = {key: result.settings[key] for key in ("protocol", "context", "stride", "tokens", "source", "part")}
    return picked.size, {
        "budget": dataclasses.asdict(budget),
        "candidates": rows,
        "looked_at": len({item.size for item in (*every, *fit)}),
        "perplexity_of": described,
        "latency_of": settings,
    }


def _counted(config: Any, sizes: Sequence[Size]) -> list[Candidate]:
    counts = slicing.parameters(config, sizes)
    return [Candidate(slicing.name(config, size), size, counts[size]) for size in sizes]


def _slice(opened: OpenModel, size: Size) -> Any:
    """In the whole model's memory wherever its width is the whole one."""
    return opened.model.slice(**chosen_by(size, opened.model.config.n_embd))  # type: ignore[operator]


def _least(candidates: Sequence[Candidate], budget: Budget) -> None:
    if any(within(item, budget) for item in candidates):
        return
    least = min(candidates, key=lambda item: item.latency or item.parameters)
    if least.latency is None:
        raise UserError(
            f"max_parameters={budget.parameters:,} is out of reach; the smallest slice, {least.name}, has "
            f"{least.parameters:,}"
        )
    raise UserError(
        f"max_latency={budget.latency} is out of reach; the fastest slice of {len(candidates)}, {least.name}, takes "
        f"{least.latency:.3f} of the whole model's time"
    )


def _timed(
    opened: OpenModel, candidates: Sequence[Candidate], session: Session
) -> tuple[list[Candidate], dict[str, Any]]:
    """With the time of a prefill and of all steps behind it, over the whole model's, which takes turns with them."""
    whole = full_size(opened.model.config)
    found: list[Candidate] = [dataclasses.replace(item, latency=1.0) for item in candidates if item.size == whole]
    others = [item for item in candidates if item.size != whole]
    settings: dict[str, Any] = {}
    for start in range(0, len(others), _TOGETHER):
        group = others[start : start + _TOGETHER]
        subjects = [opened, *(dataclasses.replace(opened, model=_slice(opened, item.size)) for item in group)]
        with session.bar("latency", unit="run") as bar:

            def move(done: int, total: int, bar: Any = bar) -> None:
                bar.total = total
                bar.update(done - bar.n)

            results = latency.measure(subjects, progress=move, repeats=_REPEATS, warm_up=_WARM_UP)
        settings = {key: value for key, value in results[0][0].settings.items() if key != "models"}
        first, *rest = [prefill.value + settings["new_tokens"] * decode.value for prefill, decode in results]
        found += [dataclasses.replace(item, latency=time / first) for item, time in zip(group, rest, strict=True)]
    return found, settings


def selection_text(
    name: str, earlier: Mapping[str, Any] | None, source: str | None, columns: Columns
) -> tuple[data.Text, dict[str, Any]]:
    """The text to choose on, and what the provenance keeps of it: of `source`, by default of the data that the nested
    model was made with, the selection part. earlier: the report beside that model. Raises UserError where there is
    none, and for text that it was trained or fitted on."""
    texts = earlier["provenance"]["data"] if earlier else {}
    specs: str | Mapping[str, str] | None = source
    if specs is None:
        facts = texts.get("calibration", {})
        specs = facts.get("specs")
        if specs is None:
            raise UserError(
                f"{name} does not say what it was made with; a budget needs text to choose on, give --data D"
            )
        columns = Columns(columns.text_column or facts.get("text_column"), columns.split or facts.get("split_given"))
    text = data.recipe_text(specs, "selection", text_column=columns.text_column, split=columns.split)
    for part, facts in texts.items():
        if part != "selection" and data.overlap(data.describe(text), facts):
            raise UserError(
                f"the text to choose on ({text.source}) shares text with the {part} text that {name} was made with; "
                "give other --data"
            )
    return text, {"selection": data.describe(text)}
