"""tversky: linears become similarities to prototypes over a bank of features, exact at the start or fitted to them.

Source: TverskyGPT of madch3m (tverskysimilaritygrad), whose banks were outside its parameters; the layer of Doumbouya,
Jurafsky & Manning, arXiv 2506.11035, from its formulas. With an antipodal orthonormal bank, products, theta = 1 and
alpha + beta = 1 a similarity is a dot product, so that a bank as wide as the input changes nothing, and a smaller one
is a low-rank linear to start from (modeling/tversky.py has the mathematics).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from .. import gpt2
from ..capture import Batch
from ..errors import UserError
from ..modeling.tversky import FORM, SCALARS
from ..modeling.tversky_layers import TARGETS, TverskyPlace, tversky_places
from ..token_groups import Strings
from ..windows import check_length, tiles, window
from .base import FitContext, Rewrite, check_layers, layers_of
from .structure import add_structure, without_structure
from .tversky_diagnosis import diagnose
from .tversky_fit import LEAVES, Fit, dense_tensors, projections

_MLP = ("c_fc", "mlp_out")


@dataclass(frozen=True)
class Tversky(Rewrite):
    """targets: q, k, v, attn_out, c_fc, mlp_out = a linear each; mlp_block = the whole FFN; lm_head, whose prototypes
    are the token embeddings. bank_size: features of a bank, a number or a part of the input's width; null = the width.

    share: whose bank it is: "none" = each projection's own, "layer", "window" (of n layers: the one at start, or all in
    tiles, where a rest of one layer stays as it is), "global". layers: which (null = all). prototypes: "features" =
    what they have of each feature, [out, K]; "explicit" = [out, in]. share_scalars: theta, alpha, beta are the bank's.

    init: "exact" = features from `basis`, prototypes the linear's weights as seen through them; "lsq" = then theta,
    alpha, beta, scale and bias by least squares, for forms that are not linear; "random". basis: "pca" = of the inputs,
    "asvd" = of the inputs as the outputs need them, "svd" = of the weights. refit: prototype features and biases by
    least squares on calibration text. distill_steps: of training each projection alone towards its linear on it.
    """

    name = "tversky"

    targets: list = dataclasses.field(default_factory=lambda: ["c_fc"])
    bank_size: int | float | None = None
    share: Literal["none", "layer", "window", "global"] = "global"
    layers: list | None = None
    n: int | None = None
    start: int | None = None
    feature_key: str = "features"
    form: Literal["contrast", "ratio"] = "contrast"
    intersection: Literal["product", "min", "max", "mean", "gmean", "softmin"] = "product"
    difference: Literal["product", "ignorematch", "subtractmatch"] = "product"
    antipodal: bool = True
    normalize: bool = False
    offset: float = 1.0
    prototypes: Literal["explicit", "features"] = "features"
    scale: bool = False
    bias: bool = True
    theta: float = 1.0
    gamma: float | None = None  # another name of theta
    alpha: float = 0.5
    beta: float = 0.5
    learn_scalars: bool = True
    share_scalars: bool = False
    non_negative: bool = False
    init: Literal["exact", "lsq", "random"] = "exact"
    basis: Literal["pca", "asvd", "svd"] = "asvd"
    refit: bool = True
    distill_steps: int = 0
    distill_learning_rate: float = 1e-3

    # ------------------------------------------------------------ checks

    def check(self, base: GPT2Config) -> None:
        self._check_targets()
        if self.gamma is not None and self.theta not in (1.0, self.gamma):
            raise UserError(f"tversky: theta={self.theta} and gamma={self.gamma} are two names of one number; give one")
        if not re.fullmatch(r"[A-Za-z]\w*", self.feature_key, re.ASCII):
            raise UserError(f"tversky: feature_key is {self.feature_key!r}; allowed: a letter, then letters, digits, _")
        if (self.n is not None or self.start is not None) and (self.share != "window" or self.layers is not None):
            raise UserError("tversky: n and start are of share=window without layers; otherwise give layers")
        if self.share == "window" and self.n is None:
            raise UserError("tversky: share=window needs n, the layers of a window")
        check_layers(self.name, self.layers, base)
        self.groups(base)
        for width, features in self._features(base).items():
            if features < 1 or (self.linear_start and features > width):
                raise UserError(
                    f"tversky: bank_size={self.bank_size} is {features} features for inputs of width {width}; "
                    f"allowed: 1 to {width} (parts: above 0, to 1)"
                )
        self._check_form()

    def _check_targets(self) -> None:
        for target in self.targets:
            if target not in TARGETS:
                raise UserError(f"tversky: targets has {target!r}; allowed: {', '.join(TARGETS)}")
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise UserError(
                f"tversky: targets is {self.targets}; allowed: a list of different ones of {', '.join(TARGETS)}"
            )
        if "mlp_block" in self.targets and set(self.targets) & set(_MLP):
            raise UserError("tversky: mlp_block replaces c_fc and mlp_out; targets may not have them too")

    def _check_form(self) -> None:
        if self.form == "ratio" and not (self.non_negative and self.offset > 0):
            raise UserError("tversky: form=ratio needs non_negative=true and an offset above 0; it divides by them")
        if self.form == "ratio" and self.intersection == "softmin":
            raise UserError(
                "tversky: form=ratio with intersection=softmin, whose sums may be below 0, divides by numbers about 0; "
                "allowed: product, min, max, mean, gmean"
            )
        if self.non_negative and min(self.strengths) < 0:
            raise UserError(
                f"tversky: non_negative=true with theta, alpha, beta = {self.strengths}; allowed: 0 or more"
            )
        if self.normalize and (self.prototypes == "features" and set(self.targets) - {"lm_head"}):
            raise UserError("tversky: normalize needs prototypes=explicit; prototypes=features has none to normalise")
        if "lm_head" in self.targets and not self.separable:
            raise UserError(
                "tversky: lm_head takes form=contrast of matrix products (intersection product, mean or gmean; "
                "difference product or ignorematch); others would go over vocabulary x features for every token"
            )
        if "mlp_block" in self.targets and (self.antipodal or self.init == "exact"):
            raise UserError("tversky: mlp_block needs antipodal=false and init=lsq or random; no linear is replaced")
        products = (self.intersection, self.difference) == ("product", "product")
        if "mlp_block" in self.targets and self.init == "lsq" and not self.learn_scalars:
            theta, alpha, beta = self.strengths
            if not products or alpha != theta or beta != 0 or theta <= 0:
                raise UserError(
                    "tversky: mlp_block with init=lsq and learn_scalars=false is fitted for products with alpha = "
                    f"theta above 0 and beta = 0; given theta, alpha, beta = {self.strengths}"
                )
        if self.init == "exact" and not self.exact:
            raise UserError(
                "tversky: init=exact needs antipodal=true, form=contrast, intersection=product, difference=product, "
                "theta = alpha + beta, no normalize; init=lsq fits the other forms"
            )
        if self.distill_steps < 0 or self.distill_learning_rate <= 0:
            raise UserError("tversky: distill_steps are 0 or more, distill_learning_rate above 0")

    # ------------------------------------------------------------ what the fields mean

    @property
    def strengths(self) -> tuple[float, float, float]:
        """theta, alpha, beta."""
        return self.theta if self.gamma is None else self.gamma, self.alpha, self.beta

    @property
    def separable(self) -> bool:
        """Whether a similarity is a few matrix products."""
        return (
            self.form == "contrast"
            and self.intersection in ("product", "mean", "gmean")
            and self.difference in ("product", "ignorematch")
        )

    @property
    def exact(self) -> bool:
        """Whether a similarity is a dot product over the features at the start."""
        theta, alpha, beta = self.strengths
        return (
            self.separable
            and self.antipodal
            and (self.intersection, self.difference, self.normalize) == ("product", "product", False)
            and abs(theta - alpha - beta) < 1e-9
            and theta > 0
        )

    @property
    def linear_start(self) -> bool:
        """Whether features are directions of the input, of which there are no more than its width."""
        return self.init != "random" and "mlp_block" not in self.targets

    def groups(self, base: GPT2Config) -> list[list[int]]:
        """The layers that share banks."""
        if set(self.targets) == {"lm_head"}:
            return []
        if self.share == "window":
            assert self.n is not None
            check_length(base.n_layer, self.n)
            if self.start is None:
                return [list(item.layers) for item in tiles(base.n_layer, self.n, "first")]
            return [list(window(base.n_layer, self.start, self.n, "first").layers)]
        layers = layers_of(self.layers, base)
        return [[layer] for layer in layers] if self.share == "layer" else [layers]

    def _features(self, base: GPT2Config) -> dict[int, int]:
        """Input width -> features of its banks."""
        widths = {gpt2.d_ff(base) if target == "mlp_out" else base.n_embd for target in self.targets}
        size = self.bank_size
        if isinstance(size, float) and not 0 < size <= 1:
            raise UserError(f"tversky: bank_size is {size}; allowed: a whole number, or a part above 0, to 1")
        if size is None:
            return {width: width for width in widths}
        return {width: round(size * width) if isinstance(size, float) else size for width in sorted(widths)}

    # ------------------------------------------------------------ the rewrite

    def sites(self, base: GPT2Config) -> frozenset[str]:
        found = {"lm_head"} if "lm_head" in self.targets else set()
        for layer in (layer for group in self.groups(base) for layer in group):
            for target in self.targets:
                leaves = [LEAVES[part] for part in (_MLP if target == "mlp_block" else (target,)) if part in LEAVES]
                found |= {f"h.{layer}.{leaf}" for leaf in leaves}
        return frozenset(found)

    def config(self, base: GPT2Config) -> GPT2Config:
        for entry in getattr(base, "tversky", None) or []:
            if entry["feature_key"] == self.feature_key:
                raise UserError(f"tversky: feature_key={self.feature_key} stands in two rewrites; give each its own")
        same = {name: getattr(self, name) for name in (*FORM, "share", "feature_key", "prototypes", "scale", "bias")}
        same |= {name: getattr(self, name) for name in ("learn_scalars", "share_scalars", "non_negative")}
        entry = {
            **same,
            **dict(zip(SCALARS, self.strengths, strict=True)),
            "groups": self.groups(base),
            "targets": sorted(self.targets, key=TARGETS.index),
            "features": {str(width): count for width, count in self._features(base).items()},
        }
        return add_structure(base, "tversky", [entry])

    def places(self, model: GPT2LMHeadModel) -> dict[tuple[int | None, str], TverskyPlace]:
        """(layer of the model, target) -> the place of each of its projections."""
        return {
            where: place
            for where, place in tversky_places(model.config).items()
            if place.entry["feature_key"] == self.feature_key
        }

    def fit(self, model: GPT2LMHeadModel, context: FitContext) -> None:
        Fit(self, model, context).run()

    def modules(self, model: GPT2LMHeadModel) -> Iterator[nn.Module]:
        """Its projections and its banks in a model made by it."""
        places = self.places(model)
        yield from projections(model, places).values()
        for key in dict.fromkeys(place.key for place in places.values()):
            yield gpt2.feature_bank(model)[key]

    def trainable(self, model: GPT2LMHeadModel) -> list[nn.Parameter]:
        return [parameter for module in self.modules(model) for parameter in module.parameters()]

    def fold(self, model: GPT2LMHeadModel) -> GPT2LMHeadModel:
        """Where every similarity is linear still: antipodal products with theta = alpha + beta."""
        tensors = dense_tensors(model, self.places(model))
        return without_structure(model, "tversky", lambda entry: entry["feature_key"] == self.feature_key, tensors)

    def diagnose(self, model: GPT2LMHeadModel, batches: Iterable[Batch], strings: Strings = ()) -> dict[str, Any]:
        """Dead features and prototypes, asymmetry, theta, alpha, beta (rewrites/tversky_diagnosis.py)."""
        return {"feature_key": self.feature_key, **diagnose(model, self.places(model), batches)}

    @classmethod
    def neutral(cls, base: GPT2Config) -> Tversky:
        return cls(targets=["q", "k", "v", "attn_out", "c_fc", "mlp_out", "lm_head"], share="layer")
