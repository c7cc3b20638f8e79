"""Tokenizers: text to ids and back, exactly as sentencepiece and Hugging Face do it, in linear time;
and what export.py and painters.c refuse."""
import json
import os
import random
import struct
import unittest

import common
import tokenizing
from texts import BROKEN, texts
from tokenizing import SPACE, Tokenizer, read, save, vocabulary

LETTERS = "abcdefghijklmnopqrstuvwxyz"
BYTES = ["<0x%02X>" % i for i in range(256)]
ODD = [b"", b" ", b"a", b"\0", b"a\0b", b"  a  b  ", b"the\nthe", b"\xff\xfe", b"<s> </s> <0x41>",
       "\u2581the \u2581".encode(), "\ufffd".encode(), b"\xe2\x96", b"a" * 300]


def golden():
    with open(os.path.join(tokenizing.GOLDEN, "tokenizer.json"), encoding="ascii") as f:
        return json.load(f)


# A SentencePiece model as a protobuf --------------------------------------------------------------

def varint(value):
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def field(number, value):
    """One field: an int, a float or bytes."""
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value & (1 << 64) - 1)
    return varint(number << 3 | 2) + varint(len(value)) + value


def protobuf(pieces, trainer=((3, 2), (35, 1)), normalizer=((3, 1), (4, 0)), more=b""):
    """tokenizer.model of a list of (text, score, type), with Llama's settings."""
    data = b"".join(field(1, field(1, text.encode()) + field(2, float(score)) + field(3, kind))
                    for text, score, kind in pieces)
    settings = [b"".join(field(*pair) for pair in pairs) for pairs in (trainer, normalizer)]
    return data + field(2, settings[0]) + field(3, settings[1]) + more


def with_bytes(normal):
    """Pieces of a whole model, with those given as {text: score} behind the special ones."""
    pieces = [("<unk>", 0, 2), ("<s>", 0, 3), ("</s>", 0, 3)] + [(name, 0, 6) for name in BYTES]
    return pieces + [(text, score, 1) for text, score in normal.items()]


def reference(pieces, text):
    """SentencePiece's BPE as its definition reads, slowly: merge the best pair, leftmost first."""
    score = {p: s for p, s, kind in pieces if kind in (1, 4)}
    ids = {p: i for i, (p, _, _) in enumerate(pieces)}
    own = sorted((p for p, _, kind in pieces if kind == 4), key=len, reverse=True)
    text, parts = SPACE + text.replace(" ", SPACE) if text else "", []
    while text:
        piece = next((p for p in own if text.startswith(p)), text[0])
        parts.append((piece, piece in own))
        text = text[len(piece):]
    while True:
        found = [(-score[a + b], i) for i, ((a, x), (b, y)) in enumerate(zip(parts, parts[1:]))
                 if not x and not y and a + b in score]
        if not found:
            break
        i = min(found)[1]
        parts[i:i + 2] = [(parts[i][0] + parts[i + 1][0], False)]
    return [i for piece, _ in parts for i in ([ids[piece]] if piece in score else
                                              [3 + byte for byte in piece.encode()])]


