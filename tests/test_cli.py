"""The command line and the README's C example."""
import os
import re
import subprocess
import unittest

import common


class CommandLine(unittest.TestCase):
    def test_help_lists_every_flag_of_the_readme(self):
        text = common.run("--help").decode()
        for flag in ("prompt eval cosine probe sweep info report head skip repeat reverse random seed "
                     "parallel loop times drop swap path show layers threads limit batch bos no-bos kv "
                     "out log shard svg tokens temperature top-p sample-seed quiet").split():
            self.assertRegex(text, r"(?m)^  --%s\b" % flag)
        self.assertIn("Examples", text)

    def test_no_arguments_is_a_question(self):
        status, out, _ = common.execute()
        self.assertEqual(status, 1)
        self.assertIn(b"painters MODEL", out)

    def test_refused(self):
        model = common.model("llama_gqa")
        for words, said in (
                (["--nonsense"], "--nonsense"), ([model, "--prompt"], "--prompt"),
                ([model, "--prompt", "a", "--tokens", "3x"], "3x"),
                ([model, "--prompt", "a", "--tokens", "0"], "--tokens"),
                ([model, "--prompt", "a", "--temperature", "hot"], "hot"),
                ([model, "--prompt", "a", "--top-p", "1.5"], "--top-p"),
                ([model, "--prompt", "a", "--threads", "0"], "--threads"),
                ([model, "--prompt", "a", "--kv", "both"], "--kv"),
                ([model, "--prompt", "a", "--kernels", "magic"], "magic"),
                ([model, "--prompt", "a", "--bos", "--no-bos"], "--bos"),
                ([model, "--prompt", "", "--no-bos"], "--prompt"),
                ([model, "--prompt", "q" * 300], "context"),
                ([model, "--prompt", "a", "--skip", "1", "--drop", "1"], "one at a time"),
                ([model, "--prompt", "a", "--skip", "1", "--path", "0"], "--path"),
                ([model, "--sweep", "skip"], "--eval"), ([model, "--shard", "1/2"], "--eval"),
                ([model, "--cosine"], "--prompt"), ([model], "nothing to do"), ([model, model], model),
                (["--layers", "3"], "--show"), ([], None), (["/nowhere/m.bin", "--info"], "/nowhere"),
                ([common.ROOT, "--info"], "regular file"),
                ([model, "--eval", "/nowhere.tsv"], "/nowhere.tsv"),
                ([model, "--eval", "--quiet"], "--eval: a value is missing"), (["--"], "--"),
                ([model, "--prompt", "a", "--seed", "1"], "--seed")):
            if said:
                with self.subTest(words):
                    self.assertIn(said, common.refused(*words))

    def test_one_at_a_time(self):
        """Of two commands, or two choices of layers, none is dropped in silence."""
        model, bert = common.model("llama_gqa"), common.model("bert_two")
        for words, flags in (
                (["--eval", "t", "--prompt", "a"], ("--eval", "--prompt")),
                (["--cosine", "t", "--eval", "t"], ("--cosine", "--eval")),
                (["--cosine", "t", "--prompt", "a"], ("--cosine", "--prompt")),
                (["--report", "f", "--eval", "t"], ("--report", "--eval")),
                (["--info", "--show"], ("--info", "--show")),
                (["--prompt", "a", "--prompt", "b"], ("--prompt",)),
                (["--eval", "t", "--sweep", "skip", "--path", "0"], ("--sweep", "--path")),
                (["--eval", "t", "--sweep", "skip", "--skip", "1"], ("--sweep", "--skip")),
                (["--report", "f", "--skip", "9"], ("--skip",)), (["--info", "--drop", "1"], ("--drop",)),
                (["--report", "f"], ("--report", "model")), (["--layers", "3", "--show"], ("--layers",)),
                (["--prompt", "a", "--strength", "5"], ("--strength",)),
                (["--prompt", "a", "--head", "x"], ("--head",)),
                (["--eval", "t", "--head", "x"], ("--head",)),
                (["--prompt", "a", "--top-p", "0.5"], ("--top-p", "--temperature")),
                (["--info", "--temperature", "1"], ("--temperature", "--prompt")),
                (["--prompt", "a", "--svg", "f.svg"], ("--svg",))):
            with self.subTest(words):
                said = common.refused(model, *words)
                for flag in flags:
                    self.assertIn(flag, said)
        self.assertIn("classifiers", common.refused(model, "--eval", "t", "--head", "x"))
        common.run(bert, "--cosine", "--prompt", "the")

    def test_a_value_is_no_flag(self):
        model = common.model("llama_gqa")
        for words, said in ((["--out", "--quiet"], "--out: a value is missing"),
                            (["--skip", "--show"], "--skip: a value is missing"),
                            (["--eval", "-t"], "--eval: a value is missing"),
                            (["-x"], "-x: no such flag"), (["-p", "a"], "-p: no such flag")):
            self.assertIn(said, common.refused(model, *words))
        self.assertEqual(common.run("-h"), common.run("--help"))
        out = common.run(model, "--prompt", "--quiet", "--tokens", "1")     # a text may be anything
        self.assertEqual(out[:7], b"--quiet")

    def test_what_is_said(self):
        self.assertIn("cannot be opened", common.refused("/nowhere/m.bin", "--info"))
        said = common.refused(common.model("bert_mlm"), "--prompt", "the " * 99 + "[MASK]")
        self.assertIn("shorten it", said)
        self.assertNotIn("--bos", said)
        self.assertRegex(common.run(common.model("bert_mlm"), "--info"),
                         rb"WordPiece, (\d+) tokens; vocabulary \1,")
        masks = b"".join(common.run(common.model("bert_mlm"), "--prompt", text + " [MASK] [MASK]")
                         for text in ("the", "a", "of the", "cat", ""))
        self.assertIn(b"  ##", masks)       # as transformers writes the pieces that go on

    def test_shards(self):
        for shard in ("0/2", "3/2", "1", "a/b", "1/0", "1/2/3"):
            with self.subTest(shard):
                common.refused(common.model("llama_gqa"), "--eval", "x.tsv", "--shard", shard)

    def test_quiet_and_streams(self):
        words = [common.model("llama_gqa"), "--prompt", "bcf", "--tokens", "4"]
        status, out, err = common.execute(*words)
        self.assertEqual((status, out[:3]), (0, b"bcf"))
        self.assertIn("tokens/s", err)
        self.assertEqual(common.execute(*words, "--quiet"), (0, out, ""))

    def test_sampling_has_a_seed(self):
        words = [common.model("llama_gqa"), "--prompt", "bcf", "--tokens", "20", "--temperature", "1"]
        one = common.run(*words, "--sample-seed", "1")
        self.assertEqual(one, common.run(*words, "--sample-seed", "1"))
        self.assertNotEqual(one, common.run(*words, "--sample-seed", "2"))
        greedy = common.run(*words[:-2])
        self.assertEqual(greedy, common.run(*words, "--top-p", "1e-9"))
        for tiny in ("1e-300", "1e-40"):
            self.assertEqual(greedy, common.run(*words[:-1], tiny))

    def test_output_closed_or_full(self):
        if os.path.exists("/dev/full"):
            with open("/dev/full", "wb") as full:
                done = subprocess.run([common.painters(), common.model("llama_gqa"), "--info"],
                                      stdout=full, stderr=subprocess.PIPE, check=False)
            self.assertEqual(done.returncode, 1)
            self.assertIn(b"cannot be written", done.stderr)

    def embedding(self, code, name):
        """Compiles a program that includes painters.c; returns it."""
        folder = common.scratch()
        source, program = os.path.join(folder, name + ".c"), os.path.join(folder, name)
        with open(source, "w", encoding="utf-8") as f:
            f.write(code)
        compiler = os.environ.get("CC", "cc").split()
        subprocess.run([*compiler, "-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-I", common.ROOT,
                        source, "-o", program, "-lm"], check=True)
        return program

    def test_readme_example(self):
        with open(os.path.join(common.ROOT, "README.md"), encoding="utf-8") as f:
            code = re.search(r"```c\n(.*?)```", f.read(), re.S).group(1)
        self.assertLessEqual(len(code.strip().splitlines()), 22)
        program = self.embedding(code.replace("model.bin", common.model("llama_gqa")), "example")
        out = subprocess.run([program], check=True, capture_output=True).stdout
        self.assertTrue(float(out))

    def test_an_embedding_program_cannot_overrun(self):
        program = self.embedding("""#define PAINTERS_NO_MAIN
            #include "painters.c"
            int main(int argc, char **argv) {
                Session *s = session_new(model_load(argv[argc - 3]));
                int q = sequence_new(s, -1, 10, 1);
                for (int i = 0; i < atoi(argv[2]); i++) batch_add(s, q, 5, atoi(argv[3]));
            }""", "overrun")
        for name, tokens, segment, said in (("llama_gqa", "17", "0", "room for 16 tokens"),
                                            ("llama_gqa", "16", "9", ""), ("bert_mlm", "1", "1", ""),
                                            ("bert_mlm", "1", "2", "segment 2 is out of range"),
                                            ("bert_mlm", "1", "-1", "segment -1 is out of range")):
            done = subprocess.run([program, common.model(name), tokens, segment], check=False,
                                  capture_output=True, text=True)
            with self.subTest(name, tokens=tokens, segment=segment):
                self.assertEqual(done.returncode, 1 if said else 0, done.stderr)
                self.assertIn(said, done.stderr)

    def test_results_belong_to_settings(self):
        """To name the only classifier is no other setting; other kernels are."""
        folder = common.scratch()
        task, out = os.path.join(folder, "settings.tsv"), os.path.join(folder, "settings.out")
        with open(task, "w", encoding="utf-8") as f:
            f.write("#painters-task\t1\tname=t\tkind=classify\tmetrics=acc\tlabels=LABEL_0|LABEL_1\n"
                    "0\tthe cat\n1\tthe\n")
        words = [common.model("bert_two"), "--eval", task, "--out", out, "--kernels"]
        whole = common.run(*words, "generic")
        self.assertEqual(common.run(*words, "generic", "--head", "classifier"), whole)
        self.assertIn("other settings", common.refused(*words, "plain"))


if __name__ == "__main__":
    unittest.main()
