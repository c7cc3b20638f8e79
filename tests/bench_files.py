"""What the benchmarks run on, made here: checkpoints of random weights, vocabularies, text, items.

Real vocabularies and HellaSwag items are used where ../shared/data has them; otherwise the same is
made of random words. Shapes and tensors are those of models.py.
"""
import array
import itertools
import json
import os
import random
import struct

WAIT_POLICY = os.environ.get("OMP_WAIT_POLICY")
import common  # noqa: E402
import modelfile  # noqa: E402
import models  # noqa: E402


def as_users_do():
    """An optimised build, and no OMP_WAIT_POLICY, which common.py sets for tests."""
    os.environ.setdefault("CFLAGS", "-std=gnu11 -O3 -fopenmp")
    if not WAIT_POLICY:
        os.environ.pop("OMP_WAIT_POLICY", None)


def _llama(*sizes, length=4096):
    return dict(models._llama(1, *sizes, False, "F32", 10000.0, 1e-5, length), vocab=32000)


def _bert(*sizes):
    return dict(models._bert(2, *sizes, "F32", 0, length=512), vocab=30522)


SHAPES = {  # dim, hidden, layers, heads (and of a Llama, key/value heads and their size)
    "llama": _llama(2048, 5632, 22, 32, 4, 64), "quick llama": _llama(256, 704, 4, 4, 1, 64),
    "bert": _bert(1024, 4096, 24, 16), "quick bert": _bert(256, 1024, 4, 4),
    "tiny llama": _llama(32, 32, 1, 1, 1, 32), "tiny bert": _bert(32, 32, 1, 1),
    "seven": _llama(4096, 11008, 32, 32, 32, 128),
    "stories": dict(_llama(64, 172, 5, 8, 4, 8, length=512), vocab=512, tied=True)}

# Of each type of weights: safetensors' name, GGUF's number, bytes.
TYPES = {"f32": ("F32", 0, 4), "f16": ("F16", 1, 2), "bf16": ("BF16", 30, 2), "q8": (None, 8, 0)}
GGUF_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
              "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
              "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
              "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
              "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
              "model.layers": "blk"}
OUR_NAMES = {"blk": "layers", "attn_q": "q", "attn_k": "k", "attn_v": "v", "attn_output": "o",
             "ffn_gate": "gate", "ffn_up": "up", "ffn_down": "down", "token_embd": "embed",
             "output_norm": "norm", "output": "head"}       # of GGUF's


# Checkpoints --------------------------------------------------------------------------------------

def weights(kind):
    """About a megabyte of random weights, as stored; tensors repeat it."""
    rng = random.Random(1)
    if kind == "q8":                # blocks of 32: a scale in float16, then the bytes
        return b"".join(struct.pack("<e", 1e-4) + rng.randbytes(32) for _ in range(7919))
    return models.pack([rng.gauss(0, 0.02) for _ in range(250007)], TYPES[kind][0])


def fill(out, block, count):
    while count:
        count -= out.write(block[:min(count, len(block))])


def tensors(shape):
    """[(Hugging Face's name, sizes)]"""
    found = []

    def add(name, sizes, *_):
        found.append((name, sizes))
    make = models._llama_tensors if shape["arch"] == "llama" else models._bert_tensors
    make(shape, add, lambda name, rows, columns, _: add(name, (rows, columns)))
    return found


def is_norm(name):
    return "norm" in name.lower() and name.endswith("weight")


