"""How Tversky projections are filled from the linears that they replace: features, prototypes, scalars; and back.

For a linear y = x W + b with inputs of mean mu and covariance S, features F [K, in] with orthonormal rows and prototype
features G [out, K] give y = x F^T G^T + b'. The best G is W^T S F^T (F S F^T)^-1, and b' = b + mu (W - F^T G^T).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from .. import gpt2
from ..capture import capture
from ..correlation import SecondMoments
from ..errors import UserError
from ..modeling.tversky import SCALARS, FeatureBank, Scalars, TverskyProjection
from ..modeling.tversky_layers import TverskyPlace, projection_at
from .base import FitContext
from .tversky_block import fill_block, neuron_directions
from .tversky_distill import distill
from .tversky_scalars import fit_scalars

if TYPE_CHECKING:
    from .tversky import Tversky

LEAVES = {
    "q": "attn.q",
    "k": "attn.k",
    "v": "attn.v",
    "attn_out": "attn.o",
    "c_fc": "mlp.c_fc",
    "mlp_out": "mlp.c_proj",
}
SITES = {
    **dict.fromkeys("qkv", "attention_input"),
    **{"attn_out": "attention_mixed", "c_fc": "input", "mlp_out": "post", "mlp_block": "input"},
}
_UNSEEN = 1e-4  # of the mean variance: what a direction that the text never showed counts

Where = tuple[int | None, str]  # layer, target; the head's layer is None
Places = Mapping[Where, TverskyPlace]


def projections(model: GPT2LMHeadModel, places: Places) -> dict[Where, TverskyProjection]:
    """The projection at each place."""
    return {where: projection_at(model, *where) for where in places}


class Fit:
    """The fit of one rewrite."""

    def __init__(self, rewrite: Tversky, model: GPT2LMHeadModel, context: FitContext):
        self.rewrite, self.model, self.context = rewrite, model, context
        self.places = rewrite.places(model)
        self.projections = projections(model, self.places)
        self.original_layer = {new: old for old, new in context.layers.items()}
        self.rest()

    def run(self) -> None:
        for key in dict.fromkeys(place.key for place in self.places.values()):
            self._bank(key, [where for where, place in self.places.items() if place.key == key])
        if self.rewrite.init == "lsq":
            fit_scalars(self)
        if self.rewrite.distill_steps:
            distill(self)

    # ------------------------------------------------------------ the original

    def linear(self, where: Where) -> tuple[Tensor, Tensor | None]:
        """Weight [in, out] and bias [out] of what stood there, float64."""
        layer, target = where
        if layer is None:
            return gpt2.head(self.context.original).weight.detach().double().T, None
        return self._leaf(layer, LEAVES[target])

    def _leaf(self, layer: int, leaf: str) -> tuple[Tensor, Tensor]:
        found = gpt2.linear(self.context.original, self.original_layer[layer], leaf)
        weight, bias = (tensor.double() for tensor in found)
        scale = self._rescaled((layer, "q")) if leaf == "attn.q" else 1.0
        return weight * scale, bias * scale

    def rest(self) -> None:
        """Of queries, keys and values that stand beside projections: linears as they were."""
        for layer in {layer for layer, target in self.places if target in ("q", "k", "v") and layer is not None}:
            for name in "qkv":
                part = getattr(gpt2.attention(self.model, layer).c_attn, name)
                if not isinstance(part, TverskyProjection):
                    weight, bias = self._leaf(layer, f"attn.{name}")
                    gpt2.put(part, "weight", weight)
                    gpt2.put(part, "bias", bias)

    def stream(
        self,
        batch: tuple[Tensor, Tensor],
        take: Callable[[Where, Tensor, Tensor], None],
        only: Collection[Where] | None = None,
    ) -> None:
        """Call take(place, x float[tokens, in], y float[tokens, out]) for what one batch of text brings to each place
        in the original, and what comes out of the linear or FFN there."""
        original, kept = self.context.original, dict[int, Tensor]()
        wheres = [where for where in self.places if only is None or where in only]
        layers = sorted({self.original_layer[layer] for layer, _ in wheres if layer is not None})
        sites = {SITES[target] for layer, target in wheres if layer is not None}
        blocks = {
            self.original_layer[layer]: (layer, target)
            for layer, target in wheres
            if target == "mlp_block" and layer is not None
        }
        here: dict[tuple[int, str], list[Where]] = {}
        for layer, target in wheres:
            if layer is not None and target != "mlp_block":
                here.setdefault((self.original_layer[layer], SITES[target]), []).append((layer, target))

        def consume(layer: int, site: str, x: Tensor) -> None:
            if site == "output":
                if layer in blocks:
                    take(blocks[layer], kept.pop(layer), x)
                return
            if site == "input" and layer in blocks:
                kept[layer] = x
            for where in here.get((layer, site), []):
                weight, bias = gpt2.linear(original, layer, LEAVES[where[1]])
                y = torch.addmm(bias, x, weight)
                take(where, x, y * self._rescaled(where) if where[1] == "q" else y)

        if layers:
            wanted = (*sites, "output") if blocks else tuple(sites)
            capture(original, [batch], consume, sites=wanted, layers=layers)
        if (None, "lm_head") in wheres:
            with torch.no_grad():
                hidden = gpt2.embed(original, batch[0])
                hidden = gpt2.run_blocks(original, hidden, 0, original.config.n_layer)
                x = gpt2.final_norm(original, hidden)[batch[1]]
                take((None, "lm_head"), x, gpt2.logits(original, x))

    def bank(self, where: Where) -> FeatureBank:
        """The bank of a place."""
        return gpt2.feature_bank(self.model)[self.places[where].key]

    def given(self, where: Where) -> Tensor | None:
        """Prototypes that are not the projection's own: the head's."""
        return gpt2.head(self.model).weight if where[0] is None else None

    def _rescaled(self, where: Where) -> float:
        """What queries are multiplied by, for a layer that counts otherwise than in the original."""
        layer = where[0]
        if layer is None or not self.context.original.config.scale_attn_by_inverse_layer_idx:
            return 1.0
        return (layer + 1) / (self.original_layer[layer] + 1)

    def _moments(self, where: Where) -> SecondMoments:
        layer, target = where
        if layer is None:
            return self._head_moments()
        source, site = self.original_layer[layer], SITES[target]
        sources = sorted(
            {self.original_layer[own] for own, name in self.places if own is not None and SITES[name] == site}
        )
        return self.context.moments(sources, site)[source]

    def _head_moments(self) -> SecondMoments:
        original = self.context.original
        found = SecondMoments(original.config.n_embd, device=gpt2.device(original))
        for hidden, mask in self.context.entering(original.config.n_layer):
            found.update(gpt2.final_norm(original, hidden)[mask])
        return found

    # ------------------------------------------------------------ a bank and its projections

    def _bank(self, key: str, wheres: Sequence[Where]) -> None:
        rewrite, bank = self.rewrite, gpt2.feature_bank(self.model)[key]
        blocks = [where for where in wheres if where[1] == "mlp_block"]
        device, count = gpt2.device(self.context.original), len(bank.weight)
        self.context.progress(f"features of {key}")
        if rewrite.init == "random":
            features = self._random(bank.weight.shape, bank.weight.shape[1] ** -0.5, device)
        elif blocks:
            features = neuron_directions(self.context, [self.original_layer[layer] for layer, _ in blocks], count)  # type: ignore[index]
        else:
            features = self._directions(wheres, count)
        gpt2.put(bank, "weight", features)
        if bank.scalars is not None:
            self.put_scalars(bank.scalars, rewrite.strengths)
        for where in wheres:
            projection = self.projections[where]
            if projection.scalars is not None:
                self.put_scalars(projection.scalars, rewrite.strengths)
            if projection.scale is not None:
                gpt2.put(projection, "scale", torch.ones(projection.width_out, device=device))
            if rewrite.init == "random":
                self._fill_at_random(projection, device)
            elif where[1] == "mlp_block":
                fill_block(self, where, features)
            else:
                self._fill(where, projection, features)

    def put_scalars(self, scalars: Scalars, values: Sequence[float]) -> None:
        """Give theta, alpha, beta these values, where they are learnable."""
        if scalars.learnable:
            device = gpt2.device(self.context.original)
            for name, value in zip(SCALARS, values, strict=True):
                gpt2.put(scalars, name, torch.tensor([scalars.raw(float(value))], dtype=torch.float64, device=device))

    def _random(self, shape: torch.Size, std: float, device: torch.device) -> Tensor:
        return torch.randn(shape, generator=self.context.generator, dtype=torch.float64).to(device) * std

    def _fill_at_random(self, projection: TverskyProjection, device: torch.device) -> None:
        if projection.prototypes is not None:
            std = 1.0 if self.rewrite.form == "ratio" else projection.initializer_range
            gpt2.put(projection, "prototypes", self._random(projection.prototypes.shape, std, device))
        if projection.bias is not None:
            gpt2.put(projection, "bias", torch.zeros(projection.width_out, device=device))

    def _fill(self, where: Where, projection: TverskyProjection, features: Tensor) -> None:
        """Prototypes and bias of one projection, for a similarity that is theta x F^T G^T."""
        weight, bias = self.linear(where)
        seen = features @ weight  # [K, out], of orthonormal features
        mean = None
        everything = len(features) == len(weight) and projection.bias is not None  # nothing is left to be made up for
        if self.rewrite.refit and where[0] is not None and not everything:
            moments = self._moments(where)
            covariance, mean = moments.covariance(), moments.mean
            pull = covariance @ weight
            if projection.bias is None:  # its work is left to the features
                covariance, pull = moments.second_moment(), moments.second_moment() @ weight
                pull = pull if bias is None else pull.addr(mean, bias)
            ridge = _UNSEEN * covariance.diagonal().mean()
            gram = features @ covariance @ features.T
            gram.diagonal().add_(ridge)
            seen = torch.linalg.solve(gram, features @ pull + ridge * seen)
        theta = self.rewrite.strengths[0] if self.rewrite.exact else 1.0
        if self.rewrite.prototypes == "explicit" or projection.prototypes is None:
            explicit = weight.T if mean is None else seen.T @ features
            if len(features) == len(weight):
                explicit = weight.T
            if projection.prototypes is not None:
                gpt2.put(projection, "prototypes", explicit / theta)
        else:
            gpt2.put(projection, "prototypes", seen.T / theta)
        if projection.bias is not None:
            own = bias if bias is not None else seen.new_zeros(projection.width_out)
            if mean is not None:
                own = own + mean @ weight - (features @ mean) @ seen
            gpt2.put(projection, "bias", own)

    # ------------------------------------------------------------ which directions

    def _directions(self, wheres: Sequence[Where], count: int) -> Tensor:
        """Orthonormal features [count, in] for the inputs of some places."""
        basis, width = self.rewrite.basis, self.places[wheres[0]].widths[0]
        moment = torch.zeros(width, width, dtype=torch.float64, device=gpt2.device(self.context.original))
        gram = torch.zeros_like(moment)
        if basis == "svd" or (count == width and self.context.calibration is None):
            for where in wheres:
                weight, _ = self.linear(where)
                gram += weight @ weight.T / weight.square().sum()
            return _leading(gram, count)
        known: tuple[int | None, str | None] | None = None
        for where in wheres:  # one after the other: all of them would be as large as the model
            layer, site = where[0], SITES.get(where[1])
            if (layer, site) != known:
                moments, known = self._moments(where), (layer, site)
                seen = moments.second_moment() if layer is None else moments.covariance()
                seen /= seen.diagonal().sum().clamp_min(1e-300)  # no loud layer owns the bank
                moment += seen
            if basis == "asvd":
                weight, _ = self.linear(where)
                out = (weight * (seen @ weight)).sum()  # the variance of what comes out
                gram += weight @ weight.T / out.clamp_min(1e-300)
        if basis == "pca":
            return _leading(moment, count)
        moment.diagonal().add_(_UNSEEN * moment.diagonal().mean())
        values, vectors = torch.linalg.eigh(moment)
        root = (vectors * values.sqrt()) @ vectors.T
        best = (vectors * values.rsqrt()) @ vectors.T @ _leading(root @ gram @ root, count).T
        return torch.linalg.qr(best).Q.T


def _leading(symmetric: Tensor, count: int) -> Tensor:
    """The eigenvectors of the largest eigenvalues, as rows [count, width]."""
    return torch.linalg.eigh(symmetric).eigenvectors[:, -count:].flip(1).T


# ---------------------------------------------------------------- back to linears


@torch.no_grad()
def dense_tensors(model: GPT2LMHeadModel, places: Places) -> dict[str, Tensor]:
    """State-dict key -> tensor of the linears that stand for projections. Raises UserError where one is not linear."""
    tensors = {}
    for (layer, target), place in places.items():
        projection, bank = projection_at(model, layer, target), gpt2.feature_bank(model)[place.key]
        slope = linear_strength(projection, bank)
        if target == "mlp_block":
            raise UserError(
                f"the tversky mlp_block of layer {layer} is not linear: it stands for a whole FFN, and plain GPT-2 "
                "cannot express it"
            )
        if slope is None:
            theta, alpha, beta = _strengths(projection, bank)
            place_of = target if layer is None else f"{target} of layer {layer}"
            raise UserError(
                f"the tversky {place_of} is not linear, so plain GPT-2 cannot express it (form {projection.form}, "
                f"intersection {projection.intersection}, difference {projection.difference}, theta {theta:.4g}, "
                f"alpha + beta {alpha + beta:.4g}); an antipodal bank of products with theta = alpha + beta is, and "
                "learn_scalars=false keeps it so through recovery"
            )
        features = bank.weight.double()
        given: Any = gpt2.head(model).weight if layer is None else projection.prototypes
        u = given.double() if projection.kind == "features" else given.double() @ features.T
        weight = (features.T @ u.T) * slope  # [in, out]
        bias = None if projection.bias is None else projection.bias.double()
        if projection.scale is not None:
            weight = weight * projection.scale.double()
        dtype = bank.weight.dtype
        if layer is None:
            tensors[gpt2.HEAD_KEY] = weight.T.to(dtype).contiguous()
            continue
        bias = weight.new_zeros(projection.width_out) if bias is None else bias
        tensors[gpt2.linear_key(layer, LEAVES[target], "weight")] = weight.to(dtype).contiguous()
        tensors[gpt2.linear_key(layer, LEAVES[target], "bias")] = bias.to(dtype)
    return tensors


def linear_strength(projection: TverskyProjection, bank: FeatureBank) -> float | None:
    """What a projection's dot products over features are multiplied by, None where it is no dot product."""
    theta, alpha, beta = _strengths(projection, bank)
    linear = (
        (projection.form, projection.intersection, projection.difference) == ("contrast", "product", "product")
        and projection.antipodal
        and not projection.normalize
    )
    return theta if linear and abs(theta - alpha - beta) <= 1e-6 * max(1.0, abs(theta)) else None


def _strengths(projection: TverskyProjection, bank: FeatureBank) -> list[float]:
    """theta, alpha, beta as numbers."""
    return [float(torch.as_tensor(value).detach()) for value in projection.strengths(bank)]
