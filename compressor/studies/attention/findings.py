"""What study attention found, in sentences made of its figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import median

from .figures import Cost, Measured, crossing
from .kinds import BLOCK, KNOBS, NO_MASS, NO_WINDOW, SDPA, UNIFORM, VANILLA, Kind


def findings(measured: Measured) -> list[str]:
    return [
        _against_vanilla(measured),
        _faster(measured),
        _smaller(measured),
        _cache(measured),
        _equal_cache(measured),
        _newton(measured),
        _log_mass(measured),
        _favor(measured),
        _useless(measured),
    ]


# ---------------------------------------------------------------- time and memory


def _against_vanilla(measured: Measured) -> str:
    longest = measured.lengths[-1]
    found = measured.at(longest)
    base = found[VANILLA]
    told = [
        f"{kind.name} {base.median_ms / found[kind].median_ms:.1f}x and {base.peak_bytes / found[kind].peak_bytes:.1f}x"
        for kind in measured.main
        if kind != VANILLA
    ]
    return f"Against explicit T x T attention at {longest:,} tokens, faster and with less memory: {'; '.join(told)}."


def _faster(measured: Measured) -> str:
    told = _since(measured, lambda cost: cost.median_ms)
    return f"Faster than sdpa, and share of its time at {measured.lengths[-1]:,} tokens: {told}."


def _smaller(measured: Measured) -> str:
    told = _since(measured, lambda cost: cost.peak_bytes)
    return f"Less memory of a forward pass than sdpa, and share of it at {measured.lengths[-1]:,} tokens: {told}."


def _since(measured: Measured, figure: Callable[[Cost], float]) -> str:
    """From which length on the figure of each kind is below that of sdpa."""
    base = [(cost.length, figure(cost)) for cost in measured.course(SDPA)]
    told = []
    for kind in _approximate(measured.main):
        own = [(cost.length, figure(cost)) for cost in measured.course(kind)]
        at = crossing(own, base)
        if at is None:
            words = "nowhere"
        elif at <= base[0][0]:
            words = f"from {base[0][0]:,} on"
        else:
            words = f"from about {float(f'{at:.2g}'):,.0f} on"  # more figures are not in it
        told.append(f"{kind.name} {words} ({own[-1][1] / base[-1][1]:.2g})")
    return "; ".join(told)


def _cache(measured: Measured) -> str:
    last = measured.at(measured.lengths[-1])
    told = [
        f"{kind.name} {last[kind].cache_bytes / last[SDPA].cache_bytes:.2g}" for kind in _approximate(measured.main)
    ]
    return f"Cache at {measured.lengths[-1]:,} tokens, as a share of that of exact attention: {'; '.join(told)}."


# ---------------------------------------------------------------- likeness


def _equal_cache(measured: Measured) -> str:
    """linformer against the performer that does best with no larger a state."""
    pairs = []
    for found in map(measured.on, measured.heads):
        useful = [found[kind] for kind in _approximate(found) if not kind.lacking]
        for match in useful:
            rivals = [
                other.frobenius
                for other in useful
                if other.kind.family == "performer" and other.cache_bytes <= match.cache_bytes
            ]
            if match.kind.family == "linformer" and rivals:
                pairs.append((match.frobenius, min(rivals)))
    nearer = sum(own < other for own, other in pairs)
    best = [
        f"{heads} {least.kind.name} {least.frobenius:.2f}"
        for heads in measured.heads
        for found in [measured.on(heads)]
        for least in [
            min(
                (
                    found[kind]
                    for kind in _approximate(found)
                    if not kind.lacking and found[kind].cache_bytes <= found[SDPA].cache_bytes
                ),
                key=lambda match: match.frobenius,
                default=found[SDPA],
            )
        ]
    ]
    return (
        f"linformer is nearer to the exact matrix than every performer with no larger a cache in {nearer} of "
        f"{len(pairs)} settings. Nearest of all with no larger a cache than exact attention: {'; '.join(best)}."
    )


def _newton(measured: Measured) -> str:
    """The pseudo-inverse against the means of values alone."""
    told = []
    for where in ("random heads", "the model's heads"):
        chosen = [heads for heads in measured.heads if heads.startswith("random") == (where == "random heads")]
        said = []
        for name, words in (("frobenius", "matrix"), ("output_error", "output")):
            ratios = [
                getattr(found[kind], name) / getattr(found[Kind(kind.family, kind.size, "none")], name)
                for found in map(measured.on, chosen)
                for kind in found
                if kind.form == "newton"
            ]
            worse = sum(ratio > 1 for ratio in ratios)
            said.append(
                f"{words} error larger in {worse} of {len(ratios)} (ratio {min(ratios):.2f} to {max(ratios):.2f}, "
                f"median {median(ratios):.2f})"
            )
        told.append(f"on {where} {' and '.join(said)}")
    return f"The pseudo-inverse (nystromformer newton) against plain means of landmarks: {'; '.join(told)}."


def _log_mass(measured: Measured) -> str:
    fewest = measured.settings["slots"][0]
    own, without = Kind("linformer", fewest), Kind("linformer", fewest, lacking=NO_MASS)
    told, halved = [], 0
    for heads in measured.heads:
        found = measured.on(heads)
        before, after = found[without].output_error, found[own].output_error
        told.append(f"{heads} {before:.2f} to {after:.2f}")
        halved += after <= before / 2
    said = (
        f"Log-mass: output error of {own.name} without it and with it: {'; '.join(told)}. At least halved in "
        f"{halved} of {len(told)}"
    )
    return f"{said}; elsewhere one mean stands badly for tokens that differ." if halved < len(told) else f"{said}."


def _favor(measured: Measured) -> str:
    """FAVOR+ alone against no attention at all."""
    told, no_better = [], 0
    for heads in measured.heads:
        found = measured.on(heads)
        alone = min(match.variation for kind, match in found.items() if kind.lacking == NO_WINDOW)
        no_better += alone >= found[UNIFORM].variation
        told.append(f"{heads} {alone:.2f} against {found[UNIFORM].variation:.2f}")
    return (
        f"FAVOR+ without an exact block is no nearer in total variation than uniform attention in {no_better} of "
        f"{len(told)}: {'; '.join(told)}."
    )


def _useless(measured: Measured) -> str:
    told = []
    for heads in measured.heads:
        found = measured.on(heads)
        least = found[BLOCK].frobenius
        worse = [kind.name for kind in _approximate(found) if not kind.lacking and found[kind].frobenius >= least]
        if worse:
            told.append(f"{heads}: {', '.join(worse)}")
    return f"No nearer in their matrices than the exact block alone: {'; '.join(told) or 'none'}."


def _approximate(found: Iterable[Kind]) -> list[Kind]:
    return [kind for kind in found if kind.family in KNOBS]
