"""A small world in plain English: training text and held-out tasks for the two small models.

    python3 tests/world.py OUT [--seed N] [--llama DOCUMENTS] [--bert PAIRS]

writes OUT/llama.txt (one training document a line, newlines escaped), OUT/bert.tsv (1|0 = second
sentence follows or not, first, second), the held-out task files OUT/*.tsv and, for the BERT tasks,
OUT/*_train.tsv. The same seed gives the same bytes. Standard library only.

Every maker below draws one item and names its *combination* (for a sum: the numbers; for a
question about a material: property, material and object; for a last word: the whole passage). A
combination belongs either to training or to the held-out items, decided by a checksum, so that no
held-out item is in the training text and a model has to put together what it has only seen apart.
"""
import argparse
import collections
import os
import random
import zlib

# ------------------------------------------------------------------------------------------------
# The world
# ------------------------------------------------------------------------------------------------
GIRLS = "Anna Mia Lily Emma Sara Ruth Eva Nora Rosa Kate Jane Lucy".split()
BOYS = "Tom Sam Ben Max Leo Jack Paul Adam Hugo Carl Finn Otto".split()
NAMES = GIRLS + BOYS

CLASSES = {                    # class: (animals, what only this class does)
    "bird": ("owl hen duck eagle crow swan", ("has feathers", "has a beak")),
    "fish": ("trout shark salmon carp tuna eel", ("has fins", "breathes under water")),
    "mammal": ("dog cow horse mouse cat goat", ("has fur", "gives milk")),
    "insect": ("bee ant fly moth beetle wasp", ("has six legs", "has feelers")),
    "reptile": ("snake lizard turtle gecko cobra viper", ("has dry skin", "sleeps in the sun")),
}
ANIMALS = {animal: kind for kind, (names, _) in CLASSES.items() for animal in names.split()}
LAND = "dog cow horse mouse cat goat hen duck swan owl".split()

MATERIALS = "iron steel copper gold wood cork paper wool wax ice glass clay stone rubber".split()
PROPERTIES = {                 # what a thing does: the materials that do it
    "sticks to a magnet": "iron steel",
    "lets electricity through": "iron steel copper gold",
    "floats on water": "wood cork wax ice",
    "burns in a fire": "wood cork paper wool",
    "melts in the sun": "wax ice",
    "breaks on the floor": "glass clay ice",
    "bends in the hand": "rubber paper wool",
    "lets light through": "glass ice",
}
EVENTS = {                     # what is done to a thing: (outcome, for which), outcome otherwise
    "puts {} in water": (("it floats", "wood cork wax ice"), "it sinks"),
    "drops {} on the floor": (("it breaks", "glass clay ice"), "it stays whole"),
    "holds {} near a magnet": (("it sticks", "iron steel"), "it does not move"),
    "leaves {} in the sun": (("it melts", "wax ice"), "it gets warm"),
}
OUTCOMES = sorted({x for first, other in EVENTS.values() for x in (first[0], other)})

OBJECTS = "cup ring spoon plate ball box hat key bowl doll coin bottle chair lamp boat comb".split()
COLOURS = "red blue green yellow white black".split()
PLACES = "kitchen garden hall barn school shop park attic cellar office".split()
GOODS = "apples pears plums nuts eggs cakes figs buns dates beans".split()
JOBS = "baker farmer teacher doctor painter sailor driver singer".split()
GAIN, LOSS = ("finds", "buys", "gets"), ("loses", "sells", "eats")
DAYS = "Monday Tuesday Friday Sunday".split()

CRAFTS = {                     # activity: (tool, verb, thing)
    "Baking": ("pan", "bakes", "cake"), "Painting": ("brush", "paints", "wall"),
    "Sewing": ("needle", "mends", "shirt"), "Fishing": ("net", "catches", "fish"),
    "Digging": ("spade", "digs", "hole"), "Writing": ("pen", "writes", "letter"),
    "Building": ("hammer", "builds", "house"), "Sweeping": ("broom", "sweeps", "floor"),
    "Washing": ("soap", "washes", "dress"), "Chopping": ("axe", "chops", "tree"),
    "Eating": ("fork", "eats", "soup"), "Locking": ("key", "locks", "door"),
    "Cutting": ("knife", "cuts", "bread"), "Drinking": ("cup", "drinks", "tea"),
}
NEEDS = {                      # how somebody is: what that person does next
    "hungry": "eats some bread", "thirsty": "drinks some water", "tired": "goes to bed",
    "cold": "puts on a coat", "ill": "calls a doctor", "dirty": "takes a bath",
}
ORDERS = {"taller": ("tallest", "shortest"), "older": ("oldest", "youngest"),
          "faster": ("fastest", "slowest"), "richer": ("richest", "poorest")}

