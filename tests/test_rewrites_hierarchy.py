"""The settings of hierarchies: what a record says, and what is refused."""

from __future__ import annotations

import pytest
from toy import toy_gpt2

from compressor.errors import UserError
from compressor.rewrites import from_record
from compressor.rewrites.hierarchy import Emergent, Imposed, hierarchy


def matryoshka(groups, **more):
    return from_record({"rewrite": "matryoshka", "ffn": None, "head": [16, 8], "groups": groups, **more})


def test_records():
    assert hierarchy({"kind": "imposed"}, 2) == Imposed("form", 0.1)
    assert hierarchy({"kind": "imposed", "scheme": ["form", "kind"]}, 2).schemes(2) == ["form", "kind"]
    assert hierarchy({"kind": "emergent", "weight": 1, "every": 5}, 2) == Emergent(1.0, 0.7, 3, 5)


def test_a_recipe_keeps_every_setting():
    config = toy_gpt2().config
    found = matryoshka({"kind": "emergent"}).resolved(config)
    assert found.record()["groups"] == {
        "kind": "emergent", "weight": 0.1, "minimum_similarity": 0.7, "minimum_group_size": 3, "every": 100,
    }  # fmt: skip
    assert from_record(found.record()) == found == found.resolved(config)
    assert matryoshka(None).resolved(config).groups is None


@pytest.mark.parametrize(
    ("groups", "more", "said"),
    [
        ({}, {}, "kind"),
        ({"kind": "other"}, {}, "imposed"),
        ({"kind": ["imposed"]}, {}, "kind"),
        ({"kind": "imposed", "scheme": [["kind"], "kind"]}, {}, "scheme"),
        ({"kind": "imposed", "every": 3}, {}, "every"),
        ({"kind": "emergent", "scheme": "kind"}, {}, "scheme"),
        ({"kind": "imposed", "scheme": "shape"}, {}, "shape"),
        ({"kind": "imposed", "scheme": [3, "kind"]}, {}, "3"),
        ({"kind": "imposed", "scheme": ["kind"]}, {}, "one for each of 2"),
        ({"kind": "imposed", "weight": -1}, {}, "0 or more"),
        ({"kind": "imposed", "weight": "much"}, {}, "a number"),
        ({"kind": "emergent", "minimum_similarity": 1.5}, {}, "-1 to 1"),
        ({"kind": "emergent", "minimum_group_size": 1}, {}, "2 or more"),
        ({"kind": "emergent", "every": 0}, {}, "1 or more"),
        ({"kind": "imposed"}, {"head": None, "ffn": [0.5]}, "give head or width"),
        ({"kind": "imposed"}, {"only": {"head": 8}}, "not only"),
    ],
)
def test_bad_settings_are_refused_in_one_line(groups, more, said):
    with pytest.raises(UserError) as error:
        matryoshka(groups, **more).check(toy_gpt2().config)
    assert said in str(error.value) and "\n" not in str(error.value)
