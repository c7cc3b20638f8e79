"""When the machine fails: no memory, closed or full outputs, signals, absurd numbers of threads, and
inputs that nobody would write."""
import os
import resource
import shutil
import signal
import stat
import subprocess
import time
import unittest

import common

FULL = os.path.exists("/dev/full")
SANITIZED = "sanitize" in os.environ.get("CFLAGS", "")  # it reserves more address space than any limit


def task(name, header, *rows):
    path = os.path.join(common.scratch(), name)
    with open(path, "wb") as f:
        f.write(b"#painters-task\t1\tname=odd\t" + header + b"\n" + b"".join(rows))
    return path


class Memory(unittest.TestCase):
    @unittest.skipIf(SANITIZED, "sanitizers need address space")
    def test_what_does_not_fit_is_named(self):
        def limit(megabytes):
            return lambda: resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20,) * 2)
        big = task("big.tsv", b"kind=lastword\tmetrics=acc",
                   *(b"%s\tb\n" % (b"bcf " * 30) for _ in range(40000)))
        for words, megabytes in ((["--prompt", "b"], 7), (["--eval", big], 40)):
            with self.subTest(words[0]):
                done = subprocess.run([common.painters(), common.model("llama_wide"), *words,
                                       "--threads", "1"], capture_output=True, text=True,
                                      preexec_fn=limit(megabytes), check=False)
                if done.returncode == 127 or "shared librar" in done.stderr:
                    self.skipTest("the program itself does not fit")
                self.assertEqual(done.returncode, 1, done.stderr)
                self.assertRegex(done.stderr, r"\Apainters: [^\n]*do not fit[^\n]*\n\Z")
        hole = os.path.join(common.scratch(), "hole.bin")
        with open(hole, "wb") as f:
            f.truncate(1 << 30)
        done = subprocess.run([common.painters(), hole, "--info"], capture_output=True, text=True,
                              preexec_fn=limit(200), check=False)
        self.assertRegex(done.stderr, r"hole.bin: its 1073741824 bytes do not fit into memory")

    def test_file_justifies_memory(self):
        """A small file cannot ask for much memory: refused, or run in 200 MB."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        common.run(common.model("bert_mlm"), "--prompt", "the [MASK]")
        if not SANITIZED:
            self.assertLess(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss,
                            max(before, 200 << 10) + 1)


class Outputs(unittest.TestCase):
    def setUp(self):
        self.model = common.model("llama_gqa")
        self.task = task("out.tsv", b"kind=lastword\tmetrics=acc",
                         *(b"bcf %d\tb\n" % i for i in range(50)))

    @unittest.skipUnless(FULL, "no /dev/full")
    def test_full(self):
        for words in (["--prompt", "bcf"], ["--eval", self.task], ["--cosine", "--prompt", "bcf"],
                      ["--info"], ["--help"], ["--show"]):
            with self.subTest(words), open("/dev/full", "wb") as full:
                done = subprocess.run([common.painters(), self.model, *words], stdout=full,
                                      stderr=subprocess.PIPE, text=True, check=False)
                self.assertEqual(done.returncode, 1)
                self.assertIn("cannot be written", done.stderr.splitlines()[-1])

    def test_unwritable(self):
        for flag in ("--out", "--log", "--svg"):
            with self.subTest(flag):
                error = common.execute(self.model, "--eval", self.task, "--sweep", "skip", flag,
                                       "/nowhere/x.svg")[2]
                self.assertIn("/nowhere/x.svg", error.splitlines()[-1])

    def test_a_file_over_the_limit_is_an_error(self):
        out = os.path.join(common.scratch(), "limited.bin")
        done = subprocess.run(
            [common.painters(), self.model, "--quantize", out], capture_output=True, text=True, check=False,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)))
        self.assertEqual(done.returncode, 1, done.stderr)
        self.assertIn("limited.bin: cannot be written", done.stderr)
        self.assertFalse(os.path.exists(out + ".tmp"))

    def test_closed_early(self):
        """`| head -1`: the reader's pipe closes; the run ends at once and does not hang."""
        for words in (["--prompt", "bcf", "--tokens", "90"], ["--eval", self.task, "--sweep", "drop"]):
            process = subprocess.Popen([common.painters(), self.model, *words],
                                       stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            process.stdout.close()
            self.assertIn(process.wait(timeout=60), (1, -signal.SIGPIPE))


class InputsStay(unittest.TestCase):
    """What a run writes never takes the place of what it reads, nor of another output or a device."""

    def setUp(self):
        folder = os.path.join(common.scratch(), "stay-" + self.id().rpartition(".")[2])
        os.makedirs(folder)

        def place(name, origin=None):
            path = os.path.join(folder, name)
            if origin:
                shutil.copyfile(origin, path)
            return path
        self.place = place
        self.model = place("model.bin", common.model("bert_two"))
        rows = [b"%d\tbcf %d\n" % (i % 2, i) for i in range(8)]
        header = b"kind=classify\tmetrics=acc\tlabels=no|yes"
        self.task = place("t.tsv", task("stay.tsv", header, *rows))
        self.train = place("train.tsv", task("stay.tsv", header, *rows))
        self.paths = place("paths.txt")
        with open(self.paths, "w", encoding="ascii") as f:
            f.write("0-5\n")
        self.link, self.linked = place("link"), place("hard")
        os.symlink(self.model, self.link)
        os.link(self.task, self.linked)
        self.inputs = (self.model, self.task, self.train, self.paths)

    def refuse(self, path, *words):
        """The run refuses the path in one line, and all inputs are as they were."""
        before = [common.read_bytes(name) for name in self.inputs]
        with self.subTest(words[-4:]):
            try:
                self.assertIn(path, common.refused(*words, timeout=20))
            finally:
                for name, data in zip(self.inputs, before):
                    now = common.read_bytes(name)
                    if now != data:
                        with open(name, "wb") as f:
                            f.write(data)
                    self.assertEqual(now, data, name)

    def evaluation(self, *more):
        return [self.model, "--eval", self.task, "--sweep", "skip,path:" + self.paths, "--probe",
                self.train, *more]

    def test_outputs_are_no_inputs(self):
        for flag in ("--out", "--log", "--svg"):
            for path in (*self.inputs, self.link, self.linked):
                self.refuse(path, *self.evaluation(flag, path))

    def test_outputs_are_not_each_other(self):
        for one, two in (("--out", "--log"), ("--out", "--svg"), ("--log", "--svg")):
            path = self.place("both.svg")
            self.refuse(path, *self.evaluation(one, path, two, path))

    def test_quantize(self):
        for path in (self.model, self.link):
            self.refuse(path, self.model, "--quantize", path)

    def test_cosine(self):
        for path in (self.model, self.task, self.link):
            self.refuse(path, self.model, "--cosine", self.task, "--svg", path)

    def test_report(self):
        out = self.place("r.out")
        common.run(self.model, "--eval", self.task, "--out", out)
        self.inputs += (out,)
        self.refuse(out, "--report", out, "--svg", out)

    def test_no_regular_file(self):
        """A device (by a link, so that only the link is at risk) and a pipe."""
        device, pipe = self.place("device"), self.place("pipe")
        os.symlink("/dev/full", device)
        os.mkfifo(pipe)
        for path in (device, pipe):
            self.refuse(path, self.model, "--quantize", path)
            self.refuse(path, self.model, "--cosine", "--prompt", "bcf", "--svg", path)
            for flag in ("--out", "--log", "--svg"):
                self.refuse(path, *self.evaluation(flag, path))
            self.assertEqual(os.path.islink(device), True)
            self.assertTrue(stat.S_ISFIFO(os.stat(pipe).st_mode))

    def test_log_goes_on_with_out(self):
        """A command that is repeated finds its results done and its log whole."""
        out, log = self.place("again.out"), self.place("again.log")
        words = [self.model, "--eval", self.task, "--sweep", "skip", "--out", out, "--log", log]
        common.run(*words)
        before = common.read_bytes(log).splitlines()
        common.run(*words)
        self.assertEqual(set(before) - set(common.read_bytes(log).splitlines()), set())


class Signals(unittest.TestCase):
    def test_interrupt_and_terminate(self):
        model = common.model("llama_wide")
        words = task("long.tsv", b"kind=lastword\tmetrics=acc",     # that begin differently
                     *(b"%d %s\tb\n" % (i, b"bcf " * 30) for i in range(3000)))
        for number in (signal.SIGINT, signal.SIGTERM):
            for out in ([], ["--out", os.path.join(common.scratch(), "signal-%d.out" % number)]):
                with self.subTest(number=number, out=out):
                    process = subprocess.Popen(
                        [common.painters(), model, "--eval", words, "--sweep", "drop", *out],
                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
                    time.sleep(1)
                    process.send_signal(number)
                    stdout, stderr = process.communicate(timeout=60)
                    self.assertEqual((process.returncode, stdout), (128 + number, ""), stderr)
                    self.assertIn("goes on" if out else "--out FILE", stderr)


class Threads(unittest.TestCase):
    def test_any_number(self):
        model = common.model("llama_wide")
        words = [model, "--prompt", "bcf gjk", "--tokens", "20"]
        right = common.run(*words, "--threads", "1")
        for threads in ("2", "3", "4", "5", "6", "7", "8", "100"):
            self.assertEqual(common.run(*words, "--threads", threads), right, threads)
        for value in ("0", "-1", "x", "100000000", "", "99999999999999999999"):
            with self.subTest(OMP_NUM_THREADS=value):
                self.assertEqual(common.run(*words, "--threads", "2",
                                            env={"OMP_NUM_THREADS": value}), right)
        for value in ("0", "x", "64"):
            self.assertEqual(common.run(*words, env={"OMP_NUM_THREADS": value}), right, value)


class OddInputs(unittest.TestCase):
    def test_ten_megabytes_in_a_line(self):
        path = task("wide.tsv", b"kind=lastword\tmetrics=acc", b"bcf gjk " * 1250000, b"\tb\n")
        words = b" ".join(common.run(common.model("llama_gqa"), "--eval", path).split())
        self.assertIn(b" 1 - 1 no-bos", words)  # one item, cut to the context and counted

    def test_prompt_of_a_megabyte_is_refused(self):
        error = common.refused(common.model("llama_gqa"), "--prompt", "bcf " * 30000)
        self.assertIn("context", error)

    def test_nul_bytes(self):
        path = task("nul.tsv", b"kind=lastword\tmetrics=acc", b"b\0cf\tb\n")
        self.assertIn("nul.tsv: line 2", common.refused(common.model("llama_gqa"), "--eval", path))

    def test_broken_utf8_is_text(self):
        path = task("utf8.tsv", b"kind=lastword\tmetrics=acc", b"\xff\xfe\x80 b\tb\n", b"\xe2\x96\tb\n")
        self.assertIn(b"odd", common.run(common.model("llama_gqa"), "--eval", path))

    def test_shortest(self):
        """One character of context, an empty context, one token of text."""
        path = task("short.tsv", b"kind=lastword\tmetrics=acc,perplexity", b"b\tb\n", b"\tb\n")
        self.assertIn(b"\t2\t", common.run(common.model("llama_gqa"), "--eval", path)
                      .replace(b" ", b"\t"))
        common.run(common.model("llama_gqa"), "--prompt", "b", "--tokens", "1")


if __name__ == "__main__":
    unittest.main()
