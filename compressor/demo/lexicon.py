"""The words of the demo language: plain lists by topic, and nothing that draws from them.

A name in ``LISTS`` can stand in braces inside a template (see ``writer.Writer``); one word is then drawn from the list.
"""

from __future__ import annotations


def words(text: str) -> tuple[str, ...]:
    """The words of a text, in their order."""
    return tuple(text.split())


WOMEN = words("""Ada Agnes Alma Amina Anna Beatrice Bella Bertha Carla Cecily Clara Cora Daisy Della Dora Edith Elena
    Elsa Emma Esther Eva Fanny Flora Freya Greta Hanna Hazel Helen Hilda Ida Ines Irma Iris Jana Joan Judith Karin
    Laila Lena Lily Lotte Lucy Mabel Mara Marta Maud Mina Nadia Nell Nina Nora Olga Olive Paula Petra Polly Rhoda Rosa
    Ruth Sabine Sara Selma Stella Susan Tessa Thea Ursula Vera Willa Zara""")
MEN = words("""Abel Adam Albert Amos Anton Arno Arthur Basil Ben Boris Bruno Carl Cedric Conrad Cyril Daniel David
    Edgar Edwin Elias Emil Eric Ernest Felix Frank Fred George Gilbert Gustav Harold Harry Henry Hugo Ivan Jacob James
    Jasper Jonas Joseph Julian Karl Kurt Lars Leo Lewis Lucas Magnus Marcus Martin Max Milo Moses Ned Nils Noah Oliver
    Omar Oscar Otto Paul Peter Philip Ralph Robert Rufus Samuel Simon Theo Thomas Victor Walter William""")
SURNAMES = words("""Abbott Archer Baines Barlow Beck Bishop Blake Boyd Brandt Briggs Brook Burton Carver Chase Cole
    Cooper Crane Cross Dale Dawson Drake Dunn Ellis Engel Falk Farrow Finch Fisher Forbes Frost Gale Garner Gibbs
    Grant Gray Hale Hansen Hardy Hart Hayes Holt Horn Hughes Hurst Jansen Kane Keller Kent Lambert Lane Larsen Lowe
    Marsh Mercer Miles Moore Nash Norton Oakes Olsen Page Parker Pike Porter Quinn Reed Rhodes Rowe Sharp Snow Stark
    Steele Stone Swan Thorne Tucker Vance Voss Wade Walsh Ward Webb Weiss West Wolfe Wren York""")

COUNTIES = words("Norland Easterby Marrowshire Highmoor Lowmark Westing Calder Dunmere Ferrow Glenside")
RIVERS = words("""Arle Brenn Corrow Dove Esker Fenn Garrow Hask Isle Jarrow Kell Lune Marl Nidd Orrin Parr Quill Rill
    Sable Tarn Ure Vale Wharn Yarrow""")
PRODUCTS = words("""wool cheese cider glass salt slate copper honey timber pottery lace rope leather apples paper
    bells boats clocks candles herring""")

# An animal is always what it is here: class, home, food, and the sound it makes.
ANIMALS = {
    "fox": ("mammal", "woods", "mice", "barks"), "badger": ("mammal", "woods", "worms", "growls"),
    "otter": ("mammal", "rivers", "fish", "whistles"), "hare": ("mammal", "fields", "grass", "squeals"),
    "wolf": ("mammal", "mountains", "deer", "howls"), "goat": ("mammal", "mountains", "leaves", "bleats"),
    "seal": ("mammal", "seas", "fish", "barks"), "bat": ("mammal", "caves", "moths", "squeaks"),
    "mole": ("mammal", "fields", "worms", "squeaks"), "bear": ("mammal", "mountains", "berries", "growls"),
    "owl": ("bird", "woods", "mice", "hoots"), "heron": ("bird", "rivers", "frogs", "croaks"),
    "gull": ("bird", "seas", "fish", "screams"), "lark": ("bird", "fields", "seeds", "sings"),
    "raven": ("bird", "mountains", "bones", "croaks"), "duck": ("bird", "lakes", "weeds", "quacks"),
    "swan": ("bird", "lakes", "weeds", "hisses"), "wren": ("bird", "gardens", "spiders", "sings"),
    "goose": ("bird", "lakes", "grass", "honks"), "finch": ("bird", "gardens", "seeds", "sings"),
    "trout": ("fish", "rivers", "flies", ""), "pike": ("fish", "lakes", "frogs", ""),
    "cod": ("fish", "seas", "shrimps", ""), "carp": ("fish", "lakes", "worms", ""),
    "bee": ("insect", "gardens", "nectar", "hums"), "moth": ("insect", "gardens", "nectar", ""),
    "cricket": ("insect", "fields", "leaves", "sings"), "ant": ("insect", "woods", "seeds", ""),
    "toad": ("amphibian", "gardens", "flies", "croaks"), "newt": ("amphibian", "lakes", "shrimps", ""),
    "snake": ("reptile", "fields", "mice", "hisses"), "lizard": ("reptile", "mountains", "spiders", ""),
}  # fmt: skip
LEGS = {"mammal": "four", "bird": "two", "fish": "no", "insect": "six", "amphibian": "four", "reptile": "four"}

