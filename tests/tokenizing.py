"""What the tests of the tokenizers share: sections made by export.py, and tests/tokenize.c at work."""
import functools
import json
import os
import struct
import subprocess
import sys

import common

sys.path.insert(0, common.ROOT)
import export  # pylint: disable=wrong-import-position

SENTENCEPIECE, WORDPIECE = 1, 2
GOLDEN = os.path.join(common.TESTS, "golden")
MODEL = os.path.join(GOLDEN, "tokenizer.model")     # a small SentencePiece model of our own
VOCABULARY = os.path.join(GOLDEN, "vocab.txt")      # and a small vocabulary
SPACE = "\u2581"

# The Unicode table takes a second; it depends on the settings of cleaning alone.
unicode_section = functools.lru_cache(None)(lambda cleaning, make=export.unicode_section:
                                            make(dict(cleaning)))
export.unicode_section = lambda cleaning: unicode_section(tuple(sorted(cleaning.items())))


def read(path, arch, vocabulary=1 << 24):
    """export.py's reading of a tokenizer file."""
    return export.read_tokenizer(os.path.dirname(path), path, arch, vocabulary)


def save(data, name):
    """Writes bytes or text to a file of that name in a fresh folder; returns its path."""
    folder = os.path.join(common.scratch(), "tokenizer-%d" % len(os.listdir(common.scratch())))
    os.mkdir(folder)
    path = os.path.join(folder, name)
    with open(path, "wb") as f:
        f.write(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))
    return path


def vocabulary(lines, **config):
    """vocab.txt with a tokenizer_config.json beside it; returns its path."""
    path = save("\n".join(lines) + "\n", "vocab.txt")
    with open(os.path.join(os.path.dirname(path), "tokenizer_config.json"), "w") as f:
        json.dump(config, f)
    return path


class Tokenizer:
    """The C tokenizer on a section."""

    def __init__(self, tokenizer, program=None):
        self.kind = tokenizer.kind
        self.command = [program or common.build("tokenize"), save(tokenizer.section, "section"),
                        str(tokenizer.kind), str(1 << 24), str(max(0, tokenizer.unk))]

    def ask(self, lines):
        """Sends commands, each bytes; returns the answers."""
        done = subprocess.run(self.command, input=b"".join(lines), capture_output=True, check=False)
        if done.returncode:
            raise AssertionError("tokenize: status %d: %s" % (done.returncode, done.stderr.decode()))
        return done.stdout.decode().split("\n")[:-1]

    def encode(self, texts):
        """The ids of each text (bytes or str)."""
        texts = [text.encode() if isinstance(text, str) else text for text in texts]
        answers = self.ask([b"e %d\n%s" % (len(text), text) for text in texts])
        return [list(map(int, answer.split())) for answer in answers]

    def decode(self, lists):
        """The bytes of each list of ids."""
        lines = [b"d " + b" ".join(b"%d" % i for i in ids) + b"\n" for ids in lists]
        return [bytes.fromhex(answer) for answer in self.ask(lines)]

    def seconds(self, text):
        """How long one encoding takes, the best of three, and how many ids come out."""
        best, count = self.ask([b"t %d\n%s" % (len(text), text)])[0].split()
        return float(best), int(count)



def tokenizer_json(pieces):
    """Hugging Face's tokenizer.json of a list of (text, score, type), as its converter makes it."""
    ids = {text: i for i, (text, _, _) in enumerate(pieces)}
    merges = []
    for text, score, kind in pieces:
        cuts = [(text[:k], text[k:]) for k in range(1, len(text)) if kind == 1]
        cuts = [pair for pair in cuts if pair[0] in ids and pair[1] in ids]
        merges += [(-score, ids[a], ids[b], a + " " + b) for a, b in cuts]
    special = [{"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False, "special": True}
               for i, (text, _, kind) in enumerate(pieces) if kind in (2, 3)]
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": special,
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "Prepend", "prepend": SPACE},
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]},
            "pre_tokenizer": None, "post_processor": None, "decoder": None,
            "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>",
                      "continuing_subword_prefix": None, "end_of_word_suffix": None,
                      "fuse_unk": True, "byte_fallback": True, "vocab": ids,
                      "merges": [merge[-1] for merge in sorted(merges)]}}


def write_seeds(folder):
    """Inputs for fuzzing: small sections of both kinds, each with a few texts."""
    lines = "[PAD] [UNK] [CLS] [SEP] [MASK] a b the ##a ##b ##he t ! \u4e2d \u00e9".split()
    made = [read(MODEL, "llama")] + [read(vocabulary(lines, **config), "bert") for config in (
        {"do_lower_case": False}, {"do_lower_case": False, "strip_accents": True})]
    for i, tokenizer in enumerate(made):
        for j, text in enumerate([b"", b"the [SEP] a\xff\xe4\xb8\xad", b"  a\xcc\x81b \xea\xb0\x81!"]):
            if len(tokenizer.section) < 1 << 16:
                with open(os.path.join(folder, "seed-%d-%d" % (i, j)), "wb") as f:
                    f.write(struct.pack("<BH", tokenizer.kind, len(tokenizer.section)))
                    f.write(tokenizer.section + text)