def write_checkpoint(folder, shape_name, kind="f32"):
    """A Hugging Face folder with two shards, as large models have, and a tokenizer."""
    os.makedirs(folder)
    dtype, _, width = TYPES[kind]
    shape = models.MODELS[shape_name] = dict(SHAPES[shape_name], dtype=dtype)
    whole, index, block = tensors(shape), {}, weights(kind)
    one = models.pack([1.0], dtype)
    for shard, part in enumerate((whole[:len(whole) // 2], whole[len(whole) // 2:])):
        name, header, at = "model-%05d-of-00002.safetensors" % (shard + 1), {}, 0
        for tensor, sizes in part:
            size = width * sizes[0] * (sizes[1] if len(sizes) > 1 else 1)
            header[tensor] = {"dtype": dtype, "shape": sizes, "data_offsets": [at, at + size]}
            index[tensor], at = name, at + size
        text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
        with open(os.path.join(folder, name), "wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for tensor, _ in part:
                first, end = header[tensor]["data_offsets"]
                fill(out, one * 4096 if is_norm(tensor) else block, end - first)
    for name, value in (("config.json", models.config(shape_name)),
                        ("model.safetensors.index.json", {"metadata": {}, "weight_map": index})):
        with open(os.path.join(folder, name), "w", encoding="utf-8") as out:
            json.dump(value, out)
    name, data = tokenizer(shape["arch"])
    with open(os.path.join(folder, name), "wb") as out:
        out.write(data)


def q8_blocks(name, tensor, shape):
    """Our 8-bit weights as Q8_0's blocks, q and k in the order that llama.cpp's rotation wants."""
    count = tensor.shape[0] * tensor.shape[1]
    parts = [tensor.data[:count], tensor.data[-count // 16:]]
    if name.endswith((".q", ".k")):
        heads = shape["heads" if name.endswith("q") else "kv"]
        parts = [models._interleave(part, heads, shape["head_dim"], 1) for part in parts]
    weight, scale = parts
    out = bytearray(count // 32 * 34)
    out[0::34], out[1::34] = scale[0::2], scale[1::2]
    for i in range(32):
        out[2 + i::34] = weight[i::32]
    return bytes(out)


def write_gguf(path, shape_name, kind, source=None):
    """llama.cpp's file of the same shape, without a vocabulary; with the weights of `source`, our
    own 8-bit file, or random ones."""
    shape = SHAPES[shape_name]
    ours = modelfile.read(source)["tensors"] if source else {}

    def text(s):
        return struct.pack("<Q", len(s)) + s.encode()

    keys = {"context_length": shape["length"], "embedding_length": shape["dim"],
            "block_count": shape["layers"], "feed_forward_length": shape["hidden"],
            "vocab_size": shape["vocab"], "rope.dimension_count": shape["head_dim"],
            "attention.head_count": shape["heads"], "attention.head_count_kv": shape["kv"]}
    meta = [text("general.architecture") + struct.pack("<I", 8) + text("llama"),
            text("tokenizer.ggml.model") + struct.pack("<I", 8) + text("no_vocab"),
            text("llama.attention.layer_norm_rms_epsilon") + struct.pack("<If", 6, shape["eps"])]
    meta += [text("llama." + key) + struct.pack("<II", 4, value) for key, value in keys.items()]
    _, number, width = TYPES[kind]
    rows, info, at, places = tensors(shape), b"", 0, []
    block, ones = weights(kind), array.array("f", [1.0] * shape["dim"]).tobytes()
    for name, sizes in rows:
        for old, new in GGUF_NAMES.items():
            name = name.replace(old, new)
        count = sizes[0] * 4 if len(sizes) == 1 else sizes[0] * sizes[1] * width
        if kind == "q8" and len(sizes) > 1:
            count = sizes[0] * sizes[1] // 32 * 34
        info += text(name) + struct.pack("<I%dQIQ" % len(sizes), len(sizes), *reversed(sizes),
                                         number if len(sizes) > 1 else 0, at)
        own = ".".join(OUR_NAMES.get(part, part) for part in name.split(".")[:-1])
        data = block if len(sizes) > 1 else ones
        if ours:
            data = ours[own].data if len(sizes) == 1 else q8_blocks(own, ours[own], shape)
        places.append((at, count, data))
        at += -(-count // 32) * 32
    head = b"GGUF" + struct.pack("<IQQ", 3, len(rows), len(meta)) + b"".join(meta) + info
    head += bytes(-len(head) % 32)
    with open(path, "wb") as out:
        out.write(head)
        for place, count, data in places:
            out.write(bytes(len(head) + place - out.tell()))
            fill(out, data, count)
        out.write(bytes(-out.tell() % 32))


# Vocabularies and text ----------------------------------------------------------------------------

def here(*parts):
    """The path of a file of ../shared/data, or None."""
    path = os.path.join(common.SHARED, "data", *parts)
    return path if os.path.exists(path) else None


def made_words(count):
    """Random words, the most frequent first."""
    rng, words = random.Random(4), {}
    while len(words) < count:
        word = "".join(rng.choice("bcdfghklmnprstvw") + rng.choice("aeiou")
                       for _ in range(rng.choice((1, 1, 2, 2, 3, 3, 4))))
        words[word + rng.choice(("", "", "n", "s", "r", "t"))] = None
    return list(words)


def words():
    """English words where a vocabulary is at hand: BERT's stands in the order of frequency."""
    path = here("bert", "vocab.txt")
    if not path:
        return made_words(20000)
    with open(path, encoding="utf-8") as f:
        lines = [line.rstrip("\n") for line in f]
    return [w for w in lines if w.isascii() and w.isalpha() and (len(w) > 1 or w in "ai")]


def tokenizer(arch):
    """(file name, bytes) of a vocabulary of 32,000 or 30,522 tokens: the real one, or a made one,
    in which words of made_words() grow letter by letter."""
    name = "tokenizer.model" if arch == "llama" else "vocab.txt"
    path = here("llama2" if arch == "llama" else "bert", name)
    if not path:
        path = os.path.join(common.scratch(), name)
        single = list(map(chr, range(33, 127)))
        if arch == "llama":
            known = dict.fromkeys(single + ["\u2581" + c for c in single] + ["\u2581"])
            known.update(dict.fromkeys("\u2581" + word[:n] for word in made_words(20000)
                                       for n in range(2, len(word) + 1)))
            pieces = models.llama_pieces()[:259]
            pieces += [(text, -float(i), 1) for i, text in enumerate(known)]
            models.write_sentencepiece(path, pieces[:32000])
        else:
            known = models.bert_vocabulary()[:5] + single + ["##" + c for c in single]
            known += [w for w in made_words(20000) if len(w) > 1]
            known += ["##" + end for end in made_words(20000)]
            with open(path, "w", encoding="utf-8") as f:
                f.write("".join(word + "\n" for word in list(dict.fromkeys(known))[:30522]))
    with open(path, "rb") as f:
        return name, f.read()


class Prose:
    """Random English-like text: Zipf's law, capitals, commas, numbers, rare words."""

    def __init__(self, seed):
        self.rng, self.words = random.Random(seed), words()
        self.weights = list(itertools.accumulate(1 / (i + 3) for i in range(len(self.words))))

    def sentences(self, least, most):
        """Sentences of so many words together."""
        rng, out, left = self.rng, [], self.rng.randrange(least, most)
        while left > 0:
            n = min(left, rng.randrange(6, 24))
            picked = rng.choices(self.words, cum_weights=self.weights, k=n)
            for i in range(n):
                kind = rng.random()
                if kind < 0.02:
                    picked[i] = str(rng.randrange(3000))
                elif kind < 0.04:
                    picked[i] = "".join(rng.choice("abdeilmnorstuvz") for _ in range(9))
                elif kind < 0.12:
                    picked[i] += ","
            out.append(" ".join(picked).strip(",").capitalize() + ".")
            left -= n
        return " ".join(out)


def write_text(path, size):
    """Lines of a paragraph each, `size` bytes in all."""
    prose = Prose(6)
    with open(path, "w", encoding="utf-8") as out:
        while size > 0:
            size -= out.write(prose.sentences(20, 300) + "\n")


def write_items(path, count=200):
    """HellaSwag in its official form, the items shuffled, so that the first few are a sample."""
    rng, rows, real = random.Random(7), [], here("benchmarks", "hellaswag_val.jsonl")
    if real:
        with open(real, encoding="utf-8") as f:
            rows = [json.loads(line) for line in f]
    prose = Prose(8)
    while len(rows) < count:
        context = prose.sentences(30, 75)
        rows.append({"ind": len(rows), "activity_label": "Making things", "ctx_a": context,
                     "ctx_b": "", "ctx": context, "split": "val", "split_type": "indomain",
                     "label": rng.randrange(4), "source_id": "-",
                     "endings": [prose.sentences(12, 30).lower() for _ in range(4)]})
    rng.shuffle(rows)
    with open(path, "w", encoding="utf-8") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows[:count])


def write_stories(folder):
    """(llama2.c's checkpoint, its tokenizer): stories260K, or a random model of that shape."""
    found = [here("stories260K", name) for name in ("checkpoint_legacy.bin", "tokenizer.bin")]
    if all(found):
        return found
    models.MODELS["stories"] = SHAPES["stories"]
    pieces = models.llama_pieces()
    pieces += [("\u2581w%d" % i, -200.0 - i, 1) for i in range(512 - len(pieces))]
    found = [os.path.join(folder, name) for name in ("checkpoint", "tokenizer.bin")]
    models.write_llama2c("stories", found[0], 0)
    models.write_llama2c_tokenizer(found[1], pieces)
    return found
