#!/usr/bin/env python3
"""Turns published checkpoints and benchmark files into what painters reads.

  python3 export.py model SOURCE OUT.bin [--tokenizer FILE] [--context N]
                                         [--head-name NAME] [--head NAME=FOLDER ...]
  python3 export.py task NAME SOURCE OUT.tsv [--fewshot N --train FILE [--fewshot-same]]

SOURCE of a model is a Hugging Face folder (Llama or BERT), Meta's Llama 2 folder, or a llama2.c
.bin file. Tensor bytes are copied as they stand, never converted, never loaded whole. Nothing in a
checkpoint is trusted: pickles are read by an interpreter that can build tensors and nothing else.
Needs Python 3.8 or newer and no package. The README describes the file that comes out.
"""
import argparse
import collections
import contextlib
import io
import json
import math
import operator
import os
import pickletools
import random
import re
import signal
import struct
import sys
import time
import unicodedata
import zipfile
import zlib

# --------------------------------------------------------------------------------------------------
# Errors, and small files read with care
# --------------------------------------------------------------------------------------------------

SMALL_FILE = 4 << 20        # the largest JSON file, header or pickle believed, in bytes


class ExportError(Exception):
    """One line for the user: file, place in it, what is wrong, how to mend it."""

    def __init__(self, path, place, fault, mend):
        super().__init__("%s: %s: %s; %s" % (path, place, fault, mend))


def note(text):
    with contextlib.suppress(OSError):
        print("export.py: " + one_line(text), file=sys.stderr)


