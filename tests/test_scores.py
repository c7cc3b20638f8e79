"""painters --eval on small random models: every item's score and every figure are those that were
recorded from lm-evaluation-harness and transformers (tests/tasks/expected.json), whatever the batch
and the number of threads; malformed task files are refused by line.

tests/oracle_eval.py makes the same comparison live, on more items and models.
"""
import json
import math
import os
import re
import struct
import unittest
import zlib

import common
import modelfile
import test_tasks

MAX_TOKENS = 24     # of gsm8k: the small models have no room for 256
LLAMA_TASKS = ["arc_challenge", "hellaswag", "winogrande", "lambada_openai", "gsm8k"]
LLAMA_RUNS = [("llama_gqa", []), ("llama_gqa", ["--bos"]), ("llama_mha", ["--parallel", "1"]),
              ("llama_mha", ["--bos", "--path", "0 3 3 1|2 4"])]
BERT_TASKS = {"bert_two": ["cola", "mrpc", "qqp", "rte", "sst2", "wnli", "qnli"],
              "bert_three": ["mnli", "mnli_mm"], "bert_one": ["stsb"]}
BERT_RUNS = [(name, flags) for name in BERT_TASKS
             for flags in ([], ["--skip", "1"], ["--parallel", "1"])]


def dev_file(task):
    """The official form of a GLUE task's dev set in tests/tasks."""
    names = {"mnli": "mnli_dev_matched", "mnli_mm": "mnli_dev_mismatched"}
    return test_tasks.sample_path(names.get(task, task + "_dev") + ".tsv")


def task_file(task):
    """The task file of the samples in tests/tasks."""
    if task not in test_tasks.LLAMA:
        return test_tasks.task_file(task, dev_file(task))
    path = test_tasks.task_file(task, test_tasks.sample_path(test_tasks.LLAMA[task]))
    if task != "gsm8k":
        return path
    with open(path, encoding="utf-8") as f:
        text = f.read().replace("max_tokens=256", "max_tokens=%d" % MAX_TOKENS)
    return written(text, "gsm8k-short.tsv")


def written(text, name):
    path = os.path.join(common.scratch(), name)
    with open(path, "w", encoding="utf-8", newline="\n") as f:
        f.write(text)
    return path


def plain(text):
    """A generated text without its odd bytes: random models write broken UTF-8, of which every
    decoder makes something else."""
    return re.sub("[^\0-\x7f]+", "\ufffd", text)


def evaluate(model, tasks, *flags):
    """painters --eval: ({task: {metric: (value, error, items, cut)}}, {task: [answers of an
    item]}): log-likelihoods, class scores, or one generated text."""
    log = os.path.join(common.scratch(), "log.tsv")
    out = common.run(model, "--eval", *tasks, "--log", log, "--quiet", *flags).decode()
    figures, answers = {}, {}
    for line in out.split("\n"):
        words = line.split()
        if len(words) >= 12 and words[0] not in ("task", "#"):
            task, metric, value, error, items, cut = [words[i] for i in (0, 1, 5, 6, 7, 9)]
            figures.setdefault(task, {})[metric] = (float(value), float(error.replace("-", "nan")),
                                                    int(items), int(cut))
    with open(log, encoding="utf-8", errors="replace", newline="\n") as f:
        for line in sorted(f.read().split("\n")[1:-1], key=lambda line: int(line.split("\t")[2])):
            words = line.split("\t")
            last = test_tasks.unescape(words[-1])
            if words[0] == "gsm8k":
                scores = [last]
            else:       # of running text, whose items may be spread over batches, the sum
                scores = [float(w) for w in (words[4:5] if words[0] == "text" else last.split())]
            answers.setdefault(words[0], []).append(scores)
    return figures, answers


def as_printed(found, right):
    """Is a printed number that number? Four digits behind the point, or five in all."""
    if right is None or math.isnan(right):
        return math.isnan(found)
    return abs(found - right) <= max(6e-5, 6e-5 * abs(right))


