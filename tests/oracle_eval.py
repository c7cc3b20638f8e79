"""The evaluator against lm-evaluation-harness, scikit-learn, SciPy and transformers.

    python3 tests/oracle_eval.py [PART ...]   compare (some minutes; needs the packages); the parts
                                              are metrics, probe, prompts, llama, gsm8k, text, bert
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
import models
import schedules
import test_metrics
import test_scores
import test_tasks

SHARED = {"arc_challenge": "ARC-Challenge-Test.jsonl", "arc_easy": "ARC-Challenge-Test.jsonl",
          "hellaswag": "hellaswag_val.jsonl", "winogrande": "winogrande_dev.jsonl",
          "lambada_openai": "lambada_test.jsonl", "gsm8k": "gsm8k_test.jsonl"}
TRAIN = "gsm8k_train.jsonl"
SCIPY = {"pearson": scipy.stats.pearsonr, "spearman": scipy.stats.spearmanr}
SKLEARN = {"matthews": sklearn.metrics.matthews_corrcoef, "f1": sklearn.metrics.f1_score}


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
        for name, function in SCIPY.items():
            lines.append(test_metrics.metric_line("regress", name, rows))
            rights.append(float(function(predicted, gold)[0]))
    for line, right, (value, _) in zip(lines, rights, test_metrics.ask(lines)):
        near(value, right, 1e-9, " ".join(line.split()[:4]))
    print("metrics: %d figures equal scikit-learn's and SciPy's, %d of them undefined"
          % (len(rights), sum(map(math.isnan, rights))))


def compare_harness_errors():
    """Standard errors against the harness's own functions, with up to 10,000 resamples."""
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
            fits = w[0], numpy.append(model.coef_, model.intercept_)
            loss = [((wide[train] @ v[:-1] + v[-1] - y[train]) ** 2).sum()
                    + strength * v[:-1] @ v[:-1] for v in fits]
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
        path = shared(SHARED[name])
        cases.append((name, path, ("--train", path, "--fewshot", "4")))
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


# Scores: Llama ------------------------------------------------------------------------------------

def schedule_of(flags, T):
    """The schedule that some flags name, for T layers."""
    for flag, value in zip(flags, flags[1:]):
        if flag == "--path":
            return schedules.parse(value, T)
        if flag.startswith("--") and not value.startswith("--"):
            return schedules.build(flag[2:], T, int(value), None)
    return [[i] for i in range(T)]


def small_llama(name):
    """(model file, transformers model, tokenizer) of a model of models.py."""
    import harness
    return (common.model(name), *harness.small(common.source(name)))


def stories():
    """The same of stories260K."""
    import harness
    checkpoint, tokenizer = (common.shared("data", "stories260K", file)
                             for file in ("checkpoint_legacy.bin", "tokenizer.bin"))
    path = common.export(checkpoint, "--tokenizer", tokenizer,
                         out=os.path.join(common.scratch(), "stories260K.bin"))
    return (path, *harness.stories(checkpoint, tokenizer, common.scratch()))


def harness_scores(model, tokenizer, flags, made, limit=None):
    """What the harness makes of a built task, in the form of tests/tasks/expected.json."""
    import harness
    schedule = schedule_of(flags, len(model.model.layers))
    lm = harness.Model(model, tokenizer, schedule, "--bos" in flags)
    figures, answers = harness.run(made, lm, limit)
    return {"figures": {name: [float(v) for v in pair] for name, pair in figures.items()},
            "answers": answers}


def part_llama():
    """The shared official items: log-likelihoods within 1e-3, metrics and errors as printed. The
    harness refuses continuations longer than the context, which HellaSwag's are in a model of 125
    tokens that spells every letter."""
    import harness
    for path, model, tokenizer, limit, runs in (
            (*stories(), None, [[]]), (*stories(), 40, [["--bos"], ["--parallel", "0"]]),
            (*small_llama("llama_gqa"), 40, [[], ["--bos"], ["--reverse", "0"]])):
        for name in ("arc_challenge", "hellaswag", "winogrande", "lambada_openai"):
            made = harness.task(name, shared(SHARED[name]))
            task = test_tasks.task_file(name, shared(SHARED[name]))
            if name == "hellaswag" and model.config.max_position_embeddings < 200:
                continue
            for flags in runs:
                right = harness_scores(model, tokenizer, flags, made, limit)
                more = ["--limit", str(limit)] if limit else []
                figures, answers = test_scores.evaluate(path, [task], *flags, *more)
                fault = test_scores.compare(name, figures[name], answers[name], right)
                require(fault is None, "%s %s: %s" % (os.path.basename(path), flags, fault))
                worst = max(abs(x - y) for a, b in zip(answers[name], right["answers"])
                            for x, y in zip(a, b))
                print("llama: %s %s %s: %d items, log-likelihoods within %.1e, %d cut; %s"
                      % (os.path.basename(path), name, " ".join(flags), len(answers[name]), worst,
                         max(f[3] for f in figures[name].values()),
                         ", ".join("%s %.4f +- %.4f" % (m, *f[:2]) for m, f in
                                   figures[name].items())))


