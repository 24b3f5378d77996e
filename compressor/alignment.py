"""Step 2: which neuron of a layer does the work of which neuron of another, and how an FFN is permuted by that exactly.

The assignment maximises the summed Pearson correlation of matched neurons (Verma, Murray & Duh, arXiv 2501.06126) or,
without data, the inner product of their weights (git re-basin: Ainsworth et al., arXiv 2209.04836). Adjacent layers are
always matched; any other pair is served by composition, or by its own assignment where one was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import GPT2Config, GPT2LMHeadModel

from . import artifacts, gpt2
from .assignment import Quality, assign, rate
from .capture import Batch, capture
from .correlation import AllSum, CorrelationStream, LinearCorrelations
from .errors import UserError, unknown
from .windows import anchor_layer, check_length

METHODS = ("activation", "weight", "none")
SITES = ("pre", "post")
PAIRS = ("chain", "direct")
MEMORY_BUDGET = 4 * 1024**3  # bytes; holds the chains of GPT-2 small and medium in one pass

FFNWeights = tuple[Tensor, Tensor, Tensor, Tensor]  # as gpt2.ffn_weights gives them


@dataclass(frozen=True, eq=False)
class Alignment:
    """`permutation[i]` is the neuron of `layer` matched to neuron i of `anchor`."""

    anchor: int
    layer: int
    permutation: Tensor  # int64[d_ff]
    correlation: Tensor  # float32[d_ff], of each match; for method weight the cosine of the two neurons' weights
    quality: Quality


@dataclass(frozen=True, eq=False)
class Alignments:
    """The solved alignments of one model; each pair of layers once, the lower layer as its anchor."""

    method: str
    site: str | None  # of the activations; None without activations
    pairs: str
    tokens: int
    n_layer: int
    d_ff: int
    solved: tuple[Alignment, ...]

    def to_anchor(self, layer: int, anchor: int) -> Tensor:
        """int64[d_ff]: entry i is the neuron of `layer` matched to neuron i of `anchor`; see `route` for how."""
        route = self.route(layer, anchor)
        if route == "identity":
            return torch.arange(self.d_ff)
        if layer < anchor:
            return self.to_anchor(anchor, layer).argsort()  # the inverse
        if route == "direct":
            return self._between(anchor, layer).permutation
        permutation = self._between(anchor, anchor + 1).permutation
        for lower in range(anchor + 1, layer):
            permutation = self._between(lower, lower + 1).permutation[permutation]
        return permutation

    def route(self, layer: int, anchor: int) -> str:
        """How `to_anchor` goes: "identity" (same layer, or method none), "direct" (an assignment was solved between the
        two layers, as always for adjacent ones) or "chain" (adjacent assignments composed)."""
        for index in (layer, anchor):
            if not 0 <= index < self.n_layer:
                raise UserError(f"layer {index} is not in this alignment; allowed: 0 to {self.n_layer - 1}")
        if layer == anchor or self.method == "none":
            return "identity"
        pair = (min(layer, anchor), max(layer, anchor))
        return "direct" if any((item.anchor, item.layer) == pair for item in self.solved) else "chain"

    def _between(self, anchor: int, layer: int) -> Alignment:
        return next(item for item in self.solved if (item.anchor, item.layer) == (anchor, layer))


# ---------------------------------------------------------------- align


def identity(config: GPT2Config) -> Alignments:
    """Method none: every neuron stays where it is."""
    return Alignments("none", None, "chain", 0, config.n_layer, gpt2.d_ff(config), ())


def layer_pairs(
    n_layer: int, pairs: str = "chain", *, n: int | None = None, anchor: str | int = "middle", start: int | None = None
) -> list[tuple[int, int]]:
    """The pairs (lower, higher) of layers to solve.

    "chain": the adjacent ones. "direct": also each layer of every window of n layers (or of the one at `start`) with
    that window's anchor; an anchor that is a layer takes the windows that hold it.

    Raises UserError for unknown words and for an n, start or anchor outside the model.
    """
    if pairs not in PAIRS:
        raise unknown("pairs", pairs, PAIRS)
    chain = set(pairwise(range(n_layer)))
    if pairs == "chain":
        return sorted(chain)
    if n is None:
        raise UserError("pairs direct need the length n of the windows; give --n")
    check_length(n_layer, n)
    if start is not None and not 0 <= start <= n_layer - n:
        raise UserError(f"start {start} with n {n} is out of range for {n_layer} layers; allowed: 0 to {n_layer - n}")
    if isinstance(anchor, int) and not 0 <= anchor < n_layer:
        raise UserError(f"anchor {anchor} is not a layer of the model; allowed: 0 to {n_layer - 1}")
    direct = set()
    for first in range(n_layer - n + 1) if start is None else (start,):
        if start is None and isinstance(anchor, int) and not first <= anchor < first + n:
            continue
        centre = anchor_layer(anchor, first, n)
        direct |= {(min(centre, layer), max(centre, layer)) for layer in range(first, first + n) if layer != centre}
    return sorted(chain | direct)


def align_activations(
    model: GPT2LMHeadModel,
    batches: Iterable[Batch],
    *,
    site: str = "pre",
    pairs: str = "chain",
    n: int | None = None,
    anchor: str | int = "middle",
    start: int | None = None,
    memory_budget: int = MEMORY_BUDGET,
    seed: int = 0,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
    all_sum: AllSum | None = None,
) -> Alignments:
    """Match neurons by the correlation of their activations over the tokens of `batches` (see `capture`).

    `pairs`, `n`, `anchor`, `start`: see `layer_pairs`. `memory_budget`: bytes for the running sums (a pair: 16 d^2 for
    site pre, 8 d_ff^2 for post); when they do not fit, the data are run through again for each slab of pairs, with the
    same result to the bit.
    `seed` is for the random permutation of the quality rows. `progress` gets the tokens of each batch of each pass.
    With `all_sum` (e.g. `Accelerator().reduce`) every process gives its share of the batches and gets the same result.

    Raises UserError for an unknown site or pairs and for fewer than two tokens.
    """
    if site not in SITES:
        raise unknown("site", site, SITES)
    width = gpt2.d_ff(model.config)
    wanted = layer_pairs(len(gpt2.blocks(model)), pairs, n=n, anchor=anchor, start=start)
    in_a_pass = max(1, memory_budget // (16 * model.config.n_embd**2 if site == "pre" else 8 * width**2))
    slabs = [wanted[first : first + in_a_pass] for first in range(0, len(wanted), in_a_pass)]
    if len(slabs) > 1:
        batches = list(batches)  # token ids, to be run through again: 9 bytes a token
    solved: list[Alignment] = []
    tokens = 0
    for slab in slabs:
        stream = _correlate(model, batches, slab, site, progress, all_sum)
        solved += _solve(slab, stream.correlation, stream.dead, seed, threads)
        tokens = stream.count
    return Alignments("activation", site, pairs, tokens, len(gpt2.blocks(model)), width, tuple(solved))


def _correlate(
    model: GPT2LMHeadModel,
    batches: Iterable[Batch],
    pairs: Sequence[tuple[int, int]],
    site: str,
    progress: Callable[[int], None] | None,
    all_sum: AllSum | None,
) -> CorrelationStream | LinearCorrelations:
    """One pass over the data for some pairs. Pre-activations are linear in the FFN's input, which is summed instead."""
    device = next(model.parameters()).device
    home = torch.device("cpu") if device.type == "mps" else device  # MPS knows no float64
    linear = site == "pre"
    summed = "input" if linear else site
    stream = CorrelationStream(
        pairs, model.config.n_embd if linear else gpt2.d_ff(model.config), own=linear, device=home
    )

    def take(layer: int, at: str, activations: Tensor) -> None:
        if at == summed:
            stream.update(layer, activations)

    # Both sites, so that capture's check for NaN names the layer whose pre-activations have them.
    capture(model, batches, take, sites=(summed, site), layers=stream.layers, progress=progress)
    if all_sum is not None:
        stream.reduce(all_sum)
    if stream.count < 2:
        raise UserError(f"alignment by activation needs at least 2 tokens, got {stream.count}; give more data")
    if not linear:
        return stream
    weights = {layer: gpt2.ffn_weights(model, layer)[:2] for layer in stream.layers}
    return LinearCorrelations(stream, lambda layer: (weights[layer][0].to(home), weights[layer][1].to(home)))


