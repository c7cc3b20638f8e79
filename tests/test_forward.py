"""The forward pass: goldens from transformers, and what must be equal to the bit.

tests/golden/forward_NAME.json holds, for each model of models.py, a few numbers of what
transformers computes (oracle_forward.py writes it). Everything runs through tests/dump.c, which
embeds painters.c, and through the command line.
"""
import json
import os
import random
import re
import sys
import unittest

import common
import models
import schedules

try:
    import resource
except ImportError:  # not on Windows
    resource = None

LLAMAS = [name for name, shape in models.MODELS.items() if shape["arch"] == "llama"]
PIECES = [text for text, _, _ in models.llama_pieces()]


def tokens(name, count, seed=0):
    rng = random.Random("%s %d" % (name, seed))
    return [rng.randrange(3, models.MODELS[name]["vocab"]) for _ in range(count)]


def interventions(T):
    """(flags of dump's `build`, schedule text) of one of each method, and paths that are none."""
    for method in ("baseline",) + schedules.METHODS:
        argument = {"random": 7, "loop": 3}.get(method)
        start = 0 if method == "baseline" else schedules.starts(method, T)[-1] // 2
        text = schedules.text(schedules.build(method, T, start, argument))
        yield [method, start] + ([] if argument is None else [argument]), text
    yield None, "%d 0 0|1|0 2|1 2|1 0" % (T - 1)


def continuation(ids, stops=(2,)):
    """The bytes of generated tokens up to the first that ends a text: </s>; for --prompt, as in
    llama2.c, <s> too."""
    return models.decode(ids[:min([ids.index(i) for i in stops if i in ids] + [len(ids)])])


def some_schedules(name):
    """Schedule texts of every intervention; of the large model, whose passes take long, of two."""
    found = [schedule for _, schedule in interventions(models.MODELS[name]["layers"])]
    return found[-2:] if name == "llama_wide" else found


