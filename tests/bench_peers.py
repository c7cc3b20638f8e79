"""The peers of tests/bench.py, each a process of a Python that has them:

    PYTHON tests/bench_peers.py NAME ARGUMENT ...

prints a line about itself when it is ready, then answers each line of stdin with seconds.
"""
import array
import json
import os
import random
import re
import sys
import time


def llama_cpp(path, threads):
    """prefill TOKENS; decode STEPS 1 PAST; logits TOKENS FILE: as tests/bench_model.c has them."""
    import llama_cpp as lib
    silence = lib.llama_log_callback(lambda *_: None)
    lib.llama_log_set(silence, None)
    lib.llama_backend_init()
    model_options, options = lib.llama_model_default_params(), lib.llama_context_default_params()
    model = lib.llama_load_model_from_file(path.encode(), model_options)
    options.n_ctx, options.n_batch, options.n_ubatch = 4096, 2048, 512
    options.n_threads = options.n_threads_batch = int(threads)
    make = getattr(lib, "llama_init_from_model", None) or lib.llama_new_context_with_model
    context = make(model, options)
    if not model or not context:
        raise SystemExit("llama.cpp does not load " + path)

    def clear():
        if hasattr(lib, "llama_memory_clear"):
            lib.llama_memory_clear(lib.llama_get_memory(context), True)
        else:
            (getattr(lib, "llama_kv_self_clear", None) or lib.llama_kv_cache_clear)(context)

    def decode(ids):
        tokens = (lib.llama_token * len(ids))(*ids)
        if lib.llama_decode(context, lib.llama_batch_get_one(tokens, len(ids))):
            raise SystemExit("llama_decode failed")
        lib.llama_get_logits(context)[0]

    def run(what, n, path="", past=0, _silence=silence):   # which must not be collected
        rng = random.Random(3)
        clear()
        if what == "logits":
            decode([i * 37 % 1000 for i in range(int(n))])
            count = lib.llama_n_vocab(lib.llama_model_get_vocab(model))
            with open(path, "wb") as f:
                array.array("f", lib.llama_get_logits_ith(context, -1)[:count]).tofile(f)
            return None
        if what == "prefill":
            return decode([rng.randrange(1000) for _ in range(int(n))])
        decode([rng.randrange(1000) for _ in range(max(int(past), 1))])
        start = time.perf_counter()
        for _ in range(int(n)):
            decode([rng.randrange(1000)])
        return start
    info = lib.llama_print_system_info().decode()
    return run, "with " + " ".join(re.findall(r"(AVX2|AVX512|AMX_INT8|NEON|SVE) = 1", info))


def transformers(folder, kind, threads):
    """encode SEQUENCES TOKENS: BERT's hidden states."""
    import torch
    from transformers import BertModel
    torch.set_num_threads(int(threads))
    model = BertModel.from_pretrained(folder, dtype=getattr(torch, kind)).eval()

    @torch.inference_mode()
    def run(_, sequences, tokens):
        model(torch.randint(0, 1000, (int(sequences), int(tokens))))
    return run


def lm_eval(folder, kind, threads, items, out):
    """score N: the first N items, at the batch size that is the fastest; writes the log-likelihoods
    of their endings to `out`."""
    import harness                  # first: it tells its libraries that there is no network
    import torch
    from transformers import LlamaForCausalLM
    torch.set_num_threads(int(threads))
    llama = LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, kind)).eval()
    model = harness.HFLM(pretrained=llama, batch_size=1, add_bos_token=False, tokenizer=(
        harness.Pieces(os.path.join(folder, "tokenizer.model"))))
    instances = sorted(harness.task("hellaswag", items).instances, key=lambda i: i.doc_id)

    def run(_, n):
        wanted = [i for i in instances if i.doc_id < int(n)]
        found = [value for value, _ in model.loglikelihood(wanted, disable_tqdm=True)]
        with open(out, "w", encoding="utf-8") as f:
            json.dump([found[i:i + 4] for i in range(0, len(found), 4)], f)
        return None, out

    def took(size):
        model.batch_size_per_gpu = size
        start = time.perf_counter()
        run("score", 4)
        return time.perf_counter() - start
    took(1)
    model.batch_size_per_gpu = min((1, 4, 16), key=took)
    return run, "batch size %d" % model.batch_size_per_gpu


def tokenizers(vocabulary):
    """tokenize FILE: every line of it; says the number of ids."""
    from tokenizers import BertWordPieceTokenizer, Tokenizer, models, normalizers
    if vocabulary.endswith(".txt"):
        tokenizer = BertWordPieceTokenizer(vocabulary, lowercase=True)._tokenizer
    else:                           # as transformers converts Llama's
        import sentencepiece
        sp = sentencepiece.SentencePieceProcessor(model_file=vocabulary)
        ids = {sp.id_to_piece(i): i for i in range(sp.vocab_size())}
        merges = []
        for piece, i in ids.items():
            pairs = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
            pairs = [p for p in pairs if p[0] in ids and p[1] in ids]
            merges += [(-sp.get_score(i), ids[p[0]], ids[p[1]], p) for p in pairs]
        tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[row[-1] for row in sorted(merges)],
                                         unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"),
                                                     normalizers.Replace(" ", "\u2581")])

    def run(_, path):
        with open(path, encoding="utf-8") as f:
            lines = f.read().splitlines()
        start = time.perf_counter()
        found = tokenizer.encode_batch_fast(lines, add_special_tokens=False)
        took = time.perf_counter() - start
        count = sum(len(one.ids) for one in found)
        return time.perf_counter() - took, count
    return run


def main():
    """A function above gives one that runs a command's words, and maybe more about itself. That one
    may return the time at which the work began (None: when it was called), and what both sides must
    agree on."""
    made = globals()[sys.argv[1]](*sys.argv[2:])
    run, about = made if isinstance(made, tuple) else (made, "")
    print("ready: " + about, flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        started = run(*line.split())
        end, check = time.perf_counter(), ""
        if isinstance(started, tuple):
            started, check = started
        print(end - (started or start), check, flush=True)


if __name__ == "__main__":
    main()
