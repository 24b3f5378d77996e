"""What a saved model is built from: structure only. Its files travel inside a checkpoint, so that
`from_pretrained(..., trust_remote_code=True)` works where this package is not installed."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Tokenizer,
)

from .configuration_gpt2_compressed import GPT2CompressedConfig
from .modeling_gpt2_compressed import (
    GPT2CompressedForSequenceClassification,
    GPT2CompressedLMHeadModel,
    GPT2CompressedModel,
)

_CLASSES = {
    AutoModel: GPT2CompressedModel,
    AutoModelForCausalLM: GPT2CompressedLMHeadModel,
    AutoModelForSequenceClassification: GPT2CompressedForSequenceClassification,
}

# Written into every config, so that all heads open with trust_remote_code, whichever head was saved.
AUTO_MAP = {
    "AutoConfig": f"configuration_gpt2_compressed.{GPT2CompressedConfig.__name__}",
    **{auto.__name__: f"modeling_gpt2_compressed.{model.__name__}" for auto, model in _CLASSES.items()},
}


def register() -> None:
    """Teach the Auto classes `gpt2_compressed`, and have every save ship the modeling files (also a second save)."""
    AutoConfig.register(GPT2CompressedConfig.model_type, GPT2CompressedConfig, exist_ok=True)
    GPT2CompressedConfig.register_for_auto_class()
    for auto_class, model_class in _CLASSES.items():
        auto_class.register(GPT2CompressedConfig, model_class, exist_ok=True)
        model_class.register_for_auto_class(auto_class.__name__)
    AutoTokenizer.register(GPT2CompressedConfig, GPT2Tokenizer, exist_ok=True)


register()

__all__ = [
    "AUTO_MAP",
    "GPT2CompressedConfig",
    "GPT2CompressedForSequenceClassification",
    "GPT2CompressedLMHeadModel",
    "GPT2CompressedModel",
    "register",
]
