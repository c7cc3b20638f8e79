"""Speed beside what people would otherwise run on the same CPU: `make peers`, then `make bench`.

    python3 tests/bench.py [--quick] [--rows NAME ...] [--python PYTHON] [--python-avx2 PYTHON]
                           [--llama2c PATH] [--seven FOLDER] [--threads N] [--pairs N] [--items N]

--python has the packages of PEERS; llama-cpp-python compiles for the machine it is on, and the one
of --python-avx2 is told to do without AVX-512 (the Makefile says how). --llama2c is a checkout of
llama2.c or its `run`, --seven a folder where 41 GB fit, for the 7B rows. What is missing is named.
--rows takes names of the tables below, or patterns such as 'prefill-*'; --quick makes models small
and runs few.
The models have random weights of the real shapes and are made here, up to 9 GB at a time (TMPDIR
says where). Sides take turns in one run; a figure is the median, +- half the distance of the
quartiles, and a ratio is the median of the ratios of neighbouring runs.
"""
import argparse
import array
import fnmatch
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import time

import bench_files
import bench_sides
import bench_sweep
import common

PEERS = ("llama-cpp-python==0.3.34", "torch==2.13.0", "transformers==5.23.0", "lm-eval[hf]==0.4.13",
         "tokenizers==0.23.3", "sentencepiece==0.2.3")

# A side is a function of class Sides in bench_sides.py and its arguments, a command is one that
# bench_model.c answers ("=": the same). "base" are the fastest kernels but AMX's, which users get
# on a CPU without it, and where a text is continued; with no name, those that the program chooses.
# "-": reported only.
#
# name              | our side          | command        | beside          | its command    | least
ROWS = """
prefill-f32         | passes f32 base   | prefill 512    | llama_cpp f32     | =              | 1.5
prefill-f32-amx     | passes f32 amx    | prefill 512    | llama_cpp f32     | =              | 3
long-f32            | passes f32 base   | prefill 2048   | passes f32 base   | prefill 512    | 0.85
long-f32-amx        | passes f32 amx    | prefill 2048   | passes f32 amx    | prefill 512    | 0.65
decode-f32          | passes f32 base   | decode 16 1 16 | llama_cpp f32     | =              | 1
decode32-f32        | passes f32 base   | decode 4 32 16 | passes f32 base   | decode 16 1 16 | 12
decode32-f32-amx    | passes f32 amx    | decode 4 32 16 | passes f32 base   | decode 16 1 16 | 12
prefill-f16         | passes f16 base   | prefill 512    | llama_cpp f16     | =              | 1.5
prefill-f16-amx     | passes f16 amx    | prefill 512    | llama_cpp f16     | =              | 3
long-f16            | passes f16 base   | prefill 2048   | passes f16 base   | prefill 512    | 0.85
long-f16-amx        | passes f16 amx    | prefill 2048   | passes f16 amx    | prefill 512    | 0.65
decode-f16          | passes f16 base   | decode 16 1 16 | llama_cpp f16     | =              | 1
decode32-f16        | passes f16 base   | decode 4 32 16 | passes f16 base   | decode 16 1 16 | 8
decode32-f16-amx    | passes f16 amx    | decode 4 32 16 | passes f16 base   | decode 16 1 16 | 12
prefill-bf16        | passes bf16 base  | prefill 512    | llama_cpp bf16    | =              | 1.5
prefill-bf16-amx    | passes bf16 amx   | prefill 512    | llama_cpp bf16    | =              | 4
prefill-bf16-avx2   | passes bf16 avx2  | prefill 512    | llama_cpp bf16 avx2 | =            | 1.2
long-bf16           | passes bf16 base  | prefill 2048   | passes bf16 base  | prefill 512    | 0.85
long-bf16-amx       | passes bf16 amx   | prefill 2048   | passes bf16 amx   | prefill 512    | 0.65
decode-bf16         | passes bf16 base  | decode 16 1 16 | llama_cpp bf16    | =              | 1
decode32-bf16       | passes bf16 base  | decode 4 32 16 | passes bf16 base  | decode 16 1 16 | 8
decode32-bf16-amx   | passes bf16 amx   | decode 4 32 16 | passes bf16 base  | decode 16 1 16 | 12
hellaswag           | program bf16 base | score {items}  | lm_eval float32   | =              | 2
hellaswag-half      | program bf16 base | score {items}  | lm_eval bfloat16  | =              | -
hellaswag-amx       | program bf16 amx  | score {items}  | lm_eval float32   | =              | 6
hellaswag-half-amx  | program bf16 amx  | score {items}  | lm_eval bfloat16  | =              | 1.5
hellaswag-all       | program bf16      | score {all}    | -                 | -              | -
prefill-q8          | passes q8 base    | prefill 512    | llama_cpp q8      | =              | -
prefill-q8-amx      | passes q8 amx     | prefill 512    | llama_cpp q8      | =              | 2
long-q8             | passes q8 base    | prefill 2048   | passes q8 base    | prefill 512    | 0.85
long-q8-amx         | passes q8 amx     | prefill 2048   | passes q8 amx     | prefill 512    | 0.65
decode-q8           | passes q8 base    | decode 16 1 16 | llama_cpp q8      | =              | 1
decode32-q8         | passes q8 base    | decode 4 32 16 | passes q8 base    | decode 16 1 16 | -
decode32-q8-amx     | passes q8 amx     | decode 4 32 16 | passes q8 base    | decode 16 1 16 | -
bert                | passes bert base  | encode 8 128   | transformers float32  | =          | 1.1
bert-half           | passes bert base  | encode 8 128   | transformers bfloat16 | =          | -
bert-amx            | passes bert amx   | encode 8 128   | transformers float32  | =          | 2
bert-half-amx       | passes bert amx   | encode 8 128   | transformers bfloat16 | =          | -
stories             | program stories   | generate all   | llama2c           | generate best  | 1
stories-threads     | program stories   | generate all   | program stories   | generate one   | 1
tokenize-llama      | passes tiny-llama | tokenize {text} | tokenizers llama | =              | 1
tokenize-bert       | passes tiny-bert  | tokenize {text} | tokenizers bert  | =              | 1
"""
ERRORS = {"error-q8": "base", "error-q8-amx": "amx"}    # no larger than llama.cpp's
SWEEPS = {"sweep-methods": bench_sweep.SWEEPS[0], "sweep-loops": bench_sweep.SWEEPS[1],
          "sweep-layers": bench_sweep.SWEEPS[2]}    # each at 22 and at 32 layers
