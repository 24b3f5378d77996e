"""Letters with their answers, and diaries: questions and plans that later sentences must take up."""

from __future__ import annotations

from compressor.demo import lexicon
from compressor.demo.stories import kin
from compressor.demo.writer import Dice, Writer, finish, people


def letter(dice: Dice) -> str:
    """A letter and, often, its answer: the answer takes up the questions in their order and signs as addressed."""
    a, b = people(dice, 2)
    n = dice.between(2, 12)
    w = Writer(
        dice, a=a, b=b, n=lexicon.number(n), k=dice.pick(lexicon.DAYS), mo=dice.pick(lexicon.MONTHS), age=b.years
    )
    formal = dice.chance(0.4)
    w.facts["hello"] = w("dear {b.title} {b.surname}" if formal else "[dear|my dear] {b.name}")
    w.facts["bye"] = w("Yours faithfully, {a.full}" if formal else "[Love|Your friend|With a hug], {a.name}")
    asked = dice.shuffled(
        (
            (
                w("how [is|goes] your work at the {b.place}"),
                "the {b.place} is [{bigadj}|{newadj}] and I have {b.made} {many} {b.goods}",
            ),
            (
                w("do you still [play {gm}|drink {dr}]", gm=(gm := w("{game}")), dr="tea"),
                "I [still do|no longer do], though the {crowd} of {b.town.name} do not",
            ),
            (w("what is the weather like in {b.town.name}"), "we have had {weather} since {day}"),
            (w("could you send me some {b.town.product}"), "the {b.town.product} will leave for {a.town.name} on {k}"),
            (
                w("have you found your {o}", o=(lost_thing := w("{object}"))),
                "the {lost_thing} [was in the {room} all the time|is still lost]",
            ),
        )
    )[: dice.between(2, 3)]
    w.facts.update(gm=gm, lost_thing=lost_thing, many=lexicon.number(dice.between(3, 60)))
    lines = [w("{a.town.name}, {mo}\n{hello},")]
    lines.append(
        w(
            "[thank you for your letter|I hope you are well|it is long since I wrote]. "
            "[I now work as a {a.job} here in {a.town.name}|as you know, I am the {a.job} of {a.town.name}], "
            "and [the {a.place} is {oldadj}|my {a.tool} is {oldadj}|I have {a.made} {a.goods} all {season}]."
        )
    )
    lines.append(" ".join(question + "?" for question, _ in asked))
    lines.append(w("I shall [come to|be in] {b.town.name} on {k} and stay for {n} days.\n{bye}"))
    if dice.chance(0.7):
        w.facts["hello2"] = w("dear {a.title} {a.surname}" if formal else "[dear|my dear] {a.name}")
        w.facts["bye2"] = w("Yours faithfully, {b.full}" if formal else "[Love|Your friend|With a hug], {b.name}")
        lines.append(w("\n{b.town.name}, {mo}\n{hello2},"))
        lines.append(" ".join(w(reply) + "." for _, reply in asked))
        lines.append(
            w(
                "[I shall wait for you on {k}|come on {k} then], and bring your {a.tool}; {n} days are [too few|"
                "enough|long].\n{bye2}"
            )
        )
    return finish("\n".join(lines))


def diary(dice: Dice) -> str:
    """Days in order: what was planned on one is done, or not, on a later one."""
    p, q = people(dice, 2)
    w = Writer(dice, p=p, q=q, t=p.town)
    start, count = dice.between(0, 6), dice.between(3, 5)
    lines = [w("[the diary|from the diary|a week in the life] of {p.full}, {p.job} in {t.name}.")]
    plan = ""
    for index in range(count):
        w.facts.update(plan=plan, z=lexicon.DAYS[(start + index + 1) % 7], n=lexicon.number(dice.between(2, 30)))
        entry = [lexicon.DAYS[(start + index) % 7] + "."]
        if plan:
            entry.append(
                w("[as I had planned, I {plan}|I {plan}, as I had hoped|I could not keep my word: nobody {plan}].")
            )
        entry += w.some(
            (
                "{weather} all day, so I stayed at the {p.place} and {p.made} {n} {p.goods}.",
                "{q.name}, who is the {q.job}, came with {q.his} {q.tool} and we talked about {abstract}.",
                "[ate|had] {food} and {food} with {drink}.",
                "the {animal} in the {room} kept me awake.",
                "I am {mood} because the {p.goods} that lay in the {room} are {oldadj}.",
                "lost {n} coins at {game} to the {q.job}.",
                "the {t.river} is [high|low], they say, and the {crowd} by the {t.building} are {mood}.",
            ),
            dice.between(1, 3),
        )
        plan = w(
            (
                "[mended my {p.tool}|went to see {q.name} at the {q.place}|bought {food} and {food}|"
                "walked along the {t.river}|wrote to my {k}|painted the {room} {colour}]"
            ),
            k=kin(w, dice.pick((p, q))),
        )
        if index + 1 < count:
            entry.append(
                w(
                    "plan for {z}: that I {plan}.",
                    plan="have " + plan.replace("wrote", "written").replace("went", "gone"),
                )
            )
        lines.append(" ".join(entry))
    return finish("\n".join(lines))
