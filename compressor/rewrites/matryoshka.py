"""matryoshka: smaller models nested within one checkpoint, to be cut out without training each.

Sources: MatFormer, arXiv 2310.07707 (ffn); Matryoshka representation learning, arXiv 2205.13147 (head); 2D Matryoshka,
arXiv 2402.14776 (depth); evintunador/matryoshkaGPT (width); how a pretrained GPT-2 gets there is ours
(modeling/nesting.py, nested_bases.py). Recovery trains all sizes at once, the smaller ones towards the whole one
(sandwich rule: Yu & Huang, arXiv 1903.05134).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from .. import gpt2, models
from ..capture import Batch
from ..errors import UserError
from ..modeling import GPT2CompressedConfig
from ..modeling.modeling_gpt2_compressed import sliced_model
from ..modeling.nesting import FULL, HEAD_MAP, Size, full_size, proportional, reflected, size_of, sliced_config
from ..token_groups import Strings
from .base import BLOCK_SITES, FitContext, Nest, Rewrite, sites_of
from .hierarchy import Emergent, Imposed, as_record, hierarchy
from .hierarchy_diagnosis import diagnose
from .matryoshka_fit import fit_nested
from .structure import add_structure, without_structure


@dataclass(frozen=True)
class Matryoshka(Rewrite):
    """ffn, width, depth, head: the smaller sizes, whole numbers or shares of the whole: neurons; numbers of the
    residual stream, with heads and FFNs in proportion; layers; coordinates of the final state that logits are made of.
    importance: which neurons come first. train: the sizes of a step: one, each in its turn, so that a recovery of as
    many times more steps costs what the sizes would alone; joint, all of them; sandwich, the whole, the smallest and
    one drawn. inner: the share of the whole size's own predictions, against next tokens, in what the smaller learn,
    where no teacher is. only: cut this size out at once, such as {ffn: 0.5}; the result is that model alone. groups: of
    tokens, whose loss sizes that read a prefix of the final state learn by too, such as {kind: imposed}
    (hierarchy.py)."""

    name = "matryoshka"

    ffn: list | None = dataclasses.field(default_factory=lambda: [0.5, 0.25, 0.125])
    width: list | None = None
    depth: list | None = None
    head: list | None = None
    importance: Literal["variance", "energy"] = "variance"
    train: Literal["joint", "sandwich", "one"] = "one"
    inner: float = 0.0
    only: dict | None = None
    groups: dict | None = None

    # ------------------------------------------------------------ structure

    def check(self, base: GPT2Config) -> None:
        if not 0 <= self.inner <= 1:
            raise UserError(f"matryoshka: inner is {self.inner}; allowed: 0 to 1")
        whole = _whole(base)
        for name in FULL:
            sizes = self._absolute(name, base)
            least = 2 * base.n_head if name == "width" else 1
            if any(not least <= size < whole[name] for size in sizes) or len(set(sizes)) < len(sizes):
                raise UserError(
                    f"matryoshka: {name} is {getattr(self, name)}; allowed: different whole numbers from {least} to "
                    f"{whole[name] - 1}, or shares of {whole[name]}"
                )
            if name == "width" and any(size % base.n_head for size in sizes):
                raise UserError(f"matryoshka: width is {self.width}; allowed: multiples of the {base.n_head} heads")
        if not any(self._absolute(name, base) for name in FULL):
            raise UserError("matryoshka: no smaller size; give ffn, width, depth or head, such as ffn=[0.5]")
        self._only(base)
        self._groups(base)

    def _groups(self, base: GPT2Config) -> Imposed | Emergent | None:
        if self.groups is None:
            return None
        prefixes = len({*self._absolute("head", base), *(width - 1 for width in self._absolute("width", base))})
        if not prefixes or self.only is not None:
            raise UserError("matryoshka: groups are of sizes that are trained together; give head or width, not only")
        return hierarchy(self.groups, prefixes)

    def _absolute(self, name: str, base: GPT2Config) -> list[int]:
        """The smaller sizes of a part, the largest first."""
        given, whole = getattr(self, name) or [], _whole(base)[name]
        for value in given:
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or (
                    isinstance(value, float) and (not 0 < value < 1 or abs(value * whole - round(value * whole)) > 1e-6)
                )
            ):
                raise UserError(
                    f"matryoshka: {name} has {value!r}; allowed: whole numbers below {whole}, or shares of it that "
                    "are whole"
                )
        return sorted((round(v * whole) if isinstance(v, float) else v for v in given), reverse=True)

    def _entry(self, base: GPT2Config) -> dict[str, Any]:
        own = {name: self._absolute(name, base) for name in FULL}
        whole = _whole(base)
        beside = {proportional(whole["ffn"], width, whole["width"]) for width in own["width"]}
        own["ffn"] = sorted({*own["ffn"], *beside}, reverse=True)
        rotated = bool(own["width"] or own["head"])
        return {**{name: [whole[name], *own[name]] for name in FULL}, "rotated": rotated, "ffn_of_layers": None}

    def _nested(self, base: GPT2Config) -> GPT2CompressedConfig:
        """The config of the nested model, before `only`."""
        return add_structure(base, "matryoshka", self._entry(base))

    def _only(self, base: GPT2Config) -> Size | None:
        if self.only is None:
            return None
        unknown = set(self.only) - set(FULL)
        if unknown or not self.only:
            raise UserError(f"matryoshka: only is {self.only}; allowed: a mapping of {', '.join(FULL)}")
        try:
            return size_of(self._nested(base), **self.only)
        except (ValueError, TypeError) as error:
            raise UserError(f"matryoshka: only is {self.only}: {error}") from error

    def resolved(self, base: GPT2Config) -> Matryoshka:
        size = self._only(base)
        sizes: dict[str, Any] = {name: self._absolute(name, base) or None for name in FULL}
        only = None if size is None else chosen_by(size, base.n_embd)
        groups = self._groups(base)
        return dataclasses.replace(self, **sizes, only=only, groups=None if groups is None else as_record(groups))

    def sites(self, base: GPT2Config) -> frozenset[str]:
        return sites_of(range(base.n_layer), BLOCK_SITES) | {"wpe", "lm_head", "streams"}

    def removed(self, base: GPT2Config) -> frozenset[int]:
        size = self._only(base)
        return frozenset() if size is None else frozenset(range(size.depth, base.n_layer))

    def config(self, base: GPT2Config) -> GPT2Config:
        nested, size = self._nested(base), self._only(base)
        if size is None:
            return nested
        found = sliced_config(nested, size)
        found.n_layer = base.n_layer  # `removed` takes the others out
        return found

    # ------------------------------------------------------------ weights

    def fit(self, model: GPT2LMHeadModel, context: FitContext) -> None:
        size = self._only(context.original.config)
        if size is None:
            fit_nested(model, context, importance=self.importance)
            return
        nested = models.build(self._nested(context.original.config)).to(model.dtype)  # type: ignore[arg-type]
        fit_nested(nested, context, importance=self.importance)
        nested.tie_weights()
        cut = sliced_model(dict(nested.named_parameters()), nested.config, size)
        model.load_state_dict({key: alone(value) for key, value in cut.state_dict().items()}, assign=True)

    # ------------------------------------------------------------ training and export

    def beside_adapters(self, model: GPT2LMHeadModel) -> list[nn.Parameter]:
        if not getattr(model.config, "matryoshka", None):
            return []
        head_map = gpt2.head_map(model)
        return [*gpt2.nesting(model).parameters(), *([] if head_map is None else head_map.parameters())]

    def nest(self, model: GPT2LMHeadModel) -> Nest | None:
        if self.only is not None:
            return None
        groups = self._groups(model.config)
        weighted = groups if groups is not None and groups.weight else None
        return Nest(tuple(trained_sizes(model.config)), self.train, self.inner, weighted)

    def fold(self, model: GPT2LMHeadModel) -> GPT2LMHeadModel | None:
        if not getattr(model.config, "matryoshka", None):
            return None
        return plain(model)

    def diagnose(
        self, model: GPT2LMHeadModel, batches: Iterable[Batch], strings: Strings = ()
    ) -> dict[str, Any] | None:
        """The hierarchy of token embeddings by prefix, where sizes read one (rewrites/hierarchy_diagnosis.py)."""
        if self.only is not None:
            return None
        groups = self._groups(model.config)
        settings = groups if isinstance(groups, Emergent) else Emergent()
        return diagnose(model, trained_sizes(model.config), strings, settings)

    @classmethod
    def neutral(cls, base: GPT2Config) -> Matryoshka:
        return cls(ffn=[max(1, gpt2.d_ff(base) // 2)])


def alone(tensor: Tensor) -> Tensor:
    """In memory of its own, which a view keeps the whole of."""
    return tensor.clone(memory_format=torch.contiguous_format)


def chosen_by(size: Size, whole_width: int) -> dict[str, Any]:
    """The choices that `size_of` makes this size of: what `only` is, and what a nested model's `slice` takes."""
    ffn = list(size.ffn) if len(set(size.ffn)) > 1 else size.ffn[0]
    found = {**size._asdict(), "ffn": ffn}
    if size.width < whole_width:
        del found["head"]  # that of a narrower model is its width
    return found


