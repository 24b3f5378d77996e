"""What every entry of REWRITES owes: run for all of them, whoever adds one."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from toy import toy_blocks, toy_gpt2, toy_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2LMHeadModel

from compressor import models
from compressor.errors import UserError
from compressor.metrics.size import parameters
from compressor.rewrites import REWRITES, from_record
from compressor.rewrites.compose import apply, choose, structure

D, FF, LAYERS = 32, 128, 6
FFN = 2 * D * FF + FF + D
BLOCK = FFN + 4 * D * D + 4 * D + 4 * D


def _soft(n, rank, groups=1):
    """A window of n sharing both linears: n - 1 pairs of weights less, a delta a layer and linear more."""
    return groups * (-(n - 1) * 2 * D * FF + n * 2 * rank * (D + FF))


def _tversky(size, width_in, width_out, *, projections, banks=1, scalars=3):
    """Linears become prototype features of `size` features each and the scalars; and banks."""
    return projections * (width_out * (size - width_in) + scalars) + banks * size * width_in


def _part(share):
    """What a layer of a part lacks: the columns and biases of queries, keys, values and neurons, rows of outputs."""
    heads, neurons = D - D // share, FF - FF // share
    return 3 * heads * (D + 1) + heads * D + neurons * (2 * D + 1)


def _plain(d, ff=None, layers=LAYERS):
    """All of a GPT-2 with a tied head."""
    ff = 4 * d if ff is None else ff
    return (97 + 64) * d + layers * (4 * d * d + 4 * d + 2 * d * ff + ff + d + 4 * d) + 2 * d


_ALL = ["q", "k", "v", "attn_out", "c_fc", "mlp_out", "lm_head"]
HEADS = 4
_ALIBI = -64 * D + D + 2 * LAYERS * HEADS  # positions but for the first one's; slopes, biases of the first token
_WIDTH = D // HEADS
_MIXING = HEADS * HEADS
_RATIO = {"form": "ratio", "non_negative": True, "scale": True}
OTHER = {"n_embd": 16, "n_head": 2, "n_inner": 40}  # what stands as "other" in a record
_OTHER = (97 + 64) * 16 + LAYERS * (4 * 16 * 16 + 2 * 16 * 40 + 9 * 16 + 40) + 2 * 16
_MIN = {"intersection": "min", "difference": "subtractmatch", "init": "lsq", "scale": True}

# name of the rewrite -> [(its record, how many parameters it adds to the original)]: at least one for every entry
EXAMPLES = {
    "soft_shared": [
        ({"n": 3, "rank": 4}, _soft(3, 4)),
        ({"n": 3, "rank": 4, "base": "lsq", "fold_ln": True}, _soft(3, 4)),
        ({"n": 3, "rank": 2, "base": "anchor", "delta_init": "svd", "scope": "tile"}, _soft(3, 2, groups=2)),
        ({"n": 4, "rank": 0, "bias": "shared", "delta_init": "svd"}, -3 * FFN),
        ({"n": 2, "rank": 3, "delta_init": "lora", "start": 4}, _soft(2, 3)),
    ],
    "merged_n": [
        ({"n": 3, "start": 1}, 0),
        ({"n": 4, "tie": True}, -3 * FFN),
        ({"n": 2, "tie": True, "scope": "tile", "average": "activation-weighted"}, -3 * FFN),
    ],
    "compressed_n": [
        ({"n": 3, "collapse": "fit"}, -2 * BLOCK),
        ({"n": 2, "start": 0, "collapse": "mean"}, -BLOCK),
        ({"n": 2, "scope": "tile", "collapse": "laco"}, -3 * BLOCK),
        ({"n": 3, "start": 3, "collapse": "sum", "attention": "last"}, -2 * BLOCK),
        ({"n": 4, "collapse": "keep", "attention": "first"}, -3 * BLOCK),
    ],
    "dropped_n": [
        ({"n": 3}, -2 * BLOCK),
        ({"layers": [0, 3, 5]}, -3 * BLOCK),
    ],
    "pruned": [
        ({"sparsity": 0.4}, 0),
        ({"parameters": "60k"}, 0),
    ],
    "tversky": [
        ({"bank_size": 0.5}, _tversky(16, D, FF, projections=LAYERS)),
        (
            {"targets": _ALL, "share": "layer", "bank_size": 0.75},
            _tversky(24, D, D, projections=4 * LAYERS, banks=LAYERS)
            + _tversky(24, D, FF, projections=LAYERS, banks=0)
            + _tversky(96, FF, D, projections=LAYERS, banks=LAYERS)
            + (24 * D + 3),
        ),
        ({**_MIN, "targets": ["c_fc"]}, _tversky(D, D, FF, projections=LAYERS) + LAYERS * FF),
        (
            {**_RATIO, "targets": ["c_fc", "v"], "init": "lsq", "share": "none", "layers": [1, 4]},
            2 * (_tversky(D, D, FF, projections=1) + FF + _tversky(D, D, D, projections=1) + D),
        ),
        (
            {"targets": ["mlp_block"], "antipodal": False, "init": "lsq", "bank_size": 200},
            LAYERS * (D * 200 + D + 3 - FFN) + 200 * D,
        ),
        ({"targets": ["lm_head"], "bank_size": 16}, 16 * D + 3),
        (
            {
                "targets": ["q", "attn_out"],
                "prototypes": "explicit",
                "share": "window",
                "n": 3,
                "bank_size": 20,
                "share_scalars": True,
            },
            2 * (20 * D + 3),
        ),
        (
            {
                "targets": ["q", "lm_head"],
                "intersection": "gmean",
                "init": "random",
                "distill_steps": 2,
            },
            _tversky(D, D, D, projections=LAYERS) + 3,
        ),
    ],
    "linformer": [
        ({"block": 5, "slots": 2}, LAYERS * (2 * 2 * 5 + 2)),
        ({"block": 4, "slots": 1, "per_head": True, "layers": [4, 1], "distill_steps": 2}, 2 * HEADS * (2 * 4 + 1)),
    ],
    "nystromformer": [
        ({"block": 4, "landmarks": 3}, 0),
        ({"block": 3, "landmarks": 2, "inverse": "newton", "layers": [0, 5]}, 0),
    ],
    "performer": [
        ({"block": 4}, LAYERS * HEADS * (_WIDTH * _WIDTH + 1)),
        ({"block": 4, "feature_map": "favor+", "features": 24}, 0),
        ({"block": 5, "feature_map": "favor_hyp", "features": 16, "layers": [2], "seed": 3}, 0),
        ({"block": 4, "feature_map": "relu", "features": 12, "local": False, "distill_steps": 2}, LAYERS * HEADS),
        ({"block": 3, "feature_map": "elu"}, LAYERS * HEADS),
    ],
    "alibi": [  # with learned positions fading out it is the original until a recovery begins: tests/test_alibi.py
        ({"slopes": "geometric", "anneal": 0}, _ALIBI),
        ({"slopes": "learned", "anneal": 0}, _ALIBI),
    ],
    "token_factored": [
        ({"stage": "v_from_xt"}, LAYERS * 2 * D),
        ({"stage": "kron_v", "layers": [1, 4]}, 2 * (2 * D + _MIXING - D * D - D)),
        ({"stage": "kron_o", "bias": False, "distill_steps": 2}, LAYERS * (2 * D + _MIXING - D * D - D)),
        ({"stage": "kron"}, LAYERS * (2 * D + 2 * _MIXING - 2 * D * D - D)),
        ({"stage": "kron", "value_norm": False, "bias": False}, LAYERS * (2 * _MIXING - 2 * D * D - 2 * D)),
        ({"stage": "identity"}, LAYERS * (2 * D - 2 * D * D - 2 * D)),
    ],
    "sasp": [
        ({"alpha": 0.3, "beta": 0.8, "gamma": 0.2}, LAYERS * 3 * HEADS),
        ({"beta": 0.5, "layers": [4, 1]}, 2 * 3 * HEADS),
        ({"parallel": True, "layers": [0, 2, 3]}, 3 * (3 * HEADS + 2)),
    ],
    "matryoshka": [  # whole, it is the original: tests/test_matryoshka.py
        ({"only": {"ffn": 0.5}}, -LAYERS * 64 * (2 * D + 1)),
        ({"only": {"ffn": [128, 64, 32, 64, 128, 128]}}, -(64 + 96 + 64) * (2 * D + 1)),
        ({"depth": [4], "only": {"depth": 4}}, -2 * BLOCK),
        ({"width": [16], "only": {"width": 16}}, _plain(16) - _plain(D)),
        (
            {"ffn": [0.25], "width": [16], "depth": [5], "only": {"width": 16, "depth": 5, "ffn": 32}},
            _plain(16, 32, 5) - _plain(D),
        ),
        ({"head": [8], "only": {"head": 8}}, 8 * D + 8),
    ],
    "fractal": [  # whole, it is the original: tests/test_fractal.py
        ({"levels": 1, "only": [1, 1]}, -LAYERS * _part(2)),
        ({"groups": "mixed", "only": [2, 2]}, -LAYERS * _part(4)),
        ({"split": 4, "levels": 1, "only": [1, 0]}, -LAYERS * _part(4)),
    ],
    "combine": [  # its glue that selects one model: tests/test_rewrites_combine.py
        ({"other": "OTHER"}, _OTHER + (D + 16) ** 2),
        ({"other": "OTHER", "blocks": True}, _OTHER + (2 * LAYERS + 1) * (D + 16) ** 2),
    ],
}
CASES = [
    pytest.param(name, record, change, id=f"{name}-{index}")
    for name, examples in EXAMPLES.items()
    for index, (record, change) in enumerate(examples)
]


@pytest.fixture(scope="module")
def ids(original):
    return torch.randint(1, original.config.vocab_size, (3, 20), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def make(original, alignment, tmp_path_factory):
    made, other = {}, tmp_path_factory.mktemp("models") / "other"
    toy_gpt2(seed=1, **OTHER).save_pretrained(other)
    toy_tokenizer().save_pretrained(other)

    def build(name, record):
        key = json.dumps([name, record], sort_keys=True)
        if key not in made:
            named = {"other": str(other)} if "other" in record else {}
            rewrite, blocks = from_record({"rewrite": name, **record, **named}), toy_blocks(original.config)
            rewrite.check(original.config)
            (rewrite,) = choose([rewrite.resolved(original.config)], original, alignment, calibration=blocks)
            made[key] = rewrite, apply([rewrite], original, alignment, calibration=blocks)
        return made[key]

    return build


def _logits(model, ids, **arguments):
    with torch.no_grad():
        return model(ids, **arguments).logits


def test_every_rewrite_has_an_example():
    assert EXAMPLES.keys() == REWRITES.keys()
    assert all(REWRITES[name].name == name for name in REWRITES)


@pytest.mark.parametrize("name", REWRITES)
def test_neutral_setting_reproduces_the_original(name, original, alignment, ids):
    neutral = REWRITES[name].neutral(original.config)
    if neutral is None:
        pytest.fail(f"{name} has no neutral setting: it needs a reference test, and a line here that says so")
    before = copy.deepcopy(original.state_dict())
    model = apply([neutral.resolved(original.config)], original, alignment, calibration=toy_blocks(original.config))
    assert (_logits(model, ids) - _logits(original, ids)).abs().max() <= 1e-4
    assert all(torch.equal(before[key], value) for key, value in original.state_dict().items())


@pytest.mark.parametrize(("name", "record", "change"), CASES)
class TestEveryExample:
    def test_changes_the_model_and_says_how(self, make, name, record, change, original, ids):
        rewrite, model = make(name, record)
        assert (_logits(model, ids) - _logits(original, ids)).abs().max() > 1e-3
        assert model.config.compression == [rewrite.record()]
        assert from_record(rewrite.record()) == rewrite
        assert not rewrite.undecided
        assert json.loads(json.dumps(rewrite.record())) == rewrite.record()

    def test_parameters_equal_the_formula(self, make, name, record, change, original):
        rewrite, model = make(name, record)
        assert parameters(model) == parameters(original) + change
        assert parameters(models.build(structure([rewrite], original.config))) == parameters(model)
        storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() // 4 for p in model.parameters()}
        assert sum(storages.values()) == parameters(model)

    def test_no_token_sees_a_later_one(self, make, name, record, change, ids):
        model = make(name, record)[1]
        changed = ids.clone()
        changed[:, 12] = (changed[:, 12] + 1) % model.config.vocab_size
        before, after = _logits(model, ids), _logits(model, changed)
        assert (after[:, :12] - before[:, :12]).abs().max() <= 1e-6
        assert (after[:, 12:] - before[:, 12:]).abs().max() > 1e-3

    def test_cache(self, make, name, record, change, ids):
        model = make(name, record)[1]
        full = _logits(model, ids)
        with torch.no_grad():
            cache, parts = None, []
            for chunk in ids.split([7, 1, 12], dim=1):
                step = model(chunk, past_key_values=cache, use_cache=True)
                cache, parts = step.past_key_values, [*parts, step.logits]
        assert (torch.cat(parts, 1) - full).abs().max() <= 1e-4
        settings = {"max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
        for search in ({"do_sample": False}, {"num_beams": 3, "do_sample": False}):
            cached, fresh = (model.generate(ids, use_cache=use, **search, **settings) for use in (True, False))
            assert torch.equal(cached, fresh)

    def test_padding_changes_nothing(self, make, name, record, change, ids):
        model = make(name, record)[1]
        full, pads = _logits(model, ids), torch.zeros(len(ids), 5, dtype=torch.int64)
        ones = torch.ones_like(ids)
        right = _logits(model, torch.cat([ids, pads], 1), attention_mask=torch.cat([ones, pads], 1))
        mask = torch.cat([pads, ones], 1)
        left = _logits(
            model, torch.cat([pads, ids], 1), attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)
        )
        assert (right[:, : ids.shape[1]] - full).abs().max() <= 1e-4
        assert (left[:, 5:] - full).abs().max() <= 1e-4

    def test_trains(self, make, name, record, change, ids):
        rewrite, model = make(name, record)
        model = copy.deepcopy(model).train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients = {key: p.grad for key, p in model.named_parameters()}
        assert all(g is not None and torch.isfinite(g).all() for g in gradients.values())
        assert all(g.abs().sum() > 0 for key, g in gradients.items() if "delta" not in key)
        for parameter in rewrite.trainable(model):
            assert any(parameter is other for other in model.parameters())
        penalty = rewrite.penalty(model)
        assert penalty is None or (penalty.ndim == 0 and penalty >= 0)

    def test_copies_and_dtypes_move_everything(self, make, name, record, change, ids):
        model = make(name, record)[1]
        full = _logits(model, ids)
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.0)
            for parameter in twin.parameters():
                parameter.zero_()
        assert (_logits(model, ids) - full).abs().max() == 0
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            cast = copy.deepcopy(model).to(dtype)
            assert {p.dtype for p in cast.parameters()} == {dtype}
            assert (_logits(cast, ids).float() - full).abs().max() < (0.5 if dtype == torch.bfloat16 else 0.1)

    def test_folds_to_plain_gpt2(self, make, name, record, change, ids):
        rewrite, model = make(name, record)
        try:
            folded = rewrite.fold(model)
        except UserError as why:
            assert "\n" not in str(why)
            if name == "token_factored":
                assert f"values of token_factored ({record['stage']}) read a stream of their own" in str(why)
            elif name == "tversky":
                assert "is not linear" in str(why) and record.get("init") in ("lsq", "random")
            elif name == "alibi":
                assert "fall with distance" in str(why)
            elif name == "sasp":
                assert "which plain GPT-2 cannot express" in str(why) and ("alpha" in record or "parallel" in record)
            elif name == "combine":
                assert "each part has LayerNorms of its own" in str(why)
            else:
                assert name in ("linformer", "nystromformer", "performer") and f"attention of {name}" in str(why)
            return
        if folded is None:
            assert type(model) is GPT2LMHeadModel
            return
        assert type(folded) is GPT2LMHeadModel
        assert (_logits(folded, ids) - _logits(model, ids)).abs().max() <= 1e-4

    def test_hidden_states_and_attentions(self, make, name, record, change, ids):
        model = copy.deepcopy(make(name, record)[1])
        model.set_attn_implementation("eager")
        output = model(ids, output_hidden_states=True, output_attentions=True)
        assert len(output.hidden_states) == model.config.n_layer + 1
        assert len(output.attentions) == model.config.n_layer

    def test_save_and_reload(self, make, name, record, change, ids, tmp_path):
        rewrite, model = make(name, record)
        model.save_pretrained(tmp_path)
        again, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert type(again) is type(model) and not loading["missing_keys"] and not loading["unexpected_keys"]
        assert (_logits(again, ids) - _logits(model, ids)).abs().max() == 0
        assert parameters(again) == parameters(model)
        assert [from_record(item) for item in again.config.compression] == [rewrite]
        size = (tmp_path / "model.safetensors").stat().st_size
        assert 0 <= size - 4 * parameters(model) <= 32768
        assert not [file for pattern in ("*.bin", "*.pt", "*.pkl") for file in tmp_path.glob(pattern)]
        classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=2, pad_token_id=0)
        assert classifier(ids).logits.shape == (3, 2)
        trunk = classifier.transformer(ids).last_hidden_state
        assert (trunk - model.transformer(ids).last_hidden_state).abs().max() == 0


_STRANGER = """
import json, sys
sys.modules["compressor"] = None
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
said = []
for folder in sys.argv[2:]:
    ids = torch.tensor(json.loads(sys.argv[1]))
    trust = {"trust_remote_code": True}
    model = AutoModelForCausalLM.from_pretrained(folder, **trust).eval()
    first = model(ids).logits
    with torch.no_grad():
        model.transformer.wte.weight.add_(0.01)  # as a training step would
    model.save_pretrained(folder + "/second")
    second = AutoModelForCausalLM.from_pretrained(folder + "/second", **trust).eval()
    head = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, pad_token_id=0, **trust)
    said.append({"logits": first[0, -1].tolist(), "type": model.config.model_type,
                 "again": (second(ids).logits - model(ids).logits).abs().max().item(),
                 "head": type(head).__name__, "trunk": type(AutoModel.from_pretrained(folder, **trust)).__name__})
print(json.dumps(said))
"""


def test_opens_in_a_fresh_process_without_this_package(make, ids, tmp_path):
    folders, expected = [], []
    for name, examples in EXAMPLES.items():
        for index, (record, _) in enumerate(examples):
            model = make(name, record)[1]
            folders.append(tmp_path / f"{name}-{index}")
            model.save_pretrained(folders[-1])
            expected.append((model.config.model_type, _logits(model, ids)[0, -1]))
    answer = subprocess.run(
        [sys.executable, "-c", _STRANGER, json.dumps(ids.tolist()), *map(str, folders)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**__import__("os").environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    assert answer.returncode == 0, answer.stderr
    for said, (kind, logits), folder in zip(json.loads(answer.stdout.splitlines()[-1]), expected, folders, strict=True):
        assert said["type"] == kind
        assert (torch.tensor(said["logits"]) - logits).abs().max() <= 1e-5
        assert said["again"] == 0
        prefix = "GPT2Compressed" if kind == "gpt2_compressed" else "GPT2"
        assert (said["head"], said["trunk"]) == (f"{prefix}ForSequenceClassification", f"{prefix}Model")
        files = {file.name for file in (folder / "second").glob("*.py")}
        assert bool(files) == (kind == "gpt2_compressed")
