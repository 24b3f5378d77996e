"""The rewrite as a whole: what it makes, counts, trains, folds and refuses; its fits have files of their own."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from toy import toy_alignment, toy_blocks, toy_config, toy_gpt2
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from compressor import models
from compressor.errors import UserError
from compressor.metrics.size import parameters
from compressor.modeling import GPT2CompressedLMHeadModel
from compressor.modeling.tversky_layers import TARGETS, projection_at
from compressor.rewrites import from_record
from compressor.rewrites.compose import apply, check, structure
from compressor.rewrites.dropped_n import DroppedN
from compressor.rewrites.soft_shared import SoftShared
from compressor.rewrites.tversky import Tversky
from compressor.training_loss import TokenObjective

LINEARS = ["q", "k", "v", "attn_out", "c_fc", "mlp_out"]
ALL = [*LINEARS, "lm_head"]


@pytest.fixture(scope="module")
def original():
    return toy_gpt2(n_layer=4, n_embd=16, n_head=2)


@pytest.fixture(scope="module")
def alignment(original):
    return toy_alignment(original)


@pytest.fixture(scope="module")
def ids(original):
    return torch.randint(1, original.config.vocab_size, (3, 20), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def make(original, alignment):
    def build(*rewrites):
        rewrites = [
            item if not isinstance(item, dict) else from_record({"rewrite": "tversky", **item}) for item in rewrites
        ]
        rewrites = [item.resolved(original.config) for item in rewrites]
        made = apply(rewrites, original, alignment, calibration=toy_blocks(original.config, rows=8))
        return copy.deepcopy(made)  # tensors that no rewrite touched are the original's own

    return build


def _logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def _apart(one, other, ids):
    return (_logits(one, ids) - _logits(other, ids)).abs().max()


# ---------------------------------------------------------------- exact


@pytest.mark.parametrize("prototypes", ["features", "explicit"])
@pytest.mark.parametrize("targets", [[target] for target in ALL] + [ALL], ids="-".join)
def test_as_many_features_as_inputs_change_nothing(make, original, ids, targets, prototypes):
    for share in ("none", "layer", "global", "window"):
        more = {"n": 2} if share == "window" and targets != ["lm_head"] else {}
        if share == "window" and not more:
            continue
        model = make({"targets": targets, "share": share, "prototypes": prototypes, **more})
        assert _apart(model, original, ids) <= 1e-4
        with torch.no_grad():  # and the projections are what is run
            for parameter in model.transformer.feature_bank.parameters():
                parameter.zero_()
        assert _apart(model, original, ids) > 1e-2


@pytest.mark.parametrize(
    "scalars", [{"gamma": 2.0, "alpha": 1.5, "beta": 0.5}, {"theta": 0.5, "alpha": 0.5, "beta": 0.0}]
)
def test_any_scalars_with_theta_the_sum_of_the_others_are_exact(make, original, ids, scalars):
    for more in (
        {},
        {"share_scalars": True},
        {"learn_scalars": False},
        {"non_negative": True, "prototypes": "explicit"},
    ):
        assert _apart(make({"targets": LINEARS, **scalars, **more}), original, ids) <= 1e-4


def test_no_text_is_needed_where_nothing_is_left_out(original, alignment, ids):
    model = apply([Tversky(targets=ALL, share="layer")], original, alignment)
    assert _apart(model, original, ids) <= 1e-4
    with pytest.raises(UserError, match="calibration"):
        apply([Tversky(bank_size=0.5)], original, alignment)


def test_a_window_and_layers_leave_the_others_alone(make, original):
    for fields, layers in (({"share": "window", "n": 2, "start": 1}, [1, 2]), ({"layers": [3, 0]}, [0, 3])):
        state = make({"targets": LINEARS, "bank_size": 0.5, **fields}).state_dict()
        for layer in set(range(4)) - set(layers):
            for key, tensor in original.transformer.h[layer].state_dict().items():
                assert torch.equal(state[f"transformer.h.{layer}.{key}"], tensor)
        assert not any(f"transformer.h.{layer}.mlp.c_fc.weight" in state for layer in layers)


# ---------------------------------------------------------------- what is shared, and how much it is


def _banks(model):
    return {key: tuple(bank.weight.shape) for key, bank in model.transformer.feature_bank.items()}


def test_banks_are_as_many_as_share_says(original):
    def banks(**fields):
        return _banks(models.build(structure([Tversky(targets=["q", "c_fc", "mlp_out"], **fields)], original.config)))

    assert banks() == {"features_16": (16, 16), "features_64": (64, 64)}
    assert banks(share="layer", feature_key="own", bank_size=3).keys() == {
        f"own_{d}_{i}" for d in (16, 64) for i in range(4)
    }
    assert len(banks(share="none")) == 12
    assert banks(share="window", n=2, bank_size=0.5) == {
        f"features_{d}_{i}": (d // 2, d) for d in (16, 64) for i in range(2)
    }
    assert banks(share="window", n=3).keys() == {"features_16_0", "features_64_0"}  # layer 3 stays
    assert banks(share="window", n=3, start=1).keys() == {"features_16_0", "features_64_0"}


@pytest.mark.parametrize(("size", "millions"), [(768, 0.59), (512, -9.04), (384, -13.86), (256, -18.68)])
def test_counts_of_one_bank_for_the_12_c_fc_of_gpt2(size, millions):
    base = GPT2Config()
    rewrite = Tversky(bank_size=size)
    rewrite.check(base)
    change = parameters(models.build(structure([rewrite], base))) - 124_439_808
    assert change == 12 * 3072 * (size - 768) + size * 768 + 12 * 3
    assert round(change / 1e6, 2) == millions


@pytest.mark.parametrize(
    ("fields", "change"),
    [
        ({"targets": ["c_fc"], "prototypes": "explicit", "bank_size": 4}, 4 * 16 + 4 * 3),
        ({"targets": ["c_fc"], "bank_size": 4, "share_scalars": True}, 4 * 64 * (4 - 16) + 4 * 16 + 3),
        ({"targets": ["c_fc"], "bank_size": 4, "learn_scalars": False}, 4 * 64 * (4 - 16) + 4 * 16),
        ({"targets": ["q", "k", "v"], "bank_size": 4, "share": "layer"}, 4 * (3 * 16 * (4 - 16) + 4 * 16 + 3 * 3)),
        (
            {"targets": ["mlp_out"], "bank_size": 0.25, "share": "none", "scale": True},
            4 * (16 * (16 - 64) + 16 * 64 + 16 + 3),
        ),
        ({"targets": ["attn_out"], "bank_size": 8, "bias": False}, 4 * (16 * (8 - 16) - 16 + 3) + 8 * 16),
        ({"targets": ["lm_head"], "bank_size": 8}, 8 * 16 + 3),
        (
            {"targets": ["mlp_block"], "bank_size": 40, "antipodal": False, "init": "random"},
            4 * (-(2 * 16 * 64 + 64 + 16) + 16 * 40 + 16 + 3) + 40 * 16,
        ),
    ],
    ids=str,
)
def test_parameters_equal_their_closed_form(make, original, fields, change):
    model = make(fields)
    assert parameters(model) == parameters(original) + change
    assert parameters(models.build(structure([Tversky(**fields)], original.config))) == parameters(model)


def test_two_models_of_one_feature_key_are_independent(make, ids):
    first, second = make({"bank_size": 0.5}), make({"bank_size": 0.5, "alpha": 0.1, "beta": 0.9})
    before = _logits(second, ids)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.zero_()
    assert torch.equal(_logits(second, ids), before)
    assert projection_at(second, 0, "c_fc").scalars.alpha.item() == pytest.approx(0.1)


# ---------------------------------------------------------------- training


TRAINED = [
    {"targets": ALL, "bank_size": 0.5},
    {"targets": ALL, "share": "layer"},
    {"targets": ALL, "bank_size": 0.5, "share_scalars": True, "scale": True, "non_negative": True},
    {"targets": LINEARS, "intersection": "min", "difference": "subtractmatch", "init": "lsq", "scale": True},
    {"targets": ["c_fc"], "form": "ratio", "non_negative": True, "init": "lsq", "scale": True, "antipodal": False},
    {"targets": ["mlp_block"], "bank_size": 40, "antipodal": False, "init": "lsq"},
]


@pytest.mark.parametrize("fields", TRAINED, ids=str)
def test_everything_has_a_gradient_and_stands_in_the_state_once(make, ids, fields):
    model = copy.deepcopy(make(fields)).train()
    model(ids, labels=ids).loss.backward()
    state = model.state_dict()
    own = {id(p) for module in Tversky(**fields).modules(model) for p in module.parameters()}
    assert {id(p) for p in Tversky(**fields).trainable(model)} == own
    named = [(key, p) for key, p in model.named_parameters() if id(p) in own]
    assert len(named) == len(own) > 0
    for key, parameter in named:
        if not key.endswith(("k.bias", "k.scalars.beta")):  # the same for every key changes no attention
            assert parameter.grad.abs().max() > 1e-9, key
        assert sum(tensor.data_ptr() == parameter.data_ptr() for tensor in state.values()) == 1
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_the_loss_of_training_is_cross_entropy_of_the_logits(make, ids):
    """With the head as a product of factors: the same number and the same gradients."""
    model = make({"targets": ["lm_head", "q"], "bank_size": 0.75})
    with torch.no_grad():
        model.lm_head.projection.scalars.theta += 0.2  # no dot product any more
        assert model.head_product(torch.zeros(1, 16))[0].shape[1] == 24
    direct, trained = copy.deepcopy(model), copy.deepcopy(model)
    logits = direct(ids).logits[:, :-1].flatten(0, 1)
    loss = nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum")
    loss.backward()
    objective, sums, _ = TokenObjective(trained, None, 0.0, [], None)(ids, None, False)
    objective.backward()
    assert torch.allclose(objective, loss, rtol=1e-5) and torch.allclose(sums[0], loss, rtol=1e-5)
    for (key, one), other in zip(direct.named_parameters(), trained.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, atol=1e-4 * one.grad.abs().max().item() + 1e-6), key


# ---------------------------------------------------------------- the head


def test_the_heads_prototypes_are_the_embeddings(make, original, ids, tmp_path):
    model = make({"targets": ["lm_head"], "bank_size": 0.75})
    assert type(model) is GPT2CompressedLMHeadModel and model.config.tie_word_embeddings
    assert model.lm_head.weight is model.transformer.wte.weight
    assert _apart(model, original, ids) > 1e-3
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.transformer.wte.weight and _apart(again, model, ids) == 0
    bank = model.transformer.feature_bank["features_16"].weight
    hidden = torch.randn(5, 16)
    expected = hidden @ bank.T @ bank @ model.transformer.wte.weight.T
    assert torch.allclose(model.logits(hidden), expected, atol=1e-4)


def test_an_untied_head_keeps_its_own_weight(ids):
    original = toy_gpt2(n_layer=2, n_embd=16, n_head=2, tie_word_embeddings=False)
    alignment, blocks = toy_alignment(original), toy_blocks(original.config, rows=4)
    rewrite = Tversky(targets=["lm_head"])
    model = apply([rewrite], original, alignment, calibration=blocks)
    assert _apart(model, original, ids) <= 1e-4 and model.lm_head.weight is not model.transformer.wte.weight
    folded = rewrite.fold(model)
    assert type(folded) is GPT2LMHeadModel and not folded.config.tie_word_embeddings
    assert _apart(folded, original, ids) <= 1e-4


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("tokens", [3, -3])
def test_a_head_takes_another_vocabulary(ids, tied, tokens, tmp_path):
    original = toy_gpt2(n_layer=1, n_embd=16, n_head=2, tie_word_embeddings=tied)
    rewrite = Tversky(targets=["lm_head"], scale=True)
    model = apply([rewrite], original, toy_alignment(original), calibration=toy_blocks(original.config, rows=4))
    ids, count = ids % (original.config.vocab_size - 3), original.config.vocab_size
    before = _logits(model, ids)[..., : count - 3]
    model.resize_token_embeddings(count + tokens)
    after = _logits(model, ids)
    assert after.shape[-1] == count + tokens and torch.allclose(after[..., : count - 3], before, atol=1e-5)
    assert (model.lm_head.weight is model.transformer.wte.weight) == tied
    model.save_pretrained(tmp_path)
    assert _apart(AutoModelForCausalLM.from_pretrained(tmp_path), model, ids) == 0
    folded = rewrite.fold(model)
    assert _apart(folded, model, ids) <= 1e-4


# ---------------------------------------------------------------- back to plain GPT-2


@pytest.mark.parametrize("size", [None, 0.5])
@pytest.mark.parametrize("prototypes", ["features", "explicit"])
@pytest.mark.parametrize("targets", [LINEARS, ["k"], ["lm_head"], ALL], ids="-".join)
def test_folding_gives_the_same_function(make, ids, targets, prototypes, size, tmp_path):
    fields = {"targets": targets, "bank_size": size, "prototypes": prototypes, "scale": True}
    model = make(fields)
    with torch.no_grad():
        for target in set(targets) - {"lm_head"}:
            projection_at(model, 1, target).scale.mul_(1.5)
    folded = Tversky(**fields).fold(model)
    assert type(folded) is GPT2LMHeadModel and _apart(folded, model, ids) <= 1e-4
    tied = "lm_head" not in targets or size is None
    assert folded.config.tie_word_embeddings == tied == (folded.lm_head.weight is folded.transformer.wte.weight)
    folded.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is GPT2LMHeadModel and _apart(again, model, ids) <= 1e-4
    assert again.config.tie_word_embeddings == tied and getattr(again.config, "tversky", None) is None


def test_folding_a_head_whose_features_were_trained_unties_it(make, ids):
    model = make({"targets": ["lm_head"]})
    with torch.no_grad():
        model.transformer.feature_bank["features_16"].weight[0] *= 1.01
    folded = Tversky(targets=["lm_head"]).fold(model)
    assert not folded.config.tie_word_embeddings and _apart(folded, model, ids) <= 1e-4


@pytest.mark.parametrize("target", ["c_fc", "lm_head"])
def test_folding_says_why_it_cannot(make, target):
    model = make({"targets": [target]})
    with torch.no_grad():
        projection_at(model, None if target == "lm_head" else 2, target).scalars.theta.fill_(1.25)
    with pytest.raises(UserError, match=r"theta 1\.25, alpha \+ beta 1\)") as said:
        Tversky(targets=[target]).fold(model)
    assert "\n" not in str(said.value) and f"tversky {target}" in str(said.value) and "None" not in str(said.value)
    fields = {"targets": ["mlp_block"], "antipodal": False, "init": "random"}
    with pytest.raises(UserError, match="mlp_block of layer 0 is not linear: it stands for a whole FFN"):
        Tversky(**fields).fold(make(fields))


def test_fixed_scalars_fold_after_training_as_the_refusal_of_others_says(make, ids):
    for learns in (True, False):
        fields = {"targets": ["c_fc"], "bank_size": 0.5, "learn_scalars": learns}
        model, rewrite = make(fields), Tversky(**fields)
        model(ids, labels=ids).loss.backward()
        torch.optim.AdamW(model.parameters(), lr=1e-2).step()
        if learns:
            with pytest.raises(UserError, match="learn_scalars=false keeps it so through recovery"):
                rewrite.fold(model)
        else:
            assert _apart(rewrite.fold(model), model, ids) <= 1e-4


# ---------------------------------------------------------------- beside other rewrites


def _round_trip(model, ids, folder):
    model.save_pretrained(folder)
    again, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and _apart(again, model, ids) <= 1e-6
    assert [from_record(item) for item in again.config.compression] == [
        from_record(i) for i in model.config.compression
    ]


@pytest.mark.parametrize("exact", [True, False])
def test_beside_soft_shared(make, original, ids, tmp_path, exact):
    attention = Tversky(targets=["q", "k", "v", "attn_out", "lm_head"], bank_size=None if exact else 0.5)
    shared = SoftShared(n=3, start=1, rank=16 if exact else 2)
    for number, rewrites in enumerate(((attention, shared), (shared, attention))):
        model = make(*rewrites)
        assert bool(_apart(model, original, ids) <= 1e-4) == exact
        _round_trip(model, ids, tmp_path / str(number))
        for order in (rewrites, rewrites[::-1]):
            half = order[0].fold(model)
            assert type(half) is GPT2CompressedLMHeadModel and _apart(half, model, ids) <= 1e-4
            folded = order[1].fold(half)
            assert type(folded) is GPT2LMHeadModel and _apart(folded, model, ids) <= 1e-4
            assert folded.config.tie_word_embeddings == exact


def test_two_of_them_in_one_layer(make, original, ids, tmp_path):
    queries = Tversky(targets=["q"], feature_key="mine", bank_size=0.5, share="layer")
    keys = Tversky(targets=["k"], feature_key="yours", bank_size=0.75)
    model = make(queries, keys)
    assert len(_banks(model)) == 5 and _banks(model)["yours_16"] == (12, 16)
    _round_trip(model, ids, tmp_path)
    for first, second in ((queries, keys), (keys, queries)):
        half = first.fold(model)
        assert _apart(half, model, ids) <= 1e-4 and len(half.config.tversky) == 1
        assert _apart(second.fold(half), model, ids) <= 1e-4
    alone = make(queries)
    assert _apart(model, alone, ids) > 1e-3
    assert torch.equal(projection_at(model, 2, "q").prototypes, projection_at(alone, 2, "q").prototypes)
    exact = make(*(Tversky(targets=[target], feature_key=target) for target in LINEARS))
    assert _apart(exact, original, ids) <= 1e-4
    with pytest.raises(UserError, match="feature_key=features stands in two rewrites"):
        make(Tversky(targets=["q"]), Tversky(targets=["k"]))
    with pytest.raises(UserError, match=r"both take over h\.0\.attn\.q"):
        make(queries, Tversky(targets=["q", "k"]))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("share", ["none", "layer", "global"])
def test_layers_keep_their_own_when_others_are_dropped(share, scaled, ids):
    """Layer l divides its scores by l + 1 in such a model; queries take up the difference."""
    original = toy_gpt2(n_layer=4, n_embd=16, n_head=2, scale_attn_by_inverse_layer_idx=scaled)
    alignment, blocks = toy_alignment(original), toy_blocks(original.config, rows=4)
    dropped = DroppedN(layers=[0, 2])
    plain = apply([dropped], original, alignment, calibration=blocks)
    for targets in (ALL, ["k", "mlp_out"]):
        tversky = Tversky(targets=targets, layers=[1, 3], share=share)
        for rewrites in ([dropped, tversky], [tversky, dropped]):
            model = apply(rewrites, original, alignment, calibration=blocks)
            assert model.config.tversky[0]["groups"] in ([[0], [1]], [[0, 1]])
            assert _apart(model, plain, ids) <= 1e-4
    lsq = Tversky(targets=["q"], layers=[1, 3], share=share, bank_size=0.75, init="lsq", difference="ignorematch")
    model = apply([dropped, lsq], original, alignment, calibration=blocks)
    errors = []
    for scale in (0.5, 1.0, 2.0):  # the fit is to the queries as rescaled
        turned = copy.deepcopy(model)
        with torch.no_grad():
            for layer in (0, 1):
                for tensor in (projection_at(turned, layer, "q").prototypes, projection_at(turned, layer, "q").bias):
                    tensor.mul_(scale)
        errors.append((_logits(turned, ids) - _logits(plain, ids)).square().mean())
    assert errors[1] == min(errors)


# ---------------------------------------------------------------- what it refuses


REFUSED = [
    ({"targets": []}, "targets is []"),
    ({"targets": "c_fc"}, "targets is 'c_fc'; allowed: a list"),
    ({"targets": [1]}, "targets has 1; allowed: q, k"),
    ({"targets": [["q"]]}, "targets has ['q']; allowed: q, k"),
    ({"targets": ["mlp"]}, "targets has 'mlp'; allowed: q, k"),
    ({"targets": ["q", "q"]}, "a list of different ones"),
    ({"targets": ["mlp_block", "c_fc"], "antipodal": False, "init": "lsq"}, "may not have them too"),
    ({"theta": 1.5, "gamma": 2.0}, "theta=1.5 and gamma=2.0"),
    ({"feature_key": "a.b"}, "feature_key is 'a.b'; allowed: a letter"),
    ({"feature_key": ""}, "feature_key is ''"),
    ({"feature_key": "é"}, "feature_key is 'é'"),
    ({"bank_size": True}, "bank_size is True; allowed: a whole number, a number, null"),
    ({"bank_size": "x"}, "bank_size is 'x'; allowed"),
    ({"bank_size": 0}, "bank_size=0 is 0 features for inputs of width 16; allowed: 1 to 16"),
    ({"bank_size": -3}, "bank_size=-3 is -3 features"),
    ({"bank_size": 17}, "bank_size=17 is 17 features for inputs of width 16; allowed: 1 to 16"),
    ({"bank_size": 20, "targets": ["mlp_out", "q"]}, "bank_size=20 is 20 features for inputs of width 16"),
    ({"bank_size": 1.5}, "bank_size is 1.5; allowed: a whole number, or a part"),
    ({"bank_size": 0.0}, "bank_size is 0.0; allowed"),
    ({"bank_size": 0.01}, "bank_size=0.01 is 0 features"),
    ({"bank_size": float("nan")}, "bank_size is nan"),
    ({"share": "window"}, "share=window needs n"),
    ({"share": "window", "n": 5}, "n 5 is out of range"),
    ({"share": "window", "n": 0}, "n 0 is out of range"),
    ({"share": "window", "n": 2, "start": 3}, "start 3 with n 2 is out of range"),
    ({"share": "window", "n": 2, "start": -1}, "start -1 with n 2 is out of range"),
    ({"share": "window", "n": 2, "layers": [0]}, "n and start are of share=window"),
    ({"n": 2}, "n and start are of share=window"),
    ({"start": 0}, "n and start are of share=window"),
    ({"layers": []}, "layers is []; allowed: different layers from 0 to 3"),
    ({"layers": [4]}, "layers is [4]; allowed: different layers from 0 to 3"),
    ({"layers": [-1]}, "layers is [-1]"),
    ({"layers": [1, 1]}, "layers is [1, 1]"),
    ({"layers": [True]}, "layers is [True]"),
    ({"layers": [[1]]}, "layers is [[1]]"),
    ({"layers": 1}, "layers is 1; allowed: a list"),
    ({"form": "ratio", "init": "lsq"}, "form=ratio needs non_negative=true"),
    ({"form": "ratio", "init": "lsq", "non_negative": True, "offset": 0}, "an offset above 0"),
    ({"form": "ratio", "intersection": "softmin", "non_negative": True, "init": "lsq"}, "divides by numbers about 0"),
    ({"non_negative": True, "alpha": -0.5, "init": "lsq"}, "theta, alpha, beta = (1.0, -0.5, 0.5); allowed: 0 or more"),
    ({"normalize": True, "init": "lsq"}, "normalize needs prototypes=explicit"),
    ({"targets": ["lm_head"], "intersection": "min", "init": "lsq"}, "lm_head takes form=contrast of matrix products"),
    ({"targets": ["lm_head"], "difference": "subtractmatch", "init": "lsq"}, "lm_head takes form=contrast"),
    ({"targets": ["mlp_block"]}, "mlp_block needs antipodal=false and init=lsq or random"),
    ({"targets": ["mlp_block"], "init": "lsq"}, "mlp_block needs antipodal=false"),
    (
        {"targets": ["mlp_block"], "init": "lsq", "antipodal": False, "learn_scalars": False},
        "fitted for products with alpha = theta above 0 and beta = 0; given theta, alpha, beta = (1.0, 0.5, 0.5)",
    ),
    ({"antipodal": False}, "init=exact needs antipodal=true"),
    ({"difference": "ignorematch"}, "init=exact needs antipodal=true"),
    ({"alpha": 0.6}, "theta = alpha + beta"),
    ({"theta": 0.0, "alpha": 0.0, "beta": 0.0}, "init=exact needs"),
    ({"distill_steps": -1}, "distill_steps are 0 or more"),
    ({"distill_steps": 1, "distill_learning_rate": 0}, "distill_learning_rate above 0"),
    ({"intersection": "sum"}, "intersection is 'sum'; allowed: product, min, max, mean, gmean, softmin"),
]


@pytest.mark.parametrize(("fields", "said"), REFUSED, ids=str)
def test_refusals_are_one_line(original, fields, said):
    with pytest.raises(UserError) as refused:
        check([from_record({"rewrite": "tversky", **fields})], original.config)
    text = str(refused.value)
    assert said in text and "\n" not in text


def test_a_block_bank_is_no_larger_than_its_neurons(make):
    fields = {"targets": ["mlp_block"], "antipodal": False, "init": "lsq", "layers": [0, 1]}
    make({**fields, "bank_size": 128})
    with pytest.raises(UserError, match="a bank of 129 features for 2 FFNs of 64 neurons; allowed: 1 to 128"):
        make({**fields, "bank_size": 129})


@pytest.mark.parametrize("n_layer", [1, 2])
def test_shallow_models(n_layer, ids):
    original = toy_gpt2(n_layer=n_layer, n_embd=16, n_head=2)
    alignment, blocks = toy_alignment(original), toy_blocks(original.config, rows=4)
    for fields in (
        {"share": "layer"},
        {"share": "window", "n": 1},
        {"share": "window", "n": 1, "start": n_layer - 1},
        {},
    ):
        rewrite = Tversky(targets=LINEARS, **fields)
        check([rewrite], original.config)
        model = apply([rewrite], original, alignment, calibration=blocks)
        assert _apart(model, original, ids) <= 1e-4
        assert json.loads(json.dumps(rewrite.record())) == rewrite.record()


def test_sites_are_those_of_gpt2():
    base = toy_config(n_layer=2)
    assert Tversky(targets=list(TARGETS[:6]), layers=[1]).sites(base) == {
        f"h.1.{leaf}" for leaf in ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.c_fc", "mlp.c_proj")
    }
    assert Tversky(targets=["mlp_block", "lm_head"], layers=[0]).sites(base) == {
        "h.0.mlp.c_fc",
        "h.0.mlp.c_proj",
        "lm_head",
    }
