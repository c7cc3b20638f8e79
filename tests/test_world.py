"""The small world: the same seed gives the same bytes, and nothing held out is ever trained on."""
import hashlib
import importlib.util
import os
import random
import sys
import tempfile
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]
import export  # noqa: E402
import modelfile  # noqa: E402
import world  # noqa: E402

KINDS = {"choice": (3, 8), "contexts": (4, 4), "lastword": (2, 2), "generate": (2, 2),
         "classify": (2, 3), "regress": (3, 3)}


def fold(path):
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def read(path):
    with open(path, encoding="utf-8") as file:
        return [line.rstrip("\n").split("\t") for line in file]


class World(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory()
        cls.paths = world.write_tasks(cls.folder.name, 1)
        world.write_corpus(cls.folder.name, 1, 20000, 20000)

    @classmethod
    def tearDownClass(cls):
        cls.folder.cleanup()

    def test_same_seed_same_bytes(self):
        with tempfile.TemporaryDirectory() as again:
            world.write_tasks(again, 1)
            world.write_corpus(again, 1, 20000, 20000)
            for name in sorted(os.listdir(self.folder.name)):
                self.assertEqual(fold(os.path.join(self.folder.name, name)),
                                 fold(os.path.join(again, name)), name)

    def test_shipped_tasks(self):
        """tests/small holds what seed 1 gives, and nothing else."""
        small = os.path.join(HERE, "small")
        self.assertEqual(sorted(name for name in os.listdir(small) if name.endswith(".tsv")),
                         sorted(map(os.path.basename, self.paths.values())))
        for path in self.paths.values():
            name = os.path.basename(path)
            self.assertEqual(fold(path), fold(os.path.join(small, name)), name)

    def test_other_seed_other_bytes(self):
        with tempfile.TemporaryDirectory() as other:
            self.assertNotEqual(fold(world.write_tasks(other, 2)["science"]), fold(self.paths["science"]))

    def test_task_files(self):
        for name, path in self.paths.items():
            header, *rows = read(path)
            fields = dict(field.split("=", 1) for field in header[2:])
            self.assertEqual(header[:2], ["#painters-task", "1"])
            self.assertEqual(fields["name"], name.replace("_train", ""))
            low, high = KINDS[fields["kind"]]
            for row in rows:
                self.assertTrue(low <= len(row) <= high and all(row), (name, row))
                if fields["kind"] in ("choice", "contexts"):
                    first = 2
                    self.assertTrue(0 <= int(row[0]) < len(row) - first, (name, row))
                    self.assertEqual(len(set(row[first:])), len(row) - first, (name, row))
                if fields["kind"] == "classify":
                    self.assertIn(int(row[0]), range(len(fields["labels"].split("|"))))
            self.assertEqual(len(set(map(tuple, rows))), len(rows), f"{name}: an item twice")

    def test_chance_is_that_of_the_labels(self):
        for name in world.BERT:
            header, *rows = read(self.paths[name])
            fields = dict(field.split("=", 1) for field in header[2:])
            if fields["metrics"].startswith("acc"):
                gold = [row[0] for row in rows]
                top = max(gold.count(x) for x in set(gold)) / len(gold)
                self.assertAlmostEqual(float(fields["chance"]), top, places=3)

    def test_held_out_combinations(self):
        """A maker's text always names its combination, so one text is never on both sides."""
        for makers in (world.LLAMA, world.BERT):
            for name, (maker, *_) in makers.items():
                r, sides = random.Random(name), {}
                for _ in range(20000):
                    item = maker(r)
                    held = world.is_held_out(item.key)
                    text = item.text if name != "sums" else item.text + item.good
                    self.assertEqual(sides.setdefault((text, str(item.good)), held), held, (name, item))

    def test_held_out_items_are_not_in_the_training_text(self):
        with open(os.path.join(self.folder.name, "llama.txt"), encoding="utf-8") as file:
            corpus = file.read()
        self.assertIn("Question: ", corpus)
        for name, (maker, _, count) in world.LLAMA.items():
            r = random.Random(f"1/{name}")
            for item in world.distinct(r, maker, True, count, set()):
                whole = world.document(item._replace(more=""), maker)
                self.assertNotIn(world.escape(item.key[1] if name == "lastword" else whole), corpus, name)
        pairs = {tuple(row[1:]) for row in read(os.path.join(self.folder.name, "bert.tsv"))}
        pairs |= {row[:1] for row in pairs}
        for name in world.BERT:
            trained = {tuple(row[1:]) for row in read(self.paths[name + "_train"])[1:]}
            for row in read(self.paths[name])[1:]:
                self.assertNotIn(tuple(row[1:]), trained, name)
                self.assertNotIn(tuple(row[1:]), pairs, name)

    def test_worked_answers_are_right(self):
        r = random.Random(3)
        for _ in range(2000):
            steps, last = world.sums(r).good.split("\n#### ")
            for step in steps.rstrip(".").split(". "):
                left, right = step.split(" = ")
                self.assertEqual(eval(left, {}), int(right), step)
            self.assertEqual(steps.rstrip(".").rsplit(" = ", 1)[1], last)


NEEDED = ("sentencepiece", "torch", "transformers")


@unittest.skipUnless(all(map(importlib.util.find_spec, NEEDED)), "needs " + ", ".join(NEEDED))
class Train(unittest.TestCase):
    def test_same_data_and_tokenizers(self):
        """`train.py data` twice: the same files to the byte; the shipped models hold these
        tokenizers."""
        import train
        with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
            first, second = train.make_data(one), train.make_data(two)
            self.assertIn("tokenizer.model", os.listdir(first))
            for name in sorted(os.listdir(first)):
                self.assertEqual(fold(os.path.join(first, name)), fold(os.path.join(second, name)))
            for arch, name in (("llama", "tokenizer.model"), ("bert", "vocab.txt")):
                model = modelfile.read(os.path.join(HERE, "small", arch + ".bin"))
                made = export.read_tokenizer(first, os.path.join(first, name), arch, model["vocab_size"])
                self.assertEqual(made.section, model["tokenizer"], arch)


if __name__ == "__main__":
    unittest.main()
