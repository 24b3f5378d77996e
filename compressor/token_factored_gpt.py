"""Token-factored GPTs from a config, to be trained from scratch, with those that they are compared with; their counts.

Source: ckerce/cleanGPT (doc/README_token_factored_alibi.md, config_alibi.py, model/), whose names these are. Of its
four models only Vanilla is a plain GPT-2; all are built by this package's classes, so they save, reopen, generate from
a cache, take pads and are trained as every other model here. What differs from the source, on purpose:

- ALiBi's slopes are the paper's for any number of heads (the source's are not, for 6, 12, 20 and 25), and are saved;
  like every parameter they move when all are trained.
- Linears and norms have biases, and FFNs GPT-2's GELU: those of a GPT-2. The source's have none, and the exact GELU.
- Factored adds its learned positions to the context stream; the source's latest one to the tokens', which they blur.
- Kronecker values and outputs begin as the identity, not as noise.
- SASP has dense values and outputs (as in the source's own trainings of it), a shape of its own in each head, norms of
  its own for attention and FFN, and keeps the whole residual; the source's keeps a tenth of it in every block. Its keys
  and values begin as zeros, which the source says of its own but undoes by drawing all linears afterwards.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable, Sized
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from . import fields, gpt2, models
from .errors import UserError, unknown
from .metrics.size import parameters
from .modeling import GPT2CompressedLMHeadModel
from .rewrites.structure import add_structure

GPT2_VOCABULARY = 50257  # where a config names none, as the source counts


@dataclass
class GPTConfigALiBi:
    """A model, its training and how it generates; changed in place, as the source's examples do, and checked when used.

    block_size: tokens that it is trained on at once, where learned positions end. max_position_embeddings: what it is
    meant for with ALiBi, default 4 block_size: for `generate(max_length=...)`, as no model has a limit then. use_v,
    use_proj: of the factored models, whose values and outputs are else the identity: a learned heads x heads matrix
    mixes heads. temperature: 0 is greedy. top_k: 0 is all.
    """

    n_layer: int = 6
    n_head: int = 6
    n_embd: int = 384
    block_size: int = 128
    max_position_embeddings: int | None = None
    vocab_size: int | None = None
    eos_token_id: int | None = None
    dropout: float = 0.1
    use_v: bool = False
    use_proj: bool = False
    batch_size: int = 32
    learning_rate: float = 2.5e-4
    weight_decay: float = 0.01
    temperature: float = 0.8
    top_k: int = 50

    def __post_init__(self) -> None:
        if self.max_position_embeddings is None and type(self.block_size) is int:
            self.max_position_embeddings = 4 * self.block_size
        self.check()

    def update_from_tokenizer(self, tokenizer: Sized) -> None:
        """Take over its vocabulary, added tokens too, and the token that ends a text where it has one."""
        self.vocab_size = len(tokenizer)
        self.eos_token_id = getattr(tokenizer, "eos_token_id", None)
        self.check()

    def training(self) -> dict[str, Any]:
        """What `finetune` is to be called with besides model, text and steps."""
        self.check()
        return {
            "train": "full",
            "batch_tokens": self.batch_size * self.block_size,
            "learning_rate": self.learning_rate,
            "weight_decay": self.weight_decay,
            "dropout": self.dropout > 0,
        }

    def check(self) -> None:
        """Raises UserError for the first value that is not allowed."""
        kinds = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = fields.typed("GPTConfigALiBi", field.name, getattr(self, field.name), kinds[field.name])
            fits, allowed = _RANGES.get(field.name, _ANY)
            if value is not None and not fits(value):
                raise UserError(f"GPTConfigALiBi: {field.name} is {value}; allowed: {allowed}")
        if self.n_embd % self.n_head:
            raise UserError(f"GPTConfigALiBi: n_embd is {self.n_embd}; allowed: multiples of {self.n_head} (n_head)")
        if self.max_position_embeddings is None or self.max_position_embeddings < self.block_size:
            raise UserError(
                f"GPTConfigALiBi: max_position_embeddings is {self.max_position_embeddings}; allowed: "
                f"{self.block_size} (block_size) or more"
            )
        last = (self.vocab_size or GPT2_VOCABULARY) - 1
        if self.eos_token_id is not None and self.eos_token_id > last:
            raise UserError(f"GPTConfigALiBi: eos_token_id is {self.eos_token_id}; allowed: 0 to {last} (vocab_size)")


_Range = tuple[Callable[[Any], bool], str]
_ANY: _Range = (lambda value: True, "")
_FROM_1: _Range = (lambda value: value >= 1, "1 or more")
_FROM_0: _Range = (lambda value: 0 <= value < math.inf, "0 or more")
_RANGES: dict[str, _Range] = {
    **dict.fromkeys(("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "batch_size"), _FROM_1),
    **dict.fromkeys(("eos_token_id", "weight_decay", "temperature", "top_k"), _FROM_0),
    "learning_rate": (lambda value: 0 < value < math.inf, "above 0"),
    "dropout": (lambda value: 0 <= value < 1, "0 or more, below 1"),
}


# ---------------------------------------------------------------- presets

_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "n_layer": 2, "n_head": 2, "n_embd": 128, "block_size": 128, "batch_size": 64, "learning_rate": 5e-4,
    },
    "small": {"n_layer": 4, "n_head": 4, "n_embd": 256, "block_size": 256, "learning_rate": 6e-4},
    "medium": {"n_layer": 8, "n_head": 8, "n_embd": 512, "block_size": 512, "batch_size": 16},
    "large": {
        "n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "batch_size": 8, "learning_rate": 2e-4,
    },
    "character": {
        "n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 256, "batch_size": 64,
        "learning_rate": 1e-3,
    },
}  # fmt: skip
# where the source's code has something else
_IN_CODE: dict[str, dict[str, Any]] = {
    "small": {"n_layer": 6, "n_head": 6, "n_embd": 192},
    "medium": {
        "n_layer": 6, "n_head": 6, "n_embd": 768, "block_size": 128, "max_position_embeddings": 256, "batch_size": 32,
        "learning_rate": 5e-4,
    },
}  # fmt: skip


def load_alibi_config_preset(preset_name: str, source: Literal["document", "code"] = "document") -> GPTConfigALiBi:
    """tiny, small, medium, large or character. The source's document and code disagree on two: small is 4 layers, 4
    heads, width 256 in the one and 6, 6, 192 in the other; medium 8, 8, 512 and 6, 6, 768 (contexts 128, up to 256).
    What the document leaves open is the code's; of medium, that of the code which fitted it. Raises UserError for other
    words."""
    if preset_name not in _PRESETS:
        raise unknown("preset", str(preset_name), _PRESETS)
    if source not in ("document", "code"):
        raise unknown("source of presets", str(source), ("document", "code"))
    changes = _IN_CODE.get(preset_name, {}) if source == "code" else {}
    return GPTConfigALiBi(**{**_PRESETS[preset_name], **changes})


# ---------------------------------------------------------------- models

MODELS = ("SASP", "Vanilla", "Factored", "FactoredALiBi")
_STAGES = {
    (False, False): "identity",
    (True, False): "kron_v_only",
    (False, True): "kron_o_only",
    (True, True): "kron",
}


def list_available_models() -> list[str]:
    """What `get_model` makes."""
    return list(MODELS)


def get_model(model_type: str, config: GPTConfigALiBi) -> GPT2LMHeadModel:
    """A model with random weights (of torch's generator), in evaluation mode.

    Vanilla: GPT-2. Factored: two streams, x = xt + xe, tokens' changed by attention, whose values read xt, and context
    added by FFNs and learned positions. FactoredALiBi: the same with ALiBi in the place of positions, for any length.
    SASP: shaped attention beside FFNs, with learned positions. Raises UserError for other words, and for a config that
    is not allowed or names no vocabulary.
    """
    config.check()
    if config.vocab_size is None:
        raise UserError("GPTConfigALiBi: vocab_size is not given; give it, or call update_from_tokenizer")
    structure = model_config(model_type, config)
    model = GPT2LMHeadModel(structure) if model_type == "Vanilla" else GPT2CompressedLMHeadModel(structure)  # type: ignore[arg-type]
    if model_type == "SASP":
        _start_shaped(model)
    drawn = {"do_sample": True, "temperature": config.temperature, "top_k": config.top_k} if config.temperature else {}
    ends = config.eos_token_id
    model.generation_config = GenerationConfig(**drawn, eos_token_id=ends, pad_token_id=ends)
    return model.eval()


def model_config(model_type: str, config: GPTConfigALiBi) -> GPT2Config:
    """The structure of a model of `get_model`; n_positions is the length that it is trained at. Errors as there."""
    if model_type not in MODELS:
        raise unknown("model", str(model_type), MODELS)
    config.check()
    base = GPT2Config(
        vocab_size=GPT2_VOCABULARY if config.vocab_size is None else config.vocab_size,
        n_positions=config.block_size, n_embd=config.n_embd, n_layer=config.n_layer, n_head=config.n_head,
        resid_pdrop=config.dropout, embd_pdrop=config.dropout, attn_pdrop=config.dropout,
        bos_token_id=config.eos_token_id, eos_token_id=config.eos_token_id,
    )  # fmt: skip
    layers = list(range(config.n_layer))
    if model_type == "Vanilla":
        return base
    if model_type == "SASP":
        return add_structure(base, "shaped_attention", {"layers": layers, "parallel": True})
    stage = _STAGES[config.use_v, config.use_proj]
    factored = {"stage": stage, "layers": layers, "value_norm": False, "bias": False}
    made = add_structure(base, "token_factored", factored)
    if model_type == "Factored":
        return made
    return add_structure(made, "alibi", {"slopes": "geometric", "learned_positions": False, "first": False})


@torch.no_grad()
def _start_shaped(model: GPT2LMHeadModel) -> None:
    """alpha 1, beta and gamma 0.1; keys and values 0, so that softmax is the mean and attention gives nothing; gains of
    1 and, of FFNs, 0.2."""
    for layer, block in enumerate(gpt2.blocks(model)):
        shape = gpt2.attention(model, layer).shape
        starts = ((shape.identity, 1.0), (shape.softmax, 0.1), (shape.mean, 0.1), (block.gains.ffn, 0.2))
        for parameter, value in starts:
            parameter.fill_(value)
        for part in ("k", "v"):
            for tensor in gpt2.linear(model, layer, f"attn.{part}"):
                tensor.zero_()


# ---------------------------------------------------------------- counts


def estimate_model_parameters(config: GPTConfigALiBi, model_type: str = "FactoredALiBi") -> int:
    """Exactly those of the model, a tied head once; of GPT-2's vocabulary where the config names none.

    The source's own estimate counts dense values and outputs that its model lacks: 29.92 M of its 28.15 M.
    """
    return parameters(models.build(model_config(model_type, config)))


def print_config_alibi(
    config: GPTConfigALiBi | None = None, dataset_name: str | None = None, max_samples: int | None = None
) -> None:
    """Print a config (default: the standard one), its parameters and, if given, what it is trained on."""
    config = GPTConfigALiBi() if config is None else config
    said: dict[str, Any] = dataclasses.asdict(config)
    said |= {f"parameters of {name}": f"{estimate_model_parameters(config, name):,}" for name in MODELS}
    said |= {"dataset_name": dataset_name, "max_samples": max_samples}
    for name, value in said.items():
        if value is not None:
            print(f"{name:28} {value}")