class Golden(unittest.TestCase):
    """Logits, hidden states and greedy tokens of transformers, on the same weights."""

    def compare(self, found, columns, right, what):
        places = common.sample(len(found) // columns, columns, len(right) - 1)
        scale = max(map(abs, found))
        self.assertLessEqual(abs(scale - right[0]), common.tolerance() * right[0], what)
        difference = common.difference([found[i] for i in places], right[1:], right[0])
        self.assertLessEqual(difference, common.tolerance(), what)

    def check(self, name):
        golden, dim = common.read_golden(name), models.MODELS[name]["dim"]
        with common.Dump(common.model(name)) as dump:
            for case in golden["cases"]:
                what = "%s %s, %d tokens" % (name, case["schedule"], len(case["ids"]))
                found = dump.forward(case["ids"], case["schedule"], case["segments"])
                self.assertEqual(len(found["states"]), len(case["states"]), what)
                for i, (state, right) in enumerate(zip(found["states"], case["states"])):
                    self.compare(state, dim, right, "%s: state %d" % (what, i))
                columns, logits = found["logits"]
                self.compare(logits, columns, case["logits"], what + ": logits")
                if "last" in case:
                    difference = common.difference(logits[-columns:], case["last"])
                    self.assertLessEqual(difference, common.tolerance(), what + ": last logits")
            for case in golden["greedy"]:
                found = dump.greedy(case["ids"], case["schedule"], len(case["new"]), case["kv"])
                self.assertEqual(found[:case["tie"]], case["new"][:case["tie"]],
                                 "%s %s --kv %s" % (name, case["schedule"], case["kv"]))

    def test_flags(self):
        """The goldens' schedules are those that the command line makes of their flags."""
        for name in models.MODELS:
            for case in common.read_golden(name)["cases"][::3]:
                T = models.MODELS[name]["layers"]
                out = common.run("--layers", T, *case["flags"], "--show")
                self.assertEqual(out.decode(), case["schedule"] + "\n")

    def test_ties_are_rare(self):
        """Texts are compared over nearly their whole length."""
        cases = [case for name in LLAMAS for case in common.read_golden(name)["greedy"]]
        self.assertGreater(sum(case["tie"] for case in cases), 0.9 * 100 * len(cases))

    def test_command_line(self):
        """--prompt under every intervention prints the bytes of the same greedy tokens."""
        for name in ("llama_gqa", "llama_bf16"):
            cases = interventions(models.MODELS[name]["layers"])
            with common.Dump(common.model(name)) as dump:
                for turn, (flags, schedule) in enumerate(cases):
                    flags = ["--path", schedule] if flags is None else schedules.flags(*flags)
                    kv = ("exact", "mean")[turn % 2]
                    new = dump.greedy([1, PIECES.index("\u2581the")], schedule, 60, kv)
                    out = common.run(common.model(name), "--prompt", "the", "--tokens", 60, "--kv",
                                     kv, *flags)
                    self.assertEqual(out, b"the" + continuation(new, (1, 2)) + b"\n",
                                     (name, schedule))

    def test_mean_in_tasks(self):
        """Generation tasks under --kv mean: neither the size of a pass nor what items share (here a
        long beginning) changes what the prompt as one pass gives."""
        name, start = "llama_gqa", "bcf gjk lmp qvx yzb cfg jkl mpq vxy zbc "
        prompts = [start + end for end in ("b", "c", "bcfgj", "b q", "zzzz kkkk mmmm", "p")]
        task = os.path.join(common.scratch(), "generate.tsv")
        with open(task, "w", encoding="utf-8") as f:
            f.write("#painters-task\t1\tname=g\tkind=generate\tmetrics=strict\tchance=0\t"
                    "max_tokens=30\n")
            f.writelines("%s\t#### 1\n" % prompt for prompt in prompts)
        schedule, texts = "0 1|2|3|4 1|2|3|4 5", {}
        with common.Dump(common.model(name)) as dump:
            for kv in ("exact", "mean"):
                texts[kv] = [continuation(dump.greedy(models.spell(prompt), schedule, 30, kv))
                             for prompt in prompts]
        self.assertNotEqual(texts["exact"], texts["mean"])
        for kv in ("exact", "mean"):
            for batch in (1, 7, 64, 2048):
                log = os.path.join(common.scratch(), "generate-%s-%d.log" % (kv, batch))
                common.run(common.model(name), "--eval", task, "--path", schedule, "--kv", kv,
                           "--batch", batch, "--log", log)
                self.assertEqual(read_texts(log), [readable(text) for text in texts[kv]],
                                 (kv, batch))


def read_texts(log):
    """The generated texts of a --log file, in the order of the items."""
    escapes = {b"\\n": b"\n", b"\\t": b"\t", b"\\r": b"\r", b"\\\\": b"\\"}
    with open(log, "rb") as f:
        rows = [line.rstrip(b"\n").split(b"\t") for line in f if not line.startswith(b"#")]
    rows.sort(key=lambda row: int(row[2]))
    return [readable(re.sub(rb"\\[ntr\\]", lambda m: escapes[m.group()], row[-1])) for row in rows]


def readable(text):
    """Bytes as text: a stretch of what is not UTF-8 becomes one U+FFFD, as logs are UTF-8."""
    return re.sub("\ufffd+", "\ufffd", text.decode("utf-8", "replace"))


class Memory(unittest.TestCase):

    @unittest.skipUnless(sys.platform == "linux", "needs Linux's limit on memory")
    @unittest.skipIf("sanitize" in os.environ.get("CFLAGS", ""), "sanitizers need much memory")
    def test_cache_too_large(self):
        """A cache that does not fit is named in one line, not a crash."""
        limits = resource.getrlimit(resource.RLIMIT_AS)
        common.painters()
        model = common.model("llama_gqa")
        resource.setrlimit(resource.RLIMIT_AS, (3 << 30, limits[1]))
        try:
            line = common.refused(model, "--prompt", "b", "--tokens", 100, "--path", "(0-5)*100000")
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)
        self.assertIn("cache", line)


class Cosine(unittest.TestCase):
    """--cosine prints the similarity matrix of the reference."""

    def matrix(self, *arguments):
        rows = [line.split("\t") for line in common.run(*arguments).decode().splitlines()]
        names = ["emb"] + [row[0] for row in rows[2:]]
        self.assertEqual(rows[0], [""] + names)
        return names, [[float(x) for x in row[1:]] for row in rows[1:]]

    def close(self, found, right):
        for row, right_row in zip(found, right):
            self.assertLessEqual(max(abs(a - b) for a, b in zip(row, right_row)), 3e-6)

    def test_golden(self):
        with open(os.path.join(common.TESTS, "golden", "cosine.json"), encoding="utf-8") as f:
            golden = json.load(f)
        task = os.path.join(common.scratch(), "cosine.tsv")
        for case in golden:
            with open(task, "w", encoding="utf-8") as f:
                f.write(case["task"])
            model = common.model(case["model"])
            names, found = self.matrix(model, "--cosine", task, *case["flags"])
            self.assertEqual(names[1:], case["schedule"].split())
            self.assertEqual(len(found), len(case["matrix"]))
            self.close(found, case["matrix"])

    def test_prompt(self):
        """One prompt is a task of one sequence; with --limit a task is as short as that."""
        task = os.path.join(common.scratch(), "cosine-one.tsv")
        with open(task, "w", encoding="utf-8") as f:
            f.write("#painters-task\t1\tname=c\tkind=lastword\tmetrics=acc\tchance=0\n"
                    "bcf gjk\tl\nzzz\tb\n")
        model, flags = common.model("llama_gqa"), ["--loop", 1, "--times", 2]
        _, right = self.matrix(model, "--cosine", task, "--limit", 1, *flags)
        # the continuation's " " is fed, its last token is not
        _, found = self.matrix(model, "--cosine", "--prompt", "bcf gjk ", "--no-bos", *flags)
        self.close(found, right)


