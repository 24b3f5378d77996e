"""soft_shared: the FFNs of a window share one base and keep a low-rank difference each, W_l = W_c + A_l B_l.

Source: the soft-shared notebook of chetaniitbhilai (RANK=8, WINDOW_K=4, LAMBDA=1e-4), whose deltas began as A = B = 0
and so never trained; here they are fitted in closed form. Whitened truncation: SVD-LLM, arXiv 2403.07378; alignment:
Verma, Murray & Duh, arXiv 2501.06126; shared base with per-layer deltas: Relaxed Recursive Transformers, 2410.20672.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.activations import ACT2FN

from .. import gpt2
from ..capture import capture
from ..correlation import SecondMoments
from ..errors import UserError
from ..windows import Window
from .base import FFN_SITES, FitContext, WindowRewrite, sites_of
from .groups import add_groups, fold_groups, group_index
from .low_rank import share
from .merged_n import aligned_ffns, aligned_moments


@dataclass(frozen=True)
class SoftShared(WindowRewrite):
    """W_l = W_c + A_l B_l for both linears of the window's FFNs; LayerNorms (and biases) stay per layer.

    rank: of every delta; 0 = none. base: "anchor" = the anchor's weights, "mean" = of the aligned weights, "lsq" =
    base, deltas and per-layer biases fitted jointly on calibration data, the output projections against the FFNs' true
    outputs.
    delta_init: "svd" = truncated SVD of the residual, "asvd" = truncated under the second moment of the linear's input,
    "lora" = A ~ N(0, 0.02), B = 0. fold_ln: fold ln_2's gain and bias into c_fc before sharing.
    """

    name = "soft_shared"

    rank: int = 8
    base: Literal["anchor", "mean", "lsq"] = "mean"
    delta_init: Literal["svd", "asvd", "lora"] = "asvd"
    bias: Literal["per_layer", "shared"] = "per_layer"
    fold_ln: bool = False

    def check(self, base: GPT2Config) -> None:
        super().check(base)
        largest = min(base.n_embd, gpt2.d_ff(base))
        if not 0 <= self.rank <= largest:
            raise UserError(
                f"soft_shared: rank {self.rank} is out of range; allowed: 0 to {largest} (the model's width)"
            )

    def sites(self, base: GPT2Config) -> frozenset[str]:
        return sites_of(self.layers(base), FFN_SITES)

    def config(self, base: GPT2Config) -> GPT2Config:
        return add_groups(base, self.windows(base), rank=self.rank, bias=self.bias)

    def fit(self, model: GPT2LMHeadModel, context: FitContext) -> None:
        for window in self.windows(context.original.config):
            _Group(self, window, context).fit(model)

    def trainable(self, model: GPT2LMHeadModel) -> list[nn.Parameter]:
        return [parameter for a, b, _ in self._deltas(model) for parameter in (a, b)]

    def penalty(self, model: GPT2LMHeadModel) -> Tensor | None:
        """The mean over all deltas of ||A B||_F^2 / ||W_c||_F^2, with ||A B||_F^2 = tr((A^T A)(B B^T)): r x r only."""
        terms = [((a.T @ a) * (b @ b.T).T).sum() / base.detach().square().sum() for a, b, base in self._deltas(model)]
        return torch.stack(terms).mean() if terms else None

    def _deltas(self, model: GPT2LMHeadModel) -> list[tuple[nn.Parameter, nn.Parameter, nn.Parameter]]:
        """(A, B, base weight) of every delta of this rewrite's groups in a model made by it."""
        found = []
        for g, entry in enumerate(getattr(model.config, "ffn_groups", None) or []):
            if entry["rank"] and (self.scope == "tile" or entry["start"] == self.start):
                for layer in entry["layers"]:
                    for linear in gpt2.FFN_LINEARS:
                        delta = getattr(gpt2.ffn(model, layer), linear)
                        found.append((delta.delta_a, delta.delta_b, getattr(gpt2.bank(model)[g], linear).weight))
        return found

    def fold(self, model: GPT2LMHeadModel) -> GPT2LMHeadModel:
        return fold_groups(model)

    @classmethod
    def neutral(cls, base: GPT2Config) -> SoftShared:
        return cls(n=min(3, base.n_layer), start=0, rank=min(base.n_embd, gpt2.d_ff(base)), delta_init="svd")


