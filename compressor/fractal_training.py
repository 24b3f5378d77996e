"""The loss of models side by side in one: of the whole on all rows, and of each part on the rows that are its own.

Which rows are a part's own belongs to the blocks of text, so that it sees the same stream in every epoch, whatever the
forward passes and processes; a part's loss counts as many times as its share of the rows is small, which is its mean
loss wherever the shares are equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from . import gpt2, lora
from .errors import UserError
from .modeling.fractal import OWN, TRUNK, Part, parted
from .modeling.modeling_gpt2_compressed import empty_part, parted_model
from .rewrites import Rewrite
from .rewrites.base import Divided
from .rewrites.partition import divide, fall_into
from .tokens import TokenBlocks
from .training_loss import TokenObjective, token_losses
from .training_rows import Rows, TokenRows
from .training_schedule import batch_rows


@dataclass(frozen=True)
class StreamRows(TokenRows):
    """Token blocks that fall into streams, one for each of the smallest parts."""

    stream: Tensor | None = None  # int64[blocks]; None: every block is every part's own

    def tensors(self, rows: Sequence[int], *, counted: bool = True) -> tuple[Tensor | None, ...]:
        """Those of TokenRows and the stream of each row, int64[rows]."""
        stream = None if self.stream is None else self.stream[list(rows)]
        return *super().tensors(rows, counted=counted), stream


def stream_rows(
    model: GPT2LMHeadModel, divided: Divided, blocks: TokenBlocks, evaluation: TokenBlocks | None, *, seed: int
) -> tuple[StreamRows, StreamRows | None]:
    """Training and selection rows in streams. Streams of rows are the places in the order of the first epoch, one after
    the other in turns; of other text there are none then. Clusters are of other text too. Raises UserError for fewer
    blocks than streams."""
    count = model.config.fractal["split"] ** model.config.fractal["levels"]
    judged = None if evaluation is None else StreamRows(evaluation)
    if divided.share == "all":
        return StreamRows(blocks), judged
    if len(blocks.ids) < count:
        raise UserError(
            f"fractal: {count} parts which train on text of their own need as many blocks; the {blocks.part} part "
            f"of {blocks.source} gives {len(blocks.ids)}; give more text or steps, or share=all"
        )
    if divided.stream == "rows":
        order = torch.tensor(batch_rows(len(blocks.ids), len(blocks.ids), 0, seed))
        stream = torch.empty_like(order)
        stream[order] = torch.arange(len(order)) % count
        return StreamRows(blocks, stream), judged
    division, stream = divide(mean_embeddings(model, blocks), count)
    if evaluation is not None:
        judged = StreamRows(evaluation, fall_into(division, mean_embeddings(model, evaluation), count))
    return StreamRows(blocks, stream), judged


@torch.no_grad()
def mean_embeddings(model: GPT2LMHeadModel, blocks: TokenBlocks) -> Tensor:
    """Of the tokens of each block, float64[blocks, d]."""
    table, found = gpt2.embeddings(model).cpu().double(), []
    for ids, mask in blocks.batches():
        total = (table[ids] * mask[..., None]).sum(1)
        found.append(total / mask.sum(1, keepdim=True).clamp_min(1))
    return torch.cat(found)


def of_part(stream: Tensor, part: Part, config: Any) -> Tensor:
    """bool: which streams a part has."""
    entry = config.fractal
    return stream // entry["split"] ** (entry["levels"] - part.level) == part.place


class DividedObjective(TokenObjective):
    """The mean over the whole model and its parts of the loss of next tokens. The whole learns as `TokenObjective` has
    it; a part by (1 - inner) NLL + inner KL(whole || part) of its rows, of the whole's predictions in the same pass."""

    def __init__(
        self,
        model: GPT2LMHeadModel,
        teacher: GPT2LMHeadModel | None,
        mix: float,
        penalised: Sequence[Rewrite],
        low: torch.dtype | None,
        *,
        divided: Divided,
    ):
        super().__init__(model, teacher, mix, penalised, low)
        self.distilled = self.distilled or divided.inner > 0
        self.divided = divided
        self.empty: dict[int, Any] = {}  # by level: its parts are alike

    def forward(  # type: ignore[override]
        self, ids: Tensor, mask: Tensor | None, stream: Tensor | None, with_penalty: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As of TokenObjective; NLL and KL are means over the models. stream: int64[rows]; None: all rows are every
        part's."""
        config, inner = self.model.config, self.divided.inner
        loss, sums, (hidden, head) = self._whole_losses(ids, mask)
        whole = hidden.detach().unflatten(0, (len(ids), -1)), head.detach()
        tensors = lora.effective_tensors(self.model)
        for part in self.divided.parts:
            rows = torch.ones_like(ids[:, 0], dtype=torch.bool) if stream is None else of_part(stream, part, config)
            if not rows.any():  # what is its alone takes part for those who wait for it
                prefix = f"{TRUNK}{OWN}.{part.name}."
                loss = loss + 0 * sum(tensor.sum() for key, tensor in tensors.items() if key.startswith(prefix))
                continue
            own_ids, own_mask = ids[rows], None if mask is None else mask[rows]
            wanted = slice(None) if own_mask is None else own_mask[:, 1:].reshape(-1)
            left = self._part_states(tensors, part, own_ids, own_mask)
            own, more = token_losses(
                left[wanted], head, own_ids[:, 1:].reshape(-1)[wanted], mix=inner, dtype=self.low,
                teacher_hidden=whole[0][rows].flatten(0, 1)[wanted] if inner else None,
                teacher_weight=whole[1] if inner else None,
            )  # fmt: skip
            weight = 1 if stream is None else config.fractal["split"] ** part.level
            loss, sums = loss + weight * own, sums + weight * more
        count = 1 + len(self.divided.parts)
        return loss / count, sums / count, self._penalty() if with_penalty else None

    def _part_states(self, tensors: dict[str, Tensor], part: Part, ids: Tensor, mask: Tensor | None) -> Tensor:
        """The final states of a part, as `_states` has them."""
        if part.level not in self.empty:
            self.empty[part.level] = empty_part(self.model.config, part)
        own = parted(tensors, self.model.config, part)
        trunk = {key.removeprefix(TRUNK): tensor for key, tensor in own.items() if key.startswith(TRUNK)}
        return self._cut_states(self.empty[part.level], trunk, ids, mask)

    def selection_nll(self, rows: Rows, share: Sequence[int]) -> float:
        """The mean over the whole and all parts, each part on the rows that are its own, as if they were all rows."""
        stream, config = getattr(rows, "stream", None), self.model.config
        total = rows.nll(self.model, share)
        with torch.no_grad():
            tensors = {key: tensor.detach() for key, tensor in lora.effective_tensors(self.model).items()}
            for part in self.divided.parts:
                kept, weight = list(share), 1.0
                if stream is not None:
                    mine = of_part(stream, part, config)
                    own = rows.count(mine.nonzero()[:, 0].tolist())
                    if own:  # of a stream without selection text the part is judged on all
                        kept = [row for row in share if mine[row]]
                        weight = rows.count(range(len(rows))) / own
                total += weight * rows.nll(parted_model(tensors, config, part), kept)
        return total / (1 + len(self.divided.parts))
