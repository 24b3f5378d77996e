"""Plain records become typed values or one line about what is wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest

from compressor.errors import UserError, suggestion, unknown
from compressor.fields import from_record, parameter_count, typed


@dataclass(frozen=True)
class Thing:
    n: int = 1
    share: float = 0.5
    tie: bool = False
    start: int | Literal["best"] | None = None
    rows: list = ()  # type: ignore[assignment]


def test_values_of_the_right_type_are_taken():
    made = from_record(Thing, {"n": 4, "share": 1, "tie": True, "start": "best", "rows": [1]}, "thing")
    assert made == Thing(4, 1.0, True, "best", [1]) and isinstance(made.share, float)
    assert from_record(Thing, {"start": None}, "thing") == Thing()


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"n": "4"}, "thing: n is '4'; allowed: a whole number"),
        ({"n": 4.0}, "thing: n is 4.0; allowed: a whole number"),
        ({"n": True}, "thing: n is True; allowed: a whole number"),
        ({"share": "much"}, "allowed: a number"),
        ({"share": False}, "allowed: a number"),
        ({"share": float("nan")}, "allowed: a number"),
        ({"share": float("inf")}, "allowed: a number"),
        ({"tie": 1}, "allowed: true or false"),
        ({"tie": "no"}, "allowed: true or false"),
        ({"start": "worst"}, "start is 'worst'; allowed: a whole number, best, null"),
        ({"start": True}, "start is True"),
        ({"rows": "abc"}, "allowed: a list"),
        ({"rank": 4}, "unknown key of thing 'rank'; allowed: n, rows, share, start, tie"),
        ({"satrt": 4}, "unknown key of thing 'satrt' (did you mean 'start'?)"),
        ({3: 4}, "unknown key of thing '3'"),
    ],
)
def test_everything_else_is_refused_in_one_line(record, said):
    with pytest.raises(UserError) as error:
        from_record(Thing, record, "thing")
    assert said in str(error.value) and "\n" not in str(error.value)


def test_single_values():
    assert typed("owner", "key", {"a": 1}, dict[str, int]) == {"a": 1}
    with pytest.raises(UserError, match="allowed: a word, a mapping"):
        typed("owner", "key", 3, str | dict[str, str])


def test_suggestions_are_near_words_only():
    assert suggestion("rnak", ["rank", "n"]) == " (did you mean 'rank'?)"
    assert suggestion("quantise", ["rank", "n"]) == ""
    assert str(unknown("thing", "b", ["c", "a"])) == "unknown thing 'b'; allowed: a, c"


@pytest.mark.parametrize(
    ("given", "count"),
    [
        ("100M", 100_000_000),
        ("1.2e8", 120_000_000),
        (1.2e8, 120_000_000),
        (81_912_576, 81_912_576),
        ("81,912,576", 81_912_576),
        ("0.1b", 100_000_000),
        ("350 k", 350_000),
    ],
)
def test_numbers_of_parameters(given, count):
    assert parameter_count("size", given) == count


@pytest.mark.parametrize("given", ["many", "", "-3M", "0", "1e400", "100MB", None, "1.2.3M"])
def test_what_is_no_number_of_parameters(given):
    with pytest.raises(UserError, match=r"^size=.* is no number of parameters; allowed: such as 100M or 1\.2e8"):
        parameter_count("size", given)
