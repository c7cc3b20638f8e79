"""Small random models for the tests, the same on every machine, written with the standard library.

MODELS holds their shapes. Weights come from random.Random(seed).uniform, are rounded to the stored
type, and are scaled so that every layer moves the logits. `write(name, folder)` writes the Hugging
Face form; `write_meta` and `write_llama2c` write the same Llama weights in Meta's and llama2.c's
layouts. Sizes are odd on purpose: none is a multiple of 8 or 16.
"""
import array
import json
import math
import os
import random
import struct
import zipfile

LETTERS = "abcdefghijklmnopqrstuvwxyz"
MERGES = ["he", "in", "th", "an", "the", "re", "on", "\u2581t", "\u2581a", "er", "nd", "and",
          "\u2581the", "\u2581and", "in", "ing", "ou", "is", "\u2581w", "ed", "or", "\u2581s"]


def llama_pieces():
    """(text, score, sentencepiece type) of the 307 tokens that every small Llama here uses."""
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [("<0x%02X>" % byte, 0.0, 6) for byte in range(256)]
    merges = sorted(set(MERGES), key=MERGES.index)
    pieces += [(text, -float(rank), 1) for rank, text in enumerate(merges)]
    pieces += [(text, -100.0 - rank, 1) for rank, text in enumerate("\u2581" + LETTERS)]
    return pieces


