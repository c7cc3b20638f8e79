"""The sides of tests/bench.py's rows: this program and its peers as processes, and their files."""
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time

import bench_files
import common


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
        shape = self.quick + ("bert" if what == "bert" else "llama")
        if what in ("tiny-llama", "tiny-bert", "quick-llama"):
            shape = what.replace("-", " ")
        bench_files.write_checkpoint(path, shape, what if what in bench_files.TYPES else "f32")

    def bin(self, what, path):
        if what in ("q8", "quick-q8"):
            source = self.get("bf16" if what == "q8" else "quick-llama", "bin")
            subprocess.run([common.painters(), source, "--quantize", path, "--quiet"], check=True,
                           stdout=subprocess.DEVNULL)
        elif what == "stories":
            checkpoint, tokenizer = bench_files.write_stories(common.scratch())
            common.export(checkpoint, "--tokenizer", tokenizer, out=path)
        else:
            common.export(self.get(what, "hf"), out=path)
            shutil.rmtree(self.get(what, "hf"))     # made again for a peer that reads it

    def gguf(self, what, path):
        if what == "quick-q8":      # the very weights of our file
            bench_files.write_gguf(path, "quick llama", "q8", self.get(what, "bin"))
        else:
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
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8")
        self.process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.errors, text=True, env=dict(os.environ, **env))
        first, self.check = self.process.stdout.readline(), ""
        if not first:
            self.fail()
        self.about = first.partition(":")[2].strip()

    def fail(self):
        self.process.wait()
        self.errors.seek(0)
        raise Missing((self.errors.read().strip().splitlines() or ["it ended"])[-1])

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
        self.tasks, self.threads, self.about, self.check = tasks, threads, "", ""

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

    def __init__(self, run, threads, about):
        checkpoint, tokenizer = bench_files.write_stories(common.scratch())
        self.command = [run, checkpoint, "-z", tokenizer, "-t", "0", "-n", "200", "-i",
                        "Once upon a time"]
        self.threads, self.about, self.check = threads, about, ""

    def ask(self, _):
        return min(generate(self.command, r"tok/s: ([\d.]+)", n) for n in {1, self.threads})

    def close(self):
        pass


def generate(command, pattern, threads=None):
    """Seconds a token, from the rate that a program prints; the best of ten runs of some 10 ms."""
    env = dict(os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {}))
    done = [subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                           env=env, check=True).stderr for _ in range(10)]
    return min(1 / float(re.search(pattern, said).group(1)) for said in done)


def version(python, package):
    code = "from importlib.metadata import version; print(version(%r))" % package
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip()


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
            raise Missing("this CPU has no %s: --info says %s" % (name, self.fastest))
        return found.group(1)

    def choice(self, kernels):
        if kernels != ["base"]:
            return self.kernels(*kernels)
        return "avx512" if self.fastest == "amx" else self.fastest

    def passes(self, what, *kernels):
        chosen = self.choice(list(kernels))
        return Runner(common.build("bench_model"), self.files.get(what, "bin"), chosen)

    def program(self, what, *kernels):
        chosen = self.choice(list(kernels)) if kernels else None    # as a user runs it
        return Program(self.files.get(what, "bin"), chosen, self.files.get("items", "tsv"),
                       self.args.threads)

    def peer(self, python, package, name, *arguments, **env):
        if not python:
            raise Missing("give --python-avx2")
        if not version(python, package):
            raise Missing("%s: `make peers`, or give --python" % package)
        script = os.path.join(common.TESTS, "bench_peers.py")
        return Runner(python, script, name, *arguments, **env)

    def llama_cpp(self, what, build=""):
        python = self.args.python_avx2 if build else self.args.python
        peer = self.peer(python, "llama-cpp-python", "llama_cpp", self.files.get(what, "gguf"),
                         self.args.threads, OMP_PROC_BIND="true")
        if build == "avx2" and "AVX512" in peer.about:
            peer.close()
            raise Missing("the llama.cpp of --python-avx2 is built for AVX-512")
        return peer

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
            return Llama2c(path, self.args.threads, "")
        run = os.path.join(common.scratch(), "llama2c-run")
        subprocess.run([*os.environ.get("CC", "cc").split(), "-Ofast", "-fopenmp", "-march=native",
                        os.path.join(path, "run.c"), "-o", run, "-lm"], check=True)
        commit = subprocess.run(["git", "-C", path, "rev-parse", "--short", "HEAD"], text=True,
                                capture_output=True, check=False).stdout.strip()
        return Llama2c(run, self.args.threads, "commit " + commit if commit else "")
