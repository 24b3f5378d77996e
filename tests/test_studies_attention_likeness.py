"""Likeness of attentions: the figures against numpy, the implied matrix against the one that is known."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from compressor.modeling.block_attention import implied_weights
from compressor.studies.attention.kinds import NO_MASS, Kind, attention_of, kinds, only_likeness, sdpa
from compressor.studies.attention.likeness import exact_matrix, likeness, uniform_matrix

HEADS, WIDTH = 3, 8
SCALING = WIDTH**-0.5


def heads(tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, HEADS, tokens, WIDTH, generator=generator) for _ in range(3)]


def by_hand(query, key):
    """Softmax row by row."""
    matrix = np.zeros((*query.shape[:3], query.shape[2]))
    for place in np.ndindex(*query.shape[:3]):
        row, head, token = place
        scores = [float(query[place] @ key[row, head, other]) * SCALING for other in range(token + 1)]
        weights = np.exp(np.array(scores) - max(scores))
        matrix[row, head, token, : token + 1] = weights / weights.sum()
    return matrix


@pytest.mark.parametrize("tokens", [1, 7, 19])
def test_matrices_are_those_of_softmax(tokens):
    query, key, _ = heads(tokens)
    wanted = by_hand(query.numpy(), key.numpy())
    assert np.allclose(exact_matrix(query, key, SCALING), wanted, atol=1e-6)
    for kind in ("vanilla", "sdpa"):
        attend = attention_of(Kind(kind), HEADS, WIDTH, 4, 0)
        assert np.allclose(implied_weights(attend, query, key, scaling=SCALING), wanted, atol=1e-6)
    uniform = uniform_matrix(torch.from_numpy(wanted))[0, 0]
    assert np.allclose(uniform, [[1 / (i + 1) if j <= i else 0 for j in range(tokens)] for i in range(tokens)])


@pytest.mark.parametrize("kind", [*kinds([2], [3], [6]), *only_likeness([2], [6])], ids=lambda kind: kind.name)
@torch.no_grad()
def test_the_implied_matrix_gives_the_output(kind):
    query, key, value = heads(22)
    attend = attention_of(kind, HEADS, WIDTH, 4, 0)
    matrix = implied_weights(attend, query, key, scaling=SCALING)
    assert torch.allclose(matrix @ value, attend(query, key, value, scaling=SCALING), atol=1e-4)
    assert not matrix.triu(1).any(), "nothing of what comes later"


def test_figures_are_those_of_numpy():
    query, key, value = heads(9)
    exact = by_hand(query.numpy(), key.numpy())
    noise = np.random.default_rng(3).normal(size=exact.shape)
    matrix = exact + 0.1 * noise
    found = likeness(torch.from_numpy(matrix), torch.from_numpy(exact), value)
    errors, cosines, outputs, variations, sums = [], [], [], [], []
    for row, head in np.ndindex(2, HEADS):
        a, p, v = matrix[row, head], exact[row, head], value[row, head].double().numpy()
        errors.append(math.sqrt(((a - p) ** 2).sum() / (p**2).sum()))
        cosines.append((a * p).sum() / math.sqrt((a**2).sum() * (p**2).sum()))
        outputs.append(np.linalg.norm(a @ v - p @ v) / np.linalg.norm(p @ v))
        variations += [
            sum(abs(x - y) for x, y in zip(one, two, strict=True)) / 2 for one, two in zip(a, p, strict=True)
        ]
        sums += [abs(sum(one) - 1) for one in a]
    assert found.frobenius == pytest.approx(np.mean(errors))
    assert found.cosine == pytest.approx(np.mean(cosines))
    assert found.output_error == pytest.approx(np.mean(outputs))
    assert found.variation == pytest.approx(np.mean(variations))
    assert found.row_sum == pytest.approx(np.mean(sums))
    given = likeness(torch.from_numpy(matrix), torch.from_numpy(exact), value, torch.from_numpy(exact) @ value.double())
    assert given.output_error == pytest.approx(0, abs=1e-12) and given.output_cosine == pytest.approx(1)


def test_neutral_settings_have_no_error():
    query, key, value = heads(22)
    exact = exact_matrix(query, key, SCALING)
    for kind, block in ((Kind("linformer", 4), 4), (Kind("nystromformer", 3, "newton"), 22),
                        (Kind("performer", 6, "learned"), 32), (Kind("sdpa"), 4)):  # fmt: skip
        matrix = implied_weights(attention_of(kind, HEADS, WIDTH, block, 0), query, key, scaling=SCALING)
        found = likeness(matrix, exact, value)
        assert max(found.frobenius, found.variation, found.row_sum, found.output_error) < 1e-5
        assert min(found.cosine, found.output_cosine) > 1 - 1e-6


def test_a_worse_one_is_told_as_worse():
    """Fewer slots, no log-mass, and the far weights of another sequence."""
    query, key, value = heads(32)
    exact = exact_matrix(query, key, SCALING)

    def error(kind):
        return likeness(
            implied_weights(attention_of(kind, HEADS, WIDTH, 8, 0), query, key, scaling=SCALING), exact, value
        )

    ladder = [error(kind) for kind in (Kind("linformer", 8), Kind("linformer", 4), Kind("linformer", 1),
                                       Kind("linformer", 1, lacking=NO_MASS))]  # fmt: skip
    for better, worse in pairwise(ladder):
        assert better.frobenius < worse.frobenius and better.variation < worse.variation
        assert better.cosine > worse.cosine and better.output_error < worse.output_error
    other = implied_weights(sdpa, key, query, scaling=SCALING)
    assert likeness(other, exact, value).frobenius > 0.5
