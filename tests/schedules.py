"""Every intervention, written from its definition: the tests' own source of what is right.

A schedule is a list of steps, a step a list of layers. `build` makes the paper's interventions for
T layers, with Python's own random for the shuffled one; `parse` reads the --path grammar.
"""
import random
import re

METHODS = ("skip", "repeat", "reverse", "random", "parallel", "loop", "drop", "swap")


def build(method, T, start=0, argument=None):
    """The schedule of a method for T layers; `argument` is random's seed or loop's R."""
    if method == "baseline":
        return [[i] for i in range(T)]
    if method == "drop":
        return [[i] for i in range(T) if i != start]
    if method == "swap":
        order = list(range(T))
        order[start], order[start + 1] = order[start + 1], order[start]
        return [[i] for i in order]
    head, tail = list(range(start + 1)), list(range(T - start, T))
    middle = list(range(start + 1, T - start))
    if method == "skip":
        steps = []
    elif method == "repeat":
        steps = [[T // 2] for _ in middle]
    elif method == "reverse":
        steps = [[i] for i in reversed(middle)]
    elif method == "random":
        random.seed(argument)
        random.shuffle(middle)
        steps = [[i] for i in middle]
    else:
        steps = [middle] * {"parallel": 1, "loop": argument}[method]
    return [[i] for i in head] + steps + [[i] for i in tail]


def starts(method, T):
    """The starts (or layers, for drop and swap) that a method has in a model of T layers."""
    if method in ("drop", "swap"):
        return range(T if method == "drop" else T - 1) if T > 1 else range(0)
    return range((T - 2) // 2 + 1) if T > 1 else range(0)


def flags(method, start=0, argument=None):
    """The command-line flags of an intervention."""
    if method == "baseline":
        return []
    out = ["--" + method, str(start)]
    if argument is not None:
        out += [{"random": "--seed", "loop": "--times"}[method], str(argument)]
    return out


def text(schedule):
    """A schedule as --show prints it."""
    return " ".join("|".join(map(str, step)) for step in schedule)


class PathError(ValueError):
    """A --path that the grammar does not have; .at is the first bad character, from 1."""

    def __init__(self, at):
        super().__init__("character %d" % at)
        self.at = at


def parse(path, T):
    """The schedule of a --path text, or PathError."""
    steps, at = [], 0

    def layer(at):
        digits = re.compile("[0-9]+").match(path, at)
        if not digits or int(digits.group()) >= T:
            raise PathError(at + 1)
        return int(digits.group()), digits.end()

    def span(at):  # layer or range: its layers, whether a range, where it ends
        first, at = layer(at)
        if path[at:at + 1] != "-":
            return [first], False, at
        last, at = layer(at + 1)
        step = 1 if last >= first else -1
        return list(range(first, last + step, step)), True, at

    while True:
        if path[at:at + 1] == "(":
            group, at = [], at + 1
            while True:
                layers, _, at = span(at)
                group += layers
                if path[at:at + 1] != "|":
                    break
                at += 1
            if path[at:at + 1] != ")":
                raise PathError(at + 1)
            at, new, starred = at + 1, [group], True
        else:
            layers, is_range, at = span(at)
            new, starred = [[i] for i in layers], not is_range
            if not is_range and path[at:at + 1] == "|":
                starred = False
                while path[at:at + 1] == "|":
                    more, at = layer(at + 1)
                    new[0].append(more)
        if starred and path[at:at + 1] == "*":
            count = re.compile("[0-9]+").match(path, at + 1)
            if not count or not 1 <= int(count.group()) <= 1000000:
                raise PathError(at + 2)
            new, at = new * int(count.group()), count.end()
        steps += new
        if at == len(path):
            return steps
        if path[at] != " ":
            raise PathError(at + 1)
        at += 1
