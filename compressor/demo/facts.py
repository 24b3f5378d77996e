"""Facts of the world, the same in every document: what a model can only know by heart."""

from __future__ import annotations

from compressor.demo.lexicon import ANIMALS, FRUIT, JOBS, LEGS, OBJECTS, plural
from compressor.demo.writer import TOWNS, Dice, Writer, finish


def facts(dice: Dice) -> str:
    """Two or three short entries of an encyclopaedia: what they say of a thing is the same in every document."""
    return finish(
        "\n".join(dice.pick((_animal, _town, _trade, _animal, _town))(dice) for _ in range(dice.between(2, 3)))
    )


def _animal(dice: Dice) -> str:
    name = dice.pick(tuple(ANIMALS))
    kind, home, food, sound = ANIMALS[name]
    same = [other for other in ANIMALS if other != name and ANIMALS[other][0] == kind]
    neighbours = [other for other in ANIMALS if other != name and ANIMALS[other][1] == home]
    w = Writer(
        dice,
        a=name,
        many=plural(name),
        kind=kind,
        home=home,
        food=food,
        sound=sound,
        legs=LEGS[kind],
        same=dice.pick(same) if same else name,
        near=plural(dice.pick(neighbours)) if neighbours else "spiders",
    )
    lines = [
        "the {a}, a {kind} of the {home}, lives on {food}.",
        "like every {kind}, the {a} has {legs} legs.",
        "{many} are found in {home}, where {near} live too.",
        "the {same} is a {kind} as well.",
        "[in {season}|when {weather} comes], {many} [that live|living] in the {home} [look for|eat] {food}.",
    ] + (["at night, you may hear how the {a} {sound}."] if sound else [])
    return " ".join(w.some(lines, dice.between(3, 5)))


def _town(dice: Dice) -> str:
    town = dice.pick(TOWNS)
    same = [t for t in TOWNS if t.river == town.river and t is not town]
    county = [t for t in TOWNS if t.county == town.county and t is not town]
    w = Writer(dice, t=town, s=dice.pick(same or county), c=dice.pick(county))
    return " ".join(
        w.some(
            (
                "{t.name} is a town in {t.county}.",
                "the {t.river} flows through {t.name}, [past|under] the {t.building}.",
                (
                    "{t.name} [makes|sells] {t.product}, and the {t.building} [was built|"
                    "was paid for] with {t.product} money."
                ),
                "[people|travellers] who follow the {t.river} from {t.name} come to {s.name}, which is in {s.county}.",
                "{c.name}, which is also in {c.county}, makes {c.product}, while {t.name} makes {t.product}.",
                "the {t.building} of {t.name} stands by the {t.river}, the {c.building} of {c.name} by the {c.river}.",
            ),
            dice.between(3, 5),
        )
    )


def _trade(dice: Dice) -> str:
    one, two = dice.sample(tuple(JOBS), 2)
    o, p = dice.sample(tuple(OBJECTS), 2)
    f = dice.pick(tuple(FRUIT))
    w = Writer(dice, o=o, p=p, m=OBJECTS[o], n=OBJECTS[p], f=f, c=FRUIT[f], x=one, y=two)
    w.facts.update(xp=JOBS[one][0], xt=JOBS[one][1], yt=JOBS[two][1], yp=JOBS[two][0], xg=JOBS[one][3], xm=JOBS[one][2])
    return " ".join(
        w.some(
            (
                "a {x} works [in|at] the {xp} and needs a {xt}; a {y} works [in|at] the {yp} and needs a {yt}.",
                "the {x} and the {y} went to work: one took the {xt}, the other the {yt}.",
                "the {xg} were {xm} by a {x}.",
                "a {o} is made of {m}, a {p} of {n}.",
                "a ripe {f} is {c}.",
            ),
            dice.between(2, 4),
        )
    )
