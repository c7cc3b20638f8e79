"""Texts that try a tokenizer: scripts of the world, marks, emoji, controls, spaces, broken UTF-8.

`texts(seed, count, pieces)` gives the same list on every machine (as bytes); `pieces` are strings of
the vocabulary, mixed in so that merges and long matches happen.
"""
import random

WORDS = ("the of and to in is you that it he was for on are as with his they I at be this have from "
         "or one had by word but not what all were we when your can said there use an each which she "
         "do how their if will up other about out many then them these so some her would make like "
         "him into time has look two more write go see number no way could people my than first "
         "water been call who oil its now find long down day did get come made may part naive "
         "unbelievable electroencephalograph internationalisation antidisestablishmentarianism "
         "na\u00efve caf\u00e9 \u00dcberma\u00df stra\u00dfe \u0130stanbul \u0131rmak Cr\u00e8me "
         "br\u00fbl\u00e9e \u041f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440 "
         "\u0395\u03bb\u03bb\u03ac\u03b4\u03b1 \u03a3\u039f\u03a6\u039f\u03a3 \u4e2d\u6587 "
         "\u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4 \u0639\u0631\u0628\u064a "
         "\u0939\u093f\u0928\u094d\u0926\u0940 \u0e44\u0e17\u0e22 \u05e2\u05d1\u05e8\u05d9\u05ea "
         "Vi\u1ec7t ti\u1ebfng don't I'm we'll 3.14 1,000 $5 50% e.g. U.S.A.").split()
SCRIPTS = [(0x41, 0x5A), (0x61, 0x7A), (0xC0, 0x24F), (0x250, 0x2FF), (0x370, 0x3FF),
           (0x400, 0x52F), (0x531, 0x587), (0x5D0, 0x5EA), (0x620, 0x6D3), (0x710, 0x72F),
           (0x780, 0x7B1), (0x900, 0x97F), (0x980, 0x9FB), (0xA01, 0xA75), (0xA81, 0xAF1),
           (0xB01, 0xB77), (0xB82, 0xBFA), (0xC00, 0xC7F), (0xC81, 0xCF2), (0xD01, 0xD7F),
           (0xD82, 0xDF4), (0xE01, 0xE5B), (0xE81, 0xEDF), (0xF00, 0xFDA), (0x1000, 0x109F),
           (0x10A0, 0x10FF), (0x1100, 0x11FF), (0x1200, 0x139F), (0x13A0, 0x13FD),
           (0x1401, 0x167F), (0x1680, 0x16F0), (0x1700, 0x1773), (0x1780, 0x17F9),
           (0x1800, 0x18AA), (0x1900, 0x19DF), (0x1A00, 0x1AAD), (0x1B00, 0x1B7C),
           (0x1B80, 0x1BFF), (0x1C00, 0x1C7F), (0x1CD0, 0x1CF6), (0x1D00, 0x1DBF),
           (0x1E00, 0x1EFF), (0x1F00, 0x1FFE), (0x2070, 0x218B), (0x2460, 0x24FF),
           (0x2C00, 0x2CFF), (0x2D00, 0x2DFF), (0x3041, 0x30FF), (0x3105, 0x318E),
           (0x3200, 0x33FF), (0x3400, 0x4DB5), (0x4E00, 0x9FD5), (0xA000, 0xA4C6),
           (0xA4D0, 0xA62B), (0xA640, 0xA7AD), (0xA800, 0xA8FD), (0xA900, 0xA9FE),
           (0xAA00, 0xAAF6), (0xAB01, 0xABF9), (0xAC00, 0xD7A3), (0xD7B0, 0xD7FB),
           (0xF900, 0xFAD9), (0xFB00, 0xFBC1), (0xFBD3, 0xFDFD), (0xFE30, 0xFEFC),
           (0xFF01, 0xFFEE), (0x10000, 0x100FA), (0x10280, 0x1031F), (0x10330, 0x1044F),
           (0x10450, 0x104A9), (0x10800, 0x1085F), (0x10A00, 0x10A58), (0x11000, 0x1106F),
           (0x11080, 0x110C1), (0x11100, 0x11143), (0x11180, 0x111F4), (0x12000, 0x12399),
           (0x13000, 0x1342E), (0x16800, 0x16A38), (0x1D100, 0x1D1DD), (0x1D400, 0x1D7FF),
           (0x20000, 0x2A6D6), (0x2A700, 0x2B81D), (0x2B820, 0x2CEA1), (0x2F800, 0x2FA1D)]
MARKS = [(0x300, 0x36F), (0x483, 0x489), (0x591, 0x5BD), (0x610, 0x61A), (0x64B, 0x65F),
         (0x93C, 0x94D), (0xDCA, 0xDDF), (0xE31, 0xE3A), (0xE47, 0xE4E), (0xF71, 0xF84),
         (0x135D, 0x135F), (0x1B34, 0x1B44), (0x1BAA, 0x1BAB), (0x1BF2, 0x1BF3),
         (0x1DC0, 0x1DE6), (0x20D0, 0x20F0), (0x302A, 0x302F), (0x3099, 0x309A),
         (0xA953, 0xA953), (0xA9C0, 0xA9C0), (0xFE00, 0xFE0F), (0xFE20, 0xFE26),
         (0x111C0, 0x111C0), (0x11235, 0x11235), (0x116B6, 0x116B6), (0x1D165, 0x1D172)]
