"""Trains the two small models on the small world of world.py, from scratch, with PyTorch.

    python3 tests/train.py data OUT         task files, tokenizers, a sample of the training text
    python3 tests/train.py llama OUT        a 12-layer Llama, and its scores on the held-out tasks
    python3 tests/train.py bert OUT         a 12-layer BERT (masked words + does B follow A), probed
    python3 tests/train.py finetune OUT     wholly fine-tuned copies of it, without and with --skip 4

Needs torch, transformers, sentencepiece and safetensors. Models are written as Hugging Face folders
OUT/llama, OUT/bert, OUT/bert-TASK and OUT/bert-TASK-skip4. Seeds are fixed: data and tokenizers are
the same to the byte, weights up to the rounding of the machine. A GPU is used where there is one.
"""
import argparse
import collections
import json
import math
import os
import random
import re
import time

import sentencepiece
import torch
import torch.nn.functional as F
from transformers import (BertConfig, BertForPreTraining, BertForSequenceClassification, LlamaConfig,
                          LlamaForCausalLM)

import world

SEED = 1
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FINETUNED = ("accept", "sentiment")
SKIPPED = (5, 6, 7)                                  # what `--skip 4` leaves out of 12 layers


def log(*words):
    print(time.strftime("%H:%M:%S"), *words, flush=True)


# ------------------------------------------------------------------------------------------------
# Data and tokenizers
# ------------------------------------------------------------------------------------------------
def llama_documents(count):
    r = random.Random(f"{SEED}/llama")
    return [world.llama_document(r) for _ in range(count)]


def bert_pairs(count):
    r = random.Random(f"{SEED}/bert")
    return [world.bert_pair(r) for _ in range(count)]


def split_words(text):
    """What an uncased WordPiece does with plain ASCII text before it looks words up."""
    return re.findall(r"[a-z0-9]+|[^\sa-z0-9]", text.lower())


class WordPiece:
    """Whole words only, which is all that world.py's text needs."""

    def __init__(self, path):
        with open(path, encoding="utf-8") as lines:
            self.id = {line.rstrip("\n"): i for i, line in enumerate(lines)}

    def pair(self, first, second=None):
        ids = [self.id["[CLS]"]] + [self.id[w] for w in split_words(first)] + [self.id["[SEP]"]]
        types = [0] * len(ids)
        if second is not None:
            more = [self.id[w] for w in split_words(second)] + [self.id["[SEP]"]]
            ids, types = ids + more, types + [1] * len(more)
        return ids, types


def make_data(out):
    """Task files, tokenizer.model, vocab.txt and the sample of text that the tokenizers come from."""
    data = os.path.join(out, "data")
    os.makedirs(data, exist_ok=True)
    world.write_tasks(data, SEED)
    world.write_corpus(data, SEED, 20000, 20000)
    # The delimiter keeps words and numbers apart from the punctuation that follows them.
    parts = ("\x01".join(re.findall(r" ?\w+| ?#+| ?[^\w\s]|\s", text)) for text in llama_documents(20000))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=parts, model_prefix=os.path.join(data, "tokenizer"),
        pretokenization_delimiter="\x01",
        model_type="bpe", vocab_size=1024, byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, character_coverage=1.0, num_threads=1, minloglevel=2)
    words = collections.Counter()
    for _, first, second in bert_pairs(20000):
        words.update(split_words(first + " " + second))
    for name in world.BERT:
        for kind in ("", "_train"):
            with open(os.path.join(data, name + kind + ".tsv"), encoding="utf-8") as lines:
                for line in list(lines)[1:]:
                    words.update(split_words(" ".join(line.split("\t")[1:])))
    letters = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] + letters
    vocab += ["##" + c for c in letters if c.isalnum()]
    vocab += [w for w, _ in sorted(words.items(), key=lambda x: (-x[1], x[0])) if len(w) > 1]
    with open(os.path.join(data, "vocab.txt"), "w", encoding="utf-8", newline="\n") as file:
        file.write("".join(w + "\n" for w in vocab))
    log("data in", data, "-", len(vocab), "word pieces")
    return data


