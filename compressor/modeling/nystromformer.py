"""nystromformer: the completed blocks before a query's are seen through m landmarks, means of as even segments of them.

Nystroemformer (Xiong et al., arXiv 2102.03902): softmax(Q K~^T) Z softmax(Q~ K^T) V with Z ~ the pseudo-inverse of
softmax(Q~ K~^T), by Newton's iteration. For a decoder the landmarks are those of the completed prefix alone: one
approximation for each block, and nothing of it depends on what comes later. inverse="none" leaves Z and the right
factor out: the landmarks' own means of values, each weighing as much as the tokens that it stands for.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .block_attention import Far, State, appended, softmax_output

INVERSES = ("newton", "none")
_ITERATIONS = 6  # of the paper


class NystromFar(Far):
    """The state is all queries, keys and values of the completed blocks: this kind saves time, not memory."""

    def __init__(self, landmarks: int, inverse: str):
        super().__init__()
        if inverse not in INVERSES:
            raise ValueError(f"inverse is {inverse!r}; allowed: {', '.join(INVERSES)}")
        self.landmarks, self.inverse = landmarks, inverse

    def over_blocks(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float, state: State
    ) -> tuple[Tensor, Tensor]:
        blocks = query.shape[2]
        before = (
            state["blocks"] if "blocks" in state else torch.zeros(len(query), dtype=torch.int64, device=query.device)
        )
        every = self.grown(state, query, key, value, torch.full_like(before, blocks), scaling)
        outs, masses = [], []
        for block in range(blocks):  # a prefix of its own each
            seen = {**every, "blocks": before + block}
            out, mass = self.over_state(query[:, :, block], scaling, seen)
            outs.append(out)
            masses.append(mass)
        return torch.stack(outs, 2), torch.stack(masses, 2)

    def over_state(self, query: Tensor, scaling: float, state: State) -> tuple[Tensor, Tensor]:
        nothing = query.new_zeros(query.shape, dtype=torch.float32), query.new_full(query.shape[:3], -math.inf).float()
        if "blocks" not in state or not int(state["blocks"].max()):
            return nothing
        length = state["blocks"] * state["block"]  # [batch], tokens of the prefix
        width = int(length.max())
        keys, values, queries = (state[name][:, :, :width] for name in ("keys", "values", "queries"))
        member = self._segments(length, width)  # [batch, landmarks, width], rows sum to 1, or to 0 where there is none
        size = (member > 0).sum(-1)  # tokens of each landmark
        landmark_keys = (member[:, None] @ keys.float()).to(keys.dtype)
        scores = (query @ landmark_keys.transpose(-1, -2)).float() * scaling
        scores = scores.masked_fill((size == 0)[:, None, None], -math.inf)
        pooled, mass = softmax_output(scores + size.clamp_min(1).log()[:, None, None], member[:, None] @ values.float())
        if self.inverse == "none":
            return pooled, mass
        landmark_queries = (member[:, None] @ queries.float()).to(queries.dtype)
        beyond = torch.arange(width, device=length.device) >= length[:, None]
        right = (landmark_queries @ keys.transpose(-1, -2)).float() * scaling
        least = torch.finfo(torch.float32).min  # where a row has nothing at all its share of the output is 0
        right = right.masked_fill(beyond[:, None, None], least).softmax(-1) @ values.float()
        middle = (landmark_queries @ landmark_keys.transpose(-1, -2)).float() * scaling
        there = (size > 0)[:, None]
        middle = middle.masked_fill(~there[:, :, None], least).softmax(-1)
        middle = middle * there[..., None]
        left = scores.clamp_min(least).softmax(-1)
        return left @ (pseudo_inverse(middle) @ right), mass

    def _segments(self, length: Tensor, width: int) -> Tensor:
        """Means over as even segments of each prefix as can be: float32[batch, landmarks, width]."""
        count = length.clamp_max(self.landmarks)[:, None]  # no more landmarks than tokens
        places = torch.arange(width, device=length.device)[None]
        segment = (places * count).div(length[:, None].clamp_min(1), rounding_mode="floor")
        inside = places < length[:, None]
        member = nn.functional.one_hot(segment.clamp_max(self.landmarks - 1), self.landmarks) * inside[..., None]
        return (member / member.sum(1, keepdim=True).clamp_min(1)).transpose(1, 2).float()

    def grown(self, state: State, query: Tensor, key: Tensor, value: Tensor, complete: Tensor, scaling: float) -> State:
        new = {name: tensor.flatten(2, 3) for name, tensor in (("queries", query), ("keys", key), ("values", value))}
        block = torch.full_like(complete, key.shape[3])
        if "blocks" not in state:
            return {"blocks": complete, "block": block, **new}
        total, have = state["blocks"] + complete, state["blocks"] * block
        width = int(total.max()) * key.shape[3]
        grown = {name: appended(state[name], tensor, have)[:, :, :width] for name, tensor in new.items()}
        return {"blocks": total, "block": block, **grown}


def pseudo_inverse(matrix: Tensor, iterations: int = _ITERATIONS) -> Tensor:
    """Of matrices [..., n, n] whose rows sum to 1, by the paper's iteration (equation 11). A row and column of zeros
    stay zeros."""
    norms = matrix.abs().sum(-2).amax(-1) * matrix.abs().sum(-1).amax(-1)
    inverse = matrix.transpose(-1, -2) / norms.clamp_min(torch.finfo(matrix.dtype).tiny)[..., None, None]
    eye = torch.eye(matrix.shape[-1], device=matrix.device, dtype=matrix.dtype)
    for _ in range(iterations):
        product = matrix @ inverse
        inverse = inverse @ (13 * eye - product @ (15 * eye - product @ (7 * eye - product))) / 4
    return inverse
