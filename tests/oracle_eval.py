"""The evaluator against lm-evaluation-harness, scikit-learn, SciPy and transformers.

    python3 tests/oracle_eval.py [PART ...]   compare (a few minutes; needs the packages); the parts
                                              are metrics, probe, prompts
    python3 tests/oracle_eval.py --write      write tests/tasks/expected.json
"""
import argparse
import json
import math
import os
import random
import sys
import time
import warnings

import numpy
import scipy.stats
import sklearn.linear_model
import sklearn.metrics

import common
import test_metrics
import test_tasks

SHARED = {"arc_challenge": "ARC-Challenge-Test.jsonl", "arc_easy": "ARC-Challenge-Test.jsonl",
          "hellaswag": "hellaswag_val.jsonl", "winogrande": "winogrande_dev.jsonl",
          "lambada_openai": "lambada_test.jsonl", "gsm8k": "gsm8k_test.jsonl"}
TRAIN = "gsm8k_train.jsonl"


def shared(name):
    return common.shared("data", "benchmarks", name)


def require(good, what):
    """Ends the program where a comparison fails; tests must not go on as if nothing were wrong."""
    if not good:
        sys.exit("oracle_eval: " + what)


def near(found, right, tolerance, what):
    same = math.isnan(found) and math.isnan(right) or abs(found - right) <= tolerance
    require(same, "%s: %.17g, should be %.17g" % (what, found, right))


# Metrics ------------------------------------------------------------------------------------------

def random_predictions(rng, labels):
    """Kept values of a classification: random ones, constant ones, one class only, ties."""
    for n in (2, 3, 71, 408):
        yield [(rng.randrange(labels), rng.randrange(labels)) for _ in range(n)]
        yield [(1, rng.randrange(labels)) for _ in range(n)]
        yield [(rng.randrange(labels), 0) for _ in range(n)]
        yield [(1, 1)] * n
        yield [(0, 0)] * n
        gold = [rng.randrange(labels) for _ in range(n)]
        yield [(g if rng.random() < 0.8 else rng.randrange(labels), g) for g in gold]


def random_scores(rng):
    """Kept values of a regression: correlated, with ties, constant."""
    for n in (3, 71, 1500):
        for digits in (9, 1, 0):
            gold = [round(rng.uniform(0, 5), digits) for _ in range(n)]
            yield [(round(g + rng.gauss(0, 1), digits), g) for g in gold]
            yield [(round(rng.uniform(-9, 9), digits), g) for g in gold]
        yield [(2.5, rng.uniform(0, 5)) for _ in range(n)]
        yield [(rng.uniform(0, 5), 1.0) for _ in range(n)]
        yield [(1e6 + g * 1e-3, g) for g in gold]


def compare_glue_metrics():
    """Against scikit-learn and SciPy."""
    rng, lines, rights = random.Random(1), [], []
    for labels in (2, 3):
        for rows in random_predictions(rng, labels):
            predicted, gold = zip(*rows)
            lines.append(test_metrics.metric_line("classify", "acc", rows))
            rights.append(sklearn.metrics.accuracy_score(gold, predicted))
            lines.append(test_metrics.metric_line("classify", "matthews", rows))
            rights.append(sklearn.metrics.matthews_corrcoef(gold, predicted))
            if labels == 2:
                lines.append(test_metrics.metric_line("classify", "f1", rows))
                rights.append(sklearn.metrics.f1_score(gold, predicted))
    for rows in random_scores(rng):
        predicted, gold = zip(*rows)
        for name, function in (("pearson", scipy.stats.pearsonr), ("spearman", scipy.stats.spearmanr)):
            lines.append(test_metrics.metric_line("regress", name, rows))
            rights.append(float(function(predicted, gold)[0]))
    for line, right, (value, _) in zip(lines, rights, test_metrics.ask(lines)):
        near(value, right, 1e-9, " ".join(line.split()[:4]))
    print("metrics: %d figures equal scikit-learn's and SciPy's, %d of them undefined"
          % (len(rights), sum(map(math.isnan, rights))))


