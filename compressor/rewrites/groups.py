"""Groups of layers that share an FFN in the trunk's bank: put into a config, found in a model, folded back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from .. import gpt2, models
from ..modeling import AUTO_MAP, GPT2CompressedConfig
from ..windows import Window


def add_groups(base: GPT2Config, windows: Sequence[Window], *, rank: int, bias: str) -> GPT2CompressedConfig:
    """`base` with one bank entry more for each window; its "start" stays what it was in the original."""
    fields = {key: value for key, value in base.to_dict().items() if key not in ("model_type", "architectures")}
    entries = [{"layers": list(window.layers), "start": window.start, "rank": rank, "bias": bias} for window in windows]
    fields["ffn_groups"] = (fields.get("ffn_groups") or []) + entries
    return GPT2CompressedConfig(**{**fields, "auto_map": dict(AUTO_MAP)})


def group_index(model: GPT2LMHeadModel, layer: int) -> int:
    """The bank entry that a layer of a compressed model uses."""
    return next(g for g, entry in enumerate(model.config.ffn_groups) if layer in entry["layers"])


def fold_groups(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """The same function as plain GPT-2: every layer of a group gets its own dense W_c + A_l B_l."""
    if not isinstance(model.config, GPT2CompressedConfig):
        return model
    fields = model.config.to_dict()
    for key in ("model_type", "architectures", "auto_map", "ffn_groups"):
        fields.pop(key, None)
    dense = models.build(GPT2Config(**fields))
    tensors = {name: tensor for name, tensor in model.state_dict().items() if "ffn_bank" not in name}
    for entry, shared in zip(model.config.ffn_groups or [], gpt2.bank(model), strict=True):
        for layer in entry["layers"]:
            for linear in gpt2.FFN_LINEARS:
                own, base = getattr(gpt2.ffn(model, layer), linear), getattr(shared, linear)
                weight = base.weight.detach()
                if own.rank:
                    weight = (weight.double() + own.delta_a.detach().double() @ own.delta_b.detach().double()).to(
                        weight.dtype
                    )
                    for part in ("delta_a", "delta_b"):
                        del tensors[gpt2.ffn_key(layer, f"{linear}.{part}")]
                tensors[gpt2.ffn_key(layer, f"{linear}.weight")] = weight.clone()
                bias = base.bias if own.bias is None else own.bias
                tensors[gpt2.ffn_key(layer, f"{linear}.bias")] = bias.detach().clone()
    dense.load_state_dict(tensors, assign=True)
    dense.tie_weights()
    dense.generation_config = model.generation_config
    return dense.eval()


def average(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The element-wise mean, summed in float64."""
    return torch.stack([tensor.double() for tensor in tensors]).mean(0)