def one_line(text):
    """The text without line breaks, control characters or lone surrogates: fit to be printed."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def listing(names, most=8):
    """The first few of some names, for a message."""
    names = sorted(names)
    more = ", and %d more" % (len(names) - most) if len(names) > most else ""
    return ", ".join(name[:200] for name in names[:most]) + more


def read_bytes(path, limit):
    """A whole file of at most `limit` bytes."""
    if os.path.getsize(path) > limit:
        raise ExportError(path, "size", "more than %d bytes" % limit, "is this the right file?")
    with open(path, "rb") as f:
        return f.read(os.path.getsize(path))


def parse_json(data, path, place):
    """The JSON object in `data`; names given twice, NaN and absurdly long numbers are refused."""
    def unique(pairs):
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a name stands there twice")
        return dict(pairs)

    def integer(digits):
        if len(digits) > 1000:          # tokenizer_config.json has one of 31
            raise ValueError("a number of %d digits" % len(digits))
        return int(digits)

    def constant(name):
        raise ValueError("%s is not JSON" % name)

    try:
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=unique, parse_int=integer,
                           parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise ExportError(path, place, "broken JSON: %s" % error, "fetch the file again")
    if not isinstance(value, dict):
        raise ExportError(path, place, "not a JSON object", "fetch the file again")
    return value


def read_json(path, limit=SMALL_FILE):
    return parse_json(read_bytes(path, limit), path, "JSON")


class Config:
    """The settings of a config.json or params.json, each checked as it is asked for."""

    def __init__(self, path, values):
        self.path, self.values = path, values

    def wrong(self, key, fault, mend="only plain Llama and BERT models can be exported"):
        return ExportError(self.path, key, fault, mend)

    def get(self, key, default=None):
        """The value as it stands; null is the same as absent."""
        value = self.values.get(key)
        return default if value is None else value

    def count(self, key, default=None):
        """A whole number from 1 to 2^31-1."""
        value = self.get(key, default)
        if type(value) is not int or not 0 < value < 1 << 31:
            raise self.wrong(key, "missing" if value is None else "not a number from 1 to 2^31-1",
                             "correct the file")
        return value

    def real(self, key, default, high=1e30):
        """A positive number that float32 can hold, below `high`."""
        value = self.get(key, default)
        if type(value) not in (int, float) or not 1e-30 < value < high:
            raise self.wrong(key, "not a positive number below %g" % high, "correct the file")
        return float(value)

    def require(self, key, *allowed):
        """Refuses a setting that means other arithmetic; the first of `allowed` is the default."""
        value = self.get(key, allowed[0])
        if value not in allowed:
            raise self.wrong(key, "%s is not supported" % json.dumps(value)[:200])
        return value


# --------------------------------------------------------------------------------------------------
# Checkpoint files -> {tensor name: Stored}. Only headers are read here.
# --------------------------------------------------------------------------------------------------

Stored = collections.namedtuple("Stored", "path type shape offset bytes")   # row-major, no gaps

ITEM_BYTES = {"f32": 4, "f16": 2, "bf16": 2, "f64": 8, "i64": 8, "i32": 4, "i16": 2, "i8": 1,
              "u8": 1, "bool": 1}
SAFE_TYPES = {"F32": "f32", "F16": "f16", "BF16": "bf16", "F64": "f64", "I64": "i64", "I32": "i32",
              "I16": "i16", "I8": "i8", "U8": "u8", "BOOL": "bool"}
TORCH_TYPES = {"Float": "f32", "Half": "f16", "BFloat16": "bf16", "Double": "f64", "Long": "i64",
               "Int": "i32", "Short": "i16", "Char": "i8", "Byte": "u8", "Bool": "bool"}
CHUNK = 4 << 20             # bytes of a tensor read at a time
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json",
                "pytorch_model.bin", "pytorch_model.bin.index.json")


def are_sizes(value):
    """Is this a list of whole numbers, none negative, none absurd?"""
    return (isinstance(value, (list, tuple)) and len(value) <= 8
            and all(type(n) is int and 0 <= n < 1 << 48 for n in value))


def refuse_overlaps(named, path):
    """Refuses (name, Stored) pairs of one file that claim the same bytes."""
    end, last = 0, ""
    for name, stored in sorted(named, key=lambda pair: pair[1].offset):
        if stored.bytes and stored.offset < end:
            raise ExportError(path, "tensor %s" % name[:200], "overlaps %s" % last[:200],
                              "the file is damaged or made to deceive: fetch it again")
        if stored.bytes:
            end, last = stored.offset + stored.bytes, name


def read_safetensors(path):
    """A JSON header of types, shapes and offsets, then the data, which it must cover exactly."""
    size = os.path.getsize(path)
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if length > min(size - 8, SMALL_FILE):
            raise ExportError(path, "header length", "%d in a file of %d bytes" % (length, size),
                              "not a safetensors file, or cut short: fetch it again")
        header = parse_json(f.read(length), path, "header")
    header.pop("__metadata__", None)
    found, start = {}, 8 + length
    for name, entry in header.items():
        def wrong(fault, mend="fetch the file again"):
            return ExportError(path, "tensor %s" % name[:200], fault, mend)

        if not isinstance(entry, dict):
            raise wrong("not an object")
        span, shape, kind = (entry.get(key) for key in ("data_offsets", "shape", "dtype"))
        if not are_sizes(shape) or not are_sizes(span) or len(span) != 2:
            raise wrong("shape or offsets are not sizes")
        if not isinstance(kind, str) or kind not in SAFE_TYPES:
            raise wrong("type %s is not supported" % json.dumps(kind)[:200],
                        "save the model as float32, float16 or bfloat16")
        stored = Stored(path, SAFE_TYPES[kind], tuple(shape), start + span[0], span[1] - span[0])
        if not span[0] <= span[1] <= size - start:
            raise wrong("bytes %d to %d lie outside the file" % tuple(span))
        if stored.bytes != math.prod(shape) * ITEM_BYTES[stored.type]:
            raise wrong("%d bytes for shape %s of %s" % (stored.bytes, shape, kind))
        found[name] = stored
    refuse_overlaps(found.items(), path)
    if sum(stored.bytes for stored in found.values()) != size - start:
        raise ExportError(path, "size", "the tensors do not fill the file", "fetch the file again")
    return found


# A pickle is a program. This interpreter knows the instructions that torch.save writes and can make
# numbers, text, lists, dictionaries and the three things below. No name is looked up anywhere.
Global = collections.namedtuple("Global", "name")                   # a name, standing for itself
Storage = collections.namedtuple("Storage", "key type count")       # where torch keeps elements
Tensor = collections.namedtuple("Tensor", "storage start shape")    # a row-major view of them

PICKLE_ARGUMENTS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"}
MARK = object()
PICKLE_MAKES = {"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
                "EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict, "MARK": lambda: MARK}


class Unpickler:
    """Runs the pickles in `data`, one after another; `path` is for messages."""

    def __init__(self, data, path):
        self.data, self.path, self.storages = io.BytesIO(data), path, {}

    def expect(self, condition, fault):
        if not condition:
            raise ExportError(self.path, "pickle", fault,
                              "not a plain state_dict saved by torch: do not trust it")

    def load(self):
        self.stack, self.memo = [], {}
        for code, argument, _ in pickletools.genops(self.data):
            self.step(code.name, argument)
        return self.pop()

    def step(self, code, argument):
        push = self.stack.append
        if code in PICKLE_ARGUMENTS:
            push(argument)
        elif code in PICKLE_MAKES:
            push(PICKLE_MAKES[code]())
        elif code in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.top()
        elif code in ("BINGET", "LONG_BINGET"):
            self.expect(argument in self.memo, "recalls what was never stored")
            push(self.memo[argument])
        elif code == "TUPLE":
            push(tuple(self.since_mark()))
        elif code in ("TUPLE1", "TUPLE2", "TUPLE3"):
            push(tuple([self.pop() for _ in range(int(code[5]))][::-1]))
        elif code in ("APPEND", "APPENDS"):
            items = [self.pop()] if code == "APPEND" else self.since_mark()
            self.top(list).extend(items)
        elif code in ("SETITEM", "SETITEMS"):
            items = [self.pop(), self.pop()][::-1] if code == "SETITEM" else self.since_mark()
            self.fill(self.top(dict), items)
        elif code == "BUILD":               # attributes (_metadata) of a dictionary: not needed
            self.pop()
            self.top(dict)
        elif code == "GLOBAL":
            push(self.name(argument.replace(" ", ".")))
        elif code == "BINPERSID":
            push(self.storage(self.pop()))
        elif code == "REDUCE":
            arguments = self.pop()
            push(self.call(self.pop(), arguments))
        else:
            self.expect(code in ("PROTO", "STOP"), "instruction %s" % code)

    def top(self, kind=object):
        self.expect(self.stack and self.stack[-1] is not MARK and isinstance(self.stack[-1], kind),
                    "an instruction without what it needs")
        return self.stack[-1]

    def pop(self):
        self.top()
        return self.stack.pop()

    def since_mark(self):
        items = []
        while self.stack and self.stack[-1] is not MARK:
            items.append(self.stack.pop())
        self.expect(self.stack, "no mark where one is needed")
        self.stack.pop()
        return items[::-1]

    def fill(self, target, items):
        self.expect(len(items) % 2 == 0, "a key without a value")
        for key, value in zip(items[0::2], items[1::2]):
            self.expect(isinstance(key, str) and key not in target, "a key not text, or twice")
            target[key] = value

    def name(self, name):
        storage = re.fullmatch(r"torch\.(\w+)Storage", name)
        self.expect(name in PICKLE_CALLS or storage and storage.group(1) in TORCH_TYPES,
                    "asks for %s" % name[:200])
        return Global(name)

    def storage(self, saved):
        """("storage", torch.FloatStorage, key, device, count), and None in old files."""
        self.expect(
            isinstance(saved, tuple) and len(saved) in (5, 6) and saved[0] == "storage"
            and type(saved[1]) is Global and saved[1].name not in PICKLE_CALLS
            and isinstance(saved[2], str) and are_sizes(saved[4:5]) and saved[5:] in ((), (None,)),
            "a storage of unknown form")
        storage = Storage(saved[2], TORCH_TYPES[saved[1].name[6:-7]], saved[4])
        self.expect(self.storages.setdefault(storage.key, storage) == storage,
                    "two storages of one name")
        return storage

    def call(self, function, arguments):
        self.expect(type(function) is Global and function.name in PICKLE_CALLS
                    and isinstance(arguments, tuple), "calls what is not a function of torch's")
        return PICKLE_CALLS[function.name](self, *arguments)

    def ordered_dict(self, *arguments):
        self.expect(not arguments, "an OrderedDict of unknown form")
        return {}

    def parameter(self, tensor=None, *_):
        self.expect(type(tensor) is Tensor, "a parameter that is no tensor")
        return tensor

    def tensor(self, storage=None, start=None, shape=None, strides=None, gradient=None, hooks=None,
               *flags):
        self.expect(type(storage) is Storage and are_sizes([start]) and are_sizes(shape)
                    and are_sizes(strides) and len(shape) == len(strides) and not any(flags),
                    "a tensor of unknown form")
        step = 1
        for size, stride in zip(reversed(shape), reversed(strides)):
            self.expect(size < 2 or stride == step, "a transposed or sliced tensor of shape %s and"
                        " strides %s (save it after .contiguous())" % (shape, strides))
            step *= size
        self.expect(start + step <= storage.count, "a tensor larger than its storage")
        return Tensor(storage, start, tuple(shape))


PICKLE_CALLS = {
    "collections.OrderedDict": Unpickler.ordered_dict,
    "torch._utils._rebuild_tensor_v2": Unpickler.tensor,
    "torch._utils._rebuild_parameter": Unpickler.parameter,
}


def read_torch(path):
    """pytorch_model.bin or consolidated.00.pth: a zip since torch 1.6, a row of pickles before."""
    try:
        with open(path, "rb") as f:
            read = read_torch_zip if f.read(2) == b"PK" else read_torch_old
            state, places = read(path, f)
    except (zipfile.BadZipFile, NotImplementedError, OverflowError, ValueError, EOFError,
            struct.error) as error:
        raise ExportError(path, "contents", "damaged, or not saved by torch: %s" % error,
                          "fetch the file again")
    if not isinstance(state, dict):
        raise ExportError(path, "pickle", "not a dictionary of tensors", "save model.state_dict()")
    found = {}
    for name, tensor in state.items():
        if type(tensor) is not Tensor:
            raise ExportError(path, "entry %s" % name[:200], "not a tensor",
                              "save model.state_dict() and nothing else")
        item = ITEM_BYTES[tensor.storage.type]
        offset, size = places.get(tensor.storage.key, (0, -1))
        if size != tensor.storage.count * item:
            raise ExportError(path, "tensor %s" % name[:200], "its data is missing or of another"
                              " size", "cut short? fetch the file again")
        found[name] = Stored(path, tensor.storage.type, tensor.shape, offset + tensor.start * item,
                             math.prod(tensor.shape) * item)
    return found


def read_torch_zip(path, f):
    """The state_dict, and (offset, bytes) of each storage: an uncompressed member NAME/data/KEY."""
    size, members = os.path.getsize(path), {}
    for info in zipfile.ZipFile(f).infolist():
        f.seek(max(0, info.header_offset))
        local = f.read(30)
        if len(local) != 30 or local[:4] != b"PK\3\4":
            raise zipfile.BadZipFile("no member where the directory says")
        offset = info.header_offset + 30 + sum(struct.unpack("<HH", local[26:]))
        if (info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1
                or info.compress_size != info.file_size or offset + info.file_size > size
                or info.filename in members):
            raise ExportError(path, "member %s" % info.filename[:200], "compressed, encrypted,"
                              " twice there or outside the file", "save it again with torch.save")
        members[info.filename] = Stored(path, "u8", (info.file_size,), offset, info.file_size)
    refuse_overlaps(members.items(), path)
    roots = [name[:-len("data.pkl")] for name in members if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise zipfile.BadZipFile("%d members called data.pkl" % len(roots))

    def content(name):
        member = members[roots[0] + name]
        f.seek(member.offset)
        return f.read(min(member.bytes, SMALL_FILE))

    if roots[0] + "byteorder" in members and content("byteorder") != b"little":
        raise ExportError(path, "byteorder", "not little", "save it on a little-endian machine")
    data = roots[0] + "data/"
    return Unpickler(content("data.pkl"), path).load(), {
        name[len(data):]: (member.offset, member.bytes)
        for name, member in members.items() if name.startswith(data)}


def read_torch_old(path, f):
    """The same for files from before torch 1.6: pickles of magic number, version, machine,
    state_dict and storage keys; then each storage, its count (int64) and its data."""
    f.seek(0)
    pickles = Unpickler(f.read(min(os.path.getsize(path), SMALL_FILE)), path)
    magic, version, machine, state, keys = (pickles.load() for _ in range(5))
    if (magic != 0x1950a86a20f9469cfc6c or version != 1001 or not isinstance(machine, dict)
            or machine.get("little_endian") is not True):
        raise ValueError("unknown magic number, version or byte order")
    storages, places, at = pickles.storages, {}, pickles.data.tell()
    for key in keys if isinstance(keys, list) else ():
        if not isinstance(key, str) or key not in storages or key in places:
            raise ValueError("storage keys that do not agree with the tensors")
        count, size = storages[key].count, storages[key].count * ITEM_BYTES[storages[key].type]
        f.seek(at)
        if f.read(8) != struct.pack("<q", count):
            raise ValueError("storage %s is of another size" % key[:200])
        places[key] = (at + 8, size)
        at += 8 + size
    if at != os.path.getsize(path):
        raise ValueError("%d bytes, but %d by its contents" % (os.path.getsize(path), at))
    return state, places


def read_shards(path):
    """All tensors of the files that an index names."""
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise ExportError(path, "weight_map", "missing, or not names of files", "fetch it again")
    found = {}
    for shard in sorted(set(index.values())):
        if not re.fullmatch(r"[\w.-]+", shard) or shard in (".", ".."):
            raise ExportError(path, "weight_map", "%s is not a plain file name" % shard[:200],
                              "do not trust this folder")
        file = os.path.join(os.path.dirname(path), shard)
        if not os.path.isfile(file):
            raise ExportError(path, "weight_map", "%s is not there" % shard, "fetch that file too")
        tensors = read_safetensors(file) if ".safetensors" in path else read_torch(file)
        if found.keys() & tensors.keys():
            raise ExportError(file, "tensors", "also in another file: "
                              + listing(found.keys() & tensors.keys()), "fetch the folder again")
        found.update(tensors)
    if index.keys() - found.keys():
        raise ExportError(path, "weight_map", "in none of the files: "
                          + listing(index.keys() - found.keys()), "fetch the folder again")
    return found


def read_weights(folder):
    """{name: Stored} of a Hugging Face folder, from the first form of weights it has."""
    for name in WEIGHT_FILES:
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            return (read_shards if name.endswith(".index.json") else
                    read_safetensors if name.endswith(".safetensors") else read_torch)(path)
    raise ExportError(folder, "weights", "none found", "needs one of " + ", ".join(WEIGHT_FILES))


# --------------------------------------------------------------------------------------------------
# Sources -> Model: our names, checked shapes
# --------------------------------------------------------------------------------------------------

LLAMA_LAYER = [     # ours, Hugging Face's, Meta's, shape
    ("attn_norm", "input_layernorm", "attention_norm", "dim"),
    ("q", "self_attn.q_proj", "attention.wq", "q_rows dim"),
    ("k", "self_attn.k_proj", "attention.wk", "kv_rows dim"),
    ("v", "self_attn.v_proj", "attention.wv", "kv_rows dim"),
    ("o", "self_attn.o_proj", "attention.wo", "dim q_rows"),
    ("ffn_norm", "post_attention_layernorm", "ffn_norm", "dim"),
    ("gate", "mlp.gate_proj", "feed_forward.w1", "hidden dim"),
    ("up", "mlp.up_proj", "feed_forward.w3", "hidden dim"),
    ("down", "mlp.down_proj", "feed_forward.w2", "dim hidden"),
]
LLAMA_ENDS = [
    ("embed", "embed_tokens", "tok_embeddings", "vocab_size dim"),
    ("norm", "norm", "norm", "dim"),
    ("head", "lm_head", "output", "vocab_size dim"),
]
LLAMA2C_ORDER = {   # tensors in the order of the file, by version; those of all layers are together
    0: "embed attn_norm q k v o ffn_norm gate down up norm - - head",
    1: "attn_norm ffn_norm norm embed q k v o gate down up head",
}
BERT_LAYER = [      # ours, Hugging Face's, shape of the weight (the bias has as many as its rows)
    ("q", "attention.self.query", "dim dim"),
    ("k", "attention.self.key", "dim dim"),
    ("v", "attention.self.value", "dim dim"),
    ("o", "attention.output.dense", "dim dim"),
    ("attn_norm", "attention.output.LayerNorm", "dim"),
    ("up", "intermediate.dense", "hidden dim"),
    ("down", "output.dense", "dim hidden"),
    ("ffn_norm", "output.LayerNorm", "dim"),
]
IGNORED = re.compile(r".*rotary_emb\.inv_freq|rope\.freqs|embeddings\.position_ids")
NEXT_SENTENCE = ("cls.seq_relationship.weight", "cls.seq_relationship.bias")
TYPE_NUMBERS = {"f32": 0, "f16": 1, "bf16": 2}
LIMITS = {"dim": 1 << 20, "hidden": 1 << 22, "n_layers": 1 << 14, "n_heads": 1 << 14,
          "head_dim": 1 << 16, "vocab_size": 1 << 24, "max_length": 1 << 24, "n_segments": 1 << 10}


class Model:
    """What goes into the file: dimensions, (our name, Stored) in order, meta lines."""

    def __init__(self, arch, source, **sizes):
        self.arch, self.source, self.sizes = arch, source, dict(sizes)
        self.tensors, self.meta = [], []
        heads, groups, width = (sizes[name] for name in ("n_heads", "n_kv_heads", "head_dim"))
        if heads % groups or arch == "llama" and width % 2 or any(
                sizes[name] > limit for name, limit in LIMITS.items()):
            raise self.wrong("sizes", str(sizes), "they do not fit together, or are too large")
        self.sizes.update(q_rows=heads * width, kv_rows=groups * width)

    def wrong(self, place, fault, mend="only plain Llama and BERT models can be exported"):
        return ExportError(self.source, place, fault, mend)

    def layers(self, found):
        """The numbers of the layers; not more than there can be."""
        if self.sizes["n_layers"] > len(found):
            raise self.wrong("tensors", "too few for %d layers" % self.sizes["n_layers"])
        return range(self.sizes["n_layers"])

    def take(self, found, wanted):
        """Moves the `wanted`, (our name, its name in `found`, shape), into the model. Refuses the
        checkpoint if any is missing or is not as it should be, or if anything is left."""
        missing = [theirs for _, theirs, _ in wanted if theirs not in found]
        if missing:
            raise self.wrong("tensors", "missing: " + listing(missing), "fetch what is missing")
        for ours, theirs, names in wanted:
            stored = found.pop(theirs)
            shape = tuple(self.sizes.get(name) or int(name) for name in names.split())
            if stored.shape != shape:
                raise ExportError(stored.path, "tensor %s" % theirs, "shape %s, but %s by the"
                                  " configuration" % (list(stored.shape), list(shape)),
                                  "they do not belong together")
            if stored.type not in TYPE_NUMBERS:
                raise ExportError(stored.path, "tensor %s" % theirs, "type %s is not supported"
                                  % stored.type, "save the model as float32, float16 or bfloat16")
            self.tensors.append((ours, stored))
        rest = [name for name in found if not IGNORED.fullmatch(name)]
        if rest:
            raise self.wrong("tensors", "not understood: " + listing(rest))


def head_size(source, dim, heads):
    if dim % heads:
        raise ExportError(source, "heads", "%d do not divide %d dimensions" % (heads, dim),
                          "correct the file")
    return dim // heads


def chunks(stored):
    """The bytes of a stored tensor, some at a time."""
    with open(stored.path, "rb") as f:
        f.seek(stored.offset)
        for at in range(0, stored.bytes, CHUNK):
            count = min(CHUNK, stored.bytes - at)
            try:
                data = f.read(count)
            except OSError as error:
                raise ExportError(stored.path, "byte %d" % (stored.offset + at), error.strerror,
                                  "copy it to a sound disk")
            if len(data) != count:
                raise ExportError(stored.path, "byte %d" % (stored.offset + at + len(data)),
                                  "the file ends early", "did it change meanwhile?")
            yield data


def same_bytes(a, b):
    """Do two stored tensors hold the same?"""
    return (a.type, a.shape) == (b.type, b.shape) and all(map(operator.eq, chunks(a), chunks(b)))


def untie(found, head, embed, tied):
    """Must `head` be written? Not if it is the embedding again: the file then holds it once."""
    if tied and head in found and embed not in found:
        found[embed] = found.pop(head)
    if head in found and embed in found and (tied or found[head] == found[embed]):
        if same_bytes(found[head], found[embed]):
            del found[head]
            return False
        note("%s differs from %s although the configuration ties them: kept apart" % (head, embed))
    return head in found or not tied


def check_rope(config):
    """Refuses stretched positions; returns theta. Newer files keep it in `rope_parameters`."""
    theta = config.real("rope_theta", 10000.0)
    for key in ("rope_scaling", "rope_parameters"):
        rope = config.get(key, {})
        if (not isinstance(rope, dict) or set(rope) - {"rope_type", "type", "rope_theta"}
                or rope.get("rope_type", rope.get("type", "default")) != "default"):
            raise config.wrong(key, "%s is not supported" % json.dumps(rope)[:200])
        theta = Config(config.path + ": " + key, rope).real("rope_theta", theta)
        if config.get("rope_theta", theta) != theta:
            raise config.wrong(key, "rope_theta differs from the outer one", "correct the file")
    return theta


def name_llama(model, found, meta, tied):
    """Takes a Llama's tensors by Meta's names or by Hugging Face's."""
    def entry(row, ours="", prefix=""):
        return ours + row[0], prefix + row[2 if meta else 1] + ".weight", row[3]

    embed, norm, head = LLAMA_ENDS
    base = "" if meta else "model."
    wanted = [entry(embed, "", base)]
    for i in model.layers(found):
        wanted += [entry(row, "layers.%d." % i, "%slayers.%d." % (base, i)) for row in LLAMA_LAYER]
    wanted.append(entry(norm, "", base))
    if untie(found, entry(head)[1], wanted[0][1], tied):
        wanted.append(entry(head))
    model.take(found, wanted)
    return model


