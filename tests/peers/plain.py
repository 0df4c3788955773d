"""A small Llama and its training loop in nanoGPT's style, written only to be compared with.

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
    """config: a dict with Hugging Face's fields, as in config.json."""

    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        C, eps, hidden = (config[k] for k in ("hidden_size", "rms_norm_eps", "intermediate_size"))
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.head_dim = config.get("head_dim") or C // self.heads
        self.norm_1, self.norm_2 = nn.RMSNorm(C, eps), nn.RMSNorm(C, eps)
        width = self.heads * self.head_dim
        self.qkv = nn.Linear(C, width + 2 * self.kv_heads * self.head_dim, bias=False)
        self.proj = nn.Linear(width, C, bias=False)
        self.gate, self.up = nn.Linear(C, hidden, bias=False), nn.Linear(C, hidden, bias=False)
        self.down = nn.Linear(hidden, C, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, _ = x.shape
        qkv = self.qkv(self.norm_1(x)).view(B, T, -1, self.head_dim).transpose(1, 2)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        q, k = (
            torch.cat((-y.chunk(2, -1)[1], y.chunk(2, -1)[0]), -1) * sin + y * cos for y in (q, k)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.proj(y.transpose(1, 2).reshape(B, T, -1))
        y = self.norm_2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class GPT(nn.Module):
    """A Llama with tied embeddings, and the weights of a Hugging Face `state_dict`."""

    def __init__(self, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]):
        super().__init__()
        self.embedding = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.blocks = nn.ModuleList(Block(config) for _ in range(config["num_hidden_layers"]))
        self.norm = nn.RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        D = self.blocks[0].head_dim
        angle = torch.arange(config["max_position_embeddings"])[:, None].float()
        angle = angle / config["rope_theta"] ** (torch.arange(0, D, 2).float() / D)
        self.register_buffer("angle", torch.cat((angle, angle), -1), persistent=False)
        self.load_state_dict(converted(state_dict, len(self.blocks)))

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        angle, x = self.angle[: ids.shape[1]], self.embedding(ids)
        cos, sin = angle.cos(), angle.sin()
        for block in self.blocks:
            x = block(x, cos, sin)
        logits = F.linear(self.norm(x), self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def converted(weights: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The weights under the names of `GPT`."""
    names = {"norm_1": "input_layernorm", "norm_2": "post_attention_layernorm"}
    names |= {"proj": "self_attn.o_proj"} | {n: f"mlp.{n}_proj" for n in ("gate", "up", "down")}
    result = {"embedding.weight": weights["model.embed_tokens.weight"]}
    result["norm.weight"] = weights["model.norm.weight"]
    for i in range(layers):
        theirs = f"model.layers.{i}."
        for ours, name in names.items():
            result[f"blocks.{i}.{ours}.weight"] = weights[f"{theirs}{name}.weight"]
        qkv = [weights[f"{theirs}self_attn.{each}_proj.weight"] for each in "qkv"]
        result[f"blocks.{i}.qkv.weight"] = torch.cat(qkv)
    return result


def train(
    loss_of: Callable[[], Tensor], model: nn.Module, settings: Mapping[str, Any], turn: Callable
) -> None:
    """Trains without end. turn: is called with the loss after each step.

    settings: learning_rate, weight_decay, betas, eps, max_grad_norm.
    """
    parameters = list(model.parameters())  # a tied one appears once
    groups = [
        {
            "params": [p for p in parameters if p.ndim >= 2],
            "weight_decay": settings["weight_decay"],
        },
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    options = {"lr": settings["learning_rate"], "betas": settings["betas"], "eps": settings["eps"]}
    optimizer = torch.optim.AdamW(groups, **options, fused=True)
    model.train()
    while True:
        loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, settings["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        turn(loss)
