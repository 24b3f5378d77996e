"""Slices as drafts: counted against a loop without a cache, drafts that always agree and that never do, the gap."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from scripted import subject
from test_matryoshka import nested
from test_metrics_extrapolation import text_of
from toy import toy_gpt2, toy_tokenizer

from compressor import models
from compressor.artifacts import provenance
from compressor.benchmark import benchmark
from compressor.errors import UserError
from compressor.metrics import METRICS
from compressor.metrics.assisted import measure, passes, same_text
from compressor.metrics.decoding import Draft, continuations
from compressor.modeling import GPT2CompressedLMHeadModel

NEW, PROMPT = 12, 10
EVERYTHING = {"ffn": [0.5, 0.25], "width": [16], "depth": [2], "head": [16]}
TEXT = text_of("".join(chr(97 + i * i % 23) for i in range(300)))
QUICK = {"prompts": 2, "prompt_tokens": PROMPT, "new_tokens": NEW, "repeats": 2}


@pytest.fixture(scope="module")
def everything():
    return nested(EVERYTHING, n_layer=4)[2]


@pytest.fixture
def shallow():
    """Nested in depth alone: nothing is rotated, and the smaller model has an exit of its own."""
    return nested({"depth": [2], "ffn": None}, n_layer=4)[2]


def figures(results) -> dict[str, dict]:
    drafts = dict.fromkeys(item.settings["draft"] for item in results)
    return {
        draft: {item.metric: item for item in results if item.settings["draft"] == draft} for draft in drafts
    }  # fmt: skip


def pieces() -> list[list[int]]:
    ids = toy_tokenizer().encode(TEXT.joined)
    return [ids[start : start + PROMPT] for start in (0, 290)]


@torch.no_grad()
def next_token(model, ids: list[int]) -> tuple[int, float]:
    """The likeliest but the end of text, and its chance."""
    chances = model(torch.tensor([ids]), use_cache=False).logits[0, -1].softmax(-1)
    chances[0] = 0
    chances = chances / chances.sum()
    return int(chances.argmax()), float(chances.max())


def drafted_by_hand(model, draft, prompt: list[int], ahead: int, heuristic: bool = False):
    """(text, passes, drafted, accepted) of greedy drafting, a full pass for every token."""
    text, count, drafted, accepted = [], 0, 0, 0
    while len(text) < NEW:
        guess: list[int] = []
        while len(guess) < min(ahead, NEW - len(text) - 1):
            guess.append(next_token(draft, prompt + text + guess)[0])
        taken = 0
        while taken < len(guess) and next_token(model, prompt + text + guess[:taken])[0] == guess[taken]:
            taken += 1
        text += [*guess[:taken], next_token(model, prompt + text + guess[:taken])[0]]
        count, drafted, accepted = count + 1, drafted + len(guess), accepted + taken
        if heuristic:
            ahead = ahead + 2 if taken == len(guess) else max(1, ahead - 1)
    return text, count, drafted, accepted


def test_what_is_accepted_is_what_a_loop_without_a_cache_accepts(everything):
    chosen = {"ffn": 64}, {"ffn": 32}, {"width": 16}, {"depth": 2}, {"head": 16}
    slices = [everything.slice(**choice) for choice in chosen]
    kinds = {type(one) for one in slices}
    assert GPT2CompressedLMHeadModel in kinds and len(kinds) == 2, "a plain draft and ones that are not"
    found = figures(measure(subject(everything, toy_tokenizer()), TEXT, draft_tokens=4, **QUICK))
    assert list(found) == ["ffn-64", "ffn-32", "width-16", "depth-2", "head-16"]
    for draft, own in zip(slices, found.values(), strict=True):
        byhand = [drafted_by_hand(everything, draft, prompt, 4) for prompt in pieces()]
        _, count, drafted, accepted = (sum(part) if i else part for i, part in enumerate(zip(*byhand, strict=True)))
        assert own["acceptance"].value == accepted / drafted and own["acceptance"].count == drafted
        assert own["tokens_per_pass"].value == 2 * NEW / count and own["tokens_per_pass"].count == count
        assert own["same_text"].value == 1 and own["same_text"].settings["gap"] == 0
        assert 0 < accepted < drafted


@pytest.mark.parametrize("schedule", ["constant", "heuristic"])
def test_text_and_passes_are_those_of_a_loop_and_every_text_begins_alike(everything, schedule):
    draft = everything.slice(ffn=32)
    byhand = [drafted_by_hand(everything, draft, prompt, 4, schedule == "heuristic") for prompt in pieces()]
    with passes(everything) as widths:
        written = continuations(everything, pieces(), NEW, forbidden=[0], batch=1, draft=Draft(draft, 4, schedule))
    assert written == [text for text, *_ in byhand]
    assert len(widths) == sum(count for _, count, *_ in byhand)
    assert sum(widths) - 2 * (PROMPT - 1) - len(widths) == sum(drafted for *_, drafted, _ in byhand)


def test_a_draft_that_is_the_model_has_all_accepted():
    model = nested({"ffn": [64]}, n_layer=4)[2]
    with torch.no_grad():
        for layer in model.transformer.h:
            layer.mlp.c_proj.weight[64:] = 0
        for own in model.transformer.nesting.ffn_bias:
            own["64"].zero_()
    own = figures(measure(subject(model, toy_tokenizer()), TEXT, draft_tokens=5, **QUICK))["ffn-64"]
    assert own["acceptance"].value == 1
    assert own["tokens_per_pass"].value == 6, "five that were drafted and its own"


def test_a_draft_that_always_errs_has_none_accepted(shallow):
    plain = continuations(shallow, pieces(), NEW, forbidden=[0])
    written = set(itertools.chain(*plain))
    embeddings = shallow.transformer.wte.weight.detach()
    said = (embeddings @ embeddings.T).argmax(1).tolist()  # the one token of an exit that is a token's embedding
    token = next(token for token, one in enumerate(said) if one not in written | {0})
    with torch.no_grad():
        shallow.transformer.nesting.exits["2_32"].weight.zero_()
        shallow.transformer.nesting.exits["2_32"].bias.copy_(embeddings[token])
    own = figures(measure(subject(shallow, toy_tokenizer()), TEXT, **QUICK))["depth-2"]
    assert own["acceptance"].value == 0 and own["tokens_per_pass"].value == 1
    assert own["tokens_per_pass"].count == 2 * NEW and own["same_text"].value == 1


def test_unsure_drafts_stop_early(everything):
    draft = everything.slice(ffn=32)
    prompt = pieces()[0]
    _, chance = next_token(draft, prompt)
    for confidence, ahead in ((chance - 1e-3, None), (chance + 1e-3, 1)):
        with passes(everything) as widths:
            continuations(
                everything, [prompt], NEW, forbidden=[0], batch=1, draft=Draft(draft, 5, "constant", confidence)
            )
        assert (widths[0] == PROMPT + 1) if ahead else (widths[0] > PROMPT + 1)


def test_time_is_that_of_both_in_turns_and_its_ratio(shallow):
    """A clock that counts passes of the whole model: plain text takes one a token."""
    with passes(shallow) as widths:
        found = figures(measure(subject(shallow, toy_tokenizer()), TEXT, clock=lambda: len(widths), **QUICK))
    for own in found.values():
        speed = own["assisted_speed_up"]
        assert speed.value == pytest.approx(own["tokens_per_pass"].value)
        assert speed.spread["least"] == speed.spread["most"] == pytest.approx(speed.value) and speed.count == 2
        assert speed.settings["plain_ms_per_token"] == 1000
        assert speed.settings["assisted_ms_per_token"] == pytest.approx(1000 / speed.value)


def test_speed_ups_are_medians_of_ratios_within_repeats():
    """Seconds by a planted clock: of plain text and two drafts in three repeats, every other one in reverse order."""
    model = nested({"ffn": [0.5], "depth": [2]}, n_layer=4)[2]
    seconds = np.array([[8.0, 6.0, 9.0], [4.0, 5.0, 2.0], [16.0, 2.0, 3.0]])
    order = [(0, 0), (1, 0), (2, 0), (2, 1), (1, 1), (0, 1), (0, 2), (1, 2), (2, 2)]
    moments = itertools.chain.from_iterable((0.0, seconds[place]) for place in order)
    given = {**QUICK, "repeats": 3, "clock": lambda: next(moments)}
    found = figures(measure(subject(model, toy_tokenizer()), TEXT, **given))
    for own, of_draft in zip(found.values(), seconds[1:], strict=True):
        ratios, speed = seconds[0] / of_draft, own["assisted_speed_up"]
        assert speed.value == np.median(ratios) and speed.count == 3
        wanted = {"least": ratios.min(), "most": ratios.max(), "iqr": (sorted(ratios)[2] - sorted(ratios)[0]) / 2}
        assert {key: speed.spread[key] for key in wanted} == pytest.approx(wanted)
        assert speed.settings["plain_ms_per_token"] == pytest.approx(1000 * 8 / (2 * NEW))
        assert speed.settings["assisted_ms_per_token"] == pytest.approx(1000 * np.median(of_draft) / (2 * NEW))
    assert list(found) == ["ffn-64", "depth-2"]


def test_the_end_of_text_does_not_end_it(shallow):
    with torch.no_grad():
        for norm in (shallow.transformer.ln_f, shallow.transformer.nesting.exits["2_32"]):
            norm.bias.add_(20 * shallow.transformer.wte.weight[0])
    assert 0 in itertools.chain(*continuations(shallow, pieces(), NEW))
    own = figures(measure(subject(shallow, toy_tokenizer()), TEXT, **QUICK))["depth-2"]
    assert own["tokens_per_pass"].value * own["tokens_per_pass"].count == pytest.approx(2 * NEW)
    byhand = [drafted_by_hand(shallow, shallow.slice(depth=2), prompt, 5) for prompt in pieces()]
    drafted, accepted = (sum(part) for part in list(zip(*byhand, strict=True))[2:])
    assert own["acceptance"].value == accepted / drafted < 1, "nor is it drafted"
    texts = continuations(shallow, pieces(), NEW, forbidden=[0], batch=1, draft=Draft(shallow.slice(depth=2), 5))
    assert not any(0 in text for text in texts) and {len(text) for text in texts} == {NEW}


def test_texts_that_differ_are_counted_with_how_near_the_tokens_are(everything):
    prompts = pieces()
    plain = continuations(everything, prompts, NEW, forbidden=[0])
    other = copy.deepcopy(plain)
    other[1][7:] = [(token + 1) % 97 for token in other[1][7:]]
    found = same_text(everything, prompts, plain, other, {"draft": "planted"})
    with torch.no_grad():
        logits = everything(torch.tensor([prompts[1] + plain[1][:7]])).logits[0, -1].double()
    assert found.value == 0.5 and found.count == 2
    assert found.settings["gap"] == pytest.approx(float(logits[plain[1][7]] - logits[other[1][7]]), rel=1e-4)


def test_a_saved_model_measures_the_same_and_comes_back_as_it_was(tmp_path):
    rotated = nested({"head": [16], "ffn": None}, n_layer=2)[2]
    own = subject(rotated, toy_tokenizer())
    before = rotated.generation_config
    models.save(rotated, tmp_path / "saved", toy_tokenizer(), torch.float32)
    opened = models.open_model(str(tmp_path / "saved"))
    counted = [
        {
            name: (one["acceptance"].value, one["same_text"].value)
            for name, one in figures(measure(it, TEXT, **{**QUICK, "prompts": 1})).items()
        }
        for it in (own, opened)
    ]
    assert counted[0] == counted[1]
    assert rotated.generation_config is before and not rotated._forward_pre_hooks


def test_settings_travel_with_every_figure(shallow):
    for item in measure(subject(shallow, toy_tokenizer()), TEXT, draft_tokens=3, confidence=0.2, **QUICK):
        assert item.settings["protocol"] == "greedy, 3 drafted tokens, constant, confidence 0.2"
        told = {"prompts": 2, "prompt_tokens": PROMPT, "new_tokens": NEW, "draft_tokens": 3, "fingerprint": "f" * 64}
        assert told.items() <= item.settings.items() and {"device", "dtype", "threads"} <= set(item.settings)


def test_a_model_in_which_none_is_nested_has_a_gap(shallow):
    origin = provenance(seed=0, base_model="toy", base_hash="", device="cpu", dtype="float32")
    rows = {
        "original": subject(toy_gpt2(n_layer=4), toy_tokenizer()),
        "slice": subject(shallow.slice(depth=2), toy_tokenizer()),
        "nested": subject(shallow, toy_tokenizer()),
    }
    metrics = [{"metric": "assisted", **QUICK}]
    made = benchmark(rows, metrics, {"assisted": TEXT}, origin=origin, quiet=True)
    for row in made.rows[:2]:
        assert not row.results and [gap.reason for gap in row.gaps] == [
            "no smaller models are nested in it that could draft; the rewrite matryoshka makes such a model"
        ]
    assert len(made.rows[2].results) == 4 and not made.rows[2].gaps


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prompts": 0}, "prompts=0 is not allowed; allowed: whole numbers from 1"),
        ({"draft_tokens": 0}, "draft_tokens=0 is not allowed"),
        ({"repeats": 1}, "repeats=1 is not allowed"),
        ({"new_tokens": 1}, "new_tokens=1 is not allowed; allowed: whole numbers from 2 to 32"),
        ({"new_tokens": 40}, "new_tokens=40 is not allowed; allowed: whole numbers from 2 to 32"),
        ({"prompt_tokens": 63}, "prompt_tokens=63 is not allowed; allowed: whole numbers from 1 to 62"),
        ({"schedule": "fast"}, "fast"),
        ({"confidence": 1.0}, "confidence=1.0 is not allowed; allowed: a number from 0, below 1"),
        ({"max_tokens": 8}, "8 tokens of planted are no prompt of 32"),
    ],
)
def test_settings_that_are_not_allowed_are_told_in_one_line(everything, settings, said):
    with pytest.raises(UserError, match=said) as error:
        measure(subject(everything, toy_tokenizer()), TEXT, **settings)
    assert "\n" not in str(error.value)


def test_its_settings_are_those_it_takes():
    assert METRICS["assisted"].settings == set(measure.__kwdefaults__) - {"progress", "clock"}
