"""Metrics, their standard errors, GSM8K's answers and the probe's fit, against plain definitions.

tests/oracle_eval.py compares the same functions with scikit-learn, SciPy and the harness.
"""
import array
import collections
import functools
import math
import os
import random
import re
import resource
import subprocess
import unittest

import common


def ask(lines, env=None):
    """The answers of tests/metrics.c to some requests, as lists of numbers."""
    done = subprocess.run([common.build("metrics")], input="\n".join(lines) + "\n", text=True,
                          capture_output=True, env=dict(os.environ, **(env or {})), check=True)
    answers = [[float(word) for word in line.split()] for line in done.stdout.splitlines()]
    if len(answers) != len(lines):
        raise AssertionError("%d answers to %d requests" % (len(answers), len(lines)))
    return answers


def hexed(text):
    return text.encode("utf-8").hex() or "-"


def metric_line(kind, name, rows):
    """A request for a metric of kept values [items][width]."""
    values = " ".join(repr(float(v)) for row in rows for v in row)
    return "metric %s %s %d %d %s" % (kind, name, len(rows), len(rows[0]) if rows else 1, values)


def probe_line(path, rows, targets, classes, strength):
    """Writes features and targets to a file; the request to fit them."""
    with open(path, "wb") as f:
        array.array("f", [v for row in rows for v in row]).tofile(f)
        array.array("d", targets).tofile(f)
    return "probe %s %d %d %d %r" % (path, len(rows), len(rows[0]), classes, strength)


# Definitions --------------------------------------------------------------------------------------

def mean(values):
    return math.fsum(values) / len(values)


def matthews(rows):
    n = len(rows)
    labels = range(int(max(max(row) for row in rows)) + 1)
    predicted = [sum(row[0] == k for row in rows) for k in labels]
    gold = [sum(row[1] == k for row in rows) for k in labels]
    right = sum(row[0] == row[1] for row in rows)
    above = right * n - sum(p * g for p, g in zip(predicted, gold))
    below = (n * n - sum(p * p for p in predicted)) * (n * n - sum(g * g for g in gold))
    return above / math.sqrt(below) if below else 0.0


def f1(rows):
    hits = sum(row == (1, 1) for row in map(tuple, rows))
    wrong = sum((row[0] == 1) != (row[1] == 1) for row in rows)
    return 2 * hits / (2 * hits + wrong) if hits + wrong else 0.0


def pearson(rows):
    xs, ys = zip(*rows)
    if len(set(xs)) == 1 or len(set(ys)) == 1:
        return math.nan
    a, b = mean(xs), mean(ys)
    cov = math.fsum((x - a) * (y - b) for x, y in rows)
    squares = [math.fsum((v - m) ** 2 for v in values) for values, m in ((xs, a), (ys, b))]
    return cov / math.sqrt(squares[0] * squares[1])


def ranks(values):
    """Ranks from 1, equal values sharing their average."""
    return [sum(other < v for other in values) + (sum(other == v for other in values) + 1) / 2
            for v in values]


def spearman(rows):
    xs, ys = zip(*rows)
    return pearson(list(zip(ranks(xs), ranks(ys))))


def perplexity(column):
    return lambda rows: math.exp(-math.fsum(row[0] for row in rows) / math.fsum(
        row[column] if column else 1 for row in rows))


def formula(values):
    """Sample deviation over the root of n."""
    m = mean(values)
    return math.sqrt(math.fsum((v - m) ** 2 for v in values) / (len(values) - 1) / len(values))


def bootstrap(function, rows, resamples=400):
    """Standard deviation over resamples, as the harness has it; within some 10% of the truth."""
    rng = random.Random(5)
    found = [function(rng.choices(rows, k=len(rows))) for _ in range(resamples)]
    found = [value for value in found if not math.isnan(value)]
    return formula(found) * math.sqrt(len(found))


def pairs(rng, n, labels):
    return [(rng.randrange(labels), rng.randrange(labels)) for _ in range(n)]


def scores(rng, n, ties):
    """Correlated numbers, some of them equal."""
    golds = [rng.choice((0.0, 1.25, 2.5, 3.8, 5.0)) if ties else rng.uniform(0, 5)
             for _ in range(n)]
    return [(round(g + rng.gauss(0, 2), 1 if ties else 9), g) for g in golds]


