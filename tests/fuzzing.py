"""Runs the fuzz targets of fuzz.c with clang's libFuzzer under address and undefined-behaviour
sanitizers, from seeds that are made here.

    python3 tests/fuzzing.py MINUTES [TARGET ...] [--corpus FOLDER] [--jobs N]

Inputs that made a new path are kept in FOLDER/TARGET, finds (crashes, hangs) land in
tests/fuzz/TARGET, where test_fuzz.py runs them for ever after. Prints the executions and the
coverage of each target; status 1 where something was found. The kernels are the generic ones: clang
needs half an hour to instrument the others, which test_fuzz.py runs.
"""
import argparse
import concurrent.futures
import os
import re
import subprocess
import sys

import common
import models
import tokenizing

TARGETS = ("model", "tokenizer", "task", "results", "path", "command")
SHAPES = {"llama": models._llama(21, 8, 10, 3, 2, 1, 4, True, "F32", 1e4, 1e-5, 60),
          "bert": models._bert(22, 8, 10, 3, 2, "F16", 2, length=40)}
TASKS = (
    b"#painters-task\t1\tname=a\tkind=choice\tmetrics=acc,acc_norm\tchance=0.5\n1\tb c\tb\tg k\n",
    b"#painters-task\t1\tname=b\tkind=contexts\tmetrics=acc\n0\tb\tg\tk\r\n",
    b"#painters-task\t1\tname=c\tkind=lastword\tmetrics=acc,perplexity\nb c\\n\tb\n\tg\n",
    b"#painters-task\t1\tname=d\tkind=generate\tmetrics=strict,flexible\tmax_tokens=5\tstop=b|\\n\n"
    b"b c\t#### 12\n",
    b"#painters-task\t1\tname=e\tkind=text\tmetrics=token_perplexity,word_perplexity\nthe cat\n",
    b"#painters-task\t1\tname=f\tkind=classify\tmetrics=acc,f1,matthews\tlabels=label_0|label_1\n"
    b"1\tthe cat\tthe dog\n0\ta\n",
    b"#painters-task\t1\tname=g\tkind=regress\tmetrics=pearson,spearman\n1.5\tthe cat\tthe dog\n",
)
PATHS = (b"\x0b0-3 (4-7)*2 8-11", b"\x050 1|2 3*4 5-0", b"\x1f31-0 (1|2|4-9)*1000000", b"\x020 1 2")
COMMANDS = (
    b"--help\n", b"@l\n--info\n", b"@b\n--info\n", b"@l\n--prompt\nthe cat\n--tokens\n3\n",
    b"@l\n--prompt\nthe cat\n--tokens\n3\n--temperature\n0.7\n--top-p\n0.9\n--sample-seed\n5\n--bos\n",
    b"@b\n--prompt\nthe [MASK] sat\n--drop\n1\n--kernels\nplain\n",
    b"@l\n--cosine\n--prompt\nthe cat\n--svg\nx.svg\n--loop\n0\n--times\n2\n--kv\nmean\n",
    b"--layers\n12\n--random\n3\n--seed\n7\n--show\n", b"--layers\n12\n--path\n0-11\n--show\n",
    b"--layers\n8\n--sweep\nskip,reverse,random:3,loop:1-4,parallel,repeat,drop,swap\n--show\n",
    b"@l\n--eval\na.tsv\nb.tsv\n--sweep\nskip,path:x\n--out\no\n--log\nl\n--shard\n1/2\n--batch\n9\n",
    b"@b\n--eval\na.tsv\n--probe\nb.tsv\n--strength\n0.5\n--head\nx\n--limit\n3\n--threads\n2\n--quiet\n",
    b"--report\na\nb\n--svg\nd\n", b"@l\n--quantize\nq.bin\n",
)


