"""Windows of consecutive blocks: what a rewrite is applied to."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import UserError, unknown

ANCHORS = ("first", "middle", "last")


@dataclass(frozen=True)
class Window:
    """`n` consecutive blocks from `start`; `anchor` is the layer whose neuron order the others take on."""

    start: int
    n: int
    anchor: int

    @property
    def layers(self) -> range:
        return range(self.start, self.start + self.n)


def middle_start(n_layer: int, n: int) -> int:
    """The start of the window of n in the middle of the model."""
    return (n_layer - n) // 2


def anchor_layer(anchor: str | int, start: int, n: int) -> int:
    """The anchor of a window as a layer. Raises UserError for an unknown rule or a layer outside the window."""
    if isinstance(anchor, int):
        if not start <= anchor < start + n:
            raise UserError(
                f"anchor {anchor} is outside the window; allowed: {start} to {start + n - 1}, or {', '.join(ANCHORS)}"
            )
        return anchor
    if anchor not in ANCHORS:
        raise unknown("anchor", str(anchor), ANCHORS)
    return {"first": start, "middle": start + (n - 1) // 2, "last": start + n - 1}[anchor]


def window(n_layer: int, start: int, n: int, anchor: str | int = "middle") -> Window:
    """One window. Raises UserError when it does not lie within the model's layers."""
    check_length(n_layer, n)
    if not 0 <= start <= n_layer - n:
        raise UserError(f"start {start} with n {n} is out of range for {n_layer} layers; allowed: 0 to {n_layer - n}")
    return Window(start, n, anchor_layer(anchor, start, n))


def tiles(n_layer: int, n: int, anchor: str | int = "middle") -> list[Window]:
    """The whole model in groups of n from layer 0; the last may be shorter, a rest of one layer stays as it is."""
    check_length(n_layer, n)
    if isinstance(anchor, int):
        raise UserError(f"anchor {anchor} with scope=tile: give a rule, one of {', '.join(ANCHORS)}")
    groups = [window(n_layer, start, min(n, n_layer - start), anchor) for start in range(0, n_layer, n)]
    return [group for group in groups if group.n > 1 or n == 1]


def check_length(n_layer: int, n: int) -> None:
    """Raises UserError unless a window of n fits into n_layer layers."""
    if not 1 <= n <= n_layer:
        raise UserError(f"n {n} is out of range for a model of {n_layer} layers; allowed: 1 to {n_layer}")
