"""A re-implementation of the model for test_candidate.py; nothing of ours is used."""

import torch
import torch.nn.functional as F
from torch import nn

QKV = tuple(f"self_attn.{name}_proj.weight" for name in "qkv")
NAMES = {"layers": "h", QKV: ("qkv", "transposed"), "embed_tokens": "tokens", "norm.weight": "g"}
NAMES |= {"self_attn.o_proj.weight": ("o", "transposed"), "input_layernorm.weight": "g1"}
NAMES |= {("mlp.gate_proj.weight", "mlp.up_proj.weight"): "w13"}
NAMES |= {"mlp.down_proj.weight": ("w2", "transposed"), "post_attention_layernorm.weight": "g2"}


class Fused(nn.Module):
    """Everything in one module and few tensors: rows of several, (inputs, outputs), no head."""

    def __init__(self, config, **options):
        super().__init__()
        self.c, self.tokens = config, nn.Embedding(config["vocab_size"], config["hidden_size"])
        C, D, inner = config["hidden_size"], config["head_dim"], config["intermediate_size"]
        heads = config["num_attention_heads"] + 2 * config["num_key_value_heads"]
        layers = range(config["num_hidden_layers"])
        self.h = nn.ModuleList(nn.ParameterDict() for _ in layers)
        for layer in self.h:
            layer["qkv"] = nn.Parameter(torch.empty(C, heads * D))
            layer["o"] = nn.Parameter(torch.empty(config["num_attention_heads"] * D, C))
            layer["w13"] = nn.Parameter(torch.empty(2 * inner, C))
            layer["w2"] = nn.Parameter(torch.empty(inner, C))
            layer["g1"], layer["g2"] = (nn.Parameter(torch.empty(C)) for _ in range(2))
        self.g = nn.Parameter(torch.empty(C))

    def forward(self, ids):
        norm = lambda x, g: F.rms_norm(x, x.shape[-1:], g, self.c["rms_norm_eps"])  # noqa: E731
        H, K, D = (self.c[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
        x, (B, T) = self.tokens(ids), ids.shape
        angle = torch.arange(T)[:, None] * self.c["rope_theta"] ** (-torch.arange(0, D, 2) / D)
        cos, sin = (torch.cat([f(angle)] * 2, -1) for f in (torch.cos, torch.sin))
        for w in self.h:
            qkv = (norm(x, w["g1"]) @ w["qkv"]).view(B, T, -1, D).transpose(1, 2)
            q, k, v = qkv.split([H, K, K], 1)
            q, k = (
                y * cos + torch.cat([-y[..., D // 2 :], y[..., : D // 2]], -1) * sin for y in (q, k)
            )
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = x + y.transpose(1, 2).flatten(2) @ w["o"]
            gate, up = (norm(x, w["g2"]) @ w["w13"].T).chunk(2, -1)
            x = x + (F.silu(gate) * up) @ w["w2"]
        return norm(x, self.g) @ self.tokens.weight.T
