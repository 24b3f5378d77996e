"""W_l = W_c + A_l B_l for several layers' linears at once: the best deltas for a base, the best base for the deltas.

All weights are [in, out] (y = x W) and the error of a layer is measured by the second moment M_l of its input:
tr((W_l - W_c - A_l B_l)^T M_l (W_l - W_c - A_l B_l)), the mean squared error of the linear's output; M_l = I gives the
Frobenius norm. Truncation under M_l is the whitened SVD of SVD-LLM (arXiv 2403.07378), here without forming an inverse.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    width_in, width_out = residual.shape
    if rank == 0:
        return residual.new_zeros(width_in, 0), residual.new_zeros(0, width_out)
    if rank == min(width_in, width_out):
        moment = None  # nothing is cut off: exact whatever the data say
    if moment is not None:  # directions the data never showed count a little, not nothing
        moment = moment + _UNSEEN * moment.diagonal().mean() * torch.eye(width_in).to(moment)
    if width_out <= width_in:
        gram = residual.T @ (residual if moment is None else moment @ residual)  # [out, out]
        values, vectors = torch.linalg.eigh(gram)
        right = vectors[:, -rank:]
        live = values[-rank:] > _NOTHING * values[-1].clamp_min(torch.finfo(values.dtype).tiny)
    else:
        whitened = residual if moment is None else _square_root(moment) @ residual
        values, vectors = torch.linalg.eigh(whitened @ whitened.T)  # [in, in]
        live = values[-rank:] > _NOTHING * values[-1].clamp_min(torch.finfo(values.dtype).tiny)
        right = torch.where(live, whitened.T @ vectors[:, -rank:] * values[-rank:].clamp_min(1e-300).rsqrt(), 0)
    left = torch.where(live, residual @ right, 0)
    scale = left.norm(dim=0).sqrt()
    scale = torch.where(scale > 0, scale, 1)
    return left / scale, torch.where(live, right * scale, 0).T


def _square_root(moment: Tensor) -> Tensor:
    """S with S^T S = moment (positive semidefinite)."""
    values, vectors = torch.linalg.eigh(moment)
    return values.clamp_min(0).sqrt()[:, None] * vectors.T


def weighted_mean(weights: Sequence[Tensor], moments: Sequence[Tensor | None]) -> Tensor:
    """The base with the least summed error: (sum M_l)^-1 sum M_l W_l; the plain mean where there are no moments."""
    mean = torch.stack(list(weights)).mean(0)
    known = [moment for moment in moments if moment is not None]
    if len(known) < len(weights):
        return mean
    total = torch.stack(known).sum(0)
    # Solved about the plain mean: where the data say nothing (unseen directions), the plain mean stays.
    pull = torch.stack([moment @ (weight - mean) for weight, moment in zip(weights, known, strict=True)]).sum(0)
    floor = 1e-6 * total.diagonal().mean() * torch.eye(len(total), dtype=total.dtype, device=total.device)
    return mean + torch.linalg.solve(total + floor, pull)


def share(
    weights: Sequence[Tensor], moments: Sequence[Tensor | None], rank: int, base: str, anchor: int, whiten: bool
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """One base [in, out] for several layers' aligned weights and each layer's delta (A [in, rank], B [rank, out]).

    base: "anchor" = weights[anchor]; "mean"; "lsq" = the alternation of base and deltas, which is the joint optimum's
    descent. whiten: truncate the residuals under their moments, else in the Frobenius norm.
    """
    metrics = list(moments) if whiten else [None] * len(weights)
    if base == "lsq":
        shared = weighted_mean(weights, moments)
        deltas = [low_rank(weight - shared, metric, rank) for weight, metric in zip(weights, metrics, strict=True)]
        for _ in range(_ROUNDS if rank else 0):
            shared = weighted_mean([w - a @ b for w, (a, b) in zip(weights, deltas, strict=True)], moments)
            deltas = [low_rank(weight - shared, metric, rank) for weight, metric in zip(weights, metrics, strict=True)]
        return shared, deltas
    shared = weights[anchor] if base == "anchor" else torch.stack(list(weights)).mean(0)
    return shared, [low_rank(weight - shared, metric, rank) for weight, metric in zip(weights, metrics, strict=True)]
