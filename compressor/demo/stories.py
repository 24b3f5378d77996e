"""Stories, markets and scenes: people are introduced once and their facts are needed many sentences later."""

from __future__ import annotations

from compressor.demo import lexicon
from compressor.demo.writer import TOWNS, Dice, Person, Writer, finish, listed, people

SPEECH = {
    "gruff": ('"Hm. {said}, and that is that"', '"{said}. No more to say"', '"bah. {said}"'),
    "formal": ('"I am obliged to say that {said}"', '"permit me to observe that {said}"', '"it is a fact that {said}"'),
    "salty": ('"aye, {said}, by wind and tide"', '"ahoy! {said}, or I am a herring"', '"by the salt sea, {said}"'),
    "warm": ('"my dear, {said}"', '"bless you, {said}"', '"do not worry, my dear, {said}"'),
    "dreamy": ('"ah, {said}, as in a dream"', '"sometimes I think {said}"', '"like a song in the dark, {said}"'),
}


def speech(w: Writer, speaker: Person, said: str) -> str:
    """A quotation in the manner of the speaker's job, which the text has named somewhere before."""
    return w(w.dice.pick(SPEECH[speaker.style]), said=w(said))


def kin(w: Writer, person: Person) -> str:
    """What a person is called by a relative: "sister" or "brother" and the like."""
    woman, man = w.dice.pick(tuple(lexicon.KIN.items()))
    return woman if person.woman else man


INTRODUCTIONS = (
    "{p.full} was a {p.job} in {t.name}, a town on the {t.river} known for its {t.product}.",
    (
        "in the town of {t.name}, where the {t.river} runs past the old {t.building}, there lived a {goodadj} "
        "{p.job} called {p.full}."
    ),
    "there was once a {p.man} of {p.years} in {t.name} whose name was {p.name} and who worked as a {p.job}.",
    "everybody in {t.name} knew {p.full}, the {p.job} with the {colour} {cloth}.",
    "when {p.name} {p.surname} was {p.years} years old, {p.he} came to {t.name} in {t.county} to be a {p.job}.",
)
TRAITS = (
    "{p.he} was {goodadj} but {badadj}, and {p.he} {often} {p.made} {p.goods} before breakfast.",
    "every morning {p.he} went to the {p.place} with {p.his} {p.tool} and {p.made} {p.goods} until noon.",
    (
        "the {p.goods} that {p.he} {p.made} were the best in {t.county}, and nobody who [had seen them|"
        "knew {p.him}] denied it."
    ),
    "{p.he} owned a {animal} called {pet}, which {p.he} loved more than {p.his} {p.tool}.",
    "{p.his} {q_kin}, {q.name}, was the {q.job} of the town and spent {q.his} days at the {q.place}.",
)
LOST = (
    "on the night of the {weather}, the {o} was gone from the {r1}.",
    "one {day} in {month}, {p.he} opened the {r1} door and saw that the {o} had disappeared.",
    "but when {p.he} came home from the {p.place} on {day}, the {o} was no longer in the {r1}.",
)
SEARCH = (
    "first {p.name} looked in the {r3}, but there was only a {oldadj} {thing} there.",
    "{p.he} {walked} to the {q.place} and asked {q.name}, who shook {q.his} head.",
    "neither the {q.job} nor the {c.job} had seen it, although both of them had been in the {r1} that day.",
    "the {crowd} who lived by the {t.river} were asked, but none of them had {seen} it.",
    "{p.he} searched the {r3} and the {nature}, {manner} at first and then {manner}, and found nothing but {plants}.",
    "by evening {p.his} {body} hurt and {p.he} was too {mood} to eat.",
    "{pet} the {pet_kind} sat by the {r1} door and [watched {p.him}|would not move|{pet_sound} at the {nature}].",
)
JOURNEY = (
    "the road to {u.name} led over a {bigadj} {nature} and through a {smalladj} {nature}.",
    "on the first day {p.he} met three {crowd} who sang a {music}; on the second, nobody at all.",
    "it was {season}, and the {weather} did not stop until {p.he} had crossed the {u.river}.",
    "at the {building} of {u.name}, a {goodadj} old {q.man} gave {p.him} {drink} and asked what {p.he} was carrying.",
    "{p.his} {body} hurt, for {p.he} had {walked} all day with the {o} on {p.his} back.",
    "{pet}, {p.his} {pet_kind}, {walked} ahead and {often} looked back.",
    "a {badadj} {c.man} wanted to buy the {m} {o} for {price} coins, but {p.name} refused.",
)
MORALS = (
    "so the {p.job} learned that {virtue} is worth more than {metal}.",
    "since that day, nobody in {t.name} has laughed at a {p.job}.",
    "and the {m} {o} has stood in the {r1} ever since.",
    "they say in {t.name} that {vice} loses what {virtue} finds.",
    "{p.name} is {later} now, and still tells the story to the {crowd} of {t.name}.",
)


