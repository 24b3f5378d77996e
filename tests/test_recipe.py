"""Recipes: read strictly, changed by key=value, written so that they come back the same."""

from __future__ import annotations

import dataclasses

import pytest
import yaml

from compressor import recipe
from compressor.errors import UserError
from compressor.recipe import Align, load, parse_yaml

TWO = """
rewrites:
  - {rewrite: soft_shared, n: 2, start: 0}
  - {rewrite: compressed_n, n: 2, start: 4}
"""


@pytest.fixture
def write(tmp_path):
    def write(text, name="mine.yaml"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


def refusal(name, *overrides) -> str:
    with pytest.raises(UserError) as error:
        load(name, overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------- YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),  # PyYAML: a string
        ("1e3", 1000.0),
        ("1.5E+2", 150.0),
        (".5", 0.5),
        ("-3.", -3.0),
        ("+7", 7),
        ("012", 12),  # PyYAML: ten
        ("0o17", 15),
        ("0x1f", 31),
        ("1_000", "1_000"),  # PyYAML: a thousand
        ("1:30", "1:30"),  # PyYAML: ninety
        ("no", "no"),  # PyYAML: false
        ("Yes", "Yes"),
        ("on", "on"),
        ("true", True),
        ("FALSE", False),
        ("tRue", "tRue"),
        ("2024-01-01", "2024-01-01"),  # PyYAML: a date
        ("null", None),
        ("~", None),
        ("", None),
        ("'12'", "12"),
        (".inf", float("inf")),
        ("[1, 2e0, x]", [1, 2.0, "x"]),
        ("{a: no}", {"a": "no"}),
    ],
)
def test_scalars_are_read_as_yaml_1_2_does(text, value):
    got = parse_yaml(text, "here")
    assert got == value and type(got) is type(value)


def test_yaml_elsewhere_is_left_alone():
    assert yaml.safe_load("[no, 012, 1e-4]") == [False, 10, "1e-4"]


@pytest.mark.parametrize(
    "text", ["a: b: c", "[1", "{a: 1, a: 2}", "a: 1\nb: 2\na: 3", "!!int x", "!!float x", "!!timestamp x", "!x y", "\0",
             "!!python/object:os.system {}", "--- 1\n--- 2", "@", "{[1]: 2}"]
)  # fmt: skip
def test_what_is_no_yaml_is_one_line(text):
    with pytest.raises(UserError, match="here is not readable YAML") as error:
        parse_yaml(text, "here")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "word",
    ["1e5", "1e-4", "no", "on", "0o7", "0x1f", "010", "12", "1.5", "true", "null", "~", "", "a: b", "é", ".5", "="],
)
def test_words_that_look_like_something_else_survive_the_dump(write, word):
    chosen = dataclasses.replace(load("soft_shared"), model=word)
    assert load(write(chosen.dump())) == chosen
    assert yaml.safe_load(chosen.dump())["model"] == word  # nor does a YAML 1.1 reader take it for another


# ---------------------------------------------------------------- recipes


def test_every_recipe_that_comes_along_loads_and_survives_its_dump(write):
    assert {"soft_shared", "compressed_4", "compressed_6", "compressed_8", "compressed_10", "merged_4"} <= set(
        recipe.names()
    )
    for name in recipe.names():
        chosen = load(name)
        assert load(write(chosen.dump())) == chosen
        assert chosen.model == "demo" and chosen.align.max_tokens == 4000
        for word in ("compressed", "merged"):
            if name.startswith(word):
                assert chosen.rewrites[0].name == f"{word}_n" and f"_{chosen.rewrites[0].n}" in name


def test_missing_keys_take_their_defaults(write):
    chosen = load(write("rewrites: [{rewrite: soft_shared}]"))
    assert (chosen.model, chosen.data, chosen.seed, chosen.align) == ("demo", "demo", 0, Align())
    soft = chosen.rewrites[0]
    assert (soft.rank, soft.n, soft.anchor, soft.bias, soft.scope) == (8, 4, "middle", "per_layer", "window")