class Values(unittest.TestCase):

    def check(self, kind, name, rows, right, error=None, within=1e-12):
        (value, found), = ask([metric_line(kind, name, rows)])
        what = "%s %s of %d" % (kind, name, len(rows))
        if math.isnan(right):
            self.assertTrue(math.isnan(value), what)
        else:
            self.assertLess(abs(value - right), 1e-12 * max(1, abs(right)), what)
        if error is not None:
            self.assertLess(abs(found - error), within * max(error, 1e-9), what + " error")
        return found

    def test_shares_and_their_formula(self):
        rng = random.Random(1)
        for n in (2, 3, 117):
            rows = [(rng.random() < 0.3, rng.random() < 0.6) for _ in range(n)]
            rows[:2] = [(0, 1), (1, 0)]
            for kind, name, column in (("choice", "acc", 0), ("choice", "acc_norm", 1),
                                       ("contexts", "acc", 0), ("lastword", "acc", 1),
                                       ("generate", "strict", 0), ("generate", "flexible", 1)):
                values = [float(row[column]) for row in rows]
                self.check(kind, name, rows, mean(values), formula(values))
            same = [float(row[0] == row[1]) for row in rows]
            self.check("classify", "acc", rows, mean(same), formula(same))

    def test_agreement_of_classes(self):
        rng = random.Random(2)
        for n, labels in ((2, 2), (9, 2), (60, 2), (61, 3)):
            rows = pairs(rng, n, labels)
            self.check("classify", "matthews", rows, matthews(rows))
            self.check("classify", "f1", rows, f1(rows))
        constant = [(1, k % 2) for k in range(8)]
        nothing = [(0, 0)] * 5
        for rows in (constant, [row[::-1] for row in constant], nothing, [(1, 1)] * 4):
            self.check("classify", "matthews", rows, 0.0, 0.0)
            self.check("classify", "f1", rows, f1(rows))

    def test_correlations(self):
        rng = random.Random(3)
        for n in (3, 10, 150):
            for ties in (False, True):
                rows = scores(rng, n, ties)
                self.check("regress", "pearson", rows, pearson(rows))
                self.check("regress", "spearman", rows, spearman(rows))
        for name in ("pearson", "spearman"):
            for rows in ([(2.5, k) for k in range(6)], [(k, 0.1) for k in range(6)], [(1, 2)]):
                self.assertTrue(math.isnan(self.check("regress", name, rows, math.nan)))
            self.check("regress", name, [(1, 3), (2, 7)], 1.0)
            self.check("regress", name, [(2, 3), (1, 7)], -1.0)
            self.assertTrue(math.isnan(self.check("regress", name, [(1, 2), (math.nan, 3), (2, 4)],
                                                  math.nan)))

    def test_perplexities(self):
        rng = random.Random(4)
        rows = [(rng.uniform(-9, -1), rng.random() < 0.5) for _ in range(40)]
        self.check("lastword", "perplexity", rows, perplexity(None)(rows))
        texts = [(rng.uniform(-90, -10), rng.randrange(9, 20), rng.randrange(5, 9),
                  rng.randrange(40, 70), rng.randrange(9)) for _ in range(12)]
        for name, column in (("token_perplexity", 1), ("word_perplexity", 2),
                             ("byte_perplexity", 3), ("pseudo_perplexity", 1)):
            self.check("text", name, texts, perplexity(column)(texts))
        right = sum(row[4] for row in texts) / sum(row[1] for row in texts)
        self.check("text", "masked_acc", texts, right)

    def test_no_error_without_two_items(self):
        for kind, name, width in (("choice", "acc", 2), ("lastword", "perplexity", 2),
                                  ("classify", "f1", 2), ("text", "byte_perplexity", 5)):
            for rows in ([], [(1,) * width]):
                (value, error), = ask([metric_line(kind, name, rows)])
                self.assertEqual(math.isnan(value), not rows)
                self.assertTrue(math.isnan(error))