def compare(task, figures, answers, right):
    """The first difference of a task's figures and answers from recorded ones, or None."""
    for item, (a, b) in enumerate(zip(answers, right["answers"])):
        same = plain(a[0]) == plain(b[0]) if isinstance(b[0], str) else len(a) == len(b) and all(
            abs(x - y) <= common.likelihood_tolerance(y) for x, y in zip(a, b))
        if not same:
            return "%s, item %d: %r, should be %r" % (task, item, a, b)
    if len(answers) != len(right["answers"]):
        return "%s: %d items of %d" % (task, len(answers), len(right["answers"]))
    if set(figures) != set(right["figures"]):
        return "%s: metrics %s, should be %s" % (task, set(figures), set(right["figures"]))
    for metric, (value, error) in right["figures"].items():
        found = figures[metric]
        what = "%s %s: %r, should be %r" % (task, metric, found[:2], (value, error))
        if metric == "perplexity":      # of numbers with an error of 1e-3
            good = abs(found[0] / value - 1) < 1e-3
            # exp() of a widely spread mean has no error that two bootstraps would agree on
            good &= error > 0.5 * value or abs(found[1] / error - 1) < 0.05
        elif metric in ("matthews", "f1", "pearson", "spearman"):
            good = as_printed(found[0], value)
        else:
            good = as_printed(found[0], value) and as_printed(found[1], error)
        if not good:
            return what
    return None