def compare_harness_errors():
    """Standard errors against the harness's own functions, its bootstrap with up to 10,000 resamples."""
    from lm_eval.api import metrics
    rng, worst = random.Random(2), 0.0
    for n in (30, 200, 1000):
        lls = [rng.gauss(-4, 2.5) for _ in range(n)]
        hits = [float(rng.random() < 0.4) for _ in range(n)]
        pairs = [(rng.randrange(2), g) for g in (rng.randrange(2) for _ in range(n))]
        cases = [("lastword", "perplexity", [(v, 0) for v in lls], metrics.perplexity, lls),
                 ("choice", "acc", [(v, 0) for v in hits], metrics.mean, hits)]
        if n == 200:
            swapped = [pair[::-1] for pair in pairs]    # the harness keeps (gold, prediction)
            cases += [("classify", "matthews", pairs, metrics.matthews_corrcoef, swapped),
                      ("classify", "f1", pairs, metrics.f1_score, swapped)]
        for kind, name, rows, function, items in cases:
            (value, error), = test_metrics.ask([test_metrics.metric_line(kind, name, rows)])
            near(value, function(items), 1e-9 * max(1, abs(value)), name)
            resamples = 2000 if kind == "classify" else 10000
            right = metrics.stderr_for_metric(function, resamples)(items)
            near(error, right, (1e-12 if name == "acc" else 0.05) * right, name + " error")
            worst = max(worst, abs(error / right - 1))
    print("errors: equal the harness's, bootstrapped ones within %.1f%%" % (100 * worst))


def part_metrics():
    compare_glue_metrics()
    import harness  # noqa: F401  sets the environment, and quiets the harness
    compare_harness_errors()


# The probe ----------------------------------------------------------------------------------------

