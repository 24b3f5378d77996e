"""How like exact causal attention another one is: by the matrices that they stand for, and by their outputs.

The matrix of an attention that never makes one: `modeling.block_attention.implied_weights`. (The cosine of layer
outputs alone, as klaipher/GPTAttentionsComparison has it, says little: outputs are means of many values, and alike even
where the weights are not.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .kinds import causal_weights


@dataclass(frozen=True)
class Likeness:
    """Means over heads. frobenius: |A - P| / |P| of matrices A and the exact P. variation: half the sum of |A - P| of a
    row, mean over rows: the share of its attention that is elsewhere. cosine: of the matrices as vectors. row_sum: mean
    |sum of a row of A - 1|. output_error, output_cosine: as frobenius and cosine, of outputs."""

    frobenius: float
    variation: float
    cosine: float
    row_sum: float
    output_error: float
    output_cosine: float


def exact_matrix(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Of softmax: float32[batch, heads, tokens, tokens]; query, key float[batch, heads, tokens, head_dim]."""
    return causal_weights(query.float(), key.float(), scaling)


def uniform_matrix(like: Tensor) -> Tensor:
    """Of attention that looks at neither queries nor keys: every token seen counts the same."""
    lower = torch.ones_like(like).tril()
    return lower / lower.sum(-1, keepdim=True)


def likeness(matrix: Tensor, exact: Tensor, value: Tensor, output: Tensor | None = None) -> Likeness:
    """matrix, exact float32[batch, heads, tokens, tokens]; value float[batch, heads, tokens, head_dim]; output: of the
    attention itself for these values (None: matrix times values)."""
    matrix, exact = matrix.double(), exact.double()
    wanted = exact @ value.double()
    found = matrix @ value.double() if output is None else output.double()
    error, cosine = _apart(matrix, exact)
    output_error, output_cosine = _apart(found, wanted)
    return Likeness(
        frobenius=error,
        variation=((matrix - exact).abs().sum(-1) / 2).mean().item(),
        cosine=cosine,
        row_sum=(matrix.sum(-1) - 1).abs().mean().item(),
        output_error=output_error,
        output_cosine=output_cosine,
    )


def _apart(found: Tensor, wanted: Tensor) -> tuple[float, float]:
    """Relative error and cosine of float[batch, heads, ., .], each head as one vector; means over heads."""
    found, wanted = found.flatten(2), wanted.flatten(2)
    error = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    return error.mean().item(), torch.cosine_similarity(found, wanted, dim=-1).mean().item()
