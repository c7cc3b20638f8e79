"""export.py on checkpoints that torch, safetensors and transformers wrote: every tensor of the
model file must hold the bytes of the module's state_dict. Needs those packages.

    python3 tests/oracle_export.py
"""
import json
import os
import tempfile
import unittest
import warnings

import safetensors.torch
import torch
import transformers

import modelfile
import models
import test_export
from test_export import bert_names, head_names, llama_names, call

OURS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
warnings.simplefilter("ignore")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def llama(tied=False, **more):
    config = transformers.LlamaConfig(
        vocab_size=models.VOCAB_LLAMA, hidden_size=24, intermediate_size=36, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=48,
        tie_word_embeddings=tied, **more)
    return transformers.LlamaForCausalLM(config)


def bert(kind, **more):
    config = transformers.BertConfig(
        vocab_size=models.VOCAB_BERT, hidden_size=24, intermediate_size=36, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=48, **more)
    return kind(config)


class Oracle(unittest.TestCase):
    def setUp(self):
        torch.manual_seed(1)
        scratch = tempfile.TemporaryDirectory()
        self.addCleanup(scratch.cleanup)
        self.path = os.path.join(scratch.name, "model")
        self.out = os.path.join(scratch.name, "out.bin")

    def same(self, module, names):
        """Exports self.path; its tensors are the module's, under these names."""
        status, err = call("model", self.path, self.out)
        self.assertEqual(status, 0, err)
        model, state = modelfile.read(self.out), module.state_dict()
        self.assertEqual(set(model["tensors"]), set(names))
        for ours, theirs in names.items():
            tensor = state[theirs].contiguous()
            right = (OURS[tensor.dtype], tuple(tensor.shape),
                     tensor.view(torch.uint8).numpy().tobytes())
            self.assertEqual(model["tensors"][ours], right)
        return model

    def configuration(self, module):
        os.makedirs(self.path, exist_ok=True)
        module.config.save_pretrained(self.path)

    def test_llama_as_saved(self):
        for tied in (False, True):
            for kind in OURS:
                for size in ("5GB", "30KB"):
                    module = llama(tied, rope_theta=5e5, rms_norm_eps=1e-6).to(kind)
                    self.path += "x"
                    module.save_pretrained(self.path, max_shard_size=size)
                    index = os.path.join(self.path, "model.safetensors.index.json")
                    self.assertEqual(os.path.exists(index), size == "30KB")
                    model = self.same(module, llama_names(3, tied))
                    self.assertEqual((model["rope_theta"], model["max_length"]), (5e5, 48))

    def test_llama_by_torch(self):
        for tied in (False, True):
            for kind in OURS:
                module = llama(tied).to(kind)
                parts = {"state": module.state_dict(), "plain": dict(module.state_dict()),
                         "parameters": dict(module.named_parameters())}
                for name, part in parts.items():
                    for new in (True, False):
                        self.path += "x"
                        self.configuration(module)
                        torch.save(part, os.path.join(self.path, "pytorch_model.bin"),
                                   _use_new_zipfile_serialization=new)
                        self.same(module, llama_names(3, tied))

    def test_llama_by_torch_in_shards(self):
        module = llama()
        self.configuration(module)
        state, index = list(module.state_dict().items()), {}
        for i in range(3):
            name = "pytorch_model-0000%d-of-00003.bin" % (i + 1)
            torch.save(dict(state[i::3]), os.path.join(self.path, name))
            index.update({key: name for key, _ in state[i::3]})
        with open(os.path.join(self.path, "pytorch_model.bin.index.json"), "w") as f:
            json.dump({"metadata": {}, "weight_map": index}, f)
        self.same(module, llama_names(3, False))

    def test_meta(self):
        module = llama().to(torch.bfloat16)
        os.makedirs(self.path)
        names, meta = llama_names(3, False), llama_names(3, False, meta=True)
        state = module.state_dict()
        renamed = {meta[ours]: state[theirs] for ours, theirs in names.items()}
        renamed["rope.freqs"] = torch.ones(3)
        torch.save(renamed, os.path.join(self.path, "consolidated.00.pth"))
        with open(os.path.join(self.path, "params.json"), "w") as f:
            json.dump(dict(dim=24, n_layers=3, n_heads=4, n_kv_heads=2, norm_eps=1e-5,
                           vocab_size=-1, multiple_of=256), f)
        self.assertEqual(self.same(module, names)["rope_pairs"], 2)

    def test_bert(self):
        pooler, masked = test_export.POOLER, test_export.MASKED
        t = transformers
        for kind, parts, more in (
                (t.BertForMaskedLM, masked, {}), (t.BertForPreTraining, dict(pooler, **masked), {}),
                (t.BertForSequenceClassification, dict(pooler, **head_names("classifier")), {}),
                (t.BertForSequenceClassification, dict(pooler, **head_names("classifier")),
                 dict(num_labels=1)),
                (t.BertForSequenceClassification, dict(pooler, **head_names("mnli")),
                 dict(id2label={0: "a", 1: "b", 2: "c"}, finetuning_task="mnli"))):
            module = bert(kind, **more)
            for write in (self.by_transformers, self.by_torch):
                self.path += "x"
                write(module)
                model = self.same(module, dict(bert_names(), **parts))
            if more:
                self.assertEqual("|" in model["meta"]["head.%s.labels" % (
                    "mnli" if "id2label" in more else "classifier")], "id2label" in more)
        module = bert(t.BertModel)
        self.by_transformers(module)
        self.same(module, dict(bert_names(""), **{name: theirs[5:] for name, theirs in
                                                  pooler.items()}))

    def by_transformers(self, module):
        module.save_pretrained(self.path)

    def by_torch(self, module):
        self.configuration(module)
        torch.save(module.state_dict(), os.path.join(self.path, "pytorch_model.bin"))

    def test_refused(self):
        module = llama()
        state = module.state_dict()
        for change, pattern in (
                (module, "asks for"), (dict(state, extra=torch.nn.Linear(2, 2)), "asks for"),
                (dict(state, extra={"a": torch.ones(2)}), "entry extra: not a tensor"),
                (dict(state, extra=torch.ones(2)), "not understood: extra"),
                (dict(state, extra=torch._neg_view(torch.ones(2))), "tensor of unknown form"),
                (dict(state, extra=torch.ones(2, 3).t()), "transposed"),
                (dict(state, **{"model.norm.weight": torch.ones(48)[::2]}), "transposed or sliced"),
                (dict(state, **{"model.norm.weight": torch.ones(24).double()}), "f64"),
                (dict(state, **{"model.norm.weight": torch.ones(24).to(torch.float8_e4m3fn)}),
                 "asks for|pickle"),
                (dict(state, **{"model.norm.weight": torch.ones(24).to_sparse()}), "asks for"),
                (dict(state, **{"model.norm.weight": torch.quantize_per_tensor(
                    torch.ones(24), 1.0, 0, torch.qint8)}), "asks for"),
                (dict(state, **{"model.norm.weight": torch.ones(24, device="meta")}), "asks for"),
                (dict(state, **{"model.norm.weight": torch.ones(24, dtype=torch.complex64)}),
                 "asks for|pickle")):
            for new in (True, False):
                self.path += "x"
                self.configuration(module)
                torch.save(change, os.path.join(self.path, "pytorch_model.bin"),
                           _use_new_zipfile_serialization=new)
                with self.subTest(pattern=pattern, new=new):
                    status, err = call("model", self.path, self.out)
                    self.assertEqual((status, err.count("\n")), (1, 1), err)
                    self.assertRegex(err, pattern)

    def test_refused_models(self):
        t = transformers
        for module, pattern in (
                (llama(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
                 "linear"),
                (llama(attention_bias=True), "attention_bias"), (llama(mlp_bias=True), "mlp_bias"),
                (llama(hidden_act="gelu"), "hidden_act"),
                (t.LlamaForSequenceClassification(llama().config), "score|lm_head"),
                (t.LlamaModel(llama().config), "missing|other names|not understood"),
                (bert(t.BertForQuestionAnswering), "qa_outputs"),
                (bert(t.BertForTokenClassification), "TokenClassification"),
                (bert(t.BertForMultipleChoice), "MultipleChoice"),
                (bert(t.BertLMHeadModel, is_decoder=True), "is_decoder"),
                (bert(t.BertModel, hidden_act="gelu_new"), "gelu_new"),
                (t.MistralForCausalLM(t.MistralConfig(
                    vocab_size=99, hidden_size=24, intermediate_size=36, num_hidden_layers=1,
                    num_attention_heads=4, num_key_value_heads=2)), "mistral"),
                (t.RobertaModel(t.RobertaConfig(
                    vocab_size=99, hidden_size=24, intermediate_size=36, num_hidden_layers=1,
                    num_attention_heads=4)), "roberta")):
            self.path += "x"
            module.save_pretrained(self.path)
            status, err = call("model", self.path, self.out)
            self.assertEqual((status, err.count("\n")), (1, 1), err)
            self.assertRegex(err, pattern)

    def test_lies_that_safetensors_refuses_too(self):
        """What export.py accepts of randomly changed headers, safetensors accepts as well."""
        case = test_export.Safetensors("test_holes")
        case.setUp()
        whole, rng = test_export.joined(case.header, case.data), test_export.random.Random(5)
        os.makedirs(self.path)
        file = os.path.join(self.path, "model.safetensors")
        accepted = 0
        for _ in range(3000):
            data = bytearray(whole)
            for _ in range(rng.randint(1, 2)):
                at = rng.randrange(len(whole) - len(case.data))
                data[at] = rng.choice(b'0123456789{}[]",:aF')
            with open(file, "wb") as f:
                f.write(data)
            try:
                test_export.export.read_safetensors(file)
            except test_export.export.ExportError:
                continue
            accepted += 1
            safetensors.torch.load_file(file)
        self.assertGreater(accepted, 100)


if __name__ == "__main__":
    unittest.main()
