"""export.py task: official benchmark files become task files with the harness's prompts, and what
is not an official file is refused by name and line.

tests/tasks holds a dozen items a task in the official forms, written for this test, and what
lm-evaluation-harness makes of them (expected.json, written by tests/oracle_eval.py --write).
"""
import collections
import contextlib
import csv
import functools
import importlib.util
import io
import json
import os
import unittest

import common

SAMPLES = os.path.join(common.TESTS, "tasks")
LLAMA = {"arc_challenge": "arc.jsonl", "arc_easy": "arc.jsonl", "hellaswag": "hellaswag.jsonl",
         "winogrande": "winogrande.jsonl", "lambada_openai": "lambada.jsonl",
         "gsm8k": "gsm8k_test.jsonl"}
TRAIN = os.path.join(SAMPLES, "gsm8k_train.jsonl")
FEWSHOT = {"gsm8k 5": ("gsm8k", ["--fewshot", "5", "--train", TRAIN]),
           "gsm8k 5 same": ("gsm8k", ["--fewshot", "5", "--train", TRAIN, "--fewshot-same"])}
FEWSHOT.update({name + " 2": (name, ["--fewshot", "2", "--train", os.path.join(SAMPLES, file)])
                for name, file in (("arc_easy", "arc_train.jsonl"),
                                   ("winogrande", "winogrande.jsonl"),
                                   ("hellaswag", "hellaswag.jsonl"))})
METRICS = {"arc_challenge": "acc_norm,acc", "arc_easy": "acc_norm,acc", "hellaswag": "acc_norm,acc",
           "winogrande": "acc", "lambada_openai": "acc,perplexity", "gsm8k": "strict,flexible"}


def sample_path(name):
    return os.path.join(SAMPLES, name)