for _name in models.MODELS:
    setattr(Golden, "test_" + _name, lambda self, name=_name: self.check(name))


class SameBits(unittest.TestCase):
    """However the work is cut, the bits are the same."""

    def same(self, found, right, what):
        for key in right:
            if key == "states":
                for i, (a, b) in enumerate(zip(found[key], right[key])):
                    self.assertEqual(a.tobytes(), b.tobytes(), "%s: state %d" % (what, i))
            else:
                one, other = found[key][1], right[key][1]
                self.assertEqual(one.tobytes(), other.tobytes(), what + ": " + key)

    def test_chunks(self):
        """Prefill in any chunking, token by token too, equals one pass under every intervention."""
        rng = random.Random(4)
        for name in LLAMAS:
            ids = tokens(name, 61)
            with common.Dump(common.model(name)) as dump:
                for schedule in some_schedules(name):
                    whole = dump.forward(ids, schedule)
                    cuts = [[1] * 61, [16, 16, 16], [61], [60, 1],
                            [rng.randrange(1, 20) for _ in range(20)]]
                    for chunks in cuts:
                        found = dump.forward(ids, schedule, chunks=chunks)
                        self.same(found, whole, "%s %s in %r" % (name, schedule, chunks))

    def test_greedy_is_recomputation(self):
        """Each of 40 tokens through the cache is the best of one pass over all before it."""
        for name in LLAMAS:
            with common.Dump(common.model(name)) as dump:
                for schedule in some_schedules(name):
                    ids = tokens(name, 9)
                    new = dump.greedy(ids, schedule, 40)
                    columns, logits = dump.forward(ids + new, schedule)["logits"]
                    rows = [logits[i:i + columns] for i in range(0, len(logits), columns)]
                    best = [row.index(max(row)) for row in rows[len(ids) - 1:-1]]
                    self.assertEqual(new, best, "%s %s" % (name, schedule))

    def test_one_token_at_a_time_by_hand(self):
        """A text that grows by one token, recomputed from scratch, keeps the bits of its rows."""
        name = "llama_gqa"
        ids = tokens(name, 20)
        with common.Dump(common.model(name)) as dump:
            whole = dump.forward(ids, "0 1 2|3 2|3 4 5")
            columns, logits = whole["logits"]
            for n in range(1, 21):
                part = dump.forward(ids[:n], "0 1 2|3 2|3 4 5")["logits"][1]
                self.assertEqual(part.tobytes(), logits[:n * columns].tobytes())

    def test_threads(self):
        for name in models.MODELS:
            schedule = "0 1|2 2 1"
            found = []
            for threads in (1, 2, 3, 7):
                with common.Dump(common.model(name), "--threads", threads) as dump:
                    found.append(dump.forward(tokens(name, 50), schedule))
            for threads, one in zip((2, 3, 7), found[1:]):
                self.same(one, found[0], "%s with %d threads" % (name, threads))

    def test_batch(self):
        """Sequences of many lengths in one pass give what each gives alone."""
        for name in models.MODELS:
            shape = models.MODELS[name]
            texts = [tokens(name, n, n) for n in (5, 1, 33, 16, 17, 2, shape["length"], 1, 31, 9)]
            words = " / ".join(" ".join(map(str, text)) for text in texts)
            with common.Dump(common.model(name)) as dump:
                dump.ask("schedule", "0 1|2 2 0")
                found = dump.ask("batch", words)
                at = 0
                for text in texts:
                    alone = dump.forward(text, "0 1|2 2 0")
                    rows = slice(at * shape["dim"], (at + len(text)) * shape["dim"])
                    for i, state in enumerate(alone["states"]):
                        self.assertEqual(found["state%d" % i][1][rows].tobytes(), state.tobytes(),
                                         "%s: state %d of %d tokens" % (name, i, len(text)))
                    at += len(text)

    def test_family(self):
        """A shared beginning, in the same pass or an earlier one: what each text gives alone."""
        for name in LLAMAS:
            for before in (16, 37) if name == "llama_wide" else (1, 15, 16, 37):
                parent = tokens(name, before)
                children = [tokens(name, n, n) for n in (1, 4, 16, 21)]
                words = " / ".join(" ".join(map(str, text)) for text in [parent] + children)
                with common.Dump(common.model(name)) as dump:
                    for passes in (1, 2):
                        dump.ask("schedule", "0 1|2 1|2 2 0")
                        columns, logits = dump.ask("family", passes, words)["logits"]
                        at = before
                        for child in children:
                            alone = dump.forward(parent + child, "0 1|2 1|2 2 0")["logits"][1]
                            rows = logits[at * columns:(at + len(child)) * columns]
                            self.assertEqual(rows.tobytes(), alone[before * columns:].tobytes(),
                                             "%s: %d + %d tokens" % (name, before, len(child)))
                            at += len(child)

    def test_spelling(self):
        """A --path that spells an intervention, the identity path, and a group of one layer."""
        for name in ("llama_gqa", "bert_mlm", "bert_two"):
            T, ids = models.MODELS[name]["layers"], tokens(name, 23)
            with common.Dump(common.model(name)) as dump:
                for flags, schedule in interventions(T):
                    if flags is None:
                        continue
                    right = dump.forward(ids, schedule)
                    dump.ask("build", *flags)
                    found = dump.ask("forward", *ids)
                    states = [found.pop("state%d" % i)[1] for i in range(len(right["states"]))]
                    self.same(dict(found, states=states),
                              {key: right[key] for key in ("logits", "states")},
                              "%s %r" % (name, flags))
                whole = dump.forward(ids, " ".join(map(str, range(T))))["logits"][1]
                for path in ("0-%d" % (T - 1), " ".join("(%d)" % i for i in range(T)),
                             " ".join("(%d-%d)*1" % (i, i) for i in range(T))):
                    dump.ask("schedule", path)
                    found = dump.ask("forward", *ids)["logits"][1]
                    self.assertEqual(found.tobytes(), whole.tobytes(), path)

    def test_group_named_twice(self):
        """A layer named twice in a group counts twice."""
        name = "llama_mha"
        with common.Dump(common.model(name)) as dump:
            ids = tokens(name, 12)
            twice = dump.forward(ids, "0 1|1|2")["states"][2]
            one, two = (dump.forward(ids, "0 %d" % i)["states"][2] for i in (1, 2))
            mean = [(2 * a + b) / 3 for a, b in zip(one, two)]
            self.assertLess(common.difference(twice, mean), 1e-6)


