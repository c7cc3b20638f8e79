"""Speed beside what people would otherwise run on the same CPU: `make bench`.

    python3 tests/bench.py [--quick] [--threads N] [--pairs N] [--python PYTHON]

PYTHON is one that has the peers (torch, transformers, llama-cpp-python: `pip install` them into a
virtual environment; llama-cpp-python compiles for the machine it is on). A peer that is missing is
named. The models have random weights, of TinyLlama-1.1B's and BERT-Large's shape (--quick: small
ones), and are made here, 5 GB at a time. Every figure is the median over alternating runs, +- half
the distance of the quartiles; a ratio is the median of the ratios of neighbouring runs.
"""
import argparse
import array
import os
import platform
import random
import statistics
import struct
import subprocess
import sys
import time
import zlib

LLAMA = dict(dim=2048, hidden=5632, layers=22, heads=32, kv=4, vocab=32000, length=4096)
BERT = dict(dim=1024, hidden=4096, layers=24, heads=16, kv=16, vocab=30522, length=512)
QUICK = dict(LLAMA, dim=512, hidden=1408, layers=4, heads=8, kv=2, vocab=4000)
QUICK_BERT = dict(BERT, dim=256, hidden=1024, layers=4, heads=4, kv=4, vocab=3000)
TYPES = {"f32": (0, 0, 4), "f16": (1, 1, 2), "bf16": (2, 30, 2)}     # our number, GGUF's, bytes
NOT_HERE = ["rows with AMX or AVX-512: this program has no kernels for them",
            "HellaSwag items beside lm-evaluation-harness: not in this benchmark",
            "tokenizing 10 MB beside Hugging Face tokenizers: not in this benchmark"]


# Model files: the program's own, and GGUF ---------------------------------------------------------

def weights(kind):
    """About a megabyte of random weights, as stored; tensors repeat it."""
    rng = random.Random(1)
    values = [rng.gauss(0, 0.02) for _ in range(250007)]
    if kind == "f32":
        return array.array("f", values).tobytes()
    if kind == "f16":
        return struct.pack("<%de" % len(values), *values)
    if kind == "q8_0":
        return b"".join(struct.pack("<e", 1e-4) + rng.randbytes(32) for _ in range(7919))
    return b"".join(struct.pack("<f", v)[2:] for v in values)


def fill(out, block, count):
    while count:
        count -= out.write(block[:min(count, len(block))])


def tensors(size, bert):
    """[(our name, GGUF's, rows, columns; 0 rows: a vector)]"""
    d, h, head = size["dim"], size["hidden"], size["dim"] // size["heads"]
    found, kv = [("embed", "token_embd", size["vocab"], d)], head * size["kv"]
    layer = [("attn_norm", "attn_norm", 0, d), ("q", "attn_q", d, d), ("k", "attn_k", kv, d),
             ("v", "attn_v", kv, d), ("o", "attn_output", d, d), ("ffn_norm", "ffn_norm", 0, d),
             ("gate", "ffn_gate", h, d), ("up", "ffn_up", h, d), ("down", "ffn_down", d, h)]
    if bert:
        found += [("positions", "", size["length"], d), ("segments", "", 2, d),
                  ("embed_norm", "", 0, d), ("embed_norm_bias", "", 0, d)]
        layer = [row for row in layer if row[0] != "gate"]
        layer += [(name + "_bias", "", 0, row or cols) for name, _, row, cols in layer]
    for i in range(size["layers"]):
        found += [("layers.%d.%s" % (i, a), "blk.%d.%s" % (i, b), *rest) for a, b, *rest in layer]
    return found if bert else found + [("norm", "output_norm", 0, d), ("head", "output",
                                                                      size["vocab"], d)]


