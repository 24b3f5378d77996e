"""study attention: runs with small settings, goes on when it was cut, refuses what it cannot do, says what it found."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from conftest import forced, tree

from compressor.errors import UserError
from compressor.report.layout import make
from compressor.studies import STUDIES, run_measured
from compressor.studies.attention import study as attention
from compressor.studies.attention.figures import crossing
from compressor.studies.attention.study import AttentionSettings
from compressor.studies.measured import STATE, settings_of
from compressor.studies.outcome import Outcome, joined

STUDY = STUDIES["attention"]
SMALL = ["lengths=[16,24,40]", "knob_length=24", "repeats=2", "heads=2", "head_dim=8", "block=8", "slots=[1,4]",
         "landmarks=[2,4]", "features=[4,6]", "matrix_length=40", "norms=[2,6]", "correlations=[0.9]",
         "attention_types=[]"]  # fmt: skip
SCRATCH = ["attention_types=[vanilla,performer]", "block_size=16", "max_iters=2", "batch_size=2", "n_layer=1",
           "n_embd=8", "scratch_block=4"]  # fmt: skip
PICTURES = {"attention_time.png", "attention_memory.png", "attention_cache.png", "attention_knobs.png",
            "attention_likeness.png", "attention_error_by_cache.png", "attention_scratch.png"}  # fmt: skip


@pytest.fixture
def small(tiny_folder, text_file):
    return [*SMALL, f"model={tiny_folder}", f"data={text_file}", "layers=[1,5]"]


def test_command_line(run, tmp_path, small):
    answer = run("study", "attention", *small, *SCRATCH, "--run", tmp_path / "s", "--device", "cpu", "--json")
    assert answer.code == 0 and not answer.err, answer.err
    body, made = answer.json, tree(tmp_path / "s")
    trained = {"from_scratch", *(f"from_scratch/{name}.json" for name in ("vanilla", "performer", "seconds"))}
    assert set(made) == {"report.json", "report.md", "report.html", STATE, *PICTURES, *trained}
    assert [row["attention_type"] for row in body["from_scratch"]["rows"]] == ["vanilla", "performer"]
    assert all(made[name].startswith(b"\x89PNG") for name in PICTURES)
    names = {record["name"] for record in body["costs"]}
    every = 2 + 2 + 4 + 3 * 2 + 1
    assert len(names) == every and len(body["costs"]) == every + 2 * 9, "all at knob_length, the middle ones elsewhere"
    assert all(record["low_ms"] <= record["median_ms"] <= record["high_ms"] for record in body["costs"])
    heads = ["random, norm 2", "random, norm 6", "random, norm 6, correlation 0.9", "layer 1", "layer 5"]
    assert list(body["norms"]) == list(dict.fromkeys(record["heads"] for record in body["likeness"])) == heads
    errors = {(record["heads"], record["name"]): record["frobenius"] for record in body["likeness"]}
    assert all(math.isfinite(error) for error in errors.values())
    for place in heads:
        assert errors[place, "vanilla"] < 1e-5 and errors[place, "sdpa"] < 1e-5
        assert errors[place, "linformer slots=4"] < errors[place, "block alone"]
    text, stored = made["report.md"].decode(), json.loads(made["report.json"])
    assert stored["costs"] == body["costs"] and stored["provenance"]["base_hash"] and stored["settings"]["repeats"] == 2
    assert all(f"]({name})" in text for name in PICTURES) and "Against explicit T x T attention at 40 tokens" in text


def test_a_cut_one_goes_on(small, tmp_path, session, monkeypatch):
    table = make({"attention": ["a"]})
    monkeypatch.setattr(attention, "report_of", lambda measured: Outcome(measured.body(), (table,), (), ()))  # no plots
    real, calls = attention._matches, []

    def cut(settings, heads, *rest):
        calls.append(heads.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(settings, heads, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(attention, "_matches", cut)
        with pytest.raises(KeyboardInterrupt):
            run_measured(STUDY, tmp_path / "s", small, session)
    before = json.loads((tmp_path / "s" / STATE).read_text())["records"]
    assert list(before) == ["16 tokens", "24 tokens", "40 tokens", "random, norm 2"]
    for changed in ("repeats=3", "block=10"):
        with pytest.raises(UserError, match=f"was begun with another {changed.split('=')[0]};"):
            run_measured(STUDY, tmp_path / "s", [*small, changed], session)
    with pytest.raises(UserError, match="was begun with another seed;"):
        run_measured(STUDY, tmp_path / "s", small, dataclasses.replace(session, seed=1))
    counted = run_measured(STUDY, tmp_path / "s", small, session)
    assert json.loads((tmp_path / "s" / STATE).read_text())["records"].items() >= before.items(), "not measured again"

    def never(*given):
        raise ZeroDivisionError

    monkeypatch.setattr(attention, "_costs", never)
    monkeypatch.setattr(attention, "_matches", never)
    assert run_measured(STUDY, tmp_path / "s", small, session).body == counted.body, "all of it is kept"
    with pytest.raises(ZeroDivisionError):
        run_measured(STUDY, tmp_path / "s", small, forced(session))


def test_what_is_trained_is_checked_before_anything_is_measured(small, tmp_path, session):
    for changed, said in (("scratch_block=256", "block is 256; allowed: 1 to 255"), ("n_embd=63", "multiples of 2"),
                          ("attention_types=[softmax]", "softmax"), ("prompt=7", "prompt"),
                          ("attention_config={linformer_k: 7}", "linformer_k is 7")):  # fmt: skip
        with pytest.raises(UserError, match=said):
            run_measured(STUDY, tmp_path / "s", [*small, *SCRATCH[:1], changed], session)
    assert not (tmp_path / "s").exists()


def test_it_refuses_folders_of_other_things(small, tmp_path, session):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="exists already and is no attention"):
        run_measured(STUDY, tmp_path, small, session)
    assert set(tree(tmp_path)) == {"thesis.txt"}


def test_it_refuses_blocks_that_leave_nothing_to_compare(small, tmp_path, session):
    with pytest.raises(UserError, match="block is 40; allowed: 1 to 39, below matrix_length and the positions of"):
        run_measured(STUDY, tmp_path / "s", [*small, "block=40"], session)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("size=3", "unknown key of attention 'size'"),
        ("seed=3", "unknown key of attention 'seed'"),
        ("repeats=0", "repeats is 0; allowed: 1 or more"),
        ("repeats=many", "repeats is 'many'; allowed: a whole number"),
        ("lengths=[64,32]", r"lengths is \[64, 32\]; allowed: ascending whole numbers from 2"),
        ("lengths=[]", "allowed: ascending whole numbers from 2"),
        ("lengths=[32,64]", r"knob_length is 2048; allowed: one of lengths, \[32, 64\]"),
        ("slots=[1,65]", r"slots is \[1, 65\]; allowed: 1 to 64 \(block\)"),
        ("features=[3]", "allowed: even numbers"),
        ("norms=[0]", r"norms is \[0\]; allowed: different numbers above 0"),
        ("norms=[]", "allowed: one or more"),
        ("correlations=[1.0]", "allowed: different numbers between 0 and 1"),
        ("layers=[-1]", "layers is"),
    ],
)
def test_it_refuses_settings(given, said):
    with pytest.raises(UserError, match=said) as error:
        settings_of(STUDY, [given])
    assert "\n" not in str(error.value)


def test_defaults_are_allowed():
    assert settings_of(STUDY, []) == AttentionSettings()


def test_crossings_are_where_lines_cross():
    lengths = [256, 512, 1024, 2048]

    def line(factor, power):
        return [(length, factor * length**power) for length in lengths]

    at = crossing(line(30, 1), line(0.05, 2))
    assert at == pytest.approx(600)
    assert crossing(line(1, 2), line(1, 1)) is None and crossing(line(1, 1), line(1, 2)) == 256
    dips = [(256, 1.0), (512, 0.5), (1024, 2.0), (2048, 0.5)]
    assert crossing(dips, line(1, 0)) == pytest.approx(1024 * 2**0.5), "the last time that it gets below"


def test_parts_of_one_report_are_joined():
    one, two = Outcome({"a": 1}, ("t",), ("f",), ()), Outcome({"b": 2}, ("u",), (), ("p",))
    assert joined([one, two]) == Outcome({"a": 1, "b": 2}, ("t", "u"), ("f",), ("p",))
