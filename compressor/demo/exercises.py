"""Sums, lists, recipes and sentences of far agreement: text whose next word must be worked out."""

from __future__ import annotations

from compressor.demo import lexicon
from compressor.demo.lexicon import ANIMALS, FOODS, FRUIT, LISTS, number, plural
from compressor.demo.writer import TOWNS, Dice, Writer, finish, listed, people


def sums(dice: Dice) -> str:
    """Small sums in words, bare and in a story, each chained to the one before."""
    p, q = people(dice, 2)
    thing = dice.pick(tuple(FRUIT) if dice.chance(0.5) else tuple(LISTS["thing"]))
    have = dice.between(5, 40)
    w = Writer(dice, p=p, q=q, g=plural(thing), t=p.town)
    lines = [w("{p.name} has {n} {g}.", n=number(have))]
    for _ in range(dice.between(3, 5)):
        step = dice.between(1, min(have, 20))
        w.facts.update(n=number(step), old=number(have))
        if have - step >= 1 and dice.chance(0.5):
            have -= step
            lines.append(
                w.one_of(
                    (
                        "{p.he} gives {n} to {q.name}, the {q.job}",
                        "{p.he} loses {n} by the {t.river}",
                        "{q.name} {verb} {n} of them",
                        "{p.he} sells {n} on {day}",
                    ),
                    verb=w("[takes|breaks|hides]"),
                )
                + w(": {old} minus {n} is {now}.", now=number(have))
            )
        else:
            have += step
            lines.append(
                w.one_of(
                    (
                        "{p.he} finds {n} more in the {room}",
                        "{q.name} brings {p.him} {n} {g}",
                        "then {p.he} buys {n}",
                        "{t.name} market gives {p.him} {n}",
                    )
                )
                + w(": {old} plus {n} is {now}.", now=number(have))
            )
    lines.append(w("so {p.name} has {now} {g} now.", now=number(have)))
    for _ in range(dice.between(2, 5)):
        a, b = dice.between(2, 50), dice.between(2, 12)
        lines.append(
            dice.pick(
                (
                    f"{number(a)} plus {number(b)} is {number(a + b)}.",
                    f"{number(a + b)} minus {number(a)} is {number(b)}.",
                    f"{number(b)} times {number(a % 12 + 1)} is {number(b * (a % 12 + 1))}.",
                    f"half of {number(2 * a)} is {number(a)}.",
                    f"after {number(a)} comes {number(a + 1)}, and before it {number(a - 1)}.",
                    f"{number(max(a, b + 1))} is more than {number(min(a, b) if a != b else b)}.",
                )
            )
        )
    return finish(" ".join(lines))


def lists(dice: Dice) -> str:
    """A list, then the same in another order, a part of it, or its length."""
    groups = {
        "animals": tuple(ANIMALS),
        "foods": tuple(FOODS),
        "tools": tuple(lexicon.TOOLS),
        "trees": LISTS["tree"],
        "colours": LISTS["colour"],
        "metals": LISTS["metal"],
        "rooms": LISTS["room"],
        "games": LISTS["game"],
    }
    kinds = dice.sample(tuple(groups), 2)
    words = dice.sample(groups[kinds[0]], dice.between(2, 5)) + dice.sample(groups[kinds[1]], dice.between(1, 3))
    words = list(dict.fromkeys(words)) if dice.chance(0.5) else dice.shuffled(tuple(dict.fromkeys(words)))
    p = people(dice, 1)[0]
    w = Writer(dice, p=p)
    lines = [w("[{p.name} made a list|the list of the {p.job}|words to learn for {p.name}]: ") + ", ".join(words) + "."]
    first, second = ([word for word in words if word in groups[kind]] for kind in kinds)
    index = dice.between(0, len(words) - 2)
    for task in dice.shuffled(range(8))[: dice.between(4, 6)]:
        lines.append(
            (
                "backwards: " + ", ".join(reversed(words)) + ".",
                "in order of the alphabet: " + ", ".join(sorted(words)) + ".",
                f"the {kinds[0]} among them: " + ", ".join(first) + ".",
                f"the {kinds[1]} among them: " + ", ".join(second) + ".",
                f"there are {number(len(words))} words in the list.",
                f"the {lexicon.ORDINALS[index]} word is {words[index]}.",
                f"after {words[index]} comes {words[index + 1]}.",
                "every second word: " + ", ".join(words[::2]) + ".",
            )[task]
        )
    return finish("\n".join(lines))