def bert_vocabulary():
    """The 203 lines of vocab.txt that every small BERT here uses."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += list(LETTERS) + ["##" + letter for letter in LETTERS] + list("0123456789.,!?'-")
    words += "the cat sat on a mat and dog ran in sun red big one two is was he she it".split()
    words += ["##" + end for end in "ing ed er es ly est ness".split()]
    unique = sorted(set(words), key=words.index)
    return unique + ["filler%d" % i for i in range(203 - len(unique))]


def spell(text):
    """Llama ids of a text of letters and spaces that no merge joins (none of adehinorstuw)."""
    pieces = [piece for piece, _, _ in llama_pieces()]
    return [pieces.index(letter) for letter in ("\u2581" + text.replace(" ", "\u2581"))]


def decode(ids):
    """The bytes of Llama tokens as the continuation of a text; sentencepiece writes <unk> so."""
    out, pieces = b"", llama_pieces()
    for text, _, kind in (pieces[i] for i in ids):
        out += {1: text.replace("\u2581", " ").encode(), 2: " \u2047 ".encode(), 3: b"",
                6: bytes([int(text[3:5], 16)]) if kind == 6 else b""}[kind]
    return out


VOCAB_LLAMA, VOCAB_BERT = len(llama_pieces()), len(bert_vocabulary())


def _llama(seed, dim, hidden, layers, heads, kv, head_dim, tied, dtype, theta, eps, length=125):
    return dict(arch="llama", seed=seed, dim=dim, hidden=hidden, layers=layers, heads=heads, kv=kv,
                head_dim=head_dim, tied=tied, dtype=dtype, theta=theta, eps=eps, length=length,
                vocab=VOCAB_LLAMA)


def _bert(seed, dim, hidden, layers, heads, dtype, labels, eps=1e-12, length=65):
    return dict(arch="bert", seed=seed, dim=dim, hidden=hidden, layers=layers, heads=heads,
                dtype=dtype, labels=labels, length=length, eps=eps, vocab=VOCAB_BERT)


MODELS = {
    "llama_gqa": _llama(1, 60, 93, 6, 6, 2, 10, False, "F32", 10000.0, 1e-5),
    "llama_mha": _llama(2, 66, 101, 5, 3, 3, 22, True, "F32", 10000.0, 1e-5),
    "llama_f16": _llama(3, 30, 51, 6, 5, 5, 6, True, "F16", 5000.0, 0.02),
    "llama_bf16": _llama(4, 45, 77, 6, 3, 1, 14, False, "BF16", 500000.0, 1e-5),
    "llama_wide": _llama(5, 270, 523, 3, 3, 1, 90, False, "F32", 10000.0, 1e-5),
    "bert_mlm": _bert(6, 33, 51, 6, 3, "F32", 0),
    "bert_one": _bert(7, 30, 45, 5, 3, "F32", 1),
    "bert_two": _bert(8, 34, 69, 6, 2, "F16", 2, 1e-3),
    "bert_three": _bert(9, 42, 57, 6, 6, "BF16", 3),
}


# Tensors ------------------------------------------------------------------------------------------

def to_bf16(value):
    """The 16 bits of a float rounded to bfloat16, nearest even."""
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


def pack(values, dtype):
    """Little-endian bytes of a sequence of floats stored as F32, F16 or BF16."""
    if dtype == "BF16":
        return struct.pack("<%dH" % len(values), *map(to_bf16, values))
    return struct.pack("<%d%s" % (len(values), {"F32": "f", "F16": "e"}[dtype]), *values)


def unpack(data, dtype):
    """The floats that `pack` stored."""
    if dtype == "BF16":
        return array.array("f", struct.unpack("<%df" % (len(data) // 2),
                                              b"".join(b"\0\0" + data[i:i + 2]
                                                       for i in range(0, len(data), 2))))
    width, letter = {"F32": (4, "f"), "F16": (2, "e")}[dtype]
    return array.array("f", struct.unpack("<%d%s" % (len(data) // width, letter), data))


def tensors(name):
    """{Hugging Face name: (shape, stored bytes)} of a model, in a fixed order."""
    m = MODELS[name]
    rng = random.Random(m["seed"])
    out = {}

    def uniform(key, shape, reach, centre=0.0):
        count = math.prod(shape)
        values = [rng.uniform(centre - reach, centre + reach) for _ in range(count)]
        out[key] = (list(shape), pack(values, m["dtype"]))

    def linear(key, rows, cols, gain):
        uniform(key, (rows, cols), gain * math.sqrt(3.0 / cols))  # rms 1 in gives rms `gain` out

    if m["arch"] == "llama":
        _llama_tensors(m, uniform, linear)
    else:
        _bert_tensors(m, uniform, linear)
    return out


def _llama_tensors(m, uniform, linear):
    dim, hidden, q, kv = m["dim"], m["hidden"], m["heads"] * m["head_dim"], m["kv"] * m["head_dim"]
    uniform("model.embed_tokens.weight", (m["vocab"], dim), 0.4 if m["tied"] else 1.0)
    for i in range(m["layers"]):
        at = "model.layers.%d." % i
        uniform(at + "input_layernorm.weight", (dim,), 0.3, 1.0)
        linear(at + "self_attn.q_proj.weight", q, dim, 1.3)
        linear(at + "self_attn.k_proj.weight", kv, dim, 1.3)
        linear(at + "self_attn.v_proj.weight", kv, dim, 1.0)
        linear(at + "self_attn.o_proj.weight", dim, q, 1.5)
        uniform(at + "post_attention_layernorm.weight", (dim,), 0.3, 1.0)
        linear(at + "mlp.gate_proj.weight", hidden, dim, 1.5)
        linear(at + "mlp.up_proj.weight", hidden, dim, 1.0)
        linear(at + "mlp.down_proj.weight", dim, hidden, 1.2)
    uniform("model.norm.weight", (dim,), 0.3, 1.0)
    if not m["tied"]:
        linear("lm_head.weight", m["vocab"], dim, 3.0)


def _bert_tensors(m, uniform, linear):
    dim, hidden = m["dim"], m["hidden"]

    def dense(key, rows, cols, gain):
        linear(key + ".weight", rows, cols, gain)
        uniform(key + ".bias", (rows,), 0.2)

    def norm(key):
        uniform(key + ".weight", (dim,), 0.3, 1.0)
        uniform(key + ".bias", (dim,), 0.2)

    uniform("bert.embeddings.word_embeddings.weight", (m["vocab"], dim), 1.0)
    uniform("bert.embeddings.position_embeddings.weight", (m["length"], dim), 0.6)
    uniform("bert.embeddings.token_type_embeddings.weight", (2, dim), 0.6)
    norm("bert.embeddings.LayerNorm")
    for i in range(m["layers"]):
        at = "bert.encoder.layer.%d." % i
        dense(at + "attention.self.query", dim, dim, 1.3)
        dense(at + "attention.self.key", dim, dim, 1.3)
        dense(at + "attention.self.value", dim, dim, 1.0)
        dense(at + "attention.output.dense", dim, dim, 1.5)
        norm(at + "attention.output.LayerNorm")
        dense(at + "intermediate.dense", hidden, dim, 1.5)
        dense(at + "output.dense", dim, hidden, 1.0)
        norm(at + "output.LayerNorm")
    dense("bert.pooler.dense", dim, dim, 1.0)
    if m["labels"]:
        dense("classifier", m["labels"], dim, 3.0)
        return
    dense("cls.predictions.transform.dense", dim, dim, 1.2)
    norm("cls.predictions.transform.LayerNorm")
    uniform("cls.predictions.bias", (m["vocab"],), 0.5)


def config(name):
    """config.json of a model as Hugging Face writes it."""
    m = MODELS[name]
    torch_dtype = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[m["dtype"]]
    common = dict(hidden_size=m["dim"], intermediate_size=m["hidden"], vocab_size=m["vocab"],
                  num_hidden_layers=m["layers"], num_attention_heads=m["heads"],
                  max_position_embeddings=m["length"], torch_dtype=torch_dtype)
    if m["arch"] == "llama":
        return dict(common, architectures=["LlamaForCausalLM"], model_type="llama",
                    num_key_value_heads=m["kv"], head_dim=m["head_dim"], hidden_act="silu",
                    rms_norm_eps=m["eps"], rope_theta=m["theta"], rope_scaling=None,
                    tie_word_embeddings=m["tied"], attention_bias=False, mlp_bias=False,
                    bos_token_id=1, eos_token_id=2)
    kind = "SequenceClassification" if m["labels"] else "MaskedLM"
    out = dict(common, architectures=["BertFor" + kind], model_type="bert", type_vocab_size=2,
               hidden_act="gelu", layer_norm_eps=m["eps"], pad_token_id=0,
               position_embedding_type="absolute")
    if m["labels"]:
        out["id2label"] = {str(i): "LABEL_%d" % i for i in range(m["labels"])}
        out["label2id"] = {"LABEL_%d" % i: i for i in range(m["labels"])}
        if m["labels"] == 1:
            out["problem_type"] = "regression"
    return out


# Files --------------------------------------------------------------------------------------------

def write_safetensors(path, entries, dtype):
    """A safetensors file of {name: (shape, bytes)}, all of one type."""
    header, at = {}, 0
    for key, (shape, data) in entries.items():
        header[key] = dict(dtype=dtype, shape=shape, data_offsets=[at, at + len(data)])
        at += len(data)
    text = json.dumps(dict({"__metadata__": {"format": "pt"}}, **header)).encode()
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        f.writelines(data for _, data in entries.values())


def write_torch(path, entries, dtype):
    """A PyTorch zip checkpoint (torch.save of a dict of tensors) of {name: (shape, bytes)}."""
    storage = {"F32": "FloatStorage", "F16": "HalfStorage", "BF16": "BFloat16Storage"}[dtype]
    width = 4 if dtype == "F32" else 2

    def text(s):
        return b"X" + struct.pack("<I", len(s.encode())) + s.encode()

    def number(n):
        return b"J" + struct.pack("<i", n)

    def numbers(values):
        return b"(" + b"".join(map(number, values)) + b"t"

    ordered = b"ccollections\nOrderedDict\n)R"
    pickle = b"\x80\x02}("
    for index, (key, (shape, data)) in enumerate(entries.items()):
        strides = [math.prod(shape[i + 1:]) for i in range(len(shape))]
        pickle += text(key) + b"ctorch._utils\n_rebuild_tensor_v2\n(("
        pickle += text("storage") + b"ctorch\n" + storage.encode() + b"\n" + text(str(index))
        pickle += text("cpu") + number(len(data) // width) + b"tQ" + number(0)
        pickle += numbers(shape) + numbers(strides) + b"\x89" + ordered + b"tR"
    pickle += b"u."
    stem = os.path.splitext(os.path.basename(path))[0]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(stem + "/data.pkl", pickle)
        for index, (_, data) in enumerate(entries.values()):
            archive.writestr("%s/data/%d" % (stem, index), data)
        archive.writestr(stem + "/version", b"3\n")


def write_sentencepiece(path, pieces):
    """A sentencepiece model file (protobuf ModelProto): BPE, byte fallback, no normalization."""
    def varint(n):
        out = b""
        while n > 127:
            out, n = out + bytes([n & 127 | 128]), n >> 7
        return out + bytes([n])

    def field(number, data):
        return varint(number << 3 | 2) + varint(len(data)) + data

    def integer(number, value):
        return varint(number << 3) + varint(value)

    model = b""
    for text, score, kind in pieces:
        model += field(1, field(1, text.encode()) + varint(2 << 3 | 5) + struct.pack("<f", score)
                       + integer(3, kind))
    trainer = (integer(3, 2) + integer(4, len(pieces)) + integer(35, 1)  # BPE, size, byte fallback
               + integer(40, 0) + integer(41, 1) + integer(42, 2))       # unk, bos, eos
    normalizer = field(1, b"identity") + integer(3, 1) + integer(4, 0) + integer(5, 1)
    with open(path, "wb") as f:
        f.write(model + field(2, trainer) + field(3, normalizer))


def write_llama2c_tokenizer(path, pieces):
    """llama2.c's tokenizer.bin: longest length, then score, length and bytes of every token."""
    rows = []
    for text, score, kind in pieces:
        data = text.replace("\u2581", " ").encode()
        if kind == 3:
            data = b"\n" + data + b"\n"
        rows.append(struct.pack("<fi", score, len(data)) + data)
    with open(path, "wb") as f:
        f.write(struct.pack("<i", max(len(row) - 8 for row in rows)) + b"".join(rows))


