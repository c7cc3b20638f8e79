"""export.py model: every form of source gives the right bytes, everything else is refused in one
line, nothing in a checkpoint is executed, and an existing file survives every failure.

Needs no package: checkpoints are made here, byte by byte. tests/oracle_export.py does the same with
files that torch, safetensors and transformers wrote.
"""
import contextlib
import functools
import importlib.util
import io
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
import unittest
import unittest.mock
import warnings
import zipfile

import common
import modelfile
import models

SCRIPT = os.path.join(common.ROOT, "export.py")
spec = importlib.util.spec_from_file_location("painters_export", SCRIPT)
export = importlib.util.module_from_spec(spec)
sys.dont_write_bytecode = True
spec.loader.exec_module(export)


@functools.lru_cache(None)
def unicode_section(cleaning, make=export.unicode_section):
    return make(dict(cleaning))


# It takes a second, so it is made once for all tests.
export.unicode_section = lambda cleaning: unicode_section(tuple(sorted(cleaning.items())))

WIDTH = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I64": 8, "I8": 1}
STORAGE = {"F32": "Float", "F16": "Half", "BF16": "BFloat16", "F64": "Double", "I64": "Long",
           "I8": "Char"}
OURS = {"F32": "f32", "F16": "f16", "BF16": "bf16"}


# Checkpoints made by hand -------------------------------------------------------------------------

def fill(rng, kind, *shape):
    """A tensor of random bytes: (type, shape, bytes)."""
    count = WIDTH[kind]
    for n in shape:
        count *= n
    return kind, list(shape), rng.getrandbits(8 * count).to_bytes(count, "little")


def small_llama(kind="F32", tied=False, layers=2, seed=1):
    """(config, tensors) of a Llama with a key/value head for two heads."""
    rng, dim, hidden, vocab = random.Random(seed), 8, 12, models.VOCAB_LLAMA
    t = {"model.embed_tokens.weight": fill(rng, kind, vocab, dim)}
    for i in range(layers):
        at = "model.layers.%d." % i
        shapes = {"input_layernorm": [dim], "self_attn.q_proj": [dim, dim],
                  "self_attn.k_proj": [4, dim], "self_attn.v_proj": [4, dim],
                  "self_attn.o_proj": [dim, dim], "post_attention_layernorm": [dim],
                  "mlp.gate_proj": [hidden, dim], "mlp.up_proj": [hidden, dim],
                  "mlp.down_proj": [dim, hidden]}
        for name, shape in shapes.items():
            t[at + name + ".weight"] = fill(rng, kind, *shape)
    t["model.norm.weight"] = fill(rng, kind, dim)
    if not tied:
        t["lm_head.weight"] = fill(rng, kind, vocab, dim)
    config = dict(model_type="llama", hidden_size=dim, intermediate_size=hidden, vocab_size=vocab,
                  num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1,
                  max_position_embeddings=64, rms_norm_eps=1e-5, hidden_act="silu",
                  tie_word_embeddings=tied)
    return config, t


def small_bert(labels=0, masked=False, pooler=True, prefix="bert.", old_names=False, seed=2,
               head_seed=3):
    """(config, tensors) of a BERT with the given parts."""
    rng, dim, hidden, vocab = random.Random(seed), 6, 10, models.VOCAB_BERT
    t = {}

    def linear(name, rows, cols, rng=rng):
        t[name + ".weight"] = fill(rng, "F32", rows, cols)
        t[name + ".bias"] = fill(rng, "F32", rows)

    def norm(name):
        weight, bias = (".gamma", ".beta") if old_names else (".weight", ".bias")
        t[name + weight], t[name + bias] = fill(rng, "F32", dim), fill(rng, "F32", dim)

    for name, rows in (("word", vocab), ("position", 16), ("token_type", 2)):
        t["%sembeddings.%s_embeddings.weight" % (prefix, name)] = fill(rng, "F32", rows, dim)
    norm(prefix + "embeddings.LayerNorm")
    for i in range(2):
        at = "%sencoder.layer.%d." % (prefix, i)
        for name in ("attention.self.query", "attention.self.key", "attention.self.value",
                     "attention.output.dense"):
            linear(at + name, dim, dim)
        norm(at + "attention.output.LayerNorm")
        linear(at + "intermediate.dense", hidden, dim)
        linear(at + "output.dense", dim, hidden)
        norm(at + "output.LayerNorm")
    if pooler:
        linear(prefix + "pooler.dense", dim, dim)
    config = dict(model_type="bert", hidden_size=dim, intermediate_size=hidden, vocab_size=vocab,
                  num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=16,
                  type_vocab_size=2, hidden_act="gelu", layer_norm_eps=1e-12)
    if masked:
        linear("cls.predictions.transform.dense", dim, dim)
        norm("cls.predictions.transform.LayerNorm")
        t["cls.predictions.bias"] = fill(rng, "F32", vocab)
    if labels:
        linear("classifier", labels, dim, random.Random(head_seed))
        config["id2label"] = {str(i): "label %d" % i for i in range(labels)}
    return config, t


def safetensors(tensors):
    """The bytes of a safetensors file."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, (kind, shape, data) in tensors.items():
        header[name] = dict(dtype=kind, shape=shape, data_offsets=[at, at + len(data)])
        at += len(data)
    return joined(header, b"".join(data for _, _, data in tensors.values()))


def joined(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def text(s):
    return b"X" + struct.pack("<I", len(s.encode())) + s.encode()


def number(n):
    return b"J" + struct.pack("<i", n) if n < 1 << 31 else b"\x8a\x08" + struct.pack("<q", n)


def numbers(values):
    return b"(" + b"".join(map(number, values)) + b"t"


def tensor_code(kind, shape, key, count, start=0, strides=None, more=b"", flags=b""):
    """The instructions by which torch.save describes a tensor; `more` for its storage."""
    if strides is None:
        strides = [math.prod(shape[i + 1:]) for i in range(len(shape))]
    return (b"ctorch._utils\n_rebuild_tensor_v2\n((" + text("storage") + b"ctorch\n"
            + STORAGE[kind].encode() + b"Storage\n" + text(key) + text("cpu") + number(count) + more
            + b"tQ" + number(start) + numbers(shape) + numbers(strides)
            + b"\x89ccollections\nOrderedDict\n)R" + flags + b"tR")


def state_dict(tensors, more=b""):
    """The pickle of a state_dict, as torch writes it, with its _metadata; storages by number."""
    code = b"\x80\x02ccollections\nOrderedDict\nq\x00)Rq\x01("
    for i, (name, (kind, shape, data)) in enumerate(tensors.items()):
        code += text(name) + tensor_code(kind, shape, str(i), len(data) // WIDTH[kind], more=more)
    return code + b"u}" + text("_metadata") + b"}sb."


def torch_zip(code, storages, byteorder=b"little", compress=zipfile.ZIP_STORED):
    """The bytes of a checkpoint of torch 1.6 and later."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compress) as archive:
        archive.writestr("archive/data.pkl", code)
        archive.writestr("archive/byteorder", byteorder)
        for i, data in enumerate(storages):
            archive.writestr("archive/data/%d" % i, data)
        archive.writestr("archive/version", b"3\n")
    return out.getvalue()


def torch_file(tensors):
    return torch_zip(state_dict(tensors), [data for _, _, data in tensors.values()])