def recipe(dice: Dice) -> str:
    """Ingredients with amounts, the steps that use each once, and the amounts for more guests."""
    p = people(dice, 1)[0]
    items = dice.sample(FOODS, dice.between(3, 5))
    amounts = [dice.between(1, 9) for _ in items]
    guests, times = dice.between(2, 6), dice.between(2, 3)
    units = [dice.pick(("cups", "spoons", "pinches", "bowls")) for _ in items]
    dish = dice.pick(("soup", "pie", "cake", "stew", "bread", "pudding", "salad"))

    def amount(count: int, unit: str, item: str) -> str:
        return f"{number(count)} {(unit[:-2] if unit == 'pinches' else unit[:-1]) if count == 1 else unit} of {item}"

    w = Writer(dice, p=p, dish=dish, main=items[0], n=number(guests), t=p.town, m=number(guests * times))
    lines = [w("{main} {dish} as {p.name}, the {p.job} of {t.name}, makes it, for {n}.")]
    lines.append("you need " + listed([amount(*row) for row in zip(amounts, units, items, strict=True)]) + ".")
    verbs = w.some(
        (
            "wash the {i}",
            "chop the {i} {manner}",
            "stir in the {i}",
            "boil the {i} for {mins} minutes",
            "mix the {i} with the {before}",
            "add the {i}",
            "pour the {i} over the {before}",
        ),
        7,
        i="{i}",
        before="{before}",
        mins=number(dice.between(2, 40)),
    )
    steps = [
        verb.format(i=item, before=before)
        for verb, item, before in zip(verbs, items, [items[-1], *items], strict=False)
    ]
    order = ("first", "second", "third", "fourth", "last")
    lines.append(" ".join(f"{order[i] if i + 1 < len(steps) else 'last'}, {step}." for i, step in enumerate(steps)))
    lines.append(
        w("for {m} guests, take ")
        + listed([amount(a * times, u, i) for a, u, i in zip(amounts, units, items, strict=True)])
        + "."
    )
    if dice.chance(0.5):
        lines.append(w("{p.name} serves [it|the {dish}] with {drink} in a {bowl}.", bowl=w("{oldadj} {colour} bowl")))
    return finish("\n".join(lines))


def essay(dice: Dice) -> str:
    """Sentences whose verb agrees with a noun far before it, through relative clauses and passives."""
    p, q = people(dice, 2, dice.pick(TOWNS))
    w = Writer(dice, p=p, q=q, t=p.town)
    lines = [
        w(
            "[some thoughts on {abstract}, by {p.full}, {p.job}.|{p.full} the {p.job} writes about {t.name}.|"
            "notes of a {p.job}.]"
        )
    ]
    for _ in range(dice.between(5, 8)):
        many = dice.chance(0.5)
        noun = dice.pick(LISTS[dice.pick(("animal", "building", "object", "tree", "flower", "tool"))])
        second, many_two = dice.pick(LISTS["nature"]), dice.chance(0.5)
        w.facts.update(
            n=plural(noun) if many else noun,
            m=plural(second) if many_two else second,
            be="are" if many else "is",
            have="have" if many else "has",
            do="do" if many else "does",
            was="were" if many else "was",
            s="" if many else "s",
            be2="are" if many_two else "is",
            it="they" if many else "it",
            its="their" if many else "its",
            that="those" if many else "that",
        )
        lines.append(
            w.one_of(
                (
                    "the {n} that stand{s} near the {m} of {t.name} {have} {often} been {oldadj}.",
                    "the {n} by the {m}, which {be2} {bigadj}, {be} {smalladj}, and {it} {do} not know it.",
                    "{have} the {n} behind the {m} {often} been praised by the {crowd}? {it_cap}, I think, {have} not.",
                    (
                        "if the {n} of the {crowd} {was} {colour}, {its} price would be [low|"
                        "high], but {it} {be} {colour}."
                    ),
                    "what the {q.job} says about the {n} near the {m} {q_be} true: {it} {be} {newadj}.",
                    "not only the {n} but also the {weather} over the {m} make{z} {q.name} {mood}.",
                    "{that} {n}, {was} {it} not {saw_by} by {q.name} before the {m} {be2} seen?",
                    "there {be} {n} in {t.county} of which {crowd} say that {it} {have} no {virtue}.",
                    (
                        "the {n} {was} [painted|moved|sold|praised] by the {crowd} who live by the {m}, though "
                        "{it} {be} {oldadj}."
                    ),
                ),
                it_cap=w("{it}"),
                q_be="is",
                saw_by=w("[painted|loved|sold]"),
                z="s",
            )
        )
        if dice.chance(0.3):
            lines.append(w("{abstract} is like a {bigadj} {nature}: {crowd} {often} see it, and {often} cross it."))
    return finish(" ".join(lines))