@pytest.mark.parametrize(
    ("override", "get", "value"),
    [
        ("rank=16", lambda r: r.rewrites[0].rank, 16),
        ("rewrites.0.rank=16", lambda r: r.rewrites[0].rank, 16),
        ("start=2", lambda r: r.rewrites[0].start, 2),
        ("anchor=last", lambda r: r.rewrites[0].anchor, "last"),
        ("fold_ln=true", lambda r: r.rewrites[0].fold_ln, True),
        ("align.max_tokens=123", lambda r: r.align.max_tokens, 123),
        ("align={method: weight}", lambda r: r.align, Align(method="weight")),
        ("seed=7", lambda r: r.seed, 7),
        ("model=a=b", lambda r: r.model, "a=b"),
        ("benchmark.metrics=[size]", lambda r: r.benchmark.metrics, ["size"]),
        ("benchmark.data={perplexity: my.txt}", lambda r: r.benchmark.data, {"perplexity": "my.txt"}),
        ("benchmark.baselines=[pruned, gpt2]", lambda r: r.benchmark.baselines, ["pruned", "gpt2"]),
        (
            "data={calibration: a, selection: b, training: c, test: d}",
            lambda r: dict(r.data)["test"] if r.data != "demo" else None,
            "d",
        ),
        ("rewrites=[{rewrite: compressed_n, n: 3}]", lambda r: r.rewrites[0].n, 3),
    ],
)
def test_overrides(override, get, value):
    assert get(load("soft_shared")) != value
    assert get(load("soft_shared", [override])) == value


def test_the_last_override_wins_and_the_file_is_not_touched(write):
    name = write("rewrites: [{rewrite: soft_shared}]")
    assert load(name, ["rank=4", "rank=5"]).rewrites[0].rank == 5
    assert load(name).rewrites[0].rank == 8


def test_with_several_rewrites_a_bare_key_is_an_error_that_names_the_dotted_ones(write):
    name = write(TWO)
    assert "rewrites.0.n, rewrites.1.n" in refusal(name, "n=3")
    assert load(name, ["rewrites.1.n=1"]).rewrites[1].n == 1


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("rnak=4", "unknown key 'rnak' (did you mean 'rank'?)"),
        ("rank=four", "soft_shared: rank is 'four'; allowed: a whole number"),
        ("rank=", "soft_shared: rank is None"),
        ("rank=[", "rank=[ is not readable YAML"),
        ("collapse=fit", "unknown key of soft_shared 'collapse'"),
        ("aling.site=post", "unknown recipe key 'aling' (did you mean 'align'?)"),
        ("align.sit=post", "unknown key of align 'sit' (did you mean 'site'?)"),
        ("align.site=mid", "align: site is 'mid'; allowed: pre, post"),
        ("align.max_tokens=1", "align: max_tokens is 1; allowed: 2 or more"),
        ("align.site.deeper=1", "align.site is 'pre' and has no keys"),
        ("align=3", "align is 3"),
        ("data.test=x", "data is 'demo' and has no keys"),
        ("data={test: x}", "data has no calibration"),
        ("data=3", "data is 3"),
        ("seed=-1", "recipe: seed is -1"),
        ("seed=1.5", "recipe: seed is 1.5"),
        ("model=5", "recipe: model is 5; allowed: a word"),
        ("rewrites.1.rank=4", "rewrites.1 does not exist; allowed: 0 to 0"),
        ("rewrites.x.rank=4", "rewrites.x does not exist"),
        ("rewrites.²=4", "name a key of rewrites"),
        ("rewrites.².rank=4", "rewrites.² does not exist"),
        ("rewrites.0=4", "name a key of rewrites"),
        ("rewrites=[]", "rewrites is []"),
        ("rewrites=[soft_shared]", "rewrites is ['soft_shared']"),
        ("rewrites=[{n: 3}]", "a rewrite needs its name"),
        ("rewrites=[{rewrite: soft-shared}]", "unknown rewrite 'soft-shared' (did you mean 'soft_shared'?)"),
        ("benchmark.metrics=[perplexty]", "unknown metric 'perplexty' (did you mean 'perplexity'?)"),
        ("benchmark.metrics=size", "allowed: a list"),
        ("benchmark.data={imdb: imdb}", "benchmark.data: 'imdb' is not measured here or needs none"),
        ("benchmark.data={size: imdb}", "benchmark.data: 'size' is not measured here or needs none"),
        ("benchmark.data={perplexity: [a]}", "benchmark.data.perplexity is ['a']; allowed: a D as a string"),
        ("benchmark.baselines=pruned", "benchmark: baselines is 'pruned'; allowed: a list"),
        (
            "benchmark.baselines=[pruned, 3]",
            "baselines: ['pruned', 3]; allowed: a list of different pruned, dropped or",
        ),
        ("benchmark.baselines=[gpt2, gpt2]", "allowed: a list of different"),
    ],
)
def test_what_a_recipe_cannot_be_is_said_in_one_line(override, said):
    assert said in refusal("soft_shared", override)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is no mapping of keys"),
        ("- 1", "is no mapping of keys"),
        ("rewrites: [{rewrite: soft_shared}]\nrewrites: []", "stands twice"),
        ("rewrites: [{rewrite: soft_shared}]\nmodle: x", "unknown recipe key 'modle' (did you mean 'model'?)"),
        ("rewrites: [{rewrite: soft_shared, start: best}]\nsearch: null", "start=best needs a search"),
        (
            "rewrites: [{rewrite: soft_shared, start: best}, {rewrite: compressed_n, start: best}]",
            "rewrites.0 and rewrites.1 both have start=best",
        ),
        (
            "rewrites: [{rewrite: dropped_n}, {rewrite: soft_shared, start: best}]",
            "rewrites.0: dropped_n chooses its layers on calibration text, which is after the search for rewrites.1",
        ),
        ("rewrites: [{rewrite: soft_shared}]\nsearch: {strategy: some}", "search: strategy is 'some'"),
        ("rewrites: [{rewrite: soft_shared}]\nsearch: {sizes: [2]}", "sizes are for target_parameters"),
        ("rewrites: [{rewrite: soft_shared}]\nfinetune: {stepz: 2}", "did you mean 'steps'?"),
        ("rewrites: [{rewrite: soft_shared}]\nfinetune: {steps: 0}", "finetune: steps is 0"),
        ("rewrites: [{rewrite: soft_shared}]\nfinetune: {learning_rate: -1}", "learning_rate is -1.0"),
        ("rewrites: [{rewrite: soft_shared}]\nfinetune: {mix: 2}", "mix is 2.0; allowed: 0 to 1"),
        ("rewrites: [{rewrite: soft_shared}]\nfinetune: {evaluate_every: 0}", "evaluate_every is 0"),
        ("rewrites: [{rewrite: soft_shared, rank: no}]", "rank is 'no'"),
        ("model: x", "rewrites is None"),
        ("rewrites: [{rewrite: soft_shared}]\nalign:", "align is None"),
    ],
)
def test_bad_files(write, text, said):
    assert said in refusal(write(text))