# A job: where it is done, what is held, what it makes or does (past tense, plural object), and how its people speak.
JOBS = {
    "baker": ("bakery", "rolling pin", "baked", "loaves", "warm"),
    "smith": ("forge", "hammer", "forged", "nails", "gruff"),
    "teacher": ("school", "chalk", "marked", "essays", "formal"),
    "sailor": ("harbour", "rope", "tied", "knots", "salty"),
    "doctor": ("surgery", "thermometer", "treated", "patients", "formal"),
    "farmer": ("farm", "plough", "grew", "turnips", "gruff"),
    "tailor": ("workshop", "needle", "sewed", "coats", "warm"),
    "fisher": ("pier", "net", "caught", "crabs", "salty"),
    "miller": ("mill", "sack", "ground", "grains", "gruff"),
    "painter": ("studio", "brush", "painted", "portraits", "dreamy"),
    "singer": ("theatre", "songbook", "sang", "ballads", "dreamy"),
    "judge": ("court", "gavel", "heard", "cases", "formal"),
    "gardener": ("garden", "spade", "planted", "roses", "warm"),
    "carpenter": ("workshop", "saw", "built", "tables", "gruff"),
    "clerk": ("office", "ledger", "copied", "letters", "formal"),
    "pilot": ("airfield", "compass", "flew", "planes", "salty"),
    "cook": ("kitchen", "ladle", "stirred", "soups", "warm"),
    "poet": ("attic", "pen", "wrote", "verses", "dreamy"),
    "weaver": ("loft", "shuttle", "wove", "rugs", "dreamy"),
    "nurse": ("hospital", "bandage", "dressed", "wounds", "warm"),
    "banker": ("bank", "key", "counted", "coins", "formal"),
    "hunter": ("forest", "bow", "followed", "tracks", "gruff"),
    "potter": ("kiln", "wheel", "shaped", "bowls", "dreamy"),
    "captain": ("ship", "telescope", "drew", "charts", "salty"),
    "butcher": ("market", "cleaver", "cut", "chops", "gruff"),
    "librarian": ("library", "stamp", "sorted", "books", "formal"),
    "ferryman": ("landing", "oar", "carried", "passengers", "salty"),
    "shepherd": ("hill", "staff", "sheared", "sheep", "gruff"),
    "florist": ("market", "ribbon", "bound", "wreaths", "warm"),
    "violinist": ("theatre", "bow", "played", "waltzes", "dreamy"),
}

# Objects people own, lose and carry, with the material each is always made of.
OBJECTS = {
    "lantern": "brass", "ring": "gold", "basket": "willow", "clock": "oak", "flute": "silver", "map": "paper",
    "kettle": "copper", "scarf": "wool", "mirror": "glass", "chest": "oak", "coin": "silver", "bell": "bronze",
    "book": "paper", "knife": "steel", "drum": "leather", "vase": "glass", "crown": "gold", "glove": "leather",
    "whistle": "tin", "ladder": "pine", "umbrella": "silk", "necklace": "pearl", "saddle": "leather", "candle": "wax",
    "jug": "clay", "pillow": "feather", "letter": "paper", "trumpet": "brass", "chair": "pine", "box": "tin",
}  # fmt: skip
FRUIT = {
    "apple": "red", "pear": "green", "plum": "purple", "lemon": "yellow", "cherry": "red", "peach": "orange",
    "grape": "purple", "banana": "yellow", "melon": "green", "berry": "blue",
}  # fmt: skip

ROOMS = words("kitchen cellar attic hall bedroom pantry garden barn stable parlour porch study")
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = words("January February March April May June July August September October November December")
SEASONS = words("spring summer autumn winter")
COLOURS = words("red green blue yellow black white brown grey purple orange")
KIN = {  # relation of a woman, of a man, and what the other end of it is called when a woman or a man
    "sister": "brother", "mother": "father", "daughter": "son", "aunt": "uncle", "niece": "nephew", "wife": "husband",
    "grandmother": "grandfather",
}  # fmt: skip
FOODS = words("""flour sugar butter milk eggs salt pepper rice beans onions carrots potatoes cream honey almonds
    raisins cheese mushrooms garlic parsley barley leeks apples pears plums cabbage lentils mustard vinegar oil""")
