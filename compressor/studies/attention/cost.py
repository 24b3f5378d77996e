"""What a call takes: seconds side by side with others, the most memory at once, and what a cache keeps."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ...modeling.block_attention import BlockAttention, StateLayer
from .kinds import Attend

Clock = Callable[[], float]  # seconds
Call = Callable[[], object]


def times(
    calls: Mapping[str, Call],
    repeats: int,
    device: torch.device,
    *,
    clock: Clock = time.perf_counter,
    step: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each call: after a round that warms up, `repeats` rounds of all calls, every other one in reverse
    order, so that a slow minute hits all alike. step: is called after each call."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name in list(calls)[:: 1 if repeat % 2 else -1]:
            _wait(device)
            start = clock()
            calls[name]()
            _wait(device)
            if repeat:
                found[name].append(clock() - start)
            step()
    return found


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def peak_bytes(call: Call, device: torch.device) -> int:
    """The most bytes that were allocated at once while it ran, beyond what was there before. On a CPU the tensors that
    operators give are counted, so the same call gives the same count; what an operator holds within itself is not."""
    if device.type == "cuda":
        _wait(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        _wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _LiveStorages() as live:
        call()
    return live.most


class _LiveStorages(TorchDispatchMode):
    """Bytes of the storages that operators made and that are still there: now, and at most. (PyTorch's profiler counts
    the same, but writes to stderr past Python.)"""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: dict[int, Any] = {}  # address of a storage -> what waits for its end

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {tensor.untyped_storage().data_ptr() for tensor in tree_leaves((args, kwargs)) if _is_tensor(tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in filter(_is_tensor, tree_leaves(result)):
            storage = tensor.untyped_storage()
            place = storage.data_ptr()
            if storage.nbytes() and place not in self.known and place not in given:
                self.now += storage.nbytes()
                self.known[place] = weakref.finalize(storage, self._gone, place, storage.nbytes())
        self.most = max(self.most, self.now)
        return result

    def _gone(self, place: int, size: int) -> None:
        self.now -= size
        del self.known[place]


def _is_tensor(item: object) -> bool:
    return isinstance(item, Tensor)


@torch.no_grad()
def cache_bytes(attend: Attend, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> int:
    """What is kept for the next token after these: keys and values, or the state of attention in blocks, counted by
    what its tensors hold in memory."""
    if not isinstance(attend, BlockAttention):
        return key.nbytes + value.nbytes
    layer = StateLayer()
    attend(query, key, value, scaling=scaling, layer=layer)
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in layer.state.values()}
    return sum(storage.nbytes() for storage in held.values())
