"""A Llama in float64, a sequence at a time, written from its definition: no padding, no cache, no kernel of anybody's.

Touvron et al. 2023 (arXiv:2302.13971): pre-normalisation with RMSNorm, rotary positions (Su et al. 2021), SwiGLU. For
a head a key of its own; embeddings tied to the vocabulary head.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

Weights = Mapping[str, Tensor]


class Llama64:
    """Weights that can be learnt, and the states they give."""

    def __init__(self, folder: Path) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        stored = load_file(folder / "model.safetensors")
        self.weights = {name: tensor.double().requires_grad_() for name, tensor in stored.items()}
        assert self.config["num_key_value_heads"] == self.config["num_attention_heads"]

    def states(self, tokens: list[int]) -> Tensor:
        """[T, D], after the last normalisation."""
        config, weights = self.config, self.weights
        heads, width = config["num_attention_heads"], config["head_dim"]
        count = len(tokens)
        cos, sin = _rotations(count, width, config["rope_parameters"]["rope_theta"])
        future = torch.ones(count, count).triu(1).bool()
        x = weights["model.embed_tokens.weight"][torch.tensor(tokens)]
        for i in range(config["num_hidden_layers"]):
            layer = {
                name.removeprefix(f"model.layers.{i}.").removesuffix(".weight"): w
                for name, w in weights.items()
                if name.startswith(f"model.layers.{i}.")
            }
            y = self._norm(x, layer["input_layernorm"])
            q, k, v = (
                (y @ layer[f"self_attn.{part}_proj"].T).view(count, heads, width).transpose(0, 1) for part in "qkv"
            )  # [heads, T, width] each
            q, k = q * cos + _turned(q) * sin, k * cos + _turned(k) * sin
            match = (q @ k.transpose(1, 2) / math.sqrt(width)).masked_fill(future, -math.inf)
            read = torch.softmax(match, dim=-1) @ v
            x = x + read.transpose(0, 1).reshape(count, heads * width) @ layer["self_attn.o_proj"].T
            y = self._norm(x, layer["post_attention_layernorm"])
            gate = y @ layer["mlp.gate_proj"].T
            x = x + (gate * torch.sigmoid(gate) * (y @ layer["mlp.up_proj"].T)) @ layer["mlp.down_proj"].T
        return self._norm(x, weights["model.norm.weight"])

    def logps(self, prompt: list[int], response: list[int], temperature: float) -> list[Tensor]:
        """Of each response token, nats."""
        logits = self.states(prompt + response) @ self.weights["model.embed_tokens.weight"].T / temperature
        found = []
        for t, token in enumerate(response):
            before = logits[len(prompt) + t - 1]  # the position before a token predicts it
            found.append(before[token] - torch.log(torch.exp(before - before.max()).sum()) - before.max())
        return found

    def scalars(self, prompt: list[int], response: list[int]) -> tuple[list[Tensor], Tensor]:
        """(the head before each response token, the head at the last token)"""
        read = self.states(prompt + response) @ self.weights["score.weight"][0]
        return [read[len(prompt) + t - 1] for t in range(len(response))], read[-1]

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.config["rms_norm_eps"]) * weight


def _rotations(count: int, width: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, width]: pair i of the two halves turns by position / base^(2 i / width)."""
    speeds = torch.tensor([base ** (-2 * i / width) for i in range(width // 2)], dtype=torch.float64)
    angles = torch.arange(count, dtype=torch.float64)[:, None] * speeds.repeat(2)
    return angles.cos(), angles.sin()


def _turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)