RECALL = (                     # facts about pairs, said forwards and backwards
    (NAMES, OBJECTS, "{} has the {}.", "The {1} is with {0}."),
    (NAMES, PLACES, "{} is in the {}.", "In the {1} is {0}."),
    (OBJECTS, PLACES, "The {} is in the {}.", "In the {1} is the {0}."),
    (OBJECTS, COLOURS, "The {} is {}.", "The {1} thing is the {0}."),
    (OBJECTS, MATERIALS, "The {} is made of {}.", "There is {1} in the {0}."),
    (LAND, NAMES, "The {} is with {}.", "{1} has the {0}."),
)

# bad: the wrong choices, if any; more: what training text says after good
Item = collections.namedtuple("Item", "key text good bad more", defaults=("",))


def is_held_out(key):
    """One combination in six is kept for the tasks and never trained on."""
    return zlib.crc32("|".join(map(str, key)).encode()) % 6 == 0


def a(noun):
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def he(name):
    return "he" if name in BOYS else "she"


def him(name):
    return "him" if name in BOYS else "her"


def his(name):
    return "his" if name in BOYS else "her"


def capital(text):
    return text[0].upper() + text[1:]


def listing(parts):
    return ", ".join(parts[:-1]) + " and " + parts[-1]


def couple(r):
    """A girl and a boy, in either order."""
    pair = [r.choice(GIRLS), r.choice(BOYS)]
    r.shuffle(pair)
    return pair


# ------------------------------------------------------------------------------------------------
# Llama's five tasks. A document is text + " " + good
# ------------------------------------------------------------------------------------------------
def science(r):
    """Questions with four choices: materials, animals, outcomes, orders."""
    form = r.choice(("material", "material", "animal", "outcome", "order"))
    if form == "material":
        does = r.choice(sorted(PROPERTIES))
        able = PROPERTIES[does].split()
        materials = [r.choice(able)] + r.sample([m for m in MATERIALS if m not in able], 3)
        things = r.sample(OBJECTS, 4)
        listed = [a(m) + " " + t for m, t in zip(materials, things)]
        r.shuffle(listed)
        question = f"There is {listing(listed)}. Which one {does}?"
        key, choices = ("material", does, materials[0], things[0]), [f"the {t}" for t in things]
    elif form == "animal":
        kind = r.choice(sorted(CLASSES))
        does = r.choice(CLASSES[kind][1])
        good = r.choice(CLASSES[kind][0].split())
        others = r.sample([x for x, k in ANIMALS.items() if k != kind], 3)
        listed = [a(x) for x in [good] + others]
        r.shuffle(listed)
        question, key = f"There is {listing(listed)}. Which one {does}?", ("animal", does, good)
        choices = [f"the {x}" for x in [good] + others]
    elif form == "outcome":
        event = r.choice(sorted(EVENTS))
        material, thing, name = r.choice(MATERIALS), r.choice(OBJECTS), r.choice(NAMES)
        (outcome, able), other = EVENTS[event]
        good, twin = (outcome, other) if material in able.split() else (other, outcome)
        done = event.format(a(material) + " " + thing)
        question, key = f"{name} {done}. What happens?", ("outcome", event, material, thing)
        choices = [good, twin] + r.sample([x for x in OUTCOMES if x not in (good, twin)], 2)
    else:
        things = r.sample(OBJECTS, 4)
        facts = [f"The {x} is heavier than the {y}." for x, y in zip(things, things[1:])]
        r.shuffle(facts)
        end, which = r.choice(((0, "heaviest"), (3, "lightest")))
        question = " ".join(facts) + f" Which one is the {which}?"
        key = ("order", *things)
        choices = [f"the {x}" for x in [things[end]] + things[:end] + things[end + 1:]]
    return Item(key, f"Question: {question}\nAnswer:", choices[0], choices[1:])


