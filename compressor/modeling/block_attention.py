"""Causal attention in blocks: exact softmax within a block, something cheaper over the completed blocks before it.

A query of block b sees the keys of b up to its own, and a `Far` part that stands for blocks 0..b-1. Both give their
output and the logarithm of their softmax mass, and these are put together as one softmax: (e^l1 o1 + e^l2 o2) /
(e^l1 + e^l2). Real tokens are counted from the first one of a row, wherever its pads are, so that padding moves no
block. What a cache holds is the block under way and what its far part keeps of the completed ones.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

State = dict[str, Tensor]  # every tensor [batch, ...]


class Far(nn.Module):
    """What stands for completed blocks. Queries without any get a mass of 0 (logarithm -inf)."""

    def over_blocks(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float, state: State
    ) -> tuple[Tensor, Tensor]:
        """Of the blocks that come after those in `state`: query, key, value float[batch, heads, blocks, block,
        head_dim]; block i sees state and blocks 0..i-1. Returns output of the same shape and log-mass [batch, heads,
        blocks, block], float32."""
        raise NotImplementedError

    def over_state(self, query: Tensor, scaling: float, state: State) -> tuple[Tensor, Tensor]:
        """Of state alone: query float[batch, heads, tokens, head_dim]. Returns output and log-mass [batch, heads,
        tokens]."""
        raise NotImplementedError

    def grown(self, state: State, query: Tensor, key: Tensor, value: Tensor, complete: Tensor, scaling: float) -> State:
        """State with the first complete[row] of the given blocks (as of `over_blocks`) of each row added."""
        raise NotImplementedError

    def near(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Of a query's own block: output and log-mass, of the keys `seen`. Exact here."""
        scores = (query @ key.transpose(-1, -2)).float() * scaling
        return softmax_output(scores.masked_fill(~seen, -math.inf), value)


class BlockAttention(nn.Module):
    """query, key, value float[batch, heads, tokens, head_dim] -> output of the same shape."""

    def __init__(self, block: int, far: Far):
        super().__init__()
        self.block, self.far = block, far

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        real: Tensor | None = None,
        layer: StateLayer | None = None,
    ) -> Tensor:
        """real: bool[batch, tokens], False = pad; None: none is. layer: of a cache, which is brought up to date.
        Autocast does not reach in: what is float32 here, logarithms above all, has to be."""
        with torch.autocast(query.device.type, enabled=False):
            return self._mixed(query, key, value, scaling, real, layer)

    def _mixed(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float, real: Tensor | None, layer: StateLayer | None
    ) -> Tensor:
        tokens = query.shape[2]
        order = None if real is None or bool(real.all()) else (~real).long().argsort(dim=1, stable=True)
        count = torch.full((len(query),), tokens, device=query.device) if real is None else real.sum(1)
        if order is not None:
            query, key, value = (_taken(tensor, order) for tensor in (query, key, value))
        state = {} if layer is None else layer.state
        if state:
            fill = state["fill"]
            old_query, old_key, old_value = (state[name] for name in ("query", "key", "value"))
            query_all, key_all, value_all = (
                appended(old, new, fill) for old, new in ((old_query, query), (old_key, key), (old_value, value))
            )
        else:
            fill = torch.zeros_like(count)
            query_all, key_all, value_all = query, key, value
        if state and key_all.shape[2] <= self.block:
            out = self._within(query, key_all, value_all, fill, scaling, state)
        else:
            out = self._blocks(query_all, key_all, value_all, scaling, state)
            out = _taken(out, fill[:, None] + torch.arange(tokens, device=out.device)) if state else out[:, :, :tokens]
        if layer is not None:
            layer.keep(self._kept(state, query_all, key_all, value_all, fill + count, scaling), tokens)
        return out if order is None else _taken(out, order.argsort(dim=1))

    def weights(self, query: Tensor, key: Tensor, *, scaling: float, real: Tensor | None = None) -> Tensor:
        """How much of each token's value is in each output: float[batch, heads, tokens, tokens]. As large as what this
        attention is there to avoid: to look at."""
        shape, tokens = query.shape, query.shape[2]
        eye = torch.eye(tokens, dtype=query.dtype, device=query.device)
        parts = [
            self(query, key, nn.functional.pad(part, (0, shape[3] - part.shape[1])).expand(shape), scaling=scaling,
                 real=real)[..., : part.shape[1]]
            for part in eye.split(shape[3], dim=1)
        ]  # fmt: skip
        return torch.cat(parts, -1)

    def _within(self, query: Tensor, key: Tensor, value: Tensor, fill: Tensor, scaling: float, state: State) -> Tensor:
        """All queries in the block under way, whose keys are given."""
        places = fill[:, None] + torch.arange(query.shape[2], device=fill.device)  # [batch, tokens]
        seen = torch.arange(key.shape[2], device=fill.device) <= places[:, None, :, None]
        near = self.far.near(query, key, value, scaling, seen)
        return _merged(near, self.far.over_state(query, scaling, state), query.dtype)

    def _blocks(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, state: State) -> Tensor:
        """[batch, heads, whole blocks, head_dim]"""
        query, key, value = (_in_blocks(tensor, self.block) for tensor in (query, key, value))
        seen = torch.ones(self.block, self.block, dtype=torch.bool, device=query.device).tril()
        near = self.far.near(query, key, value, scaling, seen)
        if query.shape[2] > 1 or state:
            out = _merged(near, self.far.over_blocks(query, key, value, scaling, state), query.dtype)
        else:
            out = near[0].to(query.dtype)
        return out.flatten(2, 3)

    def _kept(self, state: State, query: Tensor, key: Tensor, value: Tensor, filled: Tensor, scaling: float) -> State:
        """The state after tokens up to filled[row] of the block under way and what follows it."""
        complete = filled // self.block
        far = {name: tensor for name, tensor in state.items() if name not in _OWN}
        if int(complete.max()):
            blocks = [_in_blocks(tensor, self.block)[:, :, : int(complete.max())] for tensor in (query, key, value)]
            far = self.far.grown(far, blocks[0], blocks[1], blocks[2], complete, scaling)
        left = filled - complete * self.block
        places = complete[:, None] * self.block + torch.arange(int(left.max()), device=filled.device)
        places = places.clamp_max(key.shape[2] - 1)  # beyond what a row has: masked by its fill
        own = (_taken(tensor, places) for tensor in (query, key, value))
        return {**far, **dict(zip(_OWN, (left, *own), strict=True))}


