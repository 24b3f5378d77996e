"""Negative log-likelihoods against the model's own logits, windows against a loop that writes them out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from compressor.metrics import nll as module
from compressor.metrics.nll import (
    Span,
    hidden_nll,
    rolling_spans,
    standard_error,
    strided_spans,
    text_nll,
    token_nll,
)
from compressor.modeling import GPT2CompressedConfig, GPT2CompressedLMHeadModel

CONTEXT, VOCABULARY = 16, 61


def make_model(seed: int = 0, **changes) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=CONTEXT,
        n_embd=24,
        n_layer=2,
        n_head=2,
        initializer_range=0.4,
        bos_token_id=0,
        eos_token_id=0,
        **changes,
    )
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    return make_model()


def tokens(length: int, seed: int = 1) -> torch.Tensor:
    """The first tokens of one random text."""
    return torch.randint(VOCABULARY, (64,), generator=torch.Generator().manual_seed(seed))[:length]


_LOGITS: dict[tuple[int, ...], np.ndarray] = {}  # of the module's one model: many contexts come again


def reference(model, context: list[int], target: int) -> float:
    """NLL of one token after one context, in float64 numpy, from a forward pass of its own."""
    if tuple(context) not in _LOGITS:
        with torch.no_grad():
            _LOGITS[tuple(context)] = model(torch.tensor([context])).logits[0, -1].double().numpy()
    logits = _LOGITS[tuple(context)]
    top = logits.max()
    return float(top + np.log(np.exp(logits - top).sum()) - logits[target])


def test_token_nll_equals_the_full_logits(model, monkeypatch):
    monkeypatch.setattr(module, "_LOGITS_AT_ONCE", 5 * VOCABULARY)  # slices of 5: several, the last one short
    ids = torch.stack([tokens(12, seed) for seed in range(3)])
    got = token_nll(model, ids, torch.ones_like(ids, dtype=torch.bool))
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].double()
    wanted = -logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    assert got.dtype == torch.float64 and got.shape == (3, 11)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


def test_the_full_logits_are_never_made(model, monkeypatch):
    monkeypatch.setattr(module, "_LOGITS_AT_ONCE", 4 * VOCABULARY)
    rows = []
    handle = model.get_output_embeddings().register_forward_hook(lambda _, inputs, output: rows.append(output.shape))
    try:
        ids = tokens(30).reshape(2, 15)
        token_nll(model, ids, torch.ones_like(ids, dtype=torch.bool))
    finally:
        handle.remove()
    assert sum(shape[0] for shape in rows) == 28 and max(shape[0] for shape in rows) == 4


def test_head_runs_on_scored_positions_only(model):
    seen = []
    handle = model.get_output_embeddings().register_forward_hook(lambda _, inputs, output: seen.append(output.shape[0]))
    try:
        ids = tokens(20).reshape(2, 10)
        scored = torch.zeros_like(ids, dtype=torch.bool)
        scored[0, 3] = scored[1, 7:] = True
        got = token_nll(model, ids, torch.ones_like(scored), scored=scored)
    finally:
        handle.remove()
    assert sum(seen) == 4 and int((got != 0).sum()) == 4
    assert got[0, 2].item() == pytest.approx(reference(model, ids[0, :3].tolist(), int(ids[0, 3])), rel=1e-6)


@pytest.mark.parametrize("compressed", [False, True])
def test_pads_change_nothing_and_counting_them_would(compressed):
    if compressed:
        torch.manual_seed(3)
        model = GPT2CompressedLMHeadModel(
            GPT2CompressedConfig(
                vocab_size=VOCABULARY,
                n_positions=CONTEXT,
                n_embd=24,
                n_layer=2,
                n_head=2,
                initializer_range=0.4,
                ffn_groups=[{"layers": [0, 1], "rank": 2, "bias": "per_layer"}],
            )
        ).eval()
    else:
        model = make_model()
    rows = [tokens(length, length) for length in (9, 4, 2)]
    alone = [float(token_nll(model, row[None], torch.ones(1, len(row), dtype=torch.bool)).sum()) for row in rows]
    for filler in (0, 7):  # whatever stands in the pads
        ids = torch.full((3, 11), filler)
        mask = torch.zeros(3, 11, dtype=torch.bool)
        for index, row in enumerate(rows):
            ids[index, : len(row)], mask[index, : len(row)] = row, True
        together = token_nll(model, ids, mask)
        np.testing.assert_allclose(together.sum(1).numpy(), alone, rtol=1e-6)
        counted = token_nll(model, ids, torch.ones_like(mask))  # the fault: pads as targets
        assert abs(counted.sum() / counted.numel() - together.sum() / mask[:, 1:].sum()) > 0.05


def test_bfloat16_uses_float32_log_softmax(model):
    ids = tokens(16)[None]
    mask = torch.ones_like(ids, dtype=torch.bool)
    half = make_model().to(torch.bfloat16)
    wanted = token_nll(model, ids, mask).mean().item()
    assert token_nll(half, ids, mask).mean().item() == pytest.approx(wanted, rel=0.02)
    with torch.no_grad():
        hidden = half.transformer(ids).last_hidden_state[0]
        logits = half.lm_head(hidden)
        got = hidden_nll(half, hidden, ids[0])
    exact = -logits.double().log_softmax(-1).gather(-1, ids[0, :, None])[:, 0]
    in_half = -logits.log_softmax(-1).gather(-1, ids[0, :, None])[:, 0].double()
    torch.testing.assert_close(got, exact, rtol=1e-6, atol=1e-6)
    assert (in_half - exact).abs().max() > 1e-3  # what this avoids


def test_dropout_is_off_while_scoring_and_modes_come_back():
    model = make_model(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    ids = tokens(10)[None]
    mask = torch.ones_like(ids, dtype=torch.bool)
    wanted = token_nll(model, ids, mask)
    model.train()
    model.transformer.h[0].eval()  # a caller's own mixture of modes
    before = [part.training for part in model.modules()]
    got = token_nll(model, ids, mask)
    assert torch.equal(got, wanted) and not got.requires_grad
    assert [part.training for part in model.modules()] == before


def test_hidden_nll_of_nothing_is_nothing(model):
    ids = tokens(4)[None]
    none = torch.zeros_like(ids, dtype=torch.bool)
    assert token_nll(model, ids, torch.ones_like(none), scored=none).sum() == 0
    assert hidden_nll(model, torch.zeros(0, 24), torch.zeros(0, dtype=torch.int64)).shape == (0,)


# ---------------------------------------------------------------- windows


def published_loop(model, ids: list[int], context: int, stride: int) -> list[float]:
    """Hugging Face's sliding-window recipe, token by token: windows [begin, begin + context), each scores what the
    window before it did not hold; a target needs a predecessor inside its window."""
    found, previous_end = [], 0
    for begin in range(0, len(ids), stride):
        end = min(begin + context, len(ids))
        for target in range(max(previous_end, begin + 1), end):
            found.append(reference(model, ids[begin:target], ids[target]))
        previous_end = end
        if end == len(ids):
            break
    return found


@pytest.mark.parametrize("length", [2, 7, 8, 9, 17, 21])
@pytest.mark.parametrize("stride", [1, 3, 4])
def test_overlapping_windows_equal_the_published_loop(model, length, stride):
    ids, context = tokens(length), 8
    got = text_nll(model, [ids], [strided_spans(length, context, stride)])
    wanted = published_loop(model, ids.tolist(), context, stride)
    assert len(got) == length - 1
    np.testing.assert_allclose(got.numpy(), wanted, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("length", [2, 8, 9, 10, 16, 17, 29])
@pytest.mark.parametrize("context", [1, 8])
def test_windows_without_overlap_score_every_token_but_the_first(model, length, context):
    ids = tokens(length)
    got = text_nll(model, [ids], [strided_spans(length, context, context)])
    wanted = [
        reference(model, ids[(target - 1) // context * context : target].tolist(), int(ids[target]))
        for target in range(1, length)
    ]
    np.testing.assert_allclose(got.numpy(), wanted, rtol=2e-6, atol=1e-6)
    inside = [value for target, value in enumerate(wanted, start=1) if target % context]
    np.testing.assert_allclose(inside, published_loop(model, ids.tolist(), context, context), rtol=1e-6, atol=1e-9)


def test_windows_fill_the_positions_and_no_more(model):
    spans = strided_spans(60, CONTEXT, CONTEXT)
    assert max(span.stop - span.start for span in spans) == CONTEXT  # inputs; more would raise in the position table
    text_nll(model, [tokens(60)], [spans])


def rolling_pairs(ids: list[int], prefix: int, longest: int) -> list[tuple[list[int], list[int]]]:
    """(inputs, targets) of lm-evaluation-harness's rolling windows with one token of context, from its description: the
    first window is the prefix and the first tokens; each later one predicts up to `longest` new tokens and its
    inputs are the `longest` tokens before the last of them."""
    pairs, done = [], 0
    while done < len(ids):
        new = ids[done : done + longest]
        history = [prefix, *ids]
        end = 1 + done + len(new)  # of the targets in `history`
        inputs = history[max(0, end - 1 - longest) : end - 1]
        pairs.append((inputs, new))
        done += len(new)
    return pairs


@pytest.mark.parametrize("length", [1, 5, 8, 9, 16, 19])
def test_rolling_windows_equal_a_naive_reading(model, length):
    ids, prefix, longest = tokens(length), 0, 8
    wanted = []
    for inputs, targets in rolling_pairs(ids.tolist(), prefix, longest):
        with torch.no_grad():
            logits = model(torch.tensor([inputs])).logits[0, -len(targets) :].double()
        wanted += (-logits.log_softmax(-1)[range(len(targets)), targets]).tolist()
    sequence = torch.cat([torch.tensor([prefix]), ids])
    got = text_nll(model, [sequence], [rolling_spans(len(sequence), longest)])
    assert len(got) == length
    np.testing.assert_allclose(got.numpy(), wanted, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("stride", [1, 4, 8])
def test_batch_size_changes_nothing(model, stride):
    sequences = [tokens(length, length) for length in (13, 2, 9, 18)]
    spans = [strided_spans(len(ids), 8, stride) for ids in sequences]
    wanted = text_nll(model, sequences, spans, batch_tokens=1)
    for batch_tokens in (8, 20, 1000):
        got = text_nll(model, sequences, spans, batch_tokens=batch_tokens)
        np.testing.assert_allclose(got.numpy(), wanted.numpy(), rtol=1e-5, atol=1e-6)
        assert float(got.sum()) == pytest.approx(float(wanted.sum()), rel=1e-6)


def test_progress_reaches_its_end(model):
    seen: list[tuple[int, int]] = []
    text_nll(
        model,
        [tokens(40)],
        [strided_spans(40, 8, 4)],
        batch_tokens=16,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1][0] == seen[-1][1] == len(strided_spans(40, 8, 4)) and len(seen) > 2


def test_spans_of_a_short_text():
    assert strided_spans(5, 8, 4) == [Span(0, 4, 1)]
    assert strided_spans(1, 8, 4) == [] and rolling_spans(1, 8) == []


# ---------------------------------------------------------------- standard error


def test_standard_error_is_that_of_the_block_means():
    values = torch.rand(40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    means = values.numpy().reshape(8, 5).mean(1)
    assert standard_error(values, 5) == pytest.approx(means.std(ddof=1) / math.sqrt(8))
    assert standard_error(values, 40) is None


def test_standard_error_sees_dependence_inside_blocks():
    blocks = torch.randn(200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = blocks.repeat_interleave(10)[:-3]  # 200 draws, each told ten times
    assert standard_error(values, 10) == pytest.approx(1 / math.sqrt(200), rel=0.1)
    assert standard_error(values, 1) < 0.5 * standard_error(values, 10)
