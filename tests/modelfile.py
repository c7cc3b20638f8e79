"""Reads a model file as the README describes it, with the standard library: for tests.

`read(path)` checks the whole layout and returns a dictionary: the header's fields by name,
"tensors" {name: Tensor} in the order of the file, "meta" {key: value}, "tokenizer" (bytes).
"""
import collections
import struct
import zlib

Tensor = collections.namedtuple("Tensor", "type shape data")

FIELDS = (
    "magic version arch file_bytes header_bytes crc32 n_tensors table_offset tokenizer_offset"
    " tokenizer_bytes dim hidden n_layers n_heads n_kv_heads vocab_size max_length n_segments"
    " rope_pairs rope_theta norm_eps tokenizer_kind bos eos unk pad mask flags head_dim zero"
    " meta_offset meta_bytes").split()
FORMAT = "<8s II QQ II QQQ 8I I 2f I 5i III QQ 32s"
TYPES = {0: ("f32", 4), 1: ("f16", 2), 2: ("bf16", 2), 3: ("q8", 1)}


def check(condition, what):
    if not condition:
        raise ValueError(what)


def read(path):
    with open(path, "rb") as f:
        data = f.read()
    values = struct.unpack_from(FORMAT, data)
    model = dict(zip(FIELDS, values))
    size, end = model["file_bytes"], model["header_bytes"]
    check(model["magic"] == b"PAINTERS" and model["version"] == 1, "magic or version")
    check(size == len(data) and size % 64 == 0 and end % 64 == 0, "size")
    check(zlib.crc32(data[:32] + bytes(4) + data[36:end]) == model["crc32"], "checksum")
    check(model["zero"] == 0 and not any(values[-1]) and model["table_offset"] == 192, "zeros")
    model["tensors"], at = {}, end
    for i in range(model["n_tensors"]):
        name, kind, rank, rows, cols, offset, length = struct.unpack_from(
            "<56sIIQQQQ", data, 192 + 96 * i)
        text, kind = name.rstrip(b"\0").decode("ascii"), TYPES[kind]
        full = rows * cols * kind[1]
        if kind[0] == "q8":
            full = (full + 63) // 64 * 64 + rows * ((cols + 31) // 32) * 2
        check(length == full and offset == at and offset % 64 == 0, text + ": place")
        check(rank == 2 or rank == 1 == rows, text + ": rank")
        check(text not in model["tensors"], text + ": twice")
        at = (offset + length + 63) // 64 * 64
        check(not any(data[offset + length:at]), text + ": padding")
        model["tensors"][text] = Tensor(kind[0], (rows, cols)[2 - rank:],
                                        data[offset:offset + length])
    check(at == size, "size of the tensors")
    check(model["tokenizer_offset"] == 192 + 96 * model["n_tensors"], "tokenizer")
    check(model["meta_offset"] + model["meta_bytes"] <= end, "meta")
    model["tokenizer"] = data[model["tokenizer_offset"]:][:model["tokenizer_bytes"]]
    lines = data[model["meta_offset"]:][:model["meta_bytes"]].decode("utf-8")
    model["meta"] = dict(line.split("\t") for line in lines.splitlines())
    return model
