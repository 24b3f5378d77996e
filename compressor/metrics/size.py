"""How big a model is: parameters counted once, bytes of its weight files and cache, operations per token."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..gpt2 import position_parameters
from ..models import OpenModel, weight_files
from .base import MetricResult, Progress
from .cache import cache_bytes
from .flops import flops_per_token

SETTINGS = frozenset({"context"})


def _memories(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What the tensors hold, each element once: the tensors themselves, or their whole storage where they overlap."""
    storages: dict[Any, dict[tuple, Tensor]] = defaultdict(dict)
    for tensor in tensors:
        # meta tensors have no storage address: the object stands for it
        storage = (tensor.device, tensor.untyped_storage().data_ptr() or id(tensor))
        storages[storage][tensor.storage_offset(), tensor.shape, tensor.stride()] = tensor.detach()
    memories: list[Tensor] = []
    for views in storages.values():
        some = next(iter(views.values()))
        whole = some.untyped_storage().nbytes() // some.element_size()
        overlap = len(views) > 1 and sum(view.numel() for view in views.values()) > whole
        memories += [some.new_empty(0).set_(some.untyped_storage())] if overlap else views.values()
    return memories


def parameters(model: nn.Module) -> int:
    """Parameters of the model over unique storages: a tied head counts once."""
    return sum(memory.numel() for memory in _memories(model.parameters()))


def stored_besides(model: nn.Module) -> int:
    """Numbers that the weight files hold and training never changes: random directions of a performer."""
    saved = model.state_dict().keys()
    return sum(
        memory.numel() for memory in _memories(buffer for name, buffer in model.named_buffers() if name in saved)
    )


def embedding_parameters(model: nn.Module) -> int:
    """Parameters of the token and position tables, which sharing FFNs cannot touch."""
    tables = (module.weight for module in model.modules() if isinstance(module, nn.Embedding))
    return sum(memory.numel() for memory in _memories(tables))


def embedding_share(model: nn.Module) -> float:
    """Part of the parameters that are embeddings, 0..1."""
    return embedding_parameters(model) / parameters(model)


def non_zero(model: nn.Module) -> int:
    """Parameters that are not 0, over unique storages: what pruning by zeros leaves of the stored ones."""
    return sum(int(torch.count_nonzero(memory)) for memory in _memories(model.parameters()))


def weight_bytes(folder: Path) -> int:
    """Bytes of the weight files in a folder, all shards. Raises UserError when there are none."""
    return sum(file.stat().st_size for file in weight_files(str(folder), folder))


def predicted_bytes(count: int, dtype: torch.dtype) -> int:
    """Bytes that so many parameters take on disk, without the file's header (some 10 kB)."""
    return count * dtype.itemsize


def measure(
    subject: OpenModel, data: None = None, *, progress: Progress | None = None, context: int | None = None
) -> list[MetricResult]:
    """Parameters, bytes of the weight files, FLOPs per token and cache of one sequence at `context` (default
    n_positions)."""
    model = subject.model
    context = model.config.n_positions if context is None else context
    if not isinstance(context, int) or isinstance(context, bool) or context < 1:
        raise UserError(f"context={context!r} is not allowed; allowed: whole numbers from 1")
    total = parameters(model)
    return [
        MetricResult(
            "parameters",
            total,
            "parameters",
            False,
            len(_memories(model.parameters())),
            None,
            {
                "protocol": "unique storages",
                "embeddings": embedding_parameters(model),
                "embedding_share": embedding_share(model),
                "positions": position_parameters(model),
                "non_zero": non_zero(model),
            },
        ),
        MetricResult(
            "bytes",
            weight_bytes(subject.folder),
            "bytes",
            False,
            len(weight_files(subject.name, subject.folder)),
            None,
            {
                "protocol": "weight files",
                "of_parameters": predicted_bytes(total + stored_besides(model), subject.stored_dtype),
                "dtype": str(subject.stored_dtype).removeprefix("torch."),
            },
        ),
        MetricResult(
            "flops_per_token",
            flops_per_token(model, context),
            "operations per token",
            False,
            model.config.n_layer,
            None,
            {"protocol": "forward pass, a multiply-add is 2", "context": context},
        ),
        MetricResult(
            "cache_bytes",
            cache_bytes(model.config, context, model.dtype.itemsize),
            "bytes",
            False,
            model.config.n_layer,
            None,
            {"protocol": "the most up to a context, one sequence", "context": context},
        ),
    ]
