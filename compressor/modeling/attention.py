"""The attention of a compressed GPT-2: what its linears are, and how the values are mixed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.gpt2.modeling_gpt2 import ALL_ATTENTION_FUNCTIONS, GPT2Attention, eager_attention_forward
from transformers.pytorch_utils import Conv1D

from .alibi import WIDER, AlibiSlopes
from .block_attention import BlockAttention, Far, implied_weights, state_layer
from .linformer import LinformerFar
from .nystromformer import NystromFar
from .performer import PerformerFar
from .shaped import AttentionShape
from .streams import STAGES, stream_map
from .tversky_layers import TverskyPlace, TverskyQKV

KINDS = ("linformer", "nystromformer", "performer")  # of what may stand for completed blocks


class CompressedAttention(GPT2Attention):
    """found: target -> place of its Tversky projections; entry: of the config's `efficient_attention`, None = GPT-2's
    softmax over all tokens. The config's attn_pdrop drops weights of that softmax only. What the config's `alibi`,
    `token_factored` and `shaped_attention` say of this layer is built too."""

    def __init__(self, config: Any, layer_idx: int, found: dict[str, TverskyPlace], entry: dict | None):
        super().__init__(config, layer_idx=layer_idx)
        d = config.hidden_size
        if found.keys() & set("qkv"):
            parts = {name: found[name].make() if name in found else Conv1D(d, d) for name in "qkv"}
            self.c_attn = TverskyQKV(parts, {name: found[name].key for name in "qkv" if name in found})  # type: ignore
        self.key_out = found["attn_out"].key if "attn_out" in found else None
        if "attn_out" in found:
            self.c_proj = found["attn_out"].make()  # type: ignore[assignment]
        values, outputs = stage_maps(config, layer_idx)
        if values is not None:
            del self.c_attn
            self.c_qk, self.c_v = Conv1D(2 * d, d), stream_map(values, config, bias=False)
        self.out_map = None
        if outputs is not None:
            del self.c_proj
            self.out_map = stream_map(outputs, config, bias=config.token_factored["bias"])
        self.scores = None if entry is None else BlockAttention(entry["block"], far_of(entry, self))
        self.alibi = AlibiSlopes(self.num_heads, config.alibi["first"]) if config.alibi else None
        shaped = config.shaped_attention
        self.shape = AttentionShape(self.num_heads) if shaped and layer_idx in shaped["layers"] else None

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        past_key_values=None,
        attention_mask: Tensor | None = None,
        feature_bank=None,
        real: Tensor | None = None,
        weights_too: bool = False,
        value_states: Tensor | None = None,
        bias_share: float = 1.0,
        **kwargs,
    ):
        """real: bool[batch, tokens so far], False = pad. weights_too: of attention in blocks, which else has none.
        value_states: what values are made of where that is not hidden_states. bias_share: of ALiBi's bias."""
        query, key, value = self.heads(hidden_states, feature_bank, value_states)
        if self.scores is None:
            mixed, weights = self._softmax(
                query, key, value, past_key_values, attention_mask, real=real, bias_share=bias_share, **kwargs
            )
        else:
            weights = None
            layer = state_layer(past_key_values, self.layer_idx)
            tokens = hidden_states.shape[1]
            so_far = tokens + (0 if layer is None else layer.tokens)
            if real is not None and real.shape[1] != so_far:
                raise ValueError(f"attention_mask has {real.shape[1]} tokens; allowed: all so far, {so_far}")
            here = None if real is None else real[:, -tokens:]
            if weights_too:
                if layer is not None and layer.state:
                    raise ValueError("attention in blocks keeps no weights of tokens before; pass use_cache=False")
                weights = implied_weights(self.scores, query, key, scaling=self.scaling, real=here)
            mixed = self.scores(query, key, value, scaling=self.scaling, real=here, layer=layer).transpose(1, 2)
        mixed = mixed.reshape(*hidden_states.shape)
        if self.out_map is not None:
            out = self.out_map(mixed)
        else:
            out = self.c_proj(mixed) if self.key_out is None else self.c_proj(mixed, feature_bank[self.key_out])
        return self.resid_dropout(out), weights

    def heads(
        self, hidden_states: Tensor, feature_bank=None, value_states: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values float[batch, heads, tokens, head_dim] of float[batch, tokens, d]."""
        if value_states is not None:
            parts = (*self.c_qk(hidden_states).split(self.split_size, dim=2), self.c_v(value_states))
        elif isinstance(self.c_attn, TverskyQKV):
            parts = self.c_attn(hidden_states, feature_bank)
        else:
            parts = self.c_attn(hidden_states).split(self.split_size, dim=2)
        shape = (*hidden_states.shape[:-1], self.num_heads, self.head_dim)
        query, key, value = (part.reshape(shape).transpose(1, 2) for part in parts)
        return query, key, value

    def _softmax(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: Any,
        mask: Tensor | None,
        *,
        real: Tensor | None,
        bias_share: float,
        **kwargs,
    ):
        """GPT-2's own, with ALiBi's bias and in its shape where it has them: [batch, tokens, heads, head_dim] and,
        where the implementation has them, the weights."""
        start = 0 if cache is None else int(cache.get_seq_length(self.layer_idx))  # a static one counts on in place
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        values = value[:, :, : start + query.shape[2]]  # of a static cache all are as long as it may get
        kind = self.config._attn_implementation
        wider = 0
        if self.alibi is not None and bias_share:
            first = query.new_zeros(1, dtype=torch.int64) if real is None else real.int().argmax(1)
            if query.shape[2] == 1 and kind in ("eager", "sdpa"):  # nothing is copied
                mask = _with_bias(mask, self.alibi.bias(query, key.shape[2], start, bias_share, first))
            else:
                query, key = self.alibi.widened(query, key, start, bias_share, self.scaling, first)
                wider = 0 if kind == "eager" else WIDER
                value = nn.functional.pad(value, (0, wider))  # fast kernels want them alike
        if kind == "eager" and self.reorder_and_upcast_attn:
            mixed, weights = self._upcast_and_reordered_attn(query, key, value, mask)
        else:
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(kind, eager_attention_forward)
            dropout = self.attn_dropout.p if self.training else 0.0
            mixed, weights = attend(self, query, key, value, mask, dropout=dropout, scaling=self.scaling, **kwargs)
        if wider:
            mixed = mixed[..., :-wider]
        if self.shape is not None:
            mixed = self.shape(mixed, values, None if real is None else real[:, : values.shape[2]])
        return mixed, weights


def _with_bias(mask: Tensor | None, bias: Tensor) -> Tensor:
    """An attention mask, bool or of numbers to add, and a bias: one of numbers to add."""
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return bias.masked_fill(~mask, torch.finfo(bias.dtype).min)
    return mask + bias


def stage_maps(config: Any, layer: int) -> tuple[str | None, str | None]:
    """What makes values and outputs in a layer, of streams.STAGES; None: as in GPT-2."""
    entry = config.token_factored
    return STAGES[entry["stage"]] if entry and layer in entry["layers"] else (None, None)


def far_of(entry: dict, attention: GPT2Attention) -> Far:
    """What an entry of the config's `efficient_attention` puts in the place of completed blocks."""
    heads, width = attention.num_heads, attention.head_dim
    if entry["kind"] == "linformer":
        return LinformerFar(heads if entry["per_head"] else 1, entry["block"], entry["slots"])
    if entry["kind"] == "nystromformer":
        return NystromFar(entry["landmarks"], entry["inverse"])
    return PerformerFar(heads, width, entry["features"], entry["feature_map"], entry["seed"], entry["local"])
