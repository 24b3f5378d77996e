"""Streaming statistics, against numpy on the whole data."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from compressor.correlation import CorrelationStream, SecondMoments

CHAIN = [(0, 1), (1, 2)]


def activations(
    tokens: int = 600, width: int = 24, layers: int = 3, offset: float = 0.0, heavy: bool = False, seed: int = 0
) -> list[torch.Tensor]:
    """float32[tokens, width] a layer, correlated within and across layers."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.randn(tokens, width, generator=generator)
    result = []
    for _ in range(layers):
        source = source @ (torch.randn(width, width, generator=generator) / width**0.5) + 0.3 * torch.randn(
            tokens, width, generator=generator
        )
        result.append((source**7 if heavy else source) + offset * torch.randn(width, generator=generator).sign())
    return result


def stream_of(data, sizes, pairs=CHAIN) -> CorrelationStream:
    stream = CorrelationStream(pairs, data[0].shape[1])
    for parts in zip(*(layer.split(sizes) for layer in data), strict=True):
        for layer, part in enumerate(parts):
            stream.update(layer, part)
    return stream


def cross_corrcoef(first: torch.Tensor, second: torch.Tensor) -> np.ndarray:
    width = first.shape[1]
    return np.corrcoef(first.double().numpy(), second.double().numpy(), rowvar=False)[:width, width:]


def random_sizes(total: int, seed: int) -> list[int]:
    cuts = np.sort(np.random.default_rng(seed).choice(np.arange(1, total), size=12, replace=False))
    return np.diff([0, *cuts.tolist(), total]).tolist()


@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize(
    "sizes",
    [[600], [599, 1], [1] * 600, random_sizes(600, 1), random_sizes(600, 2)],
    ids=["one", "last of 1", "all of 1", "random", "random 2"],
)
def test_equals_corrcoef(offset, sizes):
    data = activations(offset=offset)
    stream = stream_of(data, sizes)
    assert stream.count == 600
    for first, second in CHAIN:
        expected = cross_corrcoef(data[first], data[second])
        assert np.abs(stream.correlation(first, second).numpy() - expected).max() < 1e-9  # the bar is 1e-6
        assert np.abs(stream.correlation(second, first).numpy() - expected.T).max() < 1e-9


def test_equals_corrcoef_on_heavy_tails():
    """What activations after GELU are like; float32 products fail this one."""
    data = activations(tokens=4000, heavy=True, offset=1e3)
    stream = stream_of(data, 1000)
    assert np.abs(stream.correlation(0, 1).numpy() - cross_corrcoef(data[0], data[1])).max() < 1e-9


def test_naive_sums_would_fail():
    """The data of the offset tests are hard enough: E[xy] - E[x]E[y] in float32 misses the bar by far."""
    first, second = activations(offset=1e3)[:2]
    covariance = first.T @ second / 600 - torch.outer(first.mean(0), second.mean(0))
    naive = covariance / torch.outer(
        (first.square().mean(0) - first.mean(0) ** 2).clamp(min=1e-7).sqrt(),
        (second.square().mean(0) - second.mean(0) ** 2).clamp(min=1e-7).sqrt(),
    )
    assert np.abs(naive.numpy() - cross_corrcoef(first, second)).max() > 1e-2


def test_means_and_variances_are_numpys_in_every_role():
    """Also for a layer that is first in one pair and second in another (the closest peer counts such a layer twice)."""
    data = activations(layers=4, offset=1e3)
    stream = stream_of(data, 77, pairs=[(0, 1), (0, 3), (1, 2), (1, 3)])
    for layer in range(4):
        np.testing.assert_allclose(stream.mean(layer), data[layer].double().numpy().mean(0), rtol=1e-12)
        np.testing.assert_allclose(stream.variance(layer), data[layer].double().numpy().var(0), rtol=1e-9)


def test_direct_pairs():
    data = activations(layers=5)
    pairs = [(3, 1), (1, 2), (0, 4), (2, 3)]
    stream = stream_of(data, 100, pairs)
    for first, second in pairs:
        expected = cross_corrcoef(data[first], data[second])
        assert np.abs(stream.correlation(first, second).numpy() - expected).max() < 1e-9
    assert not stream._held  # nothing of a batch stays when it is done


@pytest.mark.parametrize("constant", [0.0, 0.1, 1000.1, -3e-20])
def test_constant_neurons_give_zero(constant):
    data = activations()
    data[0][:, 5] = constant
    data[1][:, 7] = constant
    stream = stream_of(data, random_sizes(600, 3))
    assert stream.dead(0).nonzero().flatten().tolist() == [5]
    result = stream.correlation(0, 1)
    assert torch.isfinite(result).all()
    assert (result[5] == 0).all() and (result[:, 7] == 0).all()
    live = [neuron for neuron in range(24) if neuron not in (5, 7)]
    expected = cross_corrcoef(data[0][:, live], data[1][:, live])
    np.testing.assert_allclose(result[live][:, live].numpy(), expected, atol=1e-9)


