"""Step 2: streaming Pearson correlations and second moments, exact whatever the mean and the split into batches.

Each batch is centred on its own mean and merged into running sums by the update of Chan, Golub and LeVeque (1979):
    scatter <- scatter + batch scatter + n_a n_b / (n_a + n_b) * shift_x shift_y^T,   shift = batch mean - running mean.
E[xy] - E[x]E[y] would lose all digits where a mean is large. All sums are float64: float32 products of real GPT-2
activations after GELU (heavy tails) were off by 2e-6 in the correlation, for a third of the time saved.

What is linear in something narrower is summed there: GPT-2's pre-activations (d_ff wide) come from inputs of a quarter
of that width, and 16 times fewer products per token give the same correlations (`LinearCorrelations`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

AllSum = Callable[[Tensor], Tensor]  # the sum of a tensor over all processes, e.g. `Accelerator().reduce`

# A neuron whose deviation is below float32's resolution at its size says nothing but rounding errors: it is dead.
_RESOLUTION = 4 * torch.finfo(torch.float32).eps


@dataclass
class _Mean:
    """Running count and mean of one tensor. Each method returns what the scatters must be corrected by."""

    count: int
    mean: Tensor  # float64[width]

    def centre(self, activations: Tensor) -> tuple[Tensor, Tensor, float]:
        """Take in a batch [tokens, width]: (batch about its own mean float64[tokens, width], shift, weight)."""
        values = activations.detach().to(self.mean.device).to(torch.float64, copy=True)
        mean = values.mean(0)
        values -= mean
        return values, *self.join(len(values), mean)

    def join(self, count: int, mean: Tensor) -> tuple[Tensor, float]:
        """Take in `count` tokens of the given mean: (shift, weight); the joint scatter gains weight * shift shift^T."""
        total = max(self.count + count, 1)
        shift, weight = mean - self.mean, self.count * count / total
        self.mean = self.mean + shift * (count / total)
        self.count += count
        return shift, weight

    def share(self, all_sum: AllSum) -> tuple[Tensor, float]:
        """Take on count and mean of all processes: (shift, weight) that move this process's scatter to that mean."""
        own, weight = self.mean, float(self.count)
        total = all_sum(torch.full_like(own, weight))
        self.mean = all_sum(own * weight) / total.clamp(min=1)
        self.count = round(total[0].item())
        return own - self.mean, weight


