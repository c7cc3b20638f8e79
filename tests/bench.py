"""Speed beside what people would otherwise run on the same CPU: `make bench`.

    python3 tests/bench.py [--quick] [--rows NAME ...] [--python PYTHON] [--python-avx2 PYTHON]
                           [--llama2c PATH] [--seven FOLDER] [--threads N] [--pairs N] [--items N]

PYTHON is one that has the peers, such as a virtual environment after `pip install` of PEERS;
llama-cpp-python compiles for the machine it is on, and for --python-avx2 with
CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON".
--llama2c: a checkout of llama2.c, or its `run`. --seven: where 41 GB fit, for the 7B rows.
What is missing is named. --rows: those whose names begin so. --quick: small models, few runs.
The models have random weights of the real shapes and are made here, 9 GB at a time (TMPDIR says
where). Sides take turns in one run; a figure is the median, +- half the distance of the quartiles,
and a ratio is the median of the ratios of neighbouring runs.
"""
import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time

WAIT_POLICY = os.environ.get("OMP_WAIT_POLICY")     # common.py sets one, which users have not
import bench_files  # noqa: E402
import bench_sweep  # noqa: E402
import common  # noqa: E402

PEERS = ("llama-cpp-python==0.3.34", "torch==2.13.0", "transformers==5.23.0", "lm-eval==0.4.13",
         "tokenizers==0.23.3", "sentencepiece==0.2.3")

# name | our side | what it does | the other side | what that does (=: the same) | least ratio of rates
#
# A side is a function of class Sides and its arguments; a command is one of tests/bench_model.c's.
# "base" are the fastest kernels but AMX's, which users get on a CPU without; with no name, those that
# the program chooses. A row without a least ratio is reported only.
ROWS = """
prefill-f32         | passes f32 base   | prefill 512    | llama_cpp f32     | =              | 1.5
prefill-f32-amx     | passes f32 amx    | prefill 512    | llama_cpp f32     | =              | 3
long-f32            | passes f32 base   | prefill 2048   | passes f32 base   | prefill 512    | 0.85
long-f32-amx        | passes f32 amx    | prefill 2048   | passes f32 amx    | prefill 512    | 0.65
decode-f32          | passes f32        | decode 16 1 16 | llama_cpp f32     | =              | 1
decode32-f32        | passes f32 base   | decode 4 32 16 | passes f32 base   | decode 16 1 16 | 12
decode32-f32-amx    | passes f32 amx    | decode 4 32 16 | passes f32 amx    | decode 16 1 16 | 12
prefill-f16         | passes f16 base   | prefill 512    | llama_cpp f16     | =              | 1.5
prefill-f16-amx     | passes f16 amx    | prefill 512    | llama_cpp f16     | =              | 3
long-f16            | passes f16 base   | prefill 2048   | passes f16 base   | prefill 512    | 0.85
long-f16-amx        | passes f16 amx    | prefill 2048   | passes f16 amx    | prefill 512    | 0.65
decode-f16          | passes f16        | decode 16 1 16 | llama_cpp f16     | =              | 1
decode32-f16        | passes f16 base   | decode 4 32 16 | passes f16 base   | decode 16 1 16 | 8
decode32-f16-amx    | passes f16 amx    | decode 4 32 16 | passes f16 amx    | decode 16 1 16 | 12
prefill-bf16        | passes bf16 base  | prefill 512    | llama_cpp bf16    | =              | 1.5
prefill-bf16-amx    | passes bf16 amx   | prefill 512    | llama_cpp bf16    | =              | 4
prefill-bf16-avx2   | passes bf16 avx2  | prefill 512    | llama_cpp bf16 avx2 | =            | 1.2
long-bf16           | passes bf16 base  | prefill 2048   | passes bf16 base  | prefill 512    | 0.85
long-bf16-amx       | passes bf16 amx   | prefill 2048   | passes bf16 amx   | prefill 512    | 0.65
decode-bf16         | passes bf16       | decode 16 1 16 | llama_cpp bf16    | =              | 1
decode32-bf16       | passes bf16 base  | decode 4 32 16 | passes bf16 base  | decode 16 1 16 | 8
decode32-bf16-amx   | passes bf16 amx   | decode 4 32 16 | passes bf16 amx   | decode 16 1 16 | 12
hellaswag           | program bf16 base | score {items}  | lm_eval float32   | =              | 2
hellaswag-half      | program bf16 base | score {items}  | lm_eval bfloat16  | =              | -
hellaswag-amx       | program bf16 amx  | score {items}  | lm_eval float32   | =              | 6
hellaswag-half-amx  | program bf16 amx  | score {items}  | lm_eval bfloat16  | =              | 1.5
hellaswag-all       | program bf16      | score {all}    | -                 | -              | -
prefill-q8          | passes q8 base    | prefill 512    | llama_cpp q8      | =              | -
prefill-q8-amx      | passes q8 amx     | prefill 512    | llama_cpp q8      | =              | 2
long-q8             | passes q8 base    | prefill 2048   | passes q8 base    | prefill 512    | 0.85
long-q8-amx         | passes q8 amx     | prefill 2048   | passes q8 amx     | prefill 512    | 0.65
decode-q8           | passes q8         | decode 16 1 16 | llama_cpp q8      | =              | 1
decode32-q8         | passes q8 base    | decode 4 32 16 | passes q8 base    | decode 16 1 16 | -
decode32-q8-amx     | passes q8 amx     | decode 4 32 16 | passes q8 amx     | decode 16 1 16 | -
bert                | passes bert base  | encode 8 128   | transformers float32  | =          | 1.1
bert-half           | passes bert base  | encode 8 128   | transformers bfloat16 | =          | -
bert-amx            | passes bert amx   | encode 8 128   | transformers float32  | =          | 2
bert-half-amx       | passes bert amx   | encode 8 128   | transformers bfloat16 | =          | -
stories             | program stories   | generate all   | llama2c           | generate best  | 1
stories-threads     | program stories   | generate all   | program stories   | generate one   | 1
tokenize-llama      | passes tiny-llama | tokenize {text} | tokenizers llama | =              | 1
tokenize-bert       | passes tiny-bert  | tokenize {text} | tokenizers bert  | =              | 1
"""
SWEEPS = {"sweep-methods": bench_sweep.SWEEPS[0], "sweep-loops": bench_sweep.SWEEPS[1],
          "sweep-layers": bench_sweep.SWEEPS[2]}    # each at 22 and at 32 layers
