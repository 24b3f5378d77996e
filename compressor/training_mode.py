"""What is switched on while a model trains, and off again after: which parameters, dropout, precision, fast kernels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import gpt2
from .errors import UserError

# Up to this context the plain attention's backward beats the fused one's on a CPU in bfloat16 (256 tokens: 1.2 to 1.5
# times for a whole layer); at 1024 tokens it is the other way round, and in float32 they are alike.
_EAGER_CONTEXT = 512


def autocast_dtype(wanted: str, device: torch.device) -> torch.dtype | None:
    """The dtype of the products while training: bfloat16 where the machine computes in it, None for the weights' own.

    wanted: auto | bfloat16 | none. Raises UserError for another word.
    """
    if wanted not in ("auto", "bfloat16", "none"):
        raise UserError(f"autocast is {wanted!r}; allowed: auto, bfloat16, none")
    return torch.bfloat16 if wanted == "bfloat16" or (wanted == "auto" and _has_bfloat16(device)) else None


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":  # elsewhere oneDNN emulates it, slower than float32
        if not hasattr(torch.cpu, "get_capabilities"):  # an older torch
            return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())
        known = torch.cpu.get_capabilities()
        return bool(known.get("avx512_bf16") or known.get("amx_bf16") or known.get("bf16"))
    return False


def tokens_at_once(device: torch.device) -> int:
    """How many tokens a forward pass takes while training: what keeps the device busy, and no more memory."""
    return 2048 if device.type == "cpu" else 16384


def attention_while_training(model: PreTrainedModel, context: int, autocast: torch.dtype | None) -> str:
    """Which attention implementation trains fastest here."""
    if gpt2.device(model).type == "cpu" and autocast is not None and context <= _EAGER_CONTEXT:
        return "eager"
    return model.config._attn_implementation


@contextmanager
def zeros_held(zeros: Sequence[tuple[nn.Parameter, Tensor]]) -> Iterator[None]:
    """The masked entries of each parameter, which are 0, get no gradient: neither AdamW nor its decay moves them then.
    Parameters that get none at all are left alone."""
    hooks = [
        parameter.register_hook(lambda gradient, mask=mask: gradient.masked_fill(mask, 0))
        for parameter, mask in zeros
        if parameter.requires_grad
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def training(
    model: PreTrainedModel, parameters: Sequence[nn.Parameter], *, attention: str, dropout: bool
) -> Iterator[None]:
    """Only `parameters` get gradients; dropout as told; the attention implementation; GPT-2's GELU as one
    kernel. All comes back as it was."""
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    modes = [(module, module.training) for module in model.modules()]
    attention_before = model.config._attn_implementation
    try:
        model.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        model.train(dropout)
        if attention != attention_before:
            model.set_attn_implementation(attention)
        with gpt2.fused_activations(model):
            yield
    finally:
        if attention != attention_before:
            model.set_attn_implementation(attention_before)
        for module, mode in modes:
            module.training = mode
        for parameter, flag in required.items():
            parameter.requires_grad_(flag)
            parameter.grad = None