class CorrelationStream:
    """Pearson correlations between the neurons of pairs of layers, from batches of activations that are not kept.

    Only the asked cross blocks are summed; a layer's own variances are a vector apart from them. A batch's centred
    activations are held until the last layer they are paired with has come: one layer for a chain of adjacent pairs.
    """

    def __init__(
        self, pairs: Iterable[tuple[int, int]], width: int, *, own: bool = False, device: torch.device | str = "cpu"
    ) -> None:
        """`pairs` of layers in any order; `width` neurons in every layer; `own`: each layer also with itself."""
        ordered = sorted({(min(pair), max(pair)) for pair in pairs})
        if any(first == second for first, second in ordered):
            raise ValueError("a layer is paired with itself by `own`, not in `pairs`")
        self.layers = sorted({layer for pair in ordered for layer in pair})
        self._last_use = {first: second for first, second in ordered}  # ascending, so the last one stays
        ordered += [(layer, layer) for layer in self.layers if own]
        self._means = {layer: _Mean(0, torch.zeros(width, dtype=torch.float64, device=device)) for layer in self.layers}
        self._squares = {layer: torch.zeros(width, dtype=torch.float64, device=device) for layer in self.layers}
        self._scatter = {pair: torch.zeros(width, width, dtype=torch.float64, device=device) for pair in ordered}
        self._held: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, layer: int, activations: Tensor) -> None:
        """Take in one layer's activations float[tokens, width] of a batch; its layers come in ascending order.

        Raises ValueError when a layer of the batch is missing or comes twice.
        """
        if len(activations) == 0:
            return
        values, shift, weight = self._means[layer].centre(activations)
        self._squares[layer] += values.square().sum(0) + weight * shift.square()
        for first, second in self._scatter:
            if first == second == layer:
                self._scatter[first, second].addmm_(values.T, values).addr_(shift, shift, alpha=weight)
            elif second == layer:
                if first not in self._held or len(self._held[first][0]) != len(values):
                    raise ValueError(f"layer {layer} came before layer {first} of the same batch")
                other, other_shift = self._held[first]
                self._scatter[first, second].addmm_(other.T, values).addr_(other_shift, shift, alpha=weight)
                if self._last_use[first] == layer:
                    del self._held[first]
        if layer in self._last_use:
            if layer in self._held:
                raise ValueError(f"layer {layer} came twice, or layer {self._last_use[layer]} is missing of a batch")
            self._held[layer] = values, shift

    @property
    def count(self) -> int:
        """Tokens seen."""
        return self._means[self.layers[0]].count if self.layers else 0

    def mean(self, layer: int) -> Tensor:
        """float64[width]."""
        return self._means[layer].mean

    def variance(self, layer: int) -> Tensor:
        """float64[width], divided by the count (numpy.var)."""
        return self._squares[layer] / max(self.count, 1)

    def dead(self, layer: int) -> Tensor:
        """bool[width]: neurons that do not vary."""
        return self.variance(layer).sqrt() <= _RESOLUTION * self.mean(layer).abs()

    def scatter(self, first: int, second: int) -> Tensor:
        """float64[width, width]: sum over the tokens of (x_first - mean)(x_second - mean)^T; not a copy."""
        return self._scatter[first, second] if first <= second else self._scatter[second, first].T

    def correlation(self, first: int, second: int) -> Tensor:
        """float64[width, width]: rows = neurons of `first`, columns = of `second`; 0 for dead neurons, never NaN."""
        result = self.scatter(first, second) * self._inverse_norm(first)[:, None]
        return result.mul_(self._inverse_norm(second)).clamp_(-1, 1)

    def _inverse_norm(self, layer: int) -> Tensor:
        return self._squares[layer].rsqrt().masked_fill(self.dead(layer), 0)

    def merge(self, other: CorrelationStream) -> None:
        """Take in what another stream over the same pairs has seen of other batches."""
        if self._scatter.keys() != other._scatter.keys():
            raise ValueError("streams over different pairs of layers cannot be merged")
        moved = {layer: mean.join(other._means[layer].count, other.mean(layer)) for layer, mean in self._means.items()}
        for layer, (shift, weight) in moved.items():
            self._squares[layer] += other._squares[layer] + weight * shift.square()
        for (first, second), scatter in self._scatter.items():
            shift, weight = moved[first]
            scatter.add_(other._scatter[first, second]).addr_(shift, moved[second][0], alpha=weight)

    def reduce(self, all_sum: AllSum) -> None:
        """Take on what all processes have seen; every process calls it, at the end, with its own share taken in."""
        moved = {layer: mean.share(all_sum) for layer, mean in self._means.items()}
        for layer, (shift, weight) in moved.items():
            self._squares[layer] = all_sum(self._squares[layer] + weight * shift.square())
        for (first, second), scatter in self._scatter.items():
            shift, weight = moved[first]
            scatter.copy_(all_sum(scatter.addr_(shift, moved[second][0], alpha=weight)))


