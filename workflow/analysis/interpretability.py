"""What is inside a model: parameters, rotary embedding, logit lens, attention heads."""

import math
import re
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from SmolLm3 import LlamaModel, ModelConfig, RotaryPositionalEmbedding, hf_name, rotate
from workflow.analysis.states import INPUT, hidden_states, record

WEIGHTS = "attention weights"  # the only step below that is no module's input or output
STEPS = {  # the first layer of a model, in the order of the computation
    "embed_tokens": "the residual stream: a row of the embedding for each token",
    "input_layernorm": "each row divided by its size (RMSNorm)",
    "q_proj": "queries: {H} heads of {D} channels",
    "k_proj": "keys: {K} heads of {D} channels",
    "v_proj": "values: {K} heads of {D} channels",
    WEIGHTS: "{H} heads: what share each token (row) takes from each token (column)",
    "input of o_proj": "means of the values with these shares: {H} heads of {D} channels",
    "o_proj": "what attention adds to the residual stream",
    "input of post_attention_layernorm": "the residual stream after attention",
    "post_attention_layernorm": "each row divided by its size",
    "gate_proj": "the gates of the MLP",
    "up_proj": "the values of the MLP",
    "input of down_proj": "SiLU(gates) × values (SwiGLU)",
    "down_proj": "what the MLP adds to the residual stream",
    "layers.0": "the residual stream after the first layer",
    "norm": "the residual stream after all {layers} layers, normed",
    "lm_head": "logits: how likely each of {V} tokens is the next one",
}


def weight_map(model: LlamaModel, state_dict: Mapping[str, Tensor]):
    """A DataFrame, one row per kind of tensor (N: layer). equal: how many of them are identical."""
    import pandas as pd  # 0.5 s that the other functions do not need

    rows = []
    for name, parameter in model.named_parameters():
        equal = torch.equal(parameter, state_dict[hf_name(name)].to(parameter.dtype))
        kind, shape = re.sub(r"\d+", "N", name), " × ".join(map(str, parameter.shape))
        rows.append((hf_name(kind), kind, shape, equal))
    frame = pd.DataFrame(rows, columns=["original", "ours", "shape", "equal"])
    kinds = frame.groupby(["original", "ours", "shape"], sort=False, as_index=False)
    return kinds.agg(tensors=("equal", "size"), equal=("equal", "sum"))


@torch.no_grad()
def first_layer(model: LlamaModel, ids: Tensor) -> dict[str, Tensor]:
    """What the model computes for ids (1, T), by the names of `STEPS`."""
    named = {path.rpartition(".")[2]: m for path, m in model.layers[0].named_modules()}
    for path in ("embed_tokens", "layers.0", "norm", "lm_head"):
        named[path] = model.get_submodule(path)
    modules = {step: named[step.removeprefix(INPUT)] for step in STEPS if step != WEIGHTS}
    _, states = record(modules, lambda: model(ids))
    states[WEIGHTS] = attention_weights(model, ids)[:1]
    return {step: states[step] for step in STEPS}


def shape_table(states: Mapping[str, Tensor], config: ModelConfig):
    """A DataFrame: the shape of each result of `first_layer`, without the batch, and what it is."""
    import pandas as pd

    H, K, V = config.num_attention_heads, config.num_key_value_heads, config.vocab_size
    sizes = {"H": H, "K": K, "V": V, "D": config.head_dim, "layers": config.num_hidden_layers}
    rows = [
        (step, " × ".join(map(str, state.shape[1:])), STEPS[step].format(**sizes))
        for step, state in states.items()
    ]
    table = pd.DataFrame(rows, columns=["step", "shape", "what it is"])
    style = table.style.hide(axis="index").set_uuid("shapes")
    return style.set_properties(**{"text-align": "left"})


def wavelengths(rotary: RotaryPositionalEmbedding) -> Tensor:
    """How many positions a full rotation takes, for each pair of channels: (D / 2,)."""
    cos, sin = rotary(torch.ones(1))
    return 2 * math.pi / torch.atan2(sin, cos).flatten()


def rotated_pairs(rotary: RotaryPositionalEmbedding, pairs: list[int], positions: int) -> Tensor:
    """The vector (1, 0), rotated to each position, for some pairs of channels: (pairs, P, 2)."""
    cos_sin = torch.stack(rotary(torch.arange(positions)), dim=-1)[0, 0]
    return cos_sin[:, pairs].transpose(0, 1)


