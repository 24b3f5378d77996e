"""The command line is split into options and key=value, wherever they stand."""

from __future__ import annotations

from pathlib import Path

import pytest

from compressor.cli import COMMANDS
from compressor.commands import build
from compressor.errors import UserError
from compressor.options import parse


def taken(line):
    return parse(line.split())


def refusal(line) -> str:
    with pytest.raises(UserError) as error:
        parse(line.split())
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "line",
    [
        "plan soft_shared rank=16 model=m",
        "plan rank=16 soft_shared model=m",
        "plan rank=16 model=m soft_shared --json",
        "plan --rank 16 soft_shared model=m",
        "plan --rank=16 --json soft_shared --model m",
        "plan --json rank=16 --seed 4 soft_shared model=m",
    ],
)
def test_keys_may_stand_anywhere(line):
    options, overrides = parse(line.split())
    assert options.command == "plan" and options.recipe == "soft_shared" and overrides == ["rank=16", "model=m"]


def test_options_take_their_own_values_even_with_an_equals_sign():
    options, overrides = taken("rewrite --run a=b --rewrite soft_shared n=3 --start 2 --delta-init svd")
    assert options.run == Path("a=b") and options.start == 2 and overrides == ["n=3", "delta_init=svd"]
    options, overrides = taken("align --model m=x --run=r=s --data d=e")
    assert (options.model, options.run, options.data, overrides) == ("m=x", Path("r=s"), "d=e", [])
    options, _ = taken("benchmark a b --out o --data perplexity=x.txt y.txt --seed 0")
    assert options.models == ["a", "b"] and options.data == ["perplexity=x.txt", "y.txt"] and options.seed == 0


def test_negative_numbers_are_values():
    options, overrides = taken("rewrite --run r --rewrite x --start -1 --rank -2")
    assert options.start == -1 and overrides == ["rank=-2"]


def test_defaults():
    options, overrides = taken("align --model gpt2 --run r")
    assert (options.data, options.max_tokens, options.site, options.method, options.pairs) == (
        "demo",
        4000,
        "pre",
        "activation",
        "chain",
    )
    assert options.seed is None and not (options.force or options.quiet or options.json) and overrides == []


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "the following arguments are required: COMMAND"),
        ("plna x", "unknown command 'plna' (did you mean 'plan'?)"),
        ("plan", "the following arguments are required: RECIPE"),
        ("plan a b", "unrecognized arguments: b"),
        ("plan a --forse", "unknown option --forse (did you mean '--force'?)"),
        ("plan a --rank", "--rank needs a value"),
        ("plan a --rank --json", "--rank needs a value"),
        ("plan a --rank=", "--rank needs a value"),
        ("plan a --8=3", "unknown option --8"),
        ("plan a --seed x", "'x' is no seed"),
        ("plan a --seed -1", "is no seed"),
        (f"plan a --seed {1 << 63}", "is no seed"),
        ("align --model m", "the following arguments are required: --run"),
        ("align --model m --run r --max-tokens 1", "'1'; allowed: whole numbers from 2"),
        ("align --model m --run r --site mid", "invalid choice: 'mid'"),
        ("align --model m --run r --rank 4", "unknown option --rank"),
        ("align --model m --run r rank=4", "unrecognized arguments: rank=4"),
        ("align --model m --run r --modle x", "unknown option --modle (did you mean '--model'?)"),
        ("rewrite --run r --rewrite x --start two", "invalid int value: 'two'"),
        ("rewrite --run", "expected one argument"),
        ("benchmark a --out o --metrics size --suite quick", "not allowed with argument"),
        ("verify a b", "unrecognized arguments: b"),
        ("export a", "required: --dense"),
        ("inspect a --jso", "unknown option --jso (did you mean '--json'?)"),
    ],
)
def test_usage_errors_are_one_line(line, said):
    assert said in refusal(line)


def test_every_command_has_a_function_and_examples():
    _, commands = build()
    assert set(commands) == set(COMMANDS)
    for name, parser in commands.items():
        text = parser.format_help()
        assert f"gpt2-compress {name}" in text and "examples:" in text
        assert {"--device", "--dtype", "--seed", "--force", "--quiet", "--json"} <= set(parser.values)


def test_the_examples_of_the_help_parse():
    parser, commands = build()
    for text in (parser.format_help(), *(command.format_help() for command in commands.values())):
        _, _, examples = text.partition("examples:\n")
        for line in examples.split("\n\n")[0].splitlines():
            if line.strip():
                parse(line.split()[1:])
