"""Who is where, who is whose relative, what follows from a rule: answers that take several steps."""

from __future__ import annotations

from itertools import pairwise

from compressor.demo import lexicon
from compressor.demo.lexicon import DAYS, LISTS, MONTHS, OBJECTS, number
from compressor.demo.writer import TOWNS, Dice, Person, Writer, finish, listed, people


def tracking(dice: Dice) -> str:
    """Things are carried from room to room; the questions ask where they have come to be."""
    group = people(dice, 3, dice.pick(TOWNS))
    things, rooms = dice.sample(tuple(OBJECTS), 3), dice.sample(lexicon.ROOMS, 4)
    at_thing = {thing: dice.pick(rooms) for thing in things}
    at_person = {person.name: dice.pick(rooms) for person in group}
    w = Writer(dice)
    lines = [w("the {o} was in the {r}", o=thing, r=room) for thing, room in at_thing.items()]
    lines = [", ".join(lines[:2]) + " and " + lines[2] + "."]
    lines.append(listed([f"{p.name} the {p.job} was in the {at_person[p.name]}" for p in group]) + ".")
    for _ in range(dice.between(4, 7)):
        person: Person = dice.pick(group)
        w.facts.update(p=person, who=dice.pick((person.name, "the " + person.job)))
        here = at_person[person.name]
        room = dice.pick([r for r in rooms if r != here])
        carried = [thing for thing in things if at_thing[thing] == here]
        if carried and dice.chance(0.7):
            thing = dice.pick(carried)
            lines.append(w("{who} [took|carried|brought] the {o} from the {h} to the {r}.", o=thing, h=here, r=room))
            at_thing[thing] = room
        else:
            lines.append(w("{who} went from the {h} to the {r}.", h=here, r=room))
        at_person[person.name] = room
    for _ in range(dice.between(2, 4)):
        w.facts.update(p=(person := dice.pick(group)), o=(thing := dice.pick(things)))
        inside = [p.name for p in group if at_person[p.name] == at_thing[thing]]
        lines.append(
            w.one_of(
                (
                    "where is the {o} now? In the {r}.",
                    "where is the {p.job}? {p.name} is in the {h}.",
                    "who is [with|near] the {o}? {inside}.",
                    "how many things are in the {h}? {count}.",
                ),
                r=at_thing[thing],
                h=at_person[person.name],
                inside=listed(inside) if inside else "Nobody",
                count=number(sum(room == at_person[person.name] for room in at_thing.values())),
            )
        )
    return finish(" ".join(lines))


def relations(dice: Dice) -> str:
    """Neighbours and relatives in a chain, then questions of two or three steps along it."""
    group = people(dice, dice.between(4, 5), dice.pick(TOWNS))
    w = Writer(dice, t=group[0].town)
    links: list[tuple[Person, str, Person]] = []
    for left, right in pairwise(group):
        words = (
            ("sister", "brother")
            if dice.chance(0.4)
            else dice.pick((("neighbour",) * 2, ("teacher",) * 2, ("cousin",) * 2, ("friend",) * 2))
        )
        links.append((left, words[0] if left.woman else words[1], right))
    lines = [w("[this is|here is|we shall tell] who is who in {t.name}.")]
    for person in dice.shuffled(group):
        lines.append(w("{p.name} is [a|the] {p.job}[ of {p.years}| and has a {colour} {cloth}||].", p=person))
    for left, word, right in dice.shuffled(links):
        lines.append(
            w(
                "{a} is the {word} of {b}.",
                word=word,
                a=dice.pick((left.name, "the " + left.job)),
                b=dice.pick((right.name, "the " + right.job)),
            )
        )
    for _ in range(dice.between(3, 4)):
        start = dice.between(0, len(links) - 1)
        stop = min(len(links) - 1, start + dice.between(0, 2))
        chain = f"{dice.pick((links[stop][2].name, 'the ' + links[stop][2].job))}"
        for _left, word, _right in reversed(links[start : stop + 1]):
            chain = f"the {word} of {chain}"
        answer = links[start][0]
        lines.append(
            w(
                "who is {chain}? {a.name}, the {a.job}."
                if dice.chance(0.6)
                else "what does {chain} do? {a.he} is a {a.job}: {a.name}.",
                chain=chain,
                a=answer,
            )
        )
    return finish(" ".join(lines))