def ending(r):
    """How a scene goes on: the activity names a tool, the tool its owner, the owner a pronoun."""
    label, other = r.sample(sorted(CRAFTS), 2)
    tool, verb, thing = CRAFTS[label]
    tool2, verb2, thing2 = CRAFTS[other]
    who, friend = couple(r)
    place = r.choice(PLACES)
    owns = [f"{who} has the {tool}", f"{friend} has the {tool2}"]
    r.shuffle(owns)
    names = [who, friend]
    r.shuffle(names)
    gift = r.random() < 0.3
    text = f"{label}: {names[0]} and {names[1]} are in the {place}. {owns[0]} and {owns[1]}."
    if gift:
        text += f" {who} gives the {tool} to {friend}."
        who, friend = friend, who
    she, other_one = capital(he(who)), capital(he(friend))
    bad = [f"{other_one} {verb} the {thing} with the {tool}.",
           f"{she} {verb} the {thing} with the {tool2}.",
           r.choice((f"{she} {verb2} the {thing} with the {tool}.",
                     f"{she} {verb} the {thing2} with the {tool}.",
                     f"{other_one} {verb2} the {thing2} with the {tool2}."))]
    return Item((label, other, who, gift), text, f"{she} {verb} the {thing} with the {tool}.", bad)


def puzzle(r):
    """Two candidates for one gap: text holds a `_`, good and bad[0] fill it. Training text only."""
    form = r.choice(("fit", "order", "gift", "need", "drop", "race"))
    one, two, three = r.sample(NAMES, 3)
    if form == "fit":
        one, two = r.sample(OBJECTS, 2)
        size, first = r.choice((("big", True), ("small", False)))
        text, key = f"The {one} does not fit in the {two}, because the _ is too {size}.", ()
    elif form == "order":
        more = r.choice(sorted(ORDERS))
        first = r.random() < 0.5
        facts = [f"{one} is {more} than {three}.", f"{three} is {more} than {two}."]
        r.shuffle(facts)
        text, key = " ".join(facts) + f" So _ is the {ORDERS[more][not first]}.", (more, three)
    elif form == "gift":
        thing, first = r.choice(OBJECTS), r.random() < 0.5
        end = "said thank you" if not first else "got the thanks"
        text, key = f"{one} gave {a(thing)} to {two}, so _ {end}.", (thing,)
    elif form == "need":
        states = r.sample(sorted(NEEDS), 2)
        first = r.random() < 0.5
        text = f"{one} is {states[0]} and {two} is {states[1]}, so _ {NEEDS[states[not first]]}."
        key = tuple(states)
    elif form == "drop":
        one, two = r.sample(OBJECTS, 2)
        weak, strong = r.choice(("glass", "clay")), r.choice(("iron", "wood", "rubber"))
        swap, first = r.random() < 0.5, r.random() < 0.5
        made = (strong, weak) if swap else (weak, strong)
        end = "breaks" if first != swap else "stays whole"
        text = f"The {one} is made of {made[0]} and the {two} of {made[1]}. Both fall. The _ {end}."
        key = made
    else:
        verb, first = r.choice((("beat", True), ("lost to", False)))
        swap = r.random() < 0.5
        end = "lost" if swap else "won"
        first = first != swap
        text, key = f"{one} {verb} {two} in the race, so _ {end}.", (verb,)
    good, bad = (one, two) if first else (two, one)
    return Item((form, one, two, *key), text, good, [bad])


def pronoun(r):
    """Which of two people is it? Only the pronoun tells. The sentences are those of stories, put
    together as no training text has them."""
    who, friend = couple(r)
    thing, place, need = r.choice(OBJECTS), r.choice(PLACES), r.choice(sorted(NEEDS))
    form = r.choice(("thanks", "asks", "gives", "gets", "needs", "lives"))
    text, good, bad, told = {
        "thanks": (f"{who} sees {him(friend)} and gives {him(friend)} the {thing}, and _ says thank you "
                   f"to {him(who)}.", friend, who, thing),
        "asks": (f"{who} is in the {place} with {a(thing)}. _ sees {him(who)} and asks for the {thing}.",
                 friend, who, thing),
        "gives": (f"{who} is {need}, and _ gives {him(who)} the {thing}.", friend, who, thing),
        "gets": (f"{who} has the {thing}. _ asks for the {thing}, and {who} gives {him(friend)} the "
                 f"{thing}.", friend, who, thing),
        "needs": (f"{friend} sees {him(who)}. Now _ is {need}, so {he(who)} {NEEDS[need]}.", who, friend,
                  need),
        "lives": (f"{friend} is {a(r.choice(JOBS))}. _ lives near the {place} with {his(who)} "
                  f"{r.choice(LAND)}.", who, friend, place),
    }[form]
    return Item((form, who, friend, told), text, good, [bad])


