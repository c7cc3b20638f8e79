"""Damaged model files of a Llama, a BERT and an 8-bit Llama: every field of the header and table,
cuts at every boundary, flipped bytes, with and without the length and checksum put right. Each ends
in one line of error or in a normal result, never in a signal, and in little memory."""
import os
import random
import struct
import subprocess
import tempfile
import threading
import unittest
import zlib

import common

SANITIZED = "sanitize" in os.environ.get("CFLAGS", "")  # it takes memory of its own
MEMORY = 200 << 10      # kilobytes
SECONDS = 60


def sign(data):
    """Puts the length and the checksum right, as an attacker would."""
    data = bytearray(data)
    if len(data) >= 36:
        struct.pack_into("<Q", data, 16, len(data))
        header = struct.unpack_from("<Q", data, 24)[0]
        if 36 <= header <= len(data):
            struct.pack_into("<I", data, 32, zlib.crc32(data[:32] + bytes(4) + data[36:header]))
    return data


def changed(old, size):
    """What to put in the place of a whole number: nothing, the extremes, and one off."""
    whole = 1 << 8 * size
    return sorted({0, 1, whole - 1, whole // 2, whole // 2 - 1, (old + 1) % whole, (old - 1) % whole,
                   2 * old % whole} - {old})


class Hostile:
    """What is offered to each of the classes below, which name a model."""

    def setUp(self):
        with open(self.model(), "rb") as f:
            self.good = f.read()
        self.header = struct.unpack_from("<Q", self.good, 24)[0]
        self.entries = struct.unpack_from("<I", self.good, 36)[0]
        self.path = os.path.join(common.scratch(), "hostile.bin")

    def offer(self, data, signed=True):
        """Runs a prompt on a file; returns (status, stderr)."""
        with open(self.path, "wb") as f:
            f.write(sign(data) if signed else data)
        with tempfile.TemporaryFile() as out:
            process = subprocess.Popen(
                [common.painters(), self.path, "--prompt", self.prompt, "--tokens", "2", "--threads",
                 "1"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=out)
            timer = threading.Timer(SECONDS, process.kill)
            timer.start()
            _, status, used = os.wait4(process.pid, 0)      # the memory of this one alone
            timer.cancel()
            process.returncode = status = os.waitstatus_to_exitcode(status)
            out.seek(0)
            err = out.read().decode("utf-8", "replace")
        self.assertIn(status, (0, 1), err)
        if status:
            self.assertRegex(err, r"\Apainters: [^\n]*\n\Z")
        if not SANITIZED:
            self.assertLess(used.ru_maxrss, MEMORY)
        return status, err

    def offer_number(self, at, size, new):
        data = bytearray(self.good)
        data[at:at + size] = new.to_bytes(size, "little")
        with self.subTest(at=at, new=new):
            return self.offer(data)[0]

    def number(self, at, size):
        return int.from_bytes(self.good[at:at + size], "little")

    def test_whole(self):
        self.assertEqual(self.offer(self.good)[0], 0)
        self.assertEqual(bytes(sign(self.good)), self.good)

    def test_every_header_field(self):
        for at in [8, 12, 36, *range(64, 140, 4)]:
            for new in changed(self.number(at, 4), 4):
                self.offer_number(at, 4, new)
        for at in (24, 40, 48, 56, 144, 152):
            for new in changed(self.number(at, 8), 8):
                status = self.offer_number(at, 8, new)
                if at in (24, 40):
                    self.assertEqual(status, 1, (at, new))

    def test_length_and_checksum(self):
        for at, size in ((16, 8), (32, 4)):
            for new in changed(self.number(at, size), size):
                data = bytearray(self.good)
                data[at:at + size] = new.to_bytes(size, "little")
                with self.subTest(at=at, new=new):
                    self.assertEqual(self.offer(data, signed=False)[0], 1)

    def test_tensor_table(self):
        for entry in sorted({0, 1, self.entries // 2, self.entries - 1}):
            for field, size in ((0, 4), (55, 1), (56, 4), (60, 4), (64, 8), (72, 8), (80, 8), (88, 8)):
                at = 192 + 96 * entry + field
                for new in changed(self.number(at, size), size):
                    status = self.offer_number(at, size, new)
                    if field not in (56, 60):       # a type of the same size, a rank of one row
                        self.assertEqual(status, 1, (entry, field, new))

    def test_cut_at_every_boundary(self):
        """As it is; with the length and checksum right; and with a header that ends there too."""
        rng = random.Random(2)
        entries = {0, 1, self.entries - 1, *(rng.randrange(self.entries) for _ in range(5))}
        edges = {0, 8, 16, 24, 32, 36, 64, 144, 192, self.header, len(self.good),
                 self.number(48, 8), self.number(48, 8) + self.number(56, 8),
                 self.number(144, 8), self.number(144, 8) + self.number(152, 8)}
        for entry in entries:
            at = self.number(192 + 96 * entry + 80, 8)
            edges |= {192 + 96 * entry, at, at + self.number(192 + 96 * entry + 88, 8)}
        cuts = {edge + d for edge in edges for d in (-1, 0, 1)}
        cuts |= {rng.randrange(len(self.good)) for _ in range(5)}
        for cut in sorted(cut for cut in cuts if 0 <= cut < len(self.good)):
            with self.subTest(cut=cut):
                self.assertEqual(self.offer(self.good[:cut], signed=False)[0], 1)
                if cut < self.header:
                    self.assertEqual(self.offer(self.good[:cut])[0], 1)
                else:
                    self.offer(self.good[:cut])             # the last padding may go
                short = bytearray(self.good[:cut // 64 * 64])
                if 192 <= len(short) < self.header:
                    struct.pack_into("<Q", short, 24, len(short))
                    self.assertEqual(self.offer(short)[0], 1)
        self.assertEqual(self.offer(self.good + b"\0", signed=False)[0], 1)
        self.offer(self.good + bytes(64))

    def test_flipped_bytes(self):
        rng = random.Random(3)
        for i in range(80):
            data = bytearray(self.good)
            for _ in range(1 + i % 3):
                at = rng.randrange(self.header)
                data[at] ^= rng.randrange(1, 256)
            with self.subTest(at=at):
                self.assertEqual(self.offer(data, signed=False)[0], 1)      # the checksum sees it
                self.offer(data)                                           # and without its help
        for _ in range(10):                     # weights have no checksum: any are run
            data = bytearray(self.good)
            for _ in range(20):
                data[rng.randrange(self.header, len(data))] = rng.randrange(256)
            self.assertEqual(self.offer(data, signed=False)[0], 0)


class Llama(Hostile, unittest.TestCase):
    prompt = "bcf gjk"

    @staticmethod
    def model():
        return common.model("llama_f16")


class EightBits(Llama):
    @staticmethod
    def model():
        out = os.path.join(common.scratch(), "hostile-q8.bin")
        if not os.path.exists(out):
            common.run(common.model("llama_f16"), "--quantize", out, "--quiet")
        return out


class Bert(Hostile, unittest.TestCase):
    prompt = "the [MASK]"

    @staticmethod
    def model():
        return common.model("bert_mlm")


class Padding(unittest.TestCase):
    def test_the_tokenizer_of_a_smaller_model(self):
        """Rows that pad a vocabulary are plain; a vocabulary of which most has no token is not."""
        with open(common.model("llama_mha"), "rb") as f:
            good = f.read()
        path = os.path.join(common.scratch(), "padded.bin")
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
            with open(path, "wb") as f:
                f.write(sign(data))
            found, _, said = common.execute(path, "--prompt", "a", "--tokens", "1")
            self.assertEqual(found, status, said)
        self.assertIn("%d tokens, the model %d" % (old, old + 1025), said)


if __name__ == "__main__":
    unittest.main()
