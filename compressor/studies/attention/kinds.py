"""The causal attentions that study attention compares, as one call each: query, key, value -> output."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...modeling.block_attention import BlockAttention, Far, State
from ...modeling.linformer import LinformerFar
from ...modeling.nystromformer import INVERSES, NystromFar
from ...modeling.performer import MAPS, PerformerFar

Attend = Callable[..., Tensor]  # query, key, value float[batch, heads, tokens, head_dim], scaling= -> output like value
KNOBS = {"linformer": "slots", "nystromformer": "landmarks", "performer": "features"}
NO_MASS, NO_WINDOW = "no log-mass", "no window"


@dataclass(frozen=True)
class Kind:
    """family: of KNOBS, or vanilla (explicit T x T), sdpa (PyTorch's own kernel). size:
    of its knob, 0 without one. form: inverse, feature map. lacking: NO_MASS, NO_WINDOW, or nothing."""

    family: str
    size: int = 0
    form: str = ""
    lacking: str = ""

    @property
    def line(self) -> str:
        """Its name but for the size: what a line of a plot is."""
        return " ".join(word for word in (self.family, self.form, self.lacking) if word not in ("", "none"))

    @property
    def name(self) -> str:
        return f"{self.line} {KNOBS[self.family]}={self.size}" if self.size else self.line


_BEGINNINGS = [feature_map for feature_map in MAPS if feature_map != "learned"]
VANILLA, SDPA, BLOCK = Kind("vanilla"), Kind("sdpa"), Kind("block alone")
UNIFORM = Kind("uniform")  # a matrix, no attention


def kinds(slots: Sequence[int], landmarks: Sequence[int], features: Sequence[int]) -> list[Kind]:
    """All that is compared in time and memory; elu has no knob, and as many features as a head is wide. A performer's
    learned features begin as favor_hyp."""
    return [
        VANILLA,
        SDPA,
        *(Kind("linformer", size) for size in slots),
        *(Kind("nystromformer", size, inverse) for inverse in reversed(INVERSES) for size in landmarks),
        *(Kind("performer", size, form) for form in _BEGINNINGS for size in (features if form != "elu" else [0])),
    ]


def only_likeness(slots: Sequence[int], features: Sequence[int]) -> list[Kind]:
    """What is looked at for what it shows, and nobody would use: summaries that weigh as one token, FAVOR+ without an
    exact block, and the exact block alone."""
    return [
        BLOCK,
        *(Kind("linformer", size, lacking=NO_MASS) for size in slots),
        *(Kind("performer", size, "favor+", NO_WINDOW) for size in features),
    ]


def middle(found: Sequence[Kind]) -> list[Kind]:
    """Of each line the kind with the middle size: what is measured at every length."""
    lines: dict[str, list[Kind]] = {}
    for kind in found:
        lines.setdefault(kind.line, []).append(kind)
    return [of_line[len(of_line) // 2] for of_line in lines.values()]


def attention_of(kind: Kind, heads: int, head_dim: int, block: int, seed: int) -> Attend:
    """As a rewrite would begin with it: nothing of it is trained. seed: of a performer's random directions."""
    if kind.family == "vanilla":
        return vanilla
    if kind.family == "sdpa":
        return sdpa
    far: Far
    if kind == BLOCK:
        far = Nothing()
    elif kind.family == "linformer":
        far = LinformerFar(1, block, kind.size)
        if kind.lacking:
            nn.init.zeros_(far.log_mass)
    elif kind.family == "nystromformer":
        far = NystromFar(kind.size, kind.form)
    else:
        far = PerformerFar(heads, head_dim, kind.size or head_dim, kind.form, seed, local=not kind.lacking)
    return BlockAttention(block, far.requires_grad_(False))


def vanilla(query: Tensor, key: Tensor, value: Tensor, *, scaling: float) -> Tensor:
    """All T x T scores at once, and once more as weights."""
    return causal_weights(query, key, scaling) @ value


def causal_weights(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Softmax over what each token may see, float[batch, heads, tokens, tokens]."""
    tokens = query.shape[2]
    later = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).triu(1)
    return ((query * scaling) @ key.transpose(-1, -2)).masked_fill_(later, -math.inf).softmax(-1)


def sdpa(query: Tensor, key: Tensor, value: Tensor, *, scaling: float) -> Tensor:
    return nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)


class Nothing(Far):
    """Completed blocks are forgotten."""

    def over_blocks(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float, state: State
    ) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(value, dtype=torch.float32), query.new_full(query.shape[:4], -math.inf).float()

    def over_state(self, query: Tensor, scaling: float, state: State) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(query, dtype=torch.float32), query.new_full(query.shape[:3], -math.inf).float()

    def grown(
        self, state: State, query: Tensor | None, key: Tensor, value: Tensor, complete: Tensor, scaling: float
    ) -> State:
        return state