def folder():
    """The models that the targets use, and where their inputs lie as files."""
    path = os.path.join(common.scratch(), "fuzz-files")
    os.makedirs(path, exist_ok=True)
    for name, shape in SHAPES.items():
        models.MODELS["fuzz"] = shape           # for this moment: tests run all of MODELS
        source = models.write("fuzz", os.path.join(common.scratch(), "hf-fuzz-" + name))
        common.export(source, out=os.path.join(path, name + ".bin"))
        del models.MODELS["fuzz"]
    return path


def read(path):
    with open(path, "rb") as file:
        return file.read()


def seeds(target, models_in):
    """Inputs to start from."""
    if target == "model":
        return [read(os.path.join(models_in, name)) for name in ("llama.bin", "bert.bin")]
    if target == "task":
        return [bytes([i > 4]) + task for i, task in enumerate(TASKS)]
    if target == "results":
        out = []
        for i, task in enumerate(TASKS[:6]):        # the small BERT has two labels, no regression
            path = os.path.join(common.scratch(), "seed.tsv")
            with open(path, "wb") as file:
                file.write(task)
            model = os.path.join(models_in, "bert.bin" if i > 4 else "llama.bin")
            result = os.path.join(common.scratch(), "seed-%d.out" % i)
            common.run(model, "--eval", path, "--sweep", "skip,random:2,loop:1-2,drop", "--out", result)
            out.append(read(result))
        return out
    return {"path": PATHS, "command": COMMANDS}[target]


def write_seeds(target, models_in, into):
    os.makedirs(into, exist_ok=True)
    if target == "tokenizer":
        tokenizing.write_seeds(into)
        return
    for i, data in enumerate(seeds(target, models_in)):
        with open(os.path.join(into, "seed-%d" % i), "wb") as file:
            file.write(data)


def build():
    program = os.path.join(common.scratch(), "fuzz-targets")
    subprocess.run(["clang", "-g", "-O1", "-std=gnu11", "-DFUZZER", "-DPAINTERS_PORTABLE",
                    "-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all",
                    "-Wno-unknown-pragmas", "fuzz.c", "-o", program, "-lm"], cwd=common.TESTS, check=True)
    return program


def fuzz(program, target, minutes, corpus, models_in):
    """One target for so long: the last lines of what libFuzzer says."""
    seeds_in, found = os.path.join(common.scratch(), "seeds-" + target), common.TESTS + "/fuzz/" + target
    write_seeds(target, models_in, seeds_in)
    for path in (corpus, found):
        os.makedirs(path, exist_ok=True)
    done = subprocess.run(
        [program, corpus, seeds_in, found, "-max_total_time=%d" % (60 * minutes), "-max_len=40000",
         "-timeout=20", "-rss_limit_mb=3000", "-artifact_prefix=%s/" % found, "-print_final_stats=1"],
        stderr=subprocess.PIPE, errors="replace", text=True, check=False,
        env=dict(os.environ, FUZZ_TARGET=target, FUZZ_FOLDER=models_in,
                 ASAN_OPTIONS="detect_leaks=0"))
    cover = re.findall(r"cov: (\d+) ft: (\d+)", done.stderr)[-1:]
    runs = re.findall(r"number_of_executed_units: (\d+)", done.stderr)
    print(target, "- status %d, executions %s, coverage %s" % (done.returncode, runs, cover), flush=True)
    if done.returncode:
        print(done.stderr[-3000:])
    os.rmdir(found) if not os.listdir(found) else None
    return done.returncode == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("minutes", type=float)
    parser.add_argument("targets", nargs="*", metavar="TARGET")
    parser.add_argument("--corpus", default=os.path.join(common.scratch(), "corpus"))
    parser.add_argument("--jobs", type=int, default=1, help="so many targets at a time")
    args = parser.parse_args()
    program, models_in = build(), folder()
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        good = list(pool.map(lambda target: fuzz(program, target, args.minutes, os.path.join(
            args.corpus, target), models_in), args.targets or TARGETS))
    return not all(good)


if __name__ == "__main__":
    sys.exit(main())
