"""Attention in blocks: exactness where it is due, no look ahead, states and padding that change nothing."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import DynamicCache, GPT2Config, StaticCache

from compressor.modeling.block_attention import BlockAttention, StateLayer, attended, state_layer
from compressor.modeling.linformer import LinformerFar
from compressor.modeling.nystromformer import NystromFar, pseudo_inverse
from compressor.modeling.performer import MAPS, PerformerFar, orthogonal_features

HEADS, WIDTH = 3, 8
SCALING = WIDTH**-0.5


def performer(feature_map, local):
    torch.manual_seed(3)
    return PerformerFar(HEADS, WIDTH, WIDTH if feature_map == "elu" else 12, feature_map, 0, local)


FARS = {
    "linformer": lambda block: LinformerFar(HEADS, block, max(1, block // 3)),
    "linformer of a layer": lambda block: LinformerFar(1, block, 1),
    "nystromformer": lambda block: NystromFar(5, "none"),
    "nystromformer, newton": lambda block: NystromFar(5, "newton"),
    **{f"performer, {m}": lambda block, m=m: performer(m, True) for m in MAPS},
    **{f"performer, {m}, all features": lambda block, m=m: performer(m, False) for m in MAPS},
}


def attention(kind, block):
    torch.manual_seed(1)
    made = BlockAttention(block, FARS[kind](block))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def inputs(tokens, rows=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, HEADS, tokens, WIDTH, generator=generator) for _ in range(3)]


def softmax(query, key, value):
    scores = query @ key.transpose(-1, -2) * SCALING
    return scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -math.inf).softmax(-1) @ value


@pytest.mark.parametrize("tokens", [1, 5, 8, 31])
def test_neutral_settings_are_softmax(tokens):
    given = inputs(tokens)
    for block, far in ((8, LinformerFar(1, 8, 8)), (8, LinformerFar(HEADS, 8, 8)), (31, NystromFar(4, "newton")),
                       (31, performer("learned", True))):  # fmt: skip
        assert torch.allclose(BlockAttention(block, far)(*given, scaling=SCALING), softmax(*given), atol=1e-5)


@pytest.mark.parametrize("block", [1, 4, 7])
@pytest.mark.parametrize("kind", FARS)
@torch.no_grad()
def test_no_token_sees_a_later_one(kind, block):
    made = attention(kind, block)
    for tokens in (2, 13, 23):
        given = inputs(tokens)
        before = made(*given, scaling=SCALING)
        for place in {1, tokens // 2, tokens - 1}:
            changed = [tensor.clone() for tensor in given]
            for tensor in changed:
                tensor[:, :, place] = 3 * torch.randn(2, HEADS, WIDTH)
            after = made(*changed, scaling=SCALING)
            assert (after[:, :, :place] - before[:, :, :place]).abs().max() <= 1e-6
            assert (after[:, :, place] - before[:, :, place]).abs().max() > 1e-3


@pytest.mark.parametrize("block", [1, 4, 7, 40])
@pytest.mark.parametrize("kind", FARS)
@torch.no_grad()
def test_states_give_what_all_at_once_gives(kind, block):
    made, tokens = attention(kind, block), 29
    given = inputs(tokens)
    whole = made(*given, scaling=SCALING)
    for parts in ([1] * tokens, [7, 1, 1, 13, 1, 6], [2, 3, 19, 5], [tokens - 1, 1]):
        layer, found, start = StateLayer(), [], 0
        for part in parts:
            here = (tensor[:, :, start : start + part] for tensor in given)
            found.append(made(*here, scaling=SCALING, layer=layer))
            start += part
            assert layer.get_seq_length() == start
        assert (torch.cat(found, 2) - whole).abs().max() <= 1e-4


@pytest.mark.parametrize("kind", FARS)
@torch.no_grad()
def test_pads_move_no_block(kind):
    """Rows of different lengths, padded left, right, or both, at once and with a state."""
    made, tokens, width = attention(kind, 5), 17, 26
    given = inputs(tokens, rows=3)
    whole = made(*given, scaling=SCALING)
    padded, real, starts = inputs(width, rows=3, seed=9), torch.zeros(3, width, dtype=torch.bool), [9, 0, 4]
    for row, start in enumerate(starts):
        real[row, start : start + tokens] = True
        for tensor, source in zip(padded, given, strict=True):
            tensor[row, :, start : start + tokens] = source[row]
    outs = [made(*padded, scaling=SCALING, real=real)]
    layer, parts = StateLayer(), []
    for start, stop in ((0, 10), (10, 11), (11, 12), (12, 20), (20, width)):
        here = (tensor[:, :, start:stop] for tensor in padded)
        parts.append(made(*here, scaling=SCALING, real=real[:, start:stop], layer=layer))
    for out in (*outs, torch.cat(parts, 2)):
        assert torch.isfinite(out).all()
        for row, start in enumerate(starts):
            assert (out[row, :, start : start + tokens] - whole[row]).abs().max() <= 1e-4


@pytest.mark.parametrize("kind", FARS)
@torch.no_grad()
def test_a_state_is_reordered_repeated_and_selected_with_its_rows(kind):
    made = attention(kind, 4)
    given = inputs(11)
    more = inputs(3, seed=4)
    cache = DynamicCache()
    layer = state_layer(cache, 1)
    assert layer is state_layer(cache, 1) and cache.layers[1] is layer
    made(*given, scaling=SCALING, layer=layer)
    cache.layers.pop(0)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 0, 2]))
    rows = [1, 0, 0, 1]
    found = made(*(tensor[rows] for tensor in more), scaling=SCALING, layer=layer)
    wanted = made(*(torch.cat([a[rows], b[rows]], 2) for a, b in zip(given, more, strict=True)), scaling=SCALING)
    assert (found - wanted[:, :, 11:]).abs().max() <= 1e-4
    cache.batch_select_indices(torch.tensor([2]))
    assert all(len(tensor) == 1 for tensor in layer.state.values())
    cache.reset()
    assert layer.get_seq_length() == 0 and not layer.state


@pytest.mark.parametrize("kind", FARS)
@torch.no_grad()
def test_a_row_that_is_left_alone_has_its_own_blocks_only(kind):
    made, given, more = attention(kind, 4), inputs(17), inputs(3, rows=1, seed=5)
    real = torch.ones(2, 17, dtype=torch.bool)
    real[1, :10] = False
    layer = StateLayer()
    made(*given, scaling=SCALING, real=real, layer=layer)
    layer.batch_select_indices(torch.tensor([1]))
    found = [made(*(tensor[:, :, [i]] for tensor in more), scaling=SCALING, layer=layer) for i in range(3)]
    whole = (torch.cat([a[1:, :, 10:], b], 2) for a, b in zip(given, more, strict=True))
    assert (torch.cat(found, 2) - made(*whole, scaling=SCALING)[:, :, 7:]).abs().max() <= 1e-4


@pytest.mark.parametrize("kind", FARS)
def test_gradients_are_finite_and_reach_all(kind):
    made = attention(kind, 4)
    given = [tensor.requires_grad_() for tensor in inputs(14)]
    made(*given, scaling=SCALING).square().sum().backward()
    for tensor in (*given, *made.parameters()):
        assert tensor.grad is not None and torch.isfinite(tensor.grad).all() and tensor.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_softmax_with_its_mass_and_the_gradients_of_both(dtype):
    """Beside autograd through the same formula in float64; the last query sees nothing."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, 8).to(dtype).requires_grad_() for n in (5, 7, 7))
    bias, seen = torch.randn(3, 1, 7, requires_grad=True), torch.rand(5, 7) < 0.7
    seen[:, 0], seen[-1] = True, False
    out, mass = attended(query, key, value, 0.4, bias=bias, seen=seen)
    assert (out[:, :, -1] == 0).all() and (mass[:, :, -1] == -math.inf).all()
    scores = (query.double() @ key.double().transpose(-1, -2) * 0.4 + bias).masked_fill(~seen, -math.inf)[:, :, :-1]
    wanted, wanted_mass = scores.softmax(-1) @ value.double(), scores.logsumexp(-1)
    weight, tensors = torch.randn(8), (query, key, value, bias)
    found = torch.autograd.grad((out[:, :, :-1] * weight).sum() + mass[:, :, :-1].sin().sum(), tensors)
    exact = torch.autograd.grad((wanted * weight).sum() + wanted_mass.sin().sum(), tensors)
    bound = 1e-5 if dtype == torch.float32 else 0.1
    for a, b in zip((out[:, :, :-1], mass[:, :, :-1], *found), (wanted, wanted_mass, *exact), strict=True):
        assert torch.isfinite(a).all() and (a - b).abs().max() <= bound