def read_task(path):
    """(header fields, rows) of a task file."""
    plain = {"\\n": "\n", "\\t": "\t", "\\r": "\r", "\\\\": "\\"}
    with open(path, encoding="utf-8") as lines:
        rows = [[re.sub(r"\\.", lambda m: plain[m[0]], field) for field in line.rstrip("\n").split("\t")]
                for line in lines]
    return dict(field.split("=", 1) for field in rows[0][2:]), rows[1:]


def save(model, folder, tokenizer, dtype=torch.float16):
    """A Hugging Face folder: config.json, model.safetensors and the tokenizer file."""
    model.eval()
    half = type(model)(model.config)
    half.load_state_dict(model.state_dict())
    half.to(dtype).save_pretrained(folder)
    with open(tokenizer, "rb") as source:
        content = source.read()
    with open(os.path.join(folder, os.path.basename(tokenizer)), "wb") as target:
        target.write(content)


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------
def orthogonal(matrices):
    """The nearest orthogonal matrices to a stack of them, roughly: five Newton-Schulz turns (Muon)."""
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT if x.shape[1] <= x.shape[2] else x.mT @ x
        step = -4.775 * square + 2.0315 * square @ square
        x = 3.4445 * x + (step @ x if x.shape[1] <= x.shape[2] else x @ step)
    return x


class Muon:
    """Momentum whose step is made orthogonal, for the weight matrices of the layers (Jordan, 2024)."""

    def __init__(self, parameters, decay):
        self.stacks, self.decay = collections.defaultdict(list), decay
        for p in parameters:
            self.stacks[p.shape].append(p)
        self.momentum = {shape: torch.zeros(len(ps), *shape, device=DEVICE) for shape, ps in self.stacks.items()}

    @torch.no_grad()
    def step(self, rate):
        for shape, parameters in self.stacks.items():
            gradient, momentum = torch.stack([p.grad for p in parameters]), self.momentum[shape]
            momentum.lerp_(gradient, 0.05)
            update = orthogonal(gradient.lerp(momentum, 0.95)) * (0.2 * max(shape) ** 0.5)
            for p, u in zip(parameters, update):
                p.mul_(1 - rate * self.decay).sub_(u, alpha=rate)


