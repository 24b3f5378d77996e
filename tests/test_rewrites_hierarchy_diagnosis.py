"""What a nested model tells of its embeddings by prefix: planted groups come out, figures are those by hand."""

from __future__ import annotations

import json

import pytest
import torch
from test_matryoshka import nested
from toy import toy_gpt2

from compressor.embedding_clusters import agreement, emergent_groups
from compressor.rewrites import from_record
from compressor.token_groups import imposed_groups

STRINGS = [None, *"aeiou", *"bdlmnrst", *"AEIBLMST", *".!?,;:-", "\n", *"0123456789", *"#$%"]
STRINGS += [f" {word}" for word in ("the", "of", "and", "to", "in", "it")] * 9
STRINGS = STRINGS[:97]


def test_planted_groups_come_out():
    """Lower case, upper case and the rest each around a direction of the first 8 coordinates, which 4 do not show."""
    rewrite, _, model = nested({"ffn": None, "head": [16, 8, 4]})
    generator = torch.Generator().manual_seed(0)
    groups, names = imposed_groups(STRINGS, "case")
    with torch.no_grad():
        planted = torch.nn.functional.one_hot(groups + 1, len(names) + 1) * 4.0
        noise = torch.randn(97, 32, generator=generator) * 0.05
        noise[:, :4] += torch.randn(97, 4, generator=generator)
        model.transformer.wte.weight.copy_(noise)
        model.transformer.wte.weight[:, 4 : 4 + len(names) + 1] += 3 * planted
    told = rewrite.diagnose(model, (1 / 0 for _ in "x"), STRINGS)
    assert json.loads(json.dumps(told)) == told
    rows = told["prefixes"]
    assert [row["coordinates"] for row in rows] == [32, 16, 8, 4] and told["vocabulary"] == 97
    assert [row["agreement"]["case"]["purity"] for row in rows[:3]] == [1, 1, 1]
    assert rows[3]["agreement"]["case"]["purity"] < 0.9
    for row in rows:
        own = model.transformer.wte.weight.detach()[:, : row["coordinates"]]
        found = emergent_groups(own.double(), minimum_similarity=0.7, minimum_group_size=3)
        unit = own.double() / own.double().norm(dim=1, keepdim=True)
        cosines = unit @ unit.T
        assert row["mean_cosine"] == pytest.approx(float(cosines.sum() - 97) / (97 * 96), abs=1e-6)
        assert row["clusters"] == len(found[found >= 0].unique()) and row["clustered"] == int((found >= 0).sum())
        assert row["largest"] == max(int((found == group).sum()) for group in found.unique() if group >= 0)
        form = agreement(found, imposed_groups(STRINGS, "form")[0])
        assert row["agreement"]["form"]["ami"] == pytest.approx(form.ami)


def test_the_map_holds_cosines_of_the_tokens_it_names():
    rewrite, _, model = nested({"ffn": None, "head": [8], "width": [16]})
    told = rewrite.diagnose(model, (), STRINGS)
    assert [row["coordinates"] for row in told["prefixes"]] == [32, 15, 8]
    shown = told["map"]
    assert [name for name, _ in shown["sets"]][:3] == ["blanks", "vowels", "consonants"]
    assert shown["tokens"][:6] == ["\n", "a", "e", "i", "o", "u"] and sum(n for _, n in shown["sets"]) == len(
        shown["tokens"]
    )
    x = model.transformer.wte.weight.detach()[:, :8].double()
    x = x - x.mean(0)
    one, other = STRINGS.index("u"), STRINGS.index("E")
    found = shown["cosines"][2][shown["tokens"].index("u")][shown["tokens"].index("E")]
    assert found == pytest.approx(float(torch.cosine_similarity(x[one], x[other], dim=0)), abs=6e-4)


def test_settings_are_the_losses_own():
    groups = {"kind": "emergent", "minimum_similarity": 0.5, "minimum_group_size": 4}
    rewrite, _, model = nested({"ffn": None, "head": [8], "groups": groups})
    told = rewrite.diagnose(model, (), STRINGS)
    assert (told["minimum_similarity"], told["minimum_group_size"]) == (0.5, 4)


def test_without_prefixes_there_is_nothing_to_tell():
    rewrite, _, model = nested({"ffn": [0.5], "depth": [3]})
    assert rewrite.diagnose(model, (), STRINGS) is None
    alone = from_record({"rewrite": "matryoshka", "head": [8], "only": {"head": 8}})
    assert alone.diagnose(toy_gpt2(), (), STRINGS) is None
