"""lm-evaluation-harness's own tasks and models, on official benchmark files that lie on this disk.

Needs lm_eval (0.4.13 is what this was written for), datasets, torch and transformers; no network.
Where that release differs from commit 262f879, which the paper's code pins, the commit's rule is put
in its place and said so here.
"""
import json
import logging
import os

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false",
                  DISABLE_MULTIPROC="1")

import datasets  # noqa: E402
import lm_eval  # noqa: E402
from lm_eval.api.task import ConfigurableTask  # noqa: E402
from lm_eval.tasks._yaml_loader import load_yaml  # noqa: E402

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
            "choices": {"text": [c["text"] for c in choices], "label": [c["label"] for c in choices]}}


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