SWEEP_TARGET = 0.9                                  # of what the count of layer passes allows


class Missing(Exception):
    """What this machine lacks, so that a side cannot run."""


# What the sides run on ----------------------------------------------------------------------------

class Files:
    """Made when they are first asked for: get("bf16", "gguf") and so on."""

    def __init__(self, quick):
        self.quick = "quick " if quick else ""

    def get(self, what, form):
        path = os.path.join(common.scratch(), what + "." + form)
        if not os.path.exists(path):
            getattr(self, form)(what, path)
        return path

    def make_room(self, *keep):
        """Removes the large files of all but these."""
        for name in os.listdir(common.scratch()):
            what, form = os.path.splitext(name)
            path = os.path.join(common.scratch(), name)
            if form in (".bin", ".gguf") and what not in keep:
                os.remove(path)
            elif form == ".hf" and what not in keep:
                shutil.rmtree(path)

    def hf(self, what, path):
        shape = what.replace("-", " ") if "tiny" in what else self.quick + (
            "bert" if what == "bert" else "llama")
        bench_files.write_checkpoint(path, shape, what if what in bench_files.TYPES else "f32")

    def bin(self, what, path):
        if what == "q8":
            subprocess.run([common.painters(), self.get("bf16", "bin"), "--quantize", path,
                            "--quiet"], check=True, stdout=subprocess.DEVNULL)
        elif what == "stories":
            checkpoint, tokenizer = bench_files.write_stories(common.scratch())
            common.export(checkpoint, "--tokenizer", tokenizer, out=path)
        else:
            common.export(self.get(what, "hf"), out=path)
            shutil.rmtree(self.get(what, "hf"))     # made again for a peer that reads it

    def gguf(self, what, path):
        bench_files.write_gguf(path, self.quick + "llama", what)

    def jsonl(self, _, path):
        bench_files.write_items(path)

    def tsv(self, what, path):
        subprocess.run([sys.executable, os.path.join(common.ROOT, "export.py"), "task", "hellaswag",
                        self.get(what, "jsonl"), path], check=True, stderr=subprocess.DEVNULL)

    def txt(self, _, path):
        bench_files.write_text(path, 300000 if self.quick else 10000000)


# Sides: processes that answer a command with seconds ----------------------------------------------

class Runner:
    """One that reads commands. `check` is what it said behind the seconds."""

    def __init__(self, *command, **env):
        self.errors = open(os.path.join(common.scratch(), "errors"), "w+", encoding="utf-8")
        self.process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.errors, text=True, env=dict(os.environ, **env))
        self.about, self.check = self.process.stdout.readline().strip(), ""
        if not self.about:
            self.fail()

    def fail(self):
        self.process.wait()
        self.errors.seek(0)
        raise Missing("%s" % (self.errors.read().strip().splitlines() or ["ended"])[-1])

    def ask(self, command):
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().strip()
        if not answer:
            self.fail()
        seconds, _, self.check = answer.partition(" ")
        return float(seconds)

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.errors.close()


