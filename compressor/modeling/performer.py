"""performer: completed blocks are summed up in features, q . k ~ phi(q) . phi(k): a state of fixed size.

FAVOR+ (Choromanski et al., arXiv 2009.14794): with x = q / d^(1/4), phi(x) = exp(w_i . x - |x|^2 / 2) / sqrt(m), the
w_i orthogonal in blocks with the lengths of Gaussian vectors, estimates exp(q . k / sqrt(d)) without bias; favor_hyp
takes w and -w. Its variance grows with e^(|q + k|^2): a trained model's queries may be out of its reach. learned begins
as favor_hyp and trains its directions (as Hedgehog, Zhang et al., arXiv 2402.04347, does those of exp(W x), exp(-W x)).
relu and elu (+ 1) estimate nothing: they weigh beside the exact block what a gain says. All features are held as
logarithms with a running maximum for each, so that none overflows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .block_attention import Far, State, merged

MAPS = ("favor+", "favor_hyp", "relu", "elu", "learned")
ESTIMATES = ("favor+", "favor_hyp", "learned")  # of softmax's own numbers, learned ones at their start
PAIRED = ("favor_hyp", "learned")  # each direction is used with both signs
_LEAST = 1e-6  # of a relu feature: its logarithm is finite
_AT_ONCE = 512  # queries and keys whose features are held at a time
_NEGLIGIBLE = 1e-30  # a mass whose inverse, in gradients, stays far from overflow
_FINITE = torch.finfo(torch.float32).min  # stands for the logarithm of 0: differences of it are no nan


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
        trained = feature_map not in ("favor+", "favor_hyp")
        self.gain = nn.Parameter(torch.empty(heads)) if trained else None  # logarithm of what the far part weighs
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.gain is not None:
            init.zeros_(self.gain)
        if self.weight is not None:
            init.copy_(self.weight, orthogonal_features(self.weight.shape, self.seed))

    def logarithms(self, x: Tensor, scaling: float) -> Tensor:
        """log phi(x), float32[batch, heads, ..., features], of float[batch, heads, ..., head_dim]."""
        x = x.float() * math.sqrt(scaling)
        if self.feature_map == "elu":
            return torch.where(x > 0, x.relu().log1p(), x)
        assert self.weight is not None
        shape = (1, len(self.weight), *([1] * (x.ndim - 4)), *self.weight.shape[1:])
        projected = x @ self.weight.float().view(shape).transpose(-1, -2)
        if self.feature_map == "relu":
            return (projected.relu() + _LEAST).log()
        if self.feature_map in PAIRED:
            projected = torch.cat([projected, -projected], -1)
        return projected - x.square().sum(-1, keepdim=True) / 2 - math.log(self.features) / 2

    def near(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float, seen: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Output and log-mass of features over the own block, where that is not exact."""
        if self.local:
            return super().near(query, key, value, scaling, seen)
        queries, keys, value = self.logarithms(query, scaling), self.logarithms(key, scaling), value.float()
        if query.ndim == 5:  # whole blocks
            return _up_to_own(queries, keys, value)
        if seen is None:
            return _over_all(queries, keys, value)
        each = zip(queries.split(1, 2), (~seen).unbind(2), strict=True)
        found = [_over_all(one, keys.masked_fill(hidden[..., None], -math.inf), value) for one, hidden in each]
        out, mass = (torch.cat(parts, 2) for parts in zip(*found, strict=True))
        return out, mass

    def over_blocks(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float, state: State
    ) -> tuple[Tensor, Tensor]:
        found, step = [], max(1, _AT_ONCE // query.shape[3])
        for queries, keys, values in zip(*(tensor.split(step, 2) for tensor in (query, key, value)), strict=True):
            part, state = self._along(queries, keys, values, scaling, state)
            found.append(part)
        out, mass = (torch.cat(parts, 2) for parts in zip(*found, strict=True))
        return out, mass

    def _along(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float, state: State
    ) -> tuple[tuple[Tensor, Tensor], State]:
        """`over_blocks` of a few blocks, and the state after them."""
        keys, values = self.logarithms(key, scaling), _with_ones(value)
        state = state if "sum" in state else _nothing(keys[:, :, 0], values.shape[-1])
        tops = torch.cat([state["top"][:, :, None], keys.detach().amax(3)], 2).cummax(2).values
        sums = (keys - tops[:, :, 1:, None]).exp().transpose(-1, -2) @ values
        fading = (tops[:, :, :-1] - tops[:, :, 1:]).exp()[..., None]
        before = [state["sum"]]  # what each block sees: the one thing that is made block after block
        for new, old in zip(sums.unbind(2), fading.unbind(2), strict=True):
            before.append(torch.addcmul(new, before[-1], old))
        found = self._read(self.logarithms(query, scaling), tops[:, :, :-1], torch.stack(before[:-1], 2))
        return found, {"top": tops[:, :, -1], "sum": before[-1]}

    def over_state(self, query: Tensor, scaling: float, state: State) -> tuple[Tensor, Tensor]:
        if "sum" not in state:
            return torch.zeros_like(query, dtype=torch.float32), query.new_full(query.shape[:3], -math.inf).float()
        return self._read(self.logarithms(query, scaling), state["top"], state["sum"])

    def _read(self, queries: Tensor, tops: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        """queries: logarithms [..., tokens, features], of sums [..., features, head_dim + 1] over e^tops."""
        logits = queries + tops[..., None, :]
        top = logits.detach().amax(-1, keepdim=True).clamp_min(_FINITE)
        read = (logits - top).exp() @ sums
        mass = read[..., -1:].clamp_min(_NEGLIGIBLE)
        log_mass = (mass.log() + top).squeeze(-1)
        if self.gain is not None:
            log_mass = log_mass + self.gain.float().view(-1, *([1] * (log_mass.ndim - 2)))
        return read[..., :-1] / mass, log_mass

    def grown(
        self, state: State, query: Tensor | None, key: Tensor, value: Tensor, complete: Tensor, scaling: float
    ) -> State:
        keys = self.logarithms(key, scaling)
        if bool((complete < key.shape[2]).any()):
            beyond = torch.arange(key.shape[2], device=key.device) >= complete[:, None]
            keys = keys.masked_fill(beyond[:, None, :, None, None], -math.inf)
        keys, sums = keys.flatten(2, 3), _with_ones(value).flatten(2, 3)
        state = state if "sum" in state else _nothing(keys, sums.shape[-1])
        top = torch.maximum(keys.detach().amax(2), state["top"])
        old = (state["top"] - top).exp()[..., None]
        return {
            "top": top,
            "sum": torch.addcmul((keys - top[:, :, None]).exp().transpose(-1, -2) @ sums, state["sum"], old),
        }


def _over_all(queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-mass of queries over all keys, both as logarithms of features [..., tokens, features]. What is
    taken off, the largest of each feature over these keys, leaves a mass of 1 or more: no query goes without."""
    tops = keys.detach().amax(-2, keepdim=True)
    logits = queries + tops
    top = logits.detach().amax(-1, keepdim=True)
    weights = (logits - top).exp() @ (keys - tops).exp().transpose(-1, -2)
    mass = weights.sum(-1, keepdim=True)
    return (weights / mass) @ values, (mass.log() + top).squeeze(-1)


def _up_to_own(queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """As `_over_all`, of keys up to each query's own: itself, then in ever longer runs all of the run before, so that
    no later key has a say in what is taken off."""
    tokens = queries.shape[-2]
    short = (1 << (tokens - 1).bit_length()) - tokens
    queries, keys, values = (nn.functional.pad(tensor, (0, 0, 0, short)) for tensor in (queries, keys, values))
    out, mass, run = values, (queries + keys).logsumexp(-1), 1
    while run < tokens:
        shape = (-1, 2, run)  # pairs of runs
        pairs = [tensor.unflatten(-2, shape) for tensor in (queries, keys, values, out)]
        (_, later), (before, _), (old, _), (first, second) = (tensor.unbind(-3) for tensor in pairs)
        own = mass.unflatten(-1, shape)
        more = _over_all(later, before, old)
        out = torch.stack([first, merged((second, own[..., 1, :]), more, out.dtype)], -3).flatten(-4, -2)
        mass = torch.stack([own[..., 0, :], torch.logaddexp(own[..., 1, :], more[1])], -2).flatten(-3, -1)
        run *= 2
    return out[..., :tokens, :], mass[..., :tokens]


def _with_ones(value: Tensor) -> Tensor:
    """float32[..., head_dim + 1]: what sums of it by weight end with is the weight."""
    return nn.functional.pad(value.float(), (0, 1), value=1.0)


def _nothing(keys: Tensor, width: int) -> State:
    """The state before any block, of keys float32[batch, heads, tokens, features]."""
    batch, heads, _, features = keys.shape
    return {
        "top": keys.new_full((batch, heads, features), _FINITE),
        "sum": keys.new_zeros(batch, heads, features, width),
    }


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
