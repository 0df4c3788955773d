"""Mutations: common mistakes, each of which can be put into our model from outside.

With each, the model loads and runs without an error. Some were found in public re-implementations.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import SmolLm3
from SmolLm3 import LlamaDecoderLayer, LlamaMLP, LlamaModel, LlamaRMSNorm
from workflow.training import NextTokenLoss

BASELINE, RANDOM_HEAD, SHIFTED_TWICE = "no mutation", "random head", "targets shifted twice"
INTERLEAVED, NEIGHBOURS = "interleaved RoPE pairs", "half-split angles on neighbouring pairs"
OVER_HEADS, THETA, NO_ROPE = "RoPE positions over heads", "wrong RoPE theta", "no RoPE"
UNSCALED, SCALED_BY_ALL = "no 1/sqrt(D)", "1/sqrt(H·D) for 1/sqrt(D)"
REPEAT, NO_MASK = "repeat for repeat_interleave", "no causal mask"
ADDED_MASK, DROPOUT = "mask of 0 and 1 added", "dropout left on"
EPS, MEAN = "wrong RMSNorm eps", "mean subtracted in the norm"
NORM_AFTER, SILU = "norm after instead of before", "SiLU on the other branch"
STARTS_HIGH = (REPEAT, RANDOM_HEAD, SHIFTED_TWICE)  # the first training loss is 9 to 12.5


def interleaved_rotation(model: LlamaModel) -> AbstractContextManager:
    """Neighbouring channels are the pairs: as in the paper, but not for these weights."""

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)

    return patch.object(SmolLm3, "rotate", rotate)


def half_split_angles_on_neighbours(model: LlamaModel) -> AbstractContextManager:
    """Pairs as in the paper, but the table of angles is of the other layout: this is no rotation.

    The two channels of a pair are multiplied by the cosines and sines of two different angles.
    """

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = (torch.cat((part, part), dim=-1).to(x.dtype) for part in (cos, sin))
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        return x * cos + turned * sin

    return patch.object(SmolLm3, "rotate", rotate)


def no_rotation(model: LlamaModel) -> AbstractContextManager:
    """The rotary embedding is built, but never applied."""
    return patch.object(SmolLm3, "rotate", lambda x, cos, sin: x)


def positions_over_heads(model: LlamaModel) -> AbstractContextManager:
    """The angle depends on the head, not on the position: a transpose is missing."""
    original = SmolLm3.rotate

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        angles = model.rotary(torch.arange(x.shape[1], device=x.device))
        return original(x, *(part.transpose(1, 2) for part in angles))  # (1, H, 1, D / 2)

    return patch.object(SmolLm3, "rotate", rotate)


def wrong_theta(model: LlamaModel) -> AbstractContextManager:
    """theta 10000, as in SmolLM and SmolLM2's pretraining recipe; 100000 if 10000 is correct."""
    theta = 100000.0 if model.rotary.theta == 10000.0 else 10000.0
    return patch.object(model.rotary, "theta", theta)


def unscaled_scores(model: LlamaModel) -> AbstractContextManager:
    """Attention scores are not divided by sqrt(D)."""
    return replaced_attention(partial(F.scaled_dot_product_attention, scale=1.0))


def scaled_by_hidden_size(model: LlamaModel) -> AbstractContextManager:
    """Attention scores are divided by sqrt(H × D), the square root of all heads' size."""
    size = model.config.num_attention_heads * model.config.head_dim
    attention = partial(F.scaled_dot_product_attention, scale=1 / math.sqrt(size))
    return replaced_attention(attention)