CONTROLS = [(0, 0x1F), (0x7F, 0x9F), (0xAD, 0xAD), (0x34F, 0x34F), (0x61C, 0x61C),
            (0x180B, 0x180E), (0x200B, 0x200F), (0x2028, 0x202E), (0x2060, 0x2064),
            (0xFEFF, 0xFEFF), (0xFFF9, 0xFFFD), (0xE000, 0xE010), (0xE0001, 0xE0001),
            (0xE0020, 0xE007F), (0xF0000, 0xF0003), (0x10FFF0, 0x10FFFD)]
SPACES = ["\t", "\n", "\r", "\r\n", "\v", "\f", "\x85", "\xa0", "\u1680", "\u2000", "\u2009",
          "\u2028", "\u2029", "\u202f", "\u205f", "\u3000", "  ", "    ", "\n\n", "\u2581"]
MARKUP = ["[CLS]", "[SEP]", "[MASK]", "[PAD]", "[UNK]", "[mask]", "[Mask]", "[MASK", "MASK]", "[[SEP]]",
          "[CLS][SEP]", "[ MASK ]", "##", "##ing", "[unused1]", "<s>", "</s>", "<unk>", "<0x0A>",
          "<0x41>", "\u2581\u2581", "<s", "[U\u0301NK]"]
EMOJI = ["\U0001F600", "\U0001F468\u200d\U0001F469\u200d\U0001F467", "\U0001F44D\U0001F3FD",
         "\u2764\ufe0f", "\U0001F1E9\U0001F1EA", "\u2603", "1\ufe0f\u20e3", "\U0001F636\u200d\U0001F32B",
         "\U0001F999", "\u2705", "\U0001F3F4\U000E0067\U000E0062\U000E007F"]
BROKEN = [b"\x80", b"\xbf", b"\xc0\x80", b"\xc1\xbf", b"\xc3", b"\xe2\x82", b"\xe2\x28\xa1",
          b"\xed\xa0\x80", b"\xed\xbf\xbf", b"\xe0\x80\xaf", b"\xf0\x9f\x98", b"\xf0\x80\x80\x80",
          b"\xf4\x90\x80\x80", b"\xf5\x80\x80\x80", b"\xf8\x88\x80\x80\x80", b"\xfe", b"\xff",
          b"\xff\xff\xff", b"\xe2\x96\x81\x80", b"\xf0", b"\xef\xbf\xbd\xef\xbf"]


def one(rng, pair):
    """A random character of a range."""
    code = rng.randint(*pair)
    return chr(code) if not 0xD800 <= code < 0xE000 else "\uFFFD"


def run(rng, ranges, most):
    """A run of characters of one range."""
    pair = rng.choice(ranges)
    return "".join(one(rng, pair) for _ in range(rng.randint(1, most)))


def marked(rng):
    """A letter with marks on it, in any order, or a character that decomposes."""
    base = rng.choice(["a", "E", "o\u031b", "\u1e69", "\u01d6", "\u0130", "=", "\u2260", "\uac01",
                       "\u1100\u1161", "\u304b", "\U0001D15E", "\U0001D1C0", "\u0b4b", "\u0ddd",
                       "\u212b", "\u1f82", "\ufb2c", "", " "])
    return base + "".join(one(rng, rng.choice(MARKS)) for _ in range(rng.randint(1, 6)))


def atom(rng, pieces):
    """A bit of text."""
    kind = rng.randrange(20)
    if kind < 5:
        word = rng.choice(WORDS)
        return rng.choice([word, word, word, word.capitalize(), word.upper(), word + ","])
    if kind < 8:
        return "".join(rng.choice(pieces) for _ in range(rng.randint(1, 4)))
    if kind < 11:
        return run(rng, SCRIPTS, 8)
    if kind == 11:
        return "".join(marked(rng) for _ in range(rng.randint(1, 3)))
    if kind == 12:
        return rng.choice(EMOJI)
    if kind == 13:
        return run(rng, CONTROLS, 2)
    if kind == 14:
        return rng.choice(SPACES)
    if kind == 15:
        return rng.choice(MARKUP)
    if kind == 16:
        return run(rng, [(0x21, 0x2F), (0x3A, 0x40), (0x5B, 0x60), (0x7B, 0x7E), (0xA1, 0xBF),
                         (0x2010, 0x205E), (0x3001, 0x303F)], 4)
    if kind == 17:
        return str(rng.randrange(10 ** rng.randint(1, 12)))
    if kind == 18 and rng.random() < 0.5:
        return one(rng, (0, 0x10FFFF))
    if kind == 19 and rng.random() < 0.1:
        unit = rng.choice(["a", "ab", "\u00e9", "A\u0301", "\u4e2d", "  ", "\u0915\u094d", "\uac01",
                           rng.choice(pieces)])
        return unit * rng.choice([49, 50, 51, 98, 99, 100, 101, 102, 300, 1500])
    return " "


def texts(seed, count, pieces, broken=False):
    """`count` texts as bytes; with `broken`, a quarter of them are not UTF-8."""
    rng, made = random.Random(seed), [b""]
    while len(made) < count:
        glue = rng.choice(["", " ", " ", "  "])
        text = glue.join(atom(rng, pieces) for _ in range(rng.choice([1, 2, 3, 5, 8, 13, 25])))
        data = text.encode()
        if broken and rng.random() < 0.25:
            for _ in range(rng.randint(1, 4)):
                at = rng.randint(0, len(data))
                cut = rng.choice([0, 0, 1, 2])
                data = data[:at] + rng.choice(BROKEN) + data[at + cut:]
        made.append(data)
    return made
