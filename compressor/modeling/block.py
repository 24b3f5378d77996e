"""The block of a compressed GPT-2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Block

from .attention import CompressedAttention, stage_maps
from .combined import put_parts
from .fractal import FewerHeads, few_heads
from .shaped import BranchGains
from .shared_ffn import LayerFFN
from .streams import residual
from .tversky_layers import TverskyFFN


class GPT2CompressedBlock(GPT2Block):
    """GPT-2's block; attention and FFN are handed the trunk's banks where they use them."""

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        group: int | None = None,
        places: dict | None = None,
        efficient: dict | None = None,
    ):
        super().__init__(config, layer_idx=layer_idx)
        places = places or {}
        self.shares_ffn = group is not None
        shaped = config.shaped_attention
        shaped = shaped if shaped and layer_idx in shaped["layers"] else None
        self.values_apart = stage_maps(config, layer_idx)[0] is not None
        self.other_attention = (
            efficient is not None
            or bool(places.keys() & {"q", "k", "v", "attn_out"})
            or bool(config.alibi or self.values_apart or shaped)
        )
        self.tversky_ffn = bool(places.keys() & {"c_fc", "mlp_out", "mlp_block"})
        if config.matryoshka and config.matryoshka["ffn_of_layers"]:
            self.mlp = GPT2MLP(config.matryoshka["ffn_of_layers"][layer_idx], config)
        if group is not None:
            entry = config.ffn_groups[group]
            self.mlp = LayerFFN(config, group, entry["rank"], entry["bias"])  # type: ignore[assignment]
        if self.other_attention:
            self.attn = CompressedAttention(config, layer_idx, places, efficient)
        if self.tversky_ffn:
            self.mlp = TverskyFFN(config, places)  # type: ignore[assignment]
        if self.values_apart and config.token_factored["value_norm"]:
            self.ln_v: nn.Module = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        elif self.values_apart:
            self.ln_v = nn.Identity()
        self.gains = BranchGains() if shaped and shaped["parallel"] else None
        if few_heads(config):
            self.attn = FewerHeads(config, layer_idx)
        if config.combined:
            put_parts(self, config)

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        past_key_values=None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        use_cache: bool | None = False,
        ffn_bank: nn.ModuleList | None = None,
        feature_bank: nn.ModuleDict | None = None,
        real: Tensor | None = None,
        weights_too: bool = False,
        bias_share: float = 1.0,
        **kwargs,
    ) -> Tensor:
        """hidden_states float[batch, tokens, d], or of two streams [2, batch, tokens, d]; returns the same."""
        streams = hidden_states.ndim == 4
        x = residual(hidden_states)
        extra: dict[str, Any] = {}
        if self.other_attention:
            extra = {"feature_bank": feature_bank, "real": real, "weights_too": weights_too, "bias_share": bias_share}
        if self.values_apart:
            extra["value_states"] = self.ln_v(hidden_states[1])
        attention, _ = self.attn(
            self.ln_1(x),
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            use_cache=use_cache,
            **extra,
            **kwargs,
        )
        if self.gains is not None:
            attention = self.gains.attention * attention
            x = x + attention + self.gains.ffn * self._ffn(self.ln_2(x), ffn_bank, feature_bank)
        else:
            x = x + attention
            x = x + self._ffn(self.ln_2(x), ffn_bank, feature_bank)
        return torch.stack([x, hidden_states[1] + attention]) if streams else x

    def _ffn(self, normed: Tensor, ffn_bank: nn.ModuleList | None, feature_bank: nn.ModuleDict | None) -> Tensor:
        if self.shares_ffn:
            return self.mlp(normed, ffn_bank)
        return self.mlp(normed, feature_bank) if self.tversky_ffn else self.mlp(normed)
