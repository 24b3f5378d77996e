"""merged_n: every FFN of a window becomes the aligned average of them.

Source: code_n_all of chetaniitbhilai, whose code gave the average to the anchor alone (`anchor_only` does that, by
name); Verma, Murray & Duh, arXiv 2501.06126, for the merge. Saves storage where the average is stored once (`tie`),
never time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from .. import gpt2
from ..alignment import FFNWeights, permute_ffn
from ..errors import UserError
from ..windows import Window
from .base import FFN_SITES, FitContext, WindowRewrite, sites_of
from .groups import add_groups, average, fold_groups, group_index
from .low_rank import weighted_mean

_TENSORS = ("c_fc.weight", "c_fc.bias", "c_proj.weight", "c_proj.bias")


@dataclass(frozen=True)
class MergedN(WindowRewrite):
    """Depth stays. tie: store the average once (needs the compressed model type), else plain GPT-2 of the same size.

    average: "mean" = element-wise; "activation-weighted" = (sum M_l)^-1 sum M_l W_l with the second moments of each
    linear's input on calibration data. anchor_only: only the anchor takes the average (what the source's code did).
    """

    name = "merged_n"

    tie: bool = False
    average: Literal["mean", "activation-weighted"] = "mean"
    anchor_only: bool = False

    def check(self, base: GPT2Config) -> None:
        super().check(base)
        if self.tie and self.anchor_only:
            raise UserError(
                "merged_n: tie=true with anchor_only=true; the other layers keep their FFNs, so nothing can be tied"
            )

    def sites(self, base: GPT2Config) -> frozenset[str]:
        return sites_of(self.layers(base), FFN_SITES)

    def config(self, base: GPT2Config) -> GPT2Config:
        return add_groups(base, self.windows(base), rank=0, bias="shared") if self.tie else base

    def fit(self, model: GPT2LMHeadModel, context: FitContext) -> None:
        for window in self.windows(context.original.config):
            values = merged_ffn(context, window, weighted=self.average == "activation-weighted")
            if self.tie:
                owners = [gpt2.bank(model)[group_index(model, context.layers[window.start])]]
            else:
                layers = [window.anchor] if self.anchor_only else list(window.layers)
                owners = [gpt2.ffn(model, context.layers[layer]) for layer in layers]
            for owner in owners:
                for path, value in zip(_TENSORS, values, strict=True):
                    linear, name = path.split(".")
                    gpt2.put(owner.get_submodule(linear), name, value.clone())

    def fold(self, model: GPT2LMHeadModel) -> GPT2LMHeadModel:
        return fold_groups(model)

    @classmethod
    def neutral(cls, base: GPT2Config) -> MergedN:
        return cls(n=1, start=0, tie=True)


def aligned_ffns(context: FitContext, window: Window) -> list[FFNWeights]:
    """Each layer's FFN in the anchor's neuron order, float64: c_fc weight and bias, c_proj weight and bias."""
    result = []
    for layer in window.layers:
        weights = permute_ffn(
            gpt2.ffn_weights(context.original, layer), context.alignments.to_anchor(layer, window.anchor)
        )
        fc, fc_bias, proj, proj_bias = (tensor.double() for tensor in weights)
        result.append((fc, fc_bias, proj, proj_bias))
    return result


def merged_ffn(context: FitContext, window: Window, *, weighted: bool = False) -> list[Tensor]:
    """The average FFN of a window, float64: c_fc weight [d, d_ff], bias [d_ff], c_proj weight [d_ff, d], bias [d]."""
    ffns = aligned_ffns(context, window)
    values = [average([ffn[index] for ffn in ffns]) for index in range(len(_TENSORS))]
    if weighted:
        layers = list(window.layers)
        inputs = context.moments(layers, "input")
        values[0] = weighted_mean([ffn[0] for ffn in ffns], [inputs[layer].second_moment() for layer in layers])
        hidden = aligned_moments(context, window, centred=False)
        values[2] = weighted_mean([ffn[2] for ffn in ffns], [hidden[layer][1] for layer in layers])
    return values


def aligned_moments(context: FitContext, window: Window, *, centred: bool) -> dict[int, tuple[Tensor, Tensor]]:
    """Layer -> mean [d_ff] and covariance or second moment [d_ff, d_ff] of c_proj's input in the anchor's order."""
    taken, result = context.moments(list(window.layers), "post"), {}
    for layer in window.layers:
        moments = taken.pop(layer)  # d_ff x d_ff in float64 each: not two of them a layer
        order = context.alignments.to_anchor(layer, window.anchor).to(moments.mean.device)
        moment = moments.covariance() if centred else moments.second_moment()
        result[layer] = moments.mean[order], moment[order][:, order]
    return result