def read_llama(source, config, found):
    """A Hugging Face LlamaForCausalLM."""
    config.require("hidden_act", "silu")
    config.require("attention_bias", False)
    config.require("mlp_bias", False)
    config.require("partial_rotary_factor", 1)
    dim, heads = config.count("hidden_size"), config.count("num_attention_heads")
    model = Model(
        "llama", source, dim=dim, hidden=config.count("intermediate_size"), n_heads=heads,
        n_layers=config.count("num_hidden_layers"), vocab_size=config.count("vocab_size"),
        n_kv_heads=config.count("num_key_value_heads", heads), n_segments=0, rope_pairs=1,
        max_length=config.count("max_position_embeddings", 2048),
        head_dim=(head_size(config.path, dim, heads) if config.get("head_dim") is None else
                  config.count("head_dim")), rope_theta=check_rope(config),
        norm_eps=config.real("rms_norm_eps", 1e-6, 1))
    return name_llama(model, found, False, config.require("tie_word_embeddings", False, True))


META_KEYS = {"dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "norm_eps",
             "ffn_dim_multiplier", "rope_theta", "max_batch_size", "max_seq_len",
             "use_scaled_rope"}


def read_meta(folder, context):
    """Meta's own folder. Its params.json leaves sizes out, so they come from the tensors."""
    path = os.path.join(folder, "params.json")
    config = Config(path, read_json(path))
    strange = config.values.keys() - META_KEYS
    if strange:
        raise config.wrong("settings", "not understood: " + listing(strange))
    config.require("use_scaled_rope", False)
    if os.path.exists(os.path.join(folder, "consolidated.01.pth")):
        raise ExportError(folder, "consolidated.01.pth", "a checkpoint in several shards is not"
                          " supported", "export the Hugging Face form of this model instead")
    path = os.path.join(folder, "consolidated.00.pth")
    found = read_torch(path)
    rows = {}
    for name in ("layers.0.feed_forward.w1.weight", "tok_embeddings.weight"):
        rows[name] = found[name].shape[:1] if name in found else ()
        if rows[name] in ((), (0,)):
            raise ExportError(path, "tensors", "missing: " + name, "is this Meta's Llama?")
    (hidden,), (vocabulary,) = rows.values()
    if config.get("vocab_size", -1) != -1:
        vocabulary = config.count("vocab_size")
    if context is None:
        context = config.count("max_seq_len", 4096)
        if config.get("max_seq_len") is None:
            note("%s does not tell the context length: 4096, as Llama 2 has; --context sets another"
                 % config.path)
    dim, heads = config.count("dim"), config.count("n_heads")
    model = Model(
        "llama", folder, dim=dim, hidden=hidden, n_layers=config.count("n_layers"), n_heads=heads,
        n_kv_heads=config.count("n_kv_heads", heads), vocab_size=vocabulary, max_length=context,
        n_segments=0, rope_pairs=2, head_dim=head_size(config.path, dim, heads),
        rope_theta=config.real("rope_theta", 10000.0), norm_eps=config.real("norm_eps", 1e-5, 1))
    return name_llama(model, found, True, "output.weight" not in found)