def fit(model, batches, steps, rate, loss_of, warmup, checkpoint=None, decay=0.05):
    """Muon for the layers' matrices, AdamW for the rest; linear warm-up, then linear decay to zero."""
    inner = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layer" in n]
    rest = [p for n, p in model.named_parameters() if not (p.ndim == 2 and ".layer" in n)]
    muon = Muon(inner, decay)
    adam = torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    model.train()
    total, seen, start = collections.Counter(), 0, time.time()
    for step in range(1, steps + 1):
        now = rate * min(step / warmup, (steps - step) / (steps - warmup) + 0.01)
        adam.param_groups[0]["lr"] = now
        batch = next(batches)
        losses = loss_of(model, batch)
        losses["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step(now)
        adam.step()
        model.zero_grad()
        for name, value in losses.items():
            total[name] += float(value.detach())
        seen += batch[0].numel()
        if step % 50 == 0:
            log(f"step {step}/{steps}", *(f"{n} {v / 50:.4f}" for n, v in total.items()),
                f"{seen / (time.time() - start):.0f} tokens/s")
            total.clear()
        if checkpoint and step % 500 == 0:
            checkpoint(model)
            model.train()
    model.eval()


def llama_batches(tokenizer, documents, tokens, r):
    """Rows of 128 ids, every 16th batch rows of 512, filled with whole documents and cut at the end.

    Half of the rows start without BOS, since the tasks are scored without one.
    """
    queue, step = iter(documents), 0
    while True:
        length = 512 if step % 16 == 15 else 128
        rows = []
        for _ in range(tokens // length):
            row = []
            while len(row) < length + 1:
                row += [1] + tokenizer.encode(next(queue)) + [2]
            skip = r.random() < 0.5 and len(row) > length + 1
            rows.append(row[skip:length + 1 + skip])
        step += 1
        yield (torch.tensor(rows, device=DEVICE),)


def llama_loss(model, batch):
    ids, = batch
    hidden = model.model(input_ids=ids[:, :-1]).last_hidden_state
    logits = model.lm_head(hidden).flatten(0, 1)
    return {"loss": F.cross_entropy(logits, ids[:, 1:].flatten())}


def bert_batches(tokenizer, pairs, size, r):
    """Batches of pairs of about the same length: ids, types, mask, what to predict, follows."""
    queue = iter(pairs)
    mask, words = tokenizer.id["[MASK]"], len(tokenizer.id)
    while True:
        pool = [next(queue) for _ in range(16 * size)]
        pool = [(*tokenizer.pair(first, second), follows) for follows, first, second in pool]
        pool.sort(key=lambda x: len(x[0]))
        groups = [pool[i:i + size] for i in range(0, len(pool), size)]
        r.shuffle(groups)
        for group in groups:
            ids, types = pad([g[0] for g in group]), pad([g[1] for g in group])
            goal = torch.full_like(ids, -100)
            for row, (sequence, _, _) in enumerate(group):
                for place, token in enumerate(sequence):
                    if token > 4 and r.random() < 0.15:
                        goal[row, place] = token
                        luck = r.random()
                        if luck < 0.9:
                            ids[row, place] = mask if luck < 0.8 else r.randrange(5, words)
            follows = torch.tensor([g[2] for g in group])
            yield tuple(x.to(DEVICE) for x in (ids, types, goal, follows))


def pad(rows):
    width = max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows])


def bert_loss(model, batch):
    ids, types, goal, follows = batch
    hidden, pooled = model.bert(input_ids=ids, token_type_ids=types, attention_mask=(ids != 0).long(),
                                return_dict=False)
    chosen = goal >= 0
    words = F.cross_entropy(model.cls.predictions(hidden[chosen]), goal[chosen])
    pairs = F.cross_entropy(model.cls.seq_relationship(pooled), 1 - follows)   # 0 = follows, as BERT
    return {"loss": words + pairs, "pairs": pairs}


# ------------------------------------------------------------------------------------------------
# Scores: a plain reading of the metrics, to see that training worked
# ------------------------------------------------------------------------------------------------
@torch.no_grad()
def loglik(model, tokenizer, context, continuation):
    """Sum of log-probabilities of " " + continuation, and whether greedy decoding gives it."""
    before, ids = tokenizer.encode(context), tokenizer.encode(context + " " + continuation)
    logits = model(input_ids=torch.tensor([ids[:-1]], device=DEVICE)).logits[0].float().log_softmax(-1)
    goal = torch.tensor(ids[len(before):], device=DEVICE)
    rows = logits[len(before) - 1:]
    return float(rows.gather(1, goal[:, None]).sum()), bool((rows.argmax(-1) == goal).all())


@torch.no_grad()
def greedy(model, tokenizer, prompt, limit):
    ids = tokenizer.encode(prompt)
    out = model.generate(torch.tensor([ids], device=DEVICE), max_new_tokens=limit, do_sample=False,
                         use_cache=True, eos_token_id=2, pad_token_id=0,
                         attention_mask=torch.ones(1, len(ids), device=DEVICE))
    return tokenizer.decode(out[0, len(ids):].tolist())


