"""A re-implementation of the model, to be compared with; nothing of ours is used."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

QKV = tuple(f"self_attn.{name}_proj.weight" for name in "qkv")
NAMES = {  # for workflow/proof/names.py
    "embed_tokens": "tokens",
    "layers": "h",
    "input_layernorm.weight": "gain1",
    QKV: "qkv",
    "self_attn.o_proj.weight": "out",
    "post_attention_layernorm.weight": "gain2",
    "mlp.gate_proj.weight": "gate",
    "mlp.up_proj.weight": "up",
    "mlp.down_proj.weight": "down",
    "norm.weight": "gain",
}


class Fused(nn.Module):
    """A Llama in nanoGPT's style: q, k and v are one matrix product. No modules in the layers."""

    def __init__(self, config):
        super().__init__()
        self.c, C, D = config, config["hidden_size"], config["head_dim"]
        H, K, inner = (
            config[key]
            for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size")
        )
        shapes = {"gain1": (C,), "qkv": ((H + 2 * K) * D, C), "out": (C, H * D), "gain2": (C,)}
        shapes |= {"gate": (inner, C), "up": (inner, C), "down": (C, inner)}
        self.tokens = nn.Embedding(config["vocab_size"], C)
        self.h = nn.ModuleList(
            nn.ParameterDict({name: torch.empty(shape) for name, shape in shapes.items()})
            for _ in range(config["num_hidden_layers"])
        )
        self.gain = nn.Parameter(torch.empty(C))

    def forward(self, ids: Tensor) -> Tensor:
        norm = lambda x, gain: F.rms_norm(x, gain.shape, gain, self.c["rms_norm_eps"])  # noqa: E731
        H, K, D = (self.c[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
        x, (B, T) = self.tokens(ids), ids.shape
        angle = torch.arange(T)[:, None] * self.c["rope_theta"] ** (-torch.arange(0, D, 2) / D)
        cos, sin = (torch.cat([f(angle)] * 2, -1) for f in (torch.cos, torch.sin))
        for w in self.h:
            qkv = F.linear(norm(x, w["gain1"]), w["qkv"]).view(B, T, -1, D).transpose(1, 2)
            q, k, v = qkv.split([H, K, K], dim=1)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = x + F.linear(y.transpose(1, 2).reshape(B, T, -1), w["out"])
            y = norm(x, w["gain2"])
            x = x + F.linear(F.silu(F.linear(y, w["gate"])) * F.linear(y, w["up"]), w["down"])
        return F.linear(norm(x, self.gain), self.tokens.weight)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin
