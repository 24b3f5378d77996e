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
from torch import Tensor, nn

from . import training_state
from .errors import UserError
from .processes import Processes
from .rewrites import Rewrite
from .training_loss import Objective
from .training_rows import Rows
from .training_schedule import batch_rows, mixed_seed, rate_factor
from .training_state import StateFolder, TrainingState


@dataclass(frozen=True)
class Step:
    """One step of the loss curve. Losses are per prediction (a token; a classifier's are of texts), in nats."""

    step: int  # 1 is the first
    nll: float
    divergence: float | None  # KL(teacher || model); None without a teacher
    penalty: float | None  # mean over the rewrites, before its weight; None where there is none
    gradient_norm: float  # before clipping
    learning_rate: float


@dataclass(frozen=True)
class Evaluation:
    """The exact NLL per prediction on the selection data after so many steps."""

    step: int
    nll: float
    tokens: int  # predicted; texts where a classifier is trained


class Loop:
    """The state of a training, and the way from one step to the next."""

    def __init__(
        self,
        *,
        objective: Objective,
        parameters: dict[str, nn.Parameter],
        training: Rows,
        selection: Rows | None,
        rewrites: Sequence[Rewrite],
        settings: dict[str, Any],
        processes: Processes,
        device: torch.device,
        rows: int,
        forward_tokens: int,
        progress: Callable[[Step], None],
    ):
        self.parameters, self.training, self.selection = parameters, training, selection
        self.rewrites, self.settings, self.processes, self.device = rewrites, settings, processes, device
        self.rows, self.forward_tokens, self.progress = rows, forward_tokens, progress
        self.model, self.objective = objective.model, objective
        self.annealed = any(rewrite.anneals(objective.model) for rewrite in rewrites)
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
            with self.processes.main_first():  # it tidies up what a kill left
                stored = training_state.load(folder, self.settings)
        if stored is not None:
            self._take(stored)
        else:
            if folder is not None and self.processes.main:
                training_state.remove(folder)
            self._evaluate()
        self.wrapped = self.processes.share_gradients(
            self.objective, some_idle=self.annealed or self.objective.some_idle
        )

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
            if storing and self.processes.main:
                assert folder is not None
                training_state.save(folder, self._state())
        self.processes.wait()

    def _train(self) -> None:
        """One step: this process's rows of the global batch, in as many forward passes as they need."""
        settings, processes = self.settings, self.processes
        progress = self.step / (settings["steps"] - 1) if settings["steps"] > 1 else 1.0
        for rewrite in self.rewrites:
            rewrite.on_step(self.model, progress)
        self.objective.begin_step(self.step)
        batch = batch_rows(len(self.training), self.rows, self.step, settings["seed"])
        count = max(1, self.training.count(batch))  # of all processes: known without asking them
        passes = self.training.passes(batch[processes.rank :: processes.world], self.forward_tokens) or [[]]
        sums = torch.zeros(2, device=self.device, dtype=self.model.dtype)
        term = None
        with self._random():
            for index, rows in enumerate(passes):
                # more processes than rows: take part, count nothing
                tensors = self.training.tensors(rows or batch[:1], counted=bool(rows))
                inputs = [None if tensor is None else tensor.to(self.device) for tensor in tensors]
                last = index == len(passes) - 1
                with nullcontext() if last else processes.gradients_apart(self.wrapped):
                    loss, part, term = self.wrapped(*inputs, with_penalty=last)
                    loss = loss * (processes.world / count)  # gradients are averaged over the processes
                    (loss if term is None else loss + settings["penalty"] * term).backward()
                sums += part
        parameters = list(self.parameters.values())
        for parameter in parameters:
            if parameter.grad is None:  # idle while another fades in or out; it steps with the rest all the same
                parameter.grad = torch.zeros_like(parameter)
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
            torch.manual_seed(mixed_seed(self.settings["seed"], 2, self.step, self.processes.rank))
            yield

    def _flush(self) -> None:
        """Pending steps into the curve. Raises UserError at the first whose numbers are not finite."""
        if not self.pending:
            return
        rows = torch.stack([numbers for _, _, numbers in self.pending])
        rows[:, :2] = self.processes.all_sum(rows[:, :2].contiguous())
        for (step, count, _), (nll, divergence, norm, term) in zip(self.pending, rows.tolist(), strict=True):
            if not math.isfinite(nll + divergence + norm):
                raise self._diverged(step, "loss or gradient")
            rate = self.settings["learning_rate"]
            row = Step(
                step=step,
                nll=nll / count,
                divergence=divergence / count if self.objective.distilled else None,
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
        """The NLL on the selection data, and the best state so far."""
        if self.selection is None:
            self._keep()
            return
        nll, tokens = self._selection_nll(self.selection)
        if not math.isfinite(nll) and self.step == 0:
            raise UserError("the model's loss on the selection data is not a finite number before any training")
        if not math.isfinite(nll):
            raise self._diverged(self.step, "selection loss")
        if self.annealed or nll < min((earlier.nll for earlier in self.evaluations), default=math.inf):
            self._keep()
        self.evaluations.append(Evaluation(self.step, nll, tokens))

    def _selection_nll(self, rows: Rows) -> tuple[float, int]:
        """Exact mean NLL per prediction and their number; each process takes its share of the rows."""
        share = range(self.processes.rank, len(rows), self.processes.world)
        total = torch.tensor(self.objective.selection_nll(rows, share), dtype=torch.float64)
        if self.processes.world > 1:
            total = self.processes.all_sum(total.to(self.device)).cpu()
        count = rows.count(range(len(rows)))
        return float(total) / max(1, count), count

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
            objective=self.objective.state(),
        )

    def _take(self, stored: TrainingState) -> None:
        """Go on where a stored state ends."""
        facts = stored.facts
        self.step, self.best_step, self.tokens = stored.step, facts["best_step"], facts["tokens"]
        self.earlier, self.training_seconds = facts["seconds"], facts["training_seconds"]
        self.curve = [Step(**row) for row in facts["curve"]]
        self.evaluations = [Evaluation(**row) for row in facts["evaluations"]]
        self.best = {name: tensor.to(self.device) for name, tensor in stored.best.items()}
        self.objective.take_state(stored.objective)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(stored.parameters[name])
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(stored.step), device=self.device),
                    # laid out in memory as the parameter is, which AdamW in one kernel takes for granted
                    "exp_avg": torch.empty_like(parameter).copy_(stored.first_moments[name]),
                    "exp_avg_sq": torch.empty_like(parameter).copy_(stored.second_moments[name]),
                }