class _Group:
    """The fit of one window."""

    def __init__(self, rewrite: SoftShared, window: Window, context: FitContext):
        self.rewrite, self.window, self.context = rewrite, window, context
        self.anchor = window.anchor - window.start  # its place in the window
        self.weights: dict[int, tuple[Tensor, ...]] = {}  # aligned, float64: c_fc W, c_fc b, c_proj W, c_proj b
        for layer, (fc, fc_bias, proj, proj_bias) in zip(window.layers, aligned_ffns(context, window), strict=True):
            if rewrite.fold_ln:
                gain, shift = (tensor.double() for tensor in gpt2.ffn_norm(context.original, layer))
                fc, fc_bias = gain[:, None] * fc, fc_bias + shift @ fc
            self.weights[layer] = fc, fc_bias, proj, proj_bias
        whitened = rewrite.delta_init == "asvd" and rewrite.rank > 0
        self.data = rewrite.base == "lsq" or whitened  # needs calibration text

    def fit(self, model: GPT2LMHeadModel) -> None:
        group = group_index(model, self.context.layers[self.window.start])
        inputs = self._input_statistics() if self.data else {}
        fc_base, fc_deltas, fc_biases = self._share(
            {layer: self.weights[layer][:2] for layer in self.window.layers}, inputs
        )
        hidden: dict[int, tuple[Tensor, Tensor]] = {}
        proj = {layer: self.weights[layer][2:] for layer in self.window.layers}
        if self.rewrite.base == "lsq":
            hidden, proj = self._refit_targets(fc_base, fc_deltas, fc_biases)
        elif self.data:
            hidden = aligned_moments(self.context, self.window, centred=self._centred)
        proj_base, proj_deltas, proj_biases = self._share(proj, hidden)
        for linear, shared, deltas, biases in (
            ("c_fc", fc_base, fc_deltas, fc_biases),
            ("c_proj", proj_base, proj_deltas, proj_biases),
        ):
            gpt2.put(getattr(gpt2.bank(model)[group], linear), "weight", shared)
            if self.rewrite.bias == "shared":
                gpt2.put(getattr(gpt2.bank(model)[group], linear), "bias", torch.stack(list(biases.values())).mean(0))
            for layer in self.window.layers:
                part = getattr(gpt2.ffn(model, self.context.layers[layer]), linear)
                if self.rewrite.rank:
                    gpt2.put(part, "delta_a", deltas[layer][0])
                    gpt2.put(part, "delta_b", deltas[layer][1])
                if self.rewrite.bias == "per_layer":
                    gpt2.put(part, "bias", biases[layer])
        if self.rewrite.fold_ln:
            for layer in self.window.layers:
                gpt2.reset_ffn_norm(model, self.context.layers[layer])

    # ------------------------------------------------------------ statistics: layer -> (mean, moment) of an input

    def _input_statistics(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Of c_fc's input (ln_2's output, before its gain and bias where those are folded)."""
        result = {}
        for layer, moments in self.context.moments(list(self.window.layers), "input").items():
            mean, moment = moments.mean, self._moment(moments)
            if self.rewrite.fold_ln:
                gain, shift = (tensor.double() for tensor in gpt2.ffn_norm(self.context.original, layer))
                inverse = torch.where(gain.abs() > 1e-6, 1 / gain, 0)
                mean = (mean - shift) * inverse
                moment = moments.covariance() * inverse[:, None] * inverse
                if not self._centred:
                    moment = moment.addr(mean, mean)
            result[layer] = mean, moment
        return result

    @property
    def _centred(self) -> bool:
        """Fitted biases, one per layer, take up the mean error, so the weights need only answer for the rest."""
        return self.rewrite.base == "lsq" and self.rewrite.bias == "per_layer"

    def _moment(self, moments: SecondMoments) -> Tensor:
        return moments.covariance() if self._centred else moments.second_moment()

    # ------------------------------------------------------------ the two linears

    def _share(
        self,
        linears: dict[int, tuple[Tensor, ...]],
        statistics: dict[int, tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, dict[int, tuple[Tensor, Tensor]], dict[int, Tensor]]:
        """Base, deltas and biases for the weight and bias of each layer's c_fc, or of each layer's c_proj."""
        rewrite, layers = self.rewrite, list(self.window.layers)
        lora = rewrite.delta_init == "lora"
        base, factors = share(
            [linears[layer][0] for layer in layers],
            [statistics[layer][1] if layer in statistics else None for layer in layers],
            0 if lora else rewrite.rank,
            rewrite.base,
            self.anchor,
            rewrite.delta_init == "asvd",
        )
        deltas, biases = {}, {}
        for layer, (a, b) in zip(layers, factors, strict=True):
            weight, biases[layer] = linears[layer]
            if layer in statistics and self._centred:
                biases[layer] = biases[layer] + statistics[layer][0] @ (weight - base - a @ b)
            deltas[layer] = self._wake(a, b, base)
        return base, deltas, biases

    def _wake(self, a: Tensor, b: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
        """Directions with A = B = 0 would never train: they start as LoRA does, A ~ N(0, 0.02), B = 0."""
        if a.shape[1] < self.rewrite.rank:
            a, b = base.new_zeros(len(base), self.rewrite.rank), base.new_zeros(self.rewrite.rank, base.shape[1])
        noise = torch.randn(a.shape, generator=self.context.generator, dtype=torch.float64).to(a.device) * 0.02
        return torch.where(a.norm(dim=0) > 0, a, noise), b

    def _refit_targets(
        self, base: Tensor, deltas: dict[int, tuple[Tensor, Tensor]], biases: dict[int, Tensor]
    ) -> tuple[dict[int, tuple[Tensor, Tensor]], dict[int, tuple[Tensor, ...]]]:
        """What c_proj should be, given the hidden activations that the shared c_fc really makes: least squares against
        the FFNs' true outputs, held near the original weights. Returns statistics of those activations, and each
        layer's weight and bias to share."""
        context, layers, original = self.context, list(self.window.layers), self.context.original
        act = ACT2FN[original.config.activation_function]
        d, width = original.config.n_embd, gpt2.d_ff(original.config)
        own = {layer: SecondMoments(width, device=base.device) for layer in layers}
        cross = {layer: SecondMoments(width, d, device=base.device) for layer in layers}
        kept: dict[int, Tensor] = {}
        effective = {}
        for layer in layers:
            weight, bias = base + deltas[layer][0] @ deltas[layer][1], biases[layer]
            if self.rewrite.bias == "shared":
                bias = torch.stack(list(biases.values())).mean(0)
            if self.rewrite.fold_ln:  # back to what the original's ln_2 gives
                gain, shift = (tensor.double() for tensor in gpt2.ffn_norm(original, layer))
                weight = torch.where(gain.abs() > 1e-6, 1 / gain, 0)[:, None] * weight
                bias = bias - shift @ weight
            effective[layer] = weight.float(), bias.float()

        def take(layer: int, site: str, x: Tensor) -> None:
            if site == "input":
                kept[layer] = act(torch.addmm(effective[layer][1], x.float(), effective[layer][0]))
                return
            hidden = kept.pop(layer)
            own[layer].update(hidden)
            cross[layer].update(hidden, x)

        context.progress(f"refit of layers {layers[0]} to {layers[-1]}")
        entry = context.entering(layers[0])
        capture(original, entry, take, sites=("input", "output"), layers=layers, start=layers[0])
        shared = torch.stack([self.weights[layer][3] for layer in layers]).mean(0)
        statistics: dict[int, tuple[Tensor, Tensor]] = {}
        linears: dict[int, tuple[Tensor, ...]] = {}
        for layer in layers:
            hidden, both = own.pop(layer), cross.pop(layer)
            moment, near = self._moment(hidden), self.weights[layer][2]
            # Without biases of their own the layers' outputs must come right with the shared one.
            pull = both.covariance() if self._centred else both.second_moment().addr_(hidden.mean, shared, alpha=-1)
            ridge = RIDGE * moment.diagonal().mean()
            damped = moment.clone()
            damped.diagonal().add_(ridge)
            weight = torch.linalg.solve(damped, pull + ridge * near)
            statistics[layer] = hidden.mean, moment
            linears[layer] = weight, both.second_mean - hidden.mean @ weight if self._centred else shared
        return statistics, linears


RIDGE = 1e-2  # of the mean variance of a hidden neuron; without it few tokens overfit (see benchmarks/results)
