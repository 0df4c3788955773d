"""Re-implementations of the model, right and wrong, for test_candidate.py; nothing of ours is used.

`Model` has names of its own and adds in its own order: complex numbers, einsum, positions from 1.
"""

import torch
import torch.nn.functional as F
from torch import nn

RIGHT = {"pairs": "half", "over": 2, "theta": None, "scale": None, "share": "repeat_interleave"}
RIGHT |= {"mask": "causal", "eps": None, "mean": False, "after": False, "silu": "gate"}
RIGHT |= {"dropout": 0.0, "tied": True, "in_place": False}
NAMES = {
    "embed_tokens": "emb",
    "layers": "blocks",
    "self_attn": "attn",
    "q_proj": "wq",
    "k_proj": "wk",
    "v_proj": "wv",
    "o_proj": "wo",
    "input_layernorm": "n1",
    "post_attention_layernorm": "n2",
    "mlp": "ff",
    "model.norm": "last",
    "lm_head": "head",
}


class Norm(nn.Module):
    def __init__(self, config, o):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config["hidden_size"]))
        self.eps, self.mean = o["eps"] or config["rms_norm_eps"], o["mean"]

    def forward(self, x):
        x = x - x.mean(-1, keepdim=True) if self.mean else x
        return x / torch.sqrt((x**2).mean(-1, keepdim=True) + self.eps) * self.weight


class Attention(nn.Module):
    def __init__(self, config, o):
        super().__init__()
        C, self.D, self.o = config["hidden_size"], config["head_dim"], o
        self.H, self.K = config["num_attention_heads"], config["num_key_value_heads"]
        self.theta = o["theta"] or config["rope_theta"]
        self.wq, self.wo = (
            nn.Linear(C, self.H * self.D, False),
            nn.Linear(self.H * self.D, C, False),
        )
        self.wk, self.wv = (nn.Linear(C, self.K * self.D, False) for _ in range(2))

    def forward(self, x):
        B, T, _ = x.shape
        q, k, v = (f(x).view(B, T, -1, self.D).transpose(1, 2) for f in (self.wq, self.wk, self.wv))
        q, k, groups = self.rotated(q), self.rotated(k), self.H // self.K
        for_all = {
            "repeat": lambda x: x.repeat(1, groups, 1, 1),
            "repeat_interleave": lambda x: x.repeat_interleave(groups, 1),
        }[self.o["share"]]
        scale = {None: self.D, "none": 1, "all heads": self.H * self.D}[self.o["scale"]] ** -0.5
        scores = torch.einsum("bhtd,bhsd->bhts", q, for_all(k)) * scale
        visible = torch.ones(T, T).tril()
        if self.o["mask"] == "causal":
            scores = scores.masked_fill(visible == 0, -torch.inf)
        elif self.o["mask"] == "added":
            scores = scores + visible
        p = F.dropout(scores.softmax(-1), self.o["dropout"])
        return self.wo(torch.einsum("bhts,bhsd->bthd", p, for_all(v)).reshape(B, T, -1))

    def rotated(self, x):
        frequency = self.theta ** (-torch.arange(0, self.D, 2) / self.D)
        rotates = self.o["over"] == 2 and self.o["pairs"] != "no rotation"
        positions = torch.arange(x.shape[self.o["over"]]) + rotates  # from 1: a rotation cannot see
        angle = positions[:, None] * frequency
        angle = angle if self.o["over"] == 2 else angle[:, None]
        if self.o["pairs"] == "none":
            return x
        if self.o["pairs"] == "no rotation":
            angle = torch.cat([angle, angle], -1)
            turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
            return x * angle.cos() + turned * angle.sin()
        half = self.o["pairs"] == "half"
        a, b = x.chunk(2, -1) if half else (x[..., ::2], x[..., 1::2])
        z = torch.complex(a.contiguous(), b.contiguous()) * torch.polar(torch.ones(()), angle)
        return torch.cat([z.real, z.imag], -1) if half else torch.view_as_real(z).flatten(-2)


class FeedForward(nn.Module):
    def __init__(self, config, o):
        super().__init__()
        C, inner, self.silu = config["hidden_size"], config["intermediate_size"], o["silu"]
        self.gate_proj, self.up_proj = nn.Linear(C, inner, False), nn.Linear(C, inner, False)
        self.down_proj = nn.Linear(inner, C, False)

    def forward(self, x):
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(F.silu(gate) * up if self.silu == "gate" else gate * F.silu(up))


class Block(nn.Module):
    def __init__(self, config, o):
        super().__init__()
        self.attn, self.ff, self.after = Attention(config, o), FeedForward(config, o), o["after"]
        self.in_place = o["in_place"]
        self.n1, self.n2 = Norm(config, o), Norm(config, o)

    def forward(self, x):
        if self.after:
            x = self.n1(x + self.attn(x))
            return self.n2(x + self.ff(x))
        if self.in_place:
            x += self.attn(self.n1(x))
            x += self.ff(self.n2(x))
            return x
        x = x + self.attn(self.n1(x))
        return x + self.ff(self.n2(x))


class Model(nn.Module):
    def __init__(self, config, **options):
        super().__init__()
        self.o = RIGHT | options
        C, V = config["hidden_size"], config["vocab_size"]
        self.emb, self.last = nn.Embedding(V, C), Norm(config, self.o)
        self.blocks = nn.ModuleList(
            Block(config, self.o) for _ in range(config["num_hidden_layers"])
        )
        self.head = nn.Linear(C, V, False)
        self.register_buffer("a_mask", torch.ones(4, 4).tril())
        if self.o["tied"]:
            self.head.weight = self.emb.weight

    def forward(self, ids):
        x = self.emb(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.last(x)), None


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
