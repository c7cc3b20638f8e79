"""lm-evaluation-harness's own tasks and models, on official benchmark files that lie on this disk.

Needs lm_eval (0.4.13 is what this was written for), datasets, torch and transformers; no network.
Where that release differs from commit 262f879, which the paper's code pins, it is said here.
"""
import contextlib
import io
import json
import logging
import os
import struct

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false",
                  DISABLE_MULTIPROC="1")

import datasets  # noqa: E402
import lm_eval  # noqa: E402
import sentencepiece  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from lm_eval.api.task import ConfigurableTask  # noqa: E402
from lm_eval.evaluator import evaluate  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks._yaml_loader import load_yaml  # noqa: E402

import models  # noqa: E402
import reference  # noqa: E402

datasets.disable_progress_bars()
logging.getLogger("lm_eval").setLevel(logging.ERROR)

YAML = {"arc_challenge": "arc/arc_challenge.yaml", "arc_easy": "arc/arc_easy.yaml",
        "hellaswag": "hellaswag/hellaswag.yaml", "winogrande": "winogrande/default.yaml",
        "lambada_openai": "lambada/lambada_openai.yaml", "gsm8k": "gsm8k/gsm8k.yaml"}


def official_rows(path):
    with open(path, encoding="utf-8-sig") as f:
        return [json.loads(line) for line in f.read().rstrip("\n").split("\n")]


def hub_row(name, row):
    """The row of an official file in the form that its data set has on the Hugging Face hub, which
    is what the harness's templates read."""
    if not name.startswith("arc"):
        return row
    choices = row["question"]["choices"]
    return {"id": row["id"], "question": row["question"]["stem"], "answerKey": row["answerKey"],
            "choices": {key: [c[key] for c in choices] for key in ("text", "label")}}


def task(name, path, fewshot=0, train=None, same=False, max_tokens=None):
    """The harness's task over an official file, its requests built."""
    config = load_yaml(os.path.join(os.path.dirname(lm_eval.__file__), "tasks", YAML[name]))
    rows = datasets.Dataset.from_list([hub_row(name, row) for row in official_rows(path)])
    pool = datasets.Dataset.from_list([hub_row(name, row) for row in official_rows(train)]) \
        if train else rows
    split = config.get("test_split") or config["validation_split"]
    data = {config.get("training_split") or "train": pool, split: rows}
    config.update(custom_dataset=lambda **_: data, dataset_kwargs=None, metadata=None)
    config.pop("tag", None)
    if same:
        config["fewshot_config"] = {"sampler": "first_n"}
    if max_tokens:
        config["generation_kwargs"]["max_gen_toks"] = max_tokens
    made = ConfigurableTask(config=config)
    made.set_config("num_fewshot", fewshot)
    made.set_fewshot_seed(1234)
    with contextlib.redirect_stderr(io.StringIO()):     # its progress bar
        made.build_all_requests(rank=0, world_size=1)
    return made


def requests(made):
    """Per document, what the harness sends to a model: [(context, continuation)] of a scored task,
    [(prompt, None)] of one that generates."""
    found = {}
    for instance in made.instances:
        text = instance.args[1] if isinstance(instance.args[1], str) else None
        found.setdefault(instance.doc_id, []).append([instance.args[0], text])
    return [found[i] for i in sorted(found)]


def golds(made):
    """Per document, the index of the right request, or the answer text."""
    if made.multiple_input:
        return [made.doc_to_text(doc) for doc in made.eval_docs]
    return [made.doc_to_target(doc) for doc in made.eval_docs]


# Models -------------------------------------------------------------------------------------------