def test_recipes_that_are_not_there(tmp_path, write):
    assert "(did you mean 'soft_shared'?)" in refusal("soft_sharde")
    assert "cannot be read" in refusal(str(tmp_path / "none.yaml"))
    (tmp_path / "folder.yaml").mkdir()
    assert "cannot be read" in refusal(str(tmp_path / "folder.yaml"))
    (tmp_path / "latin.yaml").write_bytes(b"model: \xff")
    assert "cannot be read" in refusal(str(tmp_path / "latin.yaml"))


def test_where_a_window_is_searched_for(write):
    def start(text: str):
        return load(write(text)).rewrites[0].start

    assert start("rewrites: [{rewrite: soft_shared}]") == "best"  # the contract's default
    assert start("rewrites: [{rewrite: soft_shared, start: 2}]") == 2
    assert start("rewrites: [{rewrite: soft_shared}]\nsearch: null") is None  # the middle
    assert start("rewrites: [{rewrite: soft_shared, scope: tile}]") is None
    assert start("rewrites: [{rewrite: soft_shared}, {rewrite: compressed_n}]") is None
    load(write("rewrites: [{rewrite: dropped_n, layers: [9]}, {rewrite: soft_shared, start: best}]"))
    off = load(write("rewrites: [{rewrite: soft_shared}]\nsearch: null\nfinetune: null"))
    assert off.search is None and off.finetune is None and "finetune: null" in off.dump()


def test_slices_of_a_recipe(write):
    given = "rewrites: [{rewrite: matryoshka}]\n"
    assert load(write(given)).slices is None and load("matryoshka").slices == "all"
    chosen = load(write(given + "slices: [{ffn: 0.5}, {depth: 8, ffn: [0.5, 256]}]"))
    assert chosen.slices == [{"ffn": 0.5}, {"depth": 8, "ffn": [0.5, 256]}] and load(write(chosen.dump())) == chosen
    assert load("matryoshka", ["slices=null"]).slices is None
    assert "slices: 'some' is not allowed; allowed: null, all, or a list" in refusal("matryoshka", "slices=some")
    assert "slices: {'fnn': 0.5} is not allowed" in refusal("matryoshka", "slices=[{fnn: 0.5}]")
