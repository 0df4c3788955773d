"""A Llama and its training loop in nanoGPT's style, written only to be compared with.

No micro-batches, no log, no checkpoint. As in nanoGPT, q, k and v are one matrix product.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class Block(nn.Module):
    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, Tensor], layer: int):
        super().__init__()
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.eps, self.width = config["rms_norm_eps"], (config["hidden_size"],)

        def parameter(*names: str) -> nn.Parameter:
            parts = [weights[f"model.layers.{layer}.{name}.weight"] for name in names]
            return nn.Parameter(torch.cat(parts))

        self.norm_1 = parameter("input_layernorm")
        self.qkv = parameter("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        self.proj = parameter("self_attn.o_proj")
        self.norm_2 = parameter("post_attention_layernorm")
        self.gate, self.up = parameter("mlp.gate_proj"), parameter("mlp.up_proj")
        self.down = parameter("mlp.down_proj")

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, _ = x.shape
        qkv = F.linear(F.rms_norm(x, self.width, self.norm_1, self.eps), self.qkv)
        qkv = qkv.view(B, T, self.heads + 2 * self.kv_heads, -1).transpose(1, 2)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + F.linear(y.transpose(1, 2).reshape(B, T, -1), self.proj)
        y = F.rms_norm(x, self.width, self.norm_2, self.eps)
        return x + F.linear(F.silu(F.linear(y, self.gate)) * F.linear(y, self.up), self.down)


class GPT(nn.Module):
    """A Llama with tied embeddings. config, weights: with Hugging Face's names."""

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, Tensor]):
        super().__init__()
        self.embedding = nn.Parameter(weights["model.embed_tokens.weight"].clone())
        layers = range(config["num_hidden_layers"])
        self.blocks = nn.ModuleList(Block(config, weights, layer) for layer in layers)
        self.norm, self.eps = nn.Parameter(weights["model.norm.weight"].clone()), self.blocks[0].eps
        D = self.blocks[0].qkv.shape[0] // (self.blocks[0].heads + 2 * self.blocks[0].kv_heads)
        frequency = config["rope_theta"] ** (-torch.arange(0, D, 2).float() / D)
        angle = torch.arange(config["max_position_embeddings"])[:, None] * frequency.repeat(2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """The mean loss. ids, targets: (B, T)."""
        cos, sin, x = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]], self.embedding[ids]
        for block in self.blocks:
            x = block(x, cos, sin)
        x = F.rms_norm(x, x.shape[-1:], self.norm, self.eps)
        return F.cross_entropy(F.linear(x, self.embedding).flatten(0, 1), targets.flatten())


def train(
    loss_of: Callable[[], Tensor], model: nn.Module, settings: Mapping[str, Any], turn: Callable
) -> None:
    """Trains without end, and calls `turn` with the loss after each step.

    settings: learning_rate, weight_decay, betas, eps, max_grad_norm.
    """
    parameters = list(model.parameters())  # a tied one appears once
    matrices = [p for p in parameters if p.ndim >= 2]
    scales = [p for p in parameters if p.ndim < 2]
    groups = [{"params": matrices}, {"params": scales, "weight_decay": 0.0}]
    options = {key: settings[key] for key in ("weight_decay", "betas", "eps")}
    optimizer = torch.optim.AdamW(groups, lr=settings["learning_rate"], **options, fused=True)
    while True:
        loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, settings["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        turn(loss)
