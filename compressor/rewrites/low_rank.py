"""W_l = W_c + A_l B_l for several layers' linears at once: the best deltas for a base, the best base for the deltas.

All weights are [in, out] (y = x W) and the error of a layer is measured by the second moment M_l of its input:
tr((W_l - W_c - A_l B_l)^T M_l (W_l - W_c - A_l B_l)), the mean squared error of the linear's output; M_l = I gives the
Frobenius norm. Truncation under M_l is the whitened SVD of SVD-LLM (arXiv 2403.07378), here without forming an inverse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_ROUNDS = 12  # of the alternation; the error falls monotonically and has settled long before
_UNSEEN = 1e-4  # of the mean variance
_NOTHING = 1e-12  # a direction this much weaker than the strongest is rounding, not a delta


def low_rank(residual: Tensor, moment: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """The best A [in, rank], B [rank, out] for `residual` [in, out] under `moment` [in, in] (None: the identity).

    With V the leading right singular vectors of M^(1/2) R, the optimum is A B = R V V^T. Each column of A has the norm
    of its row of B. Directions beyond the residual's own rank are zero. float64.
    """
    if rank == 0:
        return residual.new_zeros(len(residual), 0), residual.new_zeros(0, residual.shape[1])
    if rank == min(residual.shape):
        moment = None  # nothing is cut off: exact whatever the data say
    return _truncate(residual, _Metric.of(moment, residual.shape).times(residual), rank)


@dataclass(frozen=True)
class _Metric:
    """What residuals R [in, out] are multiplied by before their singular vectors are sought.

    That is M itself where `out` is the smaller side (R^T M R is taken then), else a root S of it, S^T S = M.
    """

    matrix: Tensor | None  # [in, in]; None: the identity
    floor: Tensor | None = None  # of M's diagonal: directions the data never showed count a little, not nothing

    @classmethod
    def of(cls, moment: Tensor | None, shape: Sequence[int]) -> _Metric:
        if moment is None or not moment.any():
            return cls(None)
        floor = _UNSEEN * moment.diagonal().mean()
        if shape[1] <= shape[0]:
            return cls(moment, floor)
        whole = moment.clone()
        whole.diagonal().add_(floor)
        return cls(torch.linalg.cholesky(whole).T)

    def times(self, left: Tensor, right: Tensor | None = None) -> Tensor:
        """Of `left`, or of `left @ right`, in the cheaper order."""
        whole = left if right is None else left @ right
        if self.matrix is None:
            return whole
        product = self.matrix @ left if right is None else torch.linalg.multi_dot([self.matrix, left, right])
        return product if self.floor is None else product.add_(whole * self.floor)


def _truncate(residual: Tensor, weighed: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`low_rank` of a residual that its `_Metric` has been applied to."""
    if residual.shape[1] <= len(residual):
        values, vectors = torch.linalg.eigh(residual.T @ weighed)  # [out, out]
        right = vectors[:, -rank:]
        live = values[-rank:] > _NOTHING * values[-1].clamp_min(torch.finfo(values.dtype).tiny)
    else:
        values, vectors = torch.linalg.eigh(weighed @ weighed.T)  # [in, in]
        live = values[-rank:] > _NOTHING * values[-1].clamp_min(torch.finfo(values.dtype).tiny)
        right = torch.where(live, weighed.T @ vectors[:, -rank:] * values[-rank:].clamp_min(1e-300).rsqrt(), 0)
    left = torch.where(live, residual @ right, 0)
    scale = left.norm(dim=0).sqrt()
    scale = torch.where(scale > 0, scale, 1)
    return left / scale, torch.where(live, right * scale, 0).T


class _Base:
    """The base with the least summed error under some moments: (sum M_l)^-1 sum M_l X_l.

    Each M_l has a little added to its diagonal, so that the plain mean of the X_l stays where the data say nothing.
    """

    def __init__(self, moments: Sequence[Tensor]):
        self.moments = moments
        total = moments[0].clone()
        for moment in moments[1:]:
            total += moment
        floor = 1e-6 * total.diagonal().mean().clamp_min(1e-300)
        self.share = floor / len(moments)
        total.diagonal().add_(floor)
        self.factor = torch.linalg.cholesky(total)

    def of(self, weights: Sequence[Tensor]) -> Tensor:
        """For X_l = weights [in, out]; solved about their mean, which keeps the digits."""
        mean = sum(weights[1:], weights[0]) / len(weights)
        pull = torch.zeros_like(mean)
        for weight, moment in zip(weights, self.moments, strict=True):
            pull.addmm_(moment, weight - mean)
        return mean + torch.cholesky_solve(pull, self.factor)

    def of_deltas(self, deltas: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """For X_l = A_l B_l, as the two factors of the base: [in, layers * rank], [layers * rank, out]."""
        pulls = [moment @ a + self.share * a for (a, _), moment in zip(deltas, self.moments, strict=True)]
        return torch.cholesky_solve(torch.cat(pulls, 1), self.factor), torch.cat([b for _, b in deltas])


def weighted_mean(weights: Sequence[Tensor], moments: Sequence[Tensor]) -> Tensor:
    """The base [in, out] with the least summed error; the plain mean in directions [in] that no moment shows."""
    return _Base(moments).of(weights)


def share(
    weights: Sequence[Tensor], moments: Sequence[Tensor | None], rank: int, base: str, anchor: int, whiten: bool
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """One base [in, out] for several layers' aligned weights and each layer's delta (A [in, rank], B [rank, out]).

    base: "anchor" = weights[anchor]; "mean"; "lsq" = the alternation of base and deltas, which is the joint optimum's
    descent (needs all moments). whiten: truncate the residuals under their moments, else in the Frobenius norm.
    """
    metrics = list(moments) if whiten else [None] * len(weights)
    if base == "lsq":
        known = [moment for moment in moments if moment is not None]
        return _alternate(weights, known, metrics, rank)
    shared = weights[anchor] if base == "anchor" else sum(weights[1:], weights[0]) / len(weights)
    return shared, [low_rank(weight - shared, metric, rank) for weight, metric in zip(weights, metrics, strict=True)]


def _alternate(
    weights: Sequence[Tensor], moments: Sequence[Tensor], metrics: Sequence[Tensor | None], rank: int
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Best base for the deltas, best deltas for the base, in turn.

    The base is linear in what it is the base of, so a round moves it by D = (the base of the A_l B_l) of rank layers *
    rank only: the moments, d_ff x d_ff for c_proj, meet no dense matrix after the start.
    """
    best = _Base(moments)
    first = best.of(weights)
    residuals = [weight - first for weight in weights]
    if rank == 0 or rank == min(first.shape):  # no deltas, or deltas that leave no error
        return first, [low_rank(residual, None, rank) for residual in residuals]
    weighing = [_Metric.of(metric, first.shape) for metric in metrics]
    weighed = [metric.times(residual) for metric, residual in zip(weighing, residuals, strict=True)]
    deltas = [_truncate(*pair, rank) for pair in zip(residuals, weighed, strict=True)]
    for _ in range(_ROUNDS):
        left, right = best.of_deltas(deltas)
        moved = left @ right
        deltas = [
            _truncate(residual + moved, start + metric.times(left, right), rank)
            for residual, start, metric in zip(residuals, weighed, weighing, strict=True)
        ]
    return first - moved, deltas