SWEEP_TARGET = 0.9                                  # of what the count of layer passes allows


# The table ----------------------------------------------------------------------------------------

def work(command):
    """How much a command does: (number, unit)."""
    what, *words = command.split()
    if what == "tokenize":
        return os.path.getsize(words[0]) / 1e6, "MB/s"
    if what == "score":
        return int(words[0]), "items/s"
    if what == "generate":
        return 1, "tokens/s"
    return int(words[0]) * (int(words[1]) if what != "prefill" else 1), "tokens/s"


def spread(values):
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return "%.2f +- %.2f" % (statistics.median(values), (high - low) / 2)


def agreement(ours, theirs):
    """What both sides must agree on, in words: log-likelihoods, or a number of ids."""
    if not theirs or not ours:
        return ""
    if isinstance(ours, str):
        return "as many ids" if ours == theirs else "%s ids, there %s" % (ours, theirs)
    with open(theirs, encoding="utf-8") as f:
        pairs = [(float(a), b) for line, items in zip(ours, json.load(f))
                 for a, b in zip(line.split(), items)]
    return "%d log-likelihoods, mean %.1f, differ by at most %.2g" % (
        len(pairs), statistics.mean(a for a, _ in pairs), max(abs(a - b) for a, b in pairs))


def show(name, ours, theirs, ratio="", target="-", more=""):
    verdict = "" if not ratio or target == "-" else (
        "met" if float(ratio.split()[0]) >= float(target) else "missed")
    print("| %-18s | %-26s | %-40s | %-16s | %5s | %-6s | %s |" % (
        name, ours, theirs, ratio, target, verdict, more), flush=True)


def measure(sides, pairs, name, ours, our_command, other, other_command, target):
    """Alternating runs of both sides; one line of the table. Without the other side, ours alone."""
    commands = [our_command, our_command if other_command == "=" else other_command]
    running, missing = [], ""
    try:
        for side, command in zip((ours, other) if other != "-" else (ours,), commands):
            function, *words = side.split()
            try:
                started = getattr(sides, function)(*words)
                started.ask(command)                        # touches memory, wakes threads
                running.append(started)
            except bench_sides.Missing as reason:
                missing = "missing: %s" % reason
                if not running:
                    return show(name, "not run", missing, "", target)
        times = [[] for _ in running]
        for i in range(pairs if other != "-" else 1):
            for j in sorted(range(len(running)), reverse=i % 2):
                times[j].append(running[j].ask(commands[j]))
        works = [work(command)[0] for command in commands[:len(running)]]
        figures = [spread([n / t for t in column]) for n, column in zip(works, times)]
        figures[0] += " " + work(our_command)[1]
        if len(running) < 2:
            return show(name, figures[0], missing, "", target)
        ratio = spread([b / a * works[0] / works[1] for a, b in zip(*times)])
        about = [running[1].about, agreement(running[0].check, running[1].check)]
        return show(name, figures[0], "%s: %s" % (
            other if ours != other else other_command, figures[1]), ratio, target,
                    ", ".join(filter(None, about)))
    finally:
        for side in running:
            side.close()


