"""What is right, in PyTorch: transformers' own layers run in the order that a schedule says.

Needs torch and transformers. Nothing here knows painters.c. A schedule is a list of steps, a step a
list of layer numbers (see schedules.py). Everything is float32 on the CPU, one sequence at a time,
and recomputed from the first token on; only `generate_mean` keeps keys and values, because its
definition is about them.
"""
import torch
import transformers
from transformers import (AutoConfig, BertForMaskedLM, BertForSequenceClassification, BertModel,
                          LlamaForCausalLM)

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_grad_enabled(False)
torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other


def load(folder):
    """A Hugging Face folder as Llama or Bert below, in float32, whatever is stored."""
    config = AutoConfig.from_pretrained(folder)
    kinds = {"LlamaForCausalLM": LlamaForCausalLM, "BertForMaskedLM": BertForMaskedLM,
             "BertForSequenceClassification": BertForSequenceClassification}
    kind = kinds.get((config.architectures or [""])[0], BertModel)
    model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    return (Llama if kind is LlamaForCausalLM else Bert)(model)


def run(schedule, hidden, layer):
    """The hidden states before the first step and after each: a parallel step is the mean of its
    layers' outputs, residual stream included."""
    states = [hidden]
    for step in schedule:
        hidden = torch.stack([layer(i, hidden) for i in step]).mean(0)
        states.append(hidden)
    return states


class Llama:
    """A Llama whose layers run by schedule."""

    def __init__(self, model):
        self.model, self.layers = model, model.model.layers
        self.n_layers = len(self.layers)

    def states(self, ids, schedule, segments=None):
        """[steps + 1][tokens, dim]: the embedding output and each step's output."""
        n = len(ids)
        positions = torch.arange(n)[None]
        hidden = self.model.model.embed_tokens(torch.tensor(ids)[None])
        rope = self.model.model.rotary_emb(hidden, position_ids=positions)
        mask = torch.full((n, n), float("-inf")).triu(1)[None, None]
        found = run(schedule, hidden, lambda i, x: self.layers[i](
            x, attention_mask=mask, position_ids=positions, position_embeddings=rope))
        return [state[0] for state in found]

    def head(self, hidden):
        """Logits [tokens, vocab] of final hidden states."""
        return self.model.lm_head(self.model.model.norm(hidden))

    def logits(self, ids, schedule):
        return self.head(self.states(ids, schedule)[-1])

    def generate(self, ids, schedule, count):
        """Greedy continuation by recomputation: (new ids, first step at which the two best logits
        lie within 1e-4 of the largest magnitude, or count)."""
        return self._greedy(ids, count, lambda all_ids: self.logits(all_ids, schedule)[-1])

    def generate_mean(self, ids, schedule, count):
        """The same under --kv mean: one cache slot per step. In any pass (the prompt is one, each
        new token one) a layer reads its own keys and values for the rows of that pass, and for
        earlier rows the mean over the step's layers of the keys and values computed then."""
        cache = [_MeanSlot() for _ in schedule]

        def last_logits(all_ids):
            past = cache[0].rows()
            new = all_ids[past:]
            positions = torch.arange(past, past + len(new))[None]
            hidden = self.model.model.embed_tokens(torch.tensor(new)[None])
            rope = self.model.model.rotary_emb(hidden, position_ids=positions)
            mask = torch.full((len(new), past + len(new)), float("-inf")).triu(past + 1)[None, None]
            for slot, step in zip(cache, schedule):
                hidden = torch.stack([self.layers[i](
                    hidden, attention_mask=mask, position_ids=positions, position_embeddings=rope,
                    past_key_values=slot) for i in step]).mean(0)
                slot.close()
            return self.head(hidden[0, -1:])[-1]

        return self._greedy(ids, count, last_logits)

    @staticmethod
    def _greedy(ids, count, last_logits):
        ids, start, tie = list(ids), len(ids), count
        for step in range(count):
            logits = last_logits(ids)
            best = logits.topk(2).values
            if tie == count and best[0] - best[1] <= 1e-4 * logits.abs().max():
                tie = step
            ids.append(int(logits.argmax()))
        return ids[start:], tie


class _MeanSlot:
    """What transformers' attention asks of a cache: update() gives what to attend to."""

    def __init__(self):
        self.past, self.open = None, []

    def rows(self):
        return 0 if self.past is None else self.past[0].shape[2]

    def update(self, keys, values, *_, **__):
        self.open.append((keys, values))
        if self.past is None:
            return keys, values
        return torch.cat([self.past[0], keys], 2), torch.cat([self.past[1], values], 2)

    def close(self):
        """The step is over: its rows become the mean over its layers."""
        mean = [torch.stack(part).mean(0) for part in zip(*self.open)]
        self.past = mean if self.past is None else [torch.cat(p, 2) for p in zip(self.past, mean)]
        self.open = []


class Bert:
    """A BERT whose layers run by schedule, with whatever heads the model has."""

    def __init__(self, model):
        self.model = model
        self.bert = model if isinstance(model, BertModel) else model.bert
        self.layers = self.bert.encoder.layer
        self.n_layers = len(self.layers)

    def states(self, ids, schedule, segments=None):
        """[steps + 1][tokens, dim]: the embedding output and each step's output."""
        kinds = torch.tensor(segments or [0] * len(ids))[None]
        hidden = self.bert.embeddings(input_ids=torch.tensor(ids)[None], token_type_ids=kinds)
        found = run(schedule, hidden, lambda i, x: _only(self.layers[i](x)))
        return [state[0] for state in found]

    def head(self, hidden):
        """Masked-LM logits [tokens, vocab], classifier logits [1, labels], None without a head."""
        if isinstance(self.model, BertForMaskedLM):
            return self.model.cls(hidden)
        if isinstance(self.model, BertForSequenceClassification):
            return self.model.classifier(self.bert.pooler(hidden[None]))
        return None

    def logits(self, ids, schedule, segments=None):
        return self.head(self.states(ids, schedule, segments)[-1])


def _only(output):
    return output[0] if isinstance(output, tuple) else output


def cosine(sequences_of_states):
    """Cosine similarity of every pair of hidden states, flattened over positions, averaged over
    sequences; a float64 matrix."""
    total, count = 0, 0
    for states in sequences_of_states:
        flat = torch.stack([state.flatten() for state in states]).double()
        flat = flat / flat.norm(dim=1, keepdim=True)
        total, count = total + flat @ flat.T, count + 1
    return total / count