def story(dice: Dice) -> str:
    """Somebody loses a thing or carries it somewhere; who has it in the end follows from the sentences before."""
    town = dice.pick(TOWNS)
    p, q, c = people(dice, 3, town)
    other = dice.pick([place for place in dice.sample(TOWNS, 2) if place is not town])
    o = dice.pick(tuple(lexicon.OBJECTS))
    r1, r2, r3 = dice.sample(lexicon.ROOMS, 3)
    pet_kind = dice.pick(tuple(kind for kind, facts in lexicon.ANIMALS.items() if facts[0] in ("mammal", "bird")))
    sound = lexicon.ANIMALS[pet_kind][3]
    price = dice.between(3, 60)
    w = Writer(
        dice,
        p=p,
        q=q,
        c=c,
        t=town,
        u=other,
        o=o,
        m=lexicon.OBJECTS[o],
        r1=r1,
        r2=r2,
        r3=r3,
        animal=pet_kind,
        pet_kind=pet_kind,
        pet=dice.pick(lexicon.SURNAMES),
        price=lexicon.number(price),
        seen=dice.pick(("seen", "found", "touched", "taken")),
        pet_sound="began to " + sound[: -2 if sound.endswith("sses") else -1],
        later=lexicon.number(min(p.age + dice.between(3, 9), 99)),
        plants=lexicon.plural(dice.pick(lexicon.LISTS["flower"])),
    )
    w.facts["q_kin"] = kin(w, q)
    lines = [w.one_of(INTRODUCTIONS)]
    lines += w.some(TRAITS[:4], dice.between(1, 2))
    lines.append(w(TRAITS[4]))
    lines.append(
        w(
            (
                "in the {r1} [of {p.his} house |]{p.he} kept a {m} {o} that [{p.his} {k}|an old {jobname}|"
                "the {c.job}, {c.name},] had given {p.him}."
            ),
            k=kin(w, c),
        )
    )
    second = lost(w) if dice.chance(0.55) else journey(w)
    return finish(" ".join(lines) + "\n" + " ".join([*second, w.one_of(MORALS)]))


def lost(w: Writer) -> list[str]:
    """The object is taken by one of the two others, whose clue names them only by a fact told earlier or now."""
    thief: Person = w.dice.pick([w.facts["q"], w.facts["c"]])
    w.facts["x"] = thief
    lines = [w.one_of(LOST), *w.some(SEARCH, w.dice.between(2, 3))]
    lines.append(
        w("the {c.job}[ of {t.name}|], whose name was {c.name}, only said, ")
        + speech(w, w.facts["c"], "the {o} will come back")
        + "."
    )
    lines.append(w("then, under the window of the {r1}, {p.he} [found|saw|noticed] a {x.tool}."))
    lines.append(w("{p.he} knew at once whose {x.tool} it was, and {walked} to the {x.place}."))
    lines.append(w("there stood {x.name}, and the {o} lay beside {x.him}."))
    lines.append(
        speech(
            w,
            thief,
            "[I only wanted to polish it|I took it to the {r2} to keep it safe|I meant to bring it back on {day}]",
        )
        + w(", said the {x.job}.")
    )
    lines.append(
        w(
            "[{p.name} forgave {x.him}|{p.name} laughed and took {x.his} {body}|"
            "{p.name} said nothing and carried the {o} home] and put the {o} back in the {r1}."
        )
    )
    return lines


def journey(w: Writer) -> list[str]:
    """The object is carried to another town and changes hands; the reply is in the voice of who receives it."""
    receiver: Person = w.dice.pick([w.facts["q"], w.facts["c"]])
    w.facts["x"] = receiver
    lines = [
        w(
            "one {day} in {month}, word came that [the {x.job}|{x.name} the {x.job}] was ill in {u.name} and "
            "asked for the {o}."
        )
    ]
    lines.append(w("{p.name} took it from the {r1} and set out."))
    lines += w.some(JOURNEY, w.dice.between(2, 4))
    days = w.dice.between(2, 9)
    lines.append(
        w("after {n} days {p.he} reached {u.name} and found {x.name} in a {smalladj} {r2}.", n=lexicon.number(days))
    )
    lines.append(
        speech(
            w,
            receiver,
            (
                "[you have come far for an old {x.job}|I had not hoped to see the {o} again|"
                "the road from {t.name} is long]"
            ),
        )
        + w(", said {x.name}.")
    )
    lines.append(
        speech(w, w.facts["p"], "[it is yours now|a {p.job} keeps {p.his} word|nothing is too far for a friend]")
        + w(", answered {p.name}.")
    )
    lines.append(
        w(
            "{p.he} stayed for {n} days and then {walked} home to {t.name} without the {o}.",
            n=lexicon.number(w.dice.between(2, 9)),
        )
    )
    return lines


