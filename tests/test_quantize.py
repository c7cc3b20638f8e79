"""painters --quantize: what it writes is a model file like any other, its weights are as near to the
old ones as llama.cpp's Q8_0, and everything runs on it with nearly the same numbers."""
import array
import math
import os
import resource
import signal
import struct
import subprocess
import unittest

import common
import modelfile

SMALL = os.path.join(common.TESTS, "small")
FLAGS = [["--skip", 2], ["--repeat", 3], ["--reverse", 3], ["--random", 3], ["--parallel", 3],
         ["--loop", 3], ["--drop", 5], ["--swap", 5], ["--path", "0 (1-3)*2 4|5 6-11"]]


def quantized(path):
    """(the 8-bit file, {matrix: relative error as printed})"""
    out = os.path.join(common.scratch(), "q8-" + os.path.basename(path))
    lines = common.run(path, "--quantize", out, "--quiet").decode().splitlines()
    return out, {line.split()[0]: float(line.split()[-1]) for line in lines[1:]}


def floats(tensor):
    rows, cols = tensor.shape if len(tensor.shape) == 2 else (1,) + tensor.shape
    if tensor.type == "f32":
        return list(array.array("f", tensor.data))
    if tensor.type == "f16":
        return list(struct.unpack("<%de" % (rows * cols), tensor.data))
    if tensor.type == "bf16":
        halves = array.array("H", tensor.data)
        return list(struct.unpack("<%df" % len(halves), b"".join(b"\0\0" + struct.pack("<H", h)
                                                                for h in halves)))
    groups = (cols + 31) // 32
    scales = struct.unpack("<%de" % (rows * groups), tensor.data[-2 * rows * groups:])
    steps = array.array("b", tensor.data[:rows * cols])
    return [steps[i] * scales[i // cols * groups + i % cols // 32] for i in range(rows * cols)]


def q8_0(weights, cols):
    """llama.cpp's Q8_0 (quantize_row_q8_0_ref) and back, also for rows that it would refuse."""
    found = []
    for row in range(0, len(weights), cols):
        for start in range(row, row + cols, 32):
            group = weights[start:min(start + 32, row + cols)]
            scale = max(map(abs, group)) / 127
            stored = struct.unpack("<e", struct.pack("<e", scale))[0]
            found += [round(x / scale) * stored if scale else 0.0 for x in group]
    return found


def relative(found, right):
    lost = sum((a - b) ** 2 for a, b in zip(found, right))
    return math.sqrt(lost / sum(b * b for b in right))


def figures(model, *flags):
    """{metric: value} of an evaluation."""
    out = common.run(model, "--eval", *flags, "--quiet").decode()
    rows = [line.split() for line in out.splitlines() if line and line[0] != "#"]
    return {(row[0], row[1]): float(row[5]) for row in rows if row[0] != "task"}


class Quantize(unittest.TestCase):
    def check_file(self, path):
        out, printed = quantized(path)
        before, after = modelfile.read(path), modelfile.read(out)
        for field in modelfile.FIELDS + ["meta", "tokenizer"]:
            if field not in ("file_bytes", "crc32"):
                self.assertEqual(before[field], after[field], field)
        self.assertEqual(list(before["tensors"]), list(after["tensors"]))
        for name, old in before["tensors"].items():
            new = after["tensors"][name]
            self.assertEqual(old.shape, new.shape)
            if len(old.shape) == 1:
                self.assertEqual(old, new)
                continue
            self.assertEqual(new.type, "q8")
            right = floats(old)
            error = relative(floats(new), right)
            self.assertLess(abs(error - printed[name]), 1e-5, name)
            self.assertLess(error, 1.02 * relative(q8_0(right, old.shape[1]), right), name)
            self.assertLess(error, 0.01)
        again, _ = quantized(out)       # 8-bit weights stay as they are
        with open(out, "rb") as f, open(again, "rb") as g:
            self.assertEqual(f.read(), g.read())
        return out

    def test_files(self):
        for name in ("llama_gqa", "llama_mha", "bert_two"):
            with self.subTest(name):
                self.check_file(common.model(name))

    def test_small_llama(self):
        before = os.path.join(SMALL, "llama.bin")
        after, _ = quantized(before)
        self.assertLess(os.path.getsize(after), 0.55 * os.path.getsize(before))
        text = os.path.join(common.scratch(), "text.tsv")
        with open(os.path.join(SMALL, "lastword.tsv"), encoding="utf-8") as f:
            lines = [" ".join(line.split("\t")) for line in f.read().splitlines()[1:101]]
        with open(text, "w", encoding="utf-8", newline="\n") as f:
            f.write("\n".join(["#painters-task\t1\tname=text\tkind=text\tmetrics=token_perplexity",
                               *lines, ""]))
        one, two = figures(before, text), figures(after, text)
        for name, value in one.items():
            self.assertLess(abs(math.log(two[name] / value)), 0.01, "%s %s %s" % (name, value, two))
        for flags in FLAGS:
            one, two = (figures(m, text, "--limit", 20, *flags) for m in (before, after))
            for name, value in one.items():
                self.assertLess(abs(math.log(two[name] / value)), 0.1, "%s %s" % (flags, name))
        tasks = [os.path.join(SMALL, name + ".tsv") for name in ("science", "ending", "pronoun")]
        one, two = (figures(m, *tasks, "--limit", 20) for m in (before, after))
        self.assertEqual(set(one), set(two))

    def test_small_bert(self):
        before = os.path.join(SMALL, "bert.bin")
        after, _ = quantized(before)
        train = os.path.join(common.scratch(), "train.tsv")
        with open(os.path.join(SMALL, "answers_train.tsv"), encoding="utf-8") as f, \
                open(train, "w", encoding="utf-8", newline="\n") as g:
            g.writelines(f.readlines()[:41])
        sweep = "skip,random:1,parallel,loop:2,drop"
        lines = [common.run(m, "--eval", os.path.join(SMALL, "answers.tsv"), "--probe", train,
                            "--limit", 4, "--quiet", "--sweep", sweep).count(b"\n")
                 for m in (before, after)]
        self.assertEqual(*lines)

    def test_refusals(self):
        path = common.model("llama_mha")
        nowhere = os.path.join(common.scratch(), "no", "folder")
        self.assertIn("no/folder", common.refused(path, "--quantize", nowhere))
        out = os.path.join(common.scratch(), "full.bin")

        def small_files():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
        done = subprocess.run([common.painters(), path, "--quantize", out], capture_output=True,
                              restore_signals=False, preexec_fn=small_files, text=True, check=False)
        self.assertEqual(done.returncode, 1)
        self.assertIn("full.bin: cannot be written", done.stderr)
        self.assertEqual([n for n in os.listdir(common.scratch()) if n.startswith("full")], [])

    def test_not_a_number(self):
        path = common.model("llama_mha")
        with open(path, "rb") as f:
            data = bytearray(f.read())
        at = data.index(struct.pack("<56s", b"layers.0.q"))
        kind, offset = struct.unpack_from("<I", data, at + 56)[0], struct.unpack_from(
            "<Q", data, at + 80)[0]
        data[offset:offset + 4] = b"\xff" * 4       # not a number in every type
        self.assertIn(kind, (0, 1, 2))
        broken = os.path.join(common.scratch(), "broken.bin")
        with open(broken, "wb") as f:
            f.write(data)
        status, _, err = common.execute(broken, "--quantize", broken + ".q8")
        self.assertEqual(status, 1)
        self.assertIn("layers.0.q: has weights", err)
        self.assertFalse(os.path.exists(broken + ".q8"))


if __name__ == "__main__":
    unittest.main()