def last_word(r):
    """A passage whose last word only the passage tells. Training text goes on to the other thing
    or person that could have been asked for."""
    form = r.choice(("with", "moved", "colour", "gave", "moved"))
    one, two, three = r.sample(NAMES, 3)
    spots = r.sample(PLACES, 4)
    if form == "with":
        things = r.sample(LAND, 2)
        told = [f"The {things[0]} is with {one}.", f"The {things[1]} is with {two}.",
                f"{one} is in the {spots[0]}.", f"{two} is in the {spots[1]}."]
        r.shuffle(told)
        asked = [(f"So the {things[i]} is in the", spots[i]) for i in (0, 1)]
    elif form == "moved":
        thing, other = r.sample(OBJECTS, 2)
        count = r.choice((2, 3, 4))
        told = [f"{one} took the {thing} to the {spots[0]}.",
                f"{two} took the {other} to the {spots[1]}.",
                f"{one} took the {thing} to the {spots[2]}.",
                f"{two} took the {other} to the {spots[3]}."][:count]
        asked = [(f"Now the {thing} is in the", spots[2 if count > 2 else 0]),
                 (f"Now the {other} is in the", spots[3 if count > 3 else 1])]
    elif form == "colour":
        hues, things = r.sample(COLOURS, 2), r.sample(OBJECTS, 2)
        shop = [f"{a(c)} {t}" for c, t in zip(hues, things)]
        r.shuffle(shop)
        fans = [f"{one} likes {hues[0]} things", f"{two} likes {hues[1]} things"]
        r.shuffle(fans)
        told = [f"{fans[0]} and {fans[1]}.", f"In the shop there is {shop[0]} and {shop[1]}."]
        asked = [(f"So {one} buys the", things[0]), (f"So {two} buys the", things[1])]
    else:
        thing, other = r.sample(OBJECTS, 2)
        told = [f"{one} has the {thing}.", f"{two} has the {other}."]
        r.shuffle(told)
        told.append(f"{one} gives the {thing} to {three}.")
        asked = [(f"Now the {thing} is with", three), (f"Now the {other} is with", two)]
    r.shuffle(asked)
    passage, ((question, good), (question2, good2)) = " ".join(told), asked
    return Item((form, passage), f"{passage} {question}", good, [], f" {question2} {good2}.")


def sums(r):
    """Word problems of two to four steps; good is the worked answer with its last line #### N."""
    one, two, three = r.sample(NAMES, 3)
    goods = r.choice(GOODS)
    form = r.choice(("chain", "chain", "bags", "more", "shop"))
    if form == "chain":
        total = r.randint(3, 12)
        numbers, story, steps = [total], [f"{one} has {total} {goods}."], []
        for _ in range(r.choice((2, 2, 3))):
            by = r.randint(1, 9)
            more = total <= by or r.random() < 0.5
            sign, verb = ("+" if more else "-"), r.choice(GAIN if more else LOSS)
            after = total + by if more else total - by
            steps.append(f"{total} {sign} {by} = {after}.")
            story.append(f"{capital(he(one))} {verb} {by}.")
            numbers.append(sign + str(by))
            total = after
        ask = f"How many {goods} does {one} have now?"
    elif form == "bags":
        bags, each, lost = r.randint(2, 6), r.randint(2, 6), r.randint(1, 3)
        total, numbers = bags * each - lost, [bags, each, lost]
        story = [f"{one} has {bags} bags with {each} {goods} in each bag.",
                 f"{capital(he(one))} loses {lost}."]
        steps = [f"{bags} * {each} = {bags * each}.", f"{bags * each} - {lost} = {total}."]
        ask = f"How many {goods} does {one} have now?"
    elif form == "more":
        first, more, less = r.randint(3, 9), r.randint(1, 6), r.randint(1, 3)
        second, third = first + more, first + more - less
        numbers = [first, more, less]
        story = [f"{one} has {first} {goods}. {two} has {more} more than {one}.",
                 f"{three} has {less} less than {two}."]
        steps = [f"{first} + {more} = {second}.", f"{second} - {less} = {third}."]
        ask = f"How many {goods} does {three} have?"
        total = third
    else:
        counts, prices = [r.randint(2, 4), r.randint(2, 4)], [r.randint(2, 5), r.randint(2, 5)]
        pair = r.sample(GOODS, 2)
        costs = [c * p for c, p in zip(counts, prices)]
        total, numbers = sum(costs), counts + prices
        story = [f"{one} buys {counts[0]} {pair[0]} for {prices[0]} coins each and "
                 f"{counts[1]} {pair[1]} for {prices[1]} coins each."]
        steps = [f"{c} * {p} = {c * p}." for c, p in zip(counts, prices)]
        steps.append(f"{costs[0]} + {costs[1]} = {total}.")
        ask = f"How many coins does {one} pay?"
    text = f"Question: {' '.join(story)} {ask}\nAnswer:"
    return Item((form, *numbers), text, f"{' '.join(steps)}\n#### {total}", [])


