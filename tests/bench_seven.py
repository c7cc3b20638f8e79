"""A Llama of 7B's shape with random weights (13.5 GB in float16): exported, loaded, run.

    python3 tests/bench_seven.py FOLDER [--keep]       needs 41 GB there; standard library only

Prints the time of the export beside that of `cp` (alternating), the memory both take, then what
painters needs to load it, to generate, to score items as long as HellaSwag's, to sweep them and to
go on with 8-bit weights: seconds, tokens per second, resident and anonymous memory. Nothing is
asserted; README.md quotes it.
"""
import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time

import bench_files
import common

ITEMS = 21                      # with four endings each, of a hundred tokens together: they fill a
                                # batch of 2048 tokens


def write_tasks(folder):
    """Items of HellaSwag's length, in letters that are a token each."""
    r, path = random.Random(2), os.path.join(folder, "items.tsv")
    letters = "bcfgjklmpqvxyz"
    with open(path, "w", encoding="utf-8") as file:
        file.write("#painters-task\t1\tname=items\tkind=choice\tmetrics=acc_norm\tchance=0.25\n")
        for _ in range(ITEMS):
            words = lambda n: " ".join(r.choice(letters) for _ in range(n))
            file.write("\t".join(["0", words(40)] + [words(15) for _ in range(4)]) + "\n")
    return path


def measure(command):
    """(seconds, peak resident MB, peak anonymous MB, stderr) of a command."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               text=True)
    peak, start, said = [0, 0], time.time(), []
    reader = threading.Thread(target=lambda: said.append(process.stderr.read()))
    reader.start()
    while process.poll() is None:
        try:
            with open("/proc/%d/status" % process.pid, encoding="ascii") as file:
                text = file.read()
            for i, field in enumerate(("VmRSS", "RssAnon")):
                found = re.search(field + r":\s+(\d+)", text)
                peak[i] = max(peak[i], int(found.group(1)) // 1024 if found else 0)
        except OSError:
            pass
        time.sleep(0.02)
    took = time.time() - start
    reader.join()
    if process.returncode:
        raise SystemExit("%s: %s" % (" ".join(command), said[0]))
    return took, *peak, said[0]


def report(what, result):
    took, resident, anonymous, said = result
    line = " ".join(line for line in said.splitlines() if "tokens/s" in line or "passes" in line)
    line = line.replace("prompt: ", "")
    print("%-24s %8.2f s  resident %6d MB  anonymous %5d MB  %s" % (what, took, resident, anonymous,
                                                                  line), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--keep", action="store_true", help="leave the files there")
    args = parser.parse_args()
    source, model = os.path.join(args.folder, "hf"), os.path.join(args.folder, "seven.bin")
    copy = os.path.join(args.folder, "copy")
    if not os.path.exists(source):
        print("writing the checkpoint ...", flush=True)
        bench_files.write_checkpoint(source, "seven", "f16")
    export = [sys.executable, os.path.join(common.ROOT, "export.py"), "model", source, model]
    bench_files.as_users_do()
    program = common.painters()
    for turn in ("1st", "2nd"):
        report("cp, %s time" % turn, measure(["cp", "-r", source, copy]))
        shutil.rmtree(copy)
        report("export, %s time" % turn, measure(export))
    task = write_tasks(args.folder)
    report("--info (cold or warm)", measure([program, model, "--info"]))
    report("--info, again", measure([program, model, "--info"]))
    text = "b c f g " * 64
    report("256 tokens in, 1 out", measure([program, model, "--prompt", text, "--tokens", "1"]))
    report("1 token in, 16 out", measure([program, model, "--prompt", "b", "--tokens", "16"]))
    scored = measure([program, model, "--eval", task, "--batch", "2048"])
    report("%d items" % ITEMS, scored)
    print("%-24s %8.2f s  (the anonymous memory above is that of batches of 2048 tokens)" % (
        "an item", scored[0] / ITEMS))
    report("1 item, sweep of skip",
           measure([program, model, "--eval", task, "--sweep", "skip", "--limit", "1"]))
    eight = os.path.join(args.folder, "seven-q8.bin")
    report("--quantize", measure([program, model, "--quantize", eight]))
    report("8 bits: 1 in, 16 out", measure([program, eight, "--prompt", "b", "--tokens", "16"]))
    os.remove(eight)
    if not args.keep:
        shutil.rmtree(source)
        os.remove(model)


if __name__ == "__main__":
    main()
