"""TverskyGPT from a config, to be trained from scratch: GPT-2 whose linears are Tversky similarities; and its counts.

Source: TverskyGPT of madch3m (tverskysimilaritygrad), whose feature banks and scalars were in a singleton outside the
model: not trained, not saved, not counted. Here they are the model's. Queries, keys, values, attention's output and
both layers of the FFN are each S + bias, with S in [0, 1] the ratio form over a bank of features that layers share:

    c = sum min(z+, u+)   A = sum (z+ - u+)+   B = sum (u+ - z+)+   S = gamma c / (gamma c + alpha A + beta B + offset)

of what the input (z) and a prototype (u) have of each feature. Prototypes are as large as the linear that they stand
for, so a TverskyGPT is larger than the GPT-2 of its shape, by its banks and scalars.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import GPT2Config, PreTrainedModel

from . import fields, gpt2
from .checkpoint_config import check_config, check_keys
from .errors import UserError, unknown
from .metrics.size import parameters
from .modeling import GPT2CompressedConfig, GPT2CompressedLMHeadModel
from .modeling.tversky_layers import tversky_places
from .rewrites.structure import STRUCTURES
from .rewrites.tversky import Tversky

# Causal, with its LM head, loss, cache and `generate`: the class of every compressed GPT-2, which its config makes one.
TverskyGPTModel = GPT2CompressedLMHeadModel

# The layer of the original, but for its offset of 1e-8, which is 0 in float16.
_ORIGINAL: dict[str, Any] = {
    "targets": ["q", "k", "v", "attn_out", "c_fc", "mlp_out"],
    "form": "ratio",
    "intersection": "min",
    "difference": "subtractmatch",
    "antipodal": False,
    "prototypes": "explicit",
    "share_scalars": True,
    "non_negative": True,
    "offset": 1e-6,
}
_OPTIONS = (*_ORIGINAL, "layers", "bank_size", "normalize", "scale", "bias", "learn_scalars")


def create_tversky_gpt_from_config(
    config: GPT2Config | Mapping[str, Any],
    feature_key: str = "shared",
    alpha: float = 0.5,
    beta: float = 0.5,
    gamma: float = 1.0,
    share_across_layers: bool = True,
    **options: Any,
) -> GPT2CompressedLMHeadModel:
    """A TverskyGPT with random weights (of torch's generator); arguments and errors are `tversky_gpt_config`'s."""
    return TverskyGPTModel(tversky_gpt_config(config, feature_key, alpha, beta, gamma, share_across_layers, **options))


def tversky_gpt_config(
    config: GPT2Config | Mapping[str, Any],
    feature_key: str = "shared",
    alpha: float = 0.5,
    beta: float = 0.5,
    gamma: float = 1.0,
    share_across_layers: bool = True,
    activation_function: str = "relu",
    **options: Any,
) -> GPT2CompressedConfig:
    """The structure of a TverskyGPT of this shape.

    config: a plain GPT-2's, or its fields (n_embd, n_layer, ...). feature_key: the name of its banks. alpha, beta,
    gamma: how much counts what only the input has, what only the prototype has, what both have; 0 or more, they start
    there and are trained. share_across_layers: all layers share one bank for each width of inputs; else each has its
    own. activation_function: in the FFN, in the place of config's. options: targets, layers, bank_size, form,
    intersection, difference, antipodal, prototypes, normalize, offset, scale, bias, learn_scalars, share_scalars and
    non_negative as of the rewrite `tversky`. Raises UserError for fields and options that are not known or not allowed.
    """
    base = _checked(config, activation_function)
    for name in options:
        if name not in _OPTIONS:
            raise unknown("option of TverskyGPT", name, _OPTIONS)
    strengths = {"alpha": alpha, "beta": beta, "gamma": gamma}
    share = "global" if share_across_layers else "layer"
    record = {**_ORIGINAL, "feature_key": feature_key, "share": share, "init": "random", **strengths, **options}
    layers = fields.from_record(Tversky, record, "TverskyGPT")
    layers.check(base)
    made = layers.config(base)
    assert isinstance(made, GPT2CompressedConfig)
    return made


def _checked(config: GPT2Config | Mapping[str, Any], activation_function: str) -> GPT2Config:
    """A copy of a plain GPT-2's config. transformers takes any key: n_embed=32 would make a model of width 768."""
    known = {*GPT2CompressedConfig().to_dict(), *GPT2Config.attribute_map}
    given = dict(config) if isinstance(config, Mapping) else config.to_dict()
    if not isinstance(config, Mapping):
        check_keys("the config", given.keys() - known)  # it may carry keys of its user's
    for key in given if isinstance(config, Mapping) else ():
        if key not in known:
            raise unknown("field of GPT2Config", str(key), known)
    for field in (*STRUCTURES, "add_cross_attention"):
        if given.get(field):
            raise UserError(f"the config has {field}; give that of a plain GPT-2 language model")
    plain = {key: value for key, value in given.items() if key not in ("model_type", "architectures")}
    try:
        made = GPT2Config(**{**plain, "activation_function": activation_function})
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise UserError(f"this is no configuration of a GPT-2 ({' '.join(str(error).split())})") from error
    check_config("the config", made)
    return made


# ---------------------------------------------------------------- the paper's


def paper_config(setting: Literal["tied", "untied", "head"]) -> GPT2CompressedConfig:
    """A structure of the parameters that Doumbouya, Jurafsky & Manning, arXiv 2506.11035, give for GPT-2 small, PTB.

    Read from their totals, and not the only reading: one layer d -> d in the place of each FFN ("head" keeps the FFNs),
    an LM head of similarities to the embeddings ("tied") or to prototypes of its own, one bank for all of these, no
    biases, and fixed theta, alpha and beta.
    """
    targets, features = {"tied": (2, 8192), "untied": (2, 4096), "head": (1, 16384)}[setting]
    return tversky_gpt_config(
        GPT2Config(tie_word_embeddings=setting == "tied"),
        targets=["lm_head", "mlp_block"][:targets],
        bank_size=features,
        activation_function="gelu_new",
        form="contrast",
        intersection="product",
        difference="ignorematch",
        bias=False,
        learn_scalars=False,
        share_scalars=False,
    )


# ---------------------------------------------------------------- counts


def count_parameters(model: nn.Module) -> int:
    """Parameters over unique storages: a shared bank and a tied head count once."""
    return parameters(model)


def get_shared_parameter_info(model: PreTrainedModel) -> dict[str, Any]:
    """What projections share: "shared_parameters", how many each feature bank that several of them use has, by its key,
    its scalars with it; "total_shared_params"; "total_model_params", banks among them; "shared_percentage" of these."""
    uses = Counter(place.key for place in tversky_places(model.config).values())
    shared = {key: parameters(gpt2.feature_bank(model)[key]) for key, count in uses.items() if count > 1}
    total, whole = sum(shared.values()), parameters(model)
    return {
        "shared_parameters": shared,
        "total_shared_params": total,
        "total_model_params": whole,
        "shared_percentage": 100 * total / whole,
    }


def estimate_memory_mb(model: nn.Module) -> float:
    """MiB that the parameters take in float32, 4 bytes each, once where they are shared: what inference holds besides
    activations and the cache of keys and values. Training adds gradients (as much again) and Adam's moments (twice)."""
    return parameters(model) * 4 / 2**20
