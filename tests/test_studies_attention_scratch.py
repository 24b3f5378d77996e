"""The comparison from scratch: its losses, starts, curves, causality, resumption, what it refuses and what it says."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from itertools import pairwise
from statistics import median
from types import SimpleNamespace

import pytest
import torch
from conftest import make_text
from toy import toy_config, toy_gpt2

from compressor import data
from compressor.errors import UserError
from compressor.processes import Processes
from compressor.report import layout
from compressor.studies.attention import character_losses as losses
from compressor.studies.attention import character_models as models
from compressor.studies.attention import scratch
from compressor.studies.attention import scratch_report as told
from compressor.studies.attention import scratch_speed as speed
from compressor.studies.attention.character_models import TYPES, AttentionConfig
from compressor.studies.attention.characters import UNKNOWN, character_text, character_tokenizer
from compressor.studies.attention.scratch import Trained, from_scratch
from compressor.studies.attention.scratch_speed import Times

SMALL = {
    "block_size": 23,
    "max_iters": 12,
    "batch_size": 3,
    "learning_rate": 3e-3,
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 16,
    "block": 5,
    "attention_config": {"linformer_k": 10, "nystrom_landmarks": 3, "performer_features": 8},
    "device": "cpu",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("text") / "lines.txt"
    file.write_text(make_text(150), encoding="utf-8")
    return str(file)


@pytest.fixture(scope="module")
def compared(source):
    """The comparison of all types, and the trained models that it drops."""
    kept, measure = {}, scratch.row_nll
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scratch, "row_nll", lambda model, blocks: measure(kept.setdefault(len(kept), model), blocks))
        result = from_scratch(source, **SMALL)
    return result, dict(zip(TYPES, kept.values(), strict=True))


@pytest.fixture(scope="module")
def text(source):
    rows = {"training_rows": 48, "selection_rows": 300, "test_rows": 300}
    return character_text(source, block_size=SMALL["block_size"], seed=0, **rows)


def timeless(rows) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


# ---------------------------------------------------------------- characters


def test_every_character_is_a_token_and_comes_back():
    tokenizer = character_tokenizer("zebra\n a\tb\u00e9\U0001f600")
    assert len(tokenizer) == 1 + len(set("zebra\n a\tb\u00e9\U0001f600"))
    ids = tokenizer.encode("a\n b\U0001f600Q", add_special_tokens=False)
    order = [UNKNOWN, *sorted(set("zebra\n a\tb\u00e9\U0001f600"))]
    assert ids == [order.index(sign) for sign in "a\n b\U0001f600"] + [0]
    assert tokenizer.decode(ids[:-1], clean_up_tokenization_spaces=False) == "a\n b\U0001f600"


def test_rows_are_full_and_of_their_own_part(source, text):
    for part in ("training", "selection", "test"):
        blocks, whole = getattr(text, part), data.recipe_text(source, part).joined
        assert blocks.mask.all() and blocks.ids.shape[1] == 23
        known = set(data.recipe_text(source, "training").joined)
        whole = "".join(sign if sign in known else UNKNOWN for sign in whole)
        alphabet = [UNKNOWN, *sorted(known)]
        places = [whole.find("".join(alphabet[token] for token in row)) for row in blocks.ids.tolist()]
        assert min(places) >= 0
        assert all(later - earlier >= 23 for earlier, later in pairwise(places)), "they overlap"
    assert len(text.training.ids) == 48
    assert len(text.test.ids) == len(data.recipe_text(source, "test").joined) // 23 < 300
    assert not data.overlap(text.origin["training"], text.origin["test"])
    assert not data.overlap(text.origin["selection"], text.origin["test"])


def test_what_counts_alone_give(text):
    size = len(text.tokenizer)
    single, pairs = Counter(text.training.ids.flatten().tolist()), Counter()
    for row in text.training.ids.tolist():
        pairs.update(pairwise(row))
    first = Counter()
    for (before, _), often in pairs.items():
        first[before] += often
    wanted = [pair for row in text.test.ids.tolist() for pair in pairwise(row)]
    total = text.training.ids.numel() + size
    alone = [-math.log((single[after] + 1) / total) for _, after in wanted]
    after_one = [-math.log((pairs[pair] + 1) / (first[pair[0]] + size)) for pair in wanted]
    found = losses.counted_nll(text.training, text.test, size)
    assert found["single characters"] == pytest.approx(sum(alone) / len(alone))
    assert found["pairs of characters"] == pytest.approx(sum(after_one) / len(after_one))


# ---------------------------------------------------------------- models


def kinds(config, **knobs):
    return models.rewrites_of(TYPES, AttentionConfig(**knobs), 5, config, 0)


def test_all_start_from_the_same_weights():
    config = toy_config(n_positions=23)
    start = models.initial(config, 3)
    again = models.initial(config, 3)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in start.state_dict().items())
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    for name, rewrite in kinds(config)[1].items():
        model = models.variant(start, config, rewrite)
        own = model.state_dict()
        assert all(torch.equal(value, own[key]) for key, value in start.state_dict().items()), name
        more = own.keys() - start.state_dict().keys()
        assert all(".scores." in key for key in more)
        assert bool(more) == (name in ("linformer", "performer"))
        assert model.transformer.wte.weight.data_ptr() != start.transformer.wte.weight.data_ptr(), "trained apart"
        short = torch.randint(0, config.vocab_size, (2, 5))  # one block: exact attention in all
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(short).logits, start.eval()(short).logits, atol=1e-5, rtol=0)
    torch.manual_seed(5)
    models.initial(config, 3)
    assert torch.equal(torch.rand(1), expected), "the caller's random numbers are its own"


def test_the_sources_knobs():
    config = toy_config(n_positions=512, n_embd=64, n_head=2)
    own, made = models.rewrites_of(TYPES, AttentionConfig(), 32, config, 4)
    assert own == AttentionConfig(linformer_k=128, nystrom_landmarks=32, performer_features=64), "those of the source"
    assert made["linformer"].slots == 8, "128 summaries of 16 blocks"
    assert made["performer"].seed == 4 and made["performer"].feature_map == "favor+"
    own, made = kinds(toy_config(n_positions=23), linformer_k=20, inverse="newton", feature_map="elu")
    assert (made["linformer"].slots, made["nystrom"].inverse) == (4, "newton")
    assert (made["performer"].feature_map, own.performer_features) == ("elu", 8), "as many as a head is wide"


# ---------------------------------------------------------------- the comparison


def test_the_test_loss_is_that_of_a_loop_over_characters(compared, text):
    result, trained = compared
    for row in result.body["from_scratch"]["rows"]:
        model, found = trained[row["attention_type"]].eval(), []
        for ids in text.test.ids[:3]:
            own = []
            for place in range(1, len(ids)):
                with torch.no_grad():
                    own.append(-model(ids[None, :place]).logits[0, -1].log_softmax(0)[ids[place]].item())
            found.append(sum(own) / len(own))
        assert row["test_rows"][:3] == pytest.approx(found, abs=2e-5)
        assert row["test_count"] == text.test.ids[:, 1:].numel()
        assert Trained(**row).test == pytest.approx(sum(row["test_rows"]) / len(row["test_rows"]))


def test_they_learn_and_differ(compared):
    rows = compared[0].body["from_scratch"]["rows"]
    assert [row["attention_type"] for row in rows] == list(TYPES)
    for row in rows:
        assert [step for step, _ in row["steps"]] == list(range(1, 13))
        assert [step for step, _ in row["evaluations"]] == list(range(13))
        assert min(loss for _, loss in row["evaluations"]) < row["evaluations"][0][1] - 0.1
        assert UNKNOWN not in row["sample"] and len(row["sample"]) == 23 - 11
    assert len({tuple(row["test_rows"]) for row in rows}) == 4
    assert rows[1]["parameters"] == rows[0]["parameters"] + 2 * (2 * 2 * 5 + 2), "E, F and log-mass of both layers"
    assert rows[2]["parameters"] == rows[3]["parameters"] == rows[0]["parameters"]


def test_trained_models_do_not_see_the_future(compared):
    result, trained = compared
    assert all(row["leak"] < 1e-5 for row in result.body["from_scratch"]["rows"])
    ids = torch.randint(1, 20, (1, 23))
    for name, model in trained.items():
        with torch.no_grad():
            before = model.eval()(ids).logits
            for place in range(1, 23):
                other = ids.clone()
                other[0, place:] = torch.randint(1, 20, (23 - place,))
                torch.testing.assert_close(
                    model(other).logits[:, :place], before[:, :place], atol=1e-5, rtol=0, msg=name
                )


def test_a_leak_is_found():
    model = toy_gpt2(n_layer=2)
    assert losses.leak(model, torch.arange(1, 20)[None]) < 1e-5
    model.transformer.h[0].register_forward_hook(lambda module, given, output: output + 0.1 * output.flip(1))
    assert losses.leak(model, torch.arange(1, 20)[None]) > 1e-2


def test_the_same_seed_gives_the_same_curve(compared, source):
    first = compared[0].body["from_scratch"]["rows"][3]
    (again,) = from_scratch(source, **SMALL, attention_types=["performer"]).body["from_scratch"]["rows"]
    assert timeless([again]) == timeless([first])
    (other,) = from_scratch(source, **SMALL, attention_types=["performer"], seed=1).body["from_scratch"]["rows"]
    assert other["steps"] != first["steps"]


def test_a_killed_comparison_goes_on(compared, source, tmp_path):
    class Killed(Exception):
        pass

    def kill(name, step):
        if (name, step.step) == ("nystrom", 7):
            raise Killed

    with pytest.raises(Killed):
        from_scratch(source, **SMALL, state=tmp_path, progress=kill)
    seen = []
    result = from_scratch(source, **SMALL, state=tmp_path, progress=lambda name, step: seen.append((name, step.step)))
    assert seen[0] == ("nystrom", 7), "what was done is not done again"
    assert timeless(result.body["from_scratch"]["rows"]) == timeless(compared[0].body["from_scratch"]["rows"])
    assert {file.name for file in tmp_path.iterdir()} == {f"{name}.json" for name in (*TYPES, "seconds")}
    before = [file.read_bytes() for file in sorted(tmp_path.iterdir())]
    again = from_scratch(source, **SMALL, state=tmp_path, progress=lambda *_: pytest.fail("nothing is left to train"))
    assert again.body == result.body and again.tables == result.tables and again.findings == result.findings
    assert [file.read_bytes() for file in sorted(tmp_path.iterdir())] == before
    with pytest.raises(UserError, match=r"learning_rate=0\.003, now it is 0\.01") as error:
        from_scratch(source, **{**SMALL, "learning_rate": 0.01}, state=tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"attention_types": ["vanilla", "reformer"]}, "'reformer'"),
        ({"attention_types": []}, "attention_types"),
        ({"attention_types": "vanilla"}, "attention_types"),
        ({"attention_types": ["vanilla", "vanilla"]}, "attention_types"),
        ({"block_size": 1}, "block_size"),
        ({"max_iters": 0}, "max_iters"),
        ({"batch_size": 2.5}, "batch_size"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"n_head": 3}, "n_embd"),
        ({"seed": -1}, "seed"),
        ({"block": 0}, "block"),
        ({"block": 23}, "1 to 22"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": 23 * "a"}, "1 to 22"),
        ({"attention_config": {"linformer": 4}}, "'linformer'"),
        ({"attention_config": {"linformer_k": 7}}, "multiples of 5"),
        ({"attention_config": {"linformer_k": 30}}, "up to 25"),
        ({"attention_config": {"linformer_k": 0}}, "multiples of 5"),
        ({"attention_config": {"nystrom_landmarks": 0}}, "landmarks"),
        ({"attention_config": {"performer_features": "many"}}, "performer_features"),
        ({"attention_config": {"feature_map": "softmax"}}, "feature_map"),
        ({"attention_config": {"feature_map": "favor_hyp", "performer_features": 7}}, "pairs"),
        ({"block_size": 5000, "attention_config": {}}, "5000 \\(block_size\\)"),
        ({"device": "abacus"}, "abacus"),
    ],
)  # fmt: skip
def test_what_is_not_allowed_is_said_in_one_line(source, given, words):
    with pytest.raises(UserError, match=words) as error:
        from_scratch(source, **{**SMALL, **given})
    assert "\n" not in str(error.value)


def test_it_runs_in_one_process(source, monkeypatch):
    monkeypatch.setattr(scratch, "processes", lambda: Processes(rank=0, world=2))
    with pytest.raises(UserError, match="one process"):
        from_scratch(source, **SMALL)


# ---------------------------------------------------------------- what is said


def planted(name: str, rows: list[float], **changes) -> Trained:
    fields = {
        "attention_type": name, "parameters": 1000, "steps": [[1, 4.0], [2, 3.0]], "best": 2,
        "evaluations": [[0, 4.1], [2, 3.1]], "test_rows": rows, "test_count": 22 * len(rows), "seconds": 2.0,
        "leak": 0.0, "sample": "abc", "how": {"autocast": "bfloat16", "attention": "eager", "device": "cpu",
        "threads": 1},
    }  # fmt: skip
    return Trained(**{**fields, **changes})


def settings(**changes):
    return {**SMALL, "seed": 0, "vocabulary": 20, "test_characters": 88, "attention_config":
            dataclasses.asdict(AttentionConfig(linformer_k=10, performer_features=8)), **changes}  # fmt: skip


COUNTS = {"single characters": 2.9, "pairs of characters": 2.5}
VANILLA = planted("vanilla", [2.0, 2.2, 1.8, 2.0])
TIMES = Times({"vanilla": [1.0, 4.0, 2.0], "linformer": [0.5, 2.0, 0.8], "nystrom": [2.0, 8.0, 5.0],
               "performer": [0.8, 3.0, 2.1]})  # fmt: skip


def test_gaps_are_paired_by_row():
    gap, half = told.behind(planted("linformer", [2.1, 2.3, 1.9, 2.1]), VANILLA)
    assert gap == pytest.approx(0.1) and half == pytest.approx(0, abs=1e-9), "rows differ, their differences do not"
    gap, half = told.behind(planted("linformer", [2.1, 2.2, 1.9, 2.4]), VANILLA)
    differences = torch.tensor([0.1, 0.0, 0.1, 0.4], dtype=torch.float64)
    assert gap == pytest.approx(0.15) and half == pytest.approx(1.96 * float(differences.std()) / 2)


def test_times_are_compared_within_a_round():
    assert (TIMES.count, TIMES.median("vanilla")) == (3, 2.0)
    assert TIMES.ratios("performer", "vanilla") == pytest.approx([0.75, 0.8, 1.05])
    assert TIMES.ratios("linformer", "vanilla") == pytest.approx([0.4, 0.5, 0.5])


def test_types_take_turns(monkeypatch, text):
    order = []

    def once(model, blocks, evaluation, **settings):
        order.append((model, settings["steps"], settings["batch_tokens"]))
        return SimpleNamespace(training_seconds=float(len(order)))

    monkeypatch.setattr(speed, "finetune", once)
    times = speed.in_turns({"a": "A", "b": "B"}, text.training, batch_tokens=69, rounds=3)
    assert [model for model, _, _ in order] == ["B", "A", "A", "B", "B", "A", "A", "B"]
    assert all(rest == [1, 69] for _, *rest in order)
    assert times.rounds == {"a": [3.0, 6.0, 7.0], "b": [4.0, 5.0, 8.0]}, "the first of each is not counted"


def test_findings_tell_quality_speed_and_both():
    worse = planted("linformer", [2.1, 2.3, 1.9, 2.1], parameters=1044)
    same = planted("nystrom", [2.1, 2.1, 1.9, 1.9])
    good = planted("performer", [1.9, 2.2, 1.8, 2.0])
    made = [VANILLA, worse, same, good]
    first, quality, fast, size, causal = told.findings(made, TIMES, settings(), COUNTS)
    assert "vanilla has 2.000 nats (2.885 bits)" in first and first.endswith(
        "counts of single characters 2.900 and pairs of characters 2.500."
    )
    assert "linformer +0.100" in quality and quality.endswith("tell: nystrom, performer.")
    assert "takes vanilla 2000 ms" in fast and "linformer 0.50, nystrom 2.00, performer 0.80" in fast
    assert fast.endswith("Faster in every round: linformer; faster and no worse: none.")
    assert "linformer +44, nystrom +0" in size
    assert "at all" in causal
    quick = Times({**TIMES.rounds, "performer": [0.8, 3.0, 1.9]})
    *_, fast, _, causal = told.findings([VANILLA, dataclasses.replace(good, leak=0.3)], quick, settings(), COUNTS)
    assert fast.endswith("Faster in every round: performer; faster and no worse: performer.")
    assert causal == "Sees the future: performer (a logit moves by 3.0e-01)."


def test_what_has_hardly_learned_is_named():
    slow = planted("nystrom", [2.45, 2.45, 2.5, 2.4])
    _, short, *_ = told.findings([VANILLA, slow], TIMES, settings(), COUNTS)
    assert short.startswith("No more than 0.1 nats better than counts of pairs: nystrom. ")


def test_a_lower_loss_is_not_called_a_better_attention():
    low = planted("performer", [1.7, 1.9, 1.5, 1.71])
    _, quality, lower, *_ = told.findings([VANILLA, low], TIMES, settings(), COUNTS)
    assert quality.endswith("tell: performer.")
    assert lower.startswith("Lower than vanilla's: performer, with the same iterations")


def test_without_vanilla_nothing_is_compared():
    alone = [planted("performer", [2.0, 2.1])]
    assert len(list(told.findings(alone, TIMES, settings(), COUNTS))) == 2
    assert told.tables(alone, TIMES, settings(), COUNTS)[0].body[0][3] == "-"
    (picture,) = told.pictures(alone, TIMES)
    assert len(picture.figure.axes) == 2


def test_table_curves_and_samples(compared):
    result, _ = compared
    rows = result.body["from_scratch"]["rows"]
    json.dumps(result.body, allow_nan=False)
    main, chosen = result.tables
    assert [line[0] for line in main.body] == [*TYPES, "counts of single characters", "counts of pairs of characters"]
    assert main.apart == 2
    for line, row in zip(main.body, rows, strict=False):
        loss = sum(row["test_rows"]) / len(row["test_rows"])
        assert (line[1], line[2]) == (f"{loss:.4f}", f"{loss / math.log(2):.4f}")
    assert dict(chosen.body)["linformer_k"] == "10" and "None" not in layout.plain(chosen)
    (picture,) = result.pictures
    by_iteration, by_time, above = picture.figure.axes
    for line, row in zip(by_iteration.lines[1::2], rows, strict=True):
        assert line.get_xydata().tolist() == row["evaluations"] and line.get_label() == row["attention_type"]
    for line, row in zip(by_time.lines, rows, strict=True):
        assert line.get_xdata()[-1] == pytest.approx(
            12 * median(result.body["from_scratch"]["seconds"][row["attention_type"]])
        )
    gaps = [own[1] - base[1] for own, base in zip(rows[3]["evaluations"], rows[0]["evaluations"], strict=True)]
    assert above.lines[3].get_ydata().tolist() == pytest.approx(gaps)
    (prompt,) = result.prompts
    assert prompt.prompt == result.body["from_scratch"]["settings"]["prompt"] and len(prompt.prompt) == 11
    assert [(one.model, one.text) for one in prompt.samples] == [(row["attention_type"], row["sample"]) for row in rows]