def _whole(base: GPT2Config) -> dict[str, int]:
    return {"ffn": gpt2.d_ff(base), "width": base.n_embd, "depth": base.n_layer, "head": base.n_embd}


def trained_sizes(config: Any) -> list[Size]:
    """The whole model, then each smaller size of each part, the others whole but what a width takes along."""
    entry = config.matryoshka
    apart = {proportional(entry["ffn"][0], width, entry["width"][0]) for width in entry["width"][1:]}
    asked = next(r["ffn"] or [] for r in reversed(config.compression) if r["rewrite"] == Matryoshka.name)
    asked = [round(size * entry["ffn"][0]) if isinstance(size, float) else size for size in asked]
    ffn = [ff for ff in entry["ffn"][1:] if ff not in apart or ff in asked]
    choices = [("ffn", ff) for ff in ffn] + [(name, size) for name in FULL[1:] for size in entry[name][1:]]
    return [full_size(config), *(size_of(config, **{name: size}) for name, size in choices)]


@torch.no_grad()
def plain(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """A nested model, at its whole size, or a slice of one, as plain GPT-2: FFNs with fewer neurons than others filled
    up with ones that are 0; a rotated one's head a matrix of its own, in whose place the map before it goes."""
    known, entry = model.state_dict(), model.config.matryoshka
    found = {}
    for layer in range(model.config.n_layer if entry["ffn_of_layers"] else 0):
        for name, axis in zip(gpt2.FFN_OF_NEURONS, (1, 0, 0), strict=True):
            tensor = known[gpt2.ffn_key(layer, name)]
            filled = list(tensor.shape)
            filled[axis] = entry["ffn"][0] - filled[axis]
            found[gpt2.ffn_key(layer, name)] = torch.cat([tensor, tensor.new_zeros(filled)], axis)
    if entry["rotated"]:
        weight, bias = (known[f"{HEAD_MAP}.{name}"].cpu().double() for name in ("weight", "bias"))
        embeddings = gpt2.embeddings(model)
        head = gpt2.head(model).weight.detach()[:, : len(weight)].cpu().double() @ weight
        shift = torch.linalg.lstsq(weight, bias[:, None]).solution[:, 0]  # head (x + shift) has the bias in it
        final = f"{gpt2.norm_key(2 * model.config.n_layer, model.config.n_layer)}.bias"
        found |= {
            gpt2.EMBEDDING_KEYS[0]: reflected(embeddings),
            gpt2.HEAD_KEY: head.to(embeddings),
            final: (known[final].cpu().double() + shift).to(known[final]),
        }
    return without_structure(model, "matryoshka", lambda entry: True, found)
