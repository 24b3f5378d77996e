"""Causal attention in blocks: exact softmax within a block, something cheaper over the completed blocks before it.

A query of block b sees the keys of b up to its own, and a `Far` part that stands for blocks 0..b-1. Both give their
output and the logarithm of their softmax mass, and these are put together as one softmax: (e^l1 o1 + e^l2 o2) /
(e^l1 + e^l2). Real tokens are counted from the first one of a row, wherever its pads are, so that padding moves no
block. What a cache holds is the block under way and what its far part keeps of the completed ones.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

State = dict[str, Tensor]  # every tensor [batch, ...]


class Far(nn.Module, ABC):
    """What stands for completed blocks. Queries without any get a mass of 0: a logarithm of -inf or float32's least."""

    keeps_queries = False  # whether its state is made of queries too

    @abstractmethod
    def over_blocks(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float, state: State
    ) -> tuple[Tensor, Tensor]:
        """Of the blocks that come after those in `state`: query, key, value float[batch, heads, blocks, block,
        head_dim]; block i sees state and blocks 0..i-1. Returns output of the same shape and log-mass [batch, heads,
        blocks, block], float32."""

    @abstractmethod
    def over_state(self, query: Tensor, scaling: float, state: State) -> tuple[Tensor, Tensor]:
        """Of state alone: query float[batch, heads, tokens, head_dim]. Returns output and log-mass [batch, heads,
        tokens]."""

    @abstractmethod
    def grown(
        self, state: State, query: Tensor | None, key: Tensor, value: Tensor, complete: Tensor, scaling: float
    ) -> State:
        """State with the first complete[row] of the given blocks (as of `over_blocks`) of each row added; query: where
        it keeps them."""

    def near(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float, seen: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Of a query's own block: output and log-mass, of the keys `seen` (None: all). Exact here."""
        return attended(query, key, value, scaling, seen=seen)


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
        Autocast does not reach in: what is float32 here, logarithms above all, has to be. It may have left key and
        value in another dtype than query: they are taken in the query's."""
        key, value = key.to(query.dtype), value.to(query.dtype)
        with torch.autocast(query.device.type, enabled=False):
            return self._mixed(query, key, value, scaling, real, layer)

    def _mixed(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float, real: Tensor | None, layer: StateLayer | None
    ) -> Tensor:
        tokens = query.shape[2]
        if real is not None and bool(real.all()):
            real = None
        order = None if real is None else (~real).long().argsort(dim=1, stable=True)
        if order is not None:
            query, key, value = (_taken(tensor, order) for tensor in (query, key, value))
        count = torch.full((len(query),), tokens, device=query.device) if real is None else real.sum(1)
        if layer is None or not layer.state:
            out = self._blocks(query, key, value, scaling, {})[:, :, :tokens]
            if layer is not None:
                layer.keep(*self._kept({}, query, key, value, count, real is None, scaling), tokens)
        else:
            state, fill = layer.state, layer.state["fill"]
            key, value = (
                appended(state[name], new, fill, layer.even) for name, new in (("key", key), ("value", value))
            )
            beyond, own_query = key.shape[2] > self.block, query
            if beyond or self.far.keeps_queries:  # what the old ones give was given out before
                old = state["query"] if self.far.keeps_queries else torch.zeros_like(state["key"])
                query = appended(old, query, fill, layer.even)
            if beyond:
                out = self._blocks(query, key, value, scaling, state)
                out = _taken(out, fill[:, None] + torch.arange(tokens, device=out.device))
            else:
                out = self._within(own_query, key, value, scaling, state, layer.even)
            even = layer.even and real is None
            layer.keep(*self._kept(state, query, key, value, fill + count, even, scaling), tokens)
        return out if order is None else _taken(out, order.argsort(dim=1))

    def _within(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, state: State, even: bool) -> Tensor:
        """All queries in the block under way, whose keys are given; even: the queries are those of the last keys."""
        seen = None
        if not even or query.shape[2] > 1:
            places = state["fill"][:, None] + torch.arange(query.shape[2], device=key.device)  # [batch, tokens]
            seen = torch.arange(key.shape[2], device=key.device) <= places[:, None, :, None]
        near = self.far.near(query, key, value, scaling, seen)
        return merged(near, self.far.over_state(query, scaling, state), query.dtype)

    def _blocks(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, state: State) -> Tensor:
        """[batch, heads, whole blocks, head_dim]"""
        block = self.block if state else min(self.block, query.shape[2])
        query, key, value = (_in_blocks(tensor, block) for tensor in (query, key, value))
        seen = torch.ones(block, block, dtype=torch.bool, device=query.device).tril()
        near = self.far.near(query, key, value, scaling, seen)
        if query.shape[2] > 1 or state:
            out = merged(near, self.far.over_blocks(query, key, value, scaling, state), query.dtype)
        else:
            out = near[0].to(query.dtype)
        return out.flatten(2, 3)

    def _kept(
        self, state: State, query: Tensor, key: Tensor, value: Tensor, filled: Tensor, even: bool, scaling: float
    ) -> tuple[State, bool]:
        """The state after tokens up to filled[row] of the block under way and what follows it, and whether these are as
        many in all rows; even: whether filled are."""
        given = {"key": key, "value": value, **({"query": query} if self.far.keeps_queries else {})}
        if even and key.shape[2] < self.block:  # by far the most steps: nothing to move
            return {**state, "fill": filled, **given}, True
        far = {name: tensor for name, tensor in state.items() if name not in _OWN}
        complete = filled // self.block
        most = int(complete.max())
        if most:
            new = {name: _in_blocks(tensor, self.block)[:, :, :most] for name, tensor in given.items()}
            far = self.far.grown(far, new.get("query"), new["key"], new["value"], complete, scaling)
        left = filled - complete * self.block
        places = complete[:, None] * self.block + torch.arange(int(left.max()), device=filled.device)
        places = places.clamp_max(key.shape[2] - 1)  # beyond what a row has: masked by its fill
        own = {name: _taken(tensor, places) for name, tensor in given.items()}
        return {**far, "fill": left, **own}, even or bool((left == left[0]).all())


_OWN = ("fill", "query", "key", "value")  # the part of a state that is the block under way


def implied_weights(attend: Callable[..., Tensor], query: Tensor, key: Tensor, **settings: Any) -> Tensor:
    """How much of each token's value is in each output of attend(query, key, value, **settings), which is given the
    identity as values, in slices as wide as a head: float[batch, heads, tokens, tokens]. As large as what attention in
    blocks is there to avoid: to look at."""
    width = query.shape[3]
    eye = torch.eye(query.shape[2], dtype=query.dtype, device=query.device)
    parts = [
        attend(query, key, nn.functional.pad(part, (0, width - part.shape[1])).expand(query.shape), **settings)[
            ..., : part.shape[1]
        ]
        for part in eye.split(width, dim=1)
    ]
    return torch.cat(parts, -1)


# ---------------------------------------------------------------- softmax with its mass

_LEAST, _TINY = torch.finfo(torch.float32).min, torch.finfo(torch.float32).tiny


def attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    seen: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [..., queries, head_dim] and log-mass [..., queries], float32, of softmax over scores query . key scaling
    + bias, of keys `seen`; 0 and -inf where there is none. bias float32, seen bool: as wide as [..., queries, keys] or
    1. Nothing of that size is kept for the backward pass, which makes the scores again."""
    with torch.autocast(query.device.type, enabled=False):  # as the backward pass will make them
        return _Attended.apply(query, key, value, scaling, bias, seen)


class _Attended(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, scaling, bias, seen):
        weights = _scores(query, key, scaling, bias, seen)
        top = weights.amax(-1, keepdim=True).clamp_min_(_LEAST)
        mass = weights.sub_(top).exp_().sum(-1, keepdim=True)
        out = (weights.to(value.dtype) @ value).float().div_(mass.clamp_min(_TINY))
        log_mass = mass.log_().add_(top)
        ctx.scaling = scaling
        ctx.save_for_backward(query, key, value, bias, seen, out, log_mass)
        return out, log_mass.squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out, d_log_mass):
        query, key, value, bias, seen, out, log_mass = ctx.saved_tensors
        shares = _scores(query, key, ctx.scaling, bias, seen).sub_(log_mass.clamp_min(_LEAST)).exp_()
        d_value = shares.to(value.dtype).transpose(-1, -2) @ d_out.to(value.dtype)
        d_scores = (d_out.to(value.dtype) @ value.transpose(-1, -2)).float()
        d_scores.add_(d_log_mass[..., None] - (d_out * out).sum(-1, keepdim=True)).mul_(shares)
        d_bias = d_scores.sum_to_size(bias.shape) if ctx.needs_input_grad[4] else None
        d_scores = d_scores.to(query.dtype)
        return (
            (d_scores @ key) * ctx.scaling,
            d_scores.transpose(-1, -2) @ query * ctx.scaling,
            d_value,
            None,
            d_bias,
            None,
        )


def _scores(query: Tensor, key: Tensor, scaling: float, bias: Tensor | None, seen: Tensor | None) -> Tensor:
    scores = (query * scaling @ key.transpose(-1, -2)).float()
    if bias is not None:
        scores += bias
    return scores if seen is None else scores.masked_fill_(~seen, -math.inf)


def merged(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """The output of one softmax over what two parts cover, each given as output and log-mass; the first has mass
    everywhere."""
    return torch.lerp(one[0], other[0], torch.sigmoid(other[1] - one[1])[..., None]).to(dtype)


def _in_blocks(tensor: Tensor, block: int) -> Tensor:
    """[batch, heads, tokens, head_dim] -> [batch, heads, blocks, block, head_dim], filled up with zeros."""
    short = -tensor.shape[2] % block
    whole = nn.functional.pad(tensor, (0, 0, 0, short)) if short else tensor.contiguous()
    return whole.unflatten(2, (-1, block))


def _taken(tensor: Tensor, places: Tensor) -> Tensor:
    """The tokens of each row at places int64[batch, n]: [batch, heads, n, head_dim]."""
    return tensor.gather(2, places[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3]))


def appended(old: Tensor, new: Tensor, fill: Tensor, even: bool = False) -> Tensor:
    """Row by row: the first fill[row] tokens of `old`, then `new`. even: fill is known to be all of `old`."""
    whole = torch.cat([old, new], 2)
    if even or bool((fill == old.shape[2]).all()):
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
        self.even = True  # whether all rows have as many tokens in the block under way
        self.tokens = 0  # taken in, pads too

    def keep(self, state: State, even: bool, tokens: int) -> None:
        """The state after `tokens` more."""
        self.state, self.even, self.is_initialized = state, even, True
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
        self.state, self.even, self.tokens, self.is_initialized = {}, True, 0, False


def state_layer(cache: Cache | None, index: int) -> StateLayer | None:
    """The layer of a cache that holds a state: put there when the cache is still empty."""
    if cache is None:
        return None
    while len(cache.layers) <= index:
        cache.layers.append(DynamicLayer())
    found = cache.layers[index]
    if isinstance(found, StateLayer):
        return found
    if type(found) is not DynamicLayer:
        raise ValueError(f"layer {index} of the cache is a {type(found).__name__}; attention in blocks: DynamicLayer")
    if found.is_initialized:
        raise ValueError(f"layer {index} of the cache holds keys and values, and this attention keeps a state there")
    cache.layers[index] = made = StateLayer()
    return made