def fact(r):
    """Plain knowledge: what things are and do."""
    form = r.randrange(4)
    if form == 0:
        animal = r.choice(sorted(ANIMALS))
        kind = ANIMALS[animal]
        does = CLASSES[kind][1]
        return f"The {animal} is {a(kind)}. {capital(a(kind))} {does[0]} and {does[1]}."
    if form == 1:
        material = r.choice(MATERIALS)
        yes = [p for p in sorted(PROPERTIES) if material in PROPERTIES[p].split()]
        return " ".join(f"{capital(material)} {p}." for p in yes or ["is heavy"])
    if form == 2:
        label = r.choice(sorted(CRAFTS))
        tool, verb, thing = CRAFTS[label]
        return (f"{label}: for this you need the {tool}. "
                f"{r.choice(NAMES)} {verb} the {thing} with the {tool}.")
    n, m = r.randint(1, 9), r.randint(1, 9)
    top = r.randint(n, 24)
    return r.choice((f"{top} + {n} = {top + n}.", f"{top} - {n} = {top - n}.",
                     f"{min(n, 6)} * {min(m, 6)} = {min(n, 6) * min(m, 6)}."))


def recall(r):
    """Some facts, and the same again twice, each time in another order: practice in looking back."""
    left, right, say, back = r.choice(RECALL)
    count = r.randrange(3, 7)
    pairs = list(zip(r.sample(left, count), r.sample(right, count)))
    told = [say.format(*pair) for pair in pairs]
    for form in (say, r.choice((say, back))):
        r.shuffle(pairs)
        told += [form.format(*pair) for pair in pairs]
    return " ".join(told)


def chant(r):
    """A row of words three times over, where looking back is all there is to learn."""
    words = r.sample(NAMES + PLACES + OBJECTS + LAND + GOODS + COLOURS, r.randrange(6, 16))
    return " ".join([" ".join(words) + "."] * 3)


def story(r):
    """A day of two people, the general text."""
    who, friend = couple(r)
    thing, colour, place = r.choice(OBJECTS), r.choice(COLOURS), r.choice(PLACES)
    label = r.choice(sorted(CRAFTS))
    tool, verb, goal = CRAFTS[label]
    need = r.choice(sorted(NEEDS))
    start = [f"{who} is {a(r.choice(JOBS))}.",
             f"{capital(he(who))} lives near the {place} with {his(who)} {r.choice(LAND)}."]
    events = [f"On {r.choice(DAYS)} {who} finds {a(colour)} {thing} in the {place}.",
              f"{friend} sees {him(who)} and asks for the {thing}.",
              f"{who} gives {him(friend)} the {thing}, and {friend} says thank you to {him(who)}.",
              f"Then {friend} {verb} the {goal} with the {tool}.",
              f"Now {who} is {need}, so {he(who)} {NEEDS[need]}."]
    first = r.randrange(3)
    return " ".join(start * (first == 0) + events[first:first + r.randint(2, 4)])


LLAMA = {                      # task: (maker, header after the name, held-out items)
    "science": (science, "kind=choice\tmetrics=acc_norm,acc\tchance=0.25", 500),
    "ending": (ending, "kind=choice\tmetrics=acc_norm,acc\tchance=0.25", 500),
    "pronoun": (pronoun, "kind=contexts\tmetrics=acc\tchance=0.5", 500),
    "lastword": (last_word, "kind=lastword\tmetrics=acc,perplexity\tchance=0", 500),
    "sums": (sums, "kind=generate\tmetrics=strict,flexible\tchance=0"
             "\tstop=Question:|</s>\tmax_tokens=64", 200),
}


def document(item, maker):
    if maker in (puzzle, pronoun):
        return item.text.replace("_", item.good)
    return f"{item.text} {item.good}" + ("." if maker in (science, last_word) else "") + item.more


def draw(r, maker, held):
    """The maker's next item on the wanted side of the split."""
    while True:
        item = maker(r)
        if is_held_out(item.key) == held:
            return item


def llama_document(r):
    """One training document: mostly a task form, else practice, knowledge or a story."""
    maker = r.choices((science, ending, puzzle, last_word, sums, recall, chant, fact, story),
                      (18, 13, 15, 17, 13, 14, 2, 4, 4))[0]
    if maker in (recall, chant, fact, story):
        return maker(r)
    return document(draw(r, maker, False), maker)


