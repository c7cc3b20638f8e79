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
        self.assertEqual(common.run(*words[:-2]), common.run(*words, "--top-p", "1e-9"))

    def test_output_closed_or_full(self):
        if os.path.exists("/dev/full"):
            with open("/dev/full", "wb") as full:
                done = subprocess.run([common.painters(), common.model("llama_gqa"), "--info"],
                                      stdout=full, stderr=subprocess.PIPE, check=False)
            self.assertEqual(done.returncode, 1)
            self.assertIn(b"cannot be written", done.stderr)

    def test_readme_example(self):
        with open(os.path.join(common.ROOT, "README.md"), encoding="utf-8") as f:
            code = re.search(r"```c\n(.*?)```", f.read(), re.S).group(1)
        self.assertLessEqual(len(code.strip().splitlines()), 22)
        folder = common.scratch()
        with open(os.path.join(folder, "example.c"), "w", encoding="utf-8") as f:
            f.write(code.replace("model.bin", common.model("llama_gqa")))
        compiler = os.environ.get("CC", "cc").split()
        program = os.path.join(folder, "example")
        subprocess.run([*compiler, "-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-I", common.ROOT,
                        os.path.join(folder, "example.c"), "-o", program, "-lm"], check=True)
        out = subprocess.run([program], check=True, capture_output=True).stdout
        self.assertTrue(float(out))


if __name__ == "__main__":
    unittest.main()