def write(name, folder):
    """A model as a Hugging Face folder with its tokenizer; returns the folder."""
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as f:
        json.dump(config(name), f, indent=1)
    write_safetensors(os.path.join(folder, "model.safetensors"), tensors(name),
                      MODELS[name]["dtype"])
    if MODELS[name]["arch"] == "llama":
        write_sentencepiece(os.path.join(folder, "tokenizer.model"), llama_pieces())
    else:
        with open(os.path.join(folder, "vocab.txt"), "w", encoding="utf-8") as f:
            f.write("".join(word + "\n" for word in bert_vocabulary()))
    return folder


def _interleave(data, heads, head_dim, width):
    """Rows of q or k from Hugging Face's order to Meta's: row 2i+j of a head was row j*half+i."""
    row, half = len(data) // (heads * head_dim), head_dim // 2
    order = [h * head_dim + j * half + i for h in range(heads) for i in range(half) for j in (0, 1)]
    assert row % width == 0
    return b"".join(data[r * row:(r + 1) * row] for r in order)


META_NAMES = {"input_layernorm": "attention_norm", "self_attn.q_proj": "attention.wq",
              "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
              "self_attn.o_proj": "attention.wo", "post_attention_layernorm": "ffn_norm",
              "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
              "mlp.up_proj": "feed_forward.w3"}


