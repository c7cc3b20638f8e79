"""The same bits whatever the number of threads, batch and shards, and without OpenMP: results of
--out and --log on weights of all four types."""
import os
import shlex
import subprocess
import unittest

import common
import test_sweep


def without_openmp():
    """painters built as the one under test, but for OpenMP."""
    program = os.path.join(common.scratch(), "painters-single")
    if not os.path.exists(program):
        flags = shlex.split(os.environ.get("CFLAGS", "-std=gnu11 -O2"))
        subprocess.run([*shlex.split(os.environ.get("CC", "cc")),
                        *(flag for flag in flags if flag != "-fopenmp"), "-Wno-unknown-pragmas",
                        os.path.join(common.ROOT, "painters.c"), "-o", program, "-lm"], check=True)
    return program


def quantized(path):
    out = os.path.join(common.scratch(), "bits-q8-" + os.path.basename(path))
    common.run(path, "--quantize", out, "--quiet")
    return out


class SameBits(unittest.TestCase):
    def results(self, program, model, tasks, *flags):
        """Runs a sweep; (lines of --out, lines of --log), without what the headers say."""
        stem = os.path.join(common.scratch(), "bits")
        for end in (".out", ".log"):
            if os.path.exists(stem + end):
                os.remove(stem + end)
        done = subprocess.run([program, model, "--eval", *tasks, "--sweep", "parallel,loop:2", "--limit", "4",
                               "--out", stem + ".out", "--log", stem + ".log", *map(str, flags)],
                              capture_output=True, text=True, check=False)
        self.assertEqual(done.returncode, 0, done.stderr)
        return [sorted(test_sweep.lines(stem + end)) for end in (".out", ".log")]

    def check(self, model, tasks):
        program, single = common.painters(), without_openmp()
        right = self.results(program, model, tasks, "--threads", 1)
        self.assertTrue(right[0] and right[1])
        for threads in range(2, 9):
            flags = ["--threads", threads, "--batch", (1, 3, 17, 200, 5, 64, 2)[threads - 2]]
            self.assertEqual(self.results(program, model, tasks, *flags), right, flags)
        for batch in (1, 7, 128):
            self.assertEqual(self.results(single, model, tasks, "--batch", batch), right,
                             "no OpenMP, --batch %d" % batch)
        shards = [self.results(side, model, tasks, "--shard", "%d/3" % i, "--batch", 10 * i,
                               "--threads", 2 * i if side == program else 1)
                  for i, side in ((1, single), (2, program), (3, program))]
        for kind in (0, 1):
            self.assertEqual(sorted(sum((shard[kind] for shard in shards), [])), right[kind])

    def test_llama(self):
        tasks = [test_sweep.llama_tasks()[i] for i in (0, 3)]
        for name in ("llama_gqa", "llama_f16", "llama_bf16"):
            with self.subTest(name):
                self.check(common.model(name), tasks)

    def test_llama_of_eight_bits(self):
        self.check(quantized(common.model("llama_gqa")), test_sweep.llama_tasks()[:1])

    def test_bert(self):
        tasks = test_sweep.bert_tasks()[:1]
        for path in (common.model("bert_two"), quantized(common.model("bert_two"))):
            with self.subTest(path):
                self.check(path, tasks)


if __name__ == "__main__":
    unittest.main()
