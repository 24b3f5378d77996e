"""Reports and stories with planted figures: what a benchmark of many runs would give, without running it."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

from compressor.artifacts import provenance
from compressor.benchmark import Gap, Report, Row
from compressor.metrics import MetricResult
from compressor.report.story import Alignment, Bank, Curve, Diagnosis, Pair, Projection, Search, Story
from compressor.windows import Candidate, Window

ORIGIN = provenance(
    seed=0,
    base_model="gpt2",
    base_hash="",
    device="cpu",
    dtype="float32",
    data={"perplexity": {"source": "wikitext", "part": "test", "fingerprint": "ab" * 32}},
)
SMALL, BLOCK = 124_439_808, 7_087_872  # parameters of GPT-2 small and of one of its blocks
PROMPTS = ("India will become global leader in AI because", "The film was long, but")


def size(parameters: int, *, non_zero: int | None = None, flops: int = 247_064_064) -> list[MetricResult]:
    counted: dict[str, Any] = {
        "protocol": "unique storages",
        "embeddings": 39_383_808,
        "embedding_share": 39_383_808 / parameters,
        "non_zero": parameters if non_zero is None else non_zero,
    }
    return [
        MetricResult("parameters", parameters, "parameters", False, 1, None, counted),
        MetricResult("bytes", 4 * parameters, "bytes", False, 1, None, {"protocol": "weight files"}),
        MetricResult("flops_per_token", flops, "operations per token", False, 12, None, {"protocol": "forward"}),
    ]


def perplexity(value: float, protocol: str = "strided", **changed: Any) -> list[MetricResult]:
    settings = {
        "protocol": protocol,
        "context": 1024,
        "stride": 512,
        "tokens": 16_384,
        "words": 14_000,
        "source": "wikitext",
        "part": "test",
        "fingerprint": "ab" * 32,
        **changed,
    }
    spread = {"standard_error": value / 100, "method": "delta method"} if math.isfinite(value) else None
    return [
        MetricResult("perplexity", value, "per token", False, 16_383, spread, settings),
        MetricResult("word_perplexity", 1500 * value, "per word", False, 16_383, spread, settings),
    ]


def latency(prefill: float, decode: float, batch: int = 1, prompt: int = 256) -> list[MetricResult]:
    settings = {
        "protocol": "greedy, fixed length, models interleaved",
        "batch": batch,
        "prompt_tokens": prompt,
        "new_tokens": 32,
        "repeats": 10,
        "device": "cpu",
        "dtype": "float32",
    }
    return [
        MetricResult(metric, value, unit, False, 10, {"p90": 1.1 * value, "iqr": 0.1, "least": value}, settings)
        for metric, value, unit in (
            ("prefill_latency", prefill, "ms"),
            ("decode_latency", decode, "ms per step"),
        )
    ]


def task(metric: str, value: float, half: float = 0.02, *, protocol: str, higher: bool = True, details: Any = None):
    settings = {"protocol": protocol, "source": "demo", "fingerprint": "cd" * 32, "part": "test"}
    spread = {"low": value - half, "high": value + half, "method": "95 % bootstrap over documents"} if half else None
    return MetricResult(metric, value, "share", higher, 500, spread, settings, details)


def imdb(accuracy: float, protocol: str = "probe") -> list[MetricResult]:
    return [task("imdb_accuracy", accuracy, protocol=protocol)]


def rouge(value: float, protocol: str = "greedy") -> list[MetricResult]:
    shares = (("rouge1", 1.0), ("rouge2", 0.4), ("rougeL", 0.8))
    return [task(metric, share * value, 0.01, protocol=protocol) for metric, share in shares]


def generation(distinct: float, looping: float, texts: tuple[str, ...], loops: bool = False) -> list[MetricResult]:
    written = [
        {"prompt": prompt, "decoding": "top-k 40", "text": text, "loops": loops, "seed": 0}
        for prompt, text in zip(PROMPTS, texts, strict=True)
    ]
    return [
        task("distinct1", distinct / 2, 0.03, protocol="8 prompts"),
        task("distinct2", distinct, 0.03, protocol="8 prompts", details=written),
        task("looping", looping, 0, protocol="8 prompts", higher=False),
    ]


def extrapolation(base: float, ratios: dict[int, float], *, takes: int | None = None, **changed: Any):
    """Perplexity `base` at 256 tokens and so many times that at others, 10 % more in windows that do not overlap;
    losses by position and greedy text to 256 and, where the model takes so many, to 512 tokens."""
    shared = {
        "trained": 256, "takes": takes, "stride_share": 0.5, "max_tokens": 4096, "tokens": 4096, "source": "wikitext",
        "part": "test", "split": "test", "fingerprint": "ab" * 32, **changed,
    }  # fmt: skip
    found = []
    for protocol, factor in (("sliding", 1.0), ("non-overlapping", 1.1)):
        for length in sorted({256, *ratios}):
            value = factor * base * ratios.get(length, 1.0)
            stride = round(shared["stride_share"] * length) if protocol == "sliding" else length
            settings = {"protocol": protocol, "context": length, "stride": stride, **shared}
            spread = {"standard_error": value / 100, "ratio_error": 0.004, "method": "delta method"}
            found.append(MetricResult("length_perplexity", value, "per token", False, 4095, spread, settings))
    bins = [
        {"first": first, "last": first + 127, "tokens": 512, "nll": 3.0 + first / 1024, "others": 3.0}
        for first in range(1, max(found[-1].settings["context"], 256), 128)
    ]
    found[-1] = dataclasses.replace(found[-1], details=bins)
    for length in (256, 512)[: 2 if takes is None else 1]:
        settings = {
            "protocol": "greedy", "context": length, "prompts": 4, "prompt_tokens": 128, "new_tokens": length - 128,
            "seed": 0, **shared, "text_repetition": 0.02, "nll": 0.5, "cache_gap": 2e-6,
        }  # fmt: skip
        found.append(MetricResult("repetition", length / 1000, "share of runs of 4", False, 4, None, settings))
    text = "and so on" if takes is None else f"(cannot: takes {takes} tokens)"
    sample = {"prompt": "… the end", "decoding": "greedy, from token 257 on", "text": text, "seed": None}
    found[-1] = dataclasses.replace(found[-1], details=[sample])
    return found


def assisted(drafts: dict[str, tuple[float, float, float]], same: float = 1.0) -> list[MetricResult]:
    """draft -> (acceptance, tokens a pass, speed-up)."""
    shared = {
        "protocol": "greedy, 5 drafted tokens, constant", "prompts": 4, "prompt_tokens": 64, "new_tokens": 64,
        "draft_tokens": 5, "schedule": "constant", "max_tokens": 16384, "source": "wikitext", "part": "test",
        "fingerprint": "ab" * 32,
    }  # fmt: skip
    found = []
    for draft, (accepted, tokens, speed) in drafts.items():
        own = {**shared, "draft": draft}
        spread = {"iqr": 0.02, "least": speed - 0.05, "most": speed + 0.05, "method": "of the ratios"}
        times = {**own, "plain_ms_per_token": 20.0, "assisted_ms_per_token": 20 / speed}
        found += [
            MetricResult("acceptance", accepted, "share of drafted tokens", True, 400, None, own),
            MetricResult("tokens_per_pass", tokens, "tokens a pass", True, 80, None, own),
            MetricResult("assisted_speed_up", speed, "times as fast as without a draft", True, 5, spread, times),
            MetricResult(
                "same_text", same, "share of texts", True, 4, None, {**own, "gap": 0.0 if same == 1 else 2e-6}
            ),
        ]
    return found


def row(name: str, results: list[MetricResult], *gaps: Gap, weights: str = "") -> Row:
    return Row(name, f"runs/{name}", tuple(results), weights or name, gaps)


def report(*rows: Row, references: tuple[Row, ...] = (), metrics: tuple[dict[str, Any], ...] = ()) -> Report:
    return Report(rows, ORIGIN, metrics, references)


def references() -> tuple[Row, ...]:
    return (
        Row("majority class", "", (task("imdb_accuracy", 0.5, 0, protocol="no model"),)),
        Row("tf-idf", "", (task("imdb_accuracy", 0.82, 0.02, protocol="no model"),)),
        Row("lead-3", "", tuple(rouge(0.31, "no model"))),
        Row("prompt echo", "", tuple(rouge(0.22, "no model"))),
    )


def study() -> Report:
    """The original, its control, eight runs before and after recovery, a baseline of one of them before and after
    recovery, another model: 21 rows, all metrics, gaps."""
    chance = random.Random(0)
    words = ("the", "film", "was", "slow", "and", "music", "carried", "it", "to", "river", "where", "winter", "waited")

    def texts() -> tuple[str, ...]:
        return tuple(" ".join(chance.choices(words, k=45)).capitalize() + "." for _ in PROMPTS)

    def everything(cost: float, depth: float, loops: bool = False) -> list[MetricResult]:
        """cost: of quality, 0 none; depth: share of the blocks that are left."""
        noise = [1 + chance.gauss(0, 0.01) for _ in range(6)]
        return [
            *perplexity(25.17 * math.exp(cost) * noise[0]),
            *perplexity(29.4 * math.exp(cost) * noise[0], "lm-eval"),
            *(item for batch, prompt in ((1, 256), (8, 256)) for item in latency(
                (0.2 + 0.8 * depth) * 160 * batch**0.8 * noise[1],
                (0.3 + 0.7 * depth) * 21 * batch**0.5 * noise[2],
                batch, prompt,
            )),
            *imdb(max(0.5, 0.86 - cost / 8) * noise[3]),
            *rouge(0.3 * math.exp(-cost / 4) * noise[4]),
            *generation(0.7 * math.exp(-cost / 3) * noise[5], min(1, max(0, cost / 4)), texts(), loops),
        ]  # fmt: skip

    rows = [
        row("original", [*size(SMALL), *everything(0, 1)]),
        row("control", [*size(SMALL), *everything(-0.06, 1)]),
    ]
    for kind in ("merged", "compressed"):
        for n in (4, 6, 8, 10):
            saved = (n - 1) * (BLOCK if kind == "compressed" else 4_722_432)
            depth = (12 - n + 1) / 12 if kind == "compressed" else 1
            for step, cost in (("rewritten", 0.35 * n), ("recovered", 0.05 * n)):
                factor = 1.3 if kind == "compressed" else 1
                made = [*size(SMALL - saved), *everything(cost * factor, depth, step == "rewritten" and n > 6)]
                rows.append(row(f"{kind}_{n}: {step}", made))
    for step, cost in (("pruned", 0.9), ("pruned-recovered", 0.35)):
        made = [*size(SMALL, non_zero=SMALL - 5 * BLOCK), *everything(cost, 1)]
        rows.append(row(f"compressed_6: {step}", made))
    gap = Gap("imdb", {}, "context=256 is more than the 128 positions that the model has")
    shorter = [item for item in everything(0.4, 0.5) if item.metric != "imdb_accuracy"]
    rows.append(row("distilgpt2", [*size(81_912_576, flops=161_000_000), *shorter], gap))
    metrics = ("size", "perplexity", "latency", "imdb", "rouge", "generation")
    return report(*rows, references=references(), metrics=tuple({"metric": name} for name in metrics))


# ---------------------------------------------------------------- stories


def search(n: int = 4, n_layer: int = 12, seed: int = 0, *, original: bool = False) -> Search:
    chance = random.Random(seed)
    blocks = 16
    found = []
    for start in range(n_layer - n + 1):
        level = 3.4 + 0.02 * (start - 4) ** 2
        dropped = start in (0, n_layer - n)
        nll = tuple(100 * (level + chance.gauss(0, 0.02)) for _ in range(4 if dropped else blocks))
        window = Window(start, n, start + (n - 1) // 2)
        behind = sum(nll) / len(nll) / 100 - 3.4
        found.append(Candidate((window,), nll, 100 * len(nll), dropped, max(0.0, behind), 0.01, abs(start - 4) == 1))
    winner = min(found, key=lambda item: item.behind)
    if original:
        found.append(Candidate((), (310.0,) * blocks, 100 * blocks, False, -0.3, 0.01))
    return Search("compressed_n", tuple(found), winner.windows)


def curves(steps: int = 100, seed: int = 0) -> tuple[Curve, ...]:
    chance = random.Random(seed)

    def curve(name: str, start: float, end: float) -> Curve:
        def loss(step: int) -> float:
            return end + (start - end) * math.exp(-step / 25)

        trained = tuple((step, loss(step) + chance.gauss(0, 0.04)) for step in range(1, steps + 1))
        return Curve(name, "lora", trained, tuple((step, loss(step)) for step in range(0, steps + 1, 20)), steps)

    return curve("recovered", 4.3, 3.4), curve("control", 3.3, 3.2)


def alignment(n_layer: int = 12, *, direct: int = 0, tensors: str = "") -> Alignment:
    chance = random.Random(1)

    def pair(anchor: int, layer: int) -> Pair:
        distance = abs(layer - anchor)
        return Pair(anchor, layer, 0.45 / distance**0.3 + chance.gauss(0, 0.02), 0.01 * chance.random(), 0.01)

    pairs = [pair(layer, layer + 1) for layer in range(n_layer - 1)]
    pairs += [pair(4, 4 + far) for far in range(2, direct)]
    return Alignment("correlation", n_layer, tuple(pairs), tensors)


def diagnosis() -> Diagnosis:
    """Of one projection."""
    counts = {"prototypes": 9, "empty_prototypes": 1, "constant_prototypes": 0, "dead_prototypes": 1}
    strengths = {"theta": 1.0, "alpha": 0.5, "beta": 0.4, "linear": False, "asymmetry": 0.1}
    own = Projection(0, "c_fc", "shared_8", features_per_token=3.5, dead_features=1, **counts, **strengths)
    return Diagnosis("rewritten", 100, (Bank("shared_8", 8, 4, 1, 1),), (own,))


def story(run: str = "", seed: int = 0, **changed: Any) -> Story:
    told = {
        "rewrites": ({"rewrite": "compressed_n", "n": 4, "start": 4},),
        "search": search(seed=seed),
        "curves": curves(seed=seed),
        "alignment": alignment(),
    }
    return Story(run, **{**told, **changed})
