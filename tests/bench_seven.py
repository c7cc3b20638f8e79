"""A Llama of 7B's shape with random weights (13.5 GB in float16): exported, loaded, run.

    python3 tests/bench_seven.py FOLDER [--keep]       needs 41 GB there; standard library only

Prints the time of the export beside that of `cp` (alternating), the memory both take, then what
painters needs to load it, to generate, to score items as long as HellaSwag's and to sweep them:
seconds, tokens per second, resident and anonymous memory. Nothing is asserted; README.md quotes it.
"""
import argparse
import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import threading
import time

import common
import models

DIM, HIDDEN, LAYERS, VOCAB = 4096, 11008, 32, 32000
ITEMS = 4                       # with four endings each, of about a hundred tokens together


def tensors():
    """(name, shape) as in Llama-2-7b-hf."""
    yield "model.embed_tokens.weight", (VOCAB, DIM)
    for i in range(LAYERS):
        for name, shape in (("self_attn.q_proj", (DIM, DIM)), ("self_attn.k_proj", (DIM, DIM)),
                            ("self_attn.v_proj", (DIM, DIM)), ("self_attn.o_proj", (DIM, DIM)),
                            ("mlp.gate_proj", (HIDDEN, DIM)), ("mlp.up_proj", (HIDDEN, DIM)),
                            ("mlp.down_proj", (DIM, HIDDEN)), ("input_layernorm", (DIM,)),
                            ("post_attention_layernorm", (DIM,))):
            yield "model.layers.%d.%s.weight" % (i, name), shape
    yield "model.norm.weight", (DIM,)
    yield "lm_head.weight", (VOCAB, DIM)


def write_checkpoint(folder):
    """A Hugging Face folder with two shards, as the real one has."""
    os.makedirs(folder)
    r = random.Random(1)
    block = b"".join(struct.pack("<e", r.gauss(0, 0.02)) for _ in range(1 << 20))
    one = struct.pack("<e", 1.0)
    whole, index = list(tensors()), {}
    for shard, part in enumerate((whole[:len(whole) // 2], whole[len(whole) // 2:])):
        name, header, at = "model-%05d-of-00002.safetensors" % (shard + 1), {}, 0
        for tensor, shape in part:
            size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
            header[tensor] = {"dtype": "F16", "shape": shape, "data_offsets": [at, at + size]}
            index[tensor], at = name, at + size
        text = json.dumps(header).encode()
        with open(os.path.join(folder, name), "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for tensor, shape in part:
                left = header[tensor]["data_offsets"][1] - header[tensor]["data_offsets"][0]
                for start in range(0, left, len(block)):
                    file.write((one * (left // 2) if len(shape) == 1 else block)[:left - start])
    pieces = models.llama_pieces() + [("w%d" % i, -1e4 - i, 1) for i in range(VOCAB - 307)]
    for name, value in (
            ("model.safetensors.index.json", {"metadata": {}, "weight_map": index}),
            ("config.json", dict(
                architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=DIM,
                intermediate_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=32,
                num_key_value_heads=32, vocab_size=VOCAB, max_position_embeddings=4096,
                rms_norm_eps=1e-5, hidden_act="silu", tie_word_embeddings=False, bos_token_id=1,
                eos_token_id=2, torch_dtype="float16"))):
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            json.dump(value, file)
    models.write_sentencepiece(os.path.join(folder, "tokenizer.model"), pieces)


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
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
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
        write_checkpoint(source)
    export = [sys.executable, os.path.join(common.ROOT, "export.py"), "model", source, model]
    os.environ.setdefault("CFLAGS", "-std=gnu11 -O3 -fopenmp")
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
    report("%d items" % ITEMS, measure([program, model, "--eval", task]))
    report("1 item, sweep of skip",
           measure([program, model, "--eval", task, "--sweep", "skip", "--limit", "1"]))
    if not args.keep:
        shutil.rmtree(source)
        os.remove(model)


if __name__ == "__main__":
    main()