def part_gsm8k():
    """Five examples before each question, cut to the context: the same greedy text and matches."""
    import harness
    path, model, tokenizer = stories()
    source, more = shared(SHARED["gsm8k"]), ["--fewshot", "5", "--train", shared(TRAIN)]
    made = harness.task("gsm8k", source, 5, shared(TRAIN))
    task = test_tasks.task_file("gsm8k", source, *more)
    for flags in ([], ["--bos"], ["--skip", "1"]):
        limit = 3 if "--skip" in flags else 12
        right = harness_scores(model, tokenizer, flags, made, limit)
        figures, answers = test_scores.evaluate(path, [task], *flags, "--limit", str(limit))
        for item, (found, text) in enumerate(zip(answers["gsm8k"], right["answers"])):
            if found == text:
                continue
            prompt = harness.requests(made)[item][0][0]
            require(same_until_tie(model, tokenizer, flags, prompt, found[0], text[0]),
                    "gsm8k item %d: %r, should be %r" % (item, found, text))
            print("gsm8k %s: item %d differs behind a near-tie" % (" ".join(flags), item))
            right["answers"][item] = found
        fault = test_scores.compare("gsm8k", figures["gsm8k"], answers["gsm8k"], right)
        require(fault is None, str(fault))
        print("gsm8k %s: %d texts equal, %d prompts cut" % (" ".join(flags), limit,
                                                             figures["gsm8k"]["strict"][3]))


def same_until_tie(model, tokenizer, flags, prompt, found, text):
    """Are two greedy texts equal up to a token at which the oracle's two best logits nearly tie?"""
    import reference
    ids = tokenizer.encode(prompt, "--bos" in flags)[-(model.config.max_position_embeddings - 256):]
    schedule = schedule_of(flags, len(model.model.layers))
    new, tie = reference.Llama(model).generate(ids, schedule, 256)
    sure = tokenizer.decode(new[:tie])
    return tie < 256 and found.startswith(sure) and text.startswith(sure)


# Scores: running text -----------------------------------------------------------------------------

def part_text():
    """Perplexities against the harness's rolling windows; masked tokens against transformers."""
    import harness
    import reference
    import torch
    from lm_eval.api.instance import Instance
    texts = [row["text"] for row in harness.official_rows(shared(SHARED["lambada_openai"]))[:6]]
    texts += ["a", "", "One  sentence.\n\nAnd\tanother ."]
    lines = ["#painters-task\t1\tname=text\tkind=text\tmetrics=%s"]
    lines += [t.replace("\n", "\\n").replace("\t", "\\t") for t in texts if t]
    texts = [t for t in texts if t]
    path, model, tokenizer = small_llama("llama_gqa")
    lm = harness.Model(model, tokenizer, [[i] for i in range(len(model.model.layers))], False)
    right = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (t,), i)
                                      for i, t in enumerate(texts)], disable_tqdm=True)
    metrics = ("token_perplexity", "word_perplexity", "byte_perplexity")
    task = test_scores.written("\n".join(lines) % ",".join(metrics), "text.tsv")
    figures, answers = test_scores.evaluate(path, [task])
    found = [values[0] for values in answers["text"]]
    for text, a, b in zip(texts, found, right):
        near(a, b, common.likelihood_tolerance(b), "rolling log-likelihood of %r" % text[:40])
    import re
    counts = (lambda t: len(tokenizer.encode(t, False)), lambda t: len(re.split(r"\s+", t)),
              lambda t: len(t.encode()))
    for metric, count in zip(metrics, counts):
        value = math.exp(-sum(right) / sum(map(count, texts)))
        near(figures["text"][metric][0] / value, 1, 1e-4, metric)
    print("text: %d texts, rolling log-likelihoods within %.1e"
          % (len(texts), max(abs(a - b) for a, b in zip(found, right))))

    bert, words = reference.load(common.source("bert_mlm")), bert_tokenizer("bert_mlm")
    schedule, window = [[i] for i in range(bert.n_layers)], 65 - 2
    texts = texts[:3] + texts[-1:]
    lines = lines[:1] + [t.replace("\n", "\\n").replace("\t", "\\t") for t in texts]
    task = test_scores.written("\n".join(lines) % "pseudo_perplexity,masked_acc", "masked.tsv")
    figures, answers = test_scores.evaluate(common.model("bert_mlm"), [task])
    total, hits, count = 0.0, 0, 0
    for text, values in zip(texts, answers["text"]):
        own, ids = 0.0, words(text, add_special_tokens=False)["input_ids"]
        for start in range(0, len(ids), window):
            part = [words.cls_token_id] + ids[start:start + window] + [words.sep_token_id]
            for at in range(1, len(part) - 1):
                masked = part[:at] + [words.mask_token_id] + part[at + 1:]
                row = torch.log_softmax(bert.logits(masked, schedule)[at], 0)
                own += float(row[part[at]])
                hits += int(row.argmax()) == part[at]
                count += 1
        near(values[0], own, common.likelihood_tolerance(own),
             "masked log-likelihood of %r" % text[:40])
        total += own
    near(figures["text"]["pseudo_perplexity"][0] / math.exp(-total / count), 1, 1e-4, "pseudo")
    near(figures["text"]["masked_acc"][0], hits / count, 6e-5, "masked_acc")
    print("text: %d masked tokens: pseudo-perplexity %.4f, accuracy %.4f"
          % (count, math.exp(-total / count), hits / count))


