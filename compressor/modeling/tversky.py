"""Tversky layers: similarity of an input to learned prototypes in place of a linear's dot products.

x and a prototype p are sets of the features of a bank: f_k is present with salience x . f_k where that is above 0. The
contrast form (Tversky 1977) is S(x, p) = theta f(X and P) - alpha f(X - P) - beta f(P - X); the ratio form is
theta f(X and P) / (theta f(X and P) + alpha f(X - P) + beta f(P - X) + offset). Every f is a sum over the features
("per feature", as the text of Doumbouya, Jurafsky & Manning, arXiv 2506.11035, section 3; their library reduces some
sums instead). With z = x . f_k and u = p . f_k:

    f(X and P): product z+ u+, mean (z+ + u+) / 2, gmean sqrt(z+ u+), min, max, softmin -log(e^-z + e^-u), where both
                are present
    f(X - P):   product z+ u-, ignorematch z+ where p lacks the feature, subtractmatch (z+ - u+)+
    f(P - X):   likewise, with x and p exchanged

product, mean, gmean, ignorematch are matrix products. min is half of |z|_1 + |u|_1 - |z - u|_1, and max and
subtractmatch follow from it; softmin goes over the features one by one. No tensor of tokens x prototypes x features is
ever made. An antipodal bank holds f_k and stands for -f_k too: with orthonormal features, products, theta = 1 and
alpha + beta = 1, S(x, p) is x . p.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .tversky_factors import LEFT, Factors, minima, plus, root

FORMS = ("contrast", "ratio")
INTERSECTIONS = ("product", "min", "max", "mean", "gmean", "softmin")
DIFFERENCES = ("product", "ignorematch", "subtractmatch")
PROTOTYPES = ("explicit", "features")
SCALARS = ("theta", "alpha", "beta")
FORM = ("form", "intersection", "difference", "antipodal", "normalize", "offset")  # how x and p are compared


class Scalars(nn.Module):
    """theta, alpha and beta: parameters [1], or fixed numbers; kept at 0 or more through a softplus where asked."""

    def __init__(self, theta: float, alpha: float, beta: float, *, learnable: bool = True, non_negative: bool = False):
        super().__init__()
        self.start = {"theta": float(theta), "alpha": float(alpha), "beta": float(beta)}
        self.learnable, self.non_negative = learnable, non_negative
        if non_negative and min(self.start.values()) < 0:
            raise ValueError(f"theta, alpha and beta are to be 0 or more: {self.start}")
        if learnable:
            for name in SCALARS:
                self.register_parameter(name, nn.Parameter(torch.empty(1)))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.learnable:
            for name in SCALARS:
                init.constant_(getattr(self, name), self.raw(self.start[name]))

    def raw(self, value: float) -> float:
        """What is stored for a value: the inverse of the softplus where there is one."""
        if not self.non_negative:
            return value
        least = max(value, 1e-6)  # 0 is where a softplus never gets
        return least + math.log(-math.expm1(-least))

    def forward(self) -> tuple[Any, Any, Any]:
        """theta, alpha, beta: tensors [1], or numbers where they are fixed."""
        if not self.learnable:
            return tuple(self.start[name] for name in SCALARS)  # type: ignore[return-value]
        values = (getattr(self, name) for name in SCALARS)
        return tuple(nn.functional.softplus(value) if self.non_negative else value for value in values)  # type: ignore


class FeatureBank(nn.Module):
    """Features [features, width], and the scalars of the layers that use it where these are shared."""

    def __init__(self, features: int, width: int, scalars: Scalars | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(features, width))
        self.scalars = scalars
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.normal_(self.weight, mean=0.0, std=self.weight.shape[1] ** -0.5)  # an x of norm sqrt(width) gives z ~ 1


class TverskyProjection(nn.Module):
    """[..., width_in] -> [..., width_out]: the similarities of x to the prototypes, then scale and bias per output.

    features: of the bank. prototypes: "explicit" = p_j [width_out, width_in]; "features" = what p_j . f_k are to be,
    [width_out, features]; "given" = the caller's, at every call. shared: the bank is the caller's too, and its scalars
    where it has any. Raises ValueError for words that are not known and settings that do not go together.
    """

    def __init__(
        self,
        width_in: int,
        width_out: int,
        features: int,
        *,
        form: str = "contrast",
        intersection: str = "product",
        difference: str = "product",
        antipodal: bool = False,
        normalize: bool = False,
        offset: float = 1.0,
        prototypes: str = "explicit",
        shared: bool = False,
        share_scalars: bool = False,
        theta: float = 1.0,
        alpha: float = 0.5,
        beta: float = 0.5,
        learn_scalars: bool = True,
        non_negative: bool = False,
        scale: bool = False,
        bias: bool = True,
        initializer_range: float = 0.02,
    ) -> None:
        super().__init__()
        for word, given, known in (
            ("form", form, FORMS),
            ("intersection", intersection, INTERSECTIONS),
            ("difference", difference, DIFFERENCES),
            ("prototypes", prototypes, (*PROTOTYPES, "given")),
        ):
            if given not in known:
                raise ValueError(f"{word} is {given!r}; allowed: {', '.join(known)}")
        if form == "ratio" and not (non_negative and offset > 0):
            raise ValueError("form=ratio divides by its scalars: they are to be non_negative, and the offset above 0")
        if normalize and prototypes == "features":
            raise ValueError("normalize needs prototypes, and prototypes=features has none")
        self.width_in, self.width_out, self.form, self.offset = width_in, width_out, form, offset
        self.intersection, self.difference, self.antipodal = intersection, difference, antipodal
        self.normalize, self.kind, self.initializer_range = normalize, prototypes, initializer_range
        own = None if share_scalars else Scalars(theta, alpha, beta, learnable=learn_scalars, non_negative=non_negative)
        self.scalars = own
        self.bank = None if shared else FeatureBank(features, width_in)
        rows = {"explicit": width_in, "features": features, "given": None}[prototypes]
        self.prototypes: Tensor | None  # float[width_out, width_in or features]
        self.scale: Tensor | None  # float[width_out]
        self.bias: Tensor | None
        self.register_parameter("prototypes", None if rows is None else nn.Parameter(torch.empty(width_out, rows)))
        self.register_parameter("scale", nn.Parameter(torch.empty(width_out)) if scale else None)
        self.register_parameter("bias", nn.Parameter(torch.empty(width_out)) if bias else None)
        self._kept: tuple[Any, list[Tensor], _Prepared] | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.prototypes is not None:  # a ratio compares sizes: those of x; a contrast starts as small as a linear
            init.normal_(self.prototypes, mean=0.0, std=1.0 if self.form == "ratio" else self.initializer_range)
        if self.scale is not None:
            init.ones_(self.scale)
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self, x: Tensor, bank: FeatureBank | None = None, prototypes: Tensor | None = None) -> Tensor:
        bank = self.bank if bank is None else bank
        if bank is None:
            raise ValueError("this projection shares its bank, which is to be given at every call")
        return self.compare(self.measure(x, bank), bank, prototypes)

    def measure(self, x: Tensor, bank: FeatureBank) -> Tensor:  # float[..., width_in] -> float[..., features]
        """z = x . f_k. Layers that share a bank and a `normalize` may share it."""
        return (nn.functional.normalize(x, dim=-1) if self.normalize else x) @ bank.weight.T

    def compare(self, z: Tensor, bank: FeatureBank, prototypes: Tensor | None = None) -> Tensor:
        """The output, float[..., width_out], of what `measure` gave."""
        y = self.similarities(z.reshape(-1, z.shape[-1]), bank, prototypes)
        if self.scale is not None:
            y = y * self.scale
        if self.bias is not None:
            y = plus(y, self.bias)
        return y.view(*z.shape[:-1], self.width_out)

    def similarities(self, z: Tensor, bank: FeatureBank, prototypes: Tensor | None = None) -> Tensor:
        """S before scale and bias, float[tokens, width_out], of z float[tokens, features]."""
        return self.similarity(z, self._prepared(bank, prototypes))

    def terms(self, z: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """f(X and P), f(X - P), f(P - X), float[tokens, width_out] each, of z float[tokens, features] and of u
        float[width_out, features]."""
        common = self._common(z, u) if self._needs_common else None
        several = [
            self._factors(u, 1.0, None, None),
            self._factors(u, None, 1.0, 0.0),
            self._factors(u, None, 0.0, 1.0),
        ]
        first, second, third = (factors.of(z, common) for factors in several)
        return first, second, third

    def product(self, z: Tensor, bank: FeatureBank, prototypes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """left [..., k] and right [width_out, k] with `compare` = left right^T, of a contrast of matrix products."""
        if self.form == "ratio" or self._needs_common or self.intersection == "softmin":
            raise ValueError(f"{self.form} of {self.intersection} and {self.difference} is no sum of matrix products")
        factors = self._prepared(bank, prototypes).whole
        names = list(factors.right)
        left = [LEFT[name](z) for name in names]
        right = [factors.right[name] for name in names]
        if factors.constant is not None:
            left, right = [*left, torch.ones_like(z[..., :1])], [*right, factors.constant[:, None]]
        if self.scale is not None:
            right = [part * self.scale[:, None] for part in right]
        if self.bias is not None:
            left, right = [*left, torch.ones_like(z[..., :1])], [*right, self.bias[:, None]]
        return torch.cat(left, -1), torch.cat(right, -1)

    def prototype_features(self, bank: FeatureBank, prototypes: Tensor | None = None) -> Tensor:
        """u = p_j . f_k: float[width_out, features]."""
        given = self.prototypes if prototypes is None else prototypes
        if given is None:
            raise ValueError("this projection has no prototypes of its own; they are to be given at every call")
        if self.kind == "features":
            return given
        return (nn.functional.normalize(given, dim=-1) if self.normalize else given) @ bank.weight.T

    def strengths(self, bank: FeatureBank) -> tuple[Any, Any, Any]:
        """theta, alpha, beta: its own, or the bank's."""
        scalars = bank.scalars if self.scalars is None else self.scalars
        assert scalars is not None
        return scalars()

    def similarity(self, z: Tensor, prepared: _Prepared) -> Tensor:
        """S, float[tokens, width_out], of z float[tokens, features]."""
        common = self._common(z, prepared.u) if self._needs_common else None
        if prepared.part is None:
            return prepared.whole.of(z, common)
        shared, apart = prepared.part.of(z, common), prepared.whole.of(z, common)
        wide = torch.promote_types(shared.dtype, torch.float32)  # an offset may be small
        above = shared.to(wide)
        return (above / (above + apart.to(wide) + self.offset)).to(shared.dtype)

    # ------------------------------------------------------------ what does not depend on x

    def _prepared(self, bank: FeatureBank, given: Tensor | None) -> _Prepared:
        """Kept between calls in evaluation, as long as no tensor that it was made of changes."""
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            self._kept = None
            return self._prepare(bank, given)
        tensors = [*bank.parameters(), *self.parameters(), *([] if given is None else [given])]
        if any(tensor.is_inference() or tensor.is_meta for tensor in tensors):  # they do not say when they change
            return self._prepare(bank, given)
        key = [(tensor.data_ptr(), tensor._version, tensor.dtype, tensor.device) for tensor in tensors]
        kind = bank.weight.device.type
        key.append((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)))  # type: ignore[arg-type]
        if self._kept is None or self._kept[0] != key:
            held = [tensor.detach() for tensor in tensors]  # so that no other comes to lie at their addresses
            self._kept = key, held, self._prepare(bank, given)
        return self._kept[2]

    def _prepare(self, bank: FeatureBank, given: Tensor | None) -> _Prepared:
        u, (theta, alpha, beta) = self.prototype_features(bank, given), self.strengths(bank)
        if self.form == "contrast":
            whole, part = self._factors(u, theta, -alpha, -beta), None
        else:
            whole, part = self._factors(u, None, alpha, beta), self._factors(u, theta, None, None)
        return _Prepared(u, whole, part)

    @property
    def _needs_common(self) -> bool:
        return self.intersection in ("min", "max") or self.difference == "subtractmatch"

    def _factors(self, u: Tensor, theta: Any, alpha: Any, beta: Any) -> Factors:
        """theta f(X and P) + alpha f(X - P) + beta f(P - X) as products of functions of z with functions of u; without
        the intersection where theta is None, the differences where alpha and beta are."""
        result, both, whole = Factors(), self.antipodal, theta is not None and alpha is not None
        if both and self.intersection == self.difference == "product" and whole:
            opposite = alpha + beta  # z+u+ + z-u- = (zu + |z||u|) / 2, z+u- + z-u+ = (|z||u| - zu) / 2
            result.add("signed", u * ((theta - opposite) / 2))
            bent = (theta + opposite) / 2
            known = not isinstance(bent, Tensor) or not (  # else no graph may hang on its number
                torch.is_grad_enabled() or torch.compiler.is_compiling() or bent.is_meta
            )
            if not known or bent != 0:  # 0: the similarity is linear
                result.add("size", u.abs() * bent)
            return result
        for sign in ("+", "-") if both else ("+",):
            other = "-" if sign == "+" else "+"
            here, there = (u, -u) if sign == "+" else (-u, u)
            present = (here > 0).to(u.dtype)
            if theta is None:
                pass
            elif self.intersection == "product":
                result.add(f"relu{sign}", here.relu() * theta)
            elif self.intersection == "gmean":
                result.add(f"root{sign}", root(here) * theta)
            elif self.intersection in ("mean", "max"):
                part = theta / 2 if self.intersection == "mean" else theta
                result.add(f"relu{sign}", present * part)
                result.add(f"has{sign}", here.relu() * part)
            if alpha is None:
                continue
            if self.difference == "product":
                result.add(f"relu{sign}", there.relu() * alpha)
                result.add(f"relu{other}", here.relu() * beta)
            elif self.difference == "ignorematch":
                result.add(f"relu{sign}", (1 - present) * alpha)
                result.add(f"has{sign}", here.relu() * -beta)  # x lacks it: 1 - has
                result.add_constant((here.relu() * beta).sum(-1))
            else:
                result.add_sum(sign, alpha)
                result.add_constant((here.relu() * beta).sum(-1))
        if theta is None:
            pass
        elif self.intersection == "softmin":
            result.softmin, result.u, result.halves = theta, u, (1.0, -1.0) if both else (1.0,)
        elif self.intersection == "min":
            result.common = theta
        elif self.intersection == "max":  # a + p - min, where both are present
            result.common = -theta
        if alpha is not None and self.difference == "subtractmatch":
            both_sides = -(alpha + beta)
            result.common = both_sides if result.common is None else result.common + both_sides
        return result

    def _common(self, z: Tensor, u: Tensor) -> Tensor:
        """The sum over the features of min(z+, u+), with an antipodal bank of min(z-, u-) too: float[tokens, out]."""
        a, p = (z, u) if self.antipodal else (z.relu(), u.relu())  # antipodal: |z| and |u| count where signs agree
        wide = torch.promote_types(z.dtype, torch.float32)
        return minima(a.to(wide), p.to(wide)).to(z.dtype)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._kept = None
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}  # a copy makes its own


class _Prepared(NamedTuple):
    """What a projection makes of its prototypes, features and scalars."""

    u: Tensor  # [out, features]
    whole: Factors  # the contrast, or the differences of a ratio
    part: Factors | None  # the intersection of a ratio
