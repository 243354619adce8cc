"""Tokens per second of a training step in PyTorch, eager and compiled: the same model, batch and optimiser as ours.

    train.py THREADS CONFIG        CONFIG: the run file's [model] as JSON, and `batch_sequences`

For each line of its input, a number of steps, it measures both and prints them as JSON.
"""
import json
import math
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        hidden, heads, groups = config["hidden_size"], config["heads"], config["key_value_heads"]
        self.heads, self.groups, self.size = heads, groups, hidden // heads
        self.query = nn.Linear(hidden, hidden, bias=False)
        self.key = nn.Linear(hidden, groups * self.size, bias=False)
        self.value = nn.Linear(hidden, groups * self.size, bias=False)
        self.output = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x, cos, sin):
        batch, tokens, hidden = x.shape

        def split(projected, heads):
            return projected.view(batch, tokens, heads, self.size).transpose(1, 2)

        def rotate(x):
            first, second = x.chunk(2, dim=-1)
            return x * cos + torch.cat((-second, first), dim=-1) * sin

        query = rotate(split(self.query(x), self.heads))
        key = rotate(split(self.key(x), self.groups))
        value = split(self.value(x), self.groups)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=self.heads != self.groups)
        return self.output(mixed.transpose(1, 2).reshape(batch, tokens, hidden))


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        hidden, wide, epsilon = config["hidden_size"], config["feed_forward_size"], config["norm_epsilon"]
        self.attention_norm, self.attention = nn.RMSNorm(hidden, epsilon), Attention(config)
        self.norm = nn.RMSNorm(hidden, epsilon)
        self.gate, self.up = nn.Linear(hidden, wide, bias=False), nn.Linear(hidden, wide, bias=False)
        self.down = nn.Linear(wide, hidden, bias=False)

    def forward(self, x, cos, sin):
        x = x + self.attention(self.attention_norm(x), cos, sin)
        normed = self.norm(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


class Llama(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embedding = nn.Embedding(config["vocabulary_size"], config["hidden_size"])
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config["layers"]))
        self.norm = nn.RMSNorm(config["hidden_size"], config["norm_epsilon"])
        size = config["hidden_size"] // config["heads"]
        frequencies = config["rope_theta"] ** (-torch.arange(0, size, 2) / size)
        angles = torch.outer(torch.arange(config["context_length"]), frequencies).repeat(1, 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, inputs, targets):
        x = self.embedding(inputs)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        logits = F.linear(self.norm(x), self.embedding.weight)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))


class Trainer:
    def __init__(self, config, compiled):
        torch.manual_seed(1)
        self.config = config
        self.model = Llama(config)
        decaying = [p for p in self.model.parameters() if p.dim() >= 2]
        others = [p for p in self.model.parameters() if p.dim() < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": decaying, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
            lr=1e-3, betas=(0.9, 0.95), fused=True)
        self.run = torch.compile(self.model) if compiled else self.model

    def seconds_of_a_step(self):
        shape = (self.config["batch_sequences"], self.config["context_length"] + 1)
        tokens = torch.randint(self.config["vocabulary_size"], shape)
        began = time.perf_counter()
        loss = self.run(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        seconds = time.perf_counter() - began
        assert math.isfinite(loss.item())
        return seconds

    def tokens_per_second(self, steps):
        """The median over steps, after three that warm up."""
        seconds = [self.seconds_of_a_step() for _ in range(3 + steps)][3:]
        return self.config["batch_sequences"] * self.config["context_length"] / statistics.median(seconds)


def main():
    torch.set_num_threads(int(sys.argv[1]))
    config = json.loads(sys.argv[2])
    trainers = {name: Trainer(config, name == "compiled") for name in ("eager", "compiled")}
    for steps in sys.stdin:
        speeds = {name: trainer.tokens_per_second(int(steps)) for name, trainer in trainers.items()}
        print(json.dumps(speeds), flush=True)


main()