def llama_scores(model, tokenizer, data, limit=None):
    scores = {}
    for name in world.LLAMA:
        header, rows = read_task(os.path.join(data, name + ".tsv"))
        right = 0
        for row in rows[:limit]:
            if header["kind"] == "choice":
                values = [loglik(model, tokenizer, row[1], c)[0] / len(c) for c in row[2:]]
                right += values.index(max(values)) == int(row[0])
            elif header["kind"] == "contexts":
                values = [loglik(model, tokenizer, c, row[1])[0] for c in row[2:]]
                right += values.index(max(values)) == int(row[0])
            elif header["kind"] == "lastword":
                right += loglik(model, tokenizer, *row)[1]
            else:
                text = greedy(model, tokenizer, row[0], int(header["max_tokens"]))
                right += re.findall(r"#### (\-?[0-9\.\,]+)", text)[:1] == [row[1].split("#### ")[1]]
        scores[name] = right / len(rows[:limit])
        log(f"{name:12} {scores[name]:.3f}   chance {header['chance']}")
    return scores


@torch.no_grad()
def pooled(model, tokenizer, rows):
    features = []
    for start in range(0, len(rows), 100):
        pairs = [tokenizer.pair(*row[1:]) for row in rows[start:start + 100]]
        ids, types = (pad([p[i] for p in pairs]).to(DEVICE) for i in (0, 1))
        features.append(model.bert(input_ids=ids, token_type_ids=types,
                                   attention_mask=(ids != 0).long()).pooler_output.float())
    return torch.cat(features)


def metric(kind, guess, gold):
    """Accuracy, or Matthews / Pearson correlation, which are the same formula."""
    if kind == "acc":
        return float((guess == gold).float().mean())
    return float(torch.corrcoef(torch.stack([guess, gold]))[0, 1])


def probe(model, tokenizer, data, name):
    """Logistic (or ridge) regression on the frozen pooled features of NAME_train, scored on NAME."""
    header, dev = read_task(os.path.join(data, name + ".tsv"))
    train = read_task(os.path.join(data, name + "_train.tsv"))[1]
    x, test = (F.pad(pooled(model, tokenizer, rows).double(), (0, 1), value=1.0) for rows in (train, dev))
    y, gold = (torch.tensor([float(row[0]) for row in rows], device=DEVICE).double() for rows in (train, dev))
    w = torch.zeros(x.shape[1], device=DEVICE, dtype=torch.double, requires_grad=True)
    solver = torch.optim.LBFGS([w], max_iter=500, line_search_fn="strong_wolfe")

    def objective():
        solver.zero_grad()
        loss = (F.binary_cross_entropy_with_logits(x @ w, y, reduction="sum")
                if header["kind"] == "classify" else ((x @ w - y) ** 2).sum()) + 0.5 * (w[:-1] ** 2).sum()
        loss.backward()
        return loss
    solver.step(objective)
    guess = (test @ w).detach()
    kind = header["metrics"].split(",")[0]
    score = metric(kind, (guess > 0).double() if header["kind"] == "classify" else guess, gold)
    log(f"probe {name:12} {kind} {score:.3f}   chance {header['chance']}")
    return score


# ------------------------------------------------------------------------------------------------
# Commands
# ------------------------------------------------------------------------------------------------
def train_llama(out, steps):
    data = make_data(out)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=os.path.join(data, "tokenizer.model"))
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=tokenizer.vocab_size(), hidden_size=128, intermediate_size=256, num_hidden_layers=12,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, rms_norm_eps=1e-5,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=2)).to(DEVICE)
    documents = llama_documents(steps * 60)
    batches = llama_batches(tokenizer, documents, 1536, random.Random(SEED))
    folder = os.path.join(out, "llama")

    def checkpoint(model):
        save(model, folder, os.path.join(data, "tokenizer.model"))
        model.eval()
        llama_scores(model, tokenizer, data, 60)
        model.train()
    fit(model, batches, steps, float(os.environ.get("LR", 2e-3)), llama_loss, 150, checkpoint)
    save(model, folder, os.path.join(data, "tokenizer.model"))
    llama_scores(model, tokenizer, data)