def query_key_scores(rotary: RotaryPositionalEmbedding, positions: int) -> Tensor:
    """The attention scores if all queries are equal, and all keys: (positions, positions)."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, rotary.head_dim, generator=generator)
    angles = rotary(torch.arange(positions))
    q, k = (rotate(x.expand(1, 1, positions, -1), *angles)[0, 0] for x in (q, k))
    return q @ k.T / math.sqrt(rotary.head_dim)


@torch.no_grad()
def logit_lens(model: LlamaModel, ids: Tensor) -> Tensor:
    """Logits (layers + 1, T, V) for ids (1, T): after the embedding, then after each layer.

    The final norm and the head are applied to the residual stream; the last logits are the output
    of the model (nostalgebraist 2020, "interpreting GPT: the logit lens").
    """
    *residual_stream, _, _ = hidden_states(model, ids).values()  # without norm and logits
    # all layers at once: the head's large matrix is read once
    return model.lm_head(model.norm(torch.cat(residual_stream))).float()


def logit_lens_tokens(model: LlamaModel, ids: Tensor, tokenizer) -> tuple[list, np.ndarray]:
    """The most likely next tokens of the logit lens, and their probabilities: (layers + 1, T).

    tokenizer: from transformers.
    """
    probabilities, tokens = logit_lens(model, ids).softmax(dim=-1).max(dim=-1)
    return [tokenizer.batch_decode(row[:, None]) for row in tokens], probabilities.numpy()


def layer_of_answer(tokens: list[list[str]]) -> int:
    """From which layer on the logit lens gives the model's own answer after the last token."""
    guesses = [row[-1] for row in tokens]
    return max((i + 1 for i, guess in enumerate(guesses) if guess != guesses[-1]), default=0)


def loss_by_layer(model: LlamaModel, ids: Tensor) -> list[float]:
    """The losses of the logit lens on ids (1, T): layers + 1 means, nats per token."""
    return [F.cross_entropy(x[:-1], ids[0, 1:]).item() for x in logit_lens(model, ids)]


@torch.no_grad()
def attention_weights(model: LlamaModel, ids: Tensor) -> Tensor:
    """The attention weights for ids (1, T): (layers, H, T, T); rows sum to 1."""
    found, T = [], ids.shape[1]
    rope = model.rotary(torch.arange(T))
    for layer, x in zip(model.layers, hidden_states(model, ids).values()):
        attention, x = layer.self_attn, layer.input_layernorm(x)
        q, k = (
            proj(x).view(1, T, -1, attention.head_dim).transpose(1, 2)  # (1, H or K, T, D)
            for proj in (attention.q_proj, attention.k_proj)
        )
        if attention.uses_rope:
            q, k = rotate(q, *rope), rotate(k, *rope)
        one_hot = torch.eye(T).expand(1, k.shape[1], -1, -1)  # as values: the output is the weights
        weights = F.scaled_dot_product_attention(q, k, one_hot, is_causal=True, enable_gqa=True)
        found.append(weights[0])
    return torch.stack(found)


def repeated_tokens(vocab_size: int, length: int = 32, seed: int = 0) -> Tensor:
    """Random token ids, then the same again: (1, 2 × length); to predict them is to copy."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (1, length), generator=generator).repeat(1, 2)


def head_scores(weights: Tensor) -> dict[str, Tensor]:
    """How much each head attends to three kinds of tokens: mean attention, each (layers, H).

    weights: the attention weights for `repeated_tokens`. induction: from a token of the second
    half to the one after the same token in the first half (Olsson et al. 2022, arXiv:2209.11895).
    """
    half = weights.shape[-1] // 2
    return {
        "induction": weights.diagonal(1 - half, -2, -1)[..., 1:].mean(dim=-1),
        "previous token": weights.diagonal(-1, -2, -1).mean(dim=-1),
        "first token": weights[..., 1:, 0].mean(dim=-1),
    }


def top_heads(scores: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """The head with the highest score of each kind: label → (layer, head), counted from 0."""
    found = {}
    for kind, values in scores.items():
        layer, head = divmod(int(values.argmax()), values.shape[1])
        found[f"{kind}: layer {layer + 1}, head {head}"] = layer, head
    return found