class SentencePiece(unittest.TestCase):

    def test_golden(self):
        cases = golden()["sentencepiece"]
        given = [text.encode("latin-1") for text, _ in cases]
        found = Tokenizer(read(tokenizing.MODEL, "llama")).encode(given)
        for text, ids, (_, right) in zip(given, found, cases):
            self.assertEqual(ids, right, text)

    def test_real_vocabulary(self):
        check_vectors(self, "llama2", read(common.shared("data", "llama2", "tokenizer.model"), "llama"))

    def test_definition(self):
        """Random vocabularies, with equal scores, pieces across words and pieces of the user."""
        rng = random.Random(3)
        for turn in range(30):
            made = ["".join(rng.choice("aab\u00e9" + SPACE) for _ in range(rng.randint(1, 5)))
                    for _ in range(rng.randint(5, 60))]
            if turn % 3 == 0:
                made = [text for text in made if SPACE not in text[1:]]
            pieces = with_bytes({text: rng.choice([-1, -2, -3, -rng.random()]) for text in made})
            if turn % 2:
                pieces = [(text, score, 4 if len(text) > 1 and rng.random() < 0.1 and kind == 1 else
                           kind) for text, score, kind in pieces]
            given = ["".join(rng.choice("aaaab\u00e9c  ") for _ in range(rng.randint(0, 30)))
                     for _ in range(100)]
            found = Tokenizer(read(save(protobuf(pieces), "tokenizer.model"), "llama")).encode(given)
            for text, ids in zip(given, found):
                self.assertEqual(ids, reference(pieces, text), (turn, text))

    def test_pieces_of_the_user(self):
        """The longest one wins, they never merge, and they are seen before anything else."""
        own = ["ab", "abab", SPACE + "x", "\u00e9", SPACE + SPACE]
        pieces = with_bytes({text: -i for i, text in enumerate([SPACE, "a", "b", "aa", "bb", "aba"])})
        pieces += [(text, 0, 4) for text in own]
        given = ["ababab", "abaabb", "xx x", "aab\u00e9\u00e9 ", "   x", "ab  ab", "aaabab"]
        tokenizer = Tokenizer(read(save(protobuf(pieces), "tokenizer.model"), "llama"))
        for text, ids in zip(given, tokenizer.encode(given)):
            self.assertEqual(ids, reference(pieces, text), text)

    def test_broken_utf8(self):
        """A byte that starts no valid sequence is U+FFFD by itself."""
        tokenizer = Tokenizer(read(tokenizing.MODEL, "llama"))
        given = [b"a" + data + b"b" + data for data in BROKEN] + texts(4, 200, ["the"], broken=True)
        self.assertEqual(tokenizer.encode(given), tokenizer.encode(map(mended, given)))

    def test_back_to_text(self):
        tokenizer = Tokenizer(read(tokenizing.MODEL, "llama"))
        given = [data for data in texts(5, 400, ["the", " of"]) if "\u2581" not in data.decode()]
        self.assertEqual(tokenizer.decode(tokenizer.encode(given)), given)
        self.assertEqual(tokenizer.decode([[1] + ids for ids in tokenizer.encode(given)]), given)
        ids = tokenizer.encode(["the"])[0]
        self.assertEqual(tokenizer.decode([[2], [0], [3 + 0xFF], [10 ** 6], ids + ids]),
                         [b"", " \u2047 ".encode(), b"\xff", b"", b"the the"])

    def test_other_files_of_the_same_tokenizer(self):
        """tokenizer.json and llama2.c's tokenizer.bin give the ids of tokenizer.model."""
        rng = random.Random(9)
        normal = dict.fromkeys([SPACE] + list(LETTERS))
        normal.update(dict.fromkeys(rng.choice([SPACE, ""]) + "".join(rng.choices("abcde", k=2))
                                    for _ in range(30)))
        normal.update(dict.fromkeys(a + b for a in list(normal)[-20:] for b in list(normal)[-9:]
                                    if SPACE not in b))
        normal = {text: -i for i, text in enumerate(normal)}
        normal.update({SPACE * n: -1e9 for n in (2, 3, 4, 7, 8)})   # as Llama 2 has them
        pieces = with_bytes(normal)
        whole = tokenizing.tokenizer_json(pieces)
        metaspace = dict(whole, normalizer=None, pre_tokenizer={
            "type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False})
        pairs = dict(whole, model=dict(whole["model"], merges=[
            merge.split(" ") for merge in whole["model"]["merges"]]))
        old = b"".join(struct.pack("<fi", score, len(text.encode())) + text.encode()
                       for text, score, _ in ((text.replace(SPACE, " ") if text[1:] != "s>" else
                                               "\n" + text + "\n", score, kind)
                                              for text, score, kind in pieces))
        files = [save(protobuf(pieces), "tokenizer.model"), save(struct.pack("<i", 9) + old,
                                                                 "tokenizer.bin")]
        files += [save(json.dumps(one), "tokenizer.json") for one in (whole, metaspace, pairs)]
        given = texts(8, 300, [text for text, _, _ in pieces[259:]]) + ODD
        given += [" " * n + "a" for n in range(40)]
        found = [Tokenizer(read(path, "llama", len(pieces))).encode(given) for path in files]
        for path, ids in zip(files[1:], found[1:]):
            self.assertEqual(ids, found[0], path)
        for path in files:
            self.assertEqual(read(path, "llama", len(pieces))[2:5], (1, 2, 0), path)

    def test_time(self):
        """A megabyte takes about a second, whatever is in it."""
        tokenizer = Tokenizer(read(tokenizing.MODEL, "llama"))
        check_time(self, tokenizer, [b"a", b" ", b"the ", b"unbelievable", b"\xff", b" a", b"\n"])
        growing = {"a" * i: -i for i in range(1, 60)}
        check_time(self, Tokenizer(read(save(protobuf(with_bytes(growing)), "tokenizer.model"),
                                        "llama")), [b"a"])


class WordPiece(unittest.TestCase):

    def test_golden(self):
        lines = open_lines(tokenizing.VOCABULARY)
        for name, case in golden()["wordpiece"].items():
            lower, strip, cjk = case["settings"]
            path = vocabulary(lines, do_lower_case=lower, strip_accents=strip,
                              tokenize_chinese_chars=cjk)
            found = Tokenizer(read(path, "bert")).encode([text for text, _ in case["texts"]])
            for ids, (text, right) in zip(found, case["texts"]):
                self.assertEqual(ids, right, (name, text))

    def test_real_vocabulary(self):
        check_vectors(self, "bert", read(common.shared("data", "bert", "vocab.txt"), "bert"))

    def test_longest_match(self):
        lines = "[PAD] [UNK] [CLS] [SEP] [MASK] un ##aff ##able una ##ffable ##f ##a ##b x ##x".split()
        tokenizer = Tokenizer(read(vocabulary(lines), "bert"))
        given = ["unaffable", "unaffablex", "unaffably", "x" * 100, "x" * 101, "x\u0301" * 100, "x x",
                 "x[SEP]x", "[sep]", "X", "[CLS]unaf[MASK]", "x\x00x", "x\u200bx", "x\u00a0x"]
        right = [[8, 9], [8, 9, 14], [1], [13] + [14] * 99, [1], [13] + [14] * 99, [13, 13],
                 [13, 3, 13], [1, 1, 1], [13], [2, 8, 10, 4], [13, 14], [13, 14], [13, 13]]
        for text, ids, wanted in zip(given, tokenizer.encode(given), right):
            self.assertEqual(ids, wanted, text)
        self.assertEqual(tokenizer.decode([[2, 8, 9, 13, 3], [9], []]),
                         [b"[CLS] unaffable x [SEP]", b"##ffable", b""])

    def test_tokenizer_json(self):
        """Hugging Face's file gives what vocab.txt gives, and tokens outside the vocabulary."""
        lines = open_lines(tokenizing.VOCABULARY)
        given = [text for text, _ in golden()["wordpiece"]["uncased"]["texts"]]
        for lower in False, True:
            whole = bert_json(lines, lower)
            by_lines = read(vocabulary(lines, do_lower_case=lower), "bert")
            by_json = read(save(json.dumps(whole), "tokenizer.json"), "bert")
            self.assertEqual(by_json, by_lines)
        whole["added_tokens"] += [{"id": len(lines) + i, "content": text, "normalized": False}
                                  for i, text in enumerate(["the<x>", "ofof"])]
        tokenizer = Tokenizer(read(save(json.dumps(whole), "tokenizer.json"), "bert"))
        right = {"athe<x>the<x": ["a", "the<x>", "the", "<", "x"], "The<X>": ["the", "<", "x", ">"],
                 "xofof.": ["x", "ofof", "."], "OFof": ["of", "##o", "##f"]}
        for text, ids in zip(right, tokenizer.encode(right)):
            self.assertEqual([(lines + ["the<x>", "ofof"])[i] for i in ids], right[text])
        self.assertEqual(tokenizer.encode(given), Tokenizer(by_lines).encode(given))

    def test_broken_utf8(self):
        """Broken bytes vanish, as U+FFFD does."""
        tokenizer = Tokenizer(read(vocabulary(open_lines(tokenizing.VOCABULARY)), "bert"))
        whole = tokenizer.encode([b"the of"])[0]
        for data in BROKEN:
            if not data.isascii() and b"\x28" not in data and b"\x96" not in data:
                self.assertEqual(tokenizer.encode([b"t" + data + b"he of" + data])[0], whole, data)

    def test_time(self):
        tokenizer = Tokenizer(read(vocabulary(open_lines(tokenizing.VOCABULARY)), "bert"))
        check_time(self, tokenizer, [b"a", b" ", b"the ", b"a" * 99 + b" ", b"\xff", b"[", b"[SEP]",
                                     "\u0301".encode(), "\U0001D16D\U0001D165".encode()])


class Refusals(unittest.TestCase):

    def refused(self, path, arch, *words, size=1 << 20):
        """Reading the file must raise an error that starts with its path and has these words."""
        with self.assertRaises(tokenizing.export.ExportError) as caught:
            read(path, arch, size)
        message = str(caught.exception)
        self.assertTrue(message.startswith(path + ": "), message)
        self.assertIn("; ", message)
        for word in words:
            self.assertIn(word, message)

    def test_sentencepiece(self):
        pieces = with_bytes({"a": -1, "b": -2, "ab": -3})
        model = lambda *args, **more: save(protobuf(*args, **more), "tokenizer.model")
        read(model(pieces), "llama")
        self.refused(model(pieces), "llama", "262", "261", size=261)
        self.refused(model(pieces), "bert", "tokenizer.json or vocab.txt")
        for word, settings in {
                "model_type": {"trainer": ((3, 1), (35, 1))},
                "byte_fallback": {"trainer": ((3, 2),)},
                "treat_whitespace_as_suffix": {"trainer": ((3, 2), (35, 1), (24, 1))},
                "bos_id": {"trainer": ((3, 2), (35, 1), (41, 262))},
                "add_dummy_prefix": {"normalizer": ((3, 0), (4, 0))},
                "remove_extra_whitespaces": {"normalizer": ((3, 1),)},
                "escape_whitespaces": {"normalizer": ((4, 0), (5, 0))},
                "precompiled_charsmap": {"normalizer": ((4, 0), (2, b"x"))},
                "denormalizer": {"more": field(5, field(2, b"x"))},
                "of another type": {"trainer": ((3, b"2"), (35, 1))}}.items():
            self.refused(model(pieces, **settings), "llama", word)
        for word, more in {"type 5 (unused)": ("c", -4, 5), "type 9": ("c", -4, 9),
                           "piece 262": ("", -4, 1), "same text as piece 259": ("a", -4, 1),
                           "not a number": ("c", float("inf"), 1), "one character": ("c", -4, 3),
                           "1001 characters": ("c" * 1001, -4, 1), "255": ("c" * 256, -4, 4),
                           "2 unknown": ("c", -4, 2)}.items():
            self.refused(model(pieces + [more]), "llama", word)
        self.refused(model(pieces[:40] + pieces[41:]), "llama", "1 of 256 byte tokens")
        self.refused(model([]), "llama", "none found")

    def test_broken_protobuf(self):
        """A cut or damaged file is refused, or it still says something that can be used."""
        whole = protobuf(with_bytes({"a": -1, "b": -2, "ab": -3}))
        for cut in 1, 2, 3:
            self.refused(save(whole[:-cut], "tokenizer.model"), "llama", "broken field")
        rng, refused = random.Random(1), 0
        damaged = [whole[:cut] for cut in range(0, len(whole), 37)]
        for _ in range(300):
            at = rng.randrange(len(whole))
            damaged.append(whole[:at] + bytes([rng.randrange(256)]) + whole[at + 1:])
        for data in damaged + [b"\x0a" + varint(1 << 62), b"\xff" * 40, b"\x0a\xff\xff\xff\xff\x7f"]:
            path = save(data, "tokenizer.model")
            try:
                read(path, "llama")
            except tokenizing.export.ExportError as error:
                refused += str(error).startswith(path)
        self.assertGreater(refused, len(damaged) // 2)

    def test_llama_json(self):
        pieces = with_bytes({"a": 0, "b": -1, "c": -2, "ab": -3, "abc": -4, "bc": -5, SPACE: -6})
        whole = tokenizing.tokenizer_json(pieces)
        model = whole["model"]
        write = lambda **more: save(json.dumps(dict(whole, **more)), "tokenizer.json")
        inside = lambda **more: write(model=dict(model, **more))
        read(write(), "llama")
        levels = {"type": "ByteLevel", "add_prefix_space": False}
        self.refused(write(pre_tokenizer=levels), "llama", "ByteLevel")
        self.refused(write(normalizer=None, pre_tokenizer=levels), "llama", "ByteLevel")
        self.refused(write(normalizer={"type": "NFKC"}), "llama", "NFKC")
        self.refused(inside(byte_fallback=False), "llama", "byte_fallback is false")
        self.refused(inside(ignore_merges=True), "llama", "ignore_merges")
        self.refused(inside(type="Unigram"), "llama", "Unigram")
        self.refused(inside(merges=model["merges"][1:]), "llama", "a + b is missing")
        self.refused(inside(merges=model["merges"] + ["x y"]), "llama", "two tokens into a third")
        self.refused(inside(merges=["a bc", "b c", "a b", "ab c"]), "llama", "stand apart")
        self.refused(inside(merges=["a b c"]), "llama", "not a pair")
        self.refused(inside(merges=[["a", 1]]), "llama", "not a pair")
        self.refused(inside(merges={}), "llama", "not a list")
        for word, vocab in {"0, 1, 2": {"a": 0, "b": 1 << 40}, "so on": {"a": 0, "b": 0}, "1": {},
                            "not a dict": [], "surrogate": {"a": 0, "\ud800": 1}}.items():
            self.refused(write(model=dict(model, vocab=vocab), added_tokens=[]), "llama", word)
        self.refused(write(model=None), "llama", "vocab")
        self.refused(write(added_tokens=[{"id": 266, "content": "zz"}]), "llama", "not special")
        self.refused(write(added_tokens=[{"id": 5}]), "llama", "without id or content")
        self.refused(write(added_tokens=[{"id": 5, "content": "x"}]), "llama", "id 5 is two tokens")
        self.refused(save('{"model": {', "tokenizer.json"), "llama", "broken JSON")
        self.refused(save("[" * 100000, "tokenizer.json"), "llama", "JSON")

    def test_bert(self):
        lines = open_lines(tokenizing.VOCABULARY)
        for word, config in {"do_basic_tokenize": {"do_basic_tokenize": False},
                             "never_split": {"never_split": ["a"]},
                             "strip_accents": {"strip_accents": "yes"},
                             "[UNKNOWN]": {"unk_token": "[UNKNOWN]"},
                             "added token 7": {"added_tokens_decoder": {"7": {"content": "zz"}}},
                             "lstrip": {"added_tokens_decoder": {"4": {"content": "[MASK]",
                                                                       "lstrip": True}}}}.items():
            self.refused(vocabulary(lines, **config), "bert", word)
        self.refused(vocabulary(lines[5:]), "bert", "[UNK]")
        self.refused(vocabulary(lines), "llama", "tokenizer.model")
        self.refused(save(b"[UNK]\n\xff\n", "vocab.txt"), "bert", "byte 6", "UTF-8")
        self.refused(vocabulary(lines), "bert", str(len(lines)), size=len(lines) - 1)
        whole = bert_json(lines, True)
        write = lambda **more: save(json.dumps(dict(whole, **more)), "tokenizer.json")
        self.refused(write(normalizer={"type": "Lowercase"}), "bert", "Lowercase")
        self.refused(write(pre_tokenizer={"type": "Whitespace"}), "bert", "Whitespace")
        self.refused(write(model=dict(whole["model"], max_input_chars_per_word=50)), "bert", "50")
        self.refused(write(model=dict(whole["model"], continuing_subword_prefix="@")), "bert", "@")
        path = write()
        with open(os.path.join(os.path.dirname(path), "tokenizer_config.json"), "w") as f:
            f.write('{"do_lower_case": false}')
        self.refused(path, "bert", "lowercase is True", "False")

    def test_odd_json(self):
        """Whatever stands in place of a value, the file is refused by name, or read."""
        odd = [None, True, -1, 0, 1 << 70, 1.5, 1e300, "", "x", "\ud800", [], {}, [[]], {"a": {}}, ["a"],
               {"content": "\ud800"}, {"type": "Sequence", "normalizers": [1]}]
        pieces = with_bytes({"a": 0, "b": -1, "ab": -2})
        lines = "[PAD] [UNK] [CLS] [SEP] [MASK] a ##b".split()
        config = {"do_lower_case": True, "strip_accents": None, "tokenize_chinese_chars": True,
                  "unk_token": "[UNK]", "mask_token": {"content": "[MASK]"}, "never_split": None,
                  "added_tokens_decoder": {"4": {"content": "[MASK]", "special": True}}}
        sources = [("llama", "tokenizer.json", tokenizing.tokenizer_json(pieces)),
                   ("bert", "tokenizer.json", bert_json(lines, True)),
                   ("bert", "tokenizer_config.json", config)]
        rng, refused = random.Random(2), 0
        for arch, name, whole in sources:
            for _ in range(250):
                path = save(json.dumps(changed(rng, whole, rng.choice(odd))), name)
                if name != "tokenizer.json":
                    path = os.path.join(os.path.dirname(path), "vocab.txt")
                    with open(path, "w") as f:
                        f.write("\n".join(lines))
                try:
                    read(path, arch)
                except tokenizing.export.ExportError as error:
                    refused += 1
                    self.assertTrue(str(error).startswith(os.path.dirname(path)), error)
        self.assertGreater(refused, 200)

    def test_llama2c(self):
        pieces = with_bytes({SPACE: -1, "a": -2})
        data = struct.pack("<i", 7) + b"".join(struct.pack("<fi", score, len(text.encode()))
                                               + text.encode() for text, score, _ in pieces)
        read(save(data, "tokenizer.bin"), "llama", len(pieces))
        self.refused(save(data, "tokenizer.bin"), "llama", "261 tokens", size=262)
        for cut in range(1, 30):
            self.refused(save(data[:-cut], "tokenizer.bin"), "llama", size=len(pieces))
        self.refused(save(data + struct.pack("<fi", 0, -1), "tokenizer.bin"), "llama", "token 261")
        self.refused(save(data + struct.pack("<fi", 0, 1 << 30), "tokenizer.bin"), "llama", "ends")

    def test_sections(self):
        """A section cut anywhere is refused in one line; one with any byte changed is too, or works."""
        lines = "[PAD] [UNK] [CLS] [SEP] [MASK] a ##b".split()
        some = {tokenizing.SENTENCEPIECE: read(save(protobuf(with_bytes({"a": -1, "b": -2, "ab": -3})),
                                                    "tokenizer.model"), "llama"),
                tokenizing.WORDPIECE: read(vocabulary(lines, do_lower_case=False), "bert")}
        for kind, whole in some.items():
            rng, size = random.Random(kind), len(whole.section)
            changed = []
            for cut in [0, 1, 3, 4, 15, 16, 17, size - 1, size - 4] + rng.sample(range(size), 20):
                changed.append((True, whole.section[:cut]))
            changed.append((True, whole.section + b"\0"))
            for _ in range(120):
                at = rng.randrange(min(size, 150) if rng.random() < 0.5 else size)
                value = bytes([rng.choice([0, 1, 127, 128, 255, whole.section[at] ^ 1])])
                changed.append((False, whole.section[:at] + value + whole.section[at + 1:]))
            for must, section in changed:
                tokenizer = Tokenizer(whole._replace(section=section))
                try:
                    tokenizer.encode(ODD)
                    self.assertFalse(must, len(section))
                except AssertionError as error:
                    self.assertRegex(str(error), r"^tokenize: status 1: painters: [^\n]*section: "
                                     r"tokenizer[^\n]*; [^\n]*\n$")


def changed(rng, value, odd):
    """A copy of a JSON value with one random part of it replaced."""
    if not value or not isinstance(value, (dict, list)) or rng.random() < 0.1:
        return odd
    if isinstance(value, list):
        i = rng.randrange(len(value))
        return value[:i] + [changed(rng, value[i], odd)] + value[i + 1:]
    key = rng.choice(sorted(value))
    if rng.random() < 0.1:
        return {(odd if isinstance(odd, str) and k == key else k): v for k, v in value.items()}
    return dict(value, **{key: changed(rng, value[key], odd)})


# Used above ---------------------------------------------------------------------------------------

def mended(data):
    """Valid UTF-8, with U+FFFD for every byte that starts no valid sequence."""
    out, at = "", 0
    while at < len(data):
        for size in 1, 2, 3, 4:
            try:
                out += data[at:at + size].decode()
                break
            except UnicodeDecodeError:
                pass
        else:
            out, size = out + "\ufffd", 1
        at += size
    return out


def open_lines(path):
    with open(path, encoding="utf-8", newline="\n") as f:
        return f.read().split("\n")[:-1]


def bert_json(lines, lower):
    """Hugging Face's tokenizer.json over the lines of a vocab.txt."""
    special = [{"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False, "special": True} for i, text in enumerate(lines[:5])]
    return {"added_tokens": special, "normalizer": {
        "type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
        "strip_accents": None, "lowercase": lower}, "pre_tokenizer": {"type": "BertPreTokenizer"},
            "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                      "max_input_chars_per_word": 100,
                      "vocab": {text: i for i, text in enumerate(lines)}}}


def check_vectors(test, name, tokenizer):
    """llama.cpp's test cases for a real vocabulary."""
    with open(common.shared("data", name, "vectors.inp"), "rb") as f:
        given = f.read().split(b"\n__ggml_vocab_test__\n")
    with open(common.shared("data", name, "vectors.out"), encoding="ascii") as f:
        right = [list(map(int, line.split())) for line in f.read().split("\n")]
    test.assertGreater(len(given), 40)
    for text, ids, wanted in zip(given, Tokenizer(tokenizer).encode(given), right):
        test.assertEqual(ids, wanted, text)


def check_time(test, tokenizer, units):
    """A megabyte of each unit in at most 3 seconds (what is meant is one; machines differ)."""
    for unit in units:
        spent, count = tokenizer.seconds(unit * (1000000 // len(unit)))
        test.assertLess(spent, 3, unit)
        test.assertGreaterEqual(count, 0)


if __name__ == "__main__":
    unittest.main()