@pytest.mark.parametrize("kind", FARS)
def test_how_much_is_done_at_once_changes_nothing(kind, monkeypatch):
    made, results = attention(kind, 4), []
    for tokens_at_once, parts in ((1000, 1), (8, 5), (1, 99)):
        monkeypatch.setattr("compressor.modeling.linformer._AT_ONCE", tokens_at_once)
        monkeypatch.setattr("compressor.modeling.performer._AT_ONCE", tokens_at_once)
        monkeypatch.setattr("compressor.modeling.nystromformer._PARTS", parts)
        given = [tensor.requires_grad_() for tensor in inputs(50)]
        out = made(*given, scaling=SCALING)
        results.append((out, *torch.autograd.grad(out.sin().sum(), (*given, *made.parameters()))))
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert (a - b).abs().max() <= 1e-5 * max(1, b.abs().max())


@pytest.mark.parametrize("kind", FARS)
def test_large_queries_and_keys_overflow_nothing(kind):
    made = attention(kind, 4)
    query, key, value = (factor * tensor for factor, tensor in zip((20, 20, 1), inputs(40), strict=True))
    given = [(tensor + 10).requires_grad_() for tensor in (query, key, value)]
    out = made(*given, scaling=SCALING)
    out.square().sum().backward()
    for tensor in (out, *(one.grad for one in (*given, *made.parameters()))):
        assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("kind", [f"performer, {m}, all features" for m in MAPS])