# Scores: BERT -------------------------------------------------------------------------------------

def bert_tokenizer(name):
    import transformers
    return transformers.AutoTokenizer.from_pretrained(common.source(name))


def bert_inputs(name, rows, words):
    """[ids, segments] of each row of a task file, as Hugging Face's tokenizer truncates them. It is
    given lists, as GLUE scripts do: on its own, an empty second text would be taken for none."""
    limit = min(128, models.MODELS[name]["length"])
    for row in rows:
        found = words(*([text] for text in row[1:]), truncation="longest_first", max_length=limit)
        yield found["input_ids"][0], found["token_type_ids"][0]


def bert_figures(metrics, predicted, gold):
    """{metric: (value, error by formula or None)} by scikit-learn and SciPy."""
    n, found = len(gold), {}
    for name in metrics.split(","):
        if name in ("pearson", "spearman"):
            found[name] = [float(SCIPY[name](predicted, gold)[0]), None]
        elif name == "acc":
            p = sklearn.metrics.accuracy_score(gold, predicted)
            found[name] = [p, math.sqrt(p * (1 - p) / (n - 1))]
        else:
            found[name] = [float(SKLEARN[name](gold, predicted)), None]
    return found


def bert_scores(name, flags, path):
    """What transformers makes of a task file, in the form of tests/tasks/expected.json."""
    import reference
    header, rows = test_tasks.read_task(path)
    model, words = reference.load(common.source(name)), bert_tokenizer(name)
    schedule = schedule_of(flags, model.n_layers)
    answers = [model.logits(ids, schedule, segments)[0].tolist()
               for ids, segments in bert_inputs(name, rows, words)]
    predicted = [z.index(max(z)) if header["kind"] == "classify" else z[0] for z in answers]
    gold = [float(row[0]) for row in rows]
    return {"figures": bert_figures(header["metrics"], predicted, gold), "answers": answers}


GLUE_FOLDERS = {"cola": "CoLA", "mrpc": "MRPC", "qnli": "QNLI", "rte": "RTE", "sst2": "SST-2",
                "stsb": "STS-B", "wnli": "WNLI"}


