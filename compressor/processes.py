"""Several processes on one piece of work, as `accelerate launch` starts them; one process is the usual case."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

LAUNCH = "`accelerate launch --num_processes N -m compressor ...`"
_PATIENCE = timedelta(days=2)  # the others wait while the first fits a large model


@dataclass(frozen=True)
class Processes:
    """This process among the others."""

    rank: int = 0
    world: int = 1

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def all_sum(self, tensor: Tensor) -> Tensor:
        """The sum of every process's tensor."""
        return tensor if self.world == 1 else accelerator().reduce(tensor, "sum")

    def all_gather(self, value: Any) -> list[Any]:
        """Every process's value, by rank."""
        if self.world == 1:
            return [value]
        from accelerate.utils import gather_object

        return gather_object([value])

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            accelerator().wait_for_everyone()

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """What the others do after the main process has done it."""
        if not self.main:
            self.wait()
        yield
        if self.main:
            self.wait()

    def share_gradients(self, module: nn.Module, *, some_idle: bool) -> nn.Module:
        """The module, wrapped so that a backward pass averages its gradients over the processes. some_idle: a pass may
        leave trained parameters out."""
        if self.world == 1:
            return module
        return accelerator(some_idle=some_idle).prepare_model(module, device_placement=False)

    def gradients_apart(self, module: nn.Module) -> AbstractContextManager[None]:
        """Backward passes of a wrapped module within add up in this process only, until the next one outside."""
        return nullcontext() if self.world == 1 else accelerator().no_sync(module)


ALONE = Processes()


def processes() -> Processes:
    """This process as the launcher started it. Raises UserError for a way of sharing work other than data parallel."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    found = accelerator()
    return Processes(found.process_index, found.num_processes)


def leave() -> None:
    """Part from the other processes when the work is done: a process that just ends can make another abort."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def accelerator(*, some_idle: bool = False) -> Accelerator:
    """Processes and their devices. Its precision is left alone: it is one for a whole process, and ours is not.
    some_idle: as of Processes.share_gradients."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs

    gradients = DistributedDataParallelKwargs(find_unused_parameters=some_idle)
    found = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE), gradients])
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > found.num_processes:  # they would all write the same files
        raise UserError(
            f"this is one of {started} processes, but accelerate sees {found.num_processes}; "
            "to run several on CPUs set ACCELERATE_USE_CPU=true"
        )
    if found.distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise UserError(
            f"accelerate is configured for {found.distributed_type.value}; allowed: data parallel, {LAUNCH}"
        )
    return found