def bert_config(tokenizer, **more):
    return BertConfig(vocab_size=len(tokenizer.id), hidden_size=128, num_hidden_layers=12,
                      num_attention_heads=4, intermediate_size=384, max_position_embeddings=128,
                      hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **more)


def train_bert(out, steps):
    data = make_data(out)
    tokenizer = WordPiece(os.path.join(data, "vocab.txt"))
    torch.manual_seed(SEED)
    model = BertForPreTraining(bert_config(tokenizer)).to(DEVICE)
    batches = bert_batches(tokenizer, bert_pairs(steps * 64 + 1024), 64, random.Random(SEED))
    folder = os.path.join(out, "bert")

    def checkpoint(model):
        save(model, folder, os.path.join(data, "vocab.txt"))
        for name in world.BERT:
            probe(model, tokenizer, data, name)
        model.train()
    fit(model, batches, steps, float(os.environ.get("LR", 7e-4)), bert_loss, 300, checkpoint)
    checkpoint(model)


def skip(model, layers):
    """Takes layers out of a BERT's encoder; returns the whole stack, to put back."""
    whole = model.bert.encoder.layer
    model.bert.encoder.layer = torch.nn.ModuleList(x for i, x in enumerate(whole) if i not in layers)
    return whole


def finetune(out, steps):
    """Each task twice: the whole model, and with --skip 4 in place from the first step on."""
    data, base = os.path.join(out, "data"), os.path.join(out, "bert")
    tokenizer = WordPiece(os.path.join(data, "vocab.txt"))
    for task in FINETUNED:
        header, dev = read_task(os.path.join(data, task + ".tsv"))
        train = read_task(os.path.join(data, task + "_train.tsv"))[1]
        for suffix, layers in (("", ()), ("-skip4", SKIPPED)):
            torch.manual_seed(SEED)
            labels = dict(enumerate(header["labels"].split("|")))
            model = BertForSequenceClassification.from_pretrained(
                base, dtype=torch.float32, id2label=labels, label2id={v: k for k, v in labels.items()},
                classifier_dropout=0.0).to(DEVICE)
            whole = skip(model, layers)
            fit(model, task_batches(tokenizer, train, 32, random.Random(SEED)), steps, 3e-4, task_loss, 50)
            ids, types, gold = next(task_batches(tokenizer, dev, len(dev), random.Random(SEED)))
            with torch.no_grad():
                guess = model(input_ids=ids, token_type_ids=types,
                              attention_mask=(ids != 0).long()).logits.argmax(-1)
            kind = header["metrics"].split(",")[0]
            log(f"fine-tuned {task + suffix:16} {kind} {metric(kind, guess.double(), gold.double()):.3f}"
                f"   chance {header['chance']}")
            model.bert.encoder.layer = whole
            save(model, os.path.join(out, f"bert-{task}{suffix}"), os.path.join(data, "vocab.txt"))


def task_batches(tokenizer, rows, size, r):
    while True:
        rows = r.sample(rows, len(rows))
        for start in range(0, len(rows) - size + 1, size):
            part = rows[start:start + size]
            pairs = [tokenizer.pair(*row[1:]) for row in part]
            yield (pad([p[0] for p in pairs]).to(DEVICE), pad([p[1] for p in pairs]).to(DEVICE),
                   torch.tensor([int(row[0]) for row in part], device=DEVICE))


def task_loss(model, batch):
    ids, types, gold = batch
    logits = model(input_ids=ids, token_type_ids=types, attention_mask=(ids != 0).long()).logits
    return {"loss": F.cross_entropy(logits, gold)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=("data", "llama", "bert", "finetune"))
    parser.add_argument("out")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    start = time.time()
    if args.command == "data":
        make_data(args.out)
    elif args.command == "llama":
        train_llama(args.out, args.steps or 5000)
    elif args.command == "bert":
        train_bert(args.out, args.steps or 6000)
    else:
        finetune(args.out, args.steps or 3 * world.TRAIN // 32)
    log(f"done in {(time.time() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
