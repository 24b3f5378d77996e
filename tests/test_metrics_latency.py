"""The protocol of latency, with models that count and clocks that are made up: no test asserts a real time."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from toy import toy_alignment, toy_blocks, toy_gpt2

from compressor.artifacts import provenance
from compressor.benchmark import benchmark
from compressor.errors import UserError
from compressor.metrics import METRICS
from compressor.metrics.latency import interleaved, measure, time_generation
from compressor.models import OpenModel
from compressor.rewrites import from_record
from compressor.rewrites.compose import apply

ORIGIN = provenance(seed=0, base_model="one", base_hash="", device="cpu", dtype="float32")


class Clock:
    """Stands still but for what models make it move."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Pretender(torch.nn.Module):
    """Takes `prefill` or `decode` seconds a pass by the clock, remembers each pass, and always wants to stop."""

    EOS = 3

    def __init__(self, name, clock=None, log=None, prefill=1.0, decode=0.1, positions=64):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(
            vocab_size=11, n_positions=positions, n_layer=3, n_embd=5, _attn_implementation="made up"
        )
        self.dtype = torch.float32
        self.name, self.clock, self.log = name, clock or Clock(), [] if log is None else log
        self.prefill, self.decode = prefill, decode

    def forward(self, input_ids, past_key_values=None, use_cache=None, logits_to_keep=None):
        assert use_cache and logits_to_keep == 1 and not torch.is_grad_enabled()
        held = 0 if past_key_values is None else past_key_values
        if held:
            assert input_ids.tolist() == [[self.EOS]] * len(input_ids)  # the token of the step before
        self.log.append((self.name, tuple(input_ids.shape), held))
        self.clock.now += self.decode if held else self.prefill
        logits = torch.zeros(len(input_ids), 1, 11)
        logits[..., self.EOS] = 1
        return SimpleNamespace(logits=logits, past_key_values=held + input_ids.shape[1])


def opened(model, name="made up") -> OpenModel:
    return OpenModel(name=name, folder=Path("."), hash="", model=model, tokenizer=None, stored_dtype=torch.float32)  # type: ignore[arg-type]


# ---------------------------------------------------------------- one generation


def test_every_model_makes_the_same_passes_though_it_wants_to_stop():
    model = Pretender("x")
    seconds = time_generation(model, torch.ones(2, 5, dtype=torch.int64), 7, clock=model.clock)
    assert model.log == [("x", (2, 5), 0), *(("x", (2, 1), 5 + step) for step in range(7))]
    assert seconds == (pytest.approx(1.0), pytest.approx(0.7))


