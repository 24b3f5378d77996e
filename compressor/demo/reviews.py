"""Film reviews whose verdict lies in how the sentences are built, not in which adjectives they hold.

Most sentences carry one good and one bad word, and negation, concession, reported opinion or disappointed expectation
decides which of them the reviewer means.
"""

from __future__ import annotations

from compressor.demo import lexicon
from compressor.demo.lexicon import words
from compressor.demo.writer import Dice, Writer, finish, people

GOOD = words("""brilliant moving charming superb clever delightful gripping graceful funny warm memorable honest
    powerful elegant touching fresh splendid subtle vivid wonderful inspired tender thrilling witty""")
BAD = words("""dull clumsy boring awful lifeless tedious shallow predictable stupid cold forgettable false feeble ugly
    tiresome stale dreadful crude flat terrible lazy hollow endless silly""")
SINGULAR = words("acting plot music camerawork dialogue ending pacing direction humour story script casting lighting")
PLURAL = words("performances jokes songs sets costumes chases landscapes dances villains fights crowds")
OTHERS = (
    "my {kin}",
    "the critic of the {t.name} paper",
    "the {jobname} beside me",
    "everybody else in the row",
    "my old friend {b.name}",
    "the poster",
)
_TITLE_ADJ = words(
    "Silent Last Golden Hidden Broken Distant Crimson Frozen Secret Empty Lost Wild Hollow Burning Gentle Quiet"
)
_TITLE_NOUN = words("""Harbour Garden Winter River Promise Letter Mirror Summer Orchard Voyage Kingdom Shadow Lantern
    Bridge Island Stranger Morning Forest Crown Waltz""")


def title(dice: Dice) -> str:
    """An invented film title."""
    first, second = dice.pick(_TITLE_ADJ), dice.pick(_TITLE_NOUN)
    return dice.pick(
        (
            f"The {first} {second}",
            f"{first} {second}",
            f"The {second} of {dice.pick(lexicon.SURNAMES)}",
            f"A {second} in {dice.pick(lexicon.MONTHS)}",
            f"The {first} {dice.pick(lexicon.SURNAMES)}",
            f"{second} and {dice.pick(_TITLE_NOUN)}",
        )
    )


def adjective(dice: Dice, good: bool) -> str:
    return dice.pick(GOOD if good else BAD)


def quality(w: Writer, good: bool) -> str:
    """A predicate of the meaning asked for, by an adjective of that meaning or a denied one of the other."""
    if w.dice.chance(0.4):
        return w("[not|never|far from|anything but|not in the least|hardly] ") + adjective(w.dice, not good)
    return w("[||very |really |truly |rather ]") + adjective(w.dice, good)


def clause(w: Writer, good: bool) -> str:
    """A statement on one side of the film; number agrees."""
    dice = w.dice
    subject, be = (dice.pick(SINGULAR), "is") if dice.chance(0.6) else (dice.pick(PLURAL), "are")
    if dice.chance(0.15):
        return w("I [found|thought] the {side} ", side=subject) + quality(w, good)
    if dice.chance(0.2):
        return w("{actor} is ", actor=dice.pick((w.facts["x"].name, w.facts["y"].name))) + quality(w, good)
    return w("the {side} {be} ", side=subject, be=be) + quality(w, good)


def concession(w: Writer, good: bool) -> str:
    """Two opposed statements of which the main clause counts."""
    main, side = clause(w, good), clause(w, not good)
    return (
        w.one_of(
            (
                "[although|though|while|even if] {side}, {main}",
                "{main}, [although|though|even if] {side}",
                "{side}, but {main}",
                "in spite of a {word} first half, {main}",
                "{side}, I admit, and yet {main}",
                "I could forgive that {side}, because {main}"
                if good
                else "it does not help that {side}, because {main}",
            ),
            main=main,
            side=side,
            word=adjective(w.dice, not good),
        )
        + "."
    )


def opinion_of_others(w: Writer, good: bool) -> str:
    """Somebody else's word and whether the reviewer shares it."""
    agrees = w.dice.chance(0.45)
    word = adjective(w.dice, good if agrees else not good)
    other = w.one_of(OTHERS)
    tail = w(
        "[and for once I agree|and I can only nod|and that is the truth|which is quite right]"
        if agrees
        else "[but I cannot agree|but that is wrong|which I do not understand|but we must have seen different films]"
    )
    return w("{other} [called it|found it|said it was] {word}, {tail}.", other=other, word=word, tail=tail)