@functools.lru_cache(None)
def exporter():
    """export.py as a module: a process for each of a hundred small files would take too long."""
    spec = importlib.util.spec_from_file_location("export", os.path.join(common.ROOT, "export.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def export_task(*arguments, out=None):
    """Runs export.py task: (status, stderr, path of the task file)."""
    out = out or os.path.join(common.scratch(), "task-%d.tsv" % len(os.listdir(common.scratch())))
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        status = exporter().main(["task", *arguments[:2], out, *arguments[2:]])
    return status, err.getvalue(), out


def unescape(text):
    out, escapes = [], {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
    parts = iter(text)
    for c in parts:
        out.append(escapes[next(parts)] if c == "\\" else c)
    return "".join(out)


def read_task(path):
    """(header fields, rows of unescaped fields) of a task file."""
    with open(path, encoding="utf-8", newline="\n") as f:
        lines = f.read().split("\n")
    assert lines.pop() == "" and lines[0].startswith("#painters-task\t1\t"), path
    header = dict(field.split("=", 1) for field in lines[0].split("\t")[2:])
    return header, [[unescape(field) for field in line.split("\t")] for line in lines[1:]]


@functools.lru_cache(None)
def task_file(name, source, *more):
    """The task file of an official file, written once per run."""
    status, err, out = export_task(name, source, *more)
    if status:
        raise AssertionError(err)
    return out


def requests(kind, row):
    """(gold, [[context, continuation]]) of a line of a task file, by the format's definition."""
    if kind == "choice":
        return int(row[0]), [[row[1], " " + choice] for choice in row[2:]]
    if kind == "contexts":
        return int(row[0]), [[context, " " + row[1]] for context in row[2:]]
    if kind == "lastword":
        return " " + row[1], [[row[0], " " + row[1]]]
    return row[1], [[row[0], None]]


class Prompts(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        with open(sample_path("expected.json"), encoding="utf-8") as f:
            cls.expected = json.load(f)["prompts"]

    def check(self, key, name, *more):
        header, rows = read_task(task_file(name, sample_path(LLAMA[name]), *more))
        found = [list(requests(header["kind"], row)) for row in rows]
        self.assertEqual(len(found), 12)
        for item, (a, b) in enumerate(zip(found, self.expected[key])):
            self.assertEqual(a, b, "%s, item %d" % (key, item))
        self.assertEqual(len(found), len(self.expected[key]))
        return header, found

    def test_no_examples(self):
        for name in LLAMA:
            header, found = self.check(name, name)
            self.assertEqual((header["name"], header["metrics"]), (name, METRICS[name]))
            chance = 0.0
            if header["kind"] in ("choice", "contexts"):
                chance = sum(1 / len(choices) for _, choices in found) / len(found)
            self.assertLess(abs(float(header["chance"]) - chance), 1e-6)
        self.assertEqual(header["stop"], r"Question:|</s>|<\|im_end\|>")
        self.assertEqual(header["max_tokens"], "256")

    def test_examples_drawn_by_the_harness(self):
        for key, (name, more) in FEWSHOT.items():
            self.check(key, name, *more)

    def test_the_samples_reach_the_corners(self):
        _, rows = read_task(task_file("arc_easy", sample_path("arc.jsonl")))
        self.assertEqual({len(row) - 2 for row in rows}, {3, 4, 5})
        _, rows = read_task(task_file("hellaswag", sample_path("hellaswag.jsonl")))
        self.assertIn("The woman from rome", rows[0][1])
        self.assertTrue(any(row[1].endswith(" ") for row in rows))
        _, rows = read_task(task_file("lambada_openai", sample_path("lambada.jsonl")))
        self.assertTrue(any(row[0] == "" for row in rows))


# GLUE ---------------------------------------------------------------------------------------------

Glue = collections.namedtuple("Glue", "columns label labels metrics")
ENTAILMENT = ["entailment", "not_entailment"]
GLUE = {
    "cola": Glue([3], 1, ["unacceptable", "acceptable"], "matthews"),
    "mrpc": Glue([3, 4], 0, ["not_equivalent", "equivalent"], "acc,f1"),
    "qnli": Glue([1, 2], 3, ENTAILMENT, "acc"),
    "qqp": Glue([3, 4], 5, ["not_duplicate", "duplicate"], "acc,f1"),
    "rte": Glue([1, 2], 3, ENTAILMENT, "acc"),
    "sst2": Glue([0], 1, ["negative", "positive"], "acc"),
    "stsb": Glue([7, 8], 9, None, "pearson,spearman"),
    "wnli": Glue([1, 2], 3, ["not_entailment", "entailment"], "acc"),
    "mnli": Glue([8, 9], -1, ["entailment", "neutral", "contradiction"], "acc"),
}
GLUE["mnli_mm"] = GLUE["mnli"]


def glue_rows(name, path):
    """What Hugging Face's loader reads: tabs without quoting, no rows with columns missing."""
    glue = GLUE[name]
    with open(path, encoding="utf-8-sig", newline="\n") as f:
        rows = [row for row in csv.reader(f, delimiter="\t", quoting=csv.QUOTE_NONE)]
    width = len(rows[0])
    for row in rows[0 if name == "cola" else 1:]:
        if len(row) == width:
            label = row[glue.label]
            if glue.labels and label in glue.labels:
                label = str(glue.labels.index(label))
            yield [label] + [row[i] for i in glue.columns]


def glue_samples():
    """(name, path) of every GLUE file in tests/tasks."""
    for file in sorted(os.listdir(SAMPLES)):
        name, _, part = file.partition(".")[0].partition("_")
        if name in GLUE:
            yield name + "_mm" * part.endswith("mismatched"), sample_path(file)


class GlueFiles(unittest.TestCase):

    def check(self, name, path):
        header, rows = read_task(task_file(name, path))
        right = list(glue_rows(name, path))
        self.assertEqual(rows, right, path)
        glue = GLUE[name]
        self.assertEqual((header["name"], header["metrics"]), (name, glue.metrics))
        self.assertEqual(header["kind"], "classify" if glue.labels else "regress")
        self.assertEqual(header.get("labels"), "|".join(glue.labels) if glue.labels else None)
        largest = max(collections.Counter(row[0] for row in right).values()) / len(right)
        chance = largest if glue.metrics.startswith("acc") else 0
        self.assertLess(abs(float(header["chance"]) - chance), 1e-6)
        return len(rows)

    def test_own_samples(self):
        for name, path in glue_samples():
            self.assertIn(self.check(name, path), (12, 30), path)
        self.assertEqual({name for name, _ in glue_samples()}, set(GLUE))

    def test_shared_samples(self):
        folders = {"cola": "CoLA", "mrpc": "MRPC", "qnli": "QNLI", "rte": "RTE", "sst2": "SST-2",
                   "stsb": "STS-B", "wnli": "WNLI"}
        sizes = {"cola": 1043, "mrpc": 408, "qnli": 499, "rte": 277, "sst2": 872, "stsb": 1500,
                 "wnli": 71}
        for name, folder in folders.items():
            path = common.shared("data", "glue", folder, "dev.tsv")
            self.assertEqual(self.check(name, path), sizes[name])
            if name != "qnli":
                self.check(name, common.shared("data", "glue", folder, "train.tsv"))

    def test_names_as_glue_writes_them(self):
        for name, path in (("CoLA", "cola_dev"), ("SST-2", "sst2_dev"), ("STS-B", "stsb_dev"),
                           ("MNLI-mm", "mnli_dev_mismatched")):
            header, _ = read_task(task_file(name, sample_path(path + ".tsv")))
            self.assertEqual(header["name"], name.lower().replace("-", "").replace("mnli", "mnli_"))

    def test_broken_rows_of_qqp_are_named(self):
        status, err, out = export_task("qqp", sample_path("qqp_train.tsv"))
        self.assertEqual(status, 0)
        self.assertIn("2 broken rows, lines 9, 10", err)
        self.assertEqual(len(read_task(out)[1]), 30)


# What is wrong ------------------------------------------------------------------------------------

def changed(name, change, line=5):
    """A copy of a sample file with one line changed: bytes -> bytes."""
    with open(sample_path(name), "rb") as f:
        lines = f.read().split(b"\n")
    lines[line - 1] = change(lines[line - 1])
    path = os.path.join(common.scratch(), "bad-%d" % len(os.listdir(common.scratch())))
    with open(path, "wb") as f:
        f.write(b"\n".join(lines))
    return path


def edited(**fields):
    """A change of a JSON line: fields replaced, or taken out where the value is None."""
    def change(line):
        row = json.loads(line)
        row.update(fields)
        return json.dumps({k: v for k, v in row.items() if v is not None}).encode()
    return change


def column(i, text):
    """A change of a line of columns: column i replaced, or taken out."""
    def change(line):
        columns = line.split(b"\t")
        columns[i:i + 1] = [] if text is None else [text]
        return b"\t".join(columns)
    return change


def choice_labels(*labels):
    def change(line):
        row = json.loads(line)
        for choice, label in zip(row["question"]["choices"], labels):
            choice["label"] = label
        del row["question"]["choices"][len(labels):]
        return json.dumps(row).encode()
    return change


BAD_ROWS = [
    ("arc_easy", "arc.jsonl", edited(answerKey="E"), "answerKey 'E'"),
    ("arc_easy", "arc.jsonl", edited(answerKey=None), "no field 'answerKey'"),
    ("arc_easy", "arc.jsonl", edited(answerKey=1), "type str"),
    ("arc_easy", "arc.jsonl", edited(question="why?"), "'question'"),
    ("arc_easy", "arc.jsonl", choice_labels("1", "1", "2"), "answerKey '1'"),
    ("arc_easy", "arc.jsonl", choice_labels("1"), "1 choices"),
    ("arc_easy", "arc.jsonl", lambda line: line.replace(b"hidden.", b""), "empty"),
    ("arc_easy", "arc.jsonl", lambda line: line[:-9], "JSON"),
    ("arc_easy", "arc.jsonl", lambda line: b"", "JSON"),
    ("arc_easy", "arc.jsonl", lambda line: b"[1, 2]", "JSON"),
    ("arc_easy", "arc.jsonl", lambda line: line.replace(b"Ice", b"\xffce"), "JSON"),
    ("arc_easy", "arc.jsonl", lambda line: line.replace(b"Ice", b"\\ud800"), "surrogate"),
    ("arc_easy", "arc.jsonl", lambda line: line.replace(b"Ice", b"\\u0000"), "NUL"),
    ("hellaswag", "hellaswag.jsonl", edited(label=4), "label 4"),
    ("hellaswag", "hellaswag.jsonl", edited(label=-1), "label -1"),
    ("hellaswag", "hellaswag.jsonl", edited(label=None), "no field 'label'"),
    ("hellaswag", "hellaswag.jsonl", edited(label=True), "type int"),
    ("hellaswag", "hellaswag.jsonl", edited(ctx_b=None), "no field 'ctx_b'"),
    ("hellaswag", "hellaswag.jsonl", edited(endings=["a", 2]), "endings"),
    ("hellaswag", "hellaswag.jsonl", edited(endings=["a", "b", "[c]", "d"]), "empty"),
    ("winogrande", "winogrande.jsonl", edited(answer="3"), "answer"),
    ("winogrande", "winogrande.jsonl", edited(answer=""), "answer"),
    ("winogrande", "winogrande.jsonl", edited(sentence="no blank"), "blank"),
    ("winogrande", "winogrande.jsonl", edited(sentence="ends in _ "), "empty"),
    ("winogrande", "winogrande.jsonl", edited(option2=None), "no field 'option2'"),
    ("lambada_openai", "lambada.jsonl", edited(text="ends in a space "), "empty"),
    ("lambada_openai", "lambada.jsonl", edited(text=5), "type str"),
    ("gsm8k", "gsm8k_test.jsonl", edited(answer="42"), "####"),
    ("gsm8k", "gsm8k_test.jsonl", edited(question=None), "no field 'question'"),
    ("cola", "cola_dev.tsv", column(1, b"2"), "label '2'"),
    ("cola", "cola_dev.tsv", column(2, None), "3 columns"),
    ("cola", "cola_dev.tsv", column(3, b"a\tb"), "5 columns"),
    ("cola", "cola_dev.tsv", column(3, b""), "empty"),
    ("cola", "cola_dev.tsv", column(3, b"caf\xe9"), "UTF-8"),
    ("cola", "cola_dev.tsv", column(3, b"a\0b"), "NUL"),
    ("mrpc", "mrpc_dev.tsv", column(0, b""), "label ''"),
    ("rte", "rte_dev.tsv", column(3, b"1"), "label '1'"),
    ("rte", "rte_dev.tsv", lambda line: b"", "1 columns"),
    ("sst2", "sst2_dev.tsv", column(1, b"positive"), "label 'positive'"),
    ("qqp", "qqp_dev.tsv", column(5, b"0\t1"), "7 columns"),
    ("mnli", "mnli_dev_matched.tsv", column(15, b"-"), "label '-'"),
    ("stsb", "stsb_dev.tsv", column(9, b"5.001"), "score"),
    ("stsb", "stsb_dev.tsv", column(9, b"nan"), "score"),
    ("stsb", "stsb_dev.tsv", column(9, b"-1"), "score"),
    ("stsb", "stsb_dev.tsv", column(7, None), "9 columns"),
]


class Refusals(unittest.TestCase):

    def check_refused(self, arguments, *words):
        status, err, out = export_task(*arguments)
        self.assertEqual((status, err.count("\n")), (1, 1), (arguments, err))
        for word in words:
            self.assertIn(word, err)
        self.assertFalse(os.path.exists(out))

    def test_bad_rows_are_named_by_line(self):
        for name, file, change, word in BAD_ROWS:
            path = changed(file, change)
            place = "item " if word in ("NUL", "surrogate") else "line 5: "
            self.check_refused([name, path], path + ": " + place, word)

    def test_wrong_files(self):
        missing = os.path.join(common.scratch(), "missing")
        empty = changed("cola_dev.tsv", lambda line: line)
        with open(empty, "wb"):
            pass
        self.check_refused(["arc_easy", missing], missing)
        for name in ("arc_easy", "cola", "rte"):
            self.check_refused([name, empty], empty, "none")
        self.check_refused(["rte", sample_path("wnli_dev.tsv")], "line 2", "label")
        self.check_refused(["rte", sample_path("mrpc_dev.tsv")], "line 1", "label, sentence1")
        self.check_refused(["hellaswag", sample_path("arc.jsonl")], "line 1", "ctx_a")
        self.check_refused(["squad", sample_path("arc.jsonl")], "squad", "hellaswag")

    def test_wrong_examples(self):
        gsm8k = ["gsm8k", sample_path("gsm8k_test.jsonl")]
        self.check_refused(gsm8k + ["--fewshot", "5"], "--train")
        self.check_refused(gsm8k + ["--train", TRAIN], "--fewshot")
        self.check_refused(gsm8k + ["--fewshot", "25", "--train", TRAIN], "24 examples")
        self.check_refused(gsm8k + ["--fewshot", "-1", "--train", TRAIN], "-1")
        self.check_refused(["rte", sample_path("rte_dev.tsv"), "--fewshot", "1", "--train",
                            sample_path("rte_train.tsv")], "GLUE")

    def test_an_old_file_survives_a_failure(self):
        out = os.path.join(common.scratch(), "kept.tsv")
        with open(out, "w", encoding="utf-8") as f:
            f.write("kept")
        bad = changed("cola_dev.tsv", column(1, b"2"))
        self.assertEqual(export_task("cola", bad, out=out)[0], 1)
        with open(out, encoding="utf-8") as f:
            self.assertEqual(f.read(), "kept")

    def test_bom_crlf_and_a_missing_last_newline_change_nothing(self):
        for name, file in list(LLAMA.items()) + [("cola", "cola_dev.tsv"), ("mrpc", "mrpc_dev.tsv"),
                                                 ("stsb", "stsb_dev.tsv")]:
            with open(sample_path(file), "rb") as f:
                data = f.read().replace(b"\r", b"").replace(b"\xef\xbb\xbf", b"")
            for form in (data, b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n"), data[:-1]):
                path = os.path.join(common.scratch(), "form-" + file)
                with open(path, "wb") as f:
                    f.write(form)
                status, err, out = export_task(name, path)
                self.assertEqual(status, 0, err)
                self.assertEqual(read_task(out), read_task(task_file(name, sample_path(file))))

    def test_another_number_of_items_is_mentioned(self):
        _, err, _ = export_task("gsm8k", sample_path("gsm8k_test.jsonl"))
        self.assertIn("official file has 1319 or 7473 items, this one 12", err)


if __name__ == "__main__":
    unittest.main()