_OWN = ("fill", "query", "key", "value")  # the part of a state that is the block under way


def softmax_output(scores: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Output [..., head_dim] and log-mass [...] of scores float32[..., keys]; 0 and -inf where every score is -inf."""
    top = scores.detach().amax(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)
    weights = (scores - top).exp()
    mass = weights.sum(-1, keepdim=True)
    shares = weights / mass.clamp_min(torch.finfo(mass.dtype).tiny)
    out = (shares.to(value.dtype) @ value).float()
    return out, (mass.log() + top).squeeze(-1)


def _merged(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """One softmax over what two parts cover; the first has mass everywhere."""
    share = torch.sigmoid(other[1] - one[1])[..., None]
    return (one[0] + share * (other[0] - one[0])).to(dtype)


def _in_blocks(tensor: Tensor, block: int) -> Tensor:
    """[batch, heads, tokens, head_dim] -> [batch, heads, blocks, block, head_dim], filled up with zeros."""
    padded = nn.functional.pad(tensor, (0, 0, 0, -tensor.shape[2] % block))
    return padded.unflatten(2, (-1, block))


def _taken(tensor: Tensor, places: Tensor) -> Tensor:
    """The tokens of each row at places int64[batch, n]: [batch, heads, n, head_dim]."""
    return tensor.gather(2, places[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3]))


def appended(old: Tensor, new: Tensor, fill: Tensor) -> Tensor:
    """Row by row: the first fill[row] tokens of `old`, then `new`."""
    whole = torch.cat([old, new], 2)
    if bool((fill == old.shape[2]).all()):
        return whole
    places = torch.arange(whole.shape[2], device=fill.device).expand(len(fill), -1)
    moved = torch.where(places < fill[:, None], places, places - fill[:, None] + old.shape[2])
    return _taken(whole, moved.clamp_max(whole.shape[2] - 1))


# ---------------------------------------------------------------- cache


class StateLayer(CacheLayerMixin):
    """A layer of a transformers Cache that holds a state instead of all keys and values."""

    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, **kwargs: Any):
        super().__init__()
        self.state: State = {}
        self.tokens = 0  # taken in, pads too

    def keep(self, state: State, tokens: int) -> None:
        """The state after `tokens` more."""
        self.state, self.is_initialized = state, True
        self.tokens += tokens

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError("the attention of this layer fills it itself")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("the attention of this layer fills it itself")

    def get_seq_length(self) -> int:
        return self.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.tokens + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def _changed(self, change: Any) -> None:
        self.state = {name: change(tensor) for name, tensor in self.state.items()}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._changed(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._changed(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._changed(lambda tensor: tensor[indices])

    def offload(self) -> None:
        self._changed(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        raise NotImplementedError("a layer of states cannot be offloaded; leave cache_implementation out")

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("a layer of states cannot go back; assisted generation needs all keys and values")

    def reset(self) -> None:
        self.state, self.tokens, self.is_initialized = {}, 0, False


def state_layer(cache: Cache | None, index: int) -> StateLayer | None:
    """The layer of a cache that holds a state: put there when the cache is still empty."""
    if cache is None:
        return None
    while len(cache.layers) <= index:
        cache.layers.append(DynamicLayer())
    found = cache.layers[index]
    if isinstance(found, StateLayer):
        return found
    if getattr(found, "is_initialized", False):
        raise ValueError(f"layer {index} of the cache holds keys and values, and this attention keeps a state there")
    cache.layers[index] = made = StateLayer()
    return made
