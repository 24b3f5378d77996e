"""One Tversky projection in place of a whole FFN: features from the aligned neurons of all layers, prototypes by ridge.

Without an antipode, with products, theta = alpha and beta = 0 a similarity is theta relu(x F^T) u: linear in the
prototypes. So these are the ridge regression of the FFN's outputs on relu(x F^T) (prototype features) or on
relu(x F^T) F (explicit prototypes). Source of the idea, without a fit: Doumbouya, Jurafsky & Manning, arXiv 2506.11035.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import gpt2
from ..correlation import SecondMoments
from ..errors import UserError
from .base import FitContext

if TYPE_CHECKING:
    from .tversky_fit import Fit, Where

RIDGE = 1e-3  # of the mean variance of a regressor


def neuron_directions(context: FitContext, layers: Sequence[int], count: int) -> Tensor:
    """Features [count, d] from the c_fc directions of some layers: neurons that alignment matches over the layers of a
    run become one, by as long runs as leave `count` of them, and the most important stay. Importance is the product of
    the norms of a neuron's weights in and out, summed over the layers."""
    layers, width = sorted(layers), gpt2.d_ff(context.original.config)
    runs = math.ceil(count / width)
    if runs > len(layers):
        raise UserError(
            f"tversky: a bank of {count} features for {len(layers)} FFNs of {width} neurons; allowed: 1 to "
            f"{len(layers) * width}"
        )
    length = math.ceil(len(layers) / runs)
    while math.ceil(len(layers) / length) < runs:
        length -= 1
    directions, importance = [], []
    for first in range(0, len(layers), length):
        run, parts = layers[first : first + length], list[tuple[Tensor, Tensor]]()
        for layer in run:
            order = context.alignments.to_anchor(layer, run[0])
            fc, _, proj, _ = gpt2.ffn_weights(context.original, layer)
            own = fc.double().T[order.to(fc.device)]  # [d_ff, d]
            much = own.norm(dim=1) * proj.double()[order.to(fc.device)].norm(dim=1)
            parts.append((own * much[:, None], much))
        weight = torch.stack([much for _, much in parts]).sum(0)
        directions.append(torch.stack([own for own, _ in parts]).sum(0) / weight.clamp_min(1e-300)[:, None])
        importance.append(weight)
    best = torch.cat(importance).topk(count).indices.sort().values
    return torch.cat(directions)[best]


def fill_block(fit: Fit, where: Where, features: Tensor) -> None:
    """Prototypes and bias of the projection at a place, by ridge regression on calibration text."""
    projection, original = fit.projections[where], fit.context.original
    assert where[0] is not None and projection.prototypes is not None
    explicit = fit.rewrite.prototypes == "explicit"
    width = features.shape[1] if explicit else len(features)
    device = gpt2.device(original)
    own, cross = SecondMoments(width, device=device), SecondMoments(width, original.config.n_embd, device=device)
    bank = features.to(original.dtype)

    def take(_: Where, x: Tensor, y: Tensor) -> None:
        hidden = (x @ bank.T).relu()
        hidden = hidden @ bank if explicit else hidden
        own.update(hidden)
        cross.update(hidden, y)

    fit.context.progress(f"prototypes of layer {where[0]}")
    for batch in fit.context.batches():
        fit.stream(batch, take, only=[where])
    moment = own.covariance() if projection.bias is not None else own.second_moment()
    pull = cross.covariance() if projection.bias is not None else cross.second_moment()
    moment.diagonal().add_(RIDGE * moment.diagonal().mean().clamp_min(1e-300))
    weight = torch.linalg.solve(moment, pull)  # [width, d]
    theta = 1.0 if fit.rewrite.learn_scalars else fit.rewrite.strengths[0]
    gpt2.put(projection, "prototypes", weight.T / theta)
    if projection.bias is not None:
        gpt2.put(projection, "bias", cross.second_mean - own.mean @ weight)
