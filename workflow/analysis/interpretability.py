"""Looking inside a model: its parts, its rotation, what its layers say, where its heads look."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from SmolLm3 import LlamaAttention, LlamaModel, RotaryPositionalEmbedding, hf_name, rotate
from workflow.analysis.states import hidden_states

# --- parameters -----------------------------------------------------------------------------------


def parts(model: LlamaModel) -> dict[str, int]:
    """How many parameters each kind of part has, over all layers."""
    sizes: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        kind = name.removesuffix(".weight").rpartition(".")[2]
        kind = "norms" if kind.endswith("norm") else kind
        tied = model.config.tie_word_embeddings and kind == "embed_tokens"
        sizes["embed_tokens = lm_head" if tied else kind] += parameter.numel()
    return dict(sizes)


def weight_map(model: LlamaModel, state_dict: Mapping[str, Tensor]) -> str:
    """A table: which tensor of the original is which of ours, and how many are bit-equal."""
    rows: dict[tuple[str, str, str], list[bool]] = {}
    for name, parameter in model.named_parameters():
        theirs, shape = hf_name(name), " × ".join(map(str, parameter.shape))
        equal = torch.equal(parameter.cpu(), state_dict[theirs].to(parameter.dtype).cpu())
        key = tuple(re.sub(r"\d+", "N", word) for word in (theirs, name))
        rows.setdefault((*key, shape), []).append(equal)
    line = "{:<48}{:<42}{:<14}{}".format
    lines = [line("original", "ours", "shape", "equal")]
    lines += [line(*key, f"{sum(found)} of {len(found)}") for key, found in rows.items()]
    return "\n".join(lines)


# --- rotation -------------------------------------------------------------------------------------


def wavelengths(rotary: RotaryPositionalEmbedding) -> Tensor:
    """Positions that each pair of channels needs for a full turn: (D / 2,)."""
    cos, sin = rotary(torch.ones(1))
    return 2 * math.pi / torch.atan2(sin, cos).flatten()


def turned(rotary: RotaryPositionalEmbedding, pairs: Sequence[int], positions: int) -> Tensor:
    """Where a pair of channels (1, 0) is turned to: (pairs, positions, 2), for some pairs."""
    x = torch.zeros(1, 1, positions, rotary.head_dim)
    x[..., : rotary.head_dim // 2] = 1
    a, b = rotate(x, *rotary(torch.arange(positions)))[0, 0].chunk(2, dim=-1)
    return torch.stack((a, b), dim=-1)[:, list(pairs)].transpose(0, 1)


def scores_of_one_pair(rotary: RotaryPositionalEmbedding, positions: int, seed: int = 0) -> Tensor:
    """The score of one query at each position with one key at each: (positions, positions)."""
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, rotary.head_dim, generator=generator)
    angles = rotary(torch.arange(positions))
    q, k = (rotate(x.expand(1, 1, positions, -1), *angles)[0, 0] for x in (q, k))
    return q @ k.T / math.sqrt(rotary.head_dim)


# --- what the layers say --------------------------------------------------------------------------


def stream(model: LlamaModel, ids: Tensor) -> list[Tensor]:
    """The residual stream (1, T, C) of ids (1, T): the embeddings, then after each layer."""
    found = hidden_states(model, ids)
    return [found["embed_tokens"], *(found[f"layers.{i}"] for i in range(len(model.layers)))]


@torch.no_grad()
def lens(model: LlamaModel, ids: Tensor) -> Tensor:
    """Logits (layers + 1, T, V) of ids (1, T), as if the model had to answer after each layer.

    The final norm and the head are applied to the residual stream; the last row is the model's own
    answer (nostalgebraist 2020, "interpreting GPT: the logit lens").
    """
    return torch.cat([model.lm_head(model.norm(x)) for x in stream(model, ids)])


def reading(model: LlamaModel, ids: Tensor, tokenizer) -> tuple[list[list[str]], np.ndarray]:
    """The likeliest token of each place of the lens, as text, and its share, (layers + 1, T)."""
    shares, tokens = lens(model, ids).float().softmax(dim=-1).max(dim=-1)
    words = [[tokenizer.decode([token]) for token in row] for row in tokens.tolist()]
    return words, shares.numpy()


@torch.no_grad()
def loss_by_layer(model: LlamaModel, ids: Tensor) -> list[float]:
    """The mean loss of the lens, nats a token, on ids (1, T): layers + 1 of them."""
    answers = (model.lm_head(model.norm(x[0, :-1])) for x in stream(model, ids))  # not all at once
    return [F.cross_entropy(logits.float(), ids[0, 1:]).item() for logits in answers]


# --- where the heads look -------------------------------------------------------------------------


@torch.no_grad()
def attention(model: LlamaModel, ids: Tensor) -> Tensor:
    """How much each position looks at each, (layers, H, T, T), in ids (1, T); rows sum to 1."""
    found: list[Tensor] = []

    def look(module: LlamaAttention, arguments: tuple) -> None:
        x, rotation, *_ = arguments
        q, k = (
            proj(x).view(1, x.shape[1], -1, module.head_dim).transpose(1, 2)
            for proj in (module.q_proj, module.k_proj)
        )
        if module.rotates:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).mT
        hidden = torch.ones_like(scores[0, 0]).triu(1).bool()
        scores = (scores / math.sqrt(module.head_dim)).masked_fill(hidden, -math.inf)
        found.append(scores.float().softmax(dim=-1)[0])

    hooks = [layer.self_attn.register_forward_pre_hook(look) for layer in model.layers]
    try:
        model.hidden(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found)


def twice(vocab_size: int, length: int = 32, seed: int = 0) -> Tensor:
    """Random token ids, and the same once more: (1, 2 × length). Only copying can guess them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (1, length), generator=generator).repeat(1, 2)


def head_scores(weights: Tensor) -> dict[str, Tensor]:
    """What each head does with `twice`, as shares of its attention (layers, H), from `attention`.

    induction: of a token of the second half, to the token that followed its like in the first
    (Olsson et al. 2022, arXiv:2209.11895). previous token; first token: of all but the first.
    """
    half = weights.shape[-1] // 2
    return {
        "induction": weights.diagonal(1 - half, -2, -1)[..., 1:].mean(dim=-1),
        "previous token": weights.diagonal(-1, -2, -1).mean(dim=-1),
        "first token": weights[..., 1:, 0].mean(dim=-1),
    }


def clearest(scores: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """The head with the largest share of each kind: its label, and its place from (0, 0) on."""
    found = {}
    for kind, shares in scores.items():
        layer, head = divmod(int(shares.argmax()), shares.shape[1])
        found[f"{kind}: layer {layer + 1}, head {head}"] = layer, head
    return found
