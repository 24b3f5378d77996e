"""matryoshka: one model with 1/2, 1/4 and 1/8 of the FFNs' neurons nested in it, beside what it has to be as good as.

For each of these sizes: the same slice recovered alone, and soft_shared and compressed_n at about as many parameters.

The nested model's recovery costs what the separate ones cost together. It trains one size a step, each in its turn, the
whole among them, and has as many times the steps of each separate model as there are sizes: every size is taken as
often as its separate model has steps, the whole as often as the control.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import GPT2Config

from .. import gpt2, models
from ..errors import UserError
from ..metrics.size import parameters
from ..rewrites import from_record
from ..rewrites.compose import structure
from .code_n_all import CODE_N_ALL
from .study import Member, Study

PARTS = (2, 4, 8)  # of the FFNs' neurons one so many is kept


def members(shared: Mapping[str, Any], config: GPT2Config) -> tuple[Member, ...]:
    """For a model: its FFNs' widths, and the parameters that others are to have, decide what the members are.
    Raises UserError for a model of one layer, which has nothing that others could share or leave out."""
    if config.n_layer < 2:
        raise UserError(f"study matryoshka: the model has {config.n_layer} layer; allowed: 2 or more")
    widths = {part: gpt2.d_ff(config) // part for part in PARTS}
    nested = {"rewrite": "matryoshka", "ffn": list(widths.values()), "train": "one"}
    singles = {part: {**nested, "only": {"ffn": width}} for part, width in widths.items()}
    counts = {part: _count(record, config) for part, record in singles.items()}
    training = shared.get("finetune")
    longer = [] if training is None else [f"finetune.steps={(1 + len(PARTS)) * training['steps']}"]
    return (
        *(Member(f"single_ffn_{part}", record) for part, record in singles.items()),
        Member("nested", nested, [*longer, "slices=all"]),
        *(Member(f"soft_shared_{part}", _soft_shared(count, config)) for part, count in counts.items()),
        *(Member(f"compressed_{part}", _compressed(count, config)) for part, count in counts.items()),
    )


def _count(record: Mapping[str, Any], config: GPT2Config) -> int:
    """Parameters of the model that a rewrite makes, wherever it lies."""
    placed = {**record, "start": 0} if record["rewrite"] == "compressed_n" else dict(record)
    return parameters(models.build(structure([from_record(placed).resolved(config)], config)))


def _soft_shared(count: int, config: GPT2Config) -> dict[str, Any]:
    """In tiles of the least n that leaves room for deltas, whose rank fills it up; without deltas where none does."""
    made = {"rewrite": "soft_shared", "scope": "tile", "base": "lsq", "delta_init": "asvd"}
    lengths = [n for n in range(2, config.n_layer + 1) if config.n_layer % n == 0]
    for n in lengths:
        least, more = (_count({**made, "n": n, "rank": rank}, config) for rank in (0, 1))
        if count >= more:
            return {**made, "n": n, "rank": (count - least) // (more - least)}
    return {**made, "n": lengths[-1], "rank": 0}


def _compressed(count: int, config: GPT2Config) -> dict[str, Any]:
    """Of as many blocks as come nearest."""
    made = {"rewrite": "compressed_n", "collapse": "fit"}

    def far(n: int) -> int:
        return abs(_count({**made, "n": n}, config) - count)

    return {**made, "n": min(range(2, config.n_layer + 1), key=far)}


MATRYOSHKA = Study(
    name="matryoshka",
    title="matryoshka: nested FFNs beside models of their sizes",
    recipe={
        **CODE_N_ALL.recipe,
        "benchmark": {"metrics": [
            {"metric": "perplexity", "max_tokens": 32768},
            "size",
            {"metric": "latency", "repeats": 5},
            {"metric": "assisted", "repeats": 3},
        ]},
    },
    members=members,
    before=("perplexity", "size", "assisted"),
    workflow=(
        "The same recovery (steps, batches, seed) for each model that is trained alone and, as control, for the "
        "original. The nested model trains one size a step, each in its turn, and has the steps of all of them "
        "together: Recovery, How it was made.",
        "Every slice of the nested model before and after recovery, beside the same slice recovered alone, soft_shared "
        "and compressed_n of about as many parameters: Slices beside models of their size.",
        "Parameters and bytes of every size: Size.",
        "Time of a prompt and of a token, all models in one process: Prefill latency, Decode latency.",
        "Each slice drafts for the nested model, before and after recovery: Written with drafts.",
    ),
)  # fmt: skip