def error(sides, name, kernels):
    """How far the logits of one model in 8 bits are from those of the plain kernels: ours, and
    llama.cpp's on the very same weights."""
    found, path = [], os.path.join(common.scratch(), "logits")
    for side in ("passes quick-q8 plain", "passes quick-q8 " + kernels, "llama_cpp quick-q8"):
        function, *words = side.split()
        try:
            runner = getattr(sides, function)(*words)
        except bench_sides.Missing as reason:
            return show(name, "not run", "missing: %s" % reason, "", "1")
        runner.ask("logits 64 " + path)
        runner.close()
        values = array.array("f")
        with open(path, "rb") as f:
            values.frombytes(f.read())
        found.append(values)
    right = found[0]
    scale = math.sqrt(sum(b * b for b in right))
    ours, theirs = (math.sqrt(sum((a - b) ** 2 for a, b in zip(one, right))) / scale
                    for one in found[1:])
    return show(name, "%.1e of rms" % ours, "llama_cpp q8: %.1e of rms" % theirs,
                "%.1f" % (theirs / max(ours, 1e-9)), "1", "error of the last of 64 tokens' logits")


def sweep(name, layers, items):
    schedules, whole, alone, allowed = bench_sweep.compare(layers, items, SWEEPS[name])
    show("%s-%d" % (name, layers), "%.1f s" % whole, "%d separate runs: %.1f s, %.2f x" % (
        schedules, alone, alone / whole), "%.2f of %.2f x" % (alone / whole / allowed, allowed),
         str(SWEEP_TARGET))


def machine():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            names = [line.split(":")[1].strip() for line in f if line.startswith("model name")]
        return "%s, %d cores" % (names[0], len(names))
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def say_where(args, sides):
    """The machine and the versions."""
    compiler = subprocess.run([os.environ.get("CC", "cc").split()[0], "--version"],
                              capture_output=True, text=True, check=False).stdout.split("\n")[0]
    print("%s; %d threads; kernels %s; %s; %s" % (machine(), args.threads, sides.fastest, compiler,
                                                  time.strftime("%Y-%m-%d")))
    for wanted in PEERS:
        package, _, pinned = wanted.replace("[hf]", "").partition("==")
        found = bench_sides.version(args.python, package)
        other = "" if found.split("+")[0] == pinned else " (not %s)" % pinned
        print("%s %s" % (package, found + other if found else
                         "is missing: `make peers`, or give --python"))
    if args.python_avx2:
        print("llama-cpp-python for AVX2 %s" % bench_sides.version(args.python_avx2,
                                                                    "llama-cpp-python"))
    for flag, what in (("python_avx2", "llama.cpp for AVX2"), ("llama2c", "llama2.c"),
                       ("seven", "a folder for the 7B rows")):
        if not getattr(args, flag):
            print("%s is missing: give --%s" % (what, flag.replace("_", "-")))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", action="store_true", help="print what pip has to install")
    parser.add_argument("--quick", action="store_true", help="small models, few runs")
    parser.add_argument("--rows", nargs="+", default=["*"], help="names or patterns")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--pairs", type=int, help="alternating runs of a row (default 7; quick 2)")
    parser.add_argument("--items", type=int, help="HellaSwag items for both sides (24; quick 4)")
    parser.add_argument("--python", default=sys.executable, help="one that has the peers")
    parser.add_argument("--python-avx2", help="one that has llama.cpp built for AVX2")
    parser.add_argument("--llama2c", help="a checkout of llama2.c, or its run")
    parser.add_argument("--seven", metavar="FOLDER", help="run the 7B rows there (41 GB)")
    args = parser.parse_args()
    if args.peers:
        return print(*PEERS)
    args.pairs = args.pairs or (2 if args.quick else 7)
    args.items = args.items or (4 if args.quick else 24)
    bench_files.as_users_do()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))       # large files are removed
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    sides = bench_sides.Sides(args)
    say_where(args, sides)
    show("row", "painters", "beside", target="least", more="notes")
    print("|---|---|---|---|---|---|---|")

    def wanted(name):
        return any(fnmatch.fnmatch(name, row) for row in args.rows)
    for line in ROWS.strip().splitlines():
        name, ours, our_command, other, other_command, target = map(str.strip, line.split("|"))
        if not wanted(name):
            continue
        sides.files.make_room(ours.split()[1])
        fill = {"items": args.items, "all": 8 if args.quick else 200}
        if "{text}" in our_command:
            fill["text"] = sides.files.get("text", "txt")
        measure(sides, args.pairs, name, ours, our_command.format(**fill), other,
                other_command.format(**fill), target)
    sides.files.make_room()
    for name, kernels in ERRORS.items():
        if wanted(name):
            error(sides, name, kernels)
    for name in SWEEPS:
        for layers in (22, 32):
            if wanted(name):
                sweep(name, layers, 2 if args.quick else 40)
    if wanted("seven"):
        if args.seven:
            subprocess.run([sys.executable, os.path.join(common.TESTS, "bench_seven.py"),
                            args.seven], check=True)
        else:
            show("seven", "not run", "give --seven")
    return None


if __name__ == "__main__":
    main()
