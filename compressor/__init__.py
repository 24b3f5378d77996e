"""gpt2-compress: make pretrained GPT-2 checkpoints smaller and faster, and prove what that cost.

Importing this package teaches transformers the model type `gpt2_compressed`: from then on
`AutoModelForCausalLM.from_pretrained` opens a compressed folder without `trust_remote_code`. The import itself is
cheap: it waits for transformers, in whichever order the two are imported, and the names below are fetched when used.
"""

from __future__ import annotations

import importlib
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .errors import UserError
    from .modeling import (
        GPT2CompressedConfig,
        GPT2CompressedForSequenceClassification,
        GPT2CompressedLMHeadModel,
        GPT2CompressedModel,
    )
    from .models import OpenModel, open_model
    from .rewrites import REWRITES, Rewrite
    from .rewrites.compose import apply
    from .token_factored_gpt import (
        GPTConfigALiBi,
        estimate_model_parameters,
        get_model,
        list_available_models,
        load_alibi_config_preset,
        print_config_alibi,
    )
    from .tversky_gpt import (
        TverskyGPTModel,
        count_parameters,
        create_tversky_gpt_from_config,
        estimate_memory_mb,
        get_shared_parameter_info,
    )

__all__ = [
    "REWRITES",
    "GPT2CompressedConfig",
    "GPT2CompressedForSequenceClassification",
    "GPT2CompressedLMHeadModel",
    "GPT2CompressedModel",
    "GPTConfigALiBi",
    "OpenModel",
    "Rewrite",
    "TverskyGPTModel",
    "UserError",
    "__version__",
    "apply",
    "count_parameters",
    "create_tversky_gpt_from_config",
    "estimate_memory_mb",
    "estimate_model_parameters",
    "get_model",
    "get_shared_parameter_info",
    "list_available_models",
    "load_alibi_config_preset",
    "open_model",
    "print_config_alibi",
]

_HOMES = {"UserError": "errors", "OpenModel": "models", "open_model": "models", "apply": "rewrites.compose"}
_HOMES |= {"REWRITES": "rewrites", "Rewrite": "rewrites", "TverskyGPTModel": "tversky_gpt"}
_HOMES |= {"create_tversky_gpt_from_config": "tversky_gpt", "get_shared_parameter_info": "tversky_gpt"}
_HOMES |= {"GPTConfigALiBi": "token_factored_gpt", "estimate_model_parameters": "token_factored_gpt"}
_HOMES |= {"get_model": "token_factored_gpt", "list_available_models": "token_factored_gpt"}
_HOMES |= {"load_alibi_config_preset": "token_factored_gpt", "print_config_alibi": "token_factored_gpt"}
_HOMES |= {"count_parameters": "tversky_gpt", "estimate_memory_mb": "tversky_gpt"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'modeling')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _AfterTransformers(MetaPathFinder):
    """Finds transformers as everybody else would, and has the model registered once it is imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "transformers":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: Any) -> None:
                run(module)
                _register()

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    modeling = importlib.import_module(f"{__name__}.modeling")
    if hasattr(modeling, "register"):  # else it is the one that imports transformers, and registers at its end
        modeling.register()


if "transformers" in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _AfterTransformers())
