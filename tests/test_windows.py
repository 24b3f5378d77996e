"""Windows, anchors and tiles against lists written down by hand."""

from __future__ import annotations

import pytest

from compressor.errors import UserError
from compressor.windows import Window, anchor_layer, middle_start, tiles, window


def test_a_window_is_n_consecutive_layers():
    assert list(window(12, 4, 4).layers) == [4, 5, 6, 7]
    assert window(12, 8, 4) == Window(8, 4, 9)
    assert list(window(12, 0, 12).layers) == list(range(12))


@pytest.mark.parametrize(
    ("n_layer", "n", "start"), [(12, 4, 4), (12, 1, 5), (12, 12, 0), (6, 3, 1), (5, 2, 1), (1, 1, 0)]
)
def test_the_middle_window(n_layer, n, start):
    assert middle_start(n_layer, n) == start
    before, behind = start, n_layer - n - start
    assert behind - before in (0, 1)


@pytest.mark.parametrize(("anchor", "layer"), [("first", 4), ("middle", 5), ("last", 7), (4, 4), (6, 6), (7, 7)])
def test_anchors_of_layers_4_to_7(anchor, layer):
    assert anchor_layer(anchor, 4, 4) == layer == window(12, 4, 4, anchor).anchor


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_the_middle_anchor_is_start_plus_half_of_n_minus_1(n):
    assert anchor_layer("middle", 3, n) == 3 + (n - 1) // 2


def test_tiles_cover_the_model_from_layer_0():
    assert [list(group.layers) for group in tiles(12, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert [list(group.layers) for group in tiles(12, 5)] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]]
    assert [list(group.layers) for group in tiles(7, 3)] == [[0, 1, 2], [3, 4, 5]]  # a rest of one has no partner
    assert [list(group.layers) for group in tiles(3, 1)] == [[0], [1], [2]]
    assert [group.anchor for group in tiles(12, 5, "last")] == [4, 9, 11]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: window(12, 9, 4), "start 9 with n 4 is out of range for 12 layers; allowed: 0 to 8"),
        (lambda: window(12, -1, 4), "allowed: 0 to 8"),
        (lambda: window(12, 0, 13), "n 13 is out of range for a model of 12 layers; allowed: 1 to 12"),
        (lambda: window(12, 0, 0), "allowed: 1 to 12"),
        (lambda: tiles(12, 13), "allowed: 1 to 12"),
        (lambda: window(12, 4, 4, 8), "anchor 8 is outside the window; allowed: 4 to 7, or first, middle, last"),
        (lambda: window(12, 4, 4, 3), "anchor 3 is outside the window"),
        (lambda: window(12, 4, 4, "midle"), "unknown anchor 'midle' (did you mean 'middle'?)"),
        (lambda: tiles(12, 4, 3), "anchor 3 with scope=tile: give a rule"),
    ],
)
def test_what_does_not_lie_in_the_model_is_refused(call, said):
    with pytest.raises(UserError) as error:
        call()
    assert said in str(error.value) and "\n" not in str(error.value)
