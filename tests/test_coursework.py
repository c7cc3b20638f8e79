"""The README's exercises: their checks work, and "an intervention in ten lines" is ten lines."""
import os
import re
import subprocess
import unittest

import common

BUILDER = """static void build_rotate(Schedule *s, int lo, int hi) {
    for (int i = lo + 1; i < hi; i++) schedule_add(s, i, false);
    schedule_add(s, lo, false);
}
"""
ROW = '    {"rotate", "run the first middle layer last", .build = build_rotate},\n'


LLAMA = os.path.join(common.TESTS, "small", "llama.bin")
FEWER = "0 1 4 6 8 9 10 11"      # layers of the shipped Llama that do nearly all of its work
AVERAGE = "mean[j] = i == n - 1 ? sum / (float)n : sum;"


def program(name, change):
    """painters.c as a reader changes it, compiled."""
    with open(os.path.join(common.ROOT, "painters.c"), encoding="utf-8") as f:
        before = f.read()
    after = change(before)
    if after == before:
        raise AssertionError(name + ": the place to change is not there")
    folder = os.path.join(common.scratch(), "exercise-" + name)
    os.makedirs(folder)
    with open(os.path.join(folder, "painters.c"), "w", encoding="utf-8") as f:
        f.write(after)
    built = os.path.join(folder, "painters")
    subprocess.run([*os.environ.get("CC", "cc").split(), "-std=gnu11", "-O1", "-Wno-unknown-pragmas",
                    "-w", os.path.join(folder, "painters.c"), "-o", built, "-lm"], check=True)
    return built


def summary_of(text):
    """The value of a path's row in the summary."""
    return float(re.search(r"(?m)^summary +median +path +\S+ +\S+ +(\S+)", text).group(1))


class Exercises(unittest.TestCase):
    def test_schedule_by_hand(self):
        self.assertEqual(common.run("--layers", 12, "--path", "0-4 (5-7)*2 8-11", "--show"),
                         common.run("--layers", 12, "--loop", 4, "--times", 2, "--show"))

    def test_an_intervention_in_ten_lines(self):
        with open(os.path.join(common.ROOT, "painters.c"), encoding="utf-8") as f:
            source = f.read()
        place = source.index("// To add an intervention:")
        table = source.index("{\n", source.index("interventions[] = ")) + 2
        source = source[:place] + BUILDER + source[place:table] + ROW + source[table:]
        self.assertLessEqual((BUILDER + ROW).count("\n"), 10)
        built = program("rotate", lambda _: source)
        out = subprocess.run([built, "--layers", "12", "--rotate", "3", "--show"], check=True,
                             capture_output=True, text=True).stdout
        self.assertEqual(out, "0 1 2 3 5 6 7 8 4 9 10 11\n")
        self.assertIn("--rotate S", subprocess.run([built, "--help"], check=True,
                                                   capture_output=True, text=True).stdout)
        many = subprocess.run([built, "--layers", "5", "--sweep", "rotate", "--show"], check=True,
                              capture_output=True, text=True).stdout
        self.assertEqual(many, "0 1 2 3 4\n0 2 3 4 1\n0 1 3 2 4\n")

    def test_a_task(self):
        """The README's task, with ten lines of one's own; a broken line is named."""
        with open(os.path.join(common.ROOT, "README.md"), encoding="utf-8") as f:
            shown = re.search(r"(?ms)^(#painters-task\t?[^\n]*name=capitals.*?)^```", f.read())
        head = "#painters-task\t1\tname=capitals\tkind=choice\tmetrics=acc\tchance=0.5\n"
        rows = shown.group(1).splitlines()[1:] if shown and "\t" in shown.group(1) else []
        rows += ["%d\tThe capital of %s is\tParis\tRome" % (i % 2, "abcdefghij"[i]) for i in range(10)]
        path = os.path.join(common.scratch(), "capitals.tsv")
        with open(path, "w", encoding="utf-8") as f:
            f.write(head + "".join(row + "\n" for row in rows))
        table = common.run(LLAMA, "--eval", path).decode()
        self.assertRegex(table, r"(?m)^capitals +acc .* %d " % len(rows))
        with open(path, "a", encoding="utf-8") as f:
            f.write("x\tThe capital of k is\tParis\tRome\n")
        self.assertIn("capitals.tsv: line %d" % (len(rows) + 2),
                      common.refused(LLAMA, "--eval", path))

    def test_layers_that_can_go(self):
        """Four of 12 layers leave at least 0.85 of the summary on three tasks."""
        path = os.path.join(common.scratch(), "gone.txt")
        with open(path, "w", encoding="utf-8") as f:
            f.write(FEWER + "\n")
        tasks = [os.path.join(common.TESTS, "small", name + ".tsv")
                 for name in ("science", "pronoun", "sums")]
        text = common.run(LLAMA, "--eval", *tasks, "--sweep", "path:" + path, "--quiet").decode()
        self.assertEqual(len(FEWER.split()), 8)
        self.assertGreaterEqual(summary_of(text), 0.85, text)

    def test_adding_is_not_averaging(self):
        """Changes of parallel layers that are added give other numbers; one layer, the same bits."""
        added = program("adding", lambda source: source.replace(
            AVERAGE, "(void)n, mean[j] = sum;"))
        words = [common.model("llama_gqa"), "--kernels", "plain", "--prompt", "bcf gjk", "--tokens",
                 "8", "--quiet"]
        for path in ("0-5", "0 3 1 1 5"):
            self.assertEqual(common.run(*words, "--path", path), subprocess.run(
                [added, *words, "--path", path], check=True, capture_output=True).stdout)
        words[words.index("--prompt"):] = ["--cosine", "--prompt", "bcf gjk", "--path", "0 1|2|3|4 5"]
        self.assertNotEqual(common.run(*words), subprocess.run(
            [added, *words], check=True, capture_output=True).stdout)


if __name__ == "__main__":
    unittest.main()
