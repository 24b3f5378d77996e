"""The model of a compressed checkpoint: GPT-2 whose layers may share FFNs and features through banks on the trunk.

State dict: `transformer.h.{i}.{ln_1,attn,ln_2}` as in GPT-2; a layer outside every group keeps `mlp.{c_fc,c_proj}`;
`transformer.ffn_bank.{g}.{c_fc,c_proj}` holds each shared FFN once; a layer of a group holds only
`mlp.{c_fc,c_proj}.{delta_a,delta_b,bias}`. `transformer.feature_bank.{key}.weight` holds the features of Tversky
projections once; a projection (`attn.c_attn.{q,k,v}`, `attn.c_proj`, `mlp.{c_fc,c_proj}`, `mlp.block`,
`lm_head.projection`) holds its prototypes and scalars. With ALiBi a layer holds `attn.alibi.log_slopes`, and `wpe` is
`wpe.first`. In two streams a layer may hold `ln_v`, `attn.{c_qk,c_v}` and `attn.out_map`. A nested model holds in
`transformer.nesting` what belongs to its smaller sizes alone, and `head_map` before the head where it is rotated; one
of parts in `transformer.parts` what belongs to each alone. Of two models combined linears of the blocks hold
`parts.{i}` and `glue.weight`, and `head_map` stands before the head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel, GPT2Model, GPT2PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention
from transformers.pytorch_utils import Conv1D
from transformers.utils.generic import can_return_tuple

from .alibi import AlibiPositions, AlibiSlopes
from .block import GPT2CompressedBlock
from .combined import Glue, PartsNorm
from .configuration_gpt2_compressed import GPT2CompressedConfig
from .fractal import Part, PartLayer, own_vectors, part_config, part_of, parted
from .linformer import LinformerFar
from .nesting import Nesting, RotatedEmbedding, Size, size_of, sliced, sliced_config
from .performer import PerformerFar
from .shaped import AttentionShape, BranchGains
from .shared_ffn import LayerDelta, SharedFFN
from .streams import HeadMixing, StreamDropout, StreamNorm, StreamPositions, residual
from .tversky import FeatureBank, Scalars, TverskyProjection
from .tversky_layers import TverskyHead, feature_banks, tversky_places

_DRAWS_ITSELF = (
    FeatureBank, Scalars, TverskyProjection, LinformerFar, PerformerFar, AlibiPositions, AlibiSlopes, HeadMixing,
    AttentionShape, BranchGains, Nesting, Glue, PartLayer,
)  # fmt: skip


class GPT2CompressedPreTrainedModel(GPT2PreTrainedModel):
    config_class = GPT2CompressedConfig
    config: GPT2CompressedConfig
    _no_split_modules = ["GPT2CompressedBlock"]  # noqa: RUF012 (transformers' convention)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, GPT2Attention | GPT2MLP) and not isinstance(getattr(module, "c_proj", None), Conv1D):
            return  # GPT-2 would scale the weight of a linear that is none
        super()._init_weights(module)
        if isinstance(module, LayerDelta):  # A ~ N, B = 0: starts as no delta, and trains
            if module.rank:
                init.normal_(module.delta_a, mean=0.0, std=self.config.initializer_range)
                init.zeros_(module.delta_b)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, _DRAWS_ITSELF):
            module.reset_parameters()
        elif isinstance(module, TverskyHead):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)


class GPT2CompressedModel(GPT2CompressedPreTrainedModel, GPT2Model):
    """The trunk."""

    def __init__(self, config: GPT2CompressedConfig):
        super().__init__(config)
        d, d_ff = config.hidden_size, config.n_inner if config.n_inner is not None else 4 * config.hidden_size
        groups = config.ffn_groups or []
        group_of = {layer: g for g, entry in enumerate(groups) for layer in entry["layers"]}
        places = tversky_places(config)
        of_layer = [
            {target: place for (layer, target), place in places.items() if layer == index}
            for index in range(config.num_hidden_layers)
        ]
        efficient = {layer: entry for entry in config.efficient_attention or [] for layer in entry["layers"]}
        self.h = nn.ModuleList(
            [
                GPT2CompressedBlock(config, layer, group_of.get(layer), own, efficient.get(layer))
                for layer, own in enumerate(of_layer)
            ]
        )
        self.ffn_bank = nn.ModuleList([SharedFFN(d, d_ff, entry["bias"] == "shared") for entry in groups])
        self.feature_bank = feature_banks(places)
        if config.alibi:
            self.wpe = AlibiPositions(config)  # type: ignore[assignment]
        if config.token_factored:
            if not config.alibi:
                self.wpe = StreamPositions(config.max_position_embeddings, d)
            self.drop = StreamDropout(config.embd_pdrop)
            self.ln_f = StreamNorm(d, eps=config.layer_norm_epsilon)
        if config.matryoshka:
            self.nesting = Nesting(config)
            if config.matryoshka["rotated"]:
                self.wte = RotatedEmbedding(config.vocab_size, d)
        if config.fractal and config.fractal["levels"]:
            self.parts = own_vectors(config)
        if config.combined:
            self.ln_f = PartsNorm(config.combined["widths"], config.layer_norm_epsilon)
        self.post_init()

    def block_arguments(self, attention_mask: Tensor | None = None) -> dict:
        """What every block of this trunk must be called with besides GPT-2's own arguments. attention_mask: bool or
        int[batch, tokens so far], 0 = pad, or one of causal ones, which attention in blocks does not take."""
        found: dict[str, Any] = {"ffn_bank": self.ffn_bank, "feature_bank": self.feature_bank}
        if isinstance(self.wpe, AlibiPositions):
            found["bias_share"] = 1 - self.wpe.share
        config = self.config
        if (config.efficient_attention or config.shaped_attention or config.alibi) and attention_mask is not None:
            if attention_mask.ndim == 2:
                found["real"] = attention_mask.bool()
            elif config.efficient_attention:
                raise ValueError(f"attention in blocks takes masks [batch, tokens], got {list(attention_mask.shape)}")
            else:  # [batch, 1, queries, keys], as for a static cache: what the last query sees
                last = attention_mask[:, 0, -1]
                found["real"] = last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min / 2
        return found

    @can_return_tuple
    def forward(self, input_ids=None, past_key_values=None, attention_mask=None, *args, **kwargs):
        own = self.block_arguments(attention_mask)
        if self.config.efficient_attention:
            own["weights_too"] = bool(kwargs.get("output_attentions", self.config.output_attentions))
        kwargs |= {**own, "return_dict": True}
        found = super().forward(input_ids, past_key_values, attention_mask, *args, **kwargs)
        if found.hidden_states is not None:
            found.hidden_states = tuple(map(residual, found.hidden_states))
        return found


class GPT2CompressedLMHeadModel(GPT2CompressedPreTrainedModel, GPT2LMHeadModel):
    """The language model."""

    def __init__(self, config: GPT2CompressedConfig):
        super().__init__(config)
        self.loss_type = "ForCausalLM"
        self.transformer = GPT2CompressedModel(config)
        head = tversky_places(config).get((None, "lm_head"))
        if head is not None:
            self.lm_head = TverskyHead(config, head)
        nested = config.matryoshka
        self.head_map: nn.Module | None = Glue(config.hidden_size) if config.combined else None
        if nested and nested["rotated"]:  # to the coordinates that token embeddings are kept in
            self.head_map = nn.Linear(config.hidden_size, nested["head"][0])
        self.post_init()

    def _get_resized_lm_head(self, old_lm_head: Any, *args, **kwargs) -> Any:
        """transformers resizes linears only; the other rows that this takes away or draws are the prototypes'."""
        if not isinstance(old_lm_head, TverskyHead):
            return super()._get_resized_lm_head(old_lm_head, *args, **kwargs)
        linear = nn.Linear(1, 1, bias=False, device="meta")
        linear.weight = old_lm_head.weight
        old_lm_head.resize(cast(nn.Parameter, super()._get_resized_lm_head(linear, *args, **kwargs).weight))
        return old_lm_head

    def logits(self, hidden: Tensor) -> Tensor:
        """float[..., vocabulary] of the trunk's last hidden states float[..., d]."""
        if self.head_map is not None:
            hidden = self.head_map(hidden)
        if isinstance(self.lm_head, TverskyHead):
            return self.lm_head(hidden, self.transformer.feature_bank)
        if hidden.shape[-1] < self.lm_head.weight.shape[-1]:
            return hidden @ self.lm_head.weight[:, : hidden.shape[-1]].T
        return self.lm_head(hidden)

    def head_product(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """left [..., k] and right [vocabulary, k] with logits = left right^T."""
        if self.head_map is not None:
            hidden = self.head_map(hidden)
        if isinstance(self.lm_head, TverskyHead):
            return self.lm_head.product(hidden, cast(nn.ModuleDict, self.transformer.feature_bank))
        return hidden, self.lm_head.weight[:, : hidden.shape[-1]]

    def slice(
        self,
        ffn: float | list | None = None,
        width: float | None = None,
        depth: float | None = None,
        head: float | None = None,
    ) -> GPT2LMHeadModel:
        """A smaller model out of this nested one, plain GPT-2 where it can be: whole numbers, or shares of the whole as
        a float. It shares this one's memory wherever the width is the whole one. Raises ValueError for a size that is
        not nested here."""
        if not self.config.matryoshka:
            raise ValueError("no smaller models are nested in this one")
        found = sliced_model(dict(self.named_parameters()), self.config, size_of(self.config, ffn, width, depth, head))
        found.generation_config = self.generation_config
        return found

    def part(self, level: int, place: int) -> GPT2LMHeadModel:
        """One of the models side by side in this one, 0 <= place < split^level, as a model of its own. It shares
        this one's memory but for c_attn and biases. Raises ValueError for a part that is not there."""
        found = parted_model(dict(self.named_parameters()), self.config, part_of(self.config, level, place))
        found.generation_config = self.generation_config
        return found

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values=None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithCrossAttentions:
        """As GPT-2's. labels int64[batch, context], -100 where none counts; logits_to_keep: the last so many positions
        (0: all), or which."""
        found = self.transformer(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.logits(found.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithCrossAttentions(
            loss=loss,
            logits=logits,
            past_key_values=found.past_key_values,
            hidden_states=found.hidden_states,
            attentions=found.attentions,
            cross_attentions=found.cross_attentions,
        )


def empty_slice(config: GPT2CompressedConfig, size: Size) -> GPT2LMHeadModel:
    """The model of a size without its tensors."""
    own = sliced_config(config, size)
    own._attn_implementation = config._attn_implementation
    # by name: code that travels with a checkpoint may be loaded twice
    kind: Any = GPT2CompressedLMHeadModel if own.model_type == config.model_type else GPT2LMHeadModel
    with torch.device("meta"):
        return kind(own)


@torch.no_grad()
def sliced_model(tensors: Mapping[str, Tensor], config: GPT2CompressedConfig, size: Size) -> GPT2LMHeadModel:
    """The model of a size, in evaluation mode. tensors: of the whole model by their keys."""
    return _filled(empty_slice(config, size), sliced(tensors, config, size))


def empty_part(config: GPT2CompressedConfig, part: Part) -> GPT2LMHeadModel:
    """The model of a part without its tensors."""
    own = part_config(config, part)
    own._attn_implementation = config._attn_implementation
    with torch.device("meta"):
        return GPT2CompressedLMHeadModel(own)


@torch.no_grad()
def parted_model(tensors: Mapping[str, Tensor], config: GPT2CompressedConfig, part: Part) -> GPT2LMHeadModel:
    """The model of a part, in evaluation mode. tensors: of the whole model by their keys."""
    return _filled(empty_part(config, part), parted(tensors, config, part))


def _filled(model: GPT2LMHeadModel, tensors: Mapping[str, Tensor]) -> GPT2LMHeadModel:
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    return model.eval()


class GPT2CompressedForSequenceClassification(GPT2CompressedPreTrainedModel, GPT2ForSequenceClassification):
    """The classifier; needs `config.pad_token_id` for batches of more than one."""

    _keys_to_ignore_on_load_unexpected = [r"^head_map\."]  # noqa: RUF012 (what stands before the other head)

    def __init__(self, config: GPT2CompressedConfig):
        super().__init__(config)
        self.transformer = GPT2CompressedModel(config)
        self.post_init()