class Errors(unittest.TestCase):

    def test_bootstrap(self):
        rng = random.Random(6)
        words = [(rng.gauss(-3, 2), 1) for _ in range(200)]
        texts = [(rng.uniform(-90, -10), 12, 9, rng.randrange(40, 70), 3) for _ in range(30)]
        cases = [("lastword", "perplexity", words, perplexity(None)),
                 ("text", "byte_perplexity", texts, perplexity(3)),
                 ("classify", "matthews", pairs(rng, 80, 2), matthews),
                 ("classify", "f1", pairs(rng, 80, 2), f1),
                 ("classify", "f1", pairs(rng, 3000, 2), f1),
                 ("classify", "matthews", pairs(rng, 700, 5), matthews),
                 ("regress", "pearson", scores(rng, 60, True), pearson),
                 ("regress", "spearman", scores(rng, 60, True), spearman)]
        answers = ask([metric_line(kind, name, rows) for kind, name, rows, _ in cases])
        for (kind, name, rows, function), (_, error) in zip(cases, answers):
            right = bootstrap(function, rows)
            self.assertLess(abs(error - right), 0.15 * right, kind + " " + name)

    def test_many_items_of_few_values(self):
        """The dev set of QQP: a resample is a draw of four numbers, not of 40,430 items."""
        rows = pairs(random.Random(12), 40430, 2)
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        (_, error), *others = ask([metric_line("classify", "f1", rows)] * 10)
        spent = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
        self.assertEqual(others, [[_, error]] * 9)
        self.assertLess(spent, 12)      # seconds for ten; item by item they take 30
        counts = collections.Counter(rows)      # the error that large samples have, by derivatives
        hits, wrong = counts[1, 1], counts[0, 1] + counts[1, 0]
        slope = [2 * wrong / (2 * hits + wrong) ** 2, -2 * hits / (2 * hits + wrong) ** 2]
        spread = hits * slope[0] ** 2 + wrong * slope[1] ** 2
        self.assertLess(abs(error / math.sqrt(spread) - 1), 0.03)

    def test_same_for_any_number_of_threads(self):
        rng = random.Random(7)
        lines = [metric_line("regress", "spearman", scores(rng, 50, True)),
                 metric_line("lastword", "perplexity", [(rng.gauss(-3, 2), 1) for _ in range(99)])]
        found = [ask(lines, {"OMP_NUM_THREADS": threads}) for threads in "1234"]
        self.assertEqual(found, found[:1] * 4)


# GSM8K --------------------------------------------------------------------------------------------

def extract(text, flexible):
    """What the harness's filters make of a generated text."""
    if not flexible:
        found = re.findall(r"#### (\-?[0-9\.\,]+)", text)
        return found[0].strip() if found else "[invalid]"
    found = re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", text)
    return [group for group in found[-1] if group][0].strip() if found else "[invalid]"


def normalise(text):
    for pattern in (",", r"\$", r"(?s).*#### ", r"\.$"):
        text = re.sub(pattern, "", text)
    return text.lower()


def matches(text, answer, flexible):
    return normalise(extract(text, flexible)) == normalise(answer)