def market(dice: Dice) -> str:
    """A dialogue of a seller and a buyer: the prices, the total and the change agree."""
    a, b = people(dice, 2)
    w = Writer(dice, a=a, b=b, t=b.town)
    goods = dice.sample(lexicon.FOODS, dice.between(2, 3))
    prices = [dice.between(2, 15) for _ in goods]
    total = sum(prices)
    paid = dice.pick([coin for coin in (20, 30, 50, 60) if coin > total])
    lines = [
        w(
            "{a.full}, a {a.job} from {a.town.name}, stood at {b.name}'s stall in the market of {t.name}. "
            "{b.name} was a {b.job} on other days."
        )
    ]
    lines.append(speech(w, b, "today we have " + listed(goods)) + w(", said {b.name}."))
    for index in dice.shuffled(range(len(goods))):
        w.facts.update(g=goods[index], n=lexicon.number(prices[index]))
        lines.append(
            w(
                '["how much is the {g}?"|"and what do you ask for the {g}?"|'
                '"tell me the price of the {g}."] [asked|said] {a.name}. "{n} coins," [said|answered] {b.name}.'
            )
        )
        if dice.chance(0.4):
            lines.append(w("[the {a.job}|{a.name}] thought about it, for {a.he} was [{badadj}|{goodadj}] and {mood}."))
    w.facts.update(total=lexicon.number(total), paid=lexicon.number(paid), rest=lexicon.number(paid - total))
    lines.append(
        w(
            "{a.name} [took everything|wanted all of it|bought some of each], which made {total} coins, and "
            "gave {b.him} {paid}."
        )
    )
    lines.append(
        w("{b.name} gave {a.him} {rest} coins back[ and a {flower} for {a.his} {cloth}|, counting them {manner}|].")
    )
    lines.append(
        speech(w, a, f"the {goods[0]} is worth its {lexicon.number(prices[0])} coins") + w(", said the {a.job}.")
    )
    return finish("\n".join(lines))


def scene(dice: Dice) -> str:
    """A short play: the cast is listed first, and each speaks as the job demands, about the others' facts."""
    town = dice.pick(TOWNS)
    cast = people(dice, 3, town)
    place = dice.pick(cast)
    w = Writer(dice, t=town, place=place)
    lines = [
        w("[a scene at|in] the {place.place} in {t.name}. [persons|the cast]: ")
        + ", ".join(f"{p.name}, {w('a')} {p.job}" for p in cast)
        + "."
    ]
    topic = dice.pick(tuple(lexicon.OBJECTS))
    w.facts.update(o=topic, m=lexicon.OBJECTS[topic])
    before: Person | None = None
    for _ in range(dice.between(5, 8)):
        speaker = dice.pick([p for p in cast if p is not before])
        about = dice.pick([p for p in cast if p is not speaker])
        w.facts.update(s=speaker, b=about, l=before or about)
        said = w.one_of(
            (
                "{b.name} never lets the {b.tool} out of sight",
                "the {b.job} knows where the {m} {o} is",
                "I left my {s.tool} at the {s.place}",
                "nobody in {t.name} [needs|wants] {s.goods} in {month}",
                "{l.name} is {mood} because the {l.goods} are {oldadj}",
                "the {o} belongs to {b.name}",
                "a {s.job} should be at the {s.place} on a {day}",
                "{b.name} {b.made} {n} {b.goods} last {day}",
                "{weather} over the {t.river} means {weather} in {t.name}",
            ),
            n=lexicon.number(dice.between(2, 40)),
        )
        quotation = speech(w, speaker, said)
        lines.append(f"{speaker.name}: {finish(quotation[1:-1])}.")
        before = speaker
    if dice.chance(0.5):
        w.facts["s"] = dice.pick(cast)
        lines.append(w("([the {s.job}|{s.name}] takes {s.his} {s.tool} and goes [back to the {s.place}|out].)"))
    return finish("\n".join(lines))