def align_weights(
    model: GPT2LMHeadModel,
    *,
    pairs: str = "chain",
    n: int | None = None,
    anchor: str | int = "middle",
    start: int | None = None,
    seed: int = 0,
    threads: int | None = None,
) -> Alignments:
    """Match neurons by their weights alone: a neuron's vector is its c_fc column, its c_fc bias and its c_proj row.

    Maximising the sum of inner products is minimising the squared distance of the two FFNs' weights, the residual that
    is left when they are averaged. The similarities reported are cosines of the same vectors.

    Raises UserError for unknown pairs and for weights that are not finite.
    """
    wanted = layer_pairs(len(gpt2.blocks(model)), pairs, n=n, anchor=anchor, start=start)
    width = gpt2.d_ff(model.config)

    def vectors(layer: int) -> Tensor:
        fc, bias, proj, _ = gpt2.ffn_weights(model, layer)
        result = torch.cat([fc.T, bias[:, None], proj], dim=1).float()  # [d_ff, 2 d + 1]
        if not torch.isfinite(result).all():
            raise UserError(f"layer {layer} has NaN or infinite weights; it cannot be aligned")
        return result

    def product(anchor: int, layer: int) -> Tensor:
        return vectors(anchor) @ vectors(layer).T

    def cosine(anchor: int, layer: int) -> Tensor:
        return normalize(vectors(anchor), dim=1) @ normalize(vectors(layer), dim=1).T

    def dead(layer: int) -> Tensor:
        return vectors(layer).norm(dim=1) == 0

    solved = _solve(wanted, product, dead, seed, threads, report=cosine)
    return Alignments("weight", None, pairs, 0, len(gpt2.blocks(model)), width, tuple(solved))