def pooled(rng, n, d, classes, noise):
    """Features like a BERT pooler's: tanh of correlated numbers, many of them near -1 or 1."""
    hidden = rng.normal(size=(n, d // 4 + 2))
    mix = rng.normal(size=(hidden.shape[1], d)) / math.sqrt(hidden.shape[1])
    x = numpy.tanh(hidden @ mix * rng.uniform(0.1, 2, d) + rng.normal(size=d) * 2).astype("float32")
    scores = hidden[:, :max(classes, 2)] + noise * rng.normal(size=(n, max(classes, 2)))
    y = scores[:, 0] * 1.5 + 2.5 if classes == 1 else scores[:, :classes].argmax(1)
    return x, y.astype("float64")


def fitted(x, y, classes, strength):
    """painters' weights [outputs, d + 1], predictions, and the seconds it took."""
    path = os.path.join(common.scratch(), "probe")
    with open(path, "wb") as f:
        f.write(x.tobytes() + y.tobytes())
    started = time.time()
    answer = numpy.array(test_metrics.ask(["probe %s %d %d %d %r" % (path, *x.shape, classes,
                                                                   strength)])[0])
    size = classes * (x.shape[1] + 1)
    return answer[:size].reshape(classes, -1), answer[size:], time.time() - started


def part_probe():
    """Against scikit-learn's converged fits: the objective, the weights, and the score on held-out
    rows, which is what the evaluator reports."""
    rng = numpy.random.default_rng(3)
    for n, d, classes, strength, noise in ((635, 64, 2, 1.0, 1.0), (2500, 128, 2, 1.0, 0.5),
                                           (2500, 128, 3, 0.1, 0.5), (1500, 1024, 2, 1.0, 0.5),
                                           (600, 300, 3, 10.0, 1.0), (2500, 128, 1, 1.0, 0.5),
                                           (500, 700, 1, 5.0, 0.5)):
        x, y = pooled(rng, 2 * n, d, classes, noise)
        train, test = slice(0, n), slice(n, 2 * n)
        w, own, seconds = fitted(x[train], y[train], classes, strength)
        wide = x.astype("float64")
        if classes == 1:
            model = sklearn.linear_model.Ridge(alpha=strength).fit(wide[train], y[train])
            theirs, ours = model.predict(wide[test]), wide[test] @ w[0, :-1] + w[0, -1]
            near(abs(theirs - ours).max(), 0, 1e-5, "ridge predictions")
            near(abs(model.predict(wide[train]) - own).max(), 0, 1e-5, "ridge predictions, train")
            scores = [scipy.stats.pearsonr(p, y[test])[0] for p in (ours, theirs)]
            loss = [((wide[train] @ v[:-1] + v[-1] - y[train]) ** 2).sum() + strength * v[:-1] @ v[:-1]
                    for v in (w[0], numpy.append(model.coef_, model.intercept_))]
        else:
            model = sklearn.linear_model.LogisticRegression(C=1 / strength, tol=1e-10, max_iter=200,
                                                            solver="newton-cholesky")
            model.fit(wide[train], y[train])
            theirs = model.predict(wide[test])
            ours = (wide[test] @ w[:, :-1].T + w[:, -1]).argmax(1)
            require((own == (wide[train] @ w[:, :-1].T + w[:, -1]).argmax(1)).all(), "predictions")
            scores = [(p == y[test]).mean() for p in (ours, theirs)]
            loss = [logistic_loss(wide[train], y[train], v, strength, classes) for v in (
                w, numpy.column_stack([model.coef_, model.intercept_]))]
            near(numpy.abs(probabilities(wide[test], w)
                           - model.predict_proba(wide[test])).max(), 0, 1e-3, "probabilities")
        require(loss[0] <= loss[1] * (1 + 1e-9), "loss %r is not the least, %r is" % tuple(loss))
        near(scores[0], scores[1], 0.005, "score of the probe")
        print("probe: %d x %d, %d outputs: score %.4f, scikit-learn %.4f; loss %.6f, %.6f; %.2f s"
              % (n, d, classes, *scores, *loss, seconds))


def probabilities(x, w):
    z = x @ w[:, :-1].T + w[:, -1]
    z = numpy.exp(z - z.max(1, keepdims=True))
    return z / z.sum(1, keepdims=True)


def logistic_loss(x, y, w, strength, classes):
    """scikit-learn's objective; of two classes only the difference of the weights counts."""
    if classes == 2 and len(w) == 2:
        w = w[1:] - w[:1]
    z = x @ w[:, :-1].T + w[:, -1]
    if len(w) == 1:
        loss = numpy.logaddexp(0, numpy.where(y == 1, -z[:, 0], z[:, 0])).sum()
    else:
        loss = (numpy.logaddexp.reduce(z, 1) - z[numpy.arange(len(y)), y.astype(int)]).sum()
    return loss + strength / 2 * (w[:, :-1] ** 2).sum()


# Prompts ------------------------------------------------------------------------------------------

def harness_prompts(name, path, fewshot=0, train=None, same=False):
    """[[gold, [[context, continuation]]]] as the harness builds them."""
    import harness
    made = harness.task(name, path, fewshot, train, same)
    return [list(pair) for pair in zip(harness.golds(made), harness.requests(made))]


def our_prompts(name, path, *more):
    header, rows = test_tasks.read_task(test_tasks.task_file(name, path, *more))
    return [list(test_tasks.requests(header["kind"], row)) for row in rows]


def part_prompts():
    """The shared official items: the same prompts and continuations to the byte."""
    cases = [(name, shared(file), ()) for name, file in SHARED.items()]
    for more in (("--fewshot", "5"), ("--fewshot", "3"), ("--fewshot", "5", "--fewshot-same")):
        cases.append(("gsm8k", shared(SHARED["gsm8k"]), ("--train", shared(TRAIN)) + more))
    for name in ("winogrande", "hellaswag"):
        cases.append((name, shared(SHARED[name]), ("--train", shared(SHARED[name]), "--fewshot", "4")))
    for name, path, more in cases:
        options = dict(fewshot=int(more[3]), train=more[1], same="--fewshot-same" in more) \
            if more else {}
        right = harness_prompts(name, path, **options)
        found = our_prompts(name, path, *more)
        for item, (a, b) in enumerate(zip(found, right)):
            require(a == b, "%s item %d: %r, should be %r" % (name, item, a, b))
        require(len(found) == len(right), name + ": another number of items")
        print("prompts: %s%s: %d items equal" % (name, " " + " ".join(more[2:]), len(found)))


def sample_prompts():
    """The prompts of tests/tasks, by the keys that test_tasks.py uses."""
    found = {name: harness_prompts(name, test_tasks.sample_path(file))
             for name, file in test_tasks.LLAMA.items()}
    for key, (name, more) in test_tasks.FEWSHOT.items():
        found[key] = harness_prompts(name, test_tasks.sample_path(test_tasks.LLAMA[name]),
                                     int(more[1]), more[3], "--fewshot-same" in more)
    return found


def write_expected():
    path = test_tasks.sample_path("expected.json")
    with open(path, "w", encoding="utf-8") as f:
        json.dump({"prompts": sample_prompts()}, f, indent=0, ensure_ascii=False)
        f.write("\n")


PARTS = {"metrics": part_metrics, "probe": part_probe, "prompts": part_prompts}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], metavar="PART")
    args = parser.parse_args()
    warnings.simplefilter("ignore")     # undefined figures, some of them on purpose
    if args.write:
        write_expected()
        return
    for part in args.parts or PARTS:
        PARTS[part]()


if __name__ == "__main__":
    main()
