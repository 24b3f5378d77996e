"""Diagnoses of Tversky projections: planted dead features and prototypes, and everything against brute force."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import make_text
from toy import toy_alignment, toy_blocks, toy_gpt2, toy_tokenizer

from compressor import gpt2, pipeline
from compressor.modeling.tversky import TverskyProjection
from compressor.modeling.tversky_layers import projection_at
from compressor.recipe import Align, Finetune
from compressor.rewrites import REWRITES, Rewrite, from_record
from compressor.rewrites.compose import apply
from compressor.steps.diagnose import diagnostics

ALL = ["q", "k", "v", "attn_out", "c_fc", "mlp_out", "lm_head"]
LOOSE = {"antipodal": False, "init": "random", "difference": "ignorematch", "alpha": 0.7, "beta": 0.2}
HEAD = (None, "lm_head")


@pytest.fixture(scope="module")
def text():
    return toy_blocks(toy_gpt2(n_layer=2).config, rows=3)


def made(text, **settings):
    """A rewritten toy model of two layers, and its rewrite."""
    original = toy_gpt2(n_layer=2)
    rewrite = from_record({"rewrite": "tversky", **settings})
    return apply([rewrite], original, toy_alignment(original), calibration=text), rewrite


def inputs(model, rewrite, text, monkeypatch):
    """(layer, target) -> float64[tokens, in]: what each projection is called with in an ordinary forward."""
    seen = {}
    wheres = {id(projection_at(model, *where)): where for where in rewrite.places(model)}
    measure, compare = TverskyProjection.measure, TverskyProjection.compare
    last = {}

    def measured(self, x, bank):
        z = measure(self, x, bank)
        last[id(bank)] = x
        return z

    def compared(self, z, bank, prototypes=None):
        seen[wheres[id(self)]] = last[id(bank)][text.mask].double()
        return compare(self, z, bank, prototypes)

    monkeypatch.setattr(TverskyProjection, "measure", measured)
    monkeypatch.setattr(TverskyProjection, "compare", compared)
    with torch.no_grad():
        model(text.ids)
    monkeypatch.undo()
    return seen


def naive(rewrite, z, u, theta, alpha, beta):
    """S [objects, prototypes] of z and u with every feature of an antipodal bank spelled out; product or ignorematch
    differences."""
    if rewrite.antipodal:
        z, u = np.concatenate([z, -z], 1), np.concatenate([u, -u], 1)
    z, u = z[:, None, :], u[None, :, :]
    common = np.maximum(z, 0) * np.maximum(u, 0)
    if rewrite.difference == "product":
        only_x, only_p = np.maximum(z, 0) * np.maximum(-u, 0), np.maximum(-z, 0) * np.maximum(u, 0)
    else:
        only_x, only_p = np.maximum(z, 0) * (u <= 0), np.maximum(u, 0) * (z <= 0)
    return (theta * common - alpha * only_x - beta * only_p).sum(-1)


CASES = {
    "loose, all targets": {"targets": ALL, "bank_size": 12, **LOOSE},
    "antipodal": {"targets": ["q", "v", "c_fc"], "share": "layer", "bank_size": 10},
    "explicit, shared scalars": {
        **LOOSE, "targets": ["k", "c_fc"], "prototypes": "explicit", "share_scalars": True, "normalize": True,
        "bank_size": 5,
    },
    "mlp_block": {**LOOSE, "targets": ["mlp_block"], "difference": "product", "bank_size": 40, "share": "none"},
}  # fmt: skip


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_against_brute_force(text, settings, monkeypatch):
    model, rewrite = made(text, **settings)
    found = rewrite.diagnose(model, text.batches(64))
    seen, places = inputs(model, rewrite, text, monkeypatch), rewrite.places(model)
    assert found["tokens"] == text.tokens and found["feature_key"] == "features"
    assert [(row["layer"], row["target"]) for row in found["projections"]] == list(places) == list(seen)
    used = {}
    for row, (where, place) in zip(found["projections"], places.items(), strict=True):
        projection, bank = projection_at(model, *where), gpt2.feature_bank(model)[place.key]
        features, x = bank.weight.detach().double().numpy(), seen[where].numpy()
        if rewrite.normalize:
            x = x / np.linalg.norm(x, axis=1, keepdims=True)
        z = x @ features.T
        own = gpt2.head(model).weight if where == HEAD else projection.prototypes
        u = own.detach().double().numpy()
        if rewrite.normalize:
            u = u / np.linalg.norm(u, axis=1, keepdims=True)
        if rewrite.prototypes == "explicit" or where == HEAD:
            u = u @ features.T
        has = np.concatenate([z > 0, z < 0], 1) if rewrite.antipodal else z > 0
        used.setdefault(place.key, []).append(has)
        assert row["bank"] == place.key
        assert row["features_per_token"] == pytest.approx(has.sum(1).mean(), rel=1e-6)
        assert row["dead_features"] == (~has.any(0)).sum()
        assert row["prototypes"] == len(u)
        empty = ~(u > 0).any(1) & ~((u < 0).any(1) & rewrite.antipodal)
        assert row["empty_prototypes"] == empty.sum()
        scalars = (row["theta"], row["alpha"], row["beta"])
        assert scalars == pytest.approx((1.0, rewrite.alpha, rewrite.beta))
        similarity = naive(rewrite, z, u, *scalars)
        constant = np.ptp(similarity, 0) < 1e-9
        assert row["constant_prototypes"] == constant.sum()
        assert row["dead_prototypes"] == (empty | constant).sum()
        assert row["linear"] is (rewrite.antipodal and rewrite.difference == "product")
        sample = np.round(np.linspace(0, len(u) - 1, min(64, len(u)))).astype(int)
        pairs = naive(rewrite, u[sample], u[sample], *scalars)
        off = ~np.eye(len(sample), dtype=bool)
        expected = np.abs(pairs - pairs.T)[off].mean() / np.abs(pairs)[off].mean()
        assert row["asymmetry"] == pytest.approx(expected, abs=1e-5)
        assert (row["asymmetry"] > 0.01) is (not rewrite.antipodal)
    for bank in found["banks"]:
        together = np.concatenate(used[bank["key"]])
        assert (bank["features"], bank["projections"]) == (together.shape[1], len(used[bank["key"]]))
        assert bank["dead_features"] == (~together.any(0)).sum()
    assert [bank["key"] for bank in found["banks"]] == list(used)


def test_planted_dead_features_and_prototypes_are_counted(text):
    model, rewrite = made(text, targets=["q", "c_fc", "attn_out"], share="none", bank_size=12, **LOOSE)

    def rows():
        return {(row["layer"], row["target"]): row for row in rewrite.diagnose(model, text.batches())["projections"]}

    before = rows()
    with torch.no_grad():
        gpt2.feature_bank(model)[rewrite.places(model)[0, "q"].key].weight[3:5] = 0
        prototypes = projection_at(model, 1, "c_fc").prototypes
        prototypes[7:10] = -prototypes[7:10].abs()  # no feature left
        same = projection_at(model, 0, "attn_out").scalars
        for name in ("theta", "alpha", "beta"):
            getattr(same, name).zero_()
    after = rows()

    def more(where, what):  # what comes after a plant gets other inputs: each is looked at where it stands
        return after[where][what] - before[where][what]

    assert before[0, "q"]["dead_features"] == 0 and more((0, "q"), "dead_features") == 2
    assert more((1, "c_fc"), "empty_prototypes") == more((1, "c_fc"), "dead_prototypes") == 3
    assert more((0, "attn_out"), "dead_prototypes") == more((0, "attn_out"), "constant_prototypes") == 32
    assert after[0, "attn_out"]["empty_prototypes"] == 0 and after[0, "attn_out"]["asymmetry"] is None


def test_a_feature_that_one_of_two_layers_uses_is_not_dead_in_the_bank(text):
    model, rewrite = made(text, targets=["c_fc"], bank_size=12, **LOOSE)
    bank = gpt2.feature_bank(model)["features_32"].weight
    with torch.no_grad():  # the first layer's inputs lie along the last feature and away from the first
        first, second = (model.transformer.h[layer].ln_2 for layer in (0, 1))
        for norm, sign in ((first, -1.0), (second, 1.0)):
            norm.weight.zero_()
            norm.bias.copy_(sign * torch.nn.functional.one_hot(torch.tensor(0), 32))
        bank.zero_()
        bank[0, 0], bank[1, 0] = 1.0, -1.0
    found = rewrite.diagnose(model, text.batches())
    assert [row["dead_features"] for row in found["projections"]] == [11, 11]
    assert [row["dead_features"] for row in found["banks"]] == [10]
    assert [row["constant_prototypes"] for row in found["projections"]] == [128, 128]  # all inputs are one


def test_symmetry_needs_an_antipodal_bank_of_products_or_equal_alpha_and_beta(text):
    def asymmetry(**settings):
        model, rewrite = made(text, targets=["attn_out"], bank_size=8, **settings)
        return [row["asymmetry"] for row in rewrite.diagnose(model, text.batches())["projections"]]

    assert max(asymmetry(init="random", alpha=0.9, beta=0.1)) < 1e-6
    assert max(asymmetry(antipodal=False, init="random", alpha=0.5, beta=0.5, difference="ignorematch")) < 1e-6
    assert min(asymmetry(antipodal=False, init="random", alpha=0.9, beta=0.1, difference="ignorematch")) > 0.1


def test_strengths_are_those_after_the_softplus_and_linearity_ends_with_training(text):
    model, rewrite = made(text, targets=["c_fc"], bank_size=8, non_negative=True)
    first = projection_at(model, 0, "c_fc").scalars
    with torch.no_grad():
        first.theta.fill_(0.0)
    one, two = rewrite.diagnose(model, text.batches())["projections"]
    assert one["theta"] == pytest.approx(np.log(2)) and one["linear"] is False
    assert (two["theta"], two["alpha"], two["beta"]) == pytest.approx((1.0, 0.5, 0.5)) and two["linear"] is True


def test_hooks_and_modes_are_as_before(text):
    model, rewrite = made(text, targets=ALL, bank_size=8)
    model.train()

    def hooks():
        return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())

    before = hooks()
    rewrite.diagnose(model, text.batches())
    assert hooks() == before and model.training
    with pytest.raises(ZeroDivisionError):
        rewrite.diagnose(model, (1 / 0 for _ in "x"))
    assert hooks() == before and model.training


# ---------------------------------------------------------------- where a model is written


def test_rewrites_without_diagnoses_ask_for_no_text():
    def never():
        raise AssertionError

    model = toy_gpt2(n_layer=2)
    rewrites = [found for kind in REWRITES.values() if (found := kind.neutral(model.config)) is not None]
    plain = [item for item in rewrites if type(item).diagnose is Rewrite.diagnose]
    assert len(plain) >= 4 and diagnostics(plain, model, toy_tokenizer(), never, pytest.fail) == {}


def test_reports_of_the_rewrite_and_the_recovery_have_them(tmp_path, tiny_folder, session, notices):
    text = tmp_path / "text.txt"
    text.write_text(make_text(400))
    run = tmp_path / "run"
    pipeline.align(run, str(tiny_folder), str(text), Align(max_tokens=300), session)
    rewrites = [
        from_record({"rewrite": "tversky", "layers": [1, 2], "bank_size": 0.5}),
        from_record({"rewrite": "soft_shared", "n": 2, "start": 4, "rank": 2}),
        from_record({"rewrite": "tversky", "targets": ["v"], "feature_key": "values", "share": "layer"}),
    ]
    pipeline.rewrite(run, rewrites, session)
    stored = json.loads((run / "rewritten" / "report.json").read_text())["diagnostics"]
    assert [(item["rewrite"], item["feature_key"], len(item["banks"])) for item in stored] == [
        ("tversky", "features", 1), ("tversky", "values", 6),
    ]  # fmt: skip
    assert all(row["linear"] for item in stored for row in item["projections"]) and stored[0]["tokens"] <= 8192
    settings = Finetune(steps=2, batch_tokens=128, context=32, selection_tokens=128, control=True, learning_rate=1e-2)
    pipeline.finetune(run, settings, session)
    after = json.loads((run / "recovered" / "report.json").read_text())["diagnostics"]
    assert after[0]["tokens"] == stored[0]["tokens"] and after[0]["banks"] == stored[0]["banks"]
    assert all(
        new["theta"] != old["theta"] and not new["linear"]
        for item, before in zip(after, stored, strict=True)
        for new, old in zip(item["projections"], before["projections"], strict=True)
    )
    assert "diagnostics" not in json.loads((run / "control" / "report.json").read_text())
    assert not any("diagnostics" in note for note in notices)
    # the text goes while the model trains: its recovery stays
    recovered = diagnostics_without_text(run, text, session, settings)
    assert "diagnostics" not in recovered and "recovery" in recovered
    assert any(note.startswith("warning: no diagnostics: ") for note in notices)


def diagnostics_without_text(run, text, session, settings):
    other = text.with_name("other.txt")
    other.write_text(make_text(400, seed=5))
    text.write_text(make_text(300, seed=6))
    again = dataclasses.replace(session, force=True)
    pipeline.finetune(run, dataclasses.replace(settings, control=False), again, source=str(other))
    return json.loads((run / "recovered" / "report.json").read_text())
