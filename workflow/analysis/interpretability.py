"""Looking inside a model: parameters, rotation, the logit lens, attention and its heads."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from SmolLm3 import LlamaModel, RotaryPositionalEmbedding, hf_name, rotate
from workflow.analysis.states import hidden_states


def parameter_counts(model: LlamaModel) -> dict[str, int]:
    """How many parameters each kind of module has, over all layers."""
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        kind = "norms" if "norm" in name else name.split(".")[-2]
        tied = model.config.tie_word_embeddings and kind == "embed_tokens"
        counts["embed_tokens = lm_head" if tied else kind] += parameter.numel()
    return dict(counts)


def weight_map(model: LlamaModel, state_dict: Mapping[str, Tensor]):
    """A DataFrame, a row per kind of tensor (N: any layer), and how many of each are bit-equal."""
    import pandas as pd  # 0.5 s that the other functions do not need

    rows = []
    for name, parameter in model.named_parameters():
        equal = torch.equal(parameter, state_dict[hf_name(name)].to(parameter.dtype))
        kind, shape = re.sub(r"\d+", "N", name), " × ".join(map(str, parameter.shape))
        rows.append((hf_name(kind), kind, shape, equal))
    frame = pd.DataFrame(rows, columns=["original", "ours", "shape", "equal"])
    kinds = frame.groupby(["original", "ours", "shape"], sort=False, as_index=False)
    return kinds.agg(tensors=("equal", "size"), equal=("equal", "sum"))


def wavelengths(rotary: RotaryPositionalEmbedding) -> Tensor:
    """Positions that each pair of channels needs for a full turn: (D / 2,)."""
    cos, sin = rotary(torch.ones(1))
    return 2 * math.pi / torch.atan2(sin, cos).flatten()


def rotated_pairs(rotary: RotaryPositionalEmbedding, pairs: list[int], positions: int) -> Tensor:
    """The vector (1, 0) in some pairs of channels, rotated to each position: (pairs, P, 2)."""
    cos_sin = torch.stack(rotary(torch.arange(positions)), dim=-1)[0, 0]
    return cos_sin[:, pairs].transpose(0, 1)


def scores_by_position(rotary: RotaryPositionalEmbedding, positions: int) -> Tensor:
    """The score of one query at each position with one key at each: (positions, positions)."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, rotary.head_dim, generator=generator)
    angles = rotary(torch.arange(positions))
    q, k = (rotate(x.expand(1, 1, positions, -1), *angles)[0, 0] for x in (q, k))
    return q @ k.T / math.sqrt(rotary.head_dim)


@torch.no_grad()
def logit_lens(model: LlamaModel, ids: Tensor) -> Iterator[Tensor]:
    """Logits (T, V) for ids (1, T) from the embedding and after each layer, one at a time.

    The final norm and the head are applied to the residual stream; the last is the model's own
    output (nostalgebraist 2020, "interpreting GPT: the logit lens").
    """
    *residual_stream, _, _ = hidden_states(model, ids).values()  # without norm and logits
    for x in residual_stream:
        yield model.lm_head(model.norm(x))[0].float()


def logit_lens_tokens(model: LlamaModel, ids: Tensor, tokenizer) -> tuple[list, np.ndarray]:
    """The likeliest token at each place of the lens, as text, and its probability (layers + 1, T).

    tokenizer: from transformers.
    """
    shares, tokens = torch.stack([*logit_lens(model, ids)]).softmax(dim=-1).max(dim=-1)
    return [tokenizer.batch_decode(row[:, None]) for row in tokens], shares.numpy()


def loss_by_layer(model: LlamaModel, ids: Tensor) -> list[float]:
    """The mean loss of the lens, nats per token, on ids (1, T): layers + 1 of them."""
    return [F.cross_entropy(x[:-1], ids[0, 1:]).item() for x in logit_lens(model, ids)]


@torch.no_grad()
def attention_weights(model: LlamaModel, ids: Tensor) -> Tensor:
    """The attention of each position to each, (layers, H, T, T), for ids (1, T); rows sum to 1."""
    found, T = [], ids.shape[1]
    rotation = model.rotary(torch.arange(T))
    for layer, x in zip(model.layers, hidden_states(model, ids).values()):
        attention, x = layer.self_attn, layer.input_layernorm(x)
        q, k = (
            proj(x).view(1, T, -1, attention.head_dim).transpose(1, 2)  # (1, H or K, T, D)
            for proj in (attention.q_proj, attention.k_proj)
        )
        if attention.rotates:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        one_hot = torch.eye(T).expand(1, k.shape[1], -1, -1)  # as values, they show the weights
        weights = F.scaled_dot_product_attention(q, k, one_hot, is_causal=True, enable_gqa=True)
        found.append(weights[0])
    return torch.stack(found)


def repeated_tokens(vocab_size: int, length: int = 32, seed: int = 0) -> Tensor:
    """Random token ids, twice: (1, 2 × length). Only copying predicts the second half."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (1, length), generator=generator).repeat(1, 2)


def head_scores(weights: Tensor) -> dict[str, Tensor]:
    """What each head attends to in `repeated_tokens`: shares of its attention, (layers, H) each.

    weights: from `attention_weights`. induction: from a token of the second half to the one that
    followed it in the first half (Olsson et al. 2022, arXiv:2209.11895).
    """
    half = weights.shape[-1] // 2
    return {
        "induction": weights.diagonal(1 - half, -2, -1)[..., 1:].mean(dim=-1),
        "previous token": weights.diagonal(-1, -2, -1).mean(dim=-1),
        "first token": weights[..., 1:, 0].mean(dim=-1),
    }


def top_heads(scores: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """The head with the highest score of each kind: label to (layer, head), counted from 0."""
    found = {}
    for kind, shares in scores.items():
        layer, head = divmod(int(shares.argmax()), shares.shape[1])
        found[f"{kind}: layer {layer + 1}, head {head}"] = layer, head
    return found
