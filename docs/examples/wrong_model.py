"""SmolLM2 from scratch, with a mistake that many copies have: `main.py verify` finds and names it.

It loads every weight, gives no error and writes sentences. The mistake is in `rotate`.
"""

import torch
import torch.nn.functional as F
from torch import nn

NAMES = {
    "embed_tokens": "wte",
    "layers": "blocks",
    "input_layernorm": "norm1",
    "post_attention_layernorm": "norm2",
    "self_attn": "attn",
    ("q_proj", "k_proj", "v_proj"): "qkv",
    "o_proj": "out",
}


def build(config):
    return Model(config)


class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, eps = config["hidden_size"], config["rms_norm_eps"]
        self.wte = nn.Embedding(config["vocab_size"], C)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config["num_hidden_layers"]))
        self.norm = nn.RMSNorm(C, eps)

    def forward(self, ids):
        x = self.wte(ids)
        for block in self.blocks:
            x = block(x)
        return self.norm(x) @ self.wte.weight.T


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, eps = config["hidden_size"], config["rms_norm_eps"]
        self.norm1, self.norm2 = nn.RMSNorm(C, eps), nn.RMSNorm(C, eps)
        self.attn, self.mlp = Attention(config), MLP(C, config["intermediate_size"])

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, self.D, self.theta = config["hidden_size"], config["head_dim"], config["rope_theta"]
        self.H, self.K = config["num_attention_heads"], config["num_key_value_heads"]
        self.qkv = nn.Linear(C, (self.H + 2 * self.K) * self.D, bias=False)
        self.out = nn.Linear(self.H * self.D, C, bias=False)

    def forward(self, x):
        B, T, _ = x.shape
        heads = self.qkv(x).view(B, T, -1, self.D).transpose(1, 2)
        q, k, v = heads.split([self.H, self.K, self.K], dim=1)
        q, k = self.rotate(q), self.rotate(k)
        k, v = (part.repeat_interleave(self.H // self.K, dim=1) for part in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))

    def rotate(self, x):
        frequency = self.theta ** (-torch.arange(0, self.D, 2) / self.D)
        angle = torch.outer(torch.arange(x.shape[2]), frequency)
        angle = torch.cat([angle, angle], dim=-1)  # for the pairs i and i + D/2 …
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)  # … not for these
        return x * angle.cos() + turned * angle.sin()


class MLP(nn.Module):
    def __init__(self, size, inner):
        super().__init__()
        self.gate_proj = nn.Linear(size, inner, bias=False)
        self.up_proj = nn.Linear(size, inner, bias=False)
        self.down_proj = nn.Linear(inner, size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