class Layouts(unittest.TestCase):
    """The same weights in other files give the same numbers."""

    def logits(self, path, ids):
        with common.Dump(path) as dump:
            return dump.forward(ids, "0 2|1 2 0")["logits"][1]

    def close(self, found, right):
        self.assertLessEqual(common.difference(found, right),
                             3e-5 if common.kernels() == "amx" else 1e-5)

    def folder(self, name):
        return os.path.join(common.scratch(), name)

    def test_meta(self):
        for name in ("llama_gqa", "llama_f16"):
            ids = tokens(name, 40)
            path = common.export(models.write_meta(name, self.folder("meta-" + name)))
            self.close(self.logits(path, ids), self.logits(common.model(name), ids))

    def test_llama2c(self):
        for name in ("llama_gqa", "llama_mha"):
            ids = tokens(name, 40)
            right = self.logits(common.model(name), ids)
            for version in (0, 1):
                source = self.folder("%s-%d.bin" % (name, version))
                models.write_llama2c(name, source, version)
                tokenizer = self.folder("tokenizer.bin")
                models.write_llama2c_tokenizer(tokenizer, models.llama_pieces())
                path = common.export(source, "--tokenizer", tokenizer)
                self.close(self.logits(path, ids), right)


class Kernels(unittest.TestCase):
    """Every kernel path of this machine agrees with the plain one."""

    def test_paths(self):
        for name in models.MODELS:
            ids = tokens(name, 45)
            with common.Dump(common.model(name), "--kernels", "plain") as dump:
                right = dump.forward(ids, "0 1|2 2 1")
            with common.Dump(common.model(name)) as dump:
                found = dump.forward(ids, "0 1|2 2 1")
            difference = common.difference(found["logits"][1], right["logits"][1])
            self.assertLessEqual(difference, common.tolerance(), name)


class Stories(unittest.TestCase):
    """A real model, where ../shared has it."""

    def check(self, checkpoint):
        source = common.shared("data", "stories260K", checkpoint)
        path = common.export(source, "--tokenizer",
                             common.shared("data", "stories260K", "tokenizer.bin"))
        with open(common.shared("data", "stories260K", "expected_stdout.txt"), "rb") as f:
            expected = f.read() + b"\n"
        self.assertEqual(common.run(path, "--prompt", "", "--tokens", 200), expected)

    def test_legacy(self):
        self.check("checkpoint_legacy.bin")

    def test_v1(self):
        self.check("checkpoint_v1.bin")


if __name__ == "__main__":
    unittest.main()