def llama_row(item, maker, r):
    """One line of a task file."""
    if maker is pronoun:
        before, after = item.text.split("_")
        pair = [item.good, item.bad[0]]
        r.shuffle(pair)
        return [str(pair.index(item.good)), after.strip()] + [before + name for name in pair]
    if maker is sums:
        return [item.text, item.good]
    if maker is last_word:
        return [item.text, item.good]
    choices = [item.good] + item.bad
    r.shuffle(choices)
    return [str(choices.index(item.good)), item.text] + choices


# ------------------------------------------------------------------------------------------------
# BERT's six tasks. An item's text is one sentence or a pair; good is the label
# ------------------------------------------------------------------------------------------------
NOUNS = "dog cat horse cow goat hen duck owl boy girl teacher farmer baker doctor".split()
THINGS = "tree door wall gate table window bridge river".split()
ACTS = ("run", "sleep", "sing", "jump", "swim", "wait")
LIKED = "good great lovely funny sweet bright clever fine superb nice fresh fair".split()
HATED = "bad awful ugly boring sour dull stupid poor nasty weak stale silly".split()
SHOWN = "film book song play meal cake party game dance show trip tale".split()
TRADES = {                     # giver's sentence, taker's sentence
    "gave": ("{0} gave the {2} to {1}", "{1} got the {2} from {0}"),
    "sold": ("{0} sold the {2} to {1}", "{1} bought the {2} from {0}"),
    "lent": ("{0} lent the {2} to {1}", "{1} borrowed the {2} from {0}"),
    "taught": ("{0} taught {1} about the {2}", "{1} learned about the {2} from {0}"),
    "above": ("the {2} of {0} is above that of {1}", "the {2} of {1} is below that of {0}"),
    "before": ("{0} came to the {3} before {1}", "{1} came to the {3} after {0}"),
}
SAME = {"boy": "lad", "girl": "lass", "sees": "spots", "takes": "grabs", "wants": "desires",
        "big": "large", "small": "little", "old": "aged", "nice": "pleasant",
        "house": "home", "road": "street", "wood": "forest", "yard": "court"}
SCENE = (("boy", "girl", "man", "woman"), ("sees", "takes", "wants", "draws"),
         ("big", "small", "old", "nice"), ("cup", "ring", "spoon", "plate", "ball", "hat", "doll"),
         ("house", "road", "wood", "yard"))


def accept(r):
    """Is the sentence good English? Agreement over a distance, reflexives, verb forms, order."""
    noun, near, act = r.choice(NOUNS), r.choice(THINGS), r.choice(ACTS)
    many, many_near = r.random() < 0.5, r.random() < 0.5
    name, right = r.choice(NAMES), r.random() < 0.5
    form = r.choice(("agree", "agree", "self", "verb", "order"))
    subject = f"the {noun}{'s' * many} near the {near}{'s' * many_near}"
    if form == "agree":
        be = ("are" if many else "is") if right else ("is" if many else "are")
        mood = r.choice(("big", "old", "happy", "tired"))
        text, key = f"{subject} {be} {mood}.", (noun, near, many)
    elif form == "self":
        other = him(name) if right else him(GIRLS[0] if name in BOYS else BOYS[0])
        verb = r.choice(("hurt", "saw", "washed", "liked"))
        text, key = f"{name} {verb} {other}self near the {near}.", (name, near)
    elif form == "verb":
        modal = r.choice(("will", "can", "must"))
        text, key = f"{subject} {modal} {act if right else act + 's'} today.", (noun, act, near)
    else:
        words = ["the", noun, act + "s", "near", "the", near]
        if not right:
            place = r.choice((0, 3, 4))
            words[place:place + 2] = words[place + 1], words[place]
        text, key = " ".join(words) + ".", (noun, act, near)
    return Item((form, *key), (capital(text),), int(right), [])


def sentiment(r):
    """Is the review positive? Negation and `but` turn words around."""
    positive, form = r.random() < 0.5, r.choice(("plain", "not", "but", "nobody", "turn"))
    own, other = (LIKED, HATED) if positive else (HATED, LIKED)
    noun, (one, second), (two, third) = r.choice(SHOWN), r.sample(own, 2), r.sample(other, 2)
    crowd, praise = "everybody" if positive else "nobody", r.choice(LIKED)
    text, used = {
        "plain": (f"The {noun} was {one} and {second}.", (one, second)),
        "not": (f"The {noun} was not {two}, it was not {third}.", (two, third)),
        "but": (f"The {noun} was {two} at first, but {one} in the end.", (one, two)),
        "nobody": (f"The {noun} was on, and {crowd} said it was {praise}.", (praise, crowd)),
        "turn": (f"They said the {noun} was {two}, but it was not.", (two,)),
    }[form]
    return Item((form, noun, *used), (text,), int(positive), [])


