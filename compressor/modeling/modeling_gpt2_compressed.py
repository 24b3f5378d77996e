"""The model of a compressed checkpoint: GPT-2 whose layers may share FFNs through a bank on the trunk.

State dict: `transformer.h.{i}.{ln_1,attn,ln_2}` as in GPT-2; a layer outside every group keeps `mlp.{c_fc,c_proj}`;
`transformer.ffn_bank.{g}.{c_fc,c_proj}` holds each shared FFN once; a layer of a group holds only
`mlp.{c_fc,c_proj}.{delta_a,delta_b,bias}`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel, GPT2Model, GPT2PreTrainedModel
from transformers import initialization as init
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from .configuration_gpt2_compressed import GPT2CompressedConfig
from .shared_ffn import LayerDelta, LayerFFN, SharedFFN


class GPT2CompressedBlock(GPT2Block):
    """GPT-2's block; the FFN is handed the trunk's bank where it belongs to a group."""

    def __init__(self, config: Any, layer_idx: int, group: int | None = None):
        super().__init__(config, layer_idx=layer_idx)
        self.shares_ffn = group is not None
        if group is not None:
            entry = config.ffn_groups[group]
            self.mlp = LayerFFN(config, group, entry["rank"], entry["bias"])  # type: ignore[assignment]

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        past_key_values=None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        use_cache: bool | None = False,
        ffn_bank: nn.ModuleList | None = None,
        **kwargs,
    ) -> Tensor:
        attention, _ = self.attn(
            self.ln_1(hidden_states),
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = hidden_states + attention
        normed = self.ln_2(hidden_states)
        return hidden_states + (self.mlp(normed, ffn_bank) if self.shares_ffn else self.mlp(normed))


class GPT2CompressedPreTrainedModel(GPT2PreTrainedModel):
    config_class = GPT2CompressedConfig
    config: GPT2CompressedConfig
    _no_split_modules = ["GPT2CompressedBlock"]  # noqa: RUF012 (transformers' convention)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LayerDelta):  # A ~ N, B = 0: starts as no delta, and trains
            if module.rank:
                init.normal_(module.delta_a, mean=0.0, std=self.config.initializer_range)
                init.zeros_(module.delta_b)
            if module.bias is not None:
                init.zeros_(module.bias)


class GPT2CompressedModel(GPT2CompressedPreTrainedModel, GPT2Model):
    """The trunk."""

    def __init__(self, config: GPT2CompressedConfig):
        super().__init__(config)
        d, d_ff = config.hidden_size, config.n_inner if config.n_inner is not None else 4 * config.hidden_size
        groups = config.ffn_groups or []
        group_of = {layer: g for g, entry in enumerate(groups) for layer in entry["layers"]}
        self.h = nn.ModuleList(
            [GPT2CompressedBlock(config, layer, group_of.get(layer)) for layer in range(config.num_hidden_layers)]
        )
        self.ffn_bank = nn.ModuleList([SharedFFN(d, d_ff, entry["bias"] == "shared") for entry in groups])
        self.post_init()

    def block_arguments(self) -> dict:
        """What every block of this trunk must be called with besides GPT-2's own arguments."""
        return {"ffn_bank": self.ffn_bank}

    def forward(self, *args, **kwargs):
        return super().forward(*args, **{**kwargs, **self.block_arguments()})


class GPT2CompressedLMHeadModel(GPT2CompressedPreTrainedModel, GPT2LMHeadModel):
    """The language model."""

    def __init__(self, config: GPT2CompressedConfig):
        super().__init__(config)
        self.loss_type = "ForCausalLM"
        self.transformer = GPT2CompressedModel(config)
        self.post_init()


class GPT2CompressedForSequenceClassification(GPT2CompressedPreTrainedModel, GPT2ForSequenceClassification):
    """The classifier; needs `config.pad_token_id` for batches of more than one."""

    def __init__(self, config: GPT2CompressedConfig):
        super().__init__(config)
        self.transformer = GPT2CompressedModel(config)
        self.post_init()