def _solve(
    pairs: Sequence[tuple[int, int]],
    similarity: Callable[[int, int], Tensor],
    dead: Callable[[int], Tensor],
    seed: int,
    threads: int | None,
    report: Callable[[int, int], Tensor] | None = None,
) -> list[Alignment]:
    """One assignment a pair: the greatest sum of `similarity(anchor, layer)`, float[d_ff, d_ff].

    Told in the values of `report`, where that is another.
    """

    def solve(pair: tuple[int, int]) -> Alignment:
        reported = similarity(*pair).cpu()
        permutation = assign(reported)
        if report is not None:
            reported = report(*pair).cpu()
        rating = rate(reported, permutation, dead(pair[0]).cpu(), dead(pair[1]).cpu(), seed)
        return Alignment(*pair, permutation, reported[torch.arange(len(permutation)), permutation].float(), rating)

    # scipy 1.17 frees the GIL while it solves: four of 3072^2 took 1.41 s in two threads, 2.80 s in one.
    with ThreadPoolExecutor(threads or torch.get_num_threads()) as executor:
        return list(executor.map(solve, pairs))


# ---------------------------------------------------------------- permute


def permute_ffn(weights: FFNWeights, permutation: Tensor) -> FFNWeights:
    """The same FFN with its neurons reordered, neuron i being the former `permutation[i]`.

    c_fc weight [d, d_ff] and bias [d_ff], c_proj weight [d_ff, d]; c_proj's bias [d] has no neurons and is handed back.
    """
    fc_weight, fc_bias, proj_weight, proj_bias = weights
    order = permutation.to(fc_weight.device)
    return fc_weight.index_select(1, order), fc_bias[order], proj_weight.index_select(0, order), proj_bias


def permute_layer(model: GPT2LMHeadModel, layer: int, permutation: Tensor) -> None:
    """Reorder the neurons of one FFN of a model in place; the model computes the same function."""
    weights = gpt2.ffn_weights(model, layer)
    for parameter, permuted in zip(weights, permute_ffn(weights, permutation), strict=True):
        parameter.copy_(permuted)  # gpt2.ffn_weights gives detached views of the parameters


# ---------------------------------------------------------------- disk

_FACTS = ("method", "site", "pairs", "tokens", "n_layer", "d_ff")


def _tensor_names(anchor: int, layer: int) -> tuple[str, str]:
    return f"permutation.{layer}_to_{anchor}", f"correlation.{layer}_to_{anchor}"


def save(folder: Path, alignments: Alignments, origin: artifacts.Provenance) -> None:
    """Write alignment.safetensors and alignment.json into a run folder, over what is there."""
    tensors: dict[str, Tensor] = {}
    for item in alignments.solved:
        names = _tensor_names(item.anchor, item.layer)
        tensors.update(zip(names, (item.permutation, item.correlation), strict=True))
    path = Path(folder) / "alignment.safetensors"
    artifacts.write_tensors(path, tensors)
    rows = [{"anchor": item.anchor, "layer": item.layer, **asdict(item.quality)} for item in alignments.solved]
    body = {name: getattr(alignments, name) for name in _FACTS}
    body |= {"tensors": artifacts.hash_files([path]), "quality": rows}
    artifacts.write_json(path.with_suffix(".json"), "alignment", body, origin)


def load(folder: Path) -> tuple[Alignments, dict[str, Any]]:
    """What `save` wrote, and its provenance (whose base_hash says which model it is of).

    Raises UserError when a file is missing or damaged, the two do not belong together, or a permutation is none.
    """
    path = Path(folder) / "alignment.safetensors"
    document = artifacts.read_json(path.with_suffix(".json"), "alignment", "align")
    tensors = artifacts.read_tensors(path, "align")
    again = "make it anew with `gpt2-compress align`"
    if document.get("tensors") != artifacts.hash_files([path]):
        raise UserError(f"{path} does not belong to the alignment.json beside it; {again}")
    try:
        solved = []
        for row in document["quality"]:
            quality = dict(row)
            pair = quality.pop("anchor"), quality.pop("layer")
            permutation, correlation = (tensors[name] for name in _tensor_names(*pair))
            solved.append(Alignment(*pair, permutation, correlation, Quality(**quality)))
        alignments = Alignments(**{name: document[name] for name in _FACTS}, solved=tuple(solved))
        origin = dict(document["provenance"])
        present = {(item.anchor, item.layer) for item in solved}
        needed = set() if alignments.method == "none" else set(pairwise(range(alignments.n_layer)))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path.with_suffix('.json')} is damaged ({error!r}); {again}") from error
    if needed - present:
        raise UserError(f"{path} lacks the adjacent layers {sorted(needed - present)}; {again}")
    for item in solved:
        if item.permutation.dtype != torch.int64 or not torch.equal(
            item.permutation.sort().values, torch.arange(alignments.d_ff)
        ):
            raise UserError(
                f"{path}: layer {item.layer} to {item.anchor} is no permutation of {alignments.d_ff} neurons; {again}"
            )
    return alignments, origin
