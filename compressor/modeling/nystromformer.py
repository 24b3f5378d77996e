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

from .block_attention import Far, State, appended, attended

INVERSES = ("newton", "none")
_ITERATIONS = 6  # of the paper
_PARTS = 8  # of all prefixes: what is masked within a part is worked out for nothing
_LANDMARKS = ("landmark_keys", "landmark_values", "log_size")


class NystromFar(Far):
    """The state is all keys and values of the completed blocks, with newton queries too, and the landmarks of them:
    this kind saves time, not memory."""

    def __init__(self, landmarks: int, inverse: str):
        super().__init__()
        if inverse not in INVERSES:
            raise ValueError(f"inverse is {inverse!r}; allowed: {', '.join(INVERSES)}")
        self.landmarks, self.inverse = landmarks, inverse
        self.keeps_queries = inverse == "newton"

    def over_blocks(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float, state: State
    ) -> tuple[Tensor, Tensor]:
        every = self._with_blocks(state, query, key, value, torch.full((len(query),), query.shape[2]).to(query.device))
        before = every["blocks"][:, None] + torch.arange(-query.shape[2], 0, device=query.device)
        return self._read(query, self._landmarks(every, before * query.shape[3], scaling), scaling)

    def over_state(self, query: Tensor, scaling: float, state: State) -> tuple[Tensor, Tensor]:
        if "blocks" not in state:
            return torch.zeros_like(query, dtype=torch.float32), query.new_full(query.shape[:3], -math.inf).float()
        out, mass = self._read(query[:, :, None], {name: state[name] for name in _LANDMARKS}, scaling)
        return out.squeeze(2), mass.squeeze(2)

    def grown(
        self, state: State, query: Tensor | None, key: Tensor, value: Tensor, complete: Tensor, scaling: float
    ) -> State:
        every = self._with_blocks(state, query, key, value, complete)
        return {**every, **self._landmarks(every, every["blocks"][:, None] * key.shape[3], scaling)}

    def _with_blocks(self, state: State, query: Tensor | None, key: Tensor, value: Tensor, complete: Tensor) -> State:
        given = {"keys": key, "values": value, "queries": query if self.keeps_queries else None}
        new = {name: tensor.flatten(2, 3) for name, tensor in given.items() if tensor is not None}
        if "blocks" not in state:
            return {"blocks": complete, **new}
        total, have = state["blocks"] + complete, state["blocks"] * key.shape[3]
        width = int(total.max()) * key.shape[3]
        return {"blocks": total, **{name: appended(state[name], new[name], have)[:, :, :width] for name in new}}

    def _landmarks(self, every: State, length: Tensor, scaling: float) -> State:
        """Of prefixes of length int64[batch, prefixes] tokens: landmark_keys and landmark_values [batch, heads,
        prefixes, landmarks, head_dim], and the logarithm of how many tokens each stands for."""
        count = length.clamp(1, self.landmarks)[..., None]  # no more landmarks than tokens
        edges = torch.arange(self.landmarks + 1, device=length.device) * length[..., None]
        edges = -(-edges).div(count, rounding_mode="floor")  # as even segments as can be
        edges = torch.minimum(edges, length[..., None])  # [batch, prefixes, landmarks + 1]
        size = edges.diff(dim=-1)
        found = {"log_size": size.log()[:, None, :, None]}

        def means(name: str) -> Tensor:
            """Differences of running sums, in float64: what they have in common cancels."""
            sums = nn.functional.pad(every[name].double().cumsum(2), (0, 0, 1, 0))
            index = edges.flatten(1)[:, None, :, None].expand(-1, sums.shape[1], -1, sums.shape[3])
            parts = sums.gather(2, index).unflatten(2, edges.shape[1:]).diff(dim=3)
            return (parts / size.clamp_min(1)[:, None, ..., None]).float()

        keys = means("keys").to(every["keys"].dtype)
        if self.inverse == "none":
            return {**found, "landmark_keys": keys, "landmark_values": means("values")}
        queries = means("queries").to(keys.dtype)
        there = (size > 0)[:, None]
        least = torch.finfo(torch.float32).min  # where a row has nothing at all its share of the output is 0
        middle = (queries * scaling @ keys.transpose(-1, -2)).float()
        middle = middle.masked_fill(~there[..., None, :], least).softmax(-1) * there[..., None]
        right = self._over_prefixes(queries, every["keys"], every["values"], length.clamp_min(1), scaling)
        return {**found, "landmark_keys": keys, "landmark_values": pseudo_inverse(middle) @ right.float()}

    def _over_prefixes(self, queries: Tensor, keys: Tensor, values: Tensor, length: Tensor, scaling: float) -> Tensor:
        """Softmax of queries [batch, heads, prefixes, landmarks, head_dim] over the first `length` keys, a few prefixes
        at a time."""
        step, found = -(-length.shape[1] // _PARTS), []
        for part, lengths in zip(queries.split(step, 2), length.split(step, 1), strict=True):
            width = int(lengths.max())
            seen = torch.arange(width, device=length.device) < lengths.repeat_interleave(self.landmarks, 1)[..., None]
            found.append(
                nn.functional.scaled_dot_product_attention(
                    part.flatten(2, 3), keys[:, :, :width], values[:, :, :width], seen[:, None], scale=scaling
                ).unflatten(2, part.shape[2:4])
            )
        return torch.cat(found, 2)

    def _read(self, query: Tensor, found: State, scaling: float) -> tuple[Tensor, Tensor]:
        """query: [batch, heads, prefixes, tokens, head_dim]"""
        keys, values, log_size = (found[name] for name in ("landmark_keys", "landmark_values", "log_size"))
        pooled, mass = attended(query, keys, values, scaling, bias=log_size)
        if self.inverse == "none":
            return pooled, mass
        return attended(query, keys, values, scaling, seen=log_size > -math.inf)[0], mass


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
