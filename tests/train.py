"""Trains the two small models on the small world of world.py, from scratch, with PyTorch.

    python3 tests/train.py data OUT         task files, tokenizers and a sample of the training text
    python3 tests/train.py llama OUT        a 12-layer Llama and its scores on the held-out tasks
    python3 tests/train.py bert OUT         a 12-layer BERT (masked words; does B follow A?), probed
    python3 tests/train.py finetune OUT     wholly fine-tuned copies, without and with --skip 4

Needs torch, transformers, sentencepiece and safetensors. Writes the Hugging Face folders OUT/llama,
OUT/bert, OUT/bert-TASK and OUT/bert-TASK-skip4. Seeds are fixed: data and tokenizers come out the
same to the byte, weights up to the rounding of the machine. A GPU is used where there is one. A run
that was broken off goes on from OUT/*.state, written every 250 steps.
"""
import argparse
import collections
import os
import random
import re
import shutil
import time

import sentencepiece
import torch
import torch.nn.functional as F
from transformers import (BertConfig, BertForPreTraining, BertForSequenceClassification,
                          LlamaConfig, LlamaForCausalLM)

import world

SEED = 1
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FINETUNED = ("accept", "sentiment")
SKIPPED = (5, 6, 7)            # what `--skip 4` leaves out of 12 layers


def log(*words):
    print(time.strftime("%H:%M:%S"), *words, flush=True)


# ------------------------------------------------------------------------------------------------
# Data and tokenizers
# ------------------------------------------------------------------------------------------------
def llama_documents():
    r = random.Random(f"{SEED}/llama")
    while True:
        yield world.llama_document(r)


def bert_pairs():
    r = random.Random(f"{SEED}/bert")
    while True:
        yield world.bert_pair(r)


def split_words(text):
    """What an uncased WordPiece makes of plain ASCII text before it looks the words up."""
    return re.findall(r"[a-z0-9]+|[^\sa-z0-9]", text.lower())


class WordPiece:
    """Whole words only, which is all that the text of world.py needs."""

    def __init__(self, path):
        with open(path, encoding="utf-8") as lines:
            self.id = {line.rstrip("\n"): i for i, line in enumerate(lines)}

    def __call__(self, first, second=None):
        """(ids, segment numbers) of [CLS] first [SEP] second [SEP]."""
        ids = [self.id[w] for w in ["[CLS]", *split_words(first), "[SEP]"]]
        more = [self.id[w] for w in [*split_words(second), "[SEP]"]] if second else []
        return ids + more, [0] * len(ids) + [1] * len(more)


def write_lines(path, lines):
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(line + "\n" for line in lines)


def make_data(out):
    """Task files, tokenizer.model, vocab.txt and a sample of the text that they were made from."""
    data, documents, pairs = os.path.join(out, "data"), llama_documents(), bert_pairs()
    os.makedirs(data, exist_ok=True)
    world.write_tasks(data, SEED)
    world.write_corpus(data, SEED, 1000, 1000)
    # The delimiter keeps words and numbers apart from the punctuation that follows them.
    parts = ("\x01".join(re.findall(r" ?\w+| ?#+| ?[^\w\s]|\s", next(documents)))
             for _ in range(20000))
    with open(os.path.join(data, "tokenizer.model"), "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=parts, model_writer=file, pretokenization_delimiter="\x01",
            model_type="bpe", vocab_size=1024, byte_fallback=True, num_threads=1, minloglevel=2,
            normalization_rule_name="identity", remove_extra_whitespaces=False)
    words = collections.Counter(w for _ in range(20000) for text in next(pairs)[1:]
                                for w in split_words(text))
    letters = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] + letters
    vocab += ["##" + c for c in letters if c.isalnum()]
    vocab += sorted((w for w in words if len(w) > 1), key=lambda w: (-words[w], w))
    write_lines(os.path.join(data, "vocab.txt"), vocab)
    log("data in", data, "-", len(vocab), "word pieces")
    return data


def read_task(path):
    """(header fields, rows) of a task file."""
    plain = {"\\n": "\n", "\\t": "\t", "\\r": "\r", "\\\\": "\\"}
    with open(path, encoding="utf-8") as lines:
        rows = [[re.sub(r"\\.", lambda m: plain[m[0]], x) for x in line.rstrip("\n").split("\t")]
                for line in lines]
    return dict(field.split("=", 1) for field in rows[0][2:]), rows[1:]


def save(model, folder, tokenizer):
    """A Hugging Face folder in float16: config.json, model.safetensors and the tokenizer file."""
    half = type(model)(model.config)
    half.load_state_dict(model.state_dict())
    half.half().save_pretrained(folder)
    shutil.copy(tokenizer, folder)


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------
def orthogonal(x):
    """Roughly the nearest orthogonal matrices to a stack of them: five Newton-Schulz turns."""
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return x


