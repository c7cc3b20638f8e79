"""Sweeps: the same bits as separate runs, killed and continued, sharded and put together again."""
import glob
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
import unittest

import common

LLAMA_SWEEP = "skip,repeat,reverse,random:2,parallel,loop:1-3,drop,swap"
WORDS = "the cat sat on a mat and dog ran in sun red big one two is was he she it".split()


def sentence(rng, n):
    return " ".join(rng.choice(WORDS) for _ in range(n))


def write_task(name, kind, metrics, rows, *options):
    path = os.path.join(common.scratch(), name + ".tsv")
    header = ["#painters-task", "1", "name=" + name, "kind=" + kind, "metrics=" + metrics, *options]
    with open(path, "w", encoding="utf-8") as f:
        f.writelines("\t".join(map(str, row)) + "\n" for row in [header] + rows)
    return path


def llama_tasks():
    rng = random.Random(7)
    shot = "Question: how many\\nAnswer: two\\n\\n"    # a beginning that all items share
    choice = [[rng.randrange(3), shot + sentence(rng, 4), *(sentence(rng, rng.randint(1, 3))
                                                            for _ in range(3))] for _ in range(9)]
    contexts = [[rng.randrange(2), sentence(rng, 2), sentence(rng, 4), sentence(rng, 4)]
                for _ in range(7)]
    last = [[sentence(rng, rng.randint(1, 9)), rng.choice(WORDS)] for _ in range(8)]
    made = [[shot + sentence(rng, rng.randint(1, 4)), "#### %d" % i] for i in range(6)]
    text = [[sentence(rng, 60)], [sentence(rng, 3)], [""]]
    return [write_task("choice", "choice", "acc_norm,acc", choice, "chance=0.3333"),
            write_task("contexts", "contexts", "acc", contexts, "chance=0.5"),
            write_task("last", "lastword", "acc,perplexity", last, "chance=0"),
            write_task("made", "generate", "strict,flexible", made, "chance=0", "max_tokens=12",
                       "stop=q|zz"),
            write_task("running", "text", "token_perplexity,word_perplexity", text)]


def bert_tasks():
    rng = random.Random(8)
    pairs = [[rng.randrange(2), sentence(rng, 5), sentence(rng, 4)] for _ in range(12)]
    one = [[rng.randrange(2), sentence(rng, 5)] for _ in range(9)]
    labels = ("labels=no|yes", "chance=0.5")
    return [write_task("pairs", "classify", "acc,f1,matthews", pairs, *labels),
            write_task("single", "classify", "acc", one, *labels)]


def own_flags(key):
    """The flags of a run of its own for a schedule of a result file."""
    method, *rest = key.split(":")
    if method == "baseline":
        return []
    flags = ["--" + method, rest[0]]
    return flags + {"random": ["--seed"], "loop": ["--times"]}.get(method, []) + rest[1:]


def lines(path):
    with open(path, encoding="utf-8", newline="\n") as f:
        return [line for line in f.read().split("\n") if line and line[0] != "#"]


