"""performer: completed blocks are summed up in features, q . k ~ phi(q) . phi(k): a state of fixed size.

FAVOR+ (Choromanski et al., arXiv 2009.14794): with x = q / d^(1/4), phi(x) = exp(w_i . x - |x|^2 / 2) / sqrt(m), the
w_i orthogonal in blocks with the lengths of Gaussian vectors, estimates exp(q . k / sqrt(d)) without bias; favor_hyp
takes w and -w. Its variance grows with e^(|q + k|^2): a trained model's queries may be out of its reach. relu, elu
(+ 1) and learned (Hedgehog, Zhang et al., arXiv 2402.04347: a softmax over [W x, -W x]) do not estimate softmax but are
trained to stand for it. All features are held as logarithms with a running maximum for each, so that none overflows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .block_attention import Far, State

MAPS = ("favor+", "favor_hyp", "relu", "elu", "learned")
ESTIMATES = ("favor+", "favor_hyp")  # of softmax's own numbers
PAIRED = ("favor_hyp", "learned")  # each direction is used with both signs
_LEAST = 1e-6  # of a relu feature: its logarithm is finite


class PerformerFar(Far):
    """features: of each head. local: whether a query's own block is exact softmax, or features too."""

    def __init__(self, heads: int, head_dim: int, features: int, feature_map: str, seed: int, local: bool):
        super().__init__()
        if feature_map not in MAPS:
            raise ValueError(f"feature_map is {feature_map!r}; allowed: {', '.join(MAPS)}")
        if feature_map in PAIRED and features % 2:
            raise ValueError(f"{feature_map} takes features in pairs; features is {features}")
        self.feature_map, self.seed, self.features, self.local = feature_map, seed, features, local
        rows = features // 2 if feature_map in PAIRED else features
        weight = torch.empty(heads, rows, head_dim)
        if feature_map == "learned":
            self.weight = nn.Parameter(weight)
        elif feature_map != "elu":
            self.register_buffer("weight", weight)  # drawn once, saved with the model, never trained
        else:
            self.register_buffer("weight", None)
        self.gain = nn.Parameter(torch.empty(heads)) if not self.estimates else None  # logarithm of the far part's
        self.reset_parameters()

    @property
    def estimates(self) -> bool:
        """Whether the features' products estimate the softmax's own numbers."""
        return self.feature_map in ESTIMATES

    def reset_parameters(self) -> None:
        if self.gain is not None:
            init.zeros_(self.gain)
        if self.feature_map == "learned":
            eye = torch.eye(*self.weight.shape[1:])
            init.copy_(self.weight, eye.expand_as(self.weight))
        elif self.weight is not None:
            init.copy_(self.weight, orthogonal_features(self.weight.shape, self.seed))

    def logarithms(self, x: Tensor, scaling: float) -> Tensor:
        """log phi(x), float32[batch, heads, ..., features], of float[batch, heads, ..., head_dim]."""
        x = x.float() * math.sqrt(scaling)
        if self.feature_map == "elu":
            return (nn.functional.elu(x) + 1).log()
        assert self.weight is not None
        shape = (1, len(self.weight), *([1] * (x.ndim - 4)), *self.weight.shape[1:])
        projected = x @ self.weight.float().view(shape).transpose(-1, -2)
        if self.feature_map == "relu":
            return (projected.relu() + _LEAST).log()
        if self.feature_map == "learned":
            return torch.cat([projected, -projected], -1).log_softmax(-1)
        if self.feature_map == "favor_hyp":
            projected = torch.cat([projected, -projected], -1)
        return projected - x.square().sum(-1, keepdim=True) / 2 - math.log(self.features) / 2

    def bounds(self) -> Tensor | float:
        """What no logarithm of a key's feature is above: [heads, 1, features], or a number."""
        if not self.estimates:
            return 0.0
        assert self.weight is not None
        half = self.weight.float().square().sum(-1)[:, None] / 2
        return torch.cat([half, half], -1) if self.feature_map == "favor_hyp" else half

    def near(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Output and log-mass of features over the keys `seen`, where the own block is not exact."""
        if self.local:
            return super().near(query, key, value, scaling, seen)
        bounds = self.bounds()
        if isinstance(bounds, Tensor) and query.ndim == 5:
            bounds = bounds[:, None]
        keys = (self.logarithms(key, scaling) - bounds).exp()
        queries = self.logarithms(query, scaling) + bounds
        top = queries.detach().amax(-1, keepdim=True)
        weights = ((queries - top).exp() @ keys.transpose(-1, -2)).masked_fill(~seen, 0)
        mass = weights.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        return (weights / mass) @ value.float(), (mass.log() + top).squeeze(-1)

    def over_blocks(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float, state: State
    ) -> tuple[Tensor, Tensor]:
        queries, keys = self.logarithms(query, scaling), self.logarithms(key, scaling)
        outs, masses = [], []
        for block in range(query.shape[2]):
            out, mass = self._read(queries[:, :, block], state, value.shape[-1])
            outs.append(out)
            masses.append(mass)
            state = _summed(state, keys[:, :, block], value[:, :, block].float(), None)
        return torch.stack(outs, 2), torch.stack(masses, 2)

    def over_state(self, query: Tensor, scaling: float, state: State) -> tuple[Tensor, Tensor]:
        return self._read(self.logarithms(query, scaling), state, query.shape[-1])

    def _read(self, queries: Tensor, state: State, width: int) -> tuple[Tensor, Tensor]:
        if "sum" not in state:
            return queries.new_zeros(*queries.shape[:3], width), queries.new_full(queries.shape[:3], -math.inf)
        logits = queries + state["top"][:, :, None]
        top = logits.detach().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
        weights = (logits - top).exp()
        mass = weights @ state["mass"][..., None]
        out = (weights @ state["sum"]) / mass.clamp_min(torch.finfo(torch.float32).tiny)
        log_mass = (mass.log() + top).squeeze(-1)
        return out, log_mass if self.gain is None else log_mass + self.gain.float()[:, None]

    def grown(self, state: State, query: Tensor, key: Tensor, value: Tensor, complete: Tensor, scaling: float) -> State:
        for block in range(key.shape[2]):
            keys = self.logarithms(key[:, :, block], scaling)
            state = _summed(state, keys, value[:, :, block].float(), complete > block)
        return state


def _summed(state: State, keys: Tensor, value: Tensor, rows: Tensor | None) -> State:
    """State with a block's keys, as logarithms float32[batch, heads, block, features], and values added; of the rows
    bool[batch] only, None = all."""
    if rows is not None:
        keys = keys.masked_fill(~rows[:, None, None, None], -math.inf)
    top = keys.detach().amax(2)
    if "top" in state:
        top = torch.maximum(top, state["top"])
    base = top.clamp_min(torch.finfo(torch.float32).min)  # -inf where a row has nothing yet
    weights = (keys - base[:, :, None]).exp()
    mass, total = weights.sum(2), weights.transpose(-1, -2) @ value
    if "top" in state:
        old = (state["top"] - base).exp()
        mass, total = mass + state["mass"] * old, total + state["sum"] * old[..., None]
    return {"top": top, "mass": mass, "sum": total}


def orthogonal_features(shape: torch.Size, seed: int) -> Tensor:
    """float32[heads, features, head_dim]: within each run of head_dim rows orthogonal directions, with the lengths of
    Gaussian vectors of that many entries."""
    heads, rows, width = shape
    generator = torch.Generator("cpu").manual_seed(seed)
    squares = torch.randn(
        heads, -(-rows // width), width, width, generator=generator, dtype=torch.float64, device="cpu"
    )
    directions, triangle = torch.linalg.qr(squares)
    directions = directions * triangle.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]
    lengths = torch.randn(heads, rows, width, generator=generator, dtype=torch.float64, device="cpu")
    lengths = lengths.norm(dim=-1, keepdim=True)
    return (directions.transpose(-1, -2).flatten(1, 2)[:, :rows] * lengths).float()
