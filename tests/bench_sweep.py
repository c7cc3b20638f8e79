"""A sweep against the sum of separate runs: time measured beside what the layer passes allow.

    python3 tests/bench_sweep.py [--layers 22 32] [--items 40] [--sweeps LIST ...]

Makes a random Llama of each depth (dim 128) and a multiple-choice task of English-like words, runs
every sweep in one run and every schedule of it in a run of its own, one thread, and prints the
ratio of processor times (user + system) and the program's own count of layer passes.
"""
import argparse
import os
import random
import re
import resource
import subprocess

import common
import models
import test_sweep

SWEEPS = ("skip,repeat,reverse,random:10,parallel,loop:3", "loop:1-8", "drop,swap")


def processor_seconds(*words):
    """User and system time of one run of painters, and its stderr."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    status, _, err = common.execute(*words, "--threads", 1, timeout=3600)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if status:
        raise SystemExit(err)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, err


def compare(layers, items, sweep):
    """(number of schedules, seconds in one run, seconds in separate runs, the ratio that the count
    of layer passes allows)."""
    name = "deep%d" % layers
    models.MODELS[name] = models._llama(11, 128, 344, layers, 4, 2, 32, True, "F32", 10000.0, 1e-5)
    model, rng = common.model(name), random.Random(5)
    rows = [[rng.randrange(4), test_sweep.sentence(rng, 8), *(test_sweep.sentence(rng, 3)
                                                              for _ in range(4))]
            for _ in range(items)]
    task = test_sweep.write_task("bench", "choice", "acc", rows)
    out = os.path.join(common.scratch(), "bench-%d-%s.out" % (layers, sweep[:4]))
    whole, err = processor_seconds(model, "--eval", task, "--sweep", sweep, "--out", out)
    run, separate = map(int, re.search(r"(\d+) run, (\d+) for", err).groups())
    keys = {line.split("\t")[1] for line in test_sweep.lines(out)}
    alone = sum(processor_seconds(model, "--eval", task, *test_sweep.own_flags(key))[0]
                for key in keys)
    return len(keys), whole, alone, separate / run


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[22, 32])
    parser.add_argument("--items", type=int, default=40)
    parser.add_argument("--sweeps", nargs="+", default=SWEEPS)
    args = parser.parse_args()
    os.environ.setdefault("CFLAGS", "-std=gnu11 -O3 -fopenmp")
    print(subprocess.run("grep -m1 'model name' /proc/cpuinfo", shell=True, capture_output=True,
                         text=True, check=False).stdout.strip())
    common.painters()                           # so that no compiler's time is counted
    for layers in args.layers:
        for sweep in args.sweeps:
            schedules, whole, alone, allowed = compare(layers, args.items, sweep)
            print("%2d layers  %-48s %4d schedules  %6.1f s  %7.1f s  %5.2f x  of %5.2f x" % (
                layers, sweep, schedules, whole, alone, alone / whole, allowed), flush=True)


if __name__ == "__main__":
    main()