def repeated_heads(model: LlamaModel) -> AbstractContextManager:
    """Query head h uses key/value head h mod K, not h // (H / K): `repeat` is another order."""

    def attention(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
        k, v = (part.repeat(1, q.shape[1] // k.shape[1], 1, 1) for part in (k, v))
        return F.scaled_dot_product_attention(q, k, v, **options)

    return replaced_attention(attention)


@contextmanager
def dropout_left_on(model: LlamaModel) -> Iterator[None]:
    """Dropout of attention weights, because `eval()` is missing. The same numbers each time."""
    attention = partial(F.scaled_dot_product_attention, dropout_p=0.1)
    with torch.random.fork_rng(devices=[]), replaced_attention(attention):
        torch.manual_seed(0)
        yield


def replaced_attention(attention: Callable[..., Tensor]) -> AbstractContextManager:
    functions = SimpleNamespace(**vars(F) | {"scaled_dot_product_attention": attention})
    return patch.object(SmolLm3, "F", functions)


def no_causal_mask(model: LlamaModel) -> AbstractContextManager:
    """Every position sees the whole text, also the token that it must predict."""

    def visible(mask: Tensor | None, start: int, T: int, device: torch.device) -> Tensor:
        return torch.ones(T, start + T, dtype=torch.bool, device=device)

    return patch.object(SmolLm3, "visible_positions", visible)


def added_mask(model: LlamaModel) -> AbstractContextManager:
    """A mask of 1 (visible) and 0 is added to the scores, as if it had 0 and -infinity."""

    def visible(mask: Tensor | None, start: int, T: int, device: torch.device) -> Tensor:
        return torch.ones(T, start + T, device=device).tril(start)

    return patch.object(SmolLm3, "visible_positions", visible)


def random_head(model: LlamaModel) -> AbstractContextManager:
    """The head is not tied to the embedding; `strict=False` hides that its weights are missing."""
    weight = model.embed_tokens.weight
    head = nn.Linear(*weight.T.shape, bias=False, device=weight.device)
    generator = torch.Generator(weight.device).manual_seed(0)
    nn.init.normal_(head.weight, std=model.config.initializer_range, generator=generator)
    return patch.object(model, "lm_head", head)


def wrong_eps(model: LlamaModel) -> AbstractContextManager:
    """eps 1e-6, the default of many config classes; 1e-5 if 1e-6 is correct."""
    eps = 1e-5 if model.norm.eps == 1e-6 else 1e-6  # the property hides each module's own eps
    return patch.object(LlamaRMSNorm, "eps", property(lambda module: eps), create=True)


def mean_subtracted(model: LlamaModel) -> AbstractContextManager:
    """The norm subtracts the mean, as LayerNorm does."""
    original = LlamaRMSNorm.forward

    def forward(self, x: Tensor) -> Tensor:
        return original(self, x - x.mean(dim=-1, keepdim=True))

    return patch.object(LlamaRMSNorm, "forward", forward)


def norm_after(model: LlamaModel) -> AbstractContextManager:
    """The norms come after attention and MLP, on the sum, as in the first Transformer."""

    def forward(self, x: Tensor, *arguments) -> Tensor:
        x = self.input_layernorm(x + self.self_attn(x, *arguments))
        return self.post_attention_layernorm(x + self.mlp(x))

    return patch.object(LlamaDecoderLayer, "forward", forward)


def silu_on_the_other_branch(model: LlamaModel) -> AbstractContextManager:
    """SiLU is applied to `up_proj` instead of `gate_proj`: w1 and w3 are exchanged."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.gate_proj(x) * F.silu(self.up_proj(x)))

    return patch.object(LlamaMLP, "forward", forward)


def targets_shifted_twice(model: LlamaModel) -> AbstractContextManager:
    """Data and loss both shift the targets: the model learns the token after the next one."""
    original = NextTokenLoss.forward

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return original(self, inputs[:, :-1], targets[:, 1:])

    return patch.object(NextTokenLoss, "forward", forward)


MUTATIONS: dict[str, Callable[[LlamaModel], AbstractContextManager]] = {
    BASELINE: nullcontext,
    INTERLEAVED: interleaved_rotation,
    NEIGHBOURS: half_split_angles_on_neighbours,
    OVER_HEADS: positions_over_heads,
    THETA: wrong_theta,
    NO_ROPE: no_rotation,
    UNSCALED: unscaled_scores,
    SCALED_BY_ALL: scaled_by_hidden_size,
    REPEAT: repeated_heads,
    NO_MASK: no_causal_mask,
    ADDED_MASK: added_mask,
    RANDOM_HEAD: random_head,
    EPS: wrong_eps,
    MEAN: mean_subtracted,
    NORM_AFTER: norm_after,
    SILU: silu_on_the_other_branch,
    DROPOUT: dropout_left_on,
    SHIFTED_TWICE: targets_shifted_twice,
}


def mutations_of(model: LlamaModel) -> list[str]:
    """Their names, without the one that changes nothing in this model."""
    shared = 1 < model.config.num_key_value_heads < model.config.num_attention_heads
    return [name for name in MUTATIONS if shared or name != REPEAT]
