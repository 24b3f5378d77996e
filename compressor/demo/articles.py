"""News articles and summaries of them that restate the key facts in other words."""

from __future__ import annotations

import re
from dataclasses import dataclass

from compressor.demo import lexicon
from compressor.demo.lexicon import number
from compressor.demo.stories import speech
from compressor.demo.writer import TOWNS, Dice, Writer, finish, people


@dataclass(frozen=True)
class Event:
    """What can happen: the first sentence, details, what people say, what comes next, and the summary."""

    lead: tuple[str, ...]
    details: tuple[str, ...]
    quotes: tuple[str, ...]
    after: tuple[str, ...]
    summary: tuple[str, ...]


EVENTS = (
    Event(
        (
            "a fire [destroyed|badly damaged] the {b} of {t.name} on {day1} night.",
            "the {b} of {t.name} burned on {day1} after {weather} and lightning.",
        ),
        (
            "the fire began in the {room} and was put out after {n} hours.",
            "{k} people were led out of the {b}, among them {q.full}, a {q.job} of {q.years}.",
            "the {b} had stood by the {t.river} for {big} years.",
            "the damage is put at {cost} coins.",
            "water was carried from the {t.river} by {crowd} and {crowd2}.",
        ),
        (
            "we lost the {b}, but nobody was hurt",
            "the flames were higher than the {tree}s",
            "I saw the smoke from my {s.place}",
        ),
        ("the {b} will be built again by {month2}.", "until {month2}, its visitors will have to go to {u.name}."),
        (
            "Fire [damages|destroys] {b} in {t.name}; {k} people saved and loss put at {cost} coins.",
            "The {b} of {t.name} burned on {day1}; it is to be rebuilt by {month2}, says {p.full}.",
        ),
    ),
    Event(
        (
            "the people of {t.name} have chosen {p.full}, a {p.job}, as their mayor.",
            "{p.full} was elected mayor of {t.name} on {day1}.",
        ),
        (
            "{p.he} won {k} more votes than {q.full}, who had been mayor for {n} years.",
            "{p.name}, who is {p.years}, has worked as a {p.job} since {p.he} was young.",
            "{q.name}, a {q.job} from {u.name}, said {q.he} would return to the {q.place}.",
            "{big} people voted, in spite of the {weather}.",
            "the main question was the price of {t.product}.",
        ),
        ("I shall spend {cost} coins on the {b}", "a {s.job} knows what work is", "{t.name} needs a new {b}"),
        ("the new mayor begins in {month2}.", "{p.his} first task will be the old {b} by the {t.river}."),
        (
            "{p.full}, a {p.job}, elected mayor of {t.name}, beating {q.full} by {k} votes.",
            "{t.name} elects {p.job} {p.full} as mayor; {q.full} leaves after {n} years.",
        ),
    ),
    Event(
        (
            "a new {b} was opened in {t.name} on {day1} by {p.full}.",
            "after {n} years of work, {t.name} has its new {b}.",
        ),
        (
            "it cost {cost} coins, {k} more than was planned.",
            "the {b}, which is made of {metal} and {tree}, stands by the {t.river}.",
            "{q.full}, the {q.job} who drew the plans, was not invited.",
            "more than {big} {crowd} came to see it.",
            "the money came from the {t.product} trade with {u.name}.",
        ),
        (
            "no {b} in {t.county} is finer",
            "I would have made it smaller",
            "the {crowd} will thank us in a hundred years",
        ),
        ("in {month2}, a second {b} will be opened in {u.name}.", "from {month2} on, a visit will cost {n} coins."),
        (
            "New {b} opened in {t.name} after {n} years at a cost of {cost} coins.",
            "{t.name} opens {b} costing {cost} coins; designer {q.full} was not invited.",
        ),
    ),
    Event(
        (
            "thieves took {k} {o}s from the {b} of {t.name} on {day1} night.",
            "{k} {m} {o}s were stolen from the {b} in {t.name}.",
        ),
        (
            "they came through the {room} while the guard, {q.full}, was asleep.",
            "the {o}s, made of {m}, are worth {cost} coins.",
            "{q.name}, a former {q.job} of {q.years}, has lost {q.his} post.",
            "a {colour} {cloth} was found by the {t.river}.",
            "it is the {nth} theft in {t.county} since {month1}.",
        ),
        (
            "I only closed my eyes for {n} minutes",
            "whoever has the {o}s should bring them back",
            "we shall find them before {month2}",
        ),
        ("a reward of {big} coins is offered.", "{p.full}, the {p.job}, leads the search, which has reached {u.name}."),
        (
            "{k} {m} {o}s worth {cost} coins stolen from {b} in {t.name}; guard {q.full} dismissed.",
            "Thieves take {k} {o}s from the {b} of {t.name}; {p.full} leads the search.",
        ),
    ),
    Event(
        (
            "{t.name} beat {u.name} at {g} on {day1}, by {n} to {less}.",
            "the {g} players of {t.name} have won against {u.name}, {n} to {less}.",
        ),
        (
            "{p.full}, by trade a {p.job}, decided the match in the last minute.",
            "for {u.name}, only {q.full}, a {q.job}, played well.",
            "{big} {crowd} watched in the {weather}.",
            "it was the {nth} victory of {t.name} since {month1}.",
            "the winners received a {m} {o} and {cost} coins.",
        ),
        (
            "we played like {crowd}",
            "I thought of my {s.goods} and was calm",
            "{u.name} will be [stronger|weaker] in {month2}",
        ),
        ("they will meet again in {month2} in {u.name}.", "{t.name} now plays against {v.name}."),
        (
            "{t.name} beat {u.name} {n} to {less} at {g} thanks to {p.full}.",
            "{p.job} {p.full} wins {g} match for {t.name} against {u.name}, {n} to {less}.",
        ),
    ),
    Event(
        (
            "the {t.river} rose by {n} feet on {day1} and flooded {t.name}.",
            "after {n} days of {weather}, the {t.river} has flooded parts of {t.name}.",
        ),
        (
            "{k} houses stand in water, and the {b} is closed.",
            "{q.full}, a {q.job} of {q.years}, rowed {crowd} to safety in {q.his} boat.",
            "the {t.product} trade has lost {cost} coins.",
            "in {u.name}, which lies higher, {big} people have found shelter.",
            "it is the {nth} flood since {month1}.",
        ),
        (
            "the water came into the {s.place} before I could save my {s.tool}",
            "we have asked for a wall for years",
            "I could hear the river in my {room}",
        ),
        ("a wall is to be built by {month2}.", "the water should fall before {month2}."),
        (
            "Flood in {t.name}: {k} houses under water, {b} closed, {cost} coins lost.",
            "{t.river} floods {t.name}; {q.job} {q.full} rows people to safety; wall due by {month2}.",
        ),
    ),
    Event(
        (
            "the {workers} of {t.name} stopped work on {day1} and ask for {n} coins more a week.",
            "no {goods} in {t.name}: the {workers} are on strike.",
        ),
        (
            "{p.full}, who speaks for the {k} {workers}, wants {n} coins more.",
            "{q.full}, who owns the {place}, offers {less}.",
            "{q.name}, who is {q.years}, was once a {p.job} too.",
            "the strike has already cost {cost} coins.",
            "in {u.name}, the {workers} have worked on.",
        ),
        ("we cannot eat {goods}", "I pay what I can pay", "nobody wants this to last until {month2}"),
        ("talks go on in the {b} on {day2}.", "if nothing changes, the {place} will close in {month2}."),
        (
            "{workers} of {t.name} strike for {n} coins more; owner {q.full} offers {less}.",
            "Strike of {k} {workers} in {t.name} has cost {cost} coins; talks on {day2}.",
        ),
    ),
    Event(
        (
            "{p.full}, a {p.job} from {t.name}, has found {k} old {o}s in {p.his} {room}.",
            "a {p.job} of {t.name} has discovered {k} {m} {o}s under the {b}.",
        ),
        (
            "they are {big} years old and belonged to a {jobname} from {u.name}.",
            "{q.full} of the museum puts their worth at {cost} coins.",
            "{p.name}, who is {p.years}, was looking for {p.his} {p.tool}.",
            "the {o}s lay under a {thing} next to {n} pebbles.",
            "{q.name}, once a {q.job}, has studied {o}s for {n} years.",
        ),
        ("I thought it was a {thing}", "they are the finest {o}s in {t.county}", "my {s.goods} will have to wait"),
        ("they will be shown in {month2}.", "{p.name} will keep {less} of them and give the rest to the museum."),
        (
            "{p.job} in {t.name} finds {k} {o}s worth {cost} coins, {big} years old.",
            "{k} old {m} {o}s found by {p.full} in {t.name} go on show in {month2}.",
        ),
    ),
)


