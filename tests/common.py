"""What every test uses: builds painters once per run, runs it, exports models, finds shared data.

CC and CFLAGS choose the compiler and its flags; PAINTERS names a finished program to test instead
of building one. `build` compiles a C file of tests/ the same way. `../shared` (or PAINTERS_SHARED)
holds data that does not belong to the repository; tests that need it are skipped without it.
"""
import array
import atexit
import functools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import unittest
import zlib

import models

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # tests share the machine with one another

TESTS = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(TESTS)
SHARED = os.environ.get("PAINTERS_SHARED", os.path.join(ROOT, "..", "shared"))


@functools.lru_cache(None)
def scratch():
    """A folder for this run's files, removed at its end."""
    folder = tempfile.mkdtemp(prefix="painters-test-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def shared(*parts):
    """The path of a file in ../shared; skips the test where it is missing."""
    path = os.path.join(SHARED, *parts)
    if not os.path.exists(path):
        raise unittest.SkipTest("not here: shared/" + "/".join(parts))
    return path


def read_bytes(path):
    with open(path, "rb") as f:
        return f.read()


# Programs -----------------------------------------------------------------------------------------

_compiling = {}  # name -> (process, program)


def _start_build(name, source):
    if name not in _compiling:
        program = os.path.join(scratch(), name)
        flags = shlex.split(os.environ.get("CFLAGS", "-std=gnu11 -O2 -fopenmp"))
        command = shlex.split(os.environ.get("CC", "cc")) + flags + [source, "-o", program, "-lm"]
        _compiling[name] = (subprocess.Popen(command, cwd=ROOT), program)
    return _compiling[name]


def build(name):
    """Compiles tests/NAME.c, once per run; returns the program."""
    if "PAINTERS" not in os.environ:
        painters_source()  # beside this one, since both will be needed
    process, program = _start_build(name, os.path.join(TESTS, name + ".c"))
    if process.wait():
        raise RuntimeError("tests/%s.c does not compile" % name)
    return program


def painters_source():
    """Starts the build of painters.c."""
    return _start_build("painters", os.path.join(ROOT, "painters.c"))


def painters():
    """The program under test."""
    if "PAINTERS" in os.environ:
        return os.path.abspath(os.environ["PAINTERS"])
    process, program = painters_source()
    if process.wait():
        raise RuntimeError("painters.c does not compile")
    return program


def execute(*args, stdin=b"", env=None, timeout=600):
    """Runs painters: (status, stdout as bytes, stderr as text)."""
    done = subprocess.run([painters(), *map(str, args)], input=stdin, capture_output=True,
                          env=dict(os.environ, **(env or {})), timeout=timeout, check=False)
    return done.returncode, done.stdout, done.stderr.decode("utf-8", "replace")


def run(*args, **more):
    """Runs painters and returns its stdout; anything but status 0 is an error."""
    status, out, err = execute(*args, **more)
    if status:
        raise AssertionError("painters %s: status %d: %s" % (" ".join(map(str, args)), status, err))
    return out


def refused(*args, **more):
    """Runs painters, which must refuse: status 1, nothing on stdout, one line on stderr. Returns
    that line."""
    status, out, err = execute(*args, **more)
    what = "painters %s: status %d, stdout %r, stderr %r" % (" ".join(map(str, args)), status, out,
                                                            err)
    if status != 1 or out or err.count("\n") != 1 or not err.startswith("painters: "):
        raise AssertionError("not refused in one line: " + what)
    return err.rstrip("\n")


# Models -------------------------------------------------------------------------------------------

@functools.lru_cache(None)
def source(name):
    """A model of models.py as a Hugging Face folder."""
    return models.write(name, os.path.join(scratch(), "hf-" + name))


def export(path, *more, out=None):
    """export.py model PATH: the model file."""
    out = out or os.path.join(scratch(), "export-%d.bin" % len(os.listdir(scratch())))
    command = [sys.executable, os.path.join(ROOT, "export.py"), "model", path, out, *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError("%s: %s" % (" ".join(command), done.stderr))
    return out


@functools.lru_cache(None)
def model(name):
    """A model of models.py as a model file, exported from its Hugging Face folder."""
    return export(source(name), out=os.path.join(scratch(), name + ".bin"))


@functools.lru_cache(None)
def kernels():
    """Those that the program takes on this CPU."""
    info = run(os.path.join(TESTS, "small", "llama.bin"), "--info").decode()
    return re.search(r"^kernels +(\w+)", info, re.M).group(1)


def tolerance():
    """How far logits may be from float32's, over the largest one; AMX keeps 16 bits of a factor."""
    return 5e-4 if kernels() == "amx" else 1e-4


def likelihood_tolerance(right):
    """How far a log-likelihood may be from float32's."""
    return max(1e-3, 2e-5 * abs(right) if kernels() == "amx" else 0)


# Numbers ------------------------------------------------------------------------------------------

def difference(found, right, scale=None):
    """The largest difference of two lists of numbers over the largest magnitude of the second."""
    if len(found) != len(right):
        return float("inf")
    scale = scale or max(map(abs, right))
    worst = max(abs(a - b) for a, b in zip(found, right)) / scale
    return worst if worst == worst else float("inf")  # a NaN is the worst of all


class Dump:
    """tests/dump.c at work on a model: asks for hidden states, logits and greedy tokens."""

    def __init__(self, path, *arguments, env=None):
        self.process = subprocess.Popen([build("dump"), path, *map(str, arguments)],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        env=dict(os.environ, **(env or {})))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def ask(self, command, *words):
        """Sends one line; returns the tables that come back: {name: (columns, floats)}."""
        line = " ".join([command, *map(str, words)]) + "\n"
        self.process.stdin.write(line.encode())
        self.process.stdin.flush()
        found = {}
        while True:
            head = self.process.stdout.readline().decode().split()
            if not head:
                raise AssertionError("dump ended at: " + line)
            if head[0] == "end":
                return found
            rows, columns = int(head[1]), int(head[2])
            numbers = array.array("f")
            numbers.frombytes(self.process.stdout.read(4 * rows * columns))
            found[head[0]] = (columns, numbers)

    def forward(self, ids, schedule, segments=(), chunks=(), kv="exact"):
        """Runs tokens through a schedule (text), in passes of the given numbers of tokens: "states"
        (each a flat array), and "logits" of all rows (of a classifier: of the first)."""
        self.ask("schedule", schedule)
        self.ask("kv", kv)
        self.ask("chunks", *chunks)
        self.ask("segments", *segments)
        found = self.ask("forward", *ids)
        states = [found["state%d" % i][1] for i in range(len(schedule.split()) + 1)]
        return dict(found, states=states)

    def greedy(self, ids, schedule, count, kv="exact"):
        """The ids of `count` greedy tokens after the given ones, with a key/value cache."""
        self.ask("schedule", schedule)
        self.ask("kv", kv)
        self.ask("chunks")
        return [int(i) for i in self.ask("greedy", count, *ids)["ids"][1]]


def sample(rows, columns, count):
    """`count` places of a table, spread over it, for goldens: flat indices, always the same."""
    n = rows * columns
    stride = max(1, int(n * 0.6180339887))
    while math.gcd(stride, n) != 1:
        stride += 1
    return [i * stride % n for i in range(min(count, n))]


def read_golden(name):
    """The committed outputs of a model, which must be those of the weights that models.py makes."""
    with open(os.path.join(TESTS, "golden", "forward_%s.json" % name), encoding="utf-8") as f:
        golden = json.load(f)
    if golden["weights"] != fingerprint(name):
        raise AssertionError("tests/golden is of another model; run oracle_forward.py --write")
    return golden


def fingerprint(name):
    """A checksum of a model's weights."""
    crc = 0
    for _, data in models.tensors(name).values():
        crc = zlib.crc32(data, crc)
    return crc
