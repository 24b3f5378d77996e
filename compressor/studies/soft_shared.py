"""soft_shared, one choice changed at a time: rank, base, initialisation, alignment, where the window lies.

Does the alignment pay, does the search pay? The default is rank 8, base lsq, delta_init asvd, aligned by activations,
the best window.
"""

from __future__ import annotations

from typing import Any

from .code_n_all import CODE_N_ALL
from .study import Member, Study


def _soft(**changes: Any) -> dict[str, Any]:
    return {"rewrite": "soft_shared", "n": 4, "rank": 8, "base": "lsq", "delta_init": "asvd", **changes}


SOFT_SHARED = Study(
    name="soft_shared",
    title="soft_shared: what its choices are worth",
    recipe={
        **CODE_N_ALL.recipe,
        "benchmark": {"metrics": [{"metric": "perplexity", "max_tokens": 32768}, "size"]},
    },
    members=(
        Member("default", _soft()),
        *(Member(f"rank_{rank}", _soft(rank=rank)) for rank in (0, 4, 16, 32)),
        *(Member(f"base_{base}", _soft(base=base)) for base in ("anchor", "mean")),
        *(Member(f"init_{init}", _soft(delta_init=init)) for init in ("svd", "lora")),
        *(Member(f"align_{method}", _soft(), [f"align.method={method}"]) for method in ("weight", "none")),
        Member("rank_0_align_none", _soft(rank=0), ["align.method=none"]),
        *(Member(f"window_{strategy}", _soft(), [f"search.strategy={strategy}"]) for strategy in ("middle", "random")),
    ),
    before=("perplexity", "size"),
)
