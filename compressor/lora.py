"""Low-rank adapters on the linears of a model's blocks, y = W x + (alpha / rank) B A x, and their exact merge.

Source: LoRA, arXiv 2106.09685. For models without deltas of their own, and for the control. A shared FFN stands once in
the bank and gets one adapter; embeddings and the tied head never get one. Adapters exist while a model trains and are
merged before anybody sees it, so a plain GPT-2 stays one. Where weights must stay 0 the adapter's product is 0 too, in
training as in the merge (MaskLoRA of PERP, arXiv 2312.15230).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from . import gpt2
from .errors import UserError

RANK = 8
ALPHA = 16.0


class LowRankAdapter(nn.Module):
    """A linear and what is added to its output: scale (x A) B, with A [in, rank], B [rank, out]. It begins as nothing
    (B = 0) that trains at once (A is not 0).

    zero: of a plain GPT-2 linear, bool[in, out], the entries of its weight that stay 0. The product A B is formed in
    every pass then, so that a step costs about what training the weight itself does.
    """

    def __init__(
        self,
        linear: Conv1D | nn.Linear,
        rank: int,
        alpha: float,
        generator: torch.Generator | None,
        zero: Tensor | None = None,
    ):
        super().__init__()
        self.linear = linear
        self.scale = alpha / rank
        self.zero = zero
        weight = linear.weight
        width_in, width_out = weight.shape if isinstance(linear, Conv1D) else weight.T.shape
        # the spread of LoRA's own start; drawn on the CPU, so that every device begins alike
        start = torch.randn(width_in, rank, generator=generator) * (3 * width_in) ** -0.5
        self.low_rank_a = nn.Parameter(start.to(weight))
        self.low_rank_b = nn.Parameter(weight.new_zeros(rank, width_out))

    @property
    def weight(self) -> Tensor:
        """The linear's own weight: rewrites look it up."""
        return self.linear.weight

    @property
    def bias(self) -> Tensor | None:
        return self.linear.bias

    def forward(self, x: Tensor, *arguments: Tensor | None) -> Tensor:  # float[..., in] -> float[..., out]
        if self.zero is not None:
            change = (self.scale * (self.low_rank_a @ self.low_rank_b)).masked_fill(self.zero, 0)
            flat = torch.addmm(self.linear.bias, x.reshape(-1, x.size(-1)), self.linear.weight + change)
            return flat.view(*x.shape[:-1], flat.size(-1))
        y = self.linear(x, *arguments)
        narrow = x.reshape(-1, x.size(-1)) @ self.low_rank_a
        return torch.addmm(y.view(-1, y.size(-1)), narrow, self.low_rank_b, alpha=self.scale).view_as(y)

    def effective(self) -> Tensor:
        """The weight as it acts, [as the linear's own], with gradients."""
        change = self.scale * (self.low_rank_a @ self.low_rank_b)
        if self.zero is not None:
            change = change.masked_fill(self.zero, 0)
        return self.linear.weight + (change if isinstance(self.linear, Conv1D) else change.T)

    @torch.no_grad()
    def merge(self) -> None:
        """W += scale A B, in float64 on the CPU (not every accelerator has it), rounded once."""
        if not self.low_rank_b.any():
            return
        change = self.scale * (self.low_rank_a.cpu().double() @ self.low_rank_b.cpu().double())
        if self.zero is not None:
            change.masked_fill_(self.zero.cpu(), 0)
        weight = self.linear.weight
        weight.copy_(weight.cpu().double() + (change if isinstance(self.linear, Conv1D) else change.T))


def attach(
    model: PreTrainedModel,
    *,
    rank: int = RANK,
    alpha: float = ALPHA,
    generator: torch.Generator | None = None,
    zeros: Sequence[tuple[nn.Parameter, Tensor]] = (),
) -> list[nn.Parameter]:
    """Put an adapter around every linear of the blocks and of the bank; returns the adapters' parameters.

    zeros: weights of plain linears, each with a mask, bool[in, out], of what stays 0 in it. The model computes what it
    did before. Nothing else is frozen: that is the trainer's business. Raises UserError for a rank below 1, a model
    that has adapters already or no linear, and linears that share one weight (it would be merged twice).
    """
    if rank < 1:
        raise UserError(f"lora rank is {rank}; allowed: 1 or more")
    if adapters(model):
        raise UserError("this model has adapters already; merge or detach them first")
    places = [
        (parent, name, child)
        for root in _roots(model)
        for parent in root.modules()
        for name, child in parent.named_children()
        if isinstance(child, (Conv1D, nn.Linear))
    ]
    if not places:
        raise UserError("the blocks of this model have no linear to put an adapter on; train=deltas or train=full")
    if len({child.weight.data_ptr() for _, _, child in places}) < len(places):
        raise UserError("two linears of this model share one weight: an adapter on each would be merged twice")
    masks = {id(weight): mask for weight, mask in zeros}
    for parent, name, child in places:
        setattr(parent, name, LowRankAdapter(child, rank, alpha, generator, masks.get(id(child.weight))))
    return [parameter for adapter in adapters(model) for parameter in (adapter.low_rank_a, adapter.low_rank_b)]


def adapters(model: PreTrainedModel) -> list[LowRankAdapter]:
    """The adapters of a model, in its order."""
    return [child for _, _, child in _places(model)]


def effective_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every parameter by the key that it has without adapters, with what the adapters add to it; with gradients."""
    found: dict[str, Tensor] = {}
    wrapped = {id(adapter.linear): adapter for adapter in adapters(model)}
    for path, module in model.named_modules():
        if isinstance(module, LowRankAdapter):
            continue
        adapter = wrapped.get(id(module))
        own = path if adapter is None else path.rpartition(".")[0]
        for name, parameter in module.named_parameters(recurse=False):
            found[f"{own}.{name}"] = adapter.effective() if adapter is not None and name == "weight" else parameter
    return found


def merge(model: PreTrainedModel) -> None:
    """Add every adapter to its linear's weight and put the linear back: modules and state dict are as before `attach`,
    and the logits those with the adapters, up to rounding."""
    for adapter in adapters(model):
        adapter.merge()
    detach(model)


def detach(model: PreTrainedModel) -> None:
    """Put every linear back as it was and forget its adapter."""
    for parent, name, adapter in _places(model):
        setattr(parent, name, adapter.linear)


def _roots(model: PreTrainedModel) -> list[nn.Module]:
    """Where linears may be adapted: blocks and bank, never the embeddings or the head."""
    bank = [gpt2.bank(model)] if hasattr(gpt2.trunk(model), "ffn_bank") else []
    return [gpt2.blocks(model), *bank]


def _places(model: PreTrainedModel) -> list[tuple[nn.Module, str, LowRankAdapter]]:
    return [
        (parent, name, child)
        for root in _roots(model)
        for parent in root.modules()
        for name, child in parent.named_children()
        if isinstance(child, LowRankAdapter)
    ]
