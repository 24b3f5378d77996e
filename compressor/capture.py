"""Step 1: run a GPT-2's blocks on token batches and hand the activations of its FFNs to a consumer as they arise.

Nothing is stored: a hook takes the pads out and passes the tensor on, so memory does not grow with the tokens.
Neither the head nor the loss is computed, and no block above the last layer asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import gpt2
from .errors import UserError, unknown

ATTENTION_SITES = ("attention_input", "attention_mixed")
SITES = (*ATTENTION_SITES, "input", "pre", "post", "output")  # in the order in which a block passes them

Batch = tuple[Tensor, Tensor]  # ids int64[rows, context], mask bool[rows, context]
Consumer = Callable[[int, str, Tensor], None]


def capture(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    consumer: Consumer,
    *,
    sites: Sequence[str] = ("pre",),
    layers: Sequence[int] | None = None,
    start: int = 0,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Call `consumer(layer, site, activations)` for each layer and site of each batch; returns the tokens seen.

    Sites of an FFN: "input" = what c_fc gets (after ln_2) [tokens, d]; "pre" = what c_fc gives [tokens, d_ff];
    "post" = what c_proj gets [tokens, d_ff]; "output" = what c_proj gives [tokens, d].
    Of attention: "attention_input" = what c_attn gets [tokens, d]; "attention_mixed" = what c_proj gets, the heads'
    weighted values side by side [tokens, d].

    Within a batch the calls come by ascending layer and, within a layer, in the order of SITES, each exactly once, with
    the tokens of all sites in the same order. `activations` holds the real tokens only and may be a view of what the
    model goes on with: the consumer must not change it. Pads stand at the end of a row, where causal attention keeps
    them out of the real tokens, so no attention mask is needed. About 2048 tokens a batch are best: larger ones are no
    faster and take more memory. `layers` None = all. `progress` gets the tokens of each finished batch. In place of ids
    a batch may hold the hidden states float[rows, context, d] that enter block `start`.

    Modes and hooks are as before when it ends, also by an error. Raises UserError for an unknown site or layer, a row
    longer than the model's positions, and NaN or infinite activations (naming the layer); ValueError for left padding.
    """
    for site in sites:
        if site not in SITES:
            raise unknown("site", site, SITES)
    n_layer = len(gpt2.blocks(model))
    wanted = sorted(set(range(n_layer) if layers is None else layers))
    if not wanted or wanted[0] < start or wanted[-1] >= n_layer:
        raise UserError(f"layers {wanted} cannot be captured; the model has layers {start}..{n_layer - 1}")

    device = next(model.parameters()).device
    mask: Tensor | None = None  # of the batch under way; None = no pads

    def hand_on(layer: int, site: str, activations: Tensor) -> None:
        real = activations.flatten(0, 1) if mask is None else activations[mask]
        if not torch.isfinite(real.sum(dtype=torch.promote_types(real.dtype, torch.float32))):
            raise UserError(
                f"layer {layer} has NaN or infinite activations (site {site}, {real.dtype}); "
                "the weights must be finite, and float16 may need --dtype float32"
            )
        consumer(layer, site, real)

    seen = 0
    with torch.no_grad(), gpt2.evaluating(model), ExitStack() as hooks:
        for layer in wanted:
            for site in SITES:
                if site in sites:
                    hooks.callback(_attach(model, layer, site, hand_on).remove)
        for ids, real_tokens in batches:
            _check(ids, real_tokens, model.config.n_positions)
            tokens = int(real_tokens.sum())
            if tokens == 0:
                continue
            mask = None if tokens == real_tokens.numel() else real_tokens.to(device)
            entry = ids.to(device) if ids.is_floating_point() else gpt2.embed(model, ids.to(device))
            gpt2.run_blocks(model, entry, start, wanted[-1] + 1)
            seen += tokens
            if progress is not None:
                progress(tokens)
    return seen


def _attach(model: PreTrainedModel, layer: int, site: str, hand_on: Consumer) -> torch.utils.hooks.RemovableHandle:
    own = gpt2.attention(model, layer) if site in ATTENTION_SITES else gpt2.ffn(model, layer)
    first = {"attention_input": "c_attn", "input": "c_fc", "pre": "c_fc"}
    linear: nn.Module = own.get_submodule(first.get(site, "c_proj"))
    if site in ("pre", "output"):
        return linear.register_forward_hook(lambda _module, _inputs, output: hand_on(layer, site, output))
    return linear.register_forward_pre_hook(lambda _module, inputs: hand_on(layer, site, inputs[0]))


def _check(ids: Tensor, mask: Tensor, positions: int) -> None:
    if ids.shape[1] > positions:
        raise UserError(f"a row of {ids.shape[1]} tokens is longer than the model's {positions} positions")
    if (mask[:, 1:] & ~mask[:, :-1]).any():
        raise ValueError("pads must stand at the end of a row")
