"""How like exact causal attention another one is: by the matrices that they stand for, and by their outputs.

The matrix of an attention that never makes one is had by feeding it the identity as values: what comes out for a token
is its row. (The cosine of layer outputs alone, as klaipher/GPTAttentionsComparison has it, says little: outputs are
means of many values, and alike even where the weights are not.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .kinds import Attend, causal_weights


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


@torch.no_grad()
def implied_matrix(attend: Attend, query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """float32[batch, heads, tokens, tokens]: row i is what token i takes of every token's value.

    query, key float[batch, heads, tokens, head_dim]. The identity goes in by slices of head_dim columns, as a batch:
    attentions need not take values of another width than keys.
    """
    heads, tokens, width = query.shape[1:]
    slices = -(-tokens // width)
    eye = torch.zeros(tokens, slices * width, dtype=query.dtype, device=query.device)
    eye.fill_diagonal_(1)
    columns = eye.view(tokens, slices, width).transpose(0, 1)  # [slices, tokens, width]
    rows = []
    for one_query, one_key in zip(query, key, strict=True):
        out = attend(
            *(tensor.expand(slices, -1, -1, -1) for tensor in (one_query, one_key)),
            columns[:, None].expand(-1, heads, -1, -1),
            scaling=scaling,
        )
        rows.append(out.permute(1, 2, 0, 3).flatten(2)[..., :tokens].float())
    return torch.stack(rows)


def exact_matrix(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """The same of softmax, in float32."""
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