class Answers(unittest.TestCase):

    def check(self, cases):
        lines = ["match %d %s %s" % (flexible, hexed(text), hexed(answer))
                 for text, answer in cases for flexible in (0, 1)]
        found = ask(lines)
        right = [[float(matches(text, answer, flexible))]
                 for text, answer in cases for flexible in (0, 1)]
        for i, (a, b) in enumerate(zip(found, right)):
            self.assertEqual(a, b, (cases[i // 2], "flexible" if i % 2 else "strict"))
        return found

    def test_random_texts(self):
        rng = random.Random(8)
        pieces = ["#### ", "####", "#", " ", "-", "$", ".", ",", "1", "12", "7", "0", "\n", "x",
                  "é", "[invalid]", "I", "\u0661", "-3", "1,000", "2.", "5.\n"]
        cases, hits = [], 0
        for _ in range(4000):
            text = "".join(rng.choice(pieces) for _ in range(rng.randrange(9)))
            answer = rng.choice([extract(text, rng.random() < 0.5), "x #### " + rng.choice(pieces),
                                 "".join(rng.choice(pieces) for _ in range(rng.randrange(6)))])
            cases.append((text.replace("\0", ""), answer + rng.choice(["", "", ".", ".\n", "."])))
        hits = sum(answer[0] for answer in self.check(cases))
        self.assertGreater(hits, 1000)      # the cases are not all misses

    def test_known_texts(self):
        gold = "She has 1,000 + 234.\n#### 1,234"
        found = self.check([(" It is 1234.\n#### 1234", gold), ("#### $1,234", gold),
                            ("so $1,234.", gold), ("#### 1,234.", gold), ("12 34", gold),
                            ("", gold), ("[INVALID]", "#### [Invalid]")])
        self.assertEqual([a[0] for a in found], [1, 1, 0, 1, 0, 1, 1, 1, 0, 0, 0, 0, 1, 1])


class Texts(unittest.TestCase):

    def test_white_space_words_and_code_points(self):
        rng = random.Random(9)
        spaces = [c for c in map(chr, range(1, 0x3100)) if c.isspace()]
        others = ["a", "bc", "é", "\u2014", "\u200b", "\ufeff", "\U0001f600", "\u180e", "\u2060",
                  "\xa1"]
        texts = ["", " ", "a", *spaces]
        for _ in range(500):
            texts.append("".join(rng.choice(rng.choice((spaces, others)))
                                 for _ in range(rng.randrange(12))))
        texts += [chr(c) for c in range(1, 0x3100)]
        answers = ask(["text " + hexed(text) if text else "text" for text in texts])
        for text, found in zip(texts, answers):
            tail = text[len(text.rstrip()):]
            right = [len(tail.encode("utf-8")), len(re.split(r"\s+", text)), len(text)]
            self.assertEqual(found, right, ascii(text))


# The probe ----------------------------------------------------------------------------------------

def objective_slope(rows, targets, classes, strength, weights):
    """The gradient of the objective in the contract of probe_fit, by its definition."""
    d = len(rows[0])
    wide = [weights[k * (d + 1):(k + 1) * (d + 1)] for k in range(classes)]
    slope = [[(2 if classes == 2 else 1) * strength * w[j] if j < d else 0.0 for j in range(d + 1)]
             for w in wide]
    for row, target in zip(rows, targets):
        z = [w[d] + math.fsum(a * b for a, b in zip(w, row)) for w in wide]
        if classes == 1:
            rest = [z[0] - target]
        else:
            top = [math.exp(v - max(z)) for v in z]
            rest = [v / sum(top) - (k == target) for k, v in enumerate(top)]
        for k in range(classes):
            for j in range(d):
                slope[k][j] += rest[k] * row[j]
            slope[k][d] += rest[k]
    return [v for part in slope for v in part]


def features(rng, n, d):
    """Features as a pooler gives them: bounded, correlated, some nearly constant; as float32."""
    hidden = [[rng.gauss(0, 1) for _ in range(3)] for _ in range(n)]
    mix = [[rng.gauss(0, 0.8) for _ in range(3)] for _ in range(d)]
    shift = [rng.gauss(0, 1.5) for _ in range(d)]
    rows = [[math.tanh(s + sum(a * b for a, b in zip(m, h)) + rng.gauss(0, 0.1))
             for m, s in zip(mix, shift)] for h in hidden]
    return hidden, [list(array.array("f", row)) for row in rows]


class Probe(unittest.TestCase):

    @functools.lru_cache(None)
    def cases(self):
        rng, found = random.Random(10), []
        for classes, n, d, strength in ((1, 40, 7, 0.5), (2, 61, 9, 1.0), (3, 130, 5, 0.1),
                                        (2, 30, 40, 2.0), (4, 64, 3, 1.0), (2, 90, 30, 1e-4),
                                        (3, 50, 6, 1e-6)):
            hidden, rows = features(rng, n, d)
            targets = [h[0] * 2 + 1 if classes == 1 else
                       min(classes - 1, max(0, round(h[0] + classes / 2))) for h in hidden]
            path = os.path.join(common.scratch(), "probe-%d-%d" % (classes, n))
            found.append((probe_line(path, rows, targets, classes, strength), rows,
                          list(map(float, targets)), classes, strength))
        return found

    def test_the_gradient_is_zero(self):
        cases = self.cases()
        for (_, rows, targets, classes, strength), answer in zip(cases, ask([c[0] for c in cases])):
            size = classes * (len(rows[0]) + 1)
            slope = objective_slope(rows, targets, classes, strength, answer[:size])
            self.assertLess(max(map(abs, slope)), 2e-8 * len(rows), "%d classes" % classes)
            self.assertGreater(max(map(abs, answer[:size])), 0.1)

    def test_predictions(self):
        cases = self.cases()
        for (_, rows, _, classes, _), answer in zip(cases, ask([c[0] for c in cases])):
            d = len(rows[0])
            for i, row in enumerate(rows):
                z = [answer[k * (d + 1) + d] + sum(a * b for a, b in zip(
                    answer[k * (d + 1):k * (d + 1) + d], row)) for k in range(classes)]
                right = z[0] if classes == 1 else z.index(max(z))
                self.assertLess(abs(answer[classes * (d + 1) + i] - right), 1e-9)

    def test_same_bits_for_any_number_of_threads(self):
        lines = [case[0] for case in self.cases()]
        found = [ask(lines, {"OMP_NUM_THREADS": threads}) for threads in "1234"]
        self.assertEqual(found, found[:1] * 4)

    def test_degenerate_classes(self):
        _, rows = features(random.Random(11), 12, 4)
        for classes, targets in ((2, [0.0] * 12), (3, [0.0, 1.0] * 6)):     # some never seen
            path = os.path.join(common.scratch(), "probe-one-%d" % classes)
            answer, = ask([probe_line(path, rows, targets, classes, 1.0)])
            self.assertTrue(all(map(math.isfinite, answer)))
            self.assertTrue(set(answer[-12:]) <= set(targets))


if __name__ == "__main__":
    unittest.main()