class Sweep(unittest.TestCase):
    count = 0

    def evaluate(self, model, tasks, *flags):
        """One run of its own: (stdout, log lines, result file)."""
        Sweep.count += 1
        stem = os.path.join(common.scratch(), "sweep-%d" % Sweep.count)
        out = common.run(model, "--eval", *tasks, "--out", stem + ".out", "--log", stem + ".log",
                         *flags)
        return out, lines(stem + ".log"), stem + ".out"

    def check_separate(self, model, tasks, sweep, *flags):
        _, log, out = self.evaluate(model, tasks, "--sweep", sweep, *flags)
        keys = sorted({line.split("\t")[1] for line in log})
        self.assertGreater(len(keys), 10)
        for key in keys:
            _, own_log, own_out = self.evaluate(model, tasks, *own_flags(key), *flags)
            for whole, own in ((log, own_log), (lines(out), lines(own_out))):
                part = [line for line in whole if line.split("\t")[1] == key]
                self.assertEqual(sorted(part), sorted(own), key)

    def test_llama_sweep_is_its_runs(self):
        self.check_separate(common.model("llama_gqa"), llama_tasks(), LLAMA_SWEEP)

    def test_kv_mean(self):
        self.check_separate(common.model("llama_gqa"), llama_tasks()[3:4], "parallel,loop:1-3,skip",
                            "--kv", "mean")

    def test_bert_sweep_is_its_runs(self):
        model = common.model("bert_two")
        self.check_separate(model, bert_tasks(), "skip,reverse,random:2,parallel,loop:2,drop,swap")

    def test_masked_text(self):
        text = write_task("masked", "text", "pseudo_perplexity,masked_acc", [["the cat sat on a mat"],
                          ["he was big"], [""]])
        self.check_separate(common.model("bert_mlm"), [text], "skip,reverse,parallel,drop,swap")

    def test_probe(self):
        tasks = bert_tasks()
        self.check_separate(common.model("bert_two"), tasks[:1], "skip,parallel,drop,swap", "--probe",
                            tasks[0])

    def test_probes_are_kept_in_groups(self):
        """Some schedules are done with all items before others have begun: a run that is killed
        loses one group."""
        tasks = bert_tasks()
        _, _, out = self.evaluate(common.model("bert_two"), tasks[:1], "--sweep",
                                  "skip,repeat,reverse,parallel,drop,swap", "--probe", tasks[0],
                                  "--batch", 20)
        keys = [line.split("\t")[1] for line in lines(out)]
        self.assertGreater(len(set(keys)), 16)
        ends = min(len(keys) - 1 - keys[::-1].index(key) for key in keys)
        self.assertLess(ends, max(map(keys.index, keys)))

    def test_batch_and_threads(self):
        model, tasks = common.model("llama_gqa"), llama_tasks()
        logs = [sorted(self.evaluate(model, tasks, "--sweep", "parallel,loop:2", *flags)[1])
                for flags in ([], ["--batch", 1], ["--batch", 70, "--threads", 1],
                              ["--threads", 3], ["--batch", 100000, "--threads", 2])]
        for log in logs[1:]:
            self.assertEqual(logs[0], log)

    def test_texts_that_begin_alike(self):
        """Each context begins with the one before it: more ancestors than a sequence may have."""
        words = sentence(random.Random(9), 24).split()
        rows = [[0, " ".join(words[:n]), "the cat", "the big cat", "a dog"] for n in range(1, 25)]
        task = write_task("nested", "choice", "acc", rows)
        alone, together = (self.evaluate(common.model("llama_gqa"), [task], "--batch", n)[1]
                           for n in (1, 100000))
        self.assertEqual(sorted(alone), sorted(together))

    def test_passes_are_counted(self):
        model, tasks = common.model("llama_gqa"), llama_tasks()[:1]
        _, _, err = common.execute(model, "--eval", *tasks, "--sweep", "drop,swap")
        run, separate = map(int, re.search(r"(\d+) run, (\d+) for", err).groups())
        self.assertLess(run, separate)

    def test_path_file(self):
        path = os.path.join(common.scratch(), "paths.txt")
        with open(path, "w", encoding="utf-8") as f:
            f.write("0 1 2 3 4 5\n0-2 (3|4)*2 5\r\n")
        out = common.run(common.model("llama_gqa"), "--eval", llama_tasks()[1], "--sweep",
                         "path:" + path)
        self.assertIn("3|4 3|4 5", out.decode())
        with open(path, "a", encoding="utf-8") as f:
            f.write("0 9\n")
        error = common.refused(common.model("llama_gqa"), "--eval", llama_tasks()[1], "--sweep",
                               "path:" + path)
        self.assertIn("line 3", error)

    def test_bad_sweeps(self):
        for sweep in ("skp", "skip:3", "loop:3-2", "loop:0", "random:0", "random:x", "loop:1-",
                      "path:/nowhere"):
            with self.subTest(sweep):
                common.refused(common.model("llama_gqa"), "--eval", llama_tasks()[1], "--sweep",
                               sweep)