_FIELD = re.compile(r"{[^}]+}")


def article(dice: Dice) -> tuple[str, str]:
    """A news article and a summary of it, which says nothing that the article does not."""
    while True:
        event = dice.pick(EVENTS)
        w = _facts(dice)
        document = _report(w, event)
        known = document.lower()
        told = [line for line in event.summary if all(w(field).lower() in known for field in _FIELD.findall(line))]
        if told:
            summary = finish(w.one_of(told))
            return document, summary[0].upper() + summary[1:]


def _report(w: Writer, event: Event) -> str:
    """The article: what happened, details, one or two voices, what comes next."""
    dice = w.dice
    body = [w.one_of(event.lead), *w.some(event.details, dice.between(3, 5))]
    for person in dice.shuffled((w.facts["p"], w.facts["q"]))[: dice.between(1, 2)]:
        w.facts["s"] = person
        name = w.one_of(("{s.full}", "{s.full}, who works at the {s.place}", "{s.name}, the {s.job}"))
        body.append(speech(w, person, dice.pick(event.quotes)) + f", said {name}.")
    body.append(w.one_of(event.after))
    headline = w("{t.name}, {month1}. ") if dice.chance(0.5) else ""
    return finish(headline + " ".join(body))


def _facts(dice: Dice) -> Writer:
    """Everything that an article and its summary may both speak of."""
    town, other, third = dice.sample(TOWNS, 3)
    p, q = people(dice, 2, town)
    o = dice.pick([word for word in lexicon.OBJECTS if word not in ("knife", "box", "scarf")])
    n = dice.between(3, 9)
    crowds = dice.sample(lexicon.LISTS["crowd"], 2)
    w = Writer(
        dice,
        t=town,
        u=other,
        v=third,
        p=p,
        q=q,
        o=o,
        m=lexicon.OBJECTS[o],
        b=dice.pick(lexicon.LISTS["building"]),
        n=number(n),
        less=number(dice.between(1, n - 1)),
        k=number(dice.between(10, 99)),
        big=number(dice.between(10, 90) * 10),
        cost=number(dice.between(2, 90) * 100),
        nth=lexicon.ORDINALS[dice.between(1, 9)],
        g=dice.pick(lexicon.LISTS["game"]),
        month1=dice.pick(lexicon.MONTHS),
        month2=dice.pick(lexicon.MONTHS),
        crowd=crowds[0],
        crowd2=crowds[1],
        workers=lexicon.plural(p.job),
        goods=p.goods,
        place=p.place,
    )
    w.facts["day1"], w.facts["day2"] = dice.sample(lexicon.DAYS, 2)
    w.facts["room"] = dice.pick(lexicon.ROOMS)
    return w