class Recorded(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        with open(test_tasks.sample_path("expected.json"), encoding="utf-8") as f:
            cls.runs = json.load(f)["runs"]

    def check(self, name, flags, tasks):
        right = self.runs[" ".join([name] + flags)]
        figures, answers = evaluate(common.model(name), [task_file(t) for t in tasks], *flags)
        self.assertEqual(set(answers), set(tasks))
        for task in tasks:
            self.assertEqual(right[task]["weights"], common.fingerprint(name))
            fault = compare(task, figures[task], answers[task], right[task])
            self.assertIsNone(fault, "%s %s" % (name, flags))

    def test_llama(self):
        for name, flags in LLAMA_RUNS:
            self.check(name, flags, LLAMA_TASKS)

    def test_bert(self):
        for name, flags in BERT_RUNS:
            self.check(name, flags, BERT_TASKS[name])


class SameBits(unittest.TestCase):

    def log(self, model, tasks, *flags):
        path = os.path.join(common.scratch(), "bits.tsv")
        common.run(common.model(model), "--eval", *map(task_file, tasks), "--log", path, "--quiet",
                   *flags)
        with open(path, "rb") as f:
            return sorted(f.read().split(b"\n"))

    def test_batch_and_threads(self):
        for model, tasks in (("llama_gqa", LLAMA_TASKS), ("bert_two", BERT_TASKS["bert_two"])):
            right = self.log(model, tasks, "--threads", "1")
            for flags in (["--threads", "2"], ["--threads", "3", "--batch", "1"],
                          ["--threads", "1", "--batch", "300"],
                          ["--threads", "2", "--batch", "9999"]):
                self.assertEqual(self.log(model, tasks, *flags), right, (model, flags))


HEADER = "#painters-task\t1\tname=own\tkind=%s\tmetrics=%s"
CHOICE = HEADER % ("choice", "acc")
CLASSIFY = HEADER % ("classify", "acc") + "\tlabels=a|b"
MALFORMED = [   # (model, header, a line, what the message must hold besides the place)
    ("llama_gqa", CHOICE, "0\tcontext", "columns"),
    ("llama_gqa", CHOICE, "2\tcontext\ta\tb", "first column"),
    ("llama_gqa", CHOICE, "-1\tcontext\ta\tb", "first column"),
    ("llama_gqa", CHOICE, "0.5\tcontext\ta\tb", "first column"),
    ("llama_gqa", CHOICE, "0\tcontext\ta\t", "empty"),
    ("llama_gqa", CHOICE, "0\tcon\\xtext\ta\tb", "backslash"),
    ("llama_gqa", CHOICE, "0\tcontext\ta\tb\\", "backslash"),
    ("llama_gqa", CHOICE, "0\tcon\0text\ta\tb", "NUL"),
    ("llama_gqa", HEADER % ("contexts", "acc"), "0\t\ta\tb", "empty"),
    ("llama_gqa", HEADER % ("lastword", "acc"), "context", "columns"),
    ("llama_gqa", HEADER % ("lastword", "acc"), "context\t", "empty"),
    ("llama_gqa", HEADER % ("generate", "strict"), "one\ttwo\tthree", "columns"),
    ("bert_two", CLASSIFY, "2\tthe cat", "first column"),
    ("bert_two", CLASSIFY, "0\tone\ttwo\tthree", "columns"),
    ("bert_one", HEADER % ("regress", "pearson"), "much\tthe cat", "first column"),
    ("bert_one", HEADER % ("regress", "pearson"), "inf\tthe cat", "first column"),
]
GOOD = {"choice": "1\tcontext\ta\tb", "contexts": "1\ta\tone\ttwo", "lastword": "context\tword",
        "generate": "prompt\tanswer", "classify": "1\tthe cat", "regress": "1.5\tthe cat"}
BAD_HEADERS = [CHOICE.replace("#painters-task\t1", "#painters-task\t2"), "0\ta\tb",
               CHOICE.replace("choice", "choices"), CHOICE.replace("=acc", "=matthews"),
               CHOICE.replace("\tmetrics=acc", ""), CHOICE + "\tchance=high",
               *(CHOICE + "\tchance=" + chance
                 for chance in ("nan", "inf", "-inf", "1e308", "1.01", "-5")),
               CHOICE + "\tcolour=red", CHOICE.replace("\tname=own", "")]


class Malformed(unittest.TestCase):

    def check(self, model, header, rows, *words):
        path = written("\n".join([header] + rows) + "\n", "malformed.tsv")
        fault = common.refused(common.model(model), "--eval", path)
        for word in (path,) + words:
            self.assertIn(word, fault)

    def test_rows(self):
        for model, header, row, word in MALFORMED:
            good = GOOD[header.split("kind=")[1].split("\t")[0]]
            self.check(model, header, [good, good, row, good], "line 4", word)

    def test_headers(self):
        for header in BAD_HEADERS:
            self.check("llama_gqa", header, [GOOD["choice"]], "line 1")

    def test_no_items_and_wrong_models(self):
        self.check("llama_gqa", CHOICE, [], "no items")
        self.check("llama_gqa", CHOICE, ["", GOOD["choice"]], "line 2")
        self.check("llama_gqa", CLASSIFY, [GOOD["classify"]], "BERT")
        self.check("bert_two", CHOICE, [GOOD["choice"]], "Llama")

    def test_a_bom_crlf_and_no_last_newline(self):
        rows = [CHOICE, GOOD["choice"], "0\ta\\tb\\\\n\tc\td\\ne"]
        texts = ["\n".join(rows) + "\n", "\ufeff" + "\r\n".join(rows) + "\r\n", "\n".join(rows)]
        found = [evaluate(common.model("llama_gqa"), [written(text, "form.tsv")]) for text in texts]
        self.assertEqual(found[1:], found[:1] * 2)
        self.assertEqual(found[0][0]["own"]["acc"][2], 2)

    def test_long_texts_of_a_classifier_are_cut_and_counted(self):
        """One text, or the first or the second of two; what fits to the token is not cut."""
        fits = modelfile.read(common.model("bert_two"))["max_length"] - 2
        rows = ["1\t" + "the " * n for n in (fits, fits + 1, 500000)]
        rows += ["0\tthe cat\t" + "the " * 300, "0\t" + "the " * 300 + "\tthe cat"]
        path = written("\n".join([CLASSIFY] + rows), "long.tsv")
        out = os.path.join(common.scratch(), "long.out")
        common.run(common.model("bert_two"), "--eval", path, "--out", out)
        with open(out, encoding="utf-8") as f:
            states = [line.split("\t")[3] for line in f if line.startswith("own\t")]
        self.assertEqual(states, ["1", "2", "2", "2", "2"])

    def test_a_llama_whose_texts_may_have_no_tokens(self):
        """With a WordPiece tokenizer an item could never be done: refused."""
        with open(common.model("llama_gqa"), "rb") as f:
            data = bytearray(f.read())
        head = dict(zip(modelfile.FIELDS, struct.unpack_from(modelfile.FORMAT, data)))
        section = struct.pack("<IfII5sIIIi", 1, 0, 2, 5, b"[UNK]", 1, 0, 0, 0)
        at = head["tokenizer_offset"]
        data[at:at + head["tokenizer_bytes"]] = section.ljust(head["tokenizer_bytes"], b"\0")
        head.update(tokenizer_bytes=len(section), tokenizer_kind=2, unk=0, crc32=0)
        struct.pack_into(modelfile.FORMAT, data, 0, *head.values(), bytes(32))
        struct.pack_into("<I", data, 32, zlib.crc32(data[:head["header_bytes"]]))
        model = os.path.join(common.scratch(), "wordpiece.bin")
        with open(model, "wb") as f:
            f.write(data)
        common.run(model, "--info")
        path = written(HEADER % ("text", "token_perplexity") + "\n\u0301\n", "empty.tsv")
        self.assertIn("tokenizer", common.refused(model, "--eval", path))

    def test_items_longer_than_the_context_are_cut_and_counted(self):
        long = "1\t" + "many words " * 30 + "\tone\ttwo"
        path = written("\n".join([CHOICE, GOOD["choice"], long]), "long.tsv")
        figures, answers = evaluate(common.model("llama_gqa"), [path])
        self.assertEqual(figures["own"]["acc"][2:], (2, 1))
        self.assertTrue(all(map(math.isfinite, answers["own"][1])))


if __name__ == "__main__":
    unittest.main()