class Kept(unittest.TestCase):
    """--out: killed, cut, continued, sharded, refused."""

    def setUp(self):
        self.model, self.tasks = common.model("llama_gqa"), llama_tasks()
        self.flags = ["--eval", *self.tasks, "--sweep", "skip,parallel,drop,random:2"]
        self.out = os.path.join(common.scratch(), "kept-%s.out" % self.id())

    def whole(self):
        return common.run(self.model, *self.flags)

    def test_killed_at_twenty_moments(self):
        right = self.whole()
        rng = random.Random(3)
        start = time.time()
        common.run(self.model, *self.flags, "--out", self.out)
        took, kills = time.time() - start, 0
        while kills < 20:               # a run that came to its end is begun again
            if kills % 4 == 0 and os.path.exists(self.out):
                os.remove(self.out)
            process = subprocess.Popen([common.painters(), self.model, *self.flags, "--out", self.out],
                                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            time.sleep(rng.random() * took)
            process.send_signal(signal.SIGKILL)
            if process.wait() == -signal.SIGKILL:
                kills += 1
            elif os.path.exists(self.out):
                os.remove(self.out)
        self.assertEqual(right, common.run(self.model, *self.flags, "--out", self.out))
        self.assertEqual(right, common.run(self.model, *self.flags, "--out", self.out))

    def test_cut_anywhere(self):
        right = common.run(self.model, *self.flags, "--out", self.out)
        with open(self.out, "rb") as f:
            data = f.read()
        rng = random.Random(4)
        head = data.index(b"\nchoice\t") + 1
        for at in [0, head, head + 5, len(data) - 1, *(rng.randrange(head, len(data))
                                                      for _ in range(8))]:
            with open(self.out, "wb") as f:
                f.write(data[:at])
            self.assertEqual(right, common.run(self.model, *self.flags, "--out", self.out), at)

    def test_interrupt_says_how_to_go_on(self):
        flags = [*self.flags[:-1], LLAMA_SWEEP + ",random:10", "--batch", "1", "--out", self.out]
        process = subprocess.Popen([common.painters(), self.model, *flags], stderr=subprocess.PIPE,
                                   stdout=subprocess.DEVNULL)
        while not os.path.exists(self.out) or os.path.getsize(self.out) < 2000:
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        error = process.communicate()[1].decode()
        self.assertEqual(process.returncode, 130, error)
        self.assertIn("goes on", error)

    def test_shards(self):
        right = common.run(self.model, *self.flags, "--out", self.out)
        parts = []
        for i in (3, 1, 2):
            part = self.out + str(i)
            common.run(self.model, *self.flags, "--shard", "%d/3" % i, "--out", part)
            parts.append(part)
        report = common.run("--report", self.out)
        self.assertEqual(report, common.run("--report", *parts))
        joined = self.out + ".joined"
        with open(joined, "wb") as f:
            for part in reversed(parts):
                with open(part, "rb") as p:
                    f.write(p.read())
        self.assertEqual(report, common.run("--report", joined))
        # The same command on the joined results has nothing left to do, and prints the same.
        self.assertEqual(right, common.run(self.model, *self.flags, "--out", joined))

    def test_gnu_parallel(self):
        """The line of the README, on a model and a task of ours."""
        if not shutil.which("parallel"):
            self.skipTest("no GNU parallel here")
        with open(os.path.join(common.ROOT, "README.md"), encoding="utf-8") as f:
            line = re.search(r"(?m)^parallel -j (.*\\\n)*.*$", f.read()).group()
        folder = os.path.join(common.scratch(), "parallel")
        os.makedirs(folder)
        shutil.copy(common.painters(), os.path.join(folder, "painters"))
        shutil.copy(self.model, os.path.join(folder, "model.bin"))
        shutil.copy(self.tasks[0], os.path.join(folder, "arc.tsv"))
        subprocess.run(line, shell=True, cwd=folder, check=True)
        whole = common.run(self.model, "--eval", self.tasks[0], "--sweep", "skip,reverse")
        self.assertEqual(whole, common.run("--report", *glob.glob(folder + "/arc.*.out")))

    def test_report_is_the_run(self):
        self.assertEqual(common.run(self.model, *self.flags, "--out", self.out),
                         common.run("--report", self.out))

    def test_other_settings_are_refused(self):
        common.run(self.model, *self.flags, "--kernels", "generic", "--out", self.out)
        self.flags += ["--kernels", "generic"]
        for model, flags, what in (
                (self.model, [*self.flags, "--bos"], "(bos=no-bos, not bos=bos)"),
                (self.model, [*self.flags, "--kv", "mean"], "(kv=exact, not kv=mean)"),
                (self.model, [*self.flags, "--kernels", "plain"],
                 "(kernels=generic, not kernels=plain)"),
                (common.model("llama_mha"), self.flags, "(model=")):
            error = common.refused(model, *flags, "--out", self.out)
            self.assertIn("other settings", error)
            self.assertIn(what, error)
        with open(self.tasks[1], "a", encoding="utf-8") as f:
            f.write("0\tcat\tthe red\tthe big\n")
        self.addCleanup(llama_tasks)
        error = common.refused(self.model, *self.flags, "--out", self.out)
        self.assertIn("contexts", error)
        self.assertIn("(file=", error)

    def test_another_probe_is_refused_by_name(self):
        model, (task, other) = common.model("bert_two"), bert_tasks()
        flags = ["--eval", task, "--out", self.out]
        common.run(model, *flags, "--probe", task)
        for more, what in ((["--probe", task, "--strength", 2], "(strength=1, not strength=2)"),
                           (["--probe", other], "(probe=")):
            self.assertIn(what, common.refused(model, *flags, *more))

    def test_the_only_head_may_be_spelled_out(self):
        model, tasks = common.model("bert_two"), bert_tasks()
        flags = ["--eval", *tasks, "--out", self.out]
        right = common.run(model, *flags)
        self.assertEqual(right, common.run(model, *flags, "--head", "classifier"))

    def test_damaged_files_are_refused(self):
        common.run(self.model, *self.flags, "--out", self.out)
        with open(self.out, "rb") as f:
            data = f.read()
        record = data.index(b"\nchoice\t") + 1
        for damage in (b"nonsense\n", b"choice\tskip:9\t0\t1\t0\t0\n", b"choice\tskip:0\t99\t1\t0\t0\n",
                       b"choice\tskip:0\t0\t1\t5\t5\n", b"choice\tskip:0\t0\t1\t0\n", b"\0\n",
                       b"#painters-results\t1\tmodel=0\n", b"#task\tx\n",
                       b"choice\tpath:9 9\t0\t1\t0\t0\n", b"choice\tskip:0\t0\t1\tx\t0\n"):
            with self.subTest(damage):
                with open(self.out, "wb") as f:
                    f.write(data[:record] + data[record:] + damage)
                common.refused("--report", self.out)

    def test_impossible_values_are_refused(self):
        common.run(self.model, *self.flags, "--out", self.out)
        bert = self.out + ".bert"
        common.run(common.model("bert_two"), "--eval", *bert_tasks(), "--out", bert)
        for path, lists in ((self.out, {"choice": ["inf 0", "1e308 0", "0 0.5", "nan 1", "0 -1"],
                                        "contexts": ["2"], "made": ["1 1e308"],
                                        "last": ["5 1", "-1e3 2", "inf 0", "-1 nan"],
                                        "running": ["-9 1.5 2 9 0", "-9 2 -1 9 0", "7 2 2 9 0",
                                                    "-9 2 2 inf 0", "-9 2 2 9 nan"]}),
                            (bert, {"pairs": ["0 2", "0.5 0", "nan 0", "0 -1"]})):
            with open(path, encoding="utf-8") as f:
                head = [line for line in f if line[0] == "#"]
            for task, values in lists.items():
                for text in values:
                    with open(path, "w", encoding="utf-8") as f:
                        f.writelines([*head, "\t".join([task, "baseline", "0", "1", *text.split()]),
                                      "\n"])
                    self.assertIn("a value is no number", common.refused("--report", path), text)
        with open(self.out, "w", encoding="utf-8") as f:    # what a model may say
            header = "#task\t1\tfile=0\tname=t\tkind=lastword\tmetrics=perplexity"
            f.write("#painters-results\t1\tmodel=0\tfamily=llama\tlayers=2\tbos=bos\n" + header +
                    "\nt\tbaseline\t0\t1\tnan\t0\n")
        self.assertIn(b"perplexity  baseline", common.run("--report", self.out))
        for chance in ("nan", "inf", "1e308", "-5"):
            with open(self.out, "w", encoding="utf-8") as f:
                f.write("#painters-results\t1\tmodel=0\tfamily=llama\tlayers=2\tbos=bos\n" +
                        header + "\tchance=" + chance + "\n")
            self.assertIn("chance", common.refused("--report", self.out))

    def test_full_disk(self):
        full = self.out + ".full"
        for flag in ("--out", "--log"):
            done = subprocess.run(
                [common.painters(), *map(str, (self.model, *self.flags, flag, full))],
                capture_output=True, text=True, check=False,
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)))
            self.assertEqual(done.returncode, 1)
            self.assertIn(".full: cannot be written", done.stderr)
            os.remove(full)

    def test_figures(self):
        folder = self.out + ".figures"
        common.run(self.model, *self.flags, "--svg", folder)
        self.assertGreater(len(glob.glob(folder + "/*.svg")), 2)


if __name__ == "__main__":
    unittest.main()
