"""What Tversky and attention in blocks put into a config.json: damage is one clear line, what fits can be built."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
from conftest import make_config

from compressor.checkpoint import build, read_config, structure_hash
from compressor.errors import UserError
from compressor.metrics.flops import flops_per_token
from compressor.rewrites import from_record
from compressor.rewrites.compose import structure

BASE = make_config()  # 6 layers, width 32


def rewritten(*records):
    return structure([from_record({"rewrite": "tversky", **record}) for record in records], BASE)


ENTRY = rewritten({"targets": ["q", "c_fc", "mlp_out"], "share": "window", "n": 3, "bank_size": 8}).tversky[0]
HEAD = rewritten({"targets": ["lm_head"]}).tversky[0]
LOOSE = {"antipodal": False, "init": "random", "bank_size": 20, "targets": ["mlp_block"]}
BLOCK = rewritten({**LOOSE, "feature_key": "blocks", "layers": [5]}).tversky[0]


@pytest.fixture
def read(tmp_path, tiny_folder):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")

    def read(entries, **changes):
        raw = json.loads((folder / "config.json").read_text())
        raw |= {"model_type": "gpt2_compressed", "tversky": entries, **changes}
        (folder / "config.json").write_text(json.dumps(raw))
        return read_config("m", folder)

    return read


def without(key):
    return [{name: value for name, value in ENTRY.items() if name != key}]


def changed(entry=ENTRY, **changes):
    return {**copy.deepcopy(entry), **changes}


FREE = changed(groups=[[0, 1]], share="window")  # leaves room for another entry


def test_what_the_rewrite_makes_is_read(read):
    assert len(ENTRY["groups"]) == 2 and ENTRY["features"] == {"32": 8, "128": 8}
    for entries in ([ENTRY], [HEAD], [ENTRY, changed(HEAD, feature_key="head")], [FREE, BLOCK], [], None):
        config = read(entries)
        build(config)
        assert flops_per_token(config) > 0 and structure_hash(config)


@pytest.mark.parametrize("key", ENTRY)
def test_a_key_that_is_missing_is_named(read, key):
    with pytest.raises(UserError, match=rf"^m: config\.json has no {key} in entry 0 of tversky; allowed: [^\n]+$"):
        read(without(key))


JUNK = [None, 7, -1, 1.5, "x", "", [], [7], {}, {"x": 1}, True, 1e300, [[]], [None], ["q", "q"], [["q"]], "q" * 500]


@pytest.mark.parametrize("key", ENTRY)
def test_whatever_stands_in_a_key_it_is_read_or_refused_in_one_line(read, key):
    refused = 0
    for junk in JUNK:
        try:
            config = read([changed(**{key: junk})])
        except UserError as error:
            assert "\n" not in str(error) and "tversky" in str(error) and len(str(error)) < 400
            refused += 1
        else:
            build(config)
            assert flops_per_token(config) > 0
    assert refused >= 12


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ("global", "has 'global' as tversky; allowed: a list"),
        ({"a": 1}, "has {'a': 1} as tversky; allowed: a list"),
        ([7], "has 7 as entry 0 of tversky; allowed: a mapping"),
        ([ENTRY, None], "has None as entry 1 of tversky"),
        ([changed(targets=["q", "o"])], "allowed: a list of different ones of q, k, v"),
        ([changed(groups=[[0, 6]])], "allowed: lists of layers within 0 to 5, none of them twice"),
        ([changed(groups=[[0], [0]])], "none of them twice"),
        ([changed(groups=[[True]])], "none of them twice"),
        ([changed(groups=[])], "none of them twice"),
        ([changed(features={"32": 8})], "as features in entry 0 of tversky; allowed: 1 to 4194304 features"),
        ([changed(features={"32": 8, "128": 0})], "features for every width of 32, 128"),
        ([changed(features={"32": 8, "128": 1 << 40})], "features for every width of 32, 128"),
        ([changed(feature_key="a.b")], "has 'a.b' as feature_key in entry 0"),
        ([changed(form="cosine")], "has 'cosine' as form in entry 0 of tversky; allowed: contrast, ratio"),
        ([changed(theta=float("nan"))], "has nan as theta"),
        ([changed(alpha=10**400)], "as alpha in entry 0"),
        ([changed(form="ratio")], "has form ratio without non_negative and an offset above 0 in entry 0"),
        ([changed(form="ratio", non_negative=True, offset=0)], "without non_negative and an offset above 0"),
        ([changed(non_negative=True, beta=-1)], "non_negative with scalars below 0"),
        ([changed(normalize=True)], "normalize with prototypes features"),
        ([changed(BLOCK, targets=["c_fc", "mlp_block"])], "mlp_block beside a linear of the FFN"),
        ([changed(HEAD, intersection="min")], "lm_head with a form that is no contrast of matrix products"),
        ([ENTRY, changed(feature_key="more", targets=["q"])], "has q of layer 0 in entry 1 of tversky, which is taken"),
        ([ENTRY, BLOCK], "has mlp_block of layer 5 in entry 1"),
        ([changed(BLOCK), changed(feature_key="more", targets=["mlp_out"])], "has mlp_out of layer 5 in entry 1"),
        ([HEAD, HEAD], "has lm_head in entry 1"),
        ([FREE, changed(FREE, groups=[[2]], features={"32": 9, "128": 9})], "two feature banks features_32_0"),
    ],
)  # fmt: skip
def test_configs_that_do_not_fit(read, entries, said):
    with pytest.raises(UserError) as caught:
        read(entries)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("groups", [7, "x", {"a": 1}])
def test_shared_ffns_that_are_no_list(read, groups):
    with pytest.raises(UserError, match="as ffn_groups; allowed: a list"):
        read(None, ffn_groups=groups)


def test_a_layer_whose_ffn_is_shared_has_no_projection_in_it(read):
    groups = [{"layers": [1, 2], "start": 1, "rank": 0, "bias": "shared"}]
    with pytest.raises(UserError, match="has c_fc of layer 1 in entry 0 of tversky, which is taken over already"):
        read([ENTRY], ffn_groups=groups)
    build(read([changed(targets=["q"])], ffn_groups=groups))


# ---------------------------------------------------------------- structure


def test_structures_tell_shared_and_unshared_banks_apart():
    given = {"targets": ["q", "c_fc"], "bank_size": 8}
    kinds = [
        *({**given, "share": share} for share in ("none", "layer", "global")),
        *({**given, "share": "window", "n": n} for n in (2, 3)),
        {**given, "form": "contrast", "difference": "ignorematch", "init": "lsq"},
        {**given, "bank_size": 9},
        {**given, "layers": [0, 1, 2]},
    ]
    hashes = [structure_hash(rewritten(kind)) for kind in kinds]
    assert len({*hashes, structure_hash(BASE)}) == len(kinds) + 1
    # windows of the same size over other layers: the same tensors under the same names, shared by others
    config = rewritten({**given, "share": "window", "n": 3})
    before = structure_hash(config)
    config.tversky[0]["groups"] = [[0, 2, 4], [1, 3, 5]]
    assert structure_hash(config) != before
    named = [structure_hash(rewritten({**given, "feature_key": key})) for key in ("features", "other")]
    assert named[0] == named[1]  # a name is no structure
    alone = [structure_hash(rewritten({"targets": ["c_fc"], "share": share})) for share in ("none", "layer")]
    assert alone[0] == alone[1]  # a bank for each layer, whatever it is called


# ---------------------------------------------------------------- attention in blocks


def attending(*records):
    return structure([from_record(record).resolved(BASE) for record in records], BASE).efficient_attention


BLOCKS = {
    "linformer": attending({"rewrite": "linformer", "layers": [0, 3]})[0],
    "nystromformer": attending({"rewrite": "nystromformer", "inverse": "newton"})[0],
    "performer": attending({"rewrite": "performer", "feature_map": "favor_hyp"})[0],
}


def test_what_the_rewrites_of_attention_make_is_read(read):
    hashes = {structure_hash(read(None))}
    for entry in BLOCKS.values():
        config = read(None, efficient_attention=[entry])
        build(config)
        assert flops_per_token(config) > 0
        hashes |= {structure_hash(config), structure_hash(read(None, efficient_attention=[{**entry, "block": 9}]))}
    assert len(hashes) == 7


@pytest.mark.parametrize(("kind", "key"), [(kind, key) for kind, entry in BLOCKS.items() for key in entry])
def test_whatever_stands_in_a_key_of_attention_it_is_read_or_refused_in_one_line(read, kind, key):
    refused = 0
    for junk in [*JUNK, 1 << 70, -7]:
        try:
            config = read(None, efficient_attention=[{**BLOCKS[kind], key: junk}])
        except UserError as error:
            assert "\n" not in str(error) and "efficient_attention" in str(error) and len(str(error)) < 400
            refused += 1
        else:
            build(config)
    assert refused >= 12
    with pytest.raises(UserError, match=rf"has no {key} in entry 0 of efficient_attention; allowed: [^\n]+$"):
        read(None, efficient_attention=[{name: value for name, value in BLOCKS[kind].items() if name != key}])


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ("all", "has 'all' as efficient_attention; allowed: a list"),
        ([None], "has None as entry 0 of efficient_attention; allowed: a mapping"),
        ([{**BLOCKS["linformer"], "slots": 65}], "has 65 as slots in entry 0 of efficient_attention; allowed: 1 to"),
        ([{**BLOCKS["linformer"], "kind": "longformer"}], "allowed: linformer, nystromformer, performer"),
        (
            [{**BLOCKS["performer"], "features": 9}],
            "9 as features in entry 0 of efficient_attention; allowed: 2 to",
        ),
        ([{**BLOCKS["performer"], "feature_map": "elu", "features": 16}], "allowed: 8, a head's width"),
        ([BLOCKS["linformer"], {**BLOCKS["performer"], "layers": [3]}], "has layer 3 twice in efficient_attention"),
    ],
)
def test_attention_that_does_not_fit(read, entries, said):
    with pytest.raises(UserError) as caught:
        read(None, efficient_attention=entries)
    assert said in str(caught.value) and "\n" not in str(caught.value)
