"""Schedules: every intervention equals its definition, --path accepts its grammar and no more."""
import concurrent.futures
import os
import random
import re
import unittest

import common
import schedules

SEEDS = (0, 1, 2, 9, 1234, 2**31, 2**32 - 1, 2**32, 4294967301, 9 * 10**18, -1, -7, -2**40)


def show(T, *flags):
    """The line that painters --layers T ... --show prints, without its newline."""
    out = common.run("--layers", T, *flags, "--show").decode()
    if not out.endswith("\n") or out.count("\n") != 1:
        raise AssertionError("--show printed %r" % out)
    return out[:-1]


def each(function, cases):
    """function(*case) for all cases, a few at a time; raises what any of them raises."""
    common.painters()
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda case: function(*case), cases))


def interventions(sizes, most_starts):
    """(T, method, start, argument) over sizes, starts, seeds and loop counts."""
    rng = random.Random(11)
    for T in sizes:
        yield T, "baseline", 0, None
        for method in schedules.METHODS:
            starts = list(schedules.starts(method, T))
            if len(starts) > most_starts:
                starts = [starts[0], starts[-1]] + rng.sample(starts[1:-1], most_starts - 2)
            for start in starts:
                arguments = {"random": rng.sample(SEEDS, 3), "loop": (1, 3, 7)}
                for argument in arguments.get(method, (None,)):
                    yield T, method, start, argument


def read_golden(path):
    """(T, method, start, argument, text) of each line of a schedules.tsv."""
    with open(path, encoding="utf-8") as f:
        for line in f:
            if not line.startswith("#"):
                T, method, start, argument, text = line.rstrip("\n").split("\t")
                number = int(argument) if method in ("random", "loop") else None
                yield int(T), method, int(start), number, text


class Definitions(unittest.TestCase):

    def check(self, T, method, start, argument, text):
        found = show(T, *schedules.flags(method, start, argument))
        self.assertEqual(found, text, "T %d %s %d %s" % (T, method, start, argument))

    def test_every_method(self):
        cases = interventions((1, 2, 3, 4, 5, 6, 7, 8, 13, 24, 33, 40, 80), 5)
        each(lambda *c: self.check(*c, schedules.text(schedules.build(c[1], c[0], *c[2:]))), cases)

    def test_own_golden(self):
        each(self.check, read_golden(os.path.join(common.TESTS, "golden", "schedules.tsv")))

    def test_shared_golden(self):
        cases = list(read_golden(common.shared("golden", "schedules.tsv")))
        self.assertGreater(len(cases), 500)
        each(self.check, cases)

    def test_default_argument(self):
        self.assertEqual(show(12, "--random", 2), show(12, "--random", 2, "--seed", 0))
        self.assertEqual(show(12, "--loop", 2), show(12, "--loop", 2, "--times", 3))

    def test_with_a_model(self):
        model = common.model("llama_gqa")
        self.assertEqual(common.run(model, "--loop", 1, "--times", 2, "--show"),
                         b"0 1 2|3|4 2|3|4 5\n")