def read_llama2c(path):
    """llama2.c's .bin, legacy or version 1: a header of int32, then float32 in a fixed order."""
    with open(path, "rb") as f:
        start = f.read(256)
    version = struct.unpack("<i", start[4:8])[0] if start[:4] == b"24ka" and start[7:] else 0
    if version not in LLAMA2C_ORDER:
        raise ExportError(path, "version", "%d of llama2.c's format is not supported" % version,
                          "export it from llama2.c with --version 1")
    offset = 256 if version else 28
    if len(start) < offset:
        raise ExportError(path, "header", "cut short", "fetch the file again")
    names = ("dim", "hidden", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_length")
    sizes = dict(zip(names, struct.unpack_from("<7i", start, 8 if version else 0)))
    tied = start[36] == 1 if version else sizes["vocab_size"] > 0
    if not version:
        sizes["vocab_size"] = abs(sizes["vocab_size"])
    if min(sizes.values()) < 1 or version and start[36] > 1:
        raise ExportError(path, "header", "sizes %s" % list(sizes.values()),
                          "not a .bin of llama2.c; other checkpoints are folders")
    sizes["head_dim"] = head_size(path, sizes["dim"], sizes["n_heads"])
    model = Model("llama", path, n_segments=0, rope_pairs=2, rope_theta=10000.0, norm_eps=1e-5,
                  **sizes)

    rows = {row[0]: row for row in LLAMA_LAYER + LLAMA_ENDS}
    pieces = []         # (Meta's name, shape), as they lie in the file
    for name in LLAMA2C_ORDER[version].split()[:-1 if tied else None]:
        if name == "-":     # cosines or sines of the positions
            pieces.append((name, (sizes["max_length"], sizes["head_dim"] // 2)))
            continue
        prefixes = ([""] if rows[name] in LLAMA_ENDS else
                    ["layers.%d." % i for i in range(sizes["n_layers"])])
        shape = tuple(model.sizes[size] for size in rows[name][3].split())
        pieces += [(prefix + rows[name][2] + ".weight", shape) for prefix in prefixes]
    size, found = os.path.getsize(path), {}
    for name, shape in pieces:
        found[name] = Stored(path, "f32", shape, offset, 4 * math.prod(shape))
        offset += 4 * math.prod(shape)
    if offset != size:
        raise ExportError(path, "size", "%d bytes, but %d by the header" % (size, offset),
                          "not a .bin of llama2.c, or cut short")
    found.pop("-", None)
    return name_llama(model, found, True, tied)


def with_bias(ours, theirs, shape):
    return [(ours, theirs + ".weight", shape),
            (ours + "_bias", theirs + ".bias", shape.split()[0])]


def read_bert(source, config, found, head_name):
    """BERT with the heads that its tensors make up, whatever `architectures` says."""
    config.require("hidden_act", "gelu")
    config.require("position_embedding_type", "absolute")
    config.require("is_decoder", False)
    config.require("add_cross_attention", False)
    config.require("pruned_heads", {})
    dim, heads = config.count("hidden_size"), config.count("num_attention_heads")
    model = Model(
        "bert", source, dim=dim, hidden=config.count("intermediate_size"), n_heads=heads,
        n_kv_heads=heads, n_layers=config.count("num_hidden_layers"), rope_pairs=0,
        vocab_size=config.count("vocab_size"), max_length=config.count("max_position_embeddings"),
        n_segments=config.count("type_vocab_size"), head_dim=head_size(config.path, dim, heads),
        rope_theta=0.0, norm_eps=config.real("layer_norm_eps", 1e-12, 1))
    found = plain_bert_names(found, model)
    wanted = [("embed", "embeddings.word_embeddings.weight", "vocab_size dim"),
              ("positions", "embeddings.position_embeddings.weight", "max_length dim"),
              ("segments", "embeddings.token_type_embeddings.weight", "n_segments dim")]
    wanted += with_bias("embed_norm", "embeddings.LayerNorm", "dim")
    for i in model.layers(found):
        for ours, theirs, shape in BERT_LAYER:
            wanted += with_bias("layers.%d.%s" % (i, ours), "encoder.layer.%d.%s" % (i, theirs),
                                shape)
    parts = {name.split(".")[0] for name in found} | {name.split(".")[1] for name in found
                                                     if name.startswith("cls.")}
    if "pooler" in parts:
        wanted += with_bias("pooler", "pooler.dense", "dim dim")
    if "predictions" in parts:
        wanted += masked_head(found, config)
    if "classifier" in parts:
        wanted += classifier_head(model, config, found, head_name)
    if "seq_relationship" in parts:
        note("%s: the next-sentence head (cls.seq_relationship) is left out" % source)
        for name in NEXT_SENTENCE:
            found.pop(name, None)
    model.take(found, wanted)
    return model


def plain_bert_names(found, model):
    """Names without the `bert.` prefix, and LayerNorm's gamma and beta under today's names."""
    plain = {}
    for name, stored in found.items():
        name = name[5:] if name.startswith("bert.") else name
        name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
        name = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
        if name in plain:
            raise model.wrong("tensor %s" % name[:200], "there twice, under two names")
        plain[name] = stored
    return plain


def masked_head(found, config):
    """The tensors of the masked-LM head; its decoder usually is the embedding."""
    bias, copy = "cls.predictions.bias", "cls.predictions.decoder.bias"
    if copy in found and (bias not in found or same_bytes(found[bias], found[copy])):
        found[bias] = found.pop(copy)
    wanted = with_bias("mlm", "cls.predictions.transform.dense", "dim dim")
    wanted += with_bias("mlm_norm", "cls.predictions.transform.LayerNorm", "dim")
    wanted.append(("mlm_out_bias", bias, "vocab_size"))
    decoder, embed = "cls.predictions.decoder.weight", "embeddings.word_embeddings.weight"
    if untie(found, decoder, embed, config.require("tie_word_embeddings", True, False)):
        wanted.append(("mlm_out", decoder, "vocab_size dim"))
    return wanted


def classifier_head(model, config, found, name):
    """The tensors of a sequence classifier or regression; its labels go into the meta lines."""
    weight = found.get("classifier.weight")
    rows = weight.shape[0] if weight and weight.shape else 0
    if rows > 1 << 16:
        raise config.wrong("classifier", "%d labels" % rows)
    other = re.search("BertFor(TokenClassification|MultipleChoice)",
                      json.dumps(config.get("architectures")))
    if other or "pooler.dense.weight" not in found:
        raise config.wrong("classifier", "of %s, not of whole sequences"
                           % (other.group() if other else "single tokens (there is no pooler)"))
    labels = config.get("id2label")
    if labels is None and config.count("num_labels", 2) == rows:
        labels = {str(i): "LABEL_%d" % i for i in range(rows)}
    if not isinstance(labels, dict) or labels.keys() != {str(i) for i in range(rows)}:
        raise config.wrong("id2label", "does not number the %d rows of classifier.weight" % rows,
                           "complete it: {\"0\": \"first label\", ...}")
    texts = [labels[str(i)] for i in range(rows)]
    if not all(isinstance(text, str) and text.isprintable() and "|" not in text for text in texts):
        raise config.wrong("id2label", "a label with | or a line break in it", "rename it")
    problem = config.require("problem_type", "", "regression", "single_label_classification")
    if name is None:
        name = config.get("finetuning_task")
        name = name if is_head_name(name) else "classifier"
    regress = rows == 1 or problem == "regression"
    model.meta += [("head.%s.labels" % name, "|".join(texts)),
                   ("head.%s.kind" % name, "regress" if regress else "classify")]
    return [("heads.%s.weight" % name, "classifier.weight", "%d dim" % rows),
            ("heads.%s.bias" % name, "classifier.bias", "%d" % rows)]


def is_head_name(name):
    return isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_.-]{1,40}", name) is not None


def read_folder(source, head_name):
    """A Hugging Face folder, by its model_type."""
    path = os.path.join(source, "config.json")
    config = Config(path, read_json(path))
    if config.get("quantization_config") is not None:
        raise config.wrong("quantization_config", "quantised weights are not supported",
                           "export the original; painters --quantize makes 8-bit files")
    if config.require("model_type", None, "llama", "bert") == "llama":
        return read_llama(source, config, read_weights(source))
    if config.get("model_type") is None:
        raise config.wrong("model_type", "missing", "add \"model_type\": \"llama\" or \"bert\"")
    return read_bert(source, config, read_weights(source), head_name)


def add_head(model, name, folder):
    """Adds the classifier of another folder, whose encoder must be the same to the byte."""
    other = read_folder(folder, name)
    theirs, mine = ({ours: stored for ours, stored in each.tensors
                     if not ours.startswith(("heads.", "mlm"))} for each in (other, model))
    head = [(ours, stored) for ours, stored in other.tensors if ours.startswith("heads.")]
    if not head:
        raise other.wrong("classifier", "none in this folder", "name a fine-tuned model")
    if other.arch != model.arch or other.sizes != model.sizes or theirs.keys() != mine.keys():
        raise other.wrong("encoder", "not of the same shape as that of %s" % model.source,
                          "export it into a file of its own")
    for ours, stored in theirs.items():
        if not same_bytes(stored, mine[ours]):
            raise other.wrong("tensor %s" % ours, "differs from that of %s" % model.source,
                              "export it into a file of its own")
    if dict(head).keys() & dict(model.tensors).keys():
        raise other.wrong("--head", "two heads are called %s" % name, "name them apart")
    model.tensors += head
    model.meta += other.meta


def read_source(source, head_name=None, context=None):
    """Any source of a model, told by what is there."""
    if os.path.isfile(os.path.join(source, "config.json")):
        return read_folder(source, head_name)
    if os.path.isfile(os.path.join(source, "params.json")):
        return read_meta(source, context)
    if os.path.isfile(source):
        return read_llama2c(source)
    raise ExportError(source, "source", "neither a folder with config.json or params.json nor a"
                      " file", "name a checkpoint")


# --------------------------------------------------------------------------------------------------
# Model -> file
# --------------------------------------------------------------------------------------------------

ARCH_NUMBERS = {"llama": 1, "bert": 2}
HEADER = struct.Struct("<8sIIQQIIQQQ9I2fI5i3IQQ32x")
ENTRY = struct.Struct("<56sIIQQQQ")
SIZE_FIELDS = ("dim", "hidden", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_length",
               "n_segments", "rope_pairs", "rope_theta", "norm_eps")


def aligned(n):
    return (n + 63) // 64 * 64


def build_header(model, tokenizer):
    """The header with its checksum, padded; the offset of each tensor; the size of the file."""
    meta = "".join("%s\t%s\n" % pair for pair in model.meta).encode("utf-8")
    tokenizer_at = HEADER.size + ENTRY.size * len(model.tensors)
    meta_at = tokenizer_at + len(tokenizer.section)
    header_bytes = aligned(meta_at + len(meta))
    table, offsets, end = b"", [], header_bytes
    for name, stored in model.tensors:
        rows, cols = stored.shape if len(stored.shape) == 2 else (1,) + stored.shape
        table += ENTRY.pack(name.encode("ascii"), TYPE_NUMBERS[stored.type], len(stored.shape),
                            rows, cols, end, stored.bytes)
        offsets.append(end)
        end = aligned(end + stored.bytes)
    rest = (table + tokenizer.section + meta).ljust(header_bytes - HEADER.size, b"\0")

    def start(checksum):
        return HEADER.pack(
            b"PAINTERS", 1, ARCH_NUMBERS[model.arch], end, header_bytes, checksum,
            len(model.tensors), HEADER.size, tokenizer_at, len(tokenizer.section),
            *(model.sizes[name] for name in SIZE_FIELDS), tokenizer.kind, tokenizer.bos,
            tokenizer.eos, tokenizer.unk, tokenizer.pad, tokenizer.mask, tokenizer.flags,
            model.sizes["head_dim"], 0, meta_at, len(meta))

    return start(zlib.crc32(start(0) + rest)) + rest, offsets, end


class Progress:
    """A line on a terminal that says how far and how long; nothing elsewhere."""

    def __init__(self, total):
        self.total, self.done, self.start, self.shown = total, 0, time.monotonic(), 0.0

    def add(self, count):
        self.done += count
        now = time.monotonic()
        if now - self.shown > 0.2 and sys.stderr and sys.stderr.isatty():
            self.shown = now
            left = (now - self.start) * (self.total - self.done) / self.done
            sys.stderr.write("\rexport.py: %3d%%, %.1f of %.1f GB, %d s left \033[K" % (
                100 * self.done // self.total, self.done / 1e9, self.total / 1e9, left + 1))
            sys.stderr.flush()

    def seconds(self):
        """Ends the line; returns the time since the start."""
        if self.shown:
            sys.stderr.write("\r\033[K")
        return time.monotonic() - self.start


def copy_tensor(out, stored, progress):
    for data in chunks(stored):
        out.write(data)
        progress.add(len(data))


@contextlib.contextmanager
def replacing(path):
    """A file to write under a temporary name beside `path`; takes its place if all went well, and
    is removed otherwise, also when a signal ends the program."""
    path = os.path.realpath(path)
    if os.path.exists(path) and not os.path.isfile(path):
        raise ExportError(path, "output", "there, and not a plain file", "choose another name")
    temporary = "%s.tmp.%d" % (path, os.getpid())
    if os.path.lexists(temporary):
        raise ExportError(temporary, "output", "left over, or in use", "remove it")
    try:
        with open(temporary, "xb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename not in (None, temporary):
            raise
        raise ExportError(path, "output", error.strerror or str(error), "nothing was written")
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def write_model(path, model, tokenizer):
    """Writes the model file; returns its size and the seconds it took."""
    for source in {stored.path for _, stored in model.tensors}:
        refuse_overlaps([pair for pair in model.tensors if pair[1].path == source], source)
        if os.path.exists(path) and os.path.samefile(path, source):
            raise ExportError(path, "output", "is the source itself", "choose another name")
    header, offsets, end = build_header(model, tokenizer)
    progress = Progress(sum(stored.bytes for _, stored in model.tensors))
    with replacing(path) as out:
        out.write(header)
        for (_, stored), offset in zip(model.tensors, offsets):
            out.write(b"\0" * (offset - out.tell()))
            copy_tensor(out, stored, progress)
        out.write(b"\0" * (end - out.tell()))
    return end, progress.seconds()


# --------------------------------------------------------------------------------------------------
# Tokenizers: tokenizer.model, tokenizer.json, vocab.txt or llama2.c's tokenizer.bin -> one section
# --------------------------------------------------------------------------------------------------
#
# Llama: SentencePiece BPE with byte fallback, a space put before the text and no other
# normalisation. BERT: WordPiece behind BertNormalizer. Whatever would tokenize otherwise is refused
# by name. Where a folder holds several files, tokenizer.model comes before tokenizer.json, and
# tokenizer.json before vocab.txt, for it alone says how text is cleaned.

NO_TOKENIZER, SENTENCEPIECE, WORDPIECE = range(3)
NORMAL, UNKNOWN, CONTROL, VERBATIM, UNUSED, BYTE = range(1, 7)     # sentencepiece's token types
SPACE = "\u2581"                        # sentencepiece's visible space
TOKENIZER_FILE = 64 << 20               # the largest one believed, in bytes
LONGEST_TOKEN = 1000                    # characters
MOST_PADDING = 1024                     # rows of a vocabulary that may have no token
BERT_NAMES = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]",
              "cls_token": "[CLS]", "mask_token": "[MASK]"}

Token = collections.namedtuple("Token", "text score type")
Tokenizer = collections.namedtuple("Tokenizer", "kind section bos eos unk pad mask flags meta")


def refuse(path, place, fault, mend="only SentencePiece BPE and BERT's WordPiece are supported"):
    raise ExportError(path, place, one_line(fault)[:300], mend)


def read_tokenizer(source, file, arch, vocab_size):
    """The tokenizer of a checkpoint (folder or llama2.c .bin), or the one in `file`."""
    path = file or find_tokenizer(source, arch)
    if path is None:
        note("%s: no tokenizer found: the model will work on token ids only" % source)
        return Tokenizer(NO_TOKENIZER, b"", -1, -1, -1, -1, -1, 0, [])
    name = os.path.basename(path)
    readers = {"json": (read_llama_json, read_bert_json), "txt": (None, read_vocab),
               "model": (read_sentencepiece, None), "bin": (read_llama2c_tokenizer, None)}
    reader = readers.get(name.rpartition(".")[2], (None, None))[arch == "bert"]
    if reader is None:
        refuse(path, "name", "not a tokenizer for %s" % arch, "give tokenizer.json or vocab.txt"
               if arch == "bert" else "give tokenizer.model, tokenizer.json or tokenizer.bin")
    tokens, result = reader(path)
    if len(tokens) > vocab_size or (name.endswith(".bin") and len(tokens) < vocab_size):
        refuse(path, "size", "%d tokens, but the model's vocabulary has %d" % (
            len(tokens), vocab_size), "give the model's own tokenizer")
    return result._replace(section=b"".join([struct.pack("<I", len(tokens))] + [
        struct.pack("<fII", token.score, token.type, len(token.text)) + token.text
        for token in tokens] + [result.section]))


def check_padding(out, tokenizer, vocab_size):
    """Vocabularies are padded to round numbers; a larger gap is another model's tokenizer."""
    count = struct.unpack_from("<I", tokenizer.section)[0]
    if vocab_size - count > min(MOST_PADDING, vocab_size // 4):
        refuse(out, "tokenizer", "%d tokens, but the model's vocabulary has %d" % (
            count, vocab_size), "give the model's own with --tokenizer")
    if count < vocab_size:
        note("%s: tokenizer: %d tokens; the other %d rows of the model's vocabulary are taken for"
             " padding" % (out, count, vocab_size - count))


def find_tokenizer(source, arch):
    """The path of the tokenizer beside a checkpoint, or None."""
    folders = [source] if os.path.isdir(source) else [os.path.dirname(source) or "."]
    names = ["tokenizer.json", "vocab.txt"] if arch == "bert" else ["tokenizer.bin"]
    if arch != "bert" and os.path.isdir(source):
        names = ["tokenizer.model", "tokenizer.json"]
        if os.path.exists(os.path.join(source, "params.json")):
            folders.append(os.path.join(source, os.pardir))     # where Meta's download puts it
    paths = [os.path.join(folder, name) for folder in folders for name in names]
    return next((path for path in paths if os.path.isfile(path)), None)


# Llama --------------------------------------------------------------------------------------------

def protobuf(data, path, place):
    """The fields of a protobuf message as (number, value): an int, or bytes."""
    at = 0

    def varint():
        nonlocal at
        value = shift = 0
        while at < len(data) and shift < 70:
            value |= (data[at] & 127) << shift
            at, shift = at + 1, shift + 7
            if data[at - 1] < 128:
                return value & (1 << 64) - 1
        return refuse(path, "%s, byte %d" % (place, at), "broken number", "fetch the file again")

    while at < len(data):
        key = varint()
        wire, start = key & 7, at
        if wire == 0:
            yield key >> 3, varint()
            continue
        size = varint() if wire == 2 else {1: 8, 5: 4}.get(wire)
        if size is None or key >> 3 == 0 or size > len(data) - at:
            refuse(path, "%s, byte %d" % (place, start), "broken field", "fetch the file again")
        at += size
        yield key >> 3, data[at - size:at]


def typed(message, number, default, path, place):
    """The last value of a field, of the default's type: numbers are ints, strings bytes."""
    value = dict(message).get(number, default)
    if not isinstance(value, type(default)):
        refuse(path, place, "field %d is of another type" % number, "fetch the file again")
    return value


def signed(number):
    return (number & 0xFFFFFFFF ^ 0x80000000) - 0x80000000


def read_sentencepiece(path):
    """sentencepiece's tokenizer.model, a protobuf."""
    tokens, trainer, normalizer, denormalizer = [], [], [], []
    for number, value in protobuf(read_bytes(path, TOKENIZER_FILE), path, "model"):
        if number > 5 or not isinstance(value, bytes):
            continue
        place = "piece %d" % len(tokens) if number == 1 else "settings"
        message = list(protobuf(value, path, place))
        if number == 1:
            score = typed(message, 2, b"\0\0\0\0", path, place)
            if len(score) != 4:
                refuse(path, place, "a score of %d bytes" % len(score), "fetch the file again")
            tokens.append(Token(typed(message, 1, b"", path, place),
                                struct.unpack("<f", score)[0], typed(message, 3, 1, path, place)))
        elif number != 4:
            {2: trainer, 3: normalizer, 5: denormalizer}[number].extend(message)
    settings = [(trainer, 3, 1, 2, "model_type"), (trainer, 35, 0, 1, "byte_fallback"),
                (trainer, 24, 0, 0, "treat_whitespace_as_suffix"),
                (normalizer, 3, 1, 1, "add_dummy_prefix"), (normalizer, 5, 1, 1, "escape_whitespaces"),
                (normalizer, 4, 1, 0, "remove_extra_whitespaces"),
                (normalizer, 2, b"", b"", "precompiled_charsmap"),
                (denormalizer, 2, b"", b"", "denormalizer's precompiled_charsmap")]
    if not tokens:
        refuse(path, "pieces", "none found", "is it a SentencePiece model?")
    for message, number, default, needed, name in settings:
        value = typed(message, number, default, path, name)
        if value != needed:
            refuse(path, name, "%.30r, where Llama's tokenizer has %r" % (value, needed))
    check_pieces(tokens, path)
    ids = {}
    for name, number, default in ("unk", 40, 0), ("bos", 41, 1), ("eos", 42, 2), ("pad", 43, -1):
        ids[name] = signed(typed(trainer, number, default, path, name + "_id"))
        if not -1 <= ids[name] < len(tokens):
            refuse(path, name + "_id", "token %d of %d" % (ids[name], len(tokens)),
                   "fetch the file again")
    return tokens, Tokenizer(SENTENCEPIECE, b"", mask=-1, flags=0, meta=[], **ids)


def check_pieces(tokens, path):
    """Refuses a list of pieces that sentencepiece would refuse or that could not be told apart."""
    seen = {}
    for i, (text, score, kind) in enumerate(tokens):
        place, again = "piece %d" % i, "fetch the file again"
        try:
            characters = len(text.decode())
        except UnicodeDecodeError:
            refuse(path, place, "not UTF-8", again)
        if not 0 < characters <= LONGEST_TOKEN:
            refuse(path, place, "%d characters long" % characters, again)
        if seen.setdefault(text, i) != i:
            refuse(path, place, "the same text as piece %d" % seen[text], again)
        if not math.isfinite(score):
            refuse(path, place, "its score is not a number", again)
        if kind not in (NORMAL, UNKNOWN, CONTROL, VERBATIM, BYTE):
            refuse(path, place, "type %d (%s)" % (kind, "unused" if kind == UNUSED else "unknown"))
        if kind == CONTROL and characters == 1:
            refuse(path, place, "a control token of one character")
        if kind == VERBATIM and len(text) > 255:
            refuse(path, place, "a user-defined token of more than 255 bytes")
    kinds = [token.type for token in tokens]
    missing = [name for name in BYTE_TOKENS
               if name not in seen or tokens[seen[name]].type != BYTE]
    if kinds.count(UNKNOWN) != 1 or missing or kinds.count(BYTE) != 256:
        refuse(path, "pieces", "%d unknown tokens, %d of 256 byte tokens missing" % (
            kinds.count(UNKNOWN), len(missing)))


BYTE_TOKENS = [b"<0x%02X>" % i for i in range(256)]


def read_llama2c_tokenizer(path):
    """llama2.c's tokenizer.bin: the longest length, then score, length and text of each token."""
    data, tokens, at = read_bytes(path, TOKENIZER_FILE), [], 4
    while at < len(data):
        score, size = struct.unpack_from("<fi", data, at) if at + 8 <= len(data) else (0, -1)
        if not 0 <= size <= len(data) - at - 8:
            refuse(path, "byte %d" % at, "the file ends inside token %d" % len(tokens),
                   "fetch the file again")
        text = data[at + 8:at + 8 + size]
        kind = {0: UNKNOWN, 1: CONTROL, 2: CONTROL}.get(len(tokens), NORMAL)
        if 3 <= len(tokens) < 259:
            kind = BYTE
        # llama2.c writes spaces as such, and line breaks around <s> and </s>
        text = text.strip(b"\n") if kind == CONTROL else text.replace(b" ", SPACE.encode())
        tokens.append(Token(text, score, kind))
        at += 8 + size
    check_pieces(tokens, path)
    return tokens, Tokenizer(SENTENCEPIECE, b"", 1, 2, 0, -1, -1, 0, [])


def section(values, key, path, kind=dict):
    """values[key] if it is of that type; null and absent are an empty one."""
    value = values.get(key)
    value = kind() if value is None else value
    if not isinstance(value, kind):
        refuse(path, key, "not a %s" % kind.__name__, "fetch the file again")
    return value


def demand(values, place, path, **needed):
    """Refuses settings other than the ones given as name=(allowed, ...)."""
    for key, allowed in needed.items():
        if not any(type(values.get(key)) is type(a) and values.get(key) == a for a in allowed):
            refuse(path, place, "%s is %.100s" % (key, json.dumps(values.get(key))))


def read_json_tokenizer(path):
    """The parts that every tokenizer.json has: the file, its model, its texts by id (str), how
    many of them are in the model's vocabulary, and its added tokens as {id: settings}."""
    whole = read_json(path, TOKENIZER_FILE)
    model = section(whole, "model", path)
    vocabulary, added = section(model, "vocab", path), {}
    if not all(type(i) is int for i in vocabulary.values()):
        refuse(path, "vocab", "an id that is not a whole number", "fetch the file again")
    texts = {i: text for text, i in vocabulary.items()}
    for token in section(whole, "added_tokens", path, list):
        if not isinstance(token, dict) or type(token.get("id")) is not int \
                or not isinstance(token.get("content"), str):
            refuse(path, "added_tokens", "one without id or content", "fetch the file again")
        added[token["id"]] = token
        if texts.setdefault(token["id"], token["content"]) != token["content"]:
            refuse(path, "added_tokens", "id %d is two tokens" % token["id"],
                   "fetch the file again")
    if not vocabulary or set(texts) != set(range(len(texts))) or len(vocabulary) > len(texts):
        refuse(path, "vocab", "the ids are not 0, 1, 2 and so on", "fetch the file again")
    try:
        encoded = [texts[i].encode() for i in range(len(texts))]
    except UnicodeEncodeError:
        refuse(path, "vocab", "a token with half of a surrogate pair", "fetch the file again")
    return whole, model, encoded, set(vocabulary.values()), added


def read_llama_json(path):
    """Hugging Face's form of a Llama 2 tokenizer: scores are recovered from the order of merges."""
    whole, model, texts, own, added = read_json_tokenizer(path)
    demand(model, "model", path, type=("BPE",), byte_fallback=(True,), dropout=(None, 0.0),
           continuing_subword_prefix=(None, ""), end_of_word_suffix=(None, ""),
           ignore_merges=(None, False))
    steps = section(whole, "normalizer", path)
    steps = section(steps, "normalizers", path, list) if steps.get("type") == "Sequence" else [steps]
    before = section(whole, "pre_tokenizer", path)
    prefixed = steps == [{"type": "Prepend", "prepend": SPACE}, {
        "type": "Replace", "pattern": {"String": " "}, "content": SPACE}] and not before
    if not prefixed and (steps != [{}] or before.get("type") != "Metaspace"):
        refuse(path, "normalizer, pre_tokenizer", "%s with %s" % (
            json.dumps(steps), json.dumps(before)))
    if not prefixed:
        demand(before, "pre_tokenizer", path, replacement=(SPACE,), split=(False,),
               prepend_scheme=("first", "always", None), add_prefix_space=(None, True))
    names, kinds = special_names(path, {"unk_token": "<unk>", "bos_token": "<s>",
                                        "eos_token": "</s>"}), {}
    unknown = model.get("unk_token") or names["unk_token"]
    for i, text in enumerate(texts):
        kinds[i] = UNKNOWN if text.decode() == unknown else BYTE if text in BYTE_TOKENS \
            else CONTROL if i in added else NORMAL
        if i in added and added[i].get("special") is not True:
            refuse(path, "added_tokens", "%s is not special" % texts[i].decode(),
                   "give the model's tokenizer.model instead")
    normal = {texts[i].decode() for i in kinds if kinds[i] == NORMAL}
    scores = scores_of_merges(section(model, "merges", path, list), normal, path)
    tokens = [Token(text, scores.get(text.decode(), 0.0), kinds[i]) for i, text in enumerate(texts)]
    check_pieces(tokens, path)
    unk, bos, eos, pad = special_ids(names, texts, "unk_token", "bos_token", "eos_token", "pad_token")
    return tokens, Tokenizer(SENTENCEPIECE, b"", bos, eos, unk, pad, -1, 0, [])


def scores_of_merges(merges, normal, path):
    """{piece: score} with which sentencepiece merges as this list does: 0, -1, -2, ... in its order.
    That is so only if all ways to merge a piece are there and stand together. Of runs of spaces,
    which have one score in Llama 2's vocabulary, they may stand mixed."""
    scores, pairs, last = {}, set(), ""
    mend = "give the model's tokenizer.model"
    for i, merge in enumerate(merges):
        pair = tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) \
            if isinstance(merge, list) else ()
        if len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            refuse(path, "merges, %d" % i, "not a pair", "fetch the file again")
        piece = pair[0] + pair[1]
        if not normal.issuperset(pair) or piece not in normal:
            refuse(path, "merges, %d" % i, "not of two tokens into a third")
        runs = not (last + piece).strip(SPACE)
        if piece != last and piece in scores and not (runs and scores[piece] == scores[last]):
            refuse(path, "merges, %d" % i, "the merges of %s stand apart: no SentencePiece"
                   " vocabulary merges so" % piece, mend)
        if piece not in scores:
            scores[piece] = scores[last] if last and runs else -float(i)
        pairs.add(pair)
        last = piece
    for piece in normal:
        for k in range(1, min(len(piece), LONGEST_TOKEN)):
            pair = piece[:k], piece[k:]
            if pair not in pairs and all(len(part) == 1 or part in normal for part in pair):
                refuse(path, "merges", "%s + %s is missing: no SentencePiece vocabulary merges so"
                       % pair, mend)
    return scores


# BERT ---------------------------------------------------------------------------------------------

def beside(path, name):
    """The settings in a JSON file next to `path`; {} where there is none."""
    other = os.path.join(os.path.dirname(path), name)
    return read_json(other, TOKENIZER_FILE) if os.path.isfile(other) else {}


def special_names(path, defaults):
    """The names of the special tokens, as the files beside `path` have them."""
    names = dict(defaults)
    for file in "special_tokens_map.json", "tokenizer_config.json":
        for key, value in beside(path, file).items():
            value = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(value, str):
                names[key] = value.encode("utf-8", "replace").decode()
    return names


def special_ids(names, texts, *keys):
    """The ids of the special tokens called names[key], -1 where there is none."""
    ids = {text: i for i, text in enumerate(texts)}
    return [ids.get(names.get(key, "").encode(), -1) for key in keys]


def read_vocab(path):
    """vocab.txt: one token a line. How text is cleaned stands in tokenizer_config.json, or BERT's
    defaults hold: lower-case, without accents, CJK characters apart."""
    try:
        texts = re.split("\r\n|\r|\n", read_bytes(path, TOKENIZER_FILE).decode())
    except UnicodeDecodeError as error:
        refuse(path, "byte %d" % error.start, "not UTF-8", "fetch the file again")
    texts = [text.encode() for text in (texts if texts[-1] else texts[:-1])]
    config, names = beside(path, "tokenizer_config.json"), special_names(path, BERT_NAMES)
    if config.get("do_lower_case") is None and any(re.fullmatch(b"[A-Z][a-z]+", text)
                                                   for text in texts):
        note("%s: the vocabulary looks cased, but no tokenizer_config.json beside it says"
             ' "do_lower_case": false; read as uncased' % path)
    demand(config, "tokenizer_config.json", path, do_basic_tokenize=(None, True),
           never_split=(None, []), do_lower_case=(None, True, False))
    ids = {text: i for i, text in enumerate(texts)}     # the last of equal lines counts
    added = {ids[name.encode()]: {"content": name, "special": True}
             for key, name in names.items() if key in BERT_NAMES and name.encode() in ids}
    for i, token in section(config, "added_tokens_decoder", path).items():
        if not re.fullmatch("[0-9]{1,9}", i) or not isinstance(token, dict) or int(i) >= len(texts) \
                or texts[int(i)] != str(token.get("content")).encode("utf-8", "replace"):
            refuse(path, "tokenizer_config.json", "added token %s is not in the vocabulary" % i,
                   "give tokenizer.json")
        added[int(i)] = token
    if beside(path, "added_tokens.json").keys() - {text.decode() for text in texts}:
        refuse(path, "added_tokens.json", "tokens that are not in the vocabulary",
               "give tokenizer.json")
    return wordpiece(path, texts, set(ids.values()), added, names, {
        "lowercase": config.get("do_lower_case") is not False, "clean_text": True,
        "strip_accents": config.get("strip_accents"),
        "handle_chinese_chars": config.get("tokenize_chinese_chars") is not False})


def read_bert_json(path):
    """Hugging Face's form of a BERT tokenizer."""
    whole, model, texts, own, added = read_json_tokenizer(path)
    demand(model, "model", path, type=("WordPiece",), continuing_subword_prefix=("##",),
           max_input_chars_per_word=(100,))
    cleaning = section(whole, "normalizer", path)
    demand(cleaning, "normalizer", path, type=("BertNormalizer",), clean_text=(True, False),
           handle_chinese_chars=(True, False), lowercase=(True, False))
    demand(section(whole, "pre_tokenizer", path), "pre_tokenizer", path, type=("BertPreTokenizer",))
    config, names = beside(path, "tokenizer_config.json"), special_names(path, BERT_NAMES)
    names["unk_token"] = one_line(model.get("unk_token"))
    for ours, theirs in (("lowercase", "do_lower_case"), ("strip_accents", "strip_accents"),
                         ("handle_chinese_chars", "tokenize_chinese_chars")):
        if config.get(theirs, cleaning.get(ours)) not in (None, cleaning.get(ours)):
            refuse(path, "normalizer", "%s is %s, but tokenizer_config.json says %s" % (
                ours, cleaning.get(ours), config.get(theirs)), "correct the one that is wrong")
    return wordpiece(path, texts, own, added, names, cleaning)


def wordpiece(path, texts, own, added, names, cleaning):
    """Tokens, of which the ids `own` are the vocabulary and those in `added` are taken verbatim."""
    for i, token in added.items():
        demand(token, "added token %d" % i, path, single_word=(None, False), lstrip=(None, False),
               rstrip=(None, False), normalized=(None, False))
    demand(cleaning, "strip_accents", path, strip_accents=(None, True, False))
    tokens = [Token(text, 0.0, NORMAL if i not in added else CONTROL if i in own else VERBATIM)
              for i, text in enumerate(texts)]
    for i, token in enumerate(tokens):
        if not (i in added) <= len(token.text) <= (255 if i in added else 4 * LONGEST_TOKEN):
            refuse(path, "token %d" % i, "%d bytes long" % len(token.text), "fetch the file again")
    unk, bos, eos, pad, mask = special_ids(names, texts, "unk_token", "cls_token", "sep_token",
                                           "pad_token", "mask_token")
    if unk < 0:
        refuse(path, "vocabulary", "%s is not in it" % names["unk_token"], "give the right file")
    return tokens, Tokenizer(WORDPIECE, unicode_section(cleaning), bos, eos, unk, pad, mask,
                             int(cleaning["lowercase"]),
                             [("unicode", unicodedata.unidata_version)])


# What BertNormalizer and BertPreTokenizer do to each code point, as one table of ranges. A range is
# u32 first code point | rule << 24, i32 value, and reaches to the next; painters.c says what the
# rules mean. Canonical reordering needs a rule of its own only where marks stay, that is, for the
# few spacing marks (Mc) with a combining class; all others are gone as accents by then.
LETTER, GONE, BLANK, ALONE, BARRIER, COMBINING, STRING, HANGUL = range(8)
CJK = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F),
       (0x2B740, 0x2B81F), (0x2B920, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F))
# Code points whose category has changed since Unicode 8, which Hugging Face's tables are of.
CATEGORIES = {0x166D: "Po", 0x1734: "Mn", 0x1885: "Lo", 0x1886: "Lo", 0xA9BD: "Mc", 0x111C9: "Po"}


def category(character):
    return CATEGORIES.get(ord(character)) or unicodedata.category(character)


def unicode_rule(code, lower, strip, cleaning):
    """What becomes of a code point: (rule, value), value a string under STRING."""
    text = chr(code)
    kind = category(text)
    if kind == "Cn" or kind == "Cs":
        return LETTER, 0
    blank = kind[0] == "Z" or text in "\t\n\r"
    if cleaning["clean_text"] and not blank and (kind[0] == "C" or code == 0xFFFD):
        return GONE, 0
    if blank or text in "\v\f\x85":
        return BLANK, 0
    if strip:
        if 0xAC00 <= code <= 0xD7A3:
            return HANGUL, 0
        parts = unicodedata.normalize("NFD", text)
        text = "".join(c for c in parts if category(c) != "Mn")
        if not text:
            return (GONE if all(map(unicodedata.combining, parts)) else BARRIER), 0
        if unicodedata.combining(text[0]):
            return COMBINING, unicodedata.combining(text)
    if lower:
        text = "".join(c.lower() for c in text)
    if len(text) > 1:
        return STRING, text
    mark = text.isascii() and text.isprintable() and not text.isalnum() or category(text)[0] == "P"
    ideograph = cleaning["handle_chinese_chars"] and any(a <= code <= b for a, b in CJK)
    return (ALONE if mark or ideograph else LETTER), ord(text) - code


def unicode_section(cleaning):
    """The Unicode table of a WordPiece section, as bytes."""
    lower = cleaning["lowercase"]
    strip = lower if cleaning.get("strip_accents") is None else cleaning["strip_accents"]
    ranges, strings, places, last = [], [], {}, None
    for code in range(0x110000):
        rule, value = unicode_rule(code, lower, strip, cleaning)
        if rule == STRING and value not in places:
            places[value] = len(strings)
            strings += [len(value)] + [ord(c) for c in value]
        if (rule, value) != last:
            last = rule, value
            ranges.append(struct.pack("<Ii", code | rule << 24, places.get(value, value)))
    return struct.pack("<II", len(ranges), len(strings)) + b"".join(ranges) \
        + struct.pack("<%dI" % len(strings), *strings)


# --------------------------------------------------------------------------------------------------
# Tasks: official benchmark files -> task files
#
# A Llama task turns a row into an Item, the prompts and answers lm-evaluation-harness (commit
# 262f879) would build from it. A GLUE task names its columns. A row that is not as the official
# file has it is an error that names file and line.
# --------------------------------------------------------------------------------------------------
Item = collections.namedtuple("Item", "gold prompts answers")   # one of the two lists is a choice


def field(row, name, kind):
    """row[name], which must be of this type."""
    if not isinstance(row, dict):
        raise ValueError("expected an object with a field %r" % name)
    if name not in row:
        raise ValueError("there is no field %r" % name)
    if not isinstance(row[name], kind) or isinstance(row[name], bool):
        raise ValueError("field %r is not of type %s" % (name, kind.__name__))
    return row[name]


def arc_item(row):
    """Labels run from A or from 1; three to five choices."""
    question, key = field(row, "question", dict), field(row, "answerKey", str)
    choices = field(question, "choices", list)
    labels = [field(choice, "label", str) for choice in choices]
    if labels.count(key) != 1:
        raise ValueError("answerKey %r does not name one of the choices %s" % (key, labels))
    prompt = "Question: %s\nAnswer:" % field(question, "stem", str)
    return Item(labels.index(key), [prompt], [field(choice, "text", str) for choice in choices])


def hellaswag_clean(text):
    """Takes out what WikiHow's markup left behind; double spaces in one pass, as the harness."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def hellaswag_item(row):
    """str.capitalize() lowers all letters but the first."""
    context = field(row, "ctx_a", str) + " " + field(row, "ctx_b", str).capitalize()
    label, endings = field(row, "label", int), field(row, "endings", list)
    if not all(isinstance(ending, str) for ending in endings):
        raise ValueError("field 'endings' is not a list of texts")
    return Item(label, [hellaswag_clean(field(row, "activity_label", str) + ": " + context)],
                [hellaswag_clean(ending) for ending in endings])


def winogrande_item(row):
    """The options complete the context; what follows the blank is scored."""
    sentence, answer = field(row, "sentence", str), field(row, "answer", str)
    if "_" not in sentence:
        raise ValueError("the sentence has no blank '_'")
    if answer not in ("1", "2"):
        raise ValueError("answer is %r, not '1' or '2'" % answer)
    before, after = sentence.split("_", 1)
    options = [field(row, "option1", str), field(row, "option2", str)]
    return Item(int(answer) - 1, [before + option for option in options], [after.strip()])


def lambada_item(row):
    """The last word is what follows the last space."""
    context, _, word = field(row, "text", str).rpartition(" ")
    return Item(None, [context], [word])


def gsm8k_item(row):
    answer = field(row, "answer", str)
    if "#### " not in answer:
        raise ValueError("the answer has no '#### ' before its number")
    return Item(None, ["Question: %s\nAnswer:" % field(row, "question", str)], [answer])


# A new task is a row here. kind and metrics: as in the task file, the first metric is the summary
# score. counts: items of the official files (evaluated split, train). extra: the harness draws one
# few-shot example more than it uses where a task has no test split. joint: what stands between
# prompt and answer of an example; LAMBADA's answer brings a space of its own.
LlamaTask = collections.namedtuple("LlamaTask", "kind metrics counts item extra joint options")
STOPS = r"Question:|</s>|<\|im_end\|>"      # a bar within a stop text is escaped
LLAMA_TASKS = {
    "arc_challenge": LlamaTask("choice", "acc_norm,acc", (1172, 1119), arc_item, 0, " ", ()),
    "arc_easy": LlamaTask("choice", "acc_norm,acc", (2376, 2251), arc_item, 0, " ", ()),
    "hellaswag": LlamaTask("choice", "acc_norm,acc", (10042, 39905), hellaswag_item, 1, " ", ()),
    "winogrande": LlamaTask("contexts", "acc", (1267, 40398), winogrande_item, 1, " ", ()),
    "lambada_openai": LlamaTask("lastword", "acc,perplexity", (5153,), lambada_item, 0, "  ", ()),
    "gsm8k": LlamaTask("generate", "strict,flexible", (1319, 7473), gsm8k_item, 0, " ",
                       ("stop=" + STOPS, "max_tokens=256")),
}

# GLUE. header: the columns of a file that does not name them. labels: names in the order of Hugging
# Face's ids, empty for a score; written: whether the file holds the names or the ids. ragged: the
# official train file has rows with columns missing, which everybody leaves out, and empty texts.
GlueTask = collections.namedtuple(
    "GlueTask", "metrics counts header label texts labels written ragged")
ENTAILMENT = ("entailment", "not_entailment")
PAIR = ("sentence1", "sentence2")
GLUE_TASKS = {
    "cola": GlueTask("matthews", (1043, 8551), ("source", "label", "mark", "sentence"), "label",
                     ("sentence",), ("unacceptable", "acceptable"), False, False),
    "mrpc": GlueTask("acc,f1", (408, 3668), None, "Quality", ("#1 String", "#2 String"),
                     ("not_equivalent", "equivalent"), False, False),
    "qnli": GlueTask("acc", (5463, 104743), None, "label", ("question", "sentence"), ENTAILMENT,
                     True, False),
    "qqp": GlueTask("acc,f1", (40430, 363846), None, "is_duplicate", ("question1", "question2"),
                    ("not_duplicate", "duplicate"), False, True),
    "rte": GlueTask("acc", (277, 2490), None, "label", PAIR, ENTAILMENT, True, False),
    "sst2": GlueTask("acc", (872, 67349), None, "label", ("sentence",), ("negative", "positive"),
                     False, False),
    "stsb": GlueTask("pearson,spearman", (1500, 5749), None, "score", PAIR, (), False, False),
    "wnli": GlueTask("acc", (71, 635), None, "label", PAIR, ("not_entailment", "entailment"),
                     False, False),
    "mnli": GlueTask("acc", (9815, 392702), None, "gold_label", PAIR,
                     ("entailment", "neutral", "contradiction"), True, False),
}
GLUE_TASKS["mnli_mm"] = GLUE_TASKS["mnli"]._replace(counts=(9832, 392702))


def read_lines(path):
    """(line number, bytes) for every line of a file. A BOM and CRLF are accepted; only a newline
    ends a line, so that other separators of Unicode stay within their field."""
    with open(path, "rb") as file:
        lines = file.read().split(b"\n")
    if not lines[-1]:
        lines.pop()
    for number, line in enumerate(lines, 1):
        if number == 1 and line.startswith(b"\xef\xbb\xbf"):
            line = line[3:]
        yield number, line[:-1] if line.endswith(b"\r") else line


def convert(path, name, rows, build):
    """[build(row)] for (line number, row) pairs; what build finds wrong gets its line."""
    done, mend = [], "is this the official file of %s?" % name
    for number, row in rows:
        try:
            done.append(build(row))
        except ValueError as error:
            raise ExportError(path, "line %d" % number, error, mend)
    if not done:
        raise ExportError(path, "items", "there are none", mend)
    return done


def check_item(task, item):
    """What holds for all tasks: something to choose from, the answer among it, no empty answer."""
    choices = item.prompts if task.kind == "contexts" else item.answers
    if item.gold is not None and len(choices) < 2:
        raise ValueError("%d choices; there must be two or more" % len(choices))
    if item.gold is not None and not 0 <= item.gold < len(choices):
        raise ValueError("the label %d is not one of %d choices" % (item.gold, len(choices)))
    if not all(item.answers):
        raise ValueError("a text to be scored is empty")
    return item


def read_items(path, name):
    """[(row, Item)] of an official file in JSON lines."""
    task = LLAMA_TASKS[name]
    rows = ((number, parse_json(line, path, "line %d" % number))
            for number, line in read_lines(path))
    return convert(path, name, rows, lambda row: (row, check_item(task, task.item(row))))


def example(task, item):
    """A solved example, as it stands in a few-shot prompt."""
    return (item.prompts[item.gold if len(item.prompts) > 1 else 0] + task.joint
            + item.answers[item.gold if len(item.answers) > 1 else 0])


def prefixes(task, pairs, pool, count, same):
    """The few-shot text before each item: the harness draws from one generator for all documents in
    turn; `same` takes the first examples for every document, as its sampler `first_n`."""
    generator, drawn = random.Random(1234), count + task.extra
    for row, _ in pairs:
        picked = pool[:drawn] if same else generator.sample(pool, drawn)
        picked = [item for other, item in picked if other != row][:count]
        yield "".join(example(task, item) + "\n\n" for item in picked)


def llama_rows(name, args):
    """(options of the header, rows) of a Llama task."""
    task, pairs = LLAMA_TASKS[name], read_items(args.source, name)
    before = [""] * len(pairs)
    if args.fewshot:
        pool = read_items(args.train, name)
        if len(pool) < args.fewshot + task.extra:
            raise ExportError(args.train, "--fewshot", "%d examples are too few for %d"
                              % (len(pool), args.fewshot), "give the whole train file")
        before = prefixes(task, pairs, pool, args.fewshot, args.fewshot_same)
    rows, chance = [], 0.0
    for (_, item), prefix in zip(pairs, before):
        prompts = [prefix + prompt for prompt in item.prompts]
        if task.kind == "choice":
            rows.append([str(item.gold)] + prompts + item.answers)
            chance += 1 / len(item.answers)
        elif task.kind == "contexts":
            rows.append([str(item.gold)] + item.answers + prompts)
            chance += 1 / len(prompts)
        else:
            rows.append(prompts + item.answers)
    return ["kind=" + task.kind, "metrics=" + task.metrics, "chance=%.6g" % (chance / len(rows)),
            *task.options], rows


def split_rows(path, name):
    """(line number, {column: text}) of a GLUE file; tabs part the columns, quotes mean nothing."""
    task, short = GLUE_TASKS[name], []
    header, mend = task.header, "is this the official file of %s?" % name
    for number, line in read_lines(path):
        try:
            columns = line.decode("utf-8").split("\t")
        except UnicodeDecodeError as error:
            raise ExportError(path, "line %d" % number, "byte %d is not UTF-8" % (error.start + 1),
                              "convert the file")
        if header is None:
            header = columns
            missing = {task.label, *task.texts} - set(header)
            if missing:
                raise ExportError(path, "line 1", "no column " + listing(missing), mend)
        elif len(columns) == len(header):
            yield number, dict(zip(header, columns))
        elif task.ragged and len(columns) < len(header):
            short.append(str(number))
        else:
            raise ExportError(path, "line %d" % number, "%d columns where there should be %d"
                              % (len(columns), len(header)), mend)
    if short:
        note("%s: left out %d broken rows, lines %s" % (path, len(short), ", ".join(short)))


def glue_row(task, row):
    """[gold, text] or [gold, text, text]."""
    texts, label = [row[column] for column in task.texts], row[task.label]
    if not all(texts) and not task.ragged:
        raise ValueError("a sentence is empty")
    if task.labels:
        known = list(task.labels) if task.written else [str(i) for i in range(len(task.labels))]
        if label not in known:
            raise ValueError("the label %r is none of %s" % (label, ", ".join(known)))
        return [str(known.index(label))] + texts
    if not re.fullmatch(r"[0-5](\.[0-9]+)?", label) or float(label) > 5:
        raise ValueError("the score %r is not a number from 0 to 5" % label)
    return [label] + texts


def glue_rows(name, args):
    """(options of the header, rows) of a GLUE task. Chance is that of the largest class, where
    the metric gives one any credit."""
    task = GLUE_TASKS[name]
    rows = convert(args.source, name, split_rows(args.source, name),
                   lambda row: glue_row(task, row))
    chance = 0.0
    if task.metrics.startswith("acc"):
        chance = max(collections.Counter(row[0] for row in rows).values()) / len(rows)
    options = ["kind=" + ("classify" if task.labels else "regress"), "metrics=" + task.metrics,
               "chance=%.6g" % chance]
    return options + (["labels=" + "|".join(task.labels)] if task.labels else []), rows


def escape(text):
    for plain, escaped in (("\\", "\\\\"), ("\n", "\\n"), ("\t", "\\t"), ("\r", "\\r")):
        text = text.replace(plain, escaped)
    return text


def write_task(path, header, rows, source):
    with replacing(path) as file:
        file.write("\t".join(header).encode("utf-8") + b"\n")
        for number, row in enumerate(rows, 1):
            line = "\t".join(map(escape, row))
            if re.search("[\0\ud800-\udfff]", line):
                raise ExportError(source, "item %d" % number, "it holds a NUL or half a surrogate "
                                  "pair, which is no text", "mend the item")
            file.write(line.encode("utf-8") + b"\n")


def run_task(args):
    known = {name.replace("_", ""): name for name in [*LLAMA_TASKS, *GLUE_TASKS]}
    other = {"mnlimatched": "mnli", "mnlim": "mnli", "mnlimismatched": "mnli_mm"}
    name = {**known, **other}.get(re.sub("[-_]", "", args.name.lower()))
    if not name:
        raise ExportError(args.name, "task", "there is none of this name",
                          "there are " + ", ".join(known.values()))
    if (args.fewshot > 0) != bool(args.train) or args.fewshot_same and not args.train:
        raise ExportError("command line", name, "--fewshot N and --train FILE go together",
                          "give both or neither")
    if args.fewshot and name in GLUE_TASKS:
        raise ExportError("command line", name, "a GLUE task takes no examples",
                          "leave --fewshot out")
    task = LLAMA_TASKS.get(name) or GLUE_TASKS[name]
    options, rows = (llama_rows if name in LLAMA_TASKS else glue_rows)(name, args)
    write_task(args.out, ["#painters-task", "1", "name=" + name] + options, rows, args.source)
    note("%s: %s, %d items" % (args.out, name, len(rows)))
    if len(rows) not in task.counts:
        note("%s: the official file has %s items, this one %d; is it a part of it?"
             % (args.source, " or ".join(map(str, task.counts)), len(rows)))


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------

SIGNALS = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Parser(argparse.ArgumentParser):
    """Reports a mistake as one line, like every other error."""

    def error(self, message):
        raise ExportError("command line", self.prog.split()[-1], message, "see --help")


def head_option(text):
    name, equals, folder = text.partition("=")
    if not equals or not folder or not is_head_name(name):
        raise argparse.ArgumentTypeError("%r is not NAME=FOLDER" % text)
    return name, folder


def head_name(text):
    if not is_head_name(text):
        raise argparse.ArgumentTypeError("%r: up to 40 letters, digits, . _ -" % text)
    return text


def positive(text):
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError("%r is not a positive number" % text)
    return int(text)


def run_model(args):
    if args.tokenizer and not os.path.isfile(args.tokenizer):
        raise ExportError(args.tokenizer, "--tokenizer", "no such file", "name one")
    model = read_source(args.source, args.head_name, args.context)
    for name, folder in args.head:
        add_head(model, name, folder)
    tokenizer = read_tokenizer(args.source, args.tokenizer, model.arch, model.sizes["vocab_size"])
    if tokenizer.kind != NO_TOKENIZER:
        check_padding(args.out, tokenizer, model.sizes["vocab_size"])
    model.meta[:0] = [("source", one_line(os.path.basename(os.path.abspath(args.source))))]
    model.meta += tokenizer.meta
    size, seconds = write_model(args.out, model, tokenizer)
    note("%s: %s, %d layers, %d tensors, %.1f MB in %.1f s" % (
        args.out, model.arch, model.sizes["n_layers"], len(model.tensors), size / 1e6, seconds))


def command_line():
    parser = Parser(prog="export.py", allow_abbrev=False, description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(metavar="model | task", dest="command")
    model = commands.add_parser("model", allow_abbrev=False, help="write a model file")
    model.add_argument("source", metavar="SOURCE", help="folder, or llama2.c .bin file")
    model.add_argument("out", metavar="OUT.bin")
    model.add_argument("--tokenizer", metavar="FILE", help="tokenizer.model, tokenizer.json,"
                       " vocab.txt or llama2.c's tokenizer.bin; otherwise looked for in SOURCE")
    model.add_argument("--head", metavar="NAME=FOLDER", type=head_option, action="append",
                       default=[], help="add the classifier of another fine-tuned BERT that has the"
                       " same encoder (several may be given)")
    model.add_argument("--head-name", metavar="NAME", type=head_name,
                       help="name of SOURCE's own classifier (finetuning_task, or classifier)")
    model.add_argument("--context", metavar="N", type=positive,
                       help="context length of a Meta folder, which does not tell it (4096)")
    model.set_defaults(run=run_model)
    task = commands.add_parser("task", allow_abbrev=False, help="write a task file")
    task.add_argument("name", metavar="NAME", help=", ".join([*LLAMA_TASKS, *GLUE_TASKS]))
    task.add_argument("source", metavar="SOURCE", help="official file: .jsonl, or GLUE's .tsv")
    task.add_argument("out", metavar="OUT.tsv")
    task.add_argument("--fewshot", metavar="N", type=positive, default=0,
                      help="solved examples before each item, drawn as the harness draws them")
    task.add_argument("--train", metavar="FILE", help="the official file to draw them from")
    task.add_argument("--fewshot-same", action="store_true",
                      help="the first N examples for all items: other prompts, and faster")
    task.set_defaults(run=run_task)
    return parser


class Stopped(BaseException):
    """A signal asks the program to end."""


def stop(number, _):
    """A signal becomes an exception, so that temporary files are removed; a second one waits."""
    for name in SIGNALS:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    raise Stopped(number)


def main(arguments):
    """Runs the command line; returns the exit status. Every error is one line."""
    args = None
    try:
        args = command_line().parse_args(arguments)
        if args.command is None:
            raise ExportError("command line", "command", "none given", "say model or task")
        args.run(args)
        return 0
    except ExportError as error:
        note(error)
    except OSError as error:
        note("%s: file: %s; check its name and rights" % (
            error.filename or "output", error.strerror or error))
    except (MemoryError, RecursionError) as error:
        note("%s: size: %s; is it the right file?" % (
            args.source if args else "command line", type(error).__name__))
    except Stopped as signalled:
        note("%s: output: stopped by a signal; it is as it was before" % (
            args.out if args else "command line"))
        return 128 + signalled.args[0]
    return 1


if __name__ == "__main__":
    for signal_name in SIGNALS:
        signal.signal(getattr(signal, signal_name), stop)
    sys.exit(main(sys.argv[1:]))