class LinearCorrelations:
    """Correlations of y = x W + b from a stream over the narrower x: cov(y_a, y_b) = W_a^T cov(x_a, x_b) W_b."""

    def __init__(self, stream: CorrelationStream, linear: Callable[[int], tuple[Tensor, Tensor]]) -> None:
        """`stream` has `own` and is done; `linear(layer)` gives W_l float[d, width] and b_l float[width]."""
        self.count = stream.count
        self._stream, self._linear = stream, linear
        self._variance: dict[int, Tensor] = {}
        self._dead: dict[int, Tensor] = {}
        for layer in stream.layers:
            weight, bias = (tensor.double() for tensor in linear(layer))
            squares = (weight * (stream.scatter(layer, layer) @ weight)).sum(0)
            self._variance[layer] = squares.clamp(min=0) / max(self.count, 1)
            size = (stream.variance(layer) + stream.mean(layer).square()).sqrt() @ weight.abs() + bias.abs()
            self._dead[layer] = self._variance[layer].sqrt() <= _RESOLUTION * size

    def variance(self, layer: int) -> Tensor:
        """float64[width], divided by the count."""
        return self._variance[layer]

    def dead(self, layer: int) -> Tensor:
        """bool[width]: neurons that do not vary, to float32's resolution of the terms they are the sum of."""
        return self._dead[layer]

    def correlation(self, first: int, second: int) -> Tensor:
        """float64[width, width]: rows = neurons of `first`, columns = of `second`; 0 for dead neurons, never NaN."""
        scatter = self._stream.scatter(first, second)
        return (self._scaled(first).T @ (scatter @ self._scaled(second))).clamp_(-1, 1)

    def _scaled(self, layer: int) -> Tensor:
        """The weights float64[d, width] that give neurons of unit norm over the tokens; 0 for dead ones."""
        norm = (self._variance[layer] * self.count).sqrt()
        return self._linear(layer)[0].double() * norm.reciprocal().masked_fill(self._dead[layer], 0)


class SecondMoments:
    """Running mean and second moment of one site's activations x, or of x with a second tensor y of the same tokens."""

    def __init__(self, width: int, second_width: int | None = None, *, device: torch.device | str = "cpu") -> None:
        """`second_width` = width of y; None: y is x."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self._means = [_Mean(0, zeros(width))] + ([] if second_width is None else [_Mean(0, zeros(second_width))])
        self.scatter = zeros(width, width if second_width is None else second_width)  # sum of (x - mean)(y - mean)^T

    def update(self, x: Tensor, y: Tensor | None = None) -> None:
        """Take in a batch: x float[tokens, width] and, where the object has one, y float[tokens, second_width]."""
        given = [x] if y is None else [x, y]
        if len(given) != len(self._means) or any(len(tensor) != len(x) for tensor in given):
            raise ValueError("the tensors given are not those announced, or differ in tokens")
        if len(x):
            parts = [mean.centre(tensor) for mean, tensor in zip(self._means, given, strict=True)]
            self.scatter.addmm_(parts[0][0].T, parts[-1][0]).addr_(parts[0][1], parts[-1][1], alpha=parts[0][2])

    @property
    def count(self) -> int:
        """Tokens seen."""
        return self._means[0].count

    @property
    def mean(self) -> Tensor:
        """Of x: float64[width]."""
        return self._means[0].mean

    @property
    def second_mean(self) -> Tensor:
        """Of y: float64[second_width]; of x where there is no y."""
        return self._means[-1].mean

    def covariance(self) -> Tensor:
        """E[(x - E x)(y - E y)^T]: float64[width, second_width], divided by the count."""
        return self.scatter / max(self.count, 1)

    def second_moment(self) -> Tensor:
        """E[x y^T], not centred: float64[width, second_width]."""
        return self.covariance().addr_(self.mean, self.second_mean)

    def merge(self, other: SecondMoments) -> None:
        """Take in what another object of the same widths has seen of other tokens."""
        moved = [mean.join(theirs.count, theirs.mean) for mean, theirs in zip(self._means, other._means, strict=True)]
        self.scatter.add_(other.scatter).addr_(moved[0][0], moved[-1][0], alpha=moved[0][1])

    def reduce(self, all_sum: AllSum) -> None:
        """Take on what all processes have seen; every process calls it, at the end, with its own share taken in."""
        moved = [mean.share(all_sum) for mean in self._means]
        self.scatter.copy_(all_sum(self.scatter.addr_(moved[0][0], moved[-1][0], alpha=moved[0][1])))
