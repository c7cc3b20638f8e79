"""Both tokenizers against sentencepiece and Hugging Face's tokenizers, live, and their speed.

    python3 tests/oracle_tokenizer.py [--count N] [--seed S]   compare N generated texts each (100000)
    python3 tests/oracle_tokenizer.py --speed [MEGABYTES]      MB/s of both sides, one thread (10)
    python3 tests/oracle_tokenizer.py --write                  write the files of tests/golden

Needs sentencepiece and tokenizers. Uses the real vocabularies of ../shared where they are, and small
ones. For WordPiece a vocabulary of single characters makes every effect of cleaning visible; texts
have only code points that both sides assign (how many that leaves out is printed).
"""
import argparse
import io
import json
import os
import random
import sys
import time
import unicodedata
import unittest

os.environ["RAYON_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
import sentencepiece
import tokenizers
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

import common
import tokenizing
from texts import WORDS, texts

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CLEANING = {"uncased": (True, None, True), "cased": (False, None, True),    # lower, strip, CJK
            "lower-cased with accents": (True, False, True),
            "cased without accents, CJK in words": (False, True, False)}
EDGES = [0x3400, 0x4DB5, 0x4E00, 0x9FD5, 0xF900, 0xFAD9, 0x20000, 0x2A6D6, 0x2A700, 0x2B734, 0x2B740,
         0x2B81D, 0x2B820, 0x2B91F, 0x2B920, 0x2CEA1, 0x2F800, 0x2FA1D, 0x3007, 0x3105, 0xAC00, 0xD7A3]
EDGES = ["a%sb" % chr(code) for code in EDGES]      # of what is taken for CJK
CATEGORY_CHANGES = ["a\u166db", "a\u1734b", "a\u1885b\u1886", "a\ua9bdb", "a\U000111c9b",
                    "a\u034f\u302e\U0001D16D\u302e", "\u302e\u0301\U0001D165\ua953"]


# The other side -----------------------------------------------------------------------------------

def hugging_face_bert(lines, lower=True, strip=None, cjk=True):
    """Hugging Face's BERT tokenizer over the lines of a vocab.txt."""
    ids = {text: i for i, text in enumerate(lines)}
    bert = tokenizers.Tokenizer(tokenizers.models.WordPiece(
        ids, unk_token="[UNK]", max_input_chars_per_word=100))
    bert.normalizer = BertNormalizer(True, cjk, strip, lower)
    bert.pre_tokenizer = BertPreTokenizer()
    bert.add_special_tokens(SPECIAL)
    return bert


def our_bert(lines, lower=True, strip=None, cjk=True):
    path = tokenizing.vocabulary(lines, do_lower_case=lower, strip_accents=strip,
                                 tokenize_chinese_chars=cjk)
    return tokenizing.Tokenizer(tokenizing.read(path, "bert"))


def foreign_code_points():
    """Code points that only one side assigns. Python says so of its own (Cn). Hugging Face's tables
    are of Unicode 8: it takes for a letter what Python knows as a mark, a format character,
    punctuation, or a character that decomposes or is reordered."""
    clean, strip = BertNormalizer(True, False, False, False), BertNormalizer(False, False, True, False)
    cut, found = BertPreTokenizer(), set()
    last = "\U0001D16D"     # the mark of the highest class that stays: all others go before it
    for code in range(0x110000):
        c = chr(code)
        kind, order = unicodedata.category(c), unicodedata.combining(c)
        if kind in ("Cn", "Cs"):
            found.add(code)
        elif kind == "Cf":
            found.update([code] * (clean.normalize_str(c) == c))
        elif kind == "Mn" or unicodedata.normalize("NFD", c) != c:
            found.update([code] * (strip.normalize_str(c) == c))
        elif kind[0] == "P":
            found.update([code] * (cut.pre_tokenize_str("a" + c)[0][0] != "a"))
        elif order and c != last:
            found.update([code] * (strip.normalize_str(last + c)[0] == last))
    return found


# Comparisons --------------------------------------------------------------------------------------

def compare(name, given, ours, theirs):
    """Prints how many texts differ, and the first few; returns that number."""
    wrong = [i for i in range(len(given)) if list(ours[i]) != list(theirs[i])]
    print("%-52s %7d texts %9d tokens or bytes %d different" % (
        name, len(given), sum(map(len, theirs)), len(wrong)), flush=True)
    for i in wrong[:3]:
        print("  %r\n    ours   %.400s\n    theirs %.400s" % (given[i], ours[i], theirs[i]))
    return len(wrong)


def small_models():
    """{name: bytes of a SentencePiece model}: the golden one, one whose pieces span words, one with
    pieces of the user's own."""
    with open(tokenizing.MODEL, "rb") as f:
        models = {"the small model": f.read()}
    models["pieces across words"] = train(500, split_by_whitespace=False)
    models["pieces of the user"] = train(420, user_defined_symbols=[
        "ab", "abab", "the", "\u2581of", "<sep>", "\u2581\u2581", "a\u2581b", "\u00e9", "\u4e2d\u6587"])
    return models


def train(size, **more):
    """A SentencePiece model with Llama's settings."""
    rng, model = random.Random(size), io.BytesIO()
    lines = [" ".join(rng.choice(WORDS) for _ in range(12)) for _ in range(2000)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=size, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        character_coverage=0.99, split_digits=True, minloglevel=2, max_sentencepiece_length=12, **more)
    return model.getvalue()


def compare_sentencepiece(name, model, count, seed):
    """Ids, and text from ids, of one model."""
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
    ours = tokenizing.Tokenizer(tokenizing.read(tokenizing.save(model, "tokenizer.model"), "llama"))
    pieces = [theirs.id_to_piece(i).replace(tokenizing.SPACE, " ")
              for i in range(3, theirs.get_piece_size())]
    given = texts(seed, count, pieces, broken=True)
    found = ours.encode(given)
    wrong = compare(name, given, found, theirs.encode(given, num_threads=1))
    whole = [i for i in range(count) if given[i].isascii() or is_utf8(given[i])]
    lists, expected = [found[i] for i in whole], [theirs.decode(found[i]).encode() for i in whole]
    return wrong + compare(name + ", back to text", lists, ours.decode(lists), expected)


def is_utf8(data):
    try:
        return bool(data.decode()) or True
    except UnicodeDecodeError:
        return False


def compare_wordpiece(count, seed, foreign):
    """The real vocabulary, then one of all single characters under every kind of cleaning."""
    wrong, known = 0, [c for c in range(0x110000) if c not in foreign]
    keep = lambda data: "".join(c for c in data.decode() if ord(c) not in foreign)
    try:
        with open(common.shared("data", "bert", "vocab.txt"), encoding="utf-8") as f:
            lines = f.read().split("\n")[:-1]
        given = [keep(data) for data in texts(seed, count, lines)]
        theirs = hugging_face_bert(lines)
        wrong += compare("bert-base-uncased", given, our_bert(lines).encode(given),
                         [theirs.encode(text, add_special_tokens=False).ids for text in given])
    except unittest.SkipTest as missing:
        print(missing)
    letters = [chr(c) for c in known]
    lines = SPECIAL + letters + ["##" + c for c in letters]
    lines = [line for line in lines if line not in ("\r", "\n", "##\r", "##\n")]
    for name, settings in CLEANING.items():
        ours, theirs = our_bert(lines, *settings), hugging_face_bert(lines, *settings)
        singles = ["a%sb%s" % (c, c) for c in letters]
        some = [keep(data) for data in texts(seed, count, ["ab", "\u0130", "A\u030a", "##x"])]
        for what, given in ("every code point", singles), ("generated", some):
            expected = [theirs.encode(text, add_special_tokens=False).ids for text in given]
            wrong += compare("%s, %s" % (name, what), given, ours.encode(given), expected)
    return wrong


def compare_all(count, seed):
    foreign = foreign_code_points()
    ours = sum(unicodedata.category(chr(c)) not in ("Cn", "Cs") for c in foreign)
    print("Unicode %s here; %d code points known here but not to Hugging Face are left out" % (
        unicodedata.unidata_version, ours))
    wrong = 0
    try:
        with open(common.shared("data", "llama2", "tokenizer.model"), "rb") as f:
            wrong += compare_sentencepiece("Llama 2", f.read(), count, seed)
    except unittest.SkipTest as missing:
        print(missing)
    for name, model in small_models().items():
        wrong += compare_sentencepiece(name, model, count, seed + 1)
    return wrong + compare_wordpiece(count, seed + 2, foreign)


# Speed --------------------------------------------------------------------------------------------

def document(rng, megabytes, mixed):
    """Lines of words with a natural spread of frequencies; mixed: all scripts of WORDS, else ASCII."""
    words = [word for word in WORDS if mixed or word.isascii()]
    weights = [1 / (i + 2) ** 0.5 for i in range(len(words))]
    lines, size = [], 0
    while size < megabytes * 1e6:
        picked = rng.choices(words, weights, k=rng.randint(20, 160))
        picked = [word + rng.choice(",.;!?") if rng.random() < 0.12 else
                  word.capitalize() if rng.random() < 0.1 else word for word in picked]
        lines.append(" ".join(picked))
        size += len(lines[-1].encode()) + 1
    return lines


def llama_side():
    model = common.shared("data", "llama2", "tokenizer.model")
    read = sentencepiece.SentencePieceProcessor(model_file=model)
    pieces = [(read.id_to_piece(i), read.get_score(i), 2 if read.is_unknown(i) else
               3 if read.is_control(i) else 6 if read.is_byte(i) else 1)
              for i in range(read.get_piece_size())]
    theirs = tokenizers.Tokenizer.from_str(json.dumps(tokenizing.tokenizer_json(pieces)))
    return tokenizing.Tokenizer(tokenizing.read(model, "llama")), theirs


def bert_side():
    with open(common.shared("data", "bert", "vocab.txt"), encoding="utf-8") as f:
        lines = f.read().split("\n")[:-1]
    return our_bert(lines), hugging_face_bert(lines)


def speed(megabytes):
    """MB/s of both sides on one thread: ours on the whole text at once, theirs on its lines (the
    faster way for it) and by whichever of its calls is faster. Three turns, side by side."""
    print("%-10s %-8s %10s %10s %8s" % ("tokenizer", "text", "ours MB/s", "HF MB/s", "ratio"))
    for name, side in ("Llama 2", llama_side), ("BERT", bert_side):
        ours, theirs = side()
        calls = [getattr(theirs, call) for call in ("encode_batch", "encode_batch_fast")
                 if hasattr(theirs, call)]
        for kind in "ASCII", "mixed":
            lines = document(random.Random(5), megabytes, kind == "mixed")
            text = "\n".join(lines).encode()
            found = []
            for _ in range(3):
                best = 1e9
                for call in calls:
                    start = time.process_time()
                    call(lines, add_special_tokens=False)
                    best = min(best, time.process_time() - start)
                found.append((best / ours.seconds(text)[0], best))
            ratio, slow = sorted(found)[1]
            print("%-10s %-8s %10.1f %10.1f %8.1f" % (
                name, kind, len(text) / slow * ratio / 1e6, len(text) / slow / 1e6, ratio), flush=True)


# Goldens ------------------------------------------------------------------------------------------

def write_goldens():
    """The small model and vocabulary, and what both oracles make of some texts."""
    small = train(400)
    with open(tokenizing.MODEL, "wb") as f:
        f.write(small)
    model = sentencepiece.SentencePieceProcessor(model_file=tokenizing.MODEL)
    pieces = [model.id_to_piece(i).replace(tokenizing.SPACE, " ") for i in range(260, 400)]
    given = [data for data in texts(11, 900, pieces, broken=True) if len(data) < 90][:160]
    golden = {"sentencepiece": [[data.decode("latin-1"), model.encode(data)] for data in given]}
    foreign = foreign_code_points()
    given = ["".join(c for c in data.decode() if ord(c) not in foreign)
             for data in texts(12, 900, WORDS) if len(data) < 90][:160]
    given += CATEGORY_CHANGES + EDGES
    seen = []
    for settings in CLEANING.values():
        lower, strip, cjk = settings
        clean = BertNormalizer(True, cjk, strip, lower)
        seen += [c for text in given for c in clean.normalize_str(text) if not c.isspace()]
    lines = SPECIAL + sorted(set(seen)) + ["##" + c for c in sorted(set(seen))]
    lines += sorted({word for word in WORDS[:80] if word.isalpha()}) + ["##ing", "##tion", "##able"]
    lines = list(dict.fromkeys(lines))
    with open(tokenizing.VOCABULARY, "w", encoding="utf-8", newline="\n") as f:
        f.write("\n".join(lines) + "\n")
    golden["wordpiece"] = {}
    for name, settings in CLEANING.items():
        theirs = hugging_face_bert(lines, *settings)
        golden["wordpiece"][name] = {"settings": settings, "texts": [
            [text, theirs.encode(text, add_special_tokens=False).ids] for text in given]}
    with open(os.path.join(tokenizing.GOLDEN, "tokenizer.json"), "w", encoding="ascii") as f:
        f.write(json.dumps(golden, separators=(",", ":")).replace("],[", "],\n[") + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--count", type=int, default=100000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--speed", type=float, nargs="?", const=10)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    if args.write:
        write_goldens()
    elif args.speed:
        speed(args.speed)
    else:
        sys.exit(1 if compare_all(args.count, args.seed) else 0)


if __name__ == "__main__":
    main()
