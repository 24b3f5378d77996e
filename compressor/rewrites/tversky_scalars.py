"""theta, alpha, beta, scales and biases of Tversky projections by least squares, for forms that are no dot product.

Over the calibration text a projection's output is to come near that of the linear it replaces: y_j ~ s_j S_j + b_j. For
a contrast theta, alpha, beta are shared by all outputs and enter linearly; a ratio keeps them. Only sums are held.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from .. import gpt2
from ..modeling.tversky import Scalars, TverskyProjection

if TYPE_CHECKING:
    from .tversky_fit import Fit, Where


_AT_ONCE = 1 << 22  # outputs: a head has tens of thousands for every token


class _Sums:
    """Means of some columns and of y per output, and sums of their products: float64[columns + 1, columns + 1, out]."""

    def __init__(self, columns: int, out: int, device: torch.device):
        self.count = 0
        self.first = torch.zeros(columns + 1, out, dtype=torch.float64, device=device)
        self.second = torch.zeros(columns + 1, columns + 1, out, dtype=torch.float64, device=device)

    def update(self, columns: tuple[Tensor, ...], y: Tensor) -> None:  # float[tokens, out] each
        values = torch.stack([*columns, y]).double()  # [columns + 1, tokens, out]
        self.count += values.shape[1]
        self.first += values.sum(1)
        for row, one in enumerate(values):
            self.second[row] += (one * values).sum(1)

    @property
    def means(self) -> Tensor:
        return self.first / self.count

    def products(self, centred: bool) -> Tensor:
        """Mean products [columns + 1, columns + 1, out], y last; about the means where a bias takes these up."""
        products = self.second / self.count
        return products - self.means[:, None] * self.means if centred else products


def fit_scalars(fit: Fit) -> None:
    """Fill the scalars, scales and biases of every projection of a rewrite whose prototypes and features are filled."""
    rewrite, device = fit.rewrite, gpt2.device(fit.context.original)
    free = rewrite.form == "contrast" and rewrite.learn_scalars
    sums = {
        where: _Sums(3 if free else 1, projection.width_out, device) for where, projection in fit.projections.items()
    }
    fit.context.progress("least squares of theta, alpha, beta" if free else "least squares of scales and biases")

    @torch.no_grad()
    def take(where: Where, x: Tensor, y: Tensor) -> None:
        projection, bank, given = fit.projections[where], fit.bank(where), fit.given(where)
        u, rows = projection.prototype_features(bank, given), max(1, _AT_ONCE // projection.width_out)
        for z, wanted in zip(projection.measure(x, bank).split(rows), y.split(rows), strict=True):
            columns = projection.terms(z, u) if free else (_bare(projection, projection.compare(z, bank, given)),)
            sums[where].update(columns, wanted)

    for batch in fit.context.batches():
        fit.stream(batch, take)
    strengths: dict[int, Tensor] = {}
    if free:
        strengths = _strengths(fit, sums)
    for where, projection in fit.projections.items():
        mix = strengths[id(_scalars(fit, where))] if free else torch.ones(1, dtype=torch.float64, device=device)
        _affine(projection, sums[where], mix)


def _strengths(fit: Fit, sums: dict[Where, _Sums]) -> dict[int, Tensor]:
    """theta, -alpha, -beta for every set of scalars, by its id: pooled over the projections that share it, each of
    them weighed by the variance of its linear's outputs."""
    found: dict[int, tuple[Scalars, Tensor]] = {}
    for where, own in sums.items():
        scalars, products = _scalars(fit, where), own.products(fit.projections[where].bias is not None)
        normal = products.sum(-1) / own.products(True)[-1, -1].sum().clamp_min(1e-300)
        before = found.get(id(scalars), (scalars, torch.zeros_like(normal)))[1]
        found[id(scalars)] = scalars, before + normal
    strengths = {}
    for key, (scalars, normal) in found.items():
        gram, pull = normal[:-1, :-1], normal[:-1, -1]
        if scalars.non_negative:
            signs = gram.new_tensor([1.0, -1.0, -1.0])
            values, vectors = torch.linalg.eigh(gram * signs[:, None] * signs)
            values = values.clamp_min(1e-12 * values.max())
            root = (vectors * values.sqrt()).T
            target = (vectors * values.rsqrt()).T @ (pull * signs)
            solution = torch.from_numpy(nnls(root.cpu().numpy(), np.asarray(target.cpu()))[0]).to(gram.device) * signs
        else:
            solution = torch.linalg.pinv(gram, hermitian=True, rtol=1e-9) @ pull
        fit.put_scalars(scalars, (solution * solution.new_tensor([1.0, -1.0, -1.0])).tolist())
        strengths[key] = solution
    return strengths


def _affine(projection: TverskyProjection, sums: _Sums, mix: Tensor) -> None:
    """Scale and bias per output for the similarity that a mixture of the columns is."""
    products, means = sums.products(projection.bias is not None), sums.means
    own, both = torch.einsum("i,j,ijo->o", mix, mix, products[:-1, :-1]), mix @ products[:-1, -1]
    scale = torch.ones_like(own)
    if projection.scale is not None:
        scale = torch.where(own > 1e-12 * products[-1, -1], both / own, 1.0)
        gpt2.put(projection, "scale", scale)
    if projection.bias is not None:
        gpt2.put(projection, "bias", means[-1] - scale * (mix @ means[:-1]))


def _bare(projection: TverskyProjection, y: Tensor) -> Tensor:
    """The similarities themselves of an output whose scale is 1."""
    return y if projection.bias is None else y - projection.bias


def _scalars(fit: Fit, where: Where) -> Scalars:
    own = fit.projections[where].scalars
    scalars = fit.bank(where).scalars if own is None else own
    assert scalars is not None
    return scalars
