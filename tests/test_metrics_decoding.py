"""Continuations against one forward pass a token without cache or padding, whatever the batch."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from transformers import GenerationConfig

from compressor.errors import UserError
from compressor.metrics.decoding import _Choice, continuations, end_tokens
from compressor.modeling import GPT2CompressedConfig, GPT2CompressedLMHeadModel
from tests.conftest import make_config, make_model

NEW = 12


def make_prompts(count: int = 7, seed: int = 0) -> list[list[int]]:
    """Of 1 to 40 tokens, no two of a length."""
    chooser = random.Random(seed)
    return [[chooser.randrange(1, 320) for _ in range(length)] for length in chooser.sample(range(1, 41), count)]


PROMPTS = make_prompts()


def greedy(model, prompt: list[int], new_tokens: int = NEW) -> list[int]:
    """Token by token, the whole row again each time: nothing padded, nothing cached."""
    row = list(prompt)
    with torch.no_grad():
        for _ in range(new_tokens):
            row.append(int(model(torch.tensor([row]), use_cache=False).logits[0, -1].argmax()))
    return row[len(prompt) :]


@pytest.fixture(scope="module")
def expected(_tiny_model) -> list[list[int]]:
    return [greedy(_tiny_model, prompt) for prompt in PROMPTS]


def test_greedy_is_the_likeliest_token_each_time(tiny_model, expected):
    assert len({tuple(row) for row in expected}) == len(PROMPTS), "the prompts must matter"
    assert continuations(tiny_model, PROMPTS, NEW) == expected


def test_a_compressed_model_continues_too():
    torch.manual_seed(1)
    config = GPT2CompressedConfig(
        **{key: getattr(make_config(), key) for key in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")},
        ffn_groups=[{"layers": [1, 2, 3], "start": 1, "rank": 2, "bias": "per_layer"}],
    )
    model = GPT2CompressedLMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.12 * torch.randn_like(parameter))
    assert continuations(model, PROMPTS, NEW) == [greedy(model, prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("top_k", [None, 2, 40])
def test_batch_padding_and_order_change_no_text(tiny_model, top_k):
    alone = [continuations(tiny_model, [prompt], NEW, top_k=top_k)[0] for prompt in PROMPTS]
    for batch in (2, 3, 16):
        assert continuations(tiny_model, PROMPTS, NEW, top_k=top_k, batch=batch) == alone
    assert continuations(tiny_model, PROMPTS[::-1], NEW, top_k=top_k, batch=3) == alone[::-1]
    assert continuations(tiny_model, PROMPTS, NEW - 5, top_k=top_k) == [row[: NEW - 5] for row in alone]


def test_the_global_seed_plays_no_part(tiny_model):
    torch.manual_seed(5)
    first = continuations(tiny_model, PROMPTS, NEW, top_k=5)
    torch.manual_seed(6)
    assert continuations(tiny_model, PROMPTS, NEW, top_k=5) == first
    assert continuations(tiny_model, PROMPTS, NEW, top_k=5, seed=1) != first


def test_sampled_tokens_are_among_the_likeliest(tiny_model, expected):
    sampled = continuations(tiny_model, PROMPTS, NEW, top_k=3)
    ranks = []
    for prompt, new in zip(PROMPTS, sampled, strict=True):
        with torch.no_grad():
            logits = tiny_model(torch.tensor([prompt + new])).logits[0]
        for place, token in enumerate(new, start=len(prompt) - 1):
            ranks.append(int((logits[place] > logits[place, token]).sum()))
    assert set(ranks) == {0, 1, 2}
    assert continuations(tiny_model, PROMPTS, NEW, top_k=1) == expected


def test_tokens_are_drawn_at_their_shares():
    """In every row and at every step, each with numbers of its own."""
    rows, steps = [[row] for row in range(50)], 80
    choice = _Choice(rows, steps, 1, (), 2, seed=0)
    logits = torch.tensor([0.1, 0.6, 0.3]).log().repeat(len(rows), 1)
    before = [torch.zeros(len(rows), 1 + step, dtype=torch.int64) for step in range(steps)]
    chosen = torch.stack([choice(ids, logits.clone()).argmax(1) for ids in before])  # [steps, rows]
    assert set(chosen.flatten().tolist()) == {1, 2}
    first = (chosen == 1).double()
    assert float(first.mean()) == pytest.approx(2 / 3, abs=4 * (2 / 9 / first.numel()) ** 0.5)
    for axis, count in ((0, steps), (1, len(rows))):
        assert float(first.mean(axis).var()) == pytest.approx(2 / 9 / count, rel=0.6), "no more alike than by chance"


def test_models_side_by_side_share_the_random_numbers(tiny_model):
    near = copy.deepcopy(tiny_model)
    with torch.no_grad():
        near.lm_head.weight.mul_(1 + 1e-5)
    assert continuations(near, PROMPTS, NEW, top_k=40) == continuations(tiny_model, PROMPTS, NEW, top_k=40)


# ---------------------------------------------------------------- ends


def test_a_row_that_ends_is_cut_there_and_stays_ended(tiny_model, expected):
    end = expected[2][4]
    cut = [row[: row.index(end)] if end in row else row for row in expected]
    assert len(cut[2]) <= 4 and max(map(len, cut)) == NEW, "one must end while another goes on"
    for batch in (1, 3, 16):
        assert continuations(tiny_model, PROMPTS, NEW, ends=[end], batch=batch) == cut
    ends = [end, expected[0][1]]
    cut = [row[: min([row.index(stop) for stop in ends if stop in row] or [NEW])] for row in expected]
    assert continuations(tiny_model, PROMPTS, NEW, ends=ends) == cut
    assert continuations(tiny_model, PROMPTS, NEW, ends=[expected[0][0]])[0] == []


def test_what_is_forbidden_is_never_written(tiny_model, expected):
    forbidden = [expected[0][3], expected[1][0]]
    for top_k in (None, 4):
        written = continuations(tiny_model, PROMPTS, NEW, forbidden=forbidden, top_k=top_k)
        assert {len(row) for row in written} == {NEW}
        assert not {token for row in written for token in row}.intersection(forbidden)


def test_end_tokens(tiny_tokenizer):
    def ends(tokenizer, vocabulary=320, end=None):
        return end_tokens(make_model(make_config(vocab_size=vocabulary, n_layer=1, eos_token_id=end)), tokenizer)

    without = copy.deepcopy(tiny_tokenizer)
    without.eos_token = None
    assert ends(tiny_tokenizer, end=7) == (0,)
    assert ends(without, end=7) == (7,)
    assert ends(without, end=[7, 9]) == (7, 9)
    assert ends(without) == ()
    assert ends(without, end=50256) == (), "GPT2Config's default, which this vocabulary has no room for"


# ---------------------------------------------------------------- the model


def test_the_checkpoints_own_generation_config_plays_no_part(tiny_model, expected):
    own = GenerationConfig(
        do_sample=True,
        temperature=9.0,
        repetition_penalty=3.0,
        eos_token_id=expected[0][2],
        max_length=5,
        min_length=3,
        num_beams=2,
        return_dict_in_generate=True,
    )
    tiny_model.generation_config = own
    kept = own.to_dict()
    assert continuations(tiny_model, PROMPTS, NEW) == expected
    assert tiny_model.generation_config is own and own.to_dict() == kept


def test_the_model_comes_back_as_it_was(tiny_model):
    tiny_model.train()
    tiny_model.transformer.h[1].eval()
    before = (
        [module.training for module in tiny_model.modules()],
        [parameter.requires_grad for parameter in tiny_model.parameters()],
        tiny_model.config.to_dict(),
        [type(module) for module in tiny_model.modules()],
        copy.deepcopy(tiny_model.state_dict()),
    )

    def check():
        assert [module.training for module in tiny_model.modules()] == before[0]
        assert [parameter.requires_grad for parameter in tiny_model.parameters()] == before[1]
        assert tiny_model.config.to_dict() == before[2]
        assert [type(module) for module in tiny_model.modules()] == before[3]

    continuations(tiny_model, PROMPTS, NEW, top_k=2)
    check()
    assert all(torch.equal(value, before[4][key]) for key, value in tiny_model.state_dict().items())
    with torch.no_grad():
        tiny_model.transformer.ln_f.bias.fill_(torch.nan)
    with pytest.raises(UserError, match="NaN"):
        continuations(tiny_model, PROMPTS, NEW)
    check()


def test_dropout_is_off(expected):
    model = make_model(make_config(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)).train()
    assert continuations(model, PROMPTS, NEW) == expected


def test_positions_are_used_to_the_last_and_not_beyond(tiny_model):
    prompt = make_prompts(1)[0][:1] * 52
    assert continuations(tiny_model, [prompt, [3, 4]], NEW)[0] == greedy(tiny_model, prompt)
    with pytest.raises(UserError, match=r"^a prompt of 53 tokens and new_tokens=12 are more than the 64 positions"):
        continuations(tiny_model, [[*prompt, 1], [3, 4]], NEW)


def test_progress_counts_prompts(tiny_model):
    seen = []
    continuations(tiny_model, PROMPTS, 2, batch=3, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(3, 7), (6, 7), (7, 7)]
