"""How each rewrite is fitted from a pretrained model: one file a rewrite, one line here."""

from __future__ import annotations

from typing import Any

from ..errors import UserError, unknown
from .alibi import Alibi
from .base import FitContext, Rewrite
from .combine import Combine
from .compressed_n import CompressedN
from .dropped_n import DroppedN
from .fractal import Fractal
from .linformer import Linformer
from .matryoshka import Matryoshka
from .merged_n import MergedN
from .nystromformer import Nystromformer
from .performer import Performer
from .pruned import Pruned
from .sasp import Sasp
from .soft_shared import SoftShared
from .token_factored import TokenFactored
from .tversky import Tversky

REWRITES: dict[str, type[Rewrite]] = {
    "soft_shared": SoftShared,
    "merged_n": MergedN,
    "compressed_n": CompressedN,
    "dropped_n": DroppedN,
    "pruned": Pruned,
    "tversky": Tversky,
    "linformer": Linformer,
    "nystromformer": Nystromformer,
    "performer": Performer,
    "alibi": Alibi,
    "token_factored": TokenFactored,
    "sasp": Sasp,
    "matryoshka": Matryoshka,
    "combine": Combine,
    "fractal": Fractal,
}


def from_record(record: dict[str, Any]) -> Rewrite:
    """The rewrite of a record such as {"rewrite": "soft_shared", "rank": 8}. Raises UserError for unknown words."""
    if "rewrite" not in record:
        raise UserError(f"a rewrite needs its name: rewrite: one of {', '.join(sorted(REWRITES))}; given: {record}")
    if record["rewrite"] not in REWRITES:
        raise unknown("rewrite", str(record["rewrite"]), REWRITES)
    return REWRITES[record["rewrite"]].from_record(record)


__all__ = ["REWRITES", "FitContext", "Rewrite", "from_record"]
