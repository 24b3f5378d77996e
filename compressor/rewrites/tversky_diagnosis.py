"""What became of Tversky projections: features and prototypes that nothing uses, asymmetry, theta, alpha, beta.

A feature is dead where it is present in no token of the text; with an antipodal bank f and -f are two features. A
prototype is dead where it has no feature at all, for then products and matches give it no gradient either, or where
its similarity is the same for every token. Only counts and extremes are held.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from .. import gpt2
from ..capture import Batch
from ..modeling.tversky import SCALARS, FeatureBank, TverskyProjection
from ..modeling.tversky_layers import TverskyPlace, projection_at, receiver_at
from .tversky_fit import Where, linear_strength

_SAMPLE = 64  # prototypes that are compared with one another
_VARIES = 1e-6  # of its largest size: a similarity that moves by less is the same
_ELEMENTS = 1 << 22  # of similarities held at once


@torch.no_grad()
def diagnose(model: GPT2LMHeadModel, places: Mapping[Where, TverskyPlace], batches: Iterable[Batch]) -> dict[str, Any]:
    """The diagnosis of the projections at some places, on what some text brings to them; as it stands in report.json.

    tokens: of the text. banks: key, width, features (of an antipodal bank twice the rows), dead_features (in no input
    of any projection that uses the bank), projections (how many use it). projections: layer (null: the head), target,
    bank, features_per_token, dead_features (in none of its own inputs), prototypes, empty_prototypes,
    constant_prototypes, dead_prototypes (empty or constant), theta, alpha, beta, linear (whether its similarity is a
    dot product), asymmetry (mean |S(a, b) - S(b, a)| over mean |S(a, b)| for pairs of its prototypes; null where all
    are 0). Hooks and modes are as before when it ends.
    """
    tallies = {
        where: _Tally(projection_at(model, *where), gpt2.feature_bank(model)[place.key], _given(model, where))
        for where, place in places.items()
    }
    called: dict[Any, list[Where]] = {}
    for layer, target in places:
        if layer is not None:
            called.setdefault(receiver_at(model, layer, target), []).append((layer, target))
    mask: Tensor | None = None  # of the batch under way

    def take(wheres: list[Where], x: Tensor) -> None:
        assert mask is not None
        measured: dict[tuple[str, bool], Tensor] = {}
        for where in wheres:
            tally, key = tallies[where], (places[where].key, tallies[where].projection.normalize)
            if key not in measured:
                measured[key] = tally.projection.measure(x[mask], tally.bank)
            tally.update(measured[key])

    tokens, heads = 0, [where for where in places if where[0] is None]
    stop = model.config.n_layer if heads else 1 + max(layer for layer, _ in places if layer is not None)
    with gpt2.evaluating(model), ExitStack() as hooks:
        for module, wheres in called.items():
            hook = module.register_forward_pre_hook(lambda _, inputs, wheres=wheres: take(wheres, inputs[0]))
            hooks.callback(hook.remove)
        for ids, real in batches:
            mask, tokens = real.to(gpt2.device(model)), tokens + int(real.sum())
            hidden = gpt2.run_blocks(model, gpt2.embed(model, ids.to(mask.device)), 0, stop)
            if heads:
                take(heads, gpt2.final_norm(model, hidden))
    banks: dict[str, list[_Tally]] = {}
    for where, place in places.items():
        banks.setdefault(place.key, []).append(tallies[where])
    return {
        "tokens": tokens,
        "banks": [
            {
                "key": key,
                "width": users[0].bank.weight.shape[1],
                "features": users[0].present.numel(),
                "dead_features": int((torch.stack([user.present for user in users]).sum(0) == 0).sum()),
                "projections": len(users),
            }
            for key, users in banks.items()
        ],
        "projections": [
            {"layer": layer, "target": target, "bank": place.key, **tallies[layer, target].result(tokens)}
            for (layer, target), place in places.items()
        ],
    }


def _given(model: GPT2LMHeadModel, where: Where) -> Tensor | None:
    return gpt2.head(model).weight if where[0] is None else None


class _Tally:
    """What one projection has met."""

    def __init__(self, projection: TverskyProjection, bank: FeatureBank, given: Tensor | None):
        self.projection, self.bank, self.given = projection, bank, given
        features, device = len(bank.weight) * (2 if projection.antipodal else 1), bank.weight.device
        self.present = torch.zeros(features, dtype=torch.int64, device=device)  # tokens that have the feature
        self.least = torch.full((projection.width_out,), math.inf, device=device)
        self.most = -self.least

    def similarities(self, z: Tensor) -> Tensor:  # float[objects, stored features] -> float[objects, prototypes]
        return self.projection.similarities(z, self.bank, self.given)

    def update(self, z: Tensor) -> None:  # float[tokens, stored features]
        both = [z > 0, z < 0] if self.projection.antipodal else [z > 0]
        self.present += torch.cat([sign.sum(0) for sign in both])
        for part in z.split(max(1, _ELEMENTS // self.projection.width_out)):
            found = self.similarities(part).to(self.least.dtype)
            self.least = torch.minimum(self.least, found.amin(0))
            self.most = torch.maximum(self.most, found.amax(0))

    def result(self, tokens: int) -> dict[str, Any]:
        u = self.projection.prototype_features(self.bank, self.given)
        empty = (u == 0).all(1) if self.projection.antipodal else (u <= 0).all(1)
        constant = self.most - self.least <= _VARIES * torch.maximum(self.most.abs(), self.least.abs())
        strengths = self.projection.strengths(self.bank)
        return {
            "features_per_token": int(self.present.sum()) / tokens,
            "dead_features": int((self.present == 0).sum()),
            "prototypes": len(u),
            "empty_prototypes": int(empty.sum()),
            "constant_prototypes": int(constant.sum()),
            "dead_prototypes": int((empty | constant).sum()),
            **{name: float(value) for name, value in zip(SCALARS, strengths, strict=True)},
            "linear": linear_strength(self.projection, self.bank) is not None,
            "asymmetry": self._asymmetry(u),
        }

    def _asymmetry(self, u: Tensor) -> float | None:
        """Of prototypes spread evenly over all, as objects: their features are what x . f_k would be."""
        chosen = torch.linspace(0, len(u) - 1, min(_SAMPLE, len(u)), device=u.device).round().long()
        found = self.similarities(u[chosen])[:, chosen].double()
        found.fill_diagonal_(0)
        size = float(found.abs().mean())
        return float((found - found.T).abs().mean()) / size if 0 < size < math.inf else None