@torch.no_grad()
def test_features_are_summed_up_however_small_their_products(kind):
    """Of large queries and keys, beside sums of logarithms in float64."""
    made = attention(kind, 12)
    query, key, value = (factor * tensor for factor, tensor in zip((12, 12, 1), inputs(30), strict=True))
    far = made.far
    one, other = (far.logarithms(tensor, SCALING).double() for tensor in (query, key))
    products = (one[:, :, :, None] + other[:, :, None]).logsumexp(-1)
    own, places = torch.arange(30) // 12, torch.arange(30)
    if far.gain is not None:
        products += torch.where(own[:, None] > own, far.gain[:, None, None].double(), 0.0)
    weights = products.masked_fill(places > places[:, None], -math.inf).softmax(-1)
    assert (made(query, key, value, scaling=SCALING) - weights @ value.double()).abs().max() <= 1e-3


@pytest.mark.parametrize("kind", FARS)
@torch.no_grad()
def test_half_precision_overflows_nothing(kind):
    query, key, value = (factor * tensor for factor, tensor in zip((100, 100, 1), inputs(30), strict=True))
    given = [tensor.half() for tensor in (query + 30, key + 30, value)]
    assert torch.isfinite(attention(kind, 4).half()(*given, scaling=SCALING)).all()


@pytest.mark.parametrize("inverse", ["none", "newton"])
@torch.no_grad()
def test_nystromformer_is_its_formula_written_out_query_by_query(inverse):
    block, landmarks, tokens = 3, 4, 26
    query, key, value = inputs(tokens)
    found = BlockAttention(block, NystromFar(landmarks, inverse))(query, key, value, scaling=SCALING)
    for place in range(block, tokens):
        length = place // block * block
        segment = [token * landmarks // length for token in range(length)] if length > landmarks else range(length)
        member = torch.nn.functional.one_hot(torch.tensor(segment)).float().T
        size = member.sum(1)
        queries, keys, values = ((member / size[:, None]) @ tensor[:, :, :length] for tensor in (query, key, value))
        q = query[:, :, place : place + 1] * SCALING
        scores = q @ keys.transpose(-1, -2)
        own = q @ key[:, :, length : place + 1].transpose(-1, -2)
        share = torch.sigmoid((scores + size.log()).logsumexp(-1) - own.logsumexp(-1))[..., None]
        far = (scores + size.log()).softmax(-1) @ values
        if inverse == "newton":
            middle = (queries @ keys.transpose(-1, -2) * SCALING).softmax(-1)
            right = (queries @ key[:, :, :length].transpose(-1, -2) * SCALING).softmax(-1) @ value[:, :, :length]
            far = scores.softmax(-1) @ (pseudo_inverse(middle) @ right)
        wanted = (1 - share) * (own.softmax(-1) @ value[:, :, length : place + 1]) + share * far
        assert (found[:, :, place : place + 1] - wanted).abs().max() <= 1e-5


@pytest.mark.parametrize(("feature_map", "features"), [("favor+", 3), ("favor+", 12), ("favor_hyp", 6)])
@torch.no_grad()
def test_products_of_favor_features_are_softmax_numbers_in_the_mean(feature_map, features):
    """Over 20000 draws, of heads: exp(q . k / sqrt d) within 5 standard errors, which are small."""
    draws, generator = 20000, torch.Generator().manual_seed(5)
    query, key = 0.4 * torch.randn(2, 1, 1, 3, WIDTH, generator=generator)
    far = PerformerFar(draws, WIDTH, features, feature_map, 0, True)
    one, other = (far.logarithms(part.expand(-1, draws, -1, -1), SCALING).exp() for part in (query, key))
    products = (one @ other.transpose(-1, -2))[0].double()
    exact, error = (query @ key.transpose(-1, -2) * SCALING).exp(), products.std(0) / math.sqrt(draws)
    assert ((products.mean(0) - exact).abs() <= 5 * error).all() and (error <= 0.03 * exact).all()


def test_random_directions_are_orthogonal_and_as_long_as_gaussian_ones():
    found = orthogonal_features(torch.Size((4000, 2 * WIDTH + 2, WIDTH)), 1)
    lengths = found.norm(dim=-1, keepdim=True)
    for run in (found / lengths).split(WIDTH, 1):
        products = run @ run.transpose(-1, -2)
        assert (products - torch.eye(run.shape[1])).abs().max() <= 1e-5
    assert float(lengths.square().mean()) == pytest.approx(WIDTH, rel=0.01)
    assert float(lengths.square().var()) == pytest.approx(2 * WIDTH, rel=0.05)  # of chi-squared
    assert found.mean((0, 2)).abs().max() <= 0.03  # no side is preferred


def test_the_pseudo_inverse_is_one_where_the_iteration_converges():
    torch.manual_seed(0)
    matrix = (torch.randn(5, 6, 6) + 4 * torch.eye(6)).softmax(-1)
    assert (pseudo_inverse(matrix) - torch.linalg.pinv(matrix)).abs().max() <= 1e-3
    assert (pseudo_inverse(matrix, 3) - torch.linalg.pinv(matrix)).abs().max() > 1e-2


@torch.no_grad()
def test_a_summary_weighs_as_much_as_its_tokens():
    """Equal keys: a slot that stands for 4 tokens gives what the 4 give; without its mass it does not."""
    query, key, value = inputs(12)
    key[:] = key[:, :, :1]
    far = LinformerFar(1, 4, 1)
    exact = softmax(query, key, value)
    assert torch.allclose(BlockAttention(4, far)(query, key, value, scaling=SCALING), exact, atol=1e-5)
    far.log_mass.zero_()
    assert (BlockAttention(4, far)(query, key, value, scaling=SCALING) - exact).abs().max() > 0.05


@torch.no_grad()
def test_a_block_that_is_not_full_costs_what_it_holds():
    """A block's scores, if it were full, would take terabytes."""
    given, layer = inputs(9), StateLayer()
    for far in (NystromFar(4, "none"), performer("learned", True), performer("favor+", False)):
        assert torch.isfinite(BlockAttention(1 << 20, far)(*given, scaling=SCALING, layer=layer)).all()
        layer.reset()


@torch.no_grad()
def test_states_do_not_grow_where_they_are_said_not_to():
    def held(kind, tokens):
        layer = StateLayer()
        attention(kind, 8)(*inputs(tokens), scaling=SCALING, layer=layer)
        return sum(tensor.numel() for tensor in layer.state.values())

    assert held("performer, favor+", 320) == held("performer, favor+", 32)
    slots = 2 * (320 - 32) // 8  # 2 of each block of 8, for 2 rows, as keys and as values
    assert held("linformer", 320) - held("linformer", 32) == slots * 2 * 2 * HEADS * WIDTH
    for kind, kept in (("nystromformer", 2), ("nystromformer, newton", 3)):  # keys, values, queries
        assert held(kind, 320) - held(kind, 32) == kept * (320 - 32) * 2 * HEADS * WIDTH


def test_a_cache_of_keys_is_not_gone_on_with():
    cache = DynamicCache()
    cache.update(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), 0)
    with pytest.raises(ValueError, match="layer 0 of the cache holds keys and values"):
        state_layer(cache, 0)
    static = StaticCache(config=GPT2Config(n_layer=2), max_cache_len=8)
    with pytest.raises(ValueError, match="layer 1 of the cache is a StaticLayer"):
        state_layer(static, 1)
    layer = StateLayer()
    with pytest.raises(NotImplementedError, match="cannot go back"):
        layer.crop(-1)