def expectation(w: Writer, good: bool) -> str:
    """What was hoped or feared, and whether it came so."""
    came = w.dice.chance(0.4)
    word = adjective(w.dice, good if came else not good)
    return w(
        "[I expected|everything promised|the first minutes announce|the title promises] "
        "[a|another|a] {word} [film|evening|story], "
        + (
            "[and that is what I got|and so it was|and nothing else came]."
            if came
            else "[and I was mistaken|but it is nothing of the kind|and the opposite came]."
        ),
        word=word,
    )


def comparison(w: Writer, good: bool) -> str:
    """Another film of the same director, liked or not, and how this one stands to it."""
    same = w.dice.chance(0.5)
    word = adjective(w.dice, good if same else not good)
    return w(
        "{d.name}'s last film, {old}, was {word}, and "
        + (
            "[this one is no different|the same is true here|so is this one]"
            if same
            else "[this one is the very opposite|here {d.he} does the reverse|nothing of that is left here]"
        )
        + ".",
        word=word,
    )


def verdict(w: Writer, good: bool) -> str:
    """A last word; each formula has a twin with nearly the same words and the other meaning."""
    return w.one_of(
        (
            "I would [gladly|happily] watch it [again|twice].",
            "I was sorry when it was over.",
            "it is worth every one of my {n} coins.",
            "nobody who goes will ask for the {n} coins back.",
            "do not listen to those who [left early|slept].",
            "one does not look at the clock once.",
            "I cannot think of a reason to stay at home.",
        )
        if good
        else (
            "I would not [gladly|happily] watch it [again|twice].",
            "I was sorry it was not over sooner.",
            "it is not worth one of my {n} coins.",
            "whoever goes will ask for the {n} coins back.",
            "listen to those who [left early|slept].",
            "one looks at the clock more than once.",
            "I can think of many a reason to stay at home.",
        )
    )


def irony(w: Writer, good: bool) -> str:
    """Praise that is none, or blame that is none."""
    word = adjective(w.dice, not good)
    if good:
        return w(
            (
                "[{word}? If that is {word}, I want nothing but {word} films.|"
                "the only {word} thing was the seat.|if you hate {abstract} and laughter, you will find it "
                "{word}.]"
            ),
            word=word,
        )
    return w(
        (
            "[{word}, if you like to watch {thing}s being counted.|"
            "so {word} that even the {animal} in the foyer fell asleep.|"
            "the only {word} thing was the {drink} in the break.]"
        ),
        word=word,
    )


def plot(w: Writer) -> str:
    """What happens in the film: full of good and bad words that say nothing about it."""
    return w.one_of(
        (
            "{x.name} {x.surname} plays a {badadj} {job} who {walked} into a {sky} {nature} and loses a {object}.",
            (
                "{x.name} {x.surname} is a {goodadj} {job} and {y.name} {y.surname} a {badadj} {jobname}; they "
                "meet at a {building}."
            ),
            (
                "it tells of a {job} in {t.name} whose {kin} is {mood}, and of the {badadj} {jobname} who finds "
                "the {object}."
            ),
            "{d.full} tells the story of a {goodadj} {job} and {crowd} in a {season} of {weather}.",
            "the {job}, played by {y.name} {y.surname}, must choose between {abstract} and {abstract}.",
        )
    )


def review(dice: Dice, good: bool) -> str:
    """A review of four to seven sentences with the meaning asked for."""
    x, y, d, b = people(dice, 4)
    kin = dice.pick([word for pair in lexicon.KIN.items() for word in pair])
    w = Writer(
        dice,
        x=x,
        y=y,
        d=d,
        b=b,
        t=x.town,
        kin=kin,
        film=title(dice),
        old=title(dice),
        job=x.job,
        n=lexicon.number(dice.between(5, 30)),
    )
    lines = [
        w(
            (
                "[I saw {film} on a {weather_day}.|{film} is {d.full}'s [new|first|latest] film.|"
                "on {day} we went to see {film}.|in {film}, nothing is as it seems.|{film} has come to {t.name}.]"
            ),
            weather_day=w("{day} of {weather}"),
        )
    ]
    if dice.chance(0.8):
        lines.append(plot(w))
    kinds = dice.shuffled((concession, concession, opinion_of_others, expectation, comparison, irony))[
        : dice.between(2, 3)
    ]
    body = [kind(w, good) for kind in kinds]
    body.append(clause(w, good) + (", and " + clause(w, good) if dice.chance(0.3) else "") + ".")
    if dice.chance(0.55):
        body.append(concession(w, good))
    lines += dice.shuffled(body)
    if dice.chance(0.45):
        lines.append(verdict(w, good))
    return finish(" ".join(lines))