@pytest.mark.parametrize("kind", ["plain", "compressed"])
def test_the_tokens_are_those_without_a_cache(kind):
    """Real models with a real cache: its length grows by one a step."""
    model = toy_gpt2()
    if kind == "compressed":
        rewrite = from_record({"rewrite": "soft_shared", "n": 3, "rank": 2}).resolved(model.config)
        model = apply([rewrite], model, toy_alignment(model), calibration=toy_blocks(model.config))
    ids = torch.arange(10).view(2, 5)
    fed, held = [], []

    def watch(_module, _inputs, given):
        cache = given.get("past_key_values")
        fed.append(given["input_ids"].clone())
        held.append(0 if cache is None else cache.get_seq_length())

    handle = model.register_forward_pre_hook(watch, with_kwargs=True)
    time_generation(model, ids, 6)
    handle.remove()
    assert held == [0, 5, 6, 7, 8, 9, 10]
    greedy = ids
    with torch.no_grad():
        for _ in range(6):
            greedy = torch.cat([greedy, model(greedy, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(torch.cat(fed, dim=1), greedy)


# ---------------------------------------------------------------- side by side


def test_models_take_turns_and_the_order_turns_round():
    clock, log = Clock(), []
    models = [Pretender(name, clock, log) for name in "abc"]
    interleaved(models, 1, 4, 2, repeats=3, warm_up=1, clock=clock)
    assert [name for name, shape, _ in log if shape == (1, 4)] == list("abccbaabccba")
    assert len(log) == 3 * 4 * (1 + 2)


def test_warm_up_is_not_counted():
    clock = Clock()
    model = Pretender("a", clock)
    slow = iter([100.0, 50.0, 1.0, 2.0, 3.0])
    model.register_forward_pre_hook(
        lambda module, _args, given: setattr(module, "prefill", next(slow)) if "past_key_values" not in given else None,
        with_kwargs=True,
    )
    seconds = interleaved([model], 1, 4, 2, repeats=3, warm_up=2, clock=clock)
    assert seconds.shape == (1, 2, 3) and seconds[0, 0] == pytest.approx([1, 2, 3])


def test_prompts_are_the_same_every_time_and_within_each_vocabulary():
    clock, seen = Clock(), []
    model = Pretender("a", clock)
    model.register_forward_pre_hook(lambda _m, _a, given: seen.append(given["input_ids"].tolist()), with_kwargs=True)
    interleaved([model], 2, 6, 1, repeats=2, warm_up=0, clock=clock)
    assert seen[0] == seen[2] and len(set(map(tuple, seen[0]))) == 2
    assert all(0 <= token < 11 for row in seen[0] for token in row)


# ---------------------------------------------------------------- the metric


def test_values_are_medians_in_milliseconds_with_their_spread():
    clock = Clock()
    fast, slow = Pretender("fast", clock, prefill=0.01, decode=0.002), Pretender("slow", clock, prefill=0.03)
    took = iter(np.tile([0.01, 0.01, 0.02, 0.05, 0.01, 0.03, 0.01, 0.01, 0.01, 0.04], 1))
    fast.register_forward_pre_hook(
        lambda module, _args, given: setattr(module, "prefill", next(took)) if "past_key_values" not in given else None,
        with_kwargs=True,
    )
    results = measure(
        [opened(fast), opened(slow)], batch=3, prompt_tokens=8, new_tokens=4, repeats=10, warm_up=0, clock=clock
    )
    assert [[item.metric for item in own] for own in results] == [["prefill_latency", "decode_latency"]] * 2
    prefill, decode = results[0]
    values = np.array([10, 10, 20, 50, 10, 30, 10, 10, 10, 40.0])
    assert prefill.value == pytest.approx(np.median(values))
    assert prefill.spread["p90"] == pytest.approx(np.percentile(values, 90))
    assert prefill.spread["iqr"] == pytest.approx(np.percentile(values, 75) - np.percentile(values, 25))
    assert prefill.spread["least"] == pytest.approx(10)
    assert decode.value == pytest.approx(2.0) and decode.unit == "ms per step"
    assert results[1][1].value == pytest.approx(100)
    assert prefill.count == decode.count == 10 and not prefill.higher_is_better
    assert prefill.settings == {
        "protocol": "greedy, fixed length, models interleaved",
        "batch": 3,
        "prompt_tokens": 8,
        "new_tokens": 4,
        "repeats": 10,
        "warm_up": 0,
        "models": 2,
        "device": "cpu",
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "attention": "made up",
    }
    json.dumps(prefill.to_dict(), allow_nan=False)


def test_every_batch_size_and_length_is_measured():
    clock, log, steps = Clock(), [], []
    models = [opened(Pretender(name, clock, log)) for name in "ab"]
    results = measure(
        models,
        batch=[1, 4],
        prompt_tokens=[8, 16],
        new_tokens=2,
        repeats=2,
        warm_up=1,
        clock=clock,
        progress=lambda done, total: steps.append((done, total)),
    )
    shapes = [(item.settings["batch"], item.settings["prompt_tokens"]) for item in results[0][::2]]
    assert shapes == [(1, 8), (1, 16), (4, 8), (4, 16)]
    assert {shape for _, shape, held in log if not held} == set(shapes)
    assert steps == [(done, 4 * 2 * 3) for done in range(1, 25)]


@pytest.mark.parametrize(("positions", "prompt", "new"), [(1024, 256, 32), (64, 32, 32), (20, 10, 10), (2, 1, 1)])
def test_lengths_fit_the_smallest_model(positions, prompt, new):
    clock = Clock()
    models = [opened(Pretender("a", clock)), opened(Pretender("b", clock, positions=positions))]
    models[0].model.config.n_positions = 2048
    settings = measure(models, repeats=2, warm_up=0, clock=clock)[0][0].settings
    assert (settings["prompt_tokens"], settings["new_tokens"]) == (prompt, new)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prompt_tokens": 60, "new_tokens": 5}, "prompt_tokens=60 and new_tokens=5 are more than the 64 positions"),
        ({"prompt_tokens": 64}, "are more than the 64 positions"),
        ({"batch": 0}, "batch=0 is not allowed"),
        ({"batch": [1, "2"]}, "batch='2' is not allowed"),
        ({"batch": []}, "batch=[] is not allowed"),
        ({"prompt_tokens": True}, "prompt_tokens=True is not allowed"),
        ({"new_tokens": 0}, "new_tokens=0 is not allowed"),
        ({"repeats": 1}, "repeats=1 is not allowed; allowed: whole numbers from 2"),
        ({"warm_up": -1}, "warm_up=-1 is not allowed"),
    ],
)
def test_bad_settings_are_one_line_before_anything_runs(settings, said):
    model = Pretender("a")
    with pytest.raises(UserError) as error:
        measure([opened(model)], **settings)
    assert said in str(error.value) and "\n" not in str(error.value) and model.log == []


# ---------------------------------------------------------------- in a report


def test_a_report_measures_all_models_together_and_compares_them():
    clock, log = Clock(), []
    rows = {
        name: opened(Pretender(name, clock, log, prefill=seconds), name)
        for name, seconds in (("original", 0.04), ("small", 0.01))
    }
    metric = METRICS["latency"]
    given = {"metric": "latency", "prompt_tokens": [4, 8], "new_tokens": 2, "repeats": 2, "warm_up": 0}
    with pytest.MonkeyPatch.context() as patch:
        timed = dataclasses.replace(metric, run=lambda *a, **k: metric.run(*a, **k, clock=clock))
        patch.setitem(METRICS, "latency", timed)
        report = benchmark(rows, [given], {}, origin=ORIGIN, quiet=True)
    assert [name for name, shape, _ in log if shape == (1, 4)] == ["original", "small", "small", "original"]
    small = report.rows[1]
    assert [result.metric for result in small.results] == ["prefill_latency", "decode_latency"] * 2
    assert [report.ratio(small, result) for result in small.results] == pytest.approx([0.25, 1, 0.25, 1])
    other = dataclasses.replace(small.results[0], settings={**small.results[0].settings, "prompt_tokens": 5})
    assert report.ratio(small, other) is None  # nothing of that length at the baseline


def test_together_and_one_by_one_stay_in_the_order_asked_for(tiny_folder):
    from compressor.models import open_model

    rows = {name: open_model(str(tiny_folder), device="cpu") for name in ("one", "two")}
    latency = {"metric": "latency", "prompt_tokens": 4, "new_tokens": 2, "repeats": 2, "warm_up": 0}
    for order, expected in (
        (
            ["size", latency],
            ["parameters", "bytes", "flops_per_token", "cache_bytes", "prefill_latency", "decode_latency"],
        ),
        (
            [latency, "size"],
            ["prefill_latency", "decode_latency", "parameters", "bytes", "flops_per_token", "cache_bytes"],
        ),
    ):
        report = benchmark(rows, order, {}, origin=ORIGIN, quiet=True)
        assert [[result.metric for result in row.results] for row in report.rows] == [expected] * 2
        assert all(row.find("decode_latency").value > 0 for row in report.rows)