def test_rounding_noise_is_dead_and_small_variation_is_not():
    data = activations()
    data[0][:, 2] = 1.0
    data[0][::2, 2] = np.nextafter(np.float32(1), np.float32(2)).item()
    data[0][:, 3] *= 1e-12
    assert stream_of(data, 100).dead(0).nonzero().flatten().tolist() == [2]


def test_what_is_given_stays_as_it_is():
    data = [layer.double() for layer in activations(offset=3.0)]
    copies = [layer.clone() for layer in data]
    stream_of(data, 100)
    assert all(torch.equal(layer, copy) for layer, copy in zip(data, copies, strict=True))


def test_one_token_is_all_dead():
    stream = stream_of(activations(tokens=1), 1)
    assert stream.dead(0).all()
    assert (stream.correlation(0, 1) == 0).all()


def test_merge_and_reduce_equal_one_stream():
    data = activations(tokens=900, offset=1e3)
    whole = stream_of(data, 100)

    def parts() -> list[CorrelationStream]:  # one of them got no data
        spans = ((0, 100), (100, 500), (500, 500), (500, 900))
        return [stream_of([layer[start:stop] for layer in data], 64) for start, stop in spans]

    merged = CorrelationStream(CHAIN, 24)
    for part in parts():
        merged.merge(part)
    for result in (merged, *in_processes(parts())):
        assert result.count == 900
        torch.testing.assert_close(result.correlation(0, 1), whole.correlation(0, 1), rtol=0, atol=1e-12)
        torch.testing.assert_close(result.variance(2), whole.variance(2), rtol=1e-12, atol=0)
        torch.testing.assert_close(result.mean(1), whole.mean(1), rtol=1e-14, atol=0)


def in_processes(states):
    """Each state's `reduce` in a thread of its own, with a sum over all of them like that of a process group."""
    given: list = [None] * len(states)
    barrier = threading.Barrier(len(states), timeout=20)

    def run(rank):
        def all_sum(tensor):
            given[rank] = tensor.clone()
            barrier.wait()
            total = sum(given[1:], given[0].clone())
            barrier.wait()
            return total

        states[rank].reduce(all_sum)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(states))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return states


def test_misuse_is_refused():
    first, second, third = activations(tokens=10)
    with pytest.raises(ValueError, match="layer 1 came before layer 0"):
        CorrelationStream(CHAIN, 24).update(1, second)
    stream = CorrelationStream(CHAIN, 24)
    stream.update(0, first)
    with pytest.raises(ValueError, match="layer 0 came twice"):
        stream.update(0, first)
    with pytest.raises(ValueError, match="layer 1 came before layer 0"):
        stream.update(1, second[:5])
    with pytest.raises(ValueError, match="different pairs"):
        CorrelationStream(CHAIN, 24).merge(CorrelationStream([(0, 1)], 24))
    with pytest.raises(ValueError, match="itself"):
        CorrelationStream([(1, 1)], 24)
    with pytest.raises(ValueError, match="announced"):
        SecondMoments(24).update(first, third)


@pytest.mark.parametrize("sizes", [600, [1] * 600, random_sizes(600, 4)], ids=["one", "all of 1", "random"])
def test_second_moments_equal_numpy(sizes):
    first, second = activations(offset=50.0)[:2]
    second = second[:, :10]
    own, cross = SecondMoments(24), SecondMoments(24, 10)
    for x, y in zip(first.split(sizes), second.split(sizes), strict=True):
        own.update(x)
        cross.update(x, y)
    x, y = first.double().numpy(), second.double().numpy()
    assert own.count == cross.count == 600
    np.testing.assert_allclose(own.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(own.covariance(), np.cov(x, rowvar=False, ddof=0), rtol=0, atol=1e-10)
    np.testing.assert_allclose(own.second_moment(), x.T @ x / 600, rtol=1e-12)
    np.testing.assert_allclose(cross.second_mean, y.mean(0), rtol=1e-12)
    np.testing.assert_allclose(cross.second_moment(), x.T @ y / 600, rtol=1e-12)
    np.testing.assert_allclose(cross.covariance(), (x - x.mean(0)).T @ (y - y.mean(0)) / 600, rtol=0, atol=1e-10)


def test_second_moments_merge_and_reduce():
    first, second = activations(offset=50.0)[:2]
    expected = first.double().T @ second.double() / 600

    def part(start, stop):
        result = SecondMoments(24, 24)
        result.update(first[start:stop], second[start:stop])
        return result

    merged = part(0, 400)
    merged.merge(part(400, 600))
    for result in (merged, *in_processes([part(0, 150), part(150, 600), part(0, 0)])):
        assert result.count == 600
        torch.testing.assert_close(result.second_moment(), expected, rtol=1e-12, atol=0)


def test_autocast_does_not_blur_the_sums():
    data = activations()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stream = stream_of(data, 100)
    assert np.abs(stream.correlation(0, 1).numpy() - cross_corrcoef(data[0], data[1])).max() < 1e-9
