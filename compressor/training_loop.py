"""The steps of a recovery: batches, gradients, evaluations and best state, the same on any number of processes.

Nothing random is stored, it follows from the seed (training_schedule.py): a run goes on after an interruption as if
there had been none.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from . import training_state
from .data import TokenBlocks
from .errors import UserError
from .metrics.nll import BATCH_TOKENS, token_nll
from .rewrites import Rewrite
from .training_loss import Objective
from .training_schedule import batch_rows, mixed_seed, rate_factor
from .training_state import StateFolder, TrainingState


@dataclass(frozen=True)
class Step:
    """One step of the loss curve. Losses are per predicted token, in nats."""

    step: int  # 1 is the first
    nll: float  # next-token loss
    divergence: float | None  # KL(teacher || model); None without a teacher
    penalty: float | None  # mean over the rewrites, before its weight; None where there is none
    gradient_norm: float  # before clipping
    learning_rate: float


@dataclass(frozen=True)
class Evaluation:
    """The exact NLL per token on the selection text after so many steps."""

    step: int
    nll: float
    tokens: int


class Loop:
    """The state of a training, and the way from one step to the next."""

    def __init__(
        self,
        *,
        objective: Objective,
        parameters: dict[str, nn.Parameter],
        blocks: TokenBlocks,
        evaluation: TokenBlocks | None,
        rewrites: Sequence[Rewrite],
        settings: dict[str, Any],
        accelerator: Accelerator,
        device: torch.device,
        rows: int,
        forward_rows: int,
        progress: Callable[[Step], None],
    ):
        self.parameters, self.blocks, self.evaluation = parameters, blocks, evaluation
        self.rewrites, self.settings, self.accelerator, self.device = rewrites, settings, accelerator, device
        self.rows, self.forward_rows, self.progress = rows, forward_rows, progress
        self.model, self.objective = objective.model, objective
        self.annealed = any(type(rewrite).on_step is not Rewrite.on_step for rewrite in rewrites)
        self.wrapped: nn.Module = objective
        self.flush_every = 1 if device.type == "cpu" else 16  # reading a number makes an accelerator wait
        self.pending: list[tuple[int, int, Tensor]] = []
        self.step = 0
        self.curve: list[Step] = []
        self.evaluations: list[Evaluation] = []
        self.best: dict[str, Tensor] = {}
        self.best_step = 0
        self.tokens = 0
        self.training_seconds = 0.0
        self.began, self.earlier = time.perf_counter(), 0.0

    @property
    def seconds(self) -> float:
        return self.earlier + time.perf_counter() - self.began

    # ------------------------------------------------------------ begin and end

    def begin(self, folder: StateFolder | None, resume: bool) -> None:
        """The optimiser, the stored state or the evaluation of the start, and the wrapping for many processes."""
        matrices = [parameter for parameter in self.parameters.values() if parameter.ndim > 1]
        rest = [parameter for parameter in self.parameters.values() if parameter.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": self.settings["weight_decay"]},
            {"params": rest, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=self.settings["learning_rate"],
            fused=self.device.type in ("cpu", "cuda"),
        )
        stored = None
        if folder is not None and resume:
            with self.accelerator.main_process_first():  # it tidies up what a kill left
                stored = training_state.load(folder, self.settings)
        if stored is not None:
            self._take(stored)
        else:
            if folder is not None and self.accelerator.is_main_process:
                training_state.remove(folder)
            self._evaluate()
        if self.accelerator.num_processes > 1:
            self.wrapped = self.accelerator.prepare_model(self.objective, device_placement=False)

    def restore_best(self) -> None:
        """The best state into the model."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.best[name])

    def _keep(self) -> None:
        self.best_step = self.step
        self.best = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    # ------------------------------------------------------------ steps

    def run(self, folder: StateFolder | None, checkpoint_every: int | None) -> None:
        """All steps that are left."""
        steps, evaluate_every = self.settings["steps"], self.settings["evaluate_every"]
        while self.step < steps:
            started = time.perf_counter()
            self._train()
            self.step += 1
            last = self.step == steps
            evaluating = last or self.step % evaluate_every == 0
            storing = checkpoint_every is not None and (last or self.step % checkpoint_every == 0)
            if evaluating or storing or self.step % self.flush_every == 0:
                self._flush()
            self.training_seconds += time.perf_counter() - started
            if evaluating:
                self._evaluate()
            if storing and self.accelerator.is_main_process:
                assert folder is not None
                training_state.save(folder, self._state())
        self.accelerator.wait_for_everyone()

    def _train(self) -> None:
        """One step: this process's rows of the global batch, in as many forward passes as they need."""
        settings, processes = self.settings, self.accelerator.num_processes
        for rewrite in self.rewrites:
            rewrite.on_step(self.model, self.step / max(1, settings["steps"] - 1))
        batch = batch_rows(len(self.blocks.ids), self.rows, self.step, settings["seed"])
        count = max(1, int(self.blocks.mask[batch, 1:].sum()))  # of all processes: known without asking them
        own = batch[self.accelerator.process_index :: processes]
        passes = [own[i : i + self.forward_rows] for i in range(0, len(own), self.forward_rows)] or [[]]
        sums = torch.zeros(2, device=self.device, dtype=self.model.dtype)
        term = None
        with self._random():
            for index, rows in enumerate(passes):
                ids, mask = self.blocks.ids[rows or batch[:1]], self.blocks.mask[rows or batch[:1]]
                if not rows:  # more processes than rows: take part, count nothing
                    mask = torch.zeros_like(mask)
                on_device = None if mask.all() else mask.to(self.device)
                last = index == len(passes) - 1
                with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                    loss, part, term = self.wrapped(ids.to(self.device), on_device, last)
                    loss = loss * (processes / count)  # gradients are averaged over the processes
                    (loss if term is None else loss + settings["penalty"] * term).backward()
                sums += part
        parameters = list(self.parameters.values())
        norm = nn.utils.clip_grad_norm_(parameters, settings["clip"] or math.inf)  # 0: not clipped
        factor = rate_factor(self.step, settings["steps"], settings["warm_up"])
        for group in self.optimizer.param_groups:
            group["lr"] = settings["learning_rate"] * factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        extra = torch.stack([norm.detach(), sums.new_tensor(math.nan) if term is None else term.detach()])
        self.pending.append((self.step + 1, count, torch.cat([sums, extra.to(sums)])))
        self.tokens += count

    @contextmanager
    def _random(self) -> Iterator[None]:
        """Dropout from a seed of this step and process, so that no state of a generator needs storing."""
        if not self.settings["dropout"]:
            yield
            return
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(mixed_seed(self.settings["seed"], 2, self.step, self.accelerator.process_index))
            yield

    def _flush(self) -> None:
        """Pending steps into the curve. Raises UserError at the first whose numbers are not finite."""
        if not self.pending:
            return
        rows = torch.stack([numbers for _, _, numbers in self.pending])
        if self.accelerator.num_processes > 1:
            rows[:, :2] = self.accelerator.reduce(rows[:, :2].contiguous(), "sum")
        distilled = self.objective.others[0] is not None
        for (step, count, _), (nll, divergence, norm, term) in zip(self.pending, rows.tolist(), strict=True):
            if not math.isfinite(nll + divergence + norm):
                raise self._diverged(step, "loss or gradient")
            rate = self.settings["learning_rate"]
            row = Step(
                step=step,
                nll=nll / count,
                divergence=divergence / count if distilled else None,
                penalty=None if math.isnan(term) else term,
                gradient_norm=norm,
                learning_rate=rate * rate_factor(step - 1, self.settings["steps"], self.settings["warm_up"]),
            )
            self.curve.append(row)
            self.progress(row)
        self.pending.clear()

    def _diverged(self, step: int, what: str) -> UserError:
        return UserError(
            f"the {what} at step {step} is not a finite number with learning_rate={self.settings['learning_rate']}; "
            "give a smaller one"
        )

    # ------------------------------------------------------------ evaluation

    def _evaluate(self) -> None:
        """The NLL on the selection text, and the best state so far."""
        if self.evaluation is None:
            self._keep()
            return
        nll, tokens = self._selection_nll(self.evaluation)
        if not math.isfinite(nll) and self.step == 0:
            raise UserError("the model's loss on the selection text is not a finite number before any training")
        if not math.isfinite(nll):
            raise self._diverged(self.step, "selection loss")
        if self.annealed or nll < min((earlier.nll for earlier in self.evaluations), default=math.inf):
            self._keep()
        self.evaluations.append(Evaluation(self.step, nll, tokens))

    def _selection_nll(self, blocks: TokenBlocks) -> tuple[float, int]:
        """Exact mean NLL per token and their number; each process takes its share of the rows."""
        share = slice(self.accelerator.process_index, None, self.accelerator.num_processes)
        total = torch.zeros((), dtype=torch.float64)
        size = max(1, BATCH_TOKENS // blocks.ids.shape[1])
        for ids, mask in zip(blocks.ids[share].split(size), blocks.mask[share].split(size), strict=True):
            if len(ids):  # more processes than rows
                total += token_nll(self.model, ids.to(self.device), mask.to(self.device)).sum()
        if self.accelerator.num_processes > 1:
            total = self.accelerator.reduce(total.to(self.device), "sum").cpu()
        tokens = int(blocks.mask[:, 1:].sum())
        return float(total) / max(1, tokens), tokens

    # ------------------------------------------------------------ the stored state

    def _state(self) -> TrainingState:
        moments = {name: self.optimizer.state[parameter] for name, parameter in self.parameters.items()}
        facts = {
            "settings": self.settings,
            "best_step": self.best_step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "training_seconds": self.training_seconds,
            "curve": [asdict(row) for row in self.curve],
            "evaluations": [asdict(row) for row in self.evaluations],
        }
        return TrainingState(
            step=self.step,
            facts=facts,
            parameters={name: parameter.detach() for name, parameter in self.parameters.items()},
            first_moments={name: state["exp_avg"] for name, state in moments.items()},
            second_moments={name: state["exp_avg_sq"] for name, state in moments.items()},
            best=self.best,
        )

    def _take(self, stored: TrainingState) -> None:
        """Go on where a stored state ends."""
        facts = stored.facts
        self.step, self.best_step, self.tokens = stored.step, facts["best_step"], facts["tokens"]
        self.earlier, self.training_seconds = facts["seconds"], facts["training_seconds"]
        self.curve = [Step(**row) for row in facts["curve"]]
        self.evaluations = [Evaluation(**row) for row in facts["evaluations"]]
        self.best = {name: tensor.to(self.device) for name, tensor in stored.best.items()}
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(stored.parameters[name])
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(stored.step), device=self.device),
                    "exp_avg": stored.first_moments[name].to(self.device),
                    "exp_avg_sq": stored.second_moments[name].to(self.device),
                }