def meta_tensors(name):
    """A Llama model's tensors under Meta's names and in Meta's RoPE order."""
    m = MODELS[name]
    out, width = {}, 4 if m["dtype"] == "F32" else 2
    for key, (shape, data) in tensors(name).items():
        if "q_proj" in key or "k_proj" in key:
            heads = m["heads"] if "q_proj" in key else m["kv"]
            data = _interleave(data, heads, m["head_dim"], width)
        key = key.replace("model.embed_tokens", "tok_embeddings").replace("lm_head", "output")
        for old, new in META_NAMES.items():
            key = key.replace(old, new)
        out[key.replace("model.", "")] = (shape, data)
    return out


def write_meta(name, folder):
    """A Llama model as Meta's folder: params.json, consolidated.00.pth, tokenizer.model."""
    m = MODELS[name]
    os.makedirs(folder, exist_ok=True)
    # Meta's hidden size: 8/3 dim, times the multiplier, rounded up to a multiple of multiple_of.
    multiplier = 0.9 * m["hidden"] / int(8 * m["dim"] / 3)
    params = dict(dim=m["dim"], n_layers=m["layers"], n_heads=m["heads"], n_kv_heads=m["kv"],
                  norm_eps=m["eps"], multiple_of=m["hidden"], ffn_dim_multiplier=multiplier,
                  rope_theta=m["theta"], vocab_size=-1)
    entries = meta_tensors(name)
    entries.setdefault("output.weight", entries["tok_embeddings.weight"])  # Meta ties nothing
    with open(os.path.join(folder, "params.json"), "w", encoding="utf-8") as f:
        json.dump(params, f)
    write_torch(os.path.join(folder, "consolidated.00.pth"), entries, m["dtype"])
    write_sentencepiece(os.path.join(folder, "tokenizer.model"), llama_pieces())
    return folder


def write_llama2c(name, path, version):
    """A float32 Llama model as llama2.c's .bin: version 0 is the legacy form, 1 has a header."""
    m, t = MODELS[name], meta_tensors(name)

    def every(key):
        return b"".join(t["layers.%d.%s.weight" % (i, key)][1] for i in range(m["layers"]))

    sizes = [m["dim"], m["hidden"], m["layers"], m["heads"], m["kv"], m["vocab"], m["length"]]
    attention = [every("attention." + key) for key in ("wq", "wk", "wv", "wo")]
    ffn = [every("feed_forward." + key) for key in ("w1", "w2", "w3")]
    norms = [every("attention_norm"), every("ffn_norm")]
    embed, norm = t["tok_embeddings.weight"][1], t["norm.weight"][1]
    head = [] if m["tied"] else [t["output.weight"][1]]
    if version == 0:
        if head:
            sizes[5] = -sizes[5]
        rope = bytes(4 * m["length"] * m["head_dim"])  # cosines and sines, which readers recompute
        parts = [struct.pack("<7i", *sizes), embed, norms[0], *attention, norms[1], *ffn, norm,
                 rope, *head]
    else:
        header = struct.pack("<Ii7iB", 0x616B3432, 1, *sizes, m["tied"]).ljust(256, b"\0")
        parts = [header, *norms, norm, embed, *attention, *ffn, *head]
    with open(path, "wb") as f:
        f.writelines(parts)
    return path
