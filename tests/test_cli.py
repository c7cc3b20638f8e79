"""The command line, the README's C example, and model files that are not what they should be."""
import os
import random
import re
import struct
import subprocess
import unittest
import zlib

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


class HostileModel(unittest.TestCase):
    """Damaged model files are refused in one line; nothing else may happen."""

    def setUp(self):
        with open(common.model("bert_two"), "rb") as f:
            self.good = f.read()
        self.path = os.path.join(common.scratch(), "hostile.bin")
        self.header = struct.unpack_from("<Q", self.good, 24)[0]

    def offer(self, data, sign=True):
        """Runs --info on a file with a right checksum; a refusal in one line or success."""
        data = bytearray(data)
        header = struct.unpack_from("<Q", data, 24)[0] if len(data) >= 32 else 0
        if sign and 36 <= header <= len(data):
            data[32:36] = bytes(4)
            struct.pack_into("<I", data, 32, zlib.crc32(data[:header]))
        with open(self.path, "wb") as f:
            f.write(data)
        status, out, err = common.execute(self.path, "--prompt", "the [MASK]")
        self.assertIn(status, (0, 1), err)
        if status:
            self.assertRegex(err, r"\Apainters: [^\n]*\n\Z")
        return status, err

    def test_every_header_field(self):
        for at in [*range(8, 16, 4), *range(36, 40, 4), *range(64, 160, 4)]:
            old = struct.unpack_from("<I", self.good, at)[0]
            for new in (0, 0xffffffff, 0x7fffffff, 0x80000000, old + 1, max(old, 1) - 1):
                data = bytearray(self.good)
                struct.pack_into("<I", data, at, new & 0xffffffff)
                with self.subTest(at=at, new=new):
                    self.offer(data)
        for at in (16, 24, 40, 48, 56, 144, 152):
            old = struct.unpack_from("<Q", self.good, at)[0]
            for new in (0, 2**64 - 1, 2**63, 2**63 - 1, old + 1, old - 1, old + 64, old - 64):
                data = bytearray(self.good)
                struct.pack_into("<Q", data, at, new % 2**64)
                with self.subTest(at=at, new=new):
                    status, err = self.offer(data)
                    if at in (16, 24, 40):
                        self.assertEqual(status, 1, err)

    def test_tensor_table(self):
        rng = random.Random(1)
        entries = struct.unpack_from("<I", self.good, 36)[0]
        for entry in (0, 1, entries - 1, rng.randrange(entries)):
            for field, size in ((0, 4), (52, 4), (56, 4), (60, 4), (64, 8), (72, 8), (80, 8), (88, 8)):
                at = 192 + 96 * entry + field
                old = int.from_bytes(self.good[at:at + size], "little")
                for new in (0, 2**(8 * size) - 1, 2**(8 * size - 1), old + 1, old - 1, old * 2):
                    data = bytearray(self.good)
                    data[at:at + size] = (new % 2**(8 * size)).to_bytes(size, "little")
                    with self.subTest(entry=entry, field=field, new=new):
                        status, err = self.offer(data)
                        if data != self.good:
                            self.assertEqual(status, 1, err)

    def test_cut_anywhere(self):
        rng = random.Random(2)
        cuts = [0, 1, 7, 8, 31, 32, 35, 36, 159, 160, 191, 192, self.header - 1, self.header,
                len(self.good) - 1, len(self.good) - 64]
        for cut in cuts + [rng.randrange(len(self.good)) for _ in range(20)]:
            with self.subTest(cut=cut):
                self.assertEqual(self.offer(self.good[:cut], sign=False)[0], 1)
        self.assertEqual(self.offer(self.good + b"\0", sign=False)[0], 1)

    def test_flips(self):
        rng = random.Random(3)
        for _ in range(60):
            at = rng.randrange(self.header)
            data = bytearray(self.good)
            data[at] ^= 1 << rng.randrange(8)
            with self.subTest(at=at):
                self.assertEqual(self.offer(data, sign=False)[0], 1)     # the checksum sees it
                self.offer(data)                                         # and without its help

    def test_the_tokenizer_of_a_smaller_model(self):
        """Rows that pad a vocabulary are plain; a vocabulary of which most has no token is not."""
        with open(common.model("llama_mha"), "rb") as f:
            good = f.read()
        old = struct.unpack_from("<I", good, 84)[0]
        entry = good.index(struct.pack("<56s", b"embed"))
        offset, length = struct.unpack_from("<QQ", good, entry + 80)
        for rows, status in ((old + 1024, 0), (old + 1025, 1)):
            more = (length // old * rows + 63) // 64 * 64 - (length + 63) // 64 * 64
            data = bytearray(good[:offset + length] + bytes(more) + good[offset + length:])
            struct.pack_into("<Q", data, 16, len(data))
            struct.pack_into("<I", data, 84, rows)
            struct.pack_into("<QQQQ", data, entry + 64, rows, struct.unpack_from("<Q", good, entry + 72)[0],
                             offset, length // old * rows)
            for at in range(192, 192 + 96 * struct.unpack_from("<I", good, 36)[0], 96):
                if at != entry:
                    place = struct.unpack_from("<Q", good, at + 80)[0]
                    struct.pack_into("<Q", data, at + 80, place + (more if place > offset else 0))
            found, said = self.offer(data)
            self.assertEqual(found, status, said)
        self.assertIn("%d tokens, the model %d" % (old, old + 1025), said)

    def test_checksum_is_needed(self):
        data = bytearray(self.good)
        data[32] ^= 1
        self.assertIn("checksum", self.offer(data, sign=False)[1])
        self.assertEqual(self.offer(self.good)[0], 1 if b"mlm" not in self.good else 0)


if __name__ == "__main__":
    unittest.main()