def write_model(path, size, kind, bert=False):
    rows = tensors(size, bert)
    number, _, width = TYPES[kind]
    header_bytes = -(-(192 + 96 * len(rows)) // 64) * 64
    table, end, places = b"", header_bytes, []
    for name, _, n, cols in rows:
        count = max(n, 1) * cols * (width if n else 4)
        table += struct.pack("<56sIIQQQQ", name.encode(), number if n else 0, 2 if n else 1,
                             max(n, 1), cols, end, count)
        places.append((end, count, n))
        end += -(-count // 64) * 64

    def head(crc):
        return struct.pack("<8sIIQQIIQQQ9I2fI5i3IQQ32x", b"PAINTERS", 1, 1 + bert, end,
                           header_bytes, crc, len(rows), 192, 192 + 96 * len(rows), 0, size["dim"],
                           size["hidden"], size["layers"], size["heads"], size["kv"],
                           size["vocab"], size["length"], 2 * bert, 0 if bert else 1,
                           10000.0, 1e-5, 0, -1, -1, -1, -1, -1, 0, size["dim"] // size["heads"],
                           0, 192 + 96 * len(rows), 0)
    table = table.ljust(header_bytes - 192, b"\0")
    block, ones = weights(kind), array.array("f", [1.0] * max(size["hidden"], size["dim"])).tobytes()
    with open(path, "wb") as out:
        out.write(head(zlib.crc32(head(0) + table)) + table)
        for at, count, n in places:
            out.write(bytes(at - out.tell()))
            fill(out, block if n else ones, count)
        out.write(bytes(end - out.tell()))


def write_gguf(path, size, kind):
    def text(s):
        return struct.pack("<Q", len(s)) + s.encode()

    keys = dict(context_length=size["length"], embedding_length=size["dim"],
                block_count=size["layers"], feed_forward_length=size["hidden"],
                vocab_size=size["vocab"])
    keys["rope.dimension_count"] = size["dim"] // size["heads"]
    keys["attention.head_count"], keys["attention.head_count_kv"] = size["heads"], size["kv"]
    meta = [text("general.architecture") + struct.pack("<I", 8) + text("llama"),
            text("tokenizer.ggml.model") + struct.pack("<I", 8) + text("no_vocab"),
            text("llama.attention.layer_norm_rms_epsilon") + struct.pack("<If", 6, 1e-5)]
    meta += [text("llama." + key) + struct.pack("<II", 4, value) for key, value in keys.items()]
    rows = tensors(size, False)
    number, info, at, places = {"q8_0": 8}.get(kind) or TYPES[kind][1], b"", 0, []
    for _, name, n, cols in rows:
        count = max(n, 1) * cols * 34 // 32 if n and kind == "q8_0" else max(n, 1) * cols * (
            TYPES[kind][2] if n else 4)
        shape = (cols, n) if n else (cols,)
        info += text(name + ".weight") + struct.pack("<I%dQIQ" % len(shape), len(shape), *shape,
                                                     number if n else 0, at)
        places.append((at, count, n))
        at += -(-count // 32) * 32
    head = b"GGUF" + struct.pack("<IQQ", 3, len(rows), len(meta)) + b"".join(meta) + info
    head += bytes(-len(head) % 32)
    block, ones = weights(kind), array.array("f", [1.0] * size["dim"]).tobytes()
    with open(path, "wb") as out:
        out.write(head)
        for place, count, n in places:
            out.write(bytes(len(head) + place - out.tell()))
            fill(out, block if n else ones, count)
        out.write(bytes(-out.tell() % 32))


# Peers: this file again, run by PYTHON, answers lines with seconds -------------------------------

def serve(prepare):
    """prepare() gives (a line about the peer, a function of a command's words)."""
    about, run = prepare()
    print(about, flush=True)
    for line in sys.stdin:
        words = line.split()
        start = time.perf_counter()
        started = run(words[0], *map(int, words[1:]))
        print(time.perf_counter() - (started or start), flush=True)


def llama_cpp_peer(path, threads):
    import llama_cpp as lib
    silence = lib.llama_log_callback(lambda *_: None)
    lib.llama_log_set(silence, None)
    lib.llama_backend_init()
    model_options, options = lib.llama_model_default_params(), lib.llama_context_default_params()
    model = lib.llama_load_model_from_file(path.encode(), model_options)
    options.n_ctx, options.n_batch, options.n_ubatch = 4096, 2048, 512
    options.n_threads = options.n_threads_batch = threads
    make = getattr(lib, "llama_init_from_model", None) or lib.llama_new_context_with_model
    context = make(model, options)
    if not model or not context:
        raise SystemExit("llama.cpp does not load " + path)

    def clear():
        if hasattr(lib, "llama_memory_clear"):
            lib.llama_memory_clear(lib.llama_get_memory(context), True)
        else:
            (getattr(lib, "llama_kv_self_clear", None) or lib.llama_kv_cache_clear)(context)

    def decode(ids):
        tokens = (lib.llama_token * len(ids))(*ids)
        if lib.llama_decode(context, lib.llama_batch_get_one(tokens, len(ids))):
            raise SystemExit("llama_decode failed")
        lib.llama_get_logits(context)[0]

    def run(what, n, _=1, past=0, _silence=silence):   # which must not be collected
        rng = random.Random(3)
        clear()
        if what == "prefill":
            decode([rng.randrange(1000) for _ in range(n)])
            return None
        decode([rng.randrange(1000) for _ in range(max(past, 1))])
        start = time.perf_counter()
        for _ in range(n):
            decode([rng.randrange(1000)])
        return start
    return "llama.cpp (llama-cpp-python %s)" % lib.__version__, run


def transformers_peer(size, kind, threads):
    import torch
    import transformers
    torch.set_num_threads(threads)
    config = transformers.BertConfig(
        hidden_size=size["dim"], intermediate_size=size["hidden"], vocab_size=size["vocab"],
        num_hidden_layers=size["layers"], num_attention_heads=size["heads"])
    model = transformers.BertModel(config).eval().to(getattr(torch, kind))

    @torch.inference_mode()
    def run(_, sequences, tokens):
        model(torch.randint(0, 1000, (sequences, tokens)))
    return "transformers %s, torch %s" % (transformers.__version__, torch.__version__), run


class Runner:
    """A process that answers commands with seconds."""

    def __init__(self, *command):
        self.process = subprocess.Popen(list(map(str, command)), stdin=subprocess.PIPE, text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.about = self.process.stdout.readline().strip()

    def ask(self, command):
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()


# The table ----------------------------------------------------------------------------------------

def spread(values):
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return "%9.2f +- %-7.2f" % (statistics.median(values), (high - low) / 2)


def row(name, target, ours, our_command, peer, peer_command, count, pairs):
    """Alternating pairs of runs that work on `count` tokens each; one line of the table."""
    runners = [(ours, our_command)] + ([(peer, peer_command)] if peer else [])
    times = [[] for _ in runners]
    for runner, command in runners:
        runner.ask(command)                                 # memory is touched, threads are awake
    for i in range(pairs):
        for j in sorted(range(len(runners)), reverse=i % 2):
            times[j].append(runners[j][0].ask(runners[j][1]))
    rates = [[count / t for t in column] for column in times]
    line = "%-34s %s" % (name, spread(rates[0]))
    if peer:
        ratio = statistics.median(b / a for a, b in zip(*times))
        line += "  %s  %5.2f x  (%s)" % (spread(rates[1]), ratio, target)
    print(line, flush=True)
    return statistics.median(rates[0])


def llama_rows(args, folder, tools):
    size = QUICK if args.quick else LLAMA
    for kind in ("f32", "f16", "bf16", "q8"):
        path, gguf = os.path.join(folder, "bench.bin"), os.path.join(folder, "bench.gguf")
        write_model(path, size, "bf16" if kind == "q8" else kind)
        if kind == "q8":
            subprocess.run([tools["painters"], path, "--quantize", path, "--quiet"], check=True,
                           stdout=subprocess.DEVNULL)
        peer = None
        if tools["llama_cpp"]:
            write_gguf(gguf, size, "q8_0" if kind == "q8" else kind)
            peer = Runner(args.python, __file__, "--serve", "llama_cpp", gguf, args.threads)
            if not peer.about:
                print("llama.cpp does not load its model; its column stays empty")
                peer.close()
                peer = None
        ours = Runner(tools["bench_model"], path)
        target = {"f32": "1.5", "bf16": "1.2", "f16": "1.2", "q8": "-"}[kind]
        at_512 = row("prefill 512, " + kind, target, ours, "prefill 512", peer, "prefill 512", 512,
                     args.pairs)
        at_2048 = row("prefill 2048, " + kind, "-", ours, "prefill 2048", None, "", 2048,
                      max(1, args.pairs // 3))
        print("%-34s %9.2f of its rate at 512 (0.85)" % ("", at_2048 / at_512))
        one = row("decode 1, " + kind, "1", ours, "decode 16 1 16", peer, "decode 16 1 16", 16,
                  args.pairs)
        many = row("decode 32, " + kind, "-", ours, "decode 4 32 16", None, "", 128,
                   max(1, args.pairs // 3))
        print("%-34s %9.2f x one sequence (f32 12, 16-bit 8)" % ("", many / one))
        for runner in [ours] + ([peer] if peer else []):
            runner.close()
        for leftover in (path, gguf):
            if os.path.exists(leftover):
                os.remove(leftover)


def bert_rows(args, folder, tools):
    size, path = QUICK_BERT if args.quick else BERT, os.path.join(folder, "bench.bin")
    write_model(path, size, "f32", bert=True)
    for kind, target in (("float32", "1.1"), ("bfloat16", "-")):
        peer = None
        if tools["transformers"]:
            peer = Runner(args.python, __file__, "--serve", "transformers", kind, args.threads,
                          *(["--quick"] if args.quick else []))
        ours = Runner(tools["bench_model"], path)
        row("BERT 8 x 128, f32; peer " + kind, target, ours, "encode 8 128", peer, "encode 8 128",
            1024, args.pairs)
        for runner in [ours] + ([peer] if peer else []):
            runner.close()
    os.remove(path)


def machine():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            names = [line.split(":")[1].strip() for line in f if line.startswith("model name")]
        return "%s, %d cores" % (names[0], len(names))
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def version(python, package):
    code = "from importlib.metadata import version; print(version(%r))" % package
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small models, few runs")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--pairs", type=int, help="alternating runs of a row (default 11; quick 3)")
    parser.add_argument("--python", default=sys.executable, help="one that has the peers")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        name, what, threads = args.serve
        return serve(lambda: llama_cpp_peer(what, int(threads)) if name == "llama_cpp" else
                     transformers_peer(QUICK_BERT if args.quick else BERT, what, int(threads)))
    args.pairs = args.pairs or (3 if args.quick else 11)
    os.environ.setdefault("CFLAGS", "-std=gnu11 -O3 -fopenmp")
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    import common
    tools = {"painters": common.painters(), "bench_model": common.build("bench_model")}
    print("%s; %d threads; %s" % (machine(), args.threads, time.strftime("%Y-%m-%d")))
    for name, package in (("llama_cpp", "llama-cpp-python"), ("transformers", "transformers")):
        tools[name] = version(args.python, package)
        print("%s %s" % (package, tools[name] or "is missing: pip install it, or give --python"))
    for missing in NOT_HERE:
        print("not measured - " + missing)
    print("%-34s %-20s  %-20s  ratio    (target)" % ("tokens per second", "painters", "peer"))
    llama_rows(args, common.scratch(), tools)
    bert_rows(args, common.scratch(), tools)
    if not args.quick:
        import bench_sweep
        for layers in (22, 32):
            for sweep in bench_sweep.SWEEPS:
                bench_sweep.compare(layers, 40, sweep)


if __name__ == "__main__":
    main()