def torch_old(tensors, little=True, code=None):
    """The same of torch before 1.6."""
    out = b"".join(pickle.dumps(value, 2) for value in (
        0x1950a86a20f9469cfc6c, 1001, {"protocol_version": 1001, "little_endian": little,
                                       "type_sizes": {"short": 2, "int": 4, "long": 4}}))
    out += state_dict(tensors, more=b"N") if code is None else code
    out += pickle.dumps([str(i) for i in range(len(tensors))], 2)
    for kind, _, data in tensors.values():
        out += struct.pack("<q", len(data) // WIDTH[kind]) + data
    return out


def folder(config, files):
    """A fresh folder with a config.json, a tokenizer, and files by name (bytes or tensors)."""
    folder.count += 1
    path = os.path.join(common.scratch(), "export", str(folder.count), "model")
    os.makedirs(path)
    if config is not None:
        files = dict(files, **{"config.json": json.dumps(config).encode()})
    for name, data in files.items():
        with open(os.path.join(path, name), "wb") as f:
            f.write(safetensors(data) if isinstance(data, dict) else data)
    if config is not None and config.get("model_type") == "bert":
        with open(os.path.join(path, "vocab.txt"), "w", encoding="utf-8") as f:
            f.write("".join(word + "\n" for word in models.bert_vocabulary()))
    else:
        models.write_sentencepiece(os.path.join(path, "tokenizer.model"), models.llama_pieces())
    return path


folder.count = 0


def sharded(tensors, name, write):
    """The files of a checkpoint in three shards with an index: `name` has %s for the number."""
    shards, index = [{}, {}, {}], {}
    for i, key in enumerate(tensors):
        shards[i * 3 // len(tensors)][key] = tensors[key]
        index[key] = name % ("-0000%d-of-00003" % (i * 3 // len(tensors) + 1))
    files = {name % ("-0000%d-of-00003" % (i + 1)): write(shard) for i, shard in enumerate(shards)}
    files[name % "" + ".index.json"] = json.dumps({"weight_map": index}).encode()
    return files


def call(*arguments):
    """Runs export.py in this process: (status, stderr)."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(err), \
            warnings.catch_warnings(), unittest.mock.patch("os.fsync"):
        warnings.simplefilter("ignore")     # as outside of tests
        status = export.main(list(map(str, arguments)))
    return status, err.getvalue()


def limits(name, value):
    """A function for a child process that limits it; skips the test where that is not possible."""
    try:
        import resource
    except ImportError:
        raise unittest.SkipTest("no limits on this system")
    return lambda: resource.setrlimit(getattr(resource, name), (value, value))


class Case(unittest.TestCase):
    def exported(self, path, *more):
        """The model file made from a source, read back."""
        out = os.path.join(os.path.dirname(path), "out.bin")
        status, err = call("model", path, out, *more)
        self.assertEqual(status, 0, err)
        return modelfile.read(out)

    def refused(self, path, pattern, *more):
        """export.py must refuse this source in one line that matches, and leave `out` as it was."""
        out = os.path.join(os.path.dirname(path), "out.bin")
        with open(out, "wb") as f:
            f.write(b"what was there before")
        status, err = call("model", path, out, *more)
        self.assertEqual(status, 1, err)
        line = err.splitlines()[-1]
        notes = [text for text in err.splitlines()[:-1] if "kept apart" not in text
                 and "context length" not in text and "left out" not in text]
        self.assertEqual(notes, [])
        self.assertRegex(line, r"^export\.py: .+: .+: .+; .+")
        self.assertRegex(line, pattern)
        with open(out, "rb") as f:
            self.assertEqual(f.read(), b"what was there before")
        self.assertEqual([name for name in os.listdir(os.path.dirname(out)) if ".tmp" in name], [])

    def either(self, path, name, data):
        """With this content of a file in the folder, export.py succeeds or refuses in one line."""
        with open(os.path.join(path, name), "wb") as f:
            f.write(data)
        out = os.path.join(os.path.dirname(path), "out.bin")
        status, err = call("model", path, out)
        self.assertEqual((status, err.count("\n")), (status and 1, 1), err)
        self.assertTrue(err.startswith("export.py: " + os.path.dirname(path)), err)
        if status == 0:
            modelfile.read(out)

    def check_tensors(self, model, tensors, names):
        """The file holds just these: {our name: name in `tensors`}, to the byte."""
        self.assertEqual(set(model["tensors"]), set(names))
        for ours, theirs in names.items():
            kind, shape, data = tensors[theirs]
            self.assertEqual(model["tensors"][ours], (OURS[kind], tuple(shape), data), ours)


def llama_names(layers, tied, meta=False):
    """{our name: name in the checkpoint}."""
    column, base = (2, "") if meta else (1, "model.")
    rows = {row[0]: row[column] + ".weight" for row in export.LLAMA_LAYER}
    out = {"layers.%d.%s" % (i, ours): "%slayers.%d.%s" % (base, i, theirs)
           for i in range(layers) for ours, theirs in rows.items()}
    out["embed"] = "tok_embeddings.weight" if meta else "model.embed_tokens.weight"
    out["norm"] = base + "norm.weight"
    if not tied:
        out["head"] = "output.weight" if meta else "lm_head.weight"
    return out


def bert_names(prefix="bert.", norm=("weight", "bias")):
    """{our name: name in the checkpoint} of an encoder without pooler."""
    out = {"embed": "embeddings.word_embeddings.weight",
           "positions": "embeddings.position_embeddings.weight",
           "segments": "embeddings.token_type_embeddings.weight"}
    both = [("embed_norm", "embeddings.LayerNorm")]
    both += [("layers.%d.%s" % (i, ours), "encoder.layer.%d.%s" % (i, theirs))
             for i in range(2) for ours, theirs, _ in export.BERT_LAYER]
    for ours, theirs in both:
        weight, bias = norm if "LayerNorm" in theirs else ("weight", "bias")
        out[ours], out[ours + "_bias"] = theirs + "." + weight, theirs + "." + bias
    return {ours: prefix + theirs for ours, theirs in out.items()}


POOLER = {"pooler": "bert.pooler.dense.weight", "pooler_bias": "bert.pooler.dense.bias"}
MASKED = {"mlm": "cls.predictions.transform.dense.weight",
          "mlm_bias": "cls.predictions.transform.dense.bias",
          "mlm_norm": "cls.predictions.transform.LayerNorm.weight",
          "mlm_norm_bias": "cls.predictions.transform.LayerNorm.bias",
          "mlm_out_bias": "cls.predictions.bias"}


def head_names(name):
    return {"heads.%s.weight" % name: "classifier.weight",
            "heads.%s.bias" % name: "classifier.bias"}


# Right sources ------------------------------------------------------------------------------------

class Llama(Case):
    def test_header(self):
        config, t = small_llama()
        model = self.exported(folder(config, {"model.safetensors": t}))
        right = dict(arch=1, dim=8, hidden=12, n_layers=2, n_heads=2, n_kv_heads=1, vocab_size=307,
                     max_length=64, n_segments=0, rope_pairs=1, rope_theta=10000.0, head_dim=4)
        self.assertEqual({key: model[key] for key in right}, right)
        self.assertAlmostEqual(model["norm_eps"], 1e-5, 10)
        self.assertEqual(model["meta"]["source"], "model")

    def test_every_type_tied_or_not(self):
        for kind in OURS:
            for tied in (False, True):
                config, t = small_llama(kind, tied)
                model = self.exported(folder(config, {"model.safetensors": t}))
                self.check_tensors(model, t, llama_names(2, tied))

    def test_every_form_gives_the_same_file(self):
        config, t = small_llama("BF16", layers=3)
        forms = [{"model.safetensors": t}, {"pytorch_model.bin": torch_file(t)},
                 {"pytorch_model.bin": torch_old(t)},
                 sharded(t, "model%s.safetensors", safetensors),
                 sharded(t, "pytorch_model%s.bin", torch_file)]
        made = []
        for files in forms:
            path = folder(config, files)
            self.exported(path)
            with open(os.path.join(os.path.dirname(path), "out.bin"), "rb") as f:
                made.append(f.read())
        self.assertEqual([data == made[0] for data in made], [True] * len(forms))

    def test_order_in_the_file_does_not_matter(self):
        config, t = small_llama()
        shuffled = dict(sorted(t.items(), key=lambda pair: pair[0][::-1]))
        self.check_tensors(self.exported(folder(config, {"model.safetensors": shuffled})), t,
                           llama_names(2, False))

    def test_head_that_is_the_embedding(self):
        config, t = small_llama(tied=True)
        twice = dict(t, **{"lm_head.weight": t["model.embed_tokens.weight"]})
        self.check_tensors(self.exported(folder(config, {"model.safetensors": twice})), t,
                           llama_names(2, True))
        only_head = dict(twice)
        del only_head["model.embed_tokens.weight"]
        self.check_tensors(self.exported(folder(config, {"model.safetensors": only_head})), t,
                           llama_names(2, True))
        different = dict(t, **{"lm_head.weight": fill(random.Random(5), "F32", 307, 8)})
        self.check_tensors(self.exported(folder(config, {"model.safetensors": different})),
                           different, llama_names(2, False))

    def test_head_that_shares_the_storage(self):
        config, t = small_llama(tied=True)
        code = state_dict(t).replace(b"u}", text("lm_head.weight") + tensor_code(
            "F32", [307, 8], "0", 307 * 8) + b"u}", 1)
        for tie in (True, False):
            path = folder(dict(config, tie_word_embeddings=tie), {
                "pytorch_model.bin": torch_zip(code, [data for _, _, data in t.values()])})
            self.check_tensors(self.exported(path), t, llama_names(2, True))

    def test_configuration_of_newer_transformers(self):
        config, t = small_llama()
        config.update(rope_parameters={"rope_type": "default", "rope_theta": 123.0},
                      dtype="float32", rope_scaling=None, head_dim=4, pretraining_tp=2,
                      attention_bias=False, model_max_length=10 ** 30)
        model = self.exported(folder(config, {"model.safetensors": t}))
        self.assertEqual(model["rope_theta"], 123.0)

    def test_head_of_another_width(self):
        config, t = small_llama()
        for i in range(2):
            for name, rows in (("q", 12), ("k", 6), ("v", 6)):
                t["model.layers.%d.self_attn.%s_proj.weight" % (i, name)] = fill(
                    random.Random(rows), "F32", rows, 8)
            t["model.layers.%d.self_attn.o_proj.weight" % i] = fill(random.Random(7), "F32", 8, 12)
        model = self.exported(folder(dict(config, head_dim=6), {"model.safetensors": t}))
        self.assertEqual(model["head_dim"], 6)
        self.check_tensors(model, t, llama_names(2, False))

    def test_frequencies_are_ignored(self):
        config, t = small_llama()
        more = dict(t, **{"model.layers.0.self_attn.rotary_emb.inv_freq":
                          fill(random.Random(1), "F32", 2)})
        self.check_tensors(self.exported(folder(config, {"model.safetensors": more})), t,
                           llama_names(2, False))

    def test_meta_and_llama2c_hold_the_same_weights(self):
        name, root = "llama_mha", os.path.join(common.scratch(), "layouts")
        right = {key: ("F32", shape, data)
                 for key, (shape, data) in models.meta_tensors(name).items()}
        os.makedirs(root)
        meta = models.write_meta(name, os.path.join(root, "meta"))
        files = [models.write_llama2c(name, os.path.join(root, "%d.bin" % i), i) for i in (0, 1)]
        tokens = os.path.join(root, "tokenizer.bin")
        models.write_llama2c_tokenizer(tokens, models.llama_pieces())
        found = [self.exported(meta)] + [self.exported(path) for path in files]
        for model in found[1:]:
            self.check_tensors(model, right, llama_names(5, True, meta=True))
        right["output.weight"] = right["tok_embeddings.weight"]     # Meta ties nothing
        self.check_tensors(found[0], right, llama_names(5, False, meta=True))
        self.assertEqual([model["rope_pairs"] for model in found], [2, 2, 2])
        lengths = [model["max_length"] for model in found]
        self.assertEqual(lengths, [4096, 125, 125])
        self.assertEqual(self.exported(meta, "--context", 77)["max_length"], 77)
        self.assertEqual([m["dim"] for m in found], [66] * 3)

    def test_untied_llama2c_and_meta(self):
        right = {key: ("F32", shape, data)
                 for key, (shape, data) in models.meta_tensors("llama_gqa").items()}
        root = os.path.join(common.scratch(), "untied")
        os.makedirs(root)
        models.write_llama2c_tokenizer(os.path.join(root, "tokenizer.bin"), models.llama_pieces())
        sources = [models.write_llama2c("llama_gqa", os.path.join(root, "%d.bin" % i), i)
                   for i in (0, 1)] + [models.write_meta("llama_gqa", os.path.join(root, "meta"))]
        for source in sources:
            self.check_tensors(self.exported(source), right, llama_names(6, False, meta=True))

    def test_both_rope_layouts_are_the_same_rows(self):
        """Row 2i of a head in Meta's order is row i in Hugging Face's, row 2i+1 row i+half."""
        root = os.path.join(common.scratch(), "rows")
        os.makedirs(root)
        theirs = self.exported(models.write("llama_gqa", os.path.join(root, "hf")))
        meta = self.exported(models.write_meta("llama_gqa", os.path.join(root, "meta")))
        row, half = 60 * 4, 5
        for name, heads in (("q", 6), ("k", 2)):
            a = theirs["tensors"]["layers.3." + name].data
            b = meta["tensors"]["layers.3." + name].data
            for head in range(heads):
                for i in range(half):
                    for j in (0, 1):
                        at, to = (head * 10 + j * half + i) * row, (head * 10 + 2 * i + j) * row
                        self.assertEqual(a[at:at + row], b[to:to + row])
        same = [name for name in theirs["tensors"] if not name.endswith((".q", ".k"))]
        self.assertEqual([theirs["tensors"][name] == meta["tensors"][name] for name in same],
                         [True] * len(same))

    def test_stories260k(self):
        sizes = dict(dim=64, hidden=172, n_layers=5, n_heads=8, n_kv_heads=4, vocab_size=512,
                     max_length=512, rope_pairs=2, head_dim=8)
        made = []
        for form in ("legacy", "v1"):
            path = common.shared("data", "stories260K", "checkpoint_%s.bin" % form)
            out = os.path.join(common.scratch(), form)
            self.assertEqual(call("model", path, out)[0], 0)
            made.append(modelfile.read(out))
            self.assertEqual({key: made[-1][key] for key in sizes}, sizes)
        self.assertEqual(made[0]["tensors"], made[1]["tensors"])


class Bert(Case):
    def test_header(self):
        config, t = small_bert()
        model = self.exported(folder(config, {"model.safetensors": t}))
        right = dict(arch=2, dim=6, hidden=10, n_layers=2, n_heads=2, n_kv_heads=2, vocab_size=203,
                     max_length=16, n_segments=2, rope_pairs=0, rope_theta=0.0, head_dim=3)
        self.assertEqual({key: model[key] for key in right}, right)
        self.assertAlmostEqual(model["norm_eps"], 1e-12, 18)
        self.check_tensors(model, t, dict(bert_names(), **POOLER))

    def test_the_tensors_decide(self):
        config, t = small_bert(pooler=False, prefix="")
        config["architectures"] = ["BertForPreTraining"]
        self.check_tensors(self.exported(folder(config, {"model.safetensors": t})), t,
                           bert_names(""))
        config, t = small_bert(masked=True, labels=3)
        config["architectures"] = ["BertModel"]
        names = dict(bert_names(), **POOLER, **MASKED, **head_names("classifier"))
        self.check_tensors(self.exported(folder(config, {"model.safetensors": t})), t, names)

    def test_old_names(self):
        config, t = small_bert(masked=True, pooler=False, old_names=True)
        names = dict(bert_names(norm=("gamma", "beta")), **MASKED)
        for name in ("mlm_norm", "mlm_norm_bias"):
            names[name] = names[name].replace(".weight", ".gamma").replace(".bias", ".beta")
        t["cls.seq_relationship.weight"] = fill(random.Random(1), "F32", 2, 6)
        t["cls.seq_relationship.bias"] = fill(random.Random(1), "F32", 2)
        for kind in (torch_file, torch_old):
            path = folder(config, {"pytorch_model.bin": kind(t)})
            self.check_tensors(self.exported(path), t, names)

    def test_position_ids_are_ignored(self):
        config, t = small_bert()
        more = dict(t, **{"bert.embeddings.position_ids": fill(random.Random(1), "I64", 1, 16)})
        for files in ({"model.safetensors": more}, {"pytorch_model.bin": torch_file(more)}):
            self.check_tensors(self.exported(folder(config, files)), t,
                               dict(bert_names(), **POOLER))

    def test_decoder_tied_or_not(self):
        config, t = small_bert(masked=True)
        names = dict(bert_names(), **POOLER, **MASKED)
        decoder = "cls.predictions.decoder.weight"
        t["cls.predictions.decoder.bias"] = t["cls.predictions.bias"]
        same = dict(t, **{decoder: t["bert.embeddings.word_embeddings.weight"]})
        self.check_tensors(self.exported(folder(config, {"model.safetensors": same})), t, names)
        other = dict(t, **{decoder: fill(random.Random(9), "F32", 203, 6)})
        names["mlm_out"] = decoder
        for tie in (None, False):
            path = folder(dict(config, tie_word_embeddings=tie), {"model.safetensors": other})
            self.check_tensors(self.exported(path), other, names)

    def test_labels(self):
        for labels, kind in ((1, "regress"), (2, "classify"), (3, "classify")):
            config, t = small_bert(labels=labels)
            meta = self.exported(folder(config, {"model.safetensors": t}))["meta"]
            self.assertEqual(meta["head.classifier.kind"], kind)
            self.assertEqual(meta["head.classifier.labels"],
                             "|".join("label %d" % i for i in range(labels)))
        config, t = small_bert(labels=2)
        del config["id2label"]
        meta = self.exported(folder(config, {"model.safetensors": t}))["meta"]
        self.assertEqual(meta["head.classifier.labels"], "LABEL_0|LABEL_1")
        config["id2label"] = {"1": "b\u00e9", "0": "entailment, not"}
        meta = self.exported(folder(config, {"model.safetensors": t}))["meta"]
        self.assertEqual(meta["head.classifier.labels"], "entailment, not|b\u00e9")

    def test_name_of_the_head(self):
        config, t = small_bert(labels=2)
        path = folder(dict(config, finetuning_task="rte"), {"model.safetensors": t})
        self.assertIn("heads.rte.weight", self.exported(path)["tensors"])
        self.assertIn("heads.mine.weight", self.exported(path, "--head-name", "mine")["tensors"])
        path = folder(dict(config, finetuning_task="my task/2"), {"model.safetensors": t})
        self.assertIn("heads.classifier.weight", self.exported(path)["tensors"])

    def test_several_heads(self):
        base = folder(*self.split(*small_bert(masked=True)))
        two = small_bert(labels=2, head_seed=4)
        one = small_bert(labels=1, head_seed=5, prefix="bert.")
        more = ["--head", "rte=" + folder(*self.split(*two)), "--head",
                "sts-b=" + folder(*self.split(*one))]
        model = self.exported(base, *more)
        self.assertEqual(model["tensors"]["heads.rte.weight"].data, two[1]["classifier.weight"][2])
        self.assertEqual(model["tensors"]["heads.sts-b.bias"].data, one[1]["classifier.bias"][2])
        self.assertEqual(model["meta"]["head.rte.kind"], "classify")
        self.assertEqual(model["meta"]["head.sts-b.kind"], "regress")
        self.assertIn("mlm", model["tensors"])
        self.refused(base, "two heads are called rte", *(more + more[:2]))

    def test_heads_on_another_encoder(self):
        base = folder(*self.split(*small_bert()))
        config, t = small_bert(labels=2)
        for name, ours in (("bert.pooler.dense.bias", "pooler_bias"),
                           ("bert.encoder.layer.1.output.dense.weight", "layers.1.down"),
                           ("bert.embeddings.word_embeddings.weight", "embed")):
            changed = dict(t)
            kind, shape, data = changed[name]
            changed[name] = (kind, shape, data[:-1] + bytes([data[-1] ^ 1]))
            path = folder(config, {"model.safetensors": changed})
            self.refused(base, "tensor %s: differs" % ours, "--head", "x=" + path)
        path = folder(dict(config, layer_norm_eps=1e-5), {"model.safetensors": t})
        self.refused(base, "not of the same shape", "--head", "x=" + path)
        self.refused(base, "classifier: none", "--head", "x=" + base)
        self.refused(folder(*self.split(*small_bert(pooler=False))), "not of the same shape",
                     "--head", "x=" + folder(config, {"model.safetensors": t}))

    @staticmethod
    def split(config, tensors):
        return config, {"model.safetensors": tensors}


class ModelsOfTheTests(Case):
    def test_all(self):
        for name, m in models.MODELS.items():
            model = modelfile.read(common.model(name))
            stored = models.tensors(name)
            self.assertEqual(len(model["tensors"]), len(stored))
            self.assertEqual(sorted(t.data for t in model["tensors"].values()),
                             sorted(data for _, data in stored.values()))
            self.assertEqual({t.type for t in model["tensors"].values()}, {OURS[m["dtype"]]})


# Wrong sources ------------------------------------------------------------------------------------

class WrongLlama(Case):
    def test_settings(self):
        config, t = small_llama()
        for setting, value, pattern in (
                ("rope_scaling", {"type": "linear", "factor": 2.0}, "rope_scaling: .*linear"),
                ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}, "rope_scaling: .*llama3"),
                ("rope_scaling", "yarn", "rope_scaling"),
                ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}, "parameters.*yarn"),
                ("rope_parameters", {"rope_type": "default", "rope_theta": 1e4, "factor": 2.0},
                 "rope_parameters.*factor"),
                ("rope_parameters", {"rope_type": "default", "rope_theta": -1}, "rope_theta"),
                ("partial_rotary_factor", 0.5, "partial_rotary_factor"),
                ("attention_bias", True, "attention_bias: true"),
                ("mlp_bias", True, "mlp_bias: true"),
                ("hidden_act", "gelu", "hidden_act: \"gelu\""),
                ("model_type", "mistral", "model_type: \"mistral\""),
                ("model_type", None, "model_type: missing"),
                ("model_type", ["llama"], "model_type"),
                ("quantization_config", {"quant_method": "gptq"}, "quantization_config"),
                ("num_attention_heads", 3, "heads"),
                ("num_key_value_heads", 3, "sizes"),
                ("num_attention_heads", 8, "sizes|shape"),
                ("head_dim", 3, "sizes"),
                ("head_dim", -4, "head_dim"), ("head_dim", 0, "head_dim"),
                ("hidden_size", 0, "hidden_size"),
                ("hidden_size", -1, "hidden_size"),
                ("hidden_size", 2 ** 31, "hidden_size"),
                ("hidden_size", 8.0, "hidden_size"),
                ("hidden_size", True, "hidden_size"),
                ("hidden_size", "8", "hidden_size"),
                ("hidden_size", None, "hidden_size: missing"),
                ("hidden_size", 16, "shape"),
                ("intermediate_size", 11, "shape"),
                ("vocab_size", 306, "shape"),
                ("num_hidden_layers", 3, "missing: .*layers.2"),
                ("num_hidden_layers", 1, "not understood: .*layers.1"),
                ("num_hidden_layers", 16384, "too few"), ("num_hidden_layers", 16385, "too large"),
                ("num_hidden_layers", 2 ** 31 - 1, "too large"),
                ("max_position_embeddings", 1 << 25, "too large"),
                ("rms_norm_eps", 0, "rms_norm_eps"),
                ("rms_norm_eps", "1e-5", "rms_norm_eps"),
                ("rms_norm_eps", 1e300, "rms_norm_eps"),
                ("rope_theta", [10000], "rope_theta"),
                ("max_position_embeddings", 0, "max_position_embeddings"),
                ("tie_word_embeddings", "yes", "tie_word_embeddings")):
            with self.subTest(setting=setting, value=value):
                self.refused(folder(dict(config, **{setting: value}), {"model.safetensors": t}),
                             pattern)

    def test_tokenizer_of_another_size(self):
        """307 tokens: a few rows without one are padding, many are another model's vocabulary."""
        for rows in (307, 320, 384, 420, 2048, 32000):
            config, tensors = small_llama(layers=1)
            for name in ("model.embed_tokens.weight", "lm_head.weight"):
                tensors[name] = ("F32", [rows, 8], bytes(4 * rows * 8))
            path = folder(dict(config, vocab_size=rows), {"model.safetensors": tensors})
            status, err = call("model", path, os.path.join(os.path.dirname(path), "out.bin"))
            with self.subTest(rows=rows):
                if rows > 307 * 4 / 3:
                    self.refused(path, "307 tokens, but the model's vocabulary has %d" % rows)
                else:
                    self.assertEqual(status, 0, err)
                    self.assertEqual("%d rows" % (rows - 307) in err, rows > 307, err)

    def test_tensors(self):
        config, t = small_llama()
        q = "model.layers.1.self_attn.q_proj"
        rng = random.Random(3)
        for change, pattern in (
                ({q + ".bias": fill(rng, "F32", 8)}, "not understood: " + q + ".bias"),
                ({"score.weight": fill(rng, "F32", 2, 8)}, "not understood: score.weight"),
                ({q + ".weight": None}, "missing: " + q),
                ({"lm_head.weight": None}, "missing: lm_head.weight"),
                ({q + ".weight": fill(rng, "F32", 8, 9)}, "shape"),
                ({q + ".weight": fill(rng, "F32", 64)}, "shape"),
                ({q + ".weight": fill(rng, "F32", 8, 8, 1)}, "shape"),
                ({q + ".weight": fill(rng, "F64", 8, 8)}, "type f64"),
                ({q + ".weight": fill(rng, "I8", 8, 8)}, "type i8"),
                ({q + ".weight": ("F8_E4M3", [8, 8], bytes(64))}, "F8_E4M3"),
                ({q + ".weight": ("U32", [8, 8], bytes(256))}, "U32"),
                ({"bad\nname\x1b[31m": fill(rng, "F32", 1)}, "not understood: bad\\\\nname")):
            tensors = {name: value for name, value in dict(t, **change).items() if value}
            with self.subTest(pattern=pattern):
                self.refused(folder(config, {"model.safetensors": tensors}), pattern)

    def test_folders(self):
        config, t = small_llama()
        self.refused(folder(config, {}), "weights: none found")
        self.refused(folder(None, {"model.safetensors": t}), "config.json")
        self.refused(folder(None, {"model.safetensors": t, "config.json": b"{"}), "broken JSON")
        for data in (b"", b"[]", b"\xff\xfe", b'{"a": 1, "a": 2}', b'{"a": NaN}', b"[" * 100000,
                     b'{"a": ' + b"9" * 5000 + b"}", b'{"a":' * 50000, b" " * (5 << 20)):
            self.refused(folder(None, {"model.safetensors": t, "config.json": data}), "config.json")
        self.refused(folder(None, {"config.json": b'{"a": ' + b"9" * 2000 + b"}"}), "2000 digits")
        self.refused(os.path.join(common.scratch(), "nothing"), "neither")

    def test_meta(self):
        def meta(files=(), **settings):
            path = os.path.join(common.scratch(), "export", "meta%d" % folder.count)
            folder.count += 1
            models.write_meta("llama_mha", path)
            with open(os.path.join(path, "params.json"), encoding="utf-8") as f:
                params = dict(json.load(f), **settings)
            with open(os.path.join(path, "params.json"), "w", encoding="utf-8") as f:
                json.dump(params, f)
            for name, data in files:
                with open(os.path.join(path, name), "wb") as f:
                    f.write(data)
            return path

        self.refused(meta([("consolidated.01.pth", b"")]), "several shards.*Hugging Face")
        self.refused(meta(use_scaled_rope=True), "use_scaled_rope")
        self.refused(meta(moe={"experts": 8}), "not understood: moe")
        self.refused(meta(dim=67), "heads")
        self.refused(meta(dim=132), "shape")
        self.refused(meta(n_layers=6), "missing")
        self.refused(meta(vocab_size=306), "shape")
        self.refused(meta([("consolidated.00.pth", torch_file(small_llama()[1]))]), "is this Meta")
        path = meta()
        os.remove(os.path.join(path, "consolidated.00.pth"))
        self.refused(path, "consolidated.00.pth")

    def test_llama2c(self):
        root = os.path.join(common.scratch(), "export", "llama2c")
        os.makedirs(root)
        models.write_llama2c_tokenizer(os.path.join(root, "tokenizer.bin"), models.llama_pieces())
        path = os.path.join(root, "x")
        for version in (0, 1):
            models.write_llama2c("llama_mha", path, version)
            with open(path, "rb") as f:
                good = f.read()
            at = 8 if version else 0
            for field in range(7):
                for value in (0, -1, 1, 2 ** 31 - 1, -2 ** 31):
                    if version and field == 6 and value == 1:
                        continue            # a shorter context changes nothing else there
                    data = bytearray(good)
                    struct.pack_into("<i", data, at + 4 * field, value)
                    with self.subTest(version=version, field=field, value=value):
                        self.rewrite(path, data, "header|size|heads")
            for size in (0, 1, 4, 27, 28, 200, 256, len(good) - 1):
                self.rewrite(path, good[:size], "cut short|size|llama2.c")
            self.rewrite(path, good + b"\0", "size")
            if version:
                for number, pattern in ((0, "header"), (2, "version"), (-7, "version")):
                    data = good[:4] + struct.pack("<i", number) + good[8:]
                    self.rewrite(path, data, pattern)
                self.rewrite(path, good[:36] + b"\2" + good[37:], "header")

    def rewrite(self, path, data, pattern):
        with open(path, "wb") as f:
            f.write(data)
        self.refused(path, pattern)


class WrongBert(Case):
    def test_settings(self):
        config, t = small_bert(labels=2, masked=True)
        for setting, value, pattern in (
                ("hidden_act", "gelu_new", "gelu_new"), ("hidden_act", "relu", "relu"),
                ("position_embedding_type", "relative_key", "relative_key"),
                ("is_decoder", True, "is_decoder"),
                ("add_cross_attention", True, "add_cross_attention"),
                ("pruned_heads", {"1": [0]}, "pruned_heads"),
                ("quantization_config", {"bits": 8}, "quantization_config"),
                ("num_attention_heads", 4, "heads"), ("type_vocab_size", 3, "shape"),
                ("max_position_embeddings", 15, "shape"), ("num_hidden_layers", 3, "missing"),
                ("num_hidden_layers", 1, "not understood"), ("layer_norm_eps", -1, "norm_eps"),
                ("problem_type", "multi_label_classification", "problem_type"),
                ("architectures", ["BertForTokenClassification"], "TokenClassification"),
                ("architectures", ["BertForMultipleChoice"], "MultipleChoice"),
                ("id2label", {"0": "a"}, "id2label"),
                ("id2label", {"0": "a", "2": "b"}, "id2label"),
                ("id2label", {"0": "a", "1": "b", "2": "c"}, "id2label"),
                ("id2label", ["a", "b"], "id2label"), ("id2label", {"0": "a|b", "1": "c"}, "label"),
                ("id2label", {"0": "a\nb", "1": "c"}, "label"),
                ("id2label", {"0": 1, "1": "c"}, "label"),
                ("id2label", {"0": "\ud800", "1": "c"}, "label")):
            with self.subTest(setting=setting, value=value):
                self.refused(folder(dict(config, **{setting: value}), {"model.safetensors": t}),
                             pattern)
        del config["id2label"]
        self.refused(folder(dict(config, num_labels=3), {"model.safetensors": t}), "id2label")

    def test_tensors(self):
        config, t = small_bert(labels=2, masked=True)
        rng = random.Random(3)
        for change, pattern in (
                ({"qa_outputs.weight": fill(rng, "F32", 2, 6)}, "not understood: qa_outputs"),
                ({"bert.encoder.layer.0.crossattention.self.query.weight": fill(rng, "F32", 6, 6)},
                 "not understood: .*crossattention"),
                ({"classifier.bias": None}, "missing: classifier.bias"),
                ({"classifier.bias": fill(rng, "F32", 3)}, "shape"),
                ({"classifier.weight": fill(rng, "F32", 3, 6)}, "id2label"),
                ({"cls.predictions.bias": None}, "missing: cls.predictions.bias"),
                ({"cls.predictions.decoder.bias": fill(rng, "F32", 203)}, "decoder.bias"),
                ({"bert.pooler.dense.bias": None}, "missing: pooler.dense.bias"),
                ({"bert.pooler.dense.bias": None, "bert.pooler.dense.weight": None}, "no pooler"),
                ({"embeddings.LayerNorm.bias": fill(rng, "F32", 6)}, "twice"),
                ({"bert.embeddings.LayerNorm.beta": fill(rng, "F32", 6)}, "twice"),
                ({"bert.embeddings.word_embeddings.weight": None}, "missing")):
            tensors = {name: value for name, value in dict(t, **change).items() if value}
            with self.subTest(pattern=pattern):
                self.refused(folder(config, {"model.safetensors": tensors}), pattern)

    def test_untied_decoder_missing(self):
        config, t = small_bert(masked=True)
        self.refused(folder(dict(config, tie_word_embeddings=False), {"model.safetensors": t}),
                     "missing: cls.predictions.decoder.weight")


# Hostile files ------------------------------------------------------------------------------------

class Safetensors(Case):
    def setUp(self):
        self.config, self.tensors = small_llama()
        data = safetensors(self.tensors)
        length = struct.unpack("<Q", data[:8])[0]
        self.header, self.data = json.loads(data[8:8 + length]), data[8 + length:]

    def hostile(self, data, pattern):
        self.refused(folder(self.config, {"model.safetensors": data}), pattern)

    def changed(self, name="model.norm.weight", **entry):
        return joined(dict(self.header, **{name: dict(self.header[name], **entry)}), self.data)

    def test_header(self):
        for data in (b"", b"1234567", bytes(8), struct.pack("<Q", 2 ** 64 - 1) + b"{}",
                     struct.pack("<Q", 1 << 40) + b"{}", struct.pack("<Q", 3) + b"{}",
                     joined(b"[]", b""), joined(b"{", b""), joined(b"\xff\xff", b""),
                     joined(b'{"a":' * 100000, b""), joined(b'{"a": 1}', b""),
                     joined(b'{"a": {}}', b""), joined(b'{"a": null}', b"")):
            self.hostile(data, "model.safetensors")
        self.hostile(joined(b"{}", b""), "too few")
        self.hostile(joined(json.dumps(self.header)[:-1].encode() + b', "model.norm.weight": {}}',
                            self.data), "twice")

    def test_entries(self):
        span = self.header["model.norm.weight"]["data_offsets"]
        end = len(self.data)
        for entry, pattern in (
                (dict(data_offsets=[span[0], end + 4]), "outside"),
                (dict(data_offsets=[span[1], span[0]]), "outside|not sizes"),
                (dict(data_offsets=[-4, 28]), "not sizes"),
                (dict(data_offsets=[2 ** 63, 2 ** 63 + 32]), "not sizes"),
                (dict(data_offsets=[1e30, 2e30]), "not sizes"),
                (dict(data_offsets=[span[0]]), "not sizes"), (dict(data_offsets=None), "not sizes"),
                (dict(data_offsets=[True, 32]), "not sizes"),
                (dict(data_offsets=[span[0] + 4, span[1] + 4]), "overlaps|outside"),
                (dict(data_offsets=[0, 32]), "overlaps"),
                (dict(shape=[9]), "bytes for shape"), (dict(shape=[-8]), "not sizes"),
                (dict(shape=[2 ** 62, 4]), "not sizes"),
                (dict(shape=[2 ** 40, 2 ** 40]), "bytes for"),
                (dict(shape=8), "not sizes"), (dict(shape=[8.0]), "not sizes"),
                (dict(shape=[8] + [1] * 30), "not sizes"), (dict(shape=[1] * 8), "bytes for shape"),
                (dict(dtype="F16"), "bytes for shape"), (dict(dtype="F4"), "F4"),
                (dict(dtype=None), "null"), (dict(dtype=["F32"]), "F32")):
            with self.subTest(entry=entry):
                self.hostile(self.changed(**entry), pattern)

    def test_holes(self):
        self.hostile(joined(self.header, self.data + b"1234"), "do not fill")
        del self.header["lm_head.weight"]
        self.hostile(joined(self.header, self.data), "do not fill")

    def test_overlap_of_what_is_ignored(self):
        """Sizes that add up do not hide an overlap."""
        span = self.header["model.norm.weight"]["data_offsets"]
        self.header["x.rotary_emb.inv_freq"] = dict(dtype="F32", shape=[2],
                                                    data_offsets=[span[0], span[0] + 8])
        self.hostile(joined(self.header, self.data + bytes(8)), "overlaps")

    def test_cut(self):
        whole = joined(self.header, self.data)
        for size in [*range(0, 20), len(whole) // 2, len(whole) - 1]:
            self.hostile(whole[:size], "model.safetensors")

    def test_index(self):
        files = sharded(self.tensors, "model%s.safetensors", safetensors)
        name = "model.safetensors.index.json"
        index = json.loads(files[name])["weight_map"]
        first = files["model-00001-of-00003.safetensors"]
        for change, pattern in (
                ({name: b"{}"}, "weight_map"), ({name: b'{"weight_map": [1]}'}, "weight_map"),
                ({name: b'{"weight_map": {"a": 1}}'}, "weight_map"),
                ({name: self.index(index, "../1/model/model.safetensors")}, "plain file name"),
                ({name: self.index(index, "/etc/passwd")}, "plain file name"),
                ({name: self.index(index, "..")}, "plain file name"),
                ({name: self.index(index, "a\0b")}, "plain file name"),
                ({name: self.index(index, "")}, "plain file name"),
                ({name: self.index(index, "gone.safetensors")}, "gone.safetensors is not there"),
                ({name: json.dumps({"weight_map": dict(index, strange=list(index.values())[0])}
                                   ).encode()}, "in none of the files: strange"),
                ({"model-00002-of-00003.safetensors": first}, "also in another file")):
            with self.subTest(pattern=pattern):
                self.refused(folder(self.config, dict(files, **change)), pattern)

    @staticmethod
    def index(index, file):
        return json.dumps({"weight_map": dict(index, **{"model.norm.weight": file})}).encode()

    def test_random_changes_of_the_header(self):
        whole, rng = joined(self.header, self.data), random.Random(1)
        path = folder(self.config, {})
        for _ in range(400):
            data = bytearray(whole)
            for _ in range(rng.randint(1, 3)):
                data[rng.randrange(len(whole) - len(self.data))] = rng.choice(b'012389{}[]",:aF\\')
            self.either(path, "model.safetensors", data)


class Evil:
    """Unpickled by Python, this makes a file."""
    made = os.path.join(common.scratch(), "executed")

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


class Pickles(Case):
    def setUp(self):
        self.config, self.tensors = small_llama(tied=True)
        self.data = [data for _, _, data in self.tensors.values()]

    def hostile(self, code, pattern="pickle", storages=None):
        """As zip and as old file, whole and as first shard."""
        code = code if isinstance(code, bytes) else pickle.dumps(code, 2)
        for data in (torch_zip(code, self.data if storages is None else storages),
                     torch_old(self.tensors, code=code)):
            self.refused(folder(self.config, {"pytorch_model.bin": data}), pattern)
        self.assertFalse(os.path.exists(Evil.made), "executed")

    def test_nothing_is_executed(self):
        python = "open(%r, 'w')" % Evil.made
        for evil in (Evil(os.system, "touch " + Evil.made), Evil(eval, python), Evil(exec, python),
                     Evil(open, Evil.made, "w"), Evil(subprocess.call, ["touch", Evil.made]),
                     Evil(os.mkdir, Evil.made), Evil(getattr, 1, "real"),
                     Evil(__import__, "os"), Evil(importlib.import_module, "os")):
            with self.subTest(evil=evil.call[0]):
                self.hostile(evil, "asks for ")
                self.hostile({"model.norm.weight": evil}, "asks for ")
        for evil in (Evil(os.system, "touch " + Evil.made), Evil(eval, python)):
            for protocol in range(6):
                self.hostile(pickle.dumps(evil, protocol))

    def test_names(self):
        for name in (b"ctorch\nload\n", b"ctorch.serialization\nload\n", b"ctorch\nStorage\n",
                     b"ctorch\n../FloatStorage\n", b"ctorch.x\nFloatStorage\n", b"c\n\n",
                     b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n", b"c__builtin__\neval\n",
                     b"ccollections\nOrderedDict.__init__\n", b"ctorch\nQInt8Storage\n",
                     b"ctorch._utils _rebuild_tensor_v2\n\n", b"cos\nsystem"):
            self.hostile(b"\x80\x02" + name + b".", "pickle|contents")

    def test_instructions(self):
        for code in (b"", b".", b"\x80\x02.", b"\x80\x02", b"\x80\x04\x95" + bytes(8) + b"].",
                     b"\x80\x02(.", b"\x80\x02(t(", b"\x80\x02)R.", b"\x80\x02))R.",
                     b"\x80\x02ctorch\nFloatStorage\n)R.", b"\x80\x02h\x00.",
                     b"\x80\x02}K\x01K\x02s.",
                     b"\x80\x02]}K\x01Ku.", b"\x80\x02}(K\x01u.", b"\x80\x02N)b.", b"\x80\x02)Q.",
                     b"\x80\x02u.", b"\x80\x02t.", b"\x80\x02\x85.", b"\x80\x02K\x05a.", b"(lp0\n.",
                     b"\x80\x02cos\n", b"\x80\x02\xff.", b"\x80\x02r\xff\xff\xff\xff.",
                     b"\x80\x02X\xff\xff\xff\xffabc.", b"\x80\x02\x8b\xff\xff\xff\x7f.",
                     b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7f.", b"\x80\x02}i.", b"P1\n.",
                     b"\x80\x02ccollections\nOrderedDict\nK\x01\x85R.", b"\x80\x02(i__main__\nx\n.",
                     b"\x80\x02\x82\x01.", b"\x80\x02N\x81."):
            with self.subTest(code=code):
                self.hostile(code, "pickle|contents|data.pkl")

    def test_instruction_of_no_effect(self):
        self.hostile(b"\x80\x02N0" + state_dict(self.tensors)[2:], "instruction POP")
        self.hostile(b"\x80\x04" + state_dict(self.tensors)[2:].replace(b"q\x01", b"\x94"),
                     "instruction MEMOIZE")

    def test_memory(self):
        """Python's own unpickler would make room for two thousand million entries here, and even a
        pickle of nothing but small things must not become large."""
        limit = limits("RLIMIT_AS", 300 << 20)
        for code in (b"\x80\x02}r\xff\xff\xff\x7f0.", b"\x80\x02" + b"}" * (1 << 19) + b"."):
            path = folder(self.config, {"pytorch_model.bin": torch_zip(code, self.data)})
            child = subprocess.run([sys.executable, SCRIPT, "model", path, path + ".out"],
                                   capture_output=True, text=True, preexec_fn=limit, check=False)
            self.assertEqual(child.returncode, 1)
            self.assertRegex(child.stderr, "^export.py: .*: (pickle: instruction POP|tensors: )")

    def test_nested_without_end(self):
        code = b"\x80\x02)q\x00" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(200))
        self.hostile(code + b".", "not a dictionary|storage keys")
        self.hostile(b"\x80\x02}h" + code[2:], "pickle")
        self.hostile(b"\x80\x02}" + code[2:] + b"K\x01s.", "a key not text|without what")
        self.hostile(b"\x80\x02" + b"]" * 100000 + b"a" * 99999 + b".",
                     "not a dictionary|storage keys")

    def test_tensors(self):
        for change, pattern in (
                (dict(count=9), "missing or of another size|larger than|size"),
                (dict(start=1), "larger than its storage"), (dict(start=-1), "unknown form"),
                (dict(start=1 << 40), "larger than its storage"),
                (dict(shape=[1 << 47]), "larger than its storage"),
                (dict(shape=[1 << 60]), "unknown form"), (dict(shape=[-8]), "unknown form"),
                (dict(shape=[1 << 40, 1 << 40]), "larger than its storage"),
                (dict(flags=b"}" + text("neg") + b"\x88s"), "unknown form"),
                (dict(shape=[7]), "shape"), (dict(shape=[8, 1]), "shape"),
                (dict(strides=[2]), "transposed or sliced"), (dict(strides=[0]), "transposed"),
                (dict(shape=[2, 4], strides=[1, 2]), "transposed"),
                (dict(strides=[]), "unknown form"),
                (dict(strides=[-1]), "unknown form"), (dict(key="99"), "missing|storage keys"),
                (dict(key="../data.pkl"), "missing|storage keys"),
                (dict(kind="F64"), "size|type|bytes"),
                (dict(kind="F16"), "size|bytes"), (dict(more=text("x")), "storage of unknown form"),
                (dict(more=b"NN"), "storage of unknown form"), (dict(more=b"("), "pickle")):
            names = list(self.tensors)
            i = names.index("model.norm.weight")
            settings = dict(dict(kind="F32", shape=[8], key=str(i), count=8), **change)
            code = b"\x80\x02}("
            for j, (name, (kind, shape, data)) in enumerate(self.tensors.items()):
                code += text(name) + (tensor_code(**settings) if i == j else tensor_code(
                    kind, shape, str(j), len(data) // 4))
            with self.subTest(change=change):
                self.hostile(code + b"u.", pattern)

    def test_not_a_state_dict(self):
        for value, pattern in (
                ([1], "not a dictionary|storage keys"), (5, "not a dictionary|storage keys"),
                ({"model": {}}, "entry model: not a tensor|storage keys"), ({1: 2}, "a key not"),
                ({"a": None}, "entry a: not|storage keys"), ({"model": Evil(dict)}, "asks for")):
            self.hostile(value, pattern)
        self.hostile(b"\x80\x02}(" + text("a") + b"ctorch\nFloatStorage\nu.",
                     "entry a: not a tensor|storage keys")
        self.hostile(state_dict(self.tensors)[:-1] + text("model.norm.weight") + b"Ns.",
                     "a key not text, or twice")

    def test_two_tensors_in_the_same_bytes(self):
        code = b"\x80\x02}("
        for j, (name, (kind, shape, data)) in enumerate(self.tensors.items()):
            key = j - 1 if name.endswith("layers.1.self_attn.v_proj.weight") else j
            code += text(name) + tensor_code(kind, shape, str(key), len(data) // 4)
        self.refused(folder(self.config, {"pytorch_model.bin": torch_zip(code + b"u.", self.data)}),
                     "overlaps")

    def test_parameters_and_parts_of_a_storage(self):
        """What torch also writes, and is right: parameters, and tensors within a larger storage."""
        code, at = b"\x80\x02}(", 0
        whole = b"".join(self.data)
        for name, (kind, shape, data) in self.tensors.items():
            code += text(name) + b"ctorch._utils\n_rebuild_parameter\n("
            code += tensor_code(kind, shape, "0", len(whole) // 4, start=at)
            code += b"\x88ccollections\nOrderedDict\n)RtR"
            at += len(data) // 4
        path = folder(self.config, {"pytorch_model.bin": torch_zip(code + b"u.", [whole])})
        self.check_tensors(self.exported(path), self.tensors, llama_names(2, True))

    def test_random_changes(self):
        whole, rng = state_dict(self.tensors), random.Random(2)
        path = folder(self.config, {})
        for _ in range(400):
            code = bytearray(whole)
            for _ in range(rng.randint(1, 3)):
                code[rng.randrange(len(code))] = rng.randrange(256)
            self.either(path, "pytorch_model.bin", torch_zip(bytes(code), self.data))


class TorchFiles(Case):
    def setUp(self):
        self.config, self.tensors = small_llama(tied=True)
        self.whole = torch_file(self.tensors)

    def hostile(self, data, pattern="pytorch_model.bin"):
        self.refused(folder(self.config, {"pytorch_model.bin": data}), pattern)

    def test_zips(self):
        data = [data for _, _, data in self.tensors.values()]
        self.hostile(torch_zip(state_dict(self.tensors), data, compress=zipfile.ZIP_DEFLATED),
                     "compressed")
        self.hostile(torch_zip(state_dict(self.tensors), data, byteorder=b"big"), "byteorder")
        self.hostile(torch_zip(state_dict(self.tensors), data[:-1]), "missing")
        self.hostile(torch_zip(state_dict(self.tensors), data[:-1] + [data[-1] + b"1234"]), "size")
        self.hostile(b"PK\x03\x04", "damaged")
        self.hostile(b"PK\x05\x06" + bytes(18), "data.pkl")
        self.hostile(b"not a checkpoint at all", "not saved by torch")
        self.hostile(b"", "not saved by torch")
        self.hostile(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "torch")

    def test_cut(self):
        for size in [*range(0, 60, 7), 500, len(self.whole) // 2, len(self.whole) - 30,
                     len(self.whole) - 1]:
            self.hostile(self.whole[:size])

    def test_directory_that_lies(self):
        start = self.whole.index(b"PK\x01\x02")
        for field, form in ((10, "<H"), (8, "<H"), (20, "<I"), (24, "<I"), (28, "<H"), (30, "<H"),
                            (42, "<I")):
            for value in (1, 99, 65535):
                data = bytearray(self.whole)
                struct.pack_into(form, data, start + field, value)
                with self.subTest(field=field, value=value):
                    self.hostile(bytes(data))

    def test_member_beyond_the_end(self):
        """The directory and the pickle agree, but the data would lie outside the file."""
        last = len(self.tensors) - 1
        self.tensors["model.norm.weight"] = ("F32", [1 << 20], bytes(32))
        code = state_dict(self.tensors).replace(tensor_code("F32", [1 << 20], str(last), 8),
                                                tensor_code("F32", [1 << 20], str(last), 1 << 20))
        data = bytearray(torch_zip(code, [data for _, _, data in self.tensors.values()]))
        entry = data.rindex(b"PK\x01\x02", 0, data.rindex(b"archive/data/%d" % last))
        struct.pack_into("<II", data, entry + 20, 4 << 20, 4 << 20)
        self.hostile(bytes(data), "outside the file")

    def test_two_members_in_one_place(self):
        data = bytearray(self.whole)
        entries = [m.start() for m in re.finditer(b"PK\x01\x02", self.whole)]
        data[entries[3] + 42:entries[3] + 46] = data[entries[2] + 42:entries[2] + 46]
        self.hostile(bytes(data))

    def test_old_files(self):
        good = torch_old(self.tensors)
        self.hostile(torch_old(self.tensors, little=False), "byte order")
        for size in [*range(0, 40), 200, len(good) // 2, len(good) - 1]:
            self.hostile(good[:size])
        self.hostile(pickle.dumps({}, 2), "torch")
        self.hostile(good + b"\0", "bytes, but")
        count = len(good) - len(self.tensors["model.norm.weight"][2]) - 8
        self.hostile(good[:count] + b"\7" + good[count + 1:], "of another size")
        rng, path = random.Random(4), folder(self.config, {})
        code = good.index(state_dict(self.tensors, more=b"N"))
        for _ in range(300):
            data = bytearray(good)
            data[rng.randrange(code + 3000)] ^= 1 << rng.randrange(8)
            self.either(path, "pytorch_model.bin", data)

    def test_random_changes_of_the_zip(self):
        rng, path = random.Random(3), folder(self.config, {})
        directory = self.whole.index(b"PK\x01\x02")
        for _ in range(300):
            data = bytearray(self.whole)
            data[rng.randrange(directory, len(data))] = rng.randrange(256)
            self.either(path, "pytorch_model.bin", data)


# Writing ------------------------------------------------------------------------------------------

SLOW = """
import importlib.util, signal, sys, time
spec = importlib.util.spec_from_file_location("slow", %r)
slow = importlib.util.module_from_spec(spec)
spec.loader.exec_module(slow)
copy = slow.copy_tensor
def copy_slowly(out, stored, progress):
    out.flush()
    print("copying", flush=True)
    time.sleep(0.2)
    copy(out, stored, progress)
slow.copy_tensor = copy_slowly
for name in slow.SIGNALS:
    signal.signal(getattr(signal, name), slow.stop)
sys.exit(slow.main(sys.argv[1:]))
""" % SCRIPT


class Writing(Case):
    def source(self):
        config, t = small_llama()
        path = folder(config, {"model.safetensors": t})
        out = os.path.join(os.path.dirname(path), "out.bin")
        with open(out, "wb") as f:
            f.write(b"precious")
        return path, out

    def intact(self, out):
        with open(out, "rb") as f:
            self.assertEqual(f.read(), b"precious")
        self.assertEqual(sorted(os.listdir(os.path.dirname(out))), ["model", "out.bin"])

    def slowly(self, path, out):
        child = subprocess.Popen([sys.executable, "-c", SLOW, "model", path, out],
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        child.stdout.readline()
        child.stdout.readline()
        return child

    def test_signals(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            path, out = self.source()
            child = self.slowly(path, out)
            self.assertEqual(len(os.listdir(os.path.dirname(out))), 3)
            child.send_signal(number)
            time.sleep(0.02)
            if child.poll() is None:
                child.send_signal(number)
            err = child.communicate(timeout=60)[1]
            self.assertEqual(child.returncode, 128 + number)
            self.assertEqual(err.count("\n"), 1, err)
            self.assertIn("stopped by a signal", err)
            self.intact(out)

    def test_killed(self):
        path, out = self.source()
        child = self.slowly(path, out)
        child.kill()
        child.communicate(timeout=60)
        with open(out, "rb") as f:
            self.assertEqual(f.read(), b"precious")

    def test_source_shrinks_meanwhile(self):
        path, out = self.source()
        child = self.slowly(path, out)
        os.truncate(os.path.join(path, "model.safetensors"), 3000)
        err = child.communicate(timeout=60)[1]
        self.assertEqual(child.returncode, 1)
        self.assertRegex(err, r"^export.py: .*safetensors: byte \d+: the file ends early; .*\n$")
        self.intact(out)

    def test_disk_full(self):
        path, out = self.source()
        child = subprocess.run([sys.executable, SCRIPT, "model", path, out], capture_output=True,
                               text=True, preexec_fn=limits("RLIMIT_FSIZE", 10000), check=False)
        self.assertEqual(child.returncode, 1)
        self.assertRegex(child.stderr, "^export.py: .*out.bin: output: .*; .*\n$")
        self.intact(out)

    def test_outputs(self):
        path, out = self.source()
        status, err = call("model", path, os.path.dirname(out))
        self.assertEqual((status, err.count("\n")), (1, 1))
        self.assertIn("not a plain file", err)
        status, err = call("model", path, os.path.join(path, "no", "out.bin"))
        self.assertEqual((status, err.count("\n")), (1, 1))
        self.assertRegex(err, "output: No such file")
        weights = os.path.join(path, "model.safetensors")
        status, err = call("model", path, weights)
        self.assertIn("is the source itself", err)
        self.intact(out)
        link = os.path.join(os.path.dirname(out), "link")
        os.symlink(out, link)
        self.assertEqual(call("model", path, link)[0], 0)
        self.assertTrue(os.path.islink(link))
        modelfile.read(out)

    def test_memory(self):
        config, _ = small_llama(layers=1)
        rows = 1 << 22
        kinds = {"model.embed_tokens.weight": rows * 8, "lm_head.weight": rows * 8}
        header, at = {}, 0
        for name, (_, shape, data) in small_llama(layers=1)[1].items():
            size = 4 * kinds[name] if name in kinds else len(data)
            header[name] = dict(dtype="F32", shape=[rows, 8] if name in kinds else shape,
                                data_offsets=[at, at + size])
            at += size
        path = folder(dict(config, vocab_size=rows), {"model.safetensors": joined(header, b"")})
        os.remove(os.path.join(path, "tokenizer.model"))    # too small for so many rows
        file = os.path.join(path, "model.safetensors")
        os.truncate(file, os.path.getsize(file) + at)
        out = os.path.join(os.path.dirname(path), "out.bin")
        tracemalloc.start()
        status, err = call("model", path, out)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        self.assertEqual(status, 0, err)
        self.assertGreater(os.path.getsize(out), 256 << 20)
        self.assertLess(peak, 20 << 20)
        os.remove(out)

    def test_left_over(self):
        path, out = self.source()
        other = "%s.tmp.%d" % (out, os.getpid())
        with open(other, "wb") as f:
            f.write(b"of another program")
        status, err = call("model", path, out)
        self.assertEqual((status, err.count("\n")), (1, 1))
        self.assertIn("remove it", err)
        os.remove(other)
        self.intact(out)

    def test_progress(self):
        try:
            import pty
        except ImportError:
            self.skipTest("no terminals on this system")
        path, out = self.source()
        ours, theirs = pty.openpty()
        child = subprocess.Popen([sys.executable, "-c", SLOW, "model", path, out], stderr=theirs,
                                 stdout=subprocess.DEVNULL)
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):      # at its end
            while b"MB in" not in shown:
                shown += os.read(ours, 1000)
        self.assertEqual(child.wait(), 0)
        os.close(ours)
        self.assertRegex(shown, rb"\rexport.py:  5\d%, 0.0 of 0.0 GB, \d+ s left")
        self.assertGreater(shown.count(b" s left"), 3)

    def test_command_line(self):
        path, out = self.source()
        good = ["model", path, out]
        for arguments in (
                [], ["model"], ["model", path], ["models", path, out], good + ["x"], ["--what"],
                good + ["--heads", "a=b"], good + ["--tok", path + "/tokenizer.model"],
                good + ["--head"], good + ["--head", "a"], good + ["--head", "=b"], good + ["--head", "a b=c"],
                good + ["--head-name", "a/b"], good + ["--context", "0"],
                good + ["--context", "1x"], good + ["--tokenizer", path + "/gone"]):
            with self.subTest(arguments=arguments):
                status, err = call(*arguments)
                self.assertEqual((status, err.count("\n")), (1, 1), err)
                self.assertTrue(err.startswith("export.py: "), err)
        self.intact(out)

    def test_names_of_tasks(self):
        """GLUE's names, the harness's and ours."""
        for name, kept in (("mnli_matched", "mnli"), ("MNLI-m", "mnli"), ("mnli_mismatched", "mnli_mm"),
                           ("MNLI-mm", "mnli_mm"), ("STS-B", "stsb"), ("CoLA", "cola")):
            file = {"stsb": "stsb_dev", "cola": "cola_dev"}.get(kept, "mnli_dev_matched")
            out = os.path.join(common.scratch(), "named.tsv")
            status, err = call("task", name, os.path.join(common.TESTS, "tasks", file + ".tsv"), out)
            self.assertEqual(status, 0, err)
            with open(out, encoding="utf-8") as f:
                self.assertIn("name=%s\t" % kept, f.readline())

    def test_summary(self):
        path, out = self.source()
        child = subprocess.run([sys.executable, SCRIPT, "model", path, out], capture_output=True,
                               text=True, check=False)
        self.assertEqual((child.returncode, child.stdout), (0, ""))
        self.assertRegex(child.stderr, r"^export\.py: .*: llama, 2 layers, 21 tensors, .*\n$")

    def tearDown(self):
        shutil.rmtree(os.path.join(common.scratch(), "export"), ignore_errors=True)


if __name__ == "__main__":
    unittest.main()