def part_bert():
    """Class scores of GLUE dev items against transformers, and the probe against scikit-learn on
    transformers' pooled features, both under schedules."""
    import torch
    torch.set_num_threads(1)
    for task, folder in GLUE_FOLDERS.items():
        with open(common.shared("data", "glue", folder, "dev.tsv"), "rb") as f:
            lines = f.read().split(b"\n")[:61]
        part = os.path.join(common.scratch(), task + "-part.tsv")
        with open(part, "wb") as f:
            f.write(b"\n".join(lines) + b"\n")
        path = test_tasks.task_file(task, part)
        name = "bert_one" if task == "stsb" else "bert_two"
        flags = ["--reverse", "0"] if task == "rte" else []
        right = bert_scores(name, flags, path)
        figures, answers = test_scores.evaluate(common.model(name), [path], *flags)
        fault = test_scores.compare(task, figures[task], answers[task], right)
        require(fault is None, str(fault))
        worst = max(abs(x - y) for a, b in zip(answers[task], right["answers"])
                    for x, y in zip(a, b))
        print("bert: %s %s: %d items, class scores within %.1e; %s" % (
            task, " ".join(flags), len(answers[task]), worst,
            ", ".join("%s %.4f" % (m, f[0]) for m, f in figures[task].items())))
    for name, task, flags in (("bert_two", "rte", []), ("bert_two", "qqp", ["--reverse", "0"]),
                              ("bert_three", "mnli", ["--parallel", "0"]),
                              ("bert_one", "stsb", [])):
        compare_probe(name, task, flags)


def compare_probe(name, task, flags):
    """--probe on tests/tasks; half of the train rows are the dev set, so that scores can differ."""
    import reference
    source = test_tasks.sample_path(task + "_train.tsv")
    path = test_tasks.task_file(task, source)
    header, rows = test_tasks.read_task(path)
    model, words = reference.load(common.source(name)), bert_tokenizer(name)
    schedule = schedule_of(flags, model.n_layers)
    x = numpy.array([model.bert.pooler(model.states(ids, schedule, segments)[-1][None])[0].tolist()
                     for ids, segments in bert_inputs(name, rows, words)])
    y = numpy.array([float(row[0]) for row in rows])
    with open(path, encoding="utf-8") as f:
        lines = f.read().split("\n")
    dev = test_scores.written("\n".join(lines[:1] + lines[16:]), "probe-dev.tsv")
    train = test_scores.written("\n".join(lines[:16]) + "\n", "probe-train.tsv")
    figures, _ = test_scores.evaluate(common.model(name), [dev], "--probe", train, *flags)
    if header["kind"] == "regress":
        fit = sklearn.linear_model.Ridge(alpha=1.0).fit(x[:15], y[:15])
    else:
        fit = sklearn.linear_model.LogisticRegression(C=1.0, tol=1e-10, max_iter=500,
                                                      solver="newton-cholesky").fit(x[:15], y[:15])
    right = bert_figures(header["metrics"], fit.predict(x[15:]).tolist(), y[15:].tolist())
    for metric, (value, _) in right.items():
        near(figures[task][metric][0], value, 0.005, "probe %s %s" % (task, metric))
    print("bert: probe %s %s: %s as scikit-learn's" % (
        task, " ".join(flags), ", ".join("%s %.4f" % (m, v[0]) for m, v in right.items())))


# Recording ----------------------------------------------------------------------------------------

def sample_scores():
    """The runs of test_scores.py on the items of tests/tasks."""
    import harness
    found = {}
    for name, flags in test_scores.LLAMA_RUNS:
        _, model, tokenizer = small_llama(name)
        run = found[" ".join([name] + flags)] = {}
        for task in test_scores.LLAMA_TASKS:
            source = test_tasks.sample_path(test_tasks.LLAMA[task])
            made = harness.task(task, source, max_tokens=test_scores.MAX_TOKENS
                                if task == "gsm8k" else None)
            run[task] = harness_scores(model, tokenizer, flags, made)
    for name, flags in test_scores.BERT_RUNS:
        run = found[" ".join([name] + flags)] = {}
        for task in test_scores.BERT_TASKS[name]:
            run[task] = bert_scores(name, flags, test_scores.task_file(task))
    for key, run in found.items():
        for right in run.values():
            right["weights"] = common.fingerprint(key.split(" ")[0])
            right["answers"] = [[a if isinstance(a, str) else float("%.7g" % a) for a in item]
                                for item in right["answers"]]
    return found


def write_expected():
    path = test_tasks.sample_path("expected.json")
    expected = {"prompts": sample_prompts(), "runs": sample_scores()}
    with open(path, "w", encoding="utf-8") as f:
        f.write("{\n")
        for i, (key, value) in enumerate(expected.items()):
            lines = ["%s: %s" % (json.dumps(k), json.dumps(v, ensure_ascii=False))
                     for k, v in value.items()]
            f.write("%s: {\n%s}%s\n" % (json.dumps(key), ",\n".join(lines), "," if not i else ""))
        f.write("}\n")


PARTS = {"metrics": part_metrics, "probe": part_probe, "prompts": part_prompts, "llama": part_llama,
         "gsm8k": part_gsm8k, "text": part_text, "bert": part_bert}


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