def paraphrase(r):
    """Do two sentences say the same? An event from the other side; roles or a part exchanged."""
    trade, other = r.sample(sorted(TRADES), 2)
    one, two, three = r.sample(NAMES, 3)
    thing, place = r.choice(OBJECTS), r.choice(PLACES)
    same, form = r.random() < 0.5, r.randrange(2)
    first = TRADES[trade][form].format(one, two, thing, place)
    key = ("same", trade, one, two, place if trade == "before" else thing)
    if not same:
        change = r.choice(("roles", "roles", "name", "event"))
        if change == "roles":
            one, two = two, one
        elif change == "name":
            one = three
        else:
            trade = other
    second = TRADES[trade][1 - form].format(one, two, thing, place)
    return Item(key, (capital(first) + ".", capital(second) + "."),
                int(same), [])


def entail(r):
    """Does the second sentence follow (0) or not (1)? Places, materials, orders."""
    form, follows = r.choice(("place", "material", "order")), r.random() < 0.5
    one, two, three = r.sample(NAMES, 3)
    if form == "place":
        thing, other = r.sample(OBJECTS, 2)
        spots = r.sample(PLACES, 2)
        facts = [f"{one} has the {thing}.", f"{one} is in the {spots[0]}.",
                 f"{two} is in the {spots[1]}."]
        r.shuffle(facts)
        where = spots[0] if follows else r.choice((spots[1], spots[1], *PLACES))
        text, claim, follows = " ".join(facts), f"The {thing} is in the {where}.", where == spots[0]
        key = (one, thing, spots[0])
    elif form == "material":
        does = r.choice(sorted(PROPERTIES))
        able = PROPERTIES[does].split()
        material, other = r.choice(able), r.choice([m for m in MATERIALS if m not in able])
        things = r.sample(OBJECTS, 2)
        facts = [f"the {things[0]} is made of {material}", f"the {things[1]} of {other}"]
        text = f"{capital(facts[0])} and {facts[1]}."
        claim, key = f"The {things[not follows]} {does}.", (does, material, things[0])
    else:
        more = r.choice(sorted(ORDERS))
        facts = [f"{one} is {more} than {two}.", f"{two} is {more} than {three}."]
        r.shuffle(facts)
        ends = r.choice(((one, three), (one, three), (one, two), (two, three)))
        if not follows:
            stranger = r.choice([name for name in NAMES if name not in (one, two, three)])
            ends = r.choice((ends[::-1], ends[::-1], (stranger, ends[1])))
        text, claim = " ".join(facts), f"{ends[0]} is {more} than {ends[1]}."
        key = (more, one, three)
    return Item(("entail", form, *key), (text, claim), int(not follows), [])


def similar(r):
    """How alike are two scenes, 0 to 5: one point for each of five parts that agree in meaning."""
    first = [r.choice(part) for part in SCENE]
    kept = r.randrange(6)
    keep = r.sample(range(5), kept)
    second = [w if i in keep else r.choice([x for x in SCENE[i] if x != w])
              for i, w in enumerate(first)]

    def say(words):
        words = [SAME[w] if w in SAME and r.random() < 0.4 else w for w in words]
        return "The {} {} the {} {} near the {}.".format(*words)
    return Item(("similar", *first, *second), (say(first), say(second)), kept, [])


def answers(r):
    """Does the second sentence answer the question (0) or not (1)?"""
    one, two = r.sample(NAMES, 2)
    thing, other = r.sample(OBJECTS, 2)
    place, where = r.sample(PLACES, 2)
    yes, form = r.random() < 0.5, r.choice(("who", "where", "what"))
    text, good, bad = {
        "who": (f"Who has the {thing}?", f"{one} has the {thing} in the {place}.",
                r.choice((f"{one} has the {other} in the {place}.",
                          f"The {thing} is in the {place}."))),
        "where": (f"Where is {one}?", f"{one} is in the {place} with the {thing}.",
                  r.choice((f"{two} is in the {place} with the {thing}.",
                            f"{one} likes the {thing} of the {place}."))),
        "what": (f"What does {one} take to the {place}?",
                 f"{one} takes the {thing} to the {place}.",
                 r.choice((f"{one} takes the {thing} to the {where}.",
                           f"{two} takes the {thing} to the {place}."))),
    }[form]
    key = (form, thing if form == "who" else one, place, thing)
    return Item(("answers", *key), (text, good if yes else bad), int(not yes), [])