class Program:
    """The whole program, as a user runs it: started anew for each command."""

    def __init__(self, model, kernels, tasks, threads):
        self.command = [common.painters(), model] + (["--kernels", kernels] if kernels else [])
        self.tasks, self.threads, self.check = tasks, threads, ""

    def ask(self, command):
        what, n = command.split()
        if what == "generate":      # its own figure, since starting takes longer
            threads = self.threads if n == "all" else 1
            return generate(self.command + ["--prompt", "Once upon a time", "--tokens", "200",
                                            "--threads", str(threads)],
                            r"continuation: .* ([\d.]+) tokens/s")
        log, start = os.path.join(common.scratch(), "log"), time.perf_counter()
        subprocess.run(self.command + ["--eval", self.tasks, "--limit", n, "--log", log,
                                       "--threads", str(self.threads)], check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        took = time.perf_counter() - start
        with open(log, encoding="utf-8") as f:
            self.check = [line.rstrip("\n").split("\t")[-1] for line in list(f)[1:]]
        return took

    def close(self):
        pass


class Llama2c:
    """llama2.c's own program; `best` of one thread and all."""

    def __init__(self, run, threads):
        checkpoint, tokenizer = bench_files.write_stories(common.scratch())
        self.command = [run, checkpoint, "-z", tokenizer, "-t", "0", "-n", "200", "-i",
                        "Once upon a time"]
        self.threads, self.check = threads, ""

    def ask(self, _):
        return min(generate(self.command, r"tok/s: ([\d.]+)", n) for n in {1, self.threads})

    def close(self):
        pass


def generate(command, pattern, threads=None):
    """Seconds a token, from the rate that a program prints."""
    env = dict(os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {}))
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                          env=env, check=True)
    return 1 / float(re.search(pattern, done.stderr).group(1))


