"""What the shipped models say, against what they said when they were committed.

    python3 tests/test_demo.py --write      writes tests/golden/demo.tsv anew

Log-likelihoods and probabilities may differ by 1e-3, and predictions only where the margin is no
larger; on the machine, compiler and kernel path that wrote the file all must be the same to the bit.
"""
import os
import re
import subprocess
import sys
import unittest

import common

SMALL = os.path.join(common.TESTS, "small")
GOLDEN = os.path.join(common.TESTS, "golden", "demo.tsv")
SWEEP = "skip,repeat,reverse,random:1,parallel,loop:2,drop,swap"
CASES = [("llama.bin", task, 6) for task in ("science", "ending", "pronoun", "lastword", "sums")]
CASES += [("bert-%s.bin" % name, name.split("-")[0], 6)
          for name in ("accept", "accept-skip4", "sentiment", "sentiment-skip4")]


def made_with():
    """What a result's bits depend on: the processor, the compiler and its flags, the kernels."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        cpu = re.findall(r"(?:model name|flags)\s*: (.*)", file.read())[:2]
    compiler = subprocess.run([*os.environ.get("CC", "cc").split(), "--version"], capture_output=True,
                              text=True, check=False).stdout.splitlines()[0]
    kernels = re.search(r"kernels\s+(\S+)", common.run(os.path.join(SMALL, "llama.bin"), "--info")
                        .decode()).group(1)
    flags = os.environ.get("CFLAGS", "-std=gnu11 -O2 -fopenmp")
    return " | ".join([cpu[0], str("fma" in cpu[-1]), compiler, flags, kernels])


def say(model, task, limit):
    """The lines of --log for a few items of a task under all kinds of schedules, sorted."""
    log = os.path.join(common.scratch(), "demo.log")
    sweep = SWEEP if model == "llama.bin" and task != "sums" else "skip,loop:2"
    common.run(os.path.join(SMALL, model), "--eval", os.path.join(SMALL, task + ".tsv"), "--limit",
               limit, "--sweep", sweep, "--log", log)
    with open(log, encoding="utf-8") as file:
        return sorted(line for line in file.read().splitlines() if line[:1] != "#")


def cosine():
    return common.run(os.path.join(SMALL, "llama.bin"), "--cosine", os.path.join(SMALL, "lastword.tsv"),
                      "--limit", 5, "--svg",
                      os.path.join(common.scratch(), "cosine.svg")).decode().splitlines()


def everything():
    for case in CASES:
        yield from ("%s\t%s" % (case[0], line) for line in say(*case))
    yield from ("cosine\t" + line for line in cosine())


def numbers(field):
    try:
        return [float(x) for x in field.split()]
    except ValueError:
        return None


class Demo(unittest.TestCase):
    def test_the_sample_of_the_readme(self):
        """What the README says that `make demo` prints first is what it prints."""
        with open(os.path.join(common.ROOT, "README.md"), encoding="utf-8") as file:
            sample = re.search(r"(?ms)^```\n(--- painters llama.bin .*?)^```$", file.read()).group(1)
        with open(os.path.join(common.ROOT, "Makefile"), encoding="utf-8") as file:
            makefile = file.read().replace("\\\n", "")
        question = re.search(r'(?m)^SUM = "(.*)"$', makefile).group(1)
        flags = re.search(r"for flags in (.*?); do", makefile).group(1)
        found = ""
        for words in re.findall(r'"(.*?)"', flags):
            said = common.run(os.path.join(SMALL, "llama.bin"), "--tokens", 24, "--quiet",
                              *words.split(), "--prompt", question)
            found += "--- painters llama.bin --prompt ... %s\n%s" % (words, said.decode())
        self.assertEqual(found.splitlines(), sample.splitlines())

    def test_committed_answers(self):
        with open(GOLDEN, encoding="utf-8") as file:
            made, *wanted = file.read().splitlines()
        found = list(everything())
        self.assertEqual(len(found), len(wanted))
        if made == made_with():
            self.assertEqual(found, wanted)
            return
        for line, right in zip(found, wanted):
            a, b = line.split("\t"), right.split("\t")
            named = 2 if a[0] == "cosine" else 4
            self.assertEqual((len(a), a[:named]), (len(b), b[:named]))
            scores = numbers(b[-1]) or []
            ordered = sorted(scores)[-2:]
            if len(ordered) == 2 and ordered[1] - ordered[0] <= 2e-3:
                continue                        # too close to call
            for x, y in zip(a[named:], b[named:]):
                if numbers(y):
                    for p, q in zip(numbers(x), numbers(y)):
                        self.assertAlmostEqual(p, q, delta=1e-3, msg="%s\n%s" % (line, right))
                else:
                    self.assertEqual(x, y, line)


if __name__ == "__main__":
    if "--write" in sys.argv:
        with open(GOLDEN, "w", encoding="utf-8") as out:
            out.write("\n".join([made_with(), *everything()]) + "\n")
    else:
        unittest.main()