class Muon:
    """Momentum made orthogonal, for the weight matrices of the layers (Jordan, 2024)."""

    def __init__(self, parameters, decay=0.05):
        self.stacks, self.decay = collections.defaultdict(list), decay
        for p in parameters:
            self.stacks[tuple(p.shape)].append(p)
        self.momentum = {shape: torch.zeros(len(ps), *shape, device=DEVICE)
                         for shape, ps in self.stacks.items()}

    @torch.no_grad()
    def step(self, rate):
        for shape, parameters in self.stacks.items():
            gradient, momentum = torch.stack([p.grad for p in parameters]), self.momentum[shape]
            momentum.lerp_(gradient, 0.05)
            update = gradient.lerp(momentum, 0.95)
            update = orthogonal(update) if shape[0] <= shape[1] else orthogonal(update.mT).mT
            for p, u in zip(parameters, update * (0.2 * max(shape) ** 0.5)):
                p.mul_(1 - rate * self.decay).sub_(u, alpha=rate)


def fit(model, batches, steps, rate, loss_of, warmup, state=None, check=None, matrices=1):
    """Muon for the layers' matrices, at so many times the rate, AdamW for the rest.

    The rate warms up, stays, and falls to zero over the last 40% of the steps. With a state file
    the run goes on from there; every 1000 steps check(model) is called.
    """
    named = list(model.named_parameters())
    layers = [p for name, p in named if p.ndim == 2 and ".layer" in name]
    muon = Muon(layers)
    adam = torch.optim.AdamW([p for name, p in named if not (p.ndim == 2 and ".layer" in name)],
                             betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    first = 0
    if state and os.path.exists(state):
        first, weights, muon.momentum, moments = torch.load(state, map_location=DEVICE)
        model.load_state_dict(weights)
        adam.load_state_dict(moments)
        log("goes on after step", first)
    model.train()
    total, seen, start = collections.Counter(), 0, time.time()
    for step, batch in zip(range(1, steps + 1), batches):
        if step <= first:
            continue
        now = rate * min(1, step / warmup, (steps - step + 1) / (0.4 * steps))
        adam.param_groups[0]["lr"] = now
        losses = loss_of(model, [x.to(DEVICE) for x in batch])
        losses["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step(now * matrices)
        adam.step()
        model.zero_grad()
        total.update({name: float(value.detach()) for name, value in losses.items()})
        seen += batch[0].numel()
        if step % 50 == 0:
            log(f"step {step}/{steps}", *(f"{n} {v / 50:.4f}" for n, v in total.items()),
                f"{seen / (time.time() - start):.0f} tokens/s")
            total.clear()
        if state and step % 250 == 0:
            torch.save((step, model.state_dict(), muon.momentum, adam.state_dict()), state)
        if check and step % 1000 == 0:
            check(model.eval())
            model.train()
    model.eval()


def pad(rows, filler=0):
    width = max(map(len, rows))
    return torch.tensor([row + [filler] * (width - len(row)) for row in rows])


def llama_batches(tokenizer, tokens):
    """Documents of about the same length, -1 after the shorter ones, about so many tokens a batch.

    Half of them start without BOS, since the tasks are scored without one. Every 16th batch is
    documents joined to rows of 512, for the long positions. At first every other document is a
    chant, in which heads that look back form soon.
    """
    r = random.Random(SEED)
    documents = (world.chant(r) if i < 25000 and i % 2 else text
                 for i, text in enumerate(llama_documents()))
    encoded = ([1] * r.randrange(2) + tokenizer.encode(text) + [2] for text in documents)
    while True:
        pool = sorted((next(encoded) for _ in range(750)), key=len)
        batches = [[]]
        for row in pool:
            if (len(batches[-1]) + 1) * len(row) > tokens:
                batches.append([])
            batches[-1].append(row)
        r.shuffle(batches)
        for rows in batches:
            yield pad(rows, -1),
        long = []
        while len(long) < tokens:
            long += next(encoded)
        yield torch.tensor(long[:tokens // 512 * 512]).view(-1, 512),


def llama_loss(model, batch):
    ids, = batch
    hidden = model.model(input_ids=ids[:, :-1].clamp(min=0)).last_hidden_state
    return {"loss": F.cross_entropy(model.lm_head(hidden).flatten(0, 1), ids[:, 1:].flatten(),
                                    ignore_index=-1)}


def bert_batches(tokenizer, size):
    """Pairs of about the same length: ids, segments, words to predict (or -100), follows or not."""
    pairs, r = bert_pairs(), random.Random(SEED)
    while True:
        pool = [next(pairs) for _ in range(16 * size)]
        pool = sorted(((*tokenizer(*pair[1:]), pair[0]) for pair in pool), key=lambda x: len(x[0]))
        groups = [pool[i:i + size] for i in range(0, len(pool), size)]
        r.shuffle(groups)
        for group in groups:
            ids, types, follows = zip(*group)
            ids = pad(ids)
            goal = torch.full_like(ids, -100)
            for row, place in (ids > 4).nonzero().tolist():
                if r.random() < 0.15:
                    goal[row, place], luck = ids[row, place], r.random()
                    if luck < 0.9:         # 80% [MASK], 10% any word, 10% the word itself
                        ids[row, place] = 4 if luck < 0.8 else r.randrange(5, len(tokenizer.id))
            yield ids, pad(types), goal, torch.tensor(follows)


def bert_loss(model, batch):
    ids, types, goal, follows = batch
    hidden, pooled = model.bert(input_ids=ids, token_type_ids=types,
                                attention_mask=(ids != 0).long(), return_dict=False)
    chosen = goal >= 0
    words = F.cross_entropy(model.cls.predictions(hidden[chosen]), goal[chosen])
    pairs = F.cross_entropy(model.cls.seq_relationship(pooled), 1 - follows)  # 0 = follows
    return {"loss": words + pairs, "pairs": pairs}


def task_batches(tokenizer, rows, size):
    r = random.Random(SEED)
    while True:
        rows = r.sample(rows, len(rows))
        for start in range(0, len(rows) - size + 1, size):
            ids, types = zip(*(tokenizer(*row[1:]) for row in rows[start:start + size]))
            gold = [int(row[0]) for row in rows[start:start + size]]
            yield pad(ids), pad(types), torch.tensor(gold)


def task_loss(model, batch):
    return {"loss": F.cross_entropy(task_logits(model, *batch[:2]), batch[2])}


def task_logits(model, ids, types):
    return model(input_ids=ids, token_type_ids=types, attention_mask=(ids != 0).long()).logits


# ------------------------------------------------------------------------------------------------
# Scores: a plain reading of the metrics, to see that training worked
# ------------------------------------------------------------------------------------------------
@torch.no_grad()
def loglik(model, tokenizer, context, continuation):
    """Sum of log-probabilities of " " + continuation, and whether greedy decoding gives it."""
    before, ids = tokenizer.encode(context), tokenizer.encode(context + " " + continuation)
    logits = model(input_ids=torch.tensor([ids[:-1]], device=DEVICE)).logits[0].log_softmax(-1)
    goal, logits = torch.tensor(ids[len(before):], device=DEVICE), logits[len(before) - 1:]
    return float(logits.gather(1, goal[:, None]).sum()), bool((logits.argmax(-1) == goal).all())


def is_right(model, tokenizer, kind, row):
    if kind == "lastword":
        return loglik(model, tokenizer, *row)[1]
    if kind == "generate":
        ids = torch.tensor([tokenizer.encode(row[0])], device=DEVICE)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64,
                             do_sample=False, eos_token_id=2, pad_token_id=0)
        text = tokenizer.decode(out[0, ids.shape[1]:].tolist())
        return re.findall(r"#### (\-?[0-9\.\,]+)", text)[:1] == [row[1].split("#### ")[1]]
    values = [loglik(model, tokenizer, row[1], x)[0] / len(x) if kind == "choice" else
              loglik(model, tokenizer, x, row[1])[0] for x in row[2:]]
    return values.index(max(values)) == int(row[0])


def llama_scores(model, tokenizer, data, limit=None):
    for name in world.LLAMA:
        header, rows = read_task(os.path.join(data, name + ".tsv"))
        right = [is_right(model, tokenizer, header["kind"], row) for row in rows[:limit]]
        log(f"{name:12} {sum(right) / len(right):.3f}   chance {header['chance']}")


def score(header, guess, gold):
    """Accuracy, or the Matthews or Pearson correlation, which are one formula."""
    if header["metrics"].startswith("acc"):
        return float((guess == gold).double().mean())
    return float(torch.corrcoef(torch.stack([guess, gold]).double())[0, 1])


@torch.no_grad()
def pooled(model, tokenizer, rows):
    """The pooler's features and a constant 1."""
    ids, types = (pad(x).to(DEVICE) for x in zip(*(tokenizer(*row[1:]) for row in rows)))
    features = model.bert(input_ids=ids, token_type_ids=types,
                          attention_mask=(ids != 0).long()).pooler_output
    return F.pad(features.double(), (0, 1), value=1.0)


def probe(model, tokenizer, data, name):
    """Logistic (or ridge) regression on frozen pooled features, fitted on the training part."""
    header, dev = read_task(os.path.join(data, name + ".tsv"))
    train = read_task(os.path.join(data, name + "_train.tsv"))[1]
    x, test = pooled(model, tokenizer, train), pooled(model, tokenizer, dev)
    y, gold = (torch.tensor([float(row[0]) for row in rows], device=DEVICE, dtype=torch.double)
               for rows in (train, dev))
    classify = header["kind"] == "classify"
    w = torch.zeros(x.shape[1], device=DEVICE, dtype=torch.double, requires_grad=True)
    solver = torch.optim.LBFGS([w], max_iter=500, line_search_fn="strong_wolfe")

    def objective():
        solver.zero_grad()
        loss = (F.binary_cross_entropy_with_logits(x @ w, y, reduction="sum") if classify
                else ((x @ w - y) ** 2).sum()) + 0.5 * (w[:-1] ** 2).sum()
        loss.backward()
        return loss
    solver.step(objective)
    guess = (test @ w).detach()
    value = score(header, (guess > 0).double() if classify else guess, gold)
    log(f"probe {name:12} {value:.3f}   chance {header['chance']}   {header['metrics']}")


# ------------------------------------------------------------------------------------------------
# Commands
# ------------------------------------------------------------------------------------------------
def train_llama(out, steps):
    data = make_data(out)
    vocabulary = os.path.join(data, "tokenizer.model")
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=vocabulary)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=tokenizer.vocab_size(), hidden_size=128, intermediate_size=256,
        num_hidden_layers=12, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5,
        max_position_embeddings=512, bos_token_id=1, eos_token_id=2,
        initializer_range=128 ** -0.5)).to(DEVICE)     # with 0.02 no head learns to look back

    def check(model):
        save(model, os.path.join(out, "llama"), vocabulary)
        llama_scores(model, tokenizer, data, 100)
    fit(model, llama_batches(tokenizer, 1536), steps, 3e-3, llama_loss, 100,
        os.path.join(out, "llama.state"), check, matrices=2)
    save(model, os.path.join(out, "llama"), vocabulary)
    llama_scores(model, tokenizer, data)