def calendar(dice: Dice) -> str:
    """Appointments told by their distance in days or months from one another."""
    p, q = people(dice, 2, dice.pick(TOWNS))
    day, month = dice.between(0, 6), dice.between(0, 11)
    w = Writer(dice, p=p, q=q, t=p.town, d=DAYS[day], m=MONTHS[month])
    lines = [w("[today is {d}|it is a {d} in {m}|{p.name} the {p.job} arrived in {t.name} on a {d} in {m}].")]
    current = day
    for _ in range(dice.between(4, 6)):
        step = dice.between(1, 6)
        w.facts.update(
            d=DAYS[current],
            n=number(step),
            e=DAYS[(current + step) % 7],
            days=w("[{n} days|{n} days and no more]", n=number(step)) if step > 1 else "one day",
            far=MONTHS[(month + step) % 12],
            mo=MONTHS[month],
            before=DAYS[(current - 1) % 7],
            after=DAYS[(current + 1) % 7],
        )
        kind = dice.between(0, 4)
        if kind < 3:
            lines.append(
                w.one_of(
                    (
                        "{days} after {d}, on {e}, {p.name} [met {q.name}|went to the {q.place}|{p.made} {p.goods}].",
                        "{q.name} came {days} later, which was a {e}, with {q.his} {q.tool}.",
                        "the {q.job} had to wait {days}, from {d} to {e}.",
                    )
                )
            )
            current = (current + step) % 7
        elif kind == 3:
            lines.append(w("the day before {d} is {before} and the day after {d} is {after}."))
        else:
            lines.append(
                w("{n} [months|full months] after {mo}, in {far}, the {q.goods} were [sold|gone|ready].")
                if step > 1
                else w("the month after {mo} is {far}.")
            )
            month = (month + step) % 12
    return finish(" ".join(lines))


def logic(dice: Dice) -> str:
    """Rules about groups, members of them, and what follows or does not."""
    a, b, c = people(dice, 3, dice.pick(TOWNS))
    good, bad, mood = dice.pick(LISTS["goodadj"]), dice.pick(LISTS["badadj"]), dice.pick(LISTS["mood"])
    colour, other = dice.sample(lexicon.COLOURS, 2)
    w = Writer(dice, a=a, b=b, c=c, t=a.town, x=good, y=bad, z=mood, k=colour, l=other, v=dice.pick(LISTS["cloth"]))
    rules = [
        w("every {a.job} in {t.name} is {x}."),
        w("no {b.job} is {x}, but every {b.job} is {y}."),
        w("whoever is {x} wears a {k} {v}, and whoever is {y} wears a {l} {v}."),
        w("nobody with a {k} {v} is ever {z}."),
    ]
    lines = [*dice.shuffled(rules), w("{a.name} is a {a.job} from {t.name}, and {b.name} is a {b.job}.")]
    if dice.chance(0.5):
        lines.append(w("{c.name}, the {c.job}, is {z}."))
    lines += w.some(
        (
            "is {a.name} {x}? Yes, because {a.he} is a {a.job}.",
            "is {b.name} {x}? No, {b.he} is a {b.job}, and so {b.he} is {y}.",
            "what does {a.name} wear? A {k} {v}.",
            "what does {b.name} wear? A {l} {v}.",
            "can {a.name} be {z}? No, for {a.his} {v} is {k}.",
            "whose {v} is {k}? {a.name}'s.",
            "whose {v} is {l}? {b.name}'s.",
            "who of the two is {y}? {b.name}, the {b.job}.",
        ),
        dice.between(3, 6),
    )
    return finish(" ".join(lines))