TOOLS = words("hammer saw spade rake chisel pliers axe brush bucket rope drill shovel")

LISTS: dict[str, tuple[str, ...]] = {
    "day": DAYS, "month": MONTHS, "season": SEASONS, "colour": COLOURS,
    "room": ROOMS, "food": FOODS, "fruit": tuple(FRUIT), "tool": tuple(TOOLS),
    "object": tuple(OBJECTS), "animal": tuple(ANIMALS), "jobname": tuple(JOBS), "surname": tuple(SURNAMES),
    "weather": words("rain snow fog wind hail sunshine thunder frost drizzle mist"),
    "sky": words("grey pale dark clear cloudy heavy bright golden silver stormy"),
    "bigadj": words("large huge broad tall wide deep long heavy enormous grand"),
    "smalladj": words("small tiny narrow short thin low light little slender modest"),
    "goodadj": words("kind brave honest gentle clever patient cheerful generous loyal wise polite calm"),
    "badadj": words("proud greedy lazy cruel stubborn jealous rude careless bitter foolish cowardly vain"),
    "oldadj": words("old ancient worn rusty dusty crooked faded cracked broken forgotten"),
    "newadj": words("new fresh clean bright polished shiny modern handsome fine neat"),
    "mood": words("happy sad angry tired worried proud hungry lonely curious nervous grateful bored"),
    "manner": words("quickly slowly quietly carefully gladly sadly loudly softly eagerly proudly gently bravely"),
    "often": words("often always sometimes rarely usually never seldom"),
    "thing": words("stone leaf feather shell button ribbon thread nail stick pebble rope wheel bottle plate cup"),
    "nature": words("river hill forest meadow valley lake field cliff stream marsh island path orchard pond"),
    "building": words("tower bridge church mill inn castle barn school station theatre museum library bank"),
    "virtue": words("patience courage kindness honesty loyalty wisdom mercy hope humour modesty"),
    "vice": words("pride greed envy anger sloth vanity cruelty fear malice spite"),
    "walked": words("walked ran hurried strolled wandered marched crept limped rode drove"),
    "saw": words("saw noticed spotted found discovered watched heard remembered recognised missed"),
    "abstract": words("truth silence memory freedom sorrow time fortune chance justice winter love money"),
    "body": words("hand arm foot knee shoulder head back neck ear finger"),
    "tree": words("oak ash elm birch willow pine beech maple cedar alder"),
    "flower": words("rose lily daisy tulip poppy violet iris lupin primrose thistle"),
    "metal": words("iron copper silver gold tin bronze steel brass lead zinc"),
    "game": words("chess cards dice marbles football tennis bowls darts skittles draughts"),
    "music": words("waltz march ballad hymn lullaby polka serenade overture symphony jig"),
    "drink": words("tea coffee cider milk water beer wine lemonade cocoa broth"),
    "cloth": words("coat hat shirt dress scarf cloak apron shawl jacket waistcoat"),
    "illness": words("cough fever headache rash toothache cold limp sprain"),
    "crowd": words("neighbours children travellers soldiers merchants dancers students visitors strangers villagers"),
}  # fmt: skip

_ONES = words("""zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen nineteen""")
_TENS = words("zero ten twenty thirty forty fifty sixty seventy eighty ninety")
ORDINALS = words("""first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth
    fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth twentieth""")


def number(value: int) -> str:
    """Spell an integer from 0 to 9999 in words: 342 -> "three hundred and forty-two"."""
    if value < 20:
        return _ONES[value]
    if value < 100:
        tens, ones = divmod(value, 10)
        return _TENS[tens] + (f"-{_ONES[ones]}" if ones else "")
    if value < 1000:
        hundreds, rest = divmod(value, 100)
        return f"{_ONES[hundreds]} hundred" + (f" and {number(rest)}" if rest else "")
    thousands, rest = divmod(value, 1000)
    joint = " " if rest >= 100 else " and "
    return f"{number(thousands)} thousand" + (f"{joint}{number(rest)}" if rest else "")


def plural(noun: str) -> str:
    """The plural of a noun of this lexicon."""
    if noun in _PLURALS:
        return _PLURALS[noun]
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh", "z")) else "s")


_PLURALS = {
    "wolf": "wolves", "goose": "geese", "knife": "knives", "leaf": "leaves", "trout": "trout", "cod": "cod",
    "carp": "carp", "pike": "pike", "foot": "feet", "ferryman": "ferrymen", "loaf": "loaves", "sheep": "sheep",
}  # fmt: skip