class Sides:
    """The functions that ROWS names: each makes a side of its words, or raises Missing."""

    def __init__(self, args):
        self.args, self.files = args, Files(args.quick)
        self.fastest = self.kernels()

    def kernels(self, name=None):
        """The kernels that --info says the program takes."""
        command = [common.painters(), os.path.join(common.TESTS, "small", "llama.bin"), "--info"]
        done = subprocess.run(command + (["--kernels", name] if name else []), capture_output=True,
                              text=True, check=False)
        found = re.search(r"^kernels +(\w+)", done.stdout, re.M)
        if not found:
            raise Missing(done.stderr.strip() + " (--info says it takes %s)" % self.fastest)
        return found.group(1)

    def choice(self, kernels):
        if kernels != ["base"]:
            return self.kernels(*kernels)
        return "avx512" if self.fastest == "amx" else self.fastest

    def passes(self, what, *kernels):
        chosen = self.choice(list(kernels))
        return Runner(common.build("bench_model"), self.files.get(what, "bin"), chosen)

    def program(self, what, *kernels):
        chosen = self.choice(list(kernels))
        return Program(self.files.get(what, "bin"), chosen, self.files.get("items", "tsv"),
                       self.args.threads)

    def peer(self, python, package, name, *arguments, **env):
        if not python:
            raise Missing("give --python-avx2")
        if not version(python, package):
            raise Missing("%s: pip install it, or give --python" % package)
        script = os.path.join(common.TESTS, "bench_peers.py")
        return Runner(python, script, name, *arguments, **env)

    def llama_cpp(self, what, build=""):
        python = self.args.python_avx2 if build else self.args.python
        return self.peer(python, "llama-cpp-python", "llama_cpp", self.files.get(what, "gguf"),
                         self.args.threads, OMP_PROC_BIND="true")

    def transformers(self, kind):
        return self.peer(self.args.python, "transformers", "transformers",
                         self.files.get("bert", "hf"), kind, self.args.threads)

    def lm_eval(self, kind):
        return self.peer(self.args.python, "lm-eval", "lm_eval", self.files.get("bf16", "hf"), kind,
                         self.args.threads, self.files.get("items", "jsonl"),
                         os.path.join(common.scratch(), "lm_eval.json"))

    def tokenizers(self, arch):
        name, data = bench_files.tokenizer(arch)
        path = os.path.join(common.scratch(), name)
        with open(path, "wb") as out:
            out.write(data)
        return self.peer(self.args.python, "tokenizers", "tokenizers", path,
                         RAYON_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

    def llama2c(self):
        path = self.args.llama2c
        if not path:
            raise Missing("llama2.c: give --llama2c")
        if not os.path.isdir(path):
            return Llama2c(path, self.args.threads)
        run = os.path.join(common.scratch(), "llama2c-run")
        subprocess.run(["cc", "-Ofast", "-fopenmp", "-march=native", os.path.join(path, "run.c"),
                        "-o", run, "-lm"], check=True)
        return Llama2c(run, self.args.threads)


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
    print("| %-18s | %-26s | %-40s | %-16s | %4s | %-6s | %s" % (name, ours, theirs, ratio, target,
                                                             verdict, more), flush=True)


def measure(sides, pairs, name, ours, our_command, other, other_command, target):
    """Alternating runs of both sides; one line of the table."""
    commands = [our_command, our_command if other_command == "=" else other_command]
    runners, missing = [], ""
    try:
        for side in (ours, other) if other != "-" else (ours,):
            function, *words = side.split()
            try:
                runners.append(getattr(sides, function)(*words))
                runners[-1].ask(commands[len(runners) - 1])     # touches memory, wakes threads
            except Missing as reason:
                missing = str(reason)
                if len(runners) < 2 and side == ours:
                    return show(name, "not run", missing, "", target)
        if missing:
            del runners[1:]
        times = [[] for _ in runners]
        for i in range(pairs):
            for j in sorted(range(len(runners)), reverse=i % 2):
                times[j].append(runners[j].ask(commands[j]))
        figures = [spread([work(c)[0] / t for t in column]) for c, column in zip(commands, times)]
        figures[0] += " " + work(our_command)[1]
        if len(runners) < 2:
            return show(name, figures[0], missing and "missing: " + missing, "", target)
        scale = work(commands[0])[0] / work(commands[1])[0]
        ratio = spread([b / a * scale for a, b in zip(*times)])
        more = " ".join(filter(None, (getattr(runners[1], "about", "").partition("ready ")[2],
                                      agreement(runners[0].check, runners[1].check))))
        shown = other if commands[0] == commands[1] else commands[1]
        return show(name, figures[0], "%s: %s" % (shown, figures[1]), ratio, target, more)
    finally:
        for runner in runners:
            runner.close()


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


def version(python, package):
    code = "from importlib.metadata import version; print(version(%r))" % package
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def say_where(args, sides):
    """The machine and the versions."""
    compiler = subprocess.run([os.environ.get("CC", "cc").split()[0], "--version"],
                              capture_output=True, text=True, check=False).stdout.split("\n")[0]
    print("%s; %d threads; kernels %s; %s; %s" % (machine(), args.threads, sides.fastest, compiler,
                                                  time.strftime("%Y-%m-%d")))
    for wanted in PEERS:
        package, _, pinned = wanted.partition("==")
        found = version(args.python, package)
        print("%s %s%s" % (package, found or "is missing: pip install %s, or give --python" % wanted,
                           "" if found.split("+")[0] in ("", pinned) else " (not %s)" % pinned))
    for flag, what in (("python_avx2", "llama.cpp for AVX2"), ("llama2c", "llama2.c"),
                       ("seven", "a folder for the 7B rows")):
        if not getattr(args, flag):
            print("%s is missing: give --%s" % (what, flag.replace("_", "-")))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small models, few runs")
    parser.add_argument("--rows", nargs="+", default=[""], help="rows whose names begin so")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--pairs", type=int, help="alternating runs of a row (default 7; quick 2)")
    parser.add_argument("--items", type=int, help="HellaSwag items for both sides (24; quick 4)")
    parser.add_argument("--python", default=sys.executable, help="one that has the peers")
    parser.add_argument("--python-avx2", help="one that has llama.cpp built for AVX2")
    parser.add_argument("--llama2c", help="a checkout of llama2.c, or its run")
    parser.add_argument("--seven", metavar="FOLDER", help="run the 7B rows there (41 GB)")
    args = parser.parse_args()
    args.pairs = args.pairs or (2 if args.quick else 7)
    args.items = args.items or (4 if args.quick else 24)
    if not WAIT_POLICY:
        os.environ.pop("OMP_WAIT_POLICY")
    os.environ.setdefault("CFLAGS", "-std=gnu11 -O3 -fopenmp")
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    sides = Sides(args)
    say_where(args, sides)
    show("row", "painters", "beside", target="least", more="notes")
    print("|---|---|---|---|---|---|---")

    def wanted(name):
        return any(name.startswith(row) for row in args.rows)
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


if __name__ == "__main__":
    main()