class Pieces(transformers.PreTrainedTokenizer):
    """sentencepiece itself behind the interface that the harness asks for; it decides what is right
    for Llama."""

    def __init__(self, path):
        self.sp = sentencepiece.SentencePieceProcessor(model_file=path)
        super().__init__(bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>")

    @property
    def vocab_size(self):
        return self.sp.vocab_size()

    def get_vocab(self):
        return {self.sp.id_to_piece(i): i for i in range(self.sp.vocab_size())}

    def _tokenize(self, text, **_):
        return self.sp.encode(text, out_type=str)

    def _convert_token_to_id(self, token):
        return self.sp.piece_to_id(token)

    def _convert_id_to_token(self, index):
        return self.sp.id_to_piece(index)

    def encode(self, text, add_special_tokens=True, **_):
        return [self.bos_token_id] * add_special_tokens + self.sp.encode(text)

    def __call__(self, texts, add_special_tokens=True, **_):
        ids = torch.tensor([self.encode(texts[0], add_special_tokens)])     # one at a time
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def decode(self, token_ids, skip_special_tokens=False, **_):
        """sentencepiece's text; the harness asks for <s> and </s> alone, and means their names."""
        ids = torch.as_tensor(token_ids).flatten().tolist()
        if ids in ([self.bos_token_id], [self.eos_token_id]) and not skip_special_tokens:
            return self.sp.id_to_piece(ids[0])
        return self.sp.decode(ids)


class Model(HFLM):
    """The harness's Hugging Face model, its layers run by a schedule (see reference.py)."""

    def __init__(self, model, tokenizer, schedule, bos):
        super().__init__(pretrained=model, tokenizer=tokenizer, add_bos_token=bos, batch_size=1)
        self.plain = schedule == [[i] for i in range(len(model.model.layers))]
        self.reference, self.schedule = reference.Llama(model), schedule

    def _model_call(self, inps, attn_mask=None, labels=None):
        if self.plain:
            return super()._model_call(inps, attn_mask, labels)
        return torch.stack([self.reference.logits(row.tolist(), self.schedule) for row in inps])

    def _model_generate(self, context, max_length, stop, **more):
        """The harness's own where the layers run in order; otherwise without a cache."""
        if self.plain:
            return super()._model_generate(context, max_length, stop, **more)
        ids = context[0].tolist()
        start = len(ids)
        while len(ids) < max_length and self.eot_token_id not in ids[start:]:
            ids.append(int(self.reference.logits(ids, self.schedule)[-1].argmax()))
            if any(s in self.tokenizer.decode(ids[start:]) for s in stop):
                break
        return torch.tensor([ids])


def small(folder):
    """(transformers model in float32, tokenizer) of a Hugging Face folder of models.py."""
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), Pieces(os.path.join(folder, "tokenizer.model"))


def stories(checkpoint, tokenizer, folder):
    """(transformers model, tokenizer) of llama2.c's stories260K, from its legacy .bin files; q and
    k are put into the order that Hugging Face's rotation asks for."""
    with open(checkpoint, "rb") as f:
        dim, hidden, layers, heads, kv, vocab, length = struct.unpack("<7i", f.read(28))
        weights = torch.frombuffer(bytearray(f.read()), dtype=torch.float32)
    config = transformers.LlamaConfig(
        hidden_size=dim, intermediate_size=hidden, num_hidden_layers=layers, vocab_size=vocab,
        num_attention_heads=heads, num_key_value_heads=kv, max_position_embeddings=length,
        rms_norm_eps=1e-5, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2)
    state, at, kv_dim = {}, 0, dim // heads * kv

    def take(name, rows, columns, each=True):
        nonlocal at
        for i in range(layers if each else 1):
            part = weights[at:at + rows * columns].reshape(rows, columns)
            at += rows * columns
            if "q_proj" in name or "k_proj" in name:
                half = dim // heads // 2
                part = part.reshape(-1, half, 2, dim).transpose(1, 2).reshape(rows, dim)
            key = "model.layers.%d.%s.weight" % (i, name) if each else "model.%s.weight" % name
            state[key] = part.squeeze(0) if rows == 1 else part

    take("embed_tokens", vocab, dim, each=False)
    take("input_layernorm", 1, dim)
    for name, rows in (("q_proj", dim), ("k_proj", kv_dim), ("v_proj", kv_dim), ("o_proj", dim)):
        take("self_attn." + name, rows, dim)
    take("post_attention_layernorm", 1, dim)
    for name, rows, columns in (("gate_proj", hidden, dim), ("down_proj", dim, hidden),
                                ("up_proj", hidden, dim)):
        take("mlp." + name, rows, columns)
    take("norm", 1, dim, each=False)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(state)
    with open(tokenizer, "rb") as f:
        data, pieces, at = f.read(), [], 4
    while at < len(data):
        score, n = struct.unpack_from("<fi", data, at)
        text = data[at + 8:at + 8 + n].decode().strip("\n" if len(pieces) < 3 else "")
        kind = 2 if not pieces else 3 if len(pieces) < 3 else 6 if len(pieces) < 259 else 1
        pieces.append((text.replace(" ", "\u2581"), score, kind))
        at += 8 + n
    path = os.path.join(folder, "stories.model")
    models.write_sentencepiece(path, pieces)
    return model.eval(), Pieces(path)


def run(made, model, limit=None):
    """Evaluates a built task: ({metric: (value, standard error)}, [per document: log-likelihoods,
    or the generated text])."""
    quiet = io.StringIO()
    made.set_fewshot_seed(1234)     # evaluate() builds the requests once more
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        results = evaluate(lm=model, task_dict={made.config.task: made}, limit=limit,
                           bootstrap_iters=100000, log_samples=True)
    figures, found = results["results"][made.config.task], {}
    for key, value in figures.items():
        metric, comma, rest = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            name = {"strict-match": "strict", "flexible-extract": "flexible"}.get(rest, metric)
            found[name] = (value, figures.get("%s_stderr,%s" % (metric, rest)))
    samples = sorted(results["samples"][made.config.task], key=lambda s: s["doc_id"])
    first = {s["doc_id"]: s for s in samples}
    answers = [[r[0] if isinstance(r[0], str) else float(r[0][0]) for r in first[i]["resps"]]
               for i in sorted(first)]
    return found, answers