class Path(unittest.TestCase):

    def test_every_line_is_a_path(self):
        def check(T, method, start, argument):
            line = show(T, *schedules.flags(method, start, argument))
            self.assertEqual(show(T, "--path", line), line)
        each(check, list(interventions((1, 2, 3, 5, 6, 12, 24, 32), 3)))

    def test_the_manual(self):
        """The examples that teach the grammar."""
        for T, path, right in (
                (32, "0-9 (10|11|12)*3 20-13 31",
                 " ".join(map(str, range(10))) + " 10|11|12" * 3 + " 20 19 18 17 16 15 14 13 31"),
                (32, "(10-12)*3", "10|11|12 10|11|12 10|11|12"),
                (6, "5-0", "5 4 3 2 1 0"), (6, "3-3", "3"), (6, "(3-3)", "3"), (6, "4*3", "4 4 4"),
                (6, "(4)", "4"), (6, "1|1|2", "1|1|2"),
                (6, "(4-2|0|1-2)*2", "4|3|2|0|1|2 4|3|2|0|1|2"), (1, "0", "0")):
            self.assertEqual(show(T, "--path", path), right)

    def test_interventions_spelled(self):
        """The paper's interventions rebuilt as paths."""
        for path, flags in (("0-11", []), ("0-3 9-11", ["--skip", 3]),
                            ("0-3 6*5 9-11", ["--repeat", 3]), ("0-3 8-4 9-11", ["--reverse", 3]),
                            ("0-3 (4-8) 9-11", ["--parallel", 3]),
                            ("0-3 (4-8)*4 9-11", ["--loop", 3, "--times", 4]),
                            ("0-6 8-11", ["--drop", 7]), ("0-6 8 7 9-11", ["--swap", 7])):
            self.assertEqual(show(12, "--path", path), show(12, *flags))

    def refuse(self, T, path, at):
        line = common.refused("--layers", T, "--path", path, "--show")
        place = re.search(r"character (\d+)", line)
        self.assertTrue("--path" in line and place, line)
        self.assertEqual(int(place.group(1)), at, "%r: %s" % (path, line))

    def test_refused(self):
        """What the grammar does not have, and the character where that shows."""
        for T, path, at in (
                (6, "", 1), (6, " ", 1), (6, " 0", 1), (6, "0 ", 3), (6, "0  1", 3), (6, "0,1", 2),
                (6, "6", 1), (6, "0 12", 3), (6, "0-6", 3), (6, "-1", 1), (6, "0-", 3),
                (6, "0--1", 3), (6, "0-2-4", 4), (6, "0|", 3), (6, "|0", 1), (6, "0||1", 3),
                (6, "1|2*3", 4), (6, "1-3*2", 4), (6, "1|2-3", 4), (6, "()", 2), (6, "(", 2),
                (6, "(1", 3), (6, "(1|2", 5), (6, "(1 2)", 3), (6, "(1|)", 4), (6, "1)", 2),
                (6, "((1))", 2), (6, "(1)(2)", 4), (6, "(1)2", 4), (6, "1*", 3), (6, "1*0", 3),
                (6, "1*2*2", 4), (6, "1*-1", 3), (6, "(1|2)*x", 7), (6, "*2", 1), (6, "a", 1),
                (6, "1.0", 2), (6, "0x1", 2), (6, "+1", 1), (6, "1*9999999999999999999999", 3),
                (6, "99999999999999999999", 1), (6, "0\t1", 2), (6, "0\n", 2), (6, "1*1000001", 3),
                (6, "0\u00a01", 2), (1, "0-1", 3)):
            with self.subTest(path=path):
                self.refuse(T, path, at)

    def test_too_long(self):
        line = common.refused("--layers", 6, "--path", "(0-5)*1000000", "--show")
        self.assertIn("1000000", line)

    def test_generated(self):
        """Random texts over the grammar's alphabet, and valid paths with one character changed."""
        rng = random.Random(3)

        def step():
            layer = lambda: str(rng.randrange(8))
            span = lambda: rng.choice((layer(), layer() + "-" + layer()))
            count = rng.choice(("", "", "*%d" % rng.randrange(1, 5)))
            layers = "|".join(layer() for _ in range(rng.randrange(2, 5)))
            group = "(" + "|".join(span() for _ in range(rng.randrange(1, 4))) + ")"
            return rng.choice((layer() + count, layer() + "-" + layer(), layers, group + count))

        cases = []
        for turn in range(600):
            path = " ".join(step() for _ in range(rng.randrange(1, 5)))
            if turn % 3:
                at = rng.randrange(len(path))
                path = path[:at] + rng.choice("0179 |()-*") + path[at + turn % 2:]
            cases.append((path,))

        def check(path):
            try:
                right = schedules.text(schedules.parse(path, 8))
            except schedules.PathError as error:
                self.refuse(8, path, error.at)
                return False
            self.assertEqual(show(8, "--path", path), right)
            return True

        accepted = sum(each(check, cases))
        self.assertTrue(250 < accepted < 500, accepted)


class Refused(unittest.TestCase):
    """Numbers out of range are refused with the range that is allowed."""

    def refuse(self, *arguments, says=()):
        line = common.refused(*arguments, "--show")
        for part in says:
            self.assertRegex(line, part)

    def test_starts(self):
        for T in (2, 3, 6, 7, 32):
            for method in schedules.METHODS:
                most = schedules.starts(method, T)[-1]
                for start in (most + 1, most + 2, T, T + 1, -1, 10**12):
                    self.refuse("--layers", T, "--" + method, start,
                                says=("--" + method, r"\b0 to %d\b" % most))

    def test_no_middle(self):
        for method in schedules.METHODS:
            self.refuse("--layers", 1, "--" + method, 0, says=("--" + method,))

    def test_loop_counts(self):
        for times in (0, -1):
            self.refuse("--layers", 6, "--loop", 1, "--times", times,
                        says=("--times", r"\b1 to \d+"))

    def test_no_layers(self):
        for T in (0, -1):
            self.refuse("--layers", T, says=("--layers", r"\b1 to \d+"))

    def test_not_numbers(self):
        for flag in ["--" + method for method in schedules.METHODS]:
            for value in ("", "x", "1x", "1.0", " 1", "1 ", "0x1", "+1", "1e0", "9" * 30):
                self.refuse("--layers", 6, flag, value, says=(flag,))
        for flag, other in (("--random", "--seed"), ("--loop", "--times")):
            for value in ("", "x", "1x", "1.5", "9" * 30):
                self.refuse("--layers", 6, flag, 1, other, value, says=(other,))

    def test_two_interventions(self):
        self.refuse("--layers", 6, "--skip", 1, "--reverse", 1, says=("--reverse|--skip",))
        self.refuse("--layers", 6, "--skip", 1, "--path", "0", says=("--path|--skip",))

    def test_arguments_of_others(self):
        """--seed and --times mean nothing without the intervention that reads them."""
        self.refuse("--layers", 6, "--skip", 1, "--seed", 3, says=("--seed",))
        self.refuse("--layers", 6, "--random", 1, "--times", 3, says=("--times",))


if __name__ == "__main__":
    unittest.main()
