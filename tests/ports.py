"""painters on other CPUs, C libraries and systems: cross-compiled, emulated, compared with this one.

    python3 tests/ports.py [NAME ...]

Needs Debian's cross compilers, qemu-user, musl-tools, mingw-w64 and wine (see .ci/run). Every port
is built without warnings and runs the small models: the scores of a task, a continuation and a
filled-in [MASK] must be those of the native program to rounding. A big-endian machine must refuse.
"""
import functools
import os
import re
import shlex
import subprocess
import sys

import common

WARNINGS = "-std=gnu11 -O2 -Wall -Wextra -Wpedantic -Wshadow -Werror"
PORTS = {  # name: (compiler, command that runs a program)
    "aarch64": ("aarch64-linux-gnu-gcc -static", "qemu-aarch64"),
    "armhf": ("arm-linux-gnueabihf-gcc -static", "qemu-arm"),
    "riscv64": ("riscv64-linux-gnu-gcc -static", "qemu-riscv64"),
    "i386": ("i686-linux-gnu-gcc -static", "qemu-i386"),
    "s390x": ("s390x-linux-gnu-gcc -static", "qemu-s390x"),
    "x86-64 of 2003": ("gcc -fopenmp -static-libgcc", "qemu-x86_64 -cpu qemu64"),
    "x86-64 with AVX2": ("gcc -fopenmp -static-libgcc", "qemu-x86_64 -cpu max"),
    "musl": ("musl-gcc -static", ""),
    "windows": ("x86_64-w64-mingw32-gcc -static -fopenmp", "wine"),
}
SMALL = os.path.join(common.TESTS, "small")
NUMBER = re.compile(rb"-?\d+\.\d+(?:e[-+]?\d+)?")


@functools.lru_cache(None)
def build(compiler):
    program = os.path.join(common.scratch(), re.sub(r"\W+", "-", compiler) + ".exe")
    subprocess.run([*shlex.split(compiler), *shlex.split(WARNINGS), "painters.c", "-o", program,
                    "-lm"], cwd=common.ROOT, check=True)
    return program


def answers(command):
    """What the program makes of the small models: a list of (what, bytes)."""
    log = os.path.join(common.scratch(), "items.log")
    runs = (("continuation", "llama.bin", "--prompt", "The cat is", "--tokens", "12", "--loop", "3"),
            ("[MASK]", "bert.bin", "--prompt", "the [MASK] is in the garden .", "--skip", "4"),
            ("scores", "llama.bin", "--eval", os.path.join(SMALL, "pronoun.tsv"), "--limit", "6",
             "--log", log))
    found = []
    for what, model, *words in runs:
        done = subprocess.run([*command, os.path.join(SMALL, model), *words, "--quiet"],
                              capture_output=True, timeout=600, check=False,
                              env=dict(os.environ, WINEDEBUG="-all", OMP_NUM_THREADS="2"))
        out = done.stdout.replace(b"\r\n", b"\n")
        if done.returncode:
            raise ValueError("%s: status %d: %s" % (what, done.returncode,
                                                    done.stderr.decode("utf-8", "replace")))
        found.append((what, out))
    with open(log, "rb") as file:
        found.append(("items", file.read().replace(b"\r\n", b"\n")))
    os.remove(log)
    return found


def same(a, b):
    """Equal but for the last digits of the numbers in them."""
    x, y = NUMBER.findall(a), NUMBER.findall(b)
    return NUMBER.sub(b"#", a) == NUMBER.sub(b"#", b) and all(
        abs(float(p) - float(q)) <= 1e-3 * max(1.0, abs(float(p))) for p, q in zip(x, y))


def check(name, right):
    compiler, runner = PORTS[name]
    command = [*shlex.split(runner), build(compiler)]
    if name == "s390x":
        try:
            answers(command)
        except ValueError as error:
            if "little-endian" in str(error):
                return
        raise ValueError("a big-endian machine must refuse the file")
    for (what, found), (_, wanted) in zip(answers(command), right):
        if not same(found, wanted):
            raise ValueError("%s: %r, natively %r" % (what, found[-300:], wanted[-300:]))


def main(names):
    right, failed = answers([common.painters()]), 0
    for name in names:
        try:
            check(name, right)
            print(name, "- ok", flush=True)
        except (ValueError, OSError, subprocess.SubprocessError) as error:
            failed += 1
            print(name, "- FAILED:", error, flush=True)
    print("%d passed, %d failed" % (len(names) - failed, failed))
    return failed > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(PORTS)))