CLASSIFY = "kind=classify\tmetrics={}\tchance={{}}\tlabels={}"
BERT = {                       # task: (maker, header after the name, less the largest class)
    "accept": (accept, CLASSIFY.format("matthews,acc", "unacceptable|acceptable")),
    "sentiment": (sentiment, CLASSIFY.format("acc", "negative|positive")),
    "paraphrase": (paraphrase, CLASSIFY.format("acc,f1", "different|same")),
    "entail": (entail, CLASSIFY.format("acc", "entailment|not_entailment")),
    "answers": (answers, CLASSIFY.format("acc", "answer|not_answer")),
    "similar": (similar, "kind=regress\tmetrics=pearson,spearman\tchance=0"),
}
DEV, TRAIN = 500, 3000


def bert_pair(r):
    """(follows, first, second): BERT's pre-training pairs, a sentence and what comes after it.

    Beside two sentences of one story these are a fact and its consequence, an event and its
    retelling, a review and another, a pupil's sentence (right or wrong) and a happy teacher.
    """
    form = r.choices(("story", "accept", "sentiment", "paraphrase", "entail", "answers", "similar"),
                     (3, 4, 3, 3, 4, 3, 4))[0]
    follows = r.random() < 0.5
    if form == "story":
        one = story(r).split(". ")
        other = story(r).split(". ")
        cut = r.randrange(1, len(one))
        after = one[cut] if follows else r.choice(other)
        return int(follows), one[cut - 1].rstrip(".") + ".", after.rstrip(".") + "."
    item = draw(r, BERT[form][0], False)
    if form == "accept":
        return item.good, *item.text, r.choice(("The teacher was happy.", "The teacher liked it."))
    if form == "sentiment":
        words = LIKED if item.good == follows else HATED
        return int(follows), item.text[0], f"{r.choice(NAMES)} said it was {r.choice(words)}."
    if form == "similar":
        follows = item.good >= 4 if item.good != 3 else False
        return int(follows), *item.text
    return int((item.good == 1) == (form == "paraphrase")), *item.text


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------
def escape(field):
    for raw, written in (("\\", "\\\\"), ("\n", "\\n"), ("\t", "\\t"), ("\r", "\\r")):
        field = field.replace(raw, written)
    return field


def distinct(r, maker, held, count, seen):
    """count items with texts not yet seen."""
    items = []
    for _ in range(100 * count):
        if len(items) == count:
            break
        item = draw(r, maker, held)
        if (item.text, item.good) not in seen:
            seen.add((item.text, item.good))
            items.append(item)
    assert len(items) == count, f"{maker.__name__}: too few different items"
    return items


def write_task(path, name, header, rows):
    with open(path, "w", encoding="utf-8", newline="\n") as out:
        print("#painters-task", 1, f"name={name}", header, sep="\t", file=out)
        for row in rows:
            print("\t".join(escape(field) for field in row), file=out)


def write_tasks(folder, seed):
    """All task files; returns their paths by name (`NAME_train` for BERT's training parts)."""
    paths = {}

    def put(name, title, header, rows):
        paths[name] = os.path.join(folder, name + ".tsv")
        write_task(paths[name], title, header, rows)
    for name, (maker, header, count) in LLAMA.items():
        r = random.Random(f"{seed}/{name}")
        items = distinct(r, maker, True, count, set())
        put(name, name, header, [llama_row(item, maker, r) for item in items])
    for name, (maker, header) in BERT.items():
        r = random.Random(f"{seed}/{name}")
        for part, held, count in (("", True, DEV), ("_train", False, TRAIN)):
            items = distinct(r, maker, held, count, set())
            labels = [item.good for item in items]
            top = max(labels.count(x) for x in set(labels)) / count
            top = 0 if "matthews" in header else top
            put(name + part, name, header.format(f"{top:.4g}"),
                [[str(item.good), *item.text] for item in items])
    return paths


def write_corpus(folder, seed, documents, pairs):
    r = random.Random(f"{seed}/llama")
    with open(os.path.join(folder, "llama.txt"), "w", encoding="utf-8", newline="\n") as out:
        for _ in range(documents):
            print(escape(llama_document(r)), file=out)
    r = random.Random(f"{seed}/bert")
    with open(os.path.join(folder, "bert.tsv"), "w", encoding="utf-8", newline="\n") as out:
        for _ in range(pairs):
            print(*bert_pair(r), sep="\t", file=out)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--llama", type=int, default=300000, help="training documents")
    parser.add_argument("--bert", type=int, default=500000, help="training pairs")
    args = parser.parse_args()
    os.makedirs(args.out, exist_ok=True)
    write_tasks(args.out, args.seed)
    write_corpus(args.out, args.seed, args.llama, args.bert)


if __name__ == "__main__":
    main()