def train_bert(out, steps):
    data = make_data(out)
    vocabulary = os.path.join(data, "vocab.txt")
    tokenizer = WordPiece(vocabulary)
    model = BertForPreTraining(BertConfig(
        vocab_size=len(tokenizer.id), hidden_size=128, num_hidden_layers=12, num_attention_heads=4,
        intermediate_size=384, max_position_embeddings=128, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0)).to(DEVICE)

    def check(model):
        save(model, os.path.join(out, "bert"), vocabulary)
        for name in world.BERT:
            probe(model, tokenizer, data, name)
    fit(model, bert_batches(tokenizer, 64), steps, 1e-3, bert_loss, 300,
        os.path.join(out, "bert.state"), check)
    check(model)


def finetune(out, steps):
    """Each task twice: the whole model, and with the schedule of --skip 4 from the first step."""
    data = os.path.join(out, "data")
    tokenizer = WordPiece(os.path.join(data, "vocab.txt"))
    for task in FINETUNED:
        header, dev = read_task(os.path.join(data, task + ".tsv"))
        train = read_task(os.path.join(data, task + "_train.tsv"))[1]
        labels = header["labels"].split("|")
        for name, left_out in ((task, ()), (task + "-skip4", SKIPPED)):
            torch.manual_seed(SEED)
            model = BertForSequenceClassification.from_pretrained(
                os.path.join(out, "bert"), dtype=torch.float32, id2label=dict(enumerate(labels)),
                label2id={label: i for i, label in enumerate(labels)}).to(DEVICE)
            whole = model.bert.encoder.layer
            model.bert.encoder.layer = torch.nn.ModuleList(
                layer for i, layer in enumerate(whole) if i not in left_out)
            fit(model, task_batches(tokenizer, train, 32), steps, 2e-4, task_loss, 30)
            ids, types, gold = next(task_batches(tokenizer, dev, len(dev)))
            with torch.no_grad():
                guess = task_logits(model, ids.to(DEVICE), types.to(DEVICE)).argmax(-1).cpu()
            log(f"fine-tuned {name:16} {score(header, guess, gold):.3f}   "
                f"chance {header['chance']}   {header['metrics']}")
            model.bert.encoder.layer = whole
            save(model, os.path.join(out, "bert-" + name), os.path.join(data, "vocab.txt"))


def main():
    commands = {"llama": (train_llama, 6000), "bert": (train_bert, 4000),
                "finetune": (finetune, 3 * world.TRAIN // 32)}
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=("data", *commands))
    parser.add_argument("out")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(SEED)
    start = time.time()
    if args.command == "data":
        make_data(args.out)
    else:
        command, steps = commands[args.command]
        command(args.out, args.steps or steps)
    log(f"done in {(time.time() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
