"""SmolLM2-135M in plain PyTorch: the model, its weights by name, and generation.

Reads top down: config, model, layer, attention, MLP, norm, rotation, cache, weights. Everything
around the model is in `workflow/`. Needs only torch and the standard library.

Shapes, everywhere in this file:

    B  batch            C  hidden size            H  query heads        V  vocabulary
    T  new positions    D  size of one head       K  key/value heads
    S  all positions that attention can see: those in the cache, then the T new ones

The architecture is Llama's (Touvron et al. 2023, arXiv:2302.13971) with grouped-query attention
(Ainslie et al. 2023, arXiv:2305.13245); names follow `transformers/models/llama/modeling_llama.py`,
so that released weights fit by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# --- config ---------------------------------------------------------------------------------------

# Values of a Hugging Face config that `LlamaModel` supports; the first of each is the default.
ALLOWED_HF_VALUES = {
    "model_type": ("llama", "smollm3"),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0.0,),
    "rope_type": ("default", "llama3"),
    "rope_interleaved": (False,),
    "partial_rotary_factor": (1.0,),
    "sliding_window": (None,),
    "use_sliding_window": (False,),
}
# The keys of `rope_scaling`, for Hugging Face's rope_type "llama3".
SCALING = ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture, under Hugging Face's field names.

    Raises ValueError, naming the fields, if a number is not positive or two fields do not fit.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    initializer_range: float = 0.02  # std of new weights; unused once weights are loaded
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    rope_scaling: dict[str, int | float] | None = None  # Llama 3.1 and later: SCALING
    no_rope_layers: tuple[int, ...] | None = None  # SmolLM3: a layer with 0 does not rotate

    def __post_init__(self):
        scaling, layers = self.rope_scaling or {}, tuple(self.no_rope_layers or ())
        object.__setattr__(self, "no_rope_layers", layers or None)
        if scaling and set(scaling) != set(SCALING):
            raise ValueError(f"rope_scaling must have exactly {', '.join(SCALING)}")
        if layers and len(layers) != self.num_hidden_layers:
            raise ValueError(f"no_rope_layers needs {self.num_hidden_layers} entries: {layers}")
        for name, value in {**vars(self), **scaling}.items():
            if type(value) in (int, float) and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}, it must be positive and finite")
        C, H, K = self.hidden_size, self.num_attention_heads, self.num_key_value_heads
        if self.head_dim is None and C % H:
            raise ValueError(f"hidden_size {C} is not divisible by num_attention_heads {H}")
        object.__setattr__(self, "head_dim", self.head_dim or C // H)
        if H % K:
            raise ValueError(f"num_attention_heads {H} is not divisible by num_key_value_heads {K}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is not even: the rotation turns pairs")

    @classmethod
    def from_hf(cls, hf_config) -> ModelConfig:
        """From a `transformers` config, or a dict of its fields, of version 4 or 5.

        Raises ValueError, naming the field, if the config needs something that `LlamaModel` does
        not compute.
        """
        source = dict(hf_config) if isinstance(hf_config, Mapping) else hf_config.to_dict()
        # transformers 5 has everything in `rope_parameters`; before, `rope_theta` was next to
        # `rope_scaling`, and the oldest files say `type` instead of `rope_type`
        rope = source.pop("rope_parameters", None) or source.pop("rope_scaling", None) or {}
        source |= {"rope_scaling": None, "rope_type": rope.get("type", "default")} | rope
        for name, allowed in ALLOWED_HF_VALUES.items():
            if source.get(name, allowed[0]) not in allowed:
                only = " or ".join(map(repr, allowed))
                raise ValueError(f"{name} is {source[name]!r}: LlamaModel supports only {only}")
        if set(source.get("layer_types") or ()) - {"full_attention"}:
            raise ValueError("layer_types: LlamaModel supports only 'full_attention'")
        if source["rope_type"] == "llama3":
            source["rope_scaling"] = {name: rope[name] for name in SCALING if name in rope}
        if source.get("model_type") != "smollm3":
            source["no_rope_layers"] = None  # transformers ignores it in a Llama
        elif not source.get("no_rope_layers"):
            raise ValueError("the config lacks no_rope_layers")
        names = [field.name for field in fields(cls) if source.get(field.name) is not None]
        missing = {field.name for field in fields(cls) if field.default is MISSING} - set(names)
        if missing:
            raise ValueError(f"the config lacks {', '.join(sorted(missing))}")
        return cls(**{name: source[name] for name in names})


# --- model ----------------------------------------------------------------------------------------


class LlamaModel(nn.Module):
    """Token ids to logits.

    New weights are normal with std `initializer_range`; `load_hf_weights` loads released ones.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        indices = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, index) for index in indices)
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        theta, scaling = config.rope_theta, config.rope_scaling
        self.rotary = RotaryPositionalEmbedding(config.head_dim, theta, scaling)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        for parameter in self.parameters():
            if parameter.ndim == 2:  # not the norms: their weights start at 1
                nn.init.normal_(parameter, std=config.initializer_range)

    def forward(
        self,
        input_ids: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits (B, T, V), in the weights' dtype, for the token after each of `input_ids` (B, T).

        positions: (T,) or (B, T) integers, each token's position in its text. By default they
            continue after the cache; with a mask, padding is not counted.
        mask: (B, S) booleans, False for padding.
        cache: keys and values of earlier tokens; those of `input_ids` are appended.
        """
        return self.lm_head(self.hidden(input_ids, positions=positions, mask=mask, cache=cache))

    def hidden(
        self,
        input_ids: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """The states (B, T, C) after the final norm, before the head. Arguments as in `forward`."""
        T = input_ids.shape[1]
        start = cache.length if cache is not None else 0
        if positions is None and mask is not None:
            positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, start : start + T]
        elif positions is None:
            positions = torch.arange(start, start + T, device=input_ids.device)
        rope = self.rotary(positions)
        visible = visible_positions(mask, start, T, input_ids.device)

        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x, rope, visible, cache)
        if cache is not None:
            cache.length += T
        return self.norm(x)

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, max_new_tokens: int, temperature: float = 0.0, **options
    ) -> Tensor:
        """The prompt (B, T) and its continuation, (B, T + n). Arguments as in `stream`.

        n is `max_new_tokens`, or less if every row has reached a stop token.
        """
        new = list(self.stream(input_ids, max_new_tokens, temperature, **options))
        return torch.cat([input_ids, torch.stack(new, dim=1)], dim=1) if new else input_ids

    @torch.no_grad()
    def stream(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        temperature: float = 0.0,
        *,
        top_k: int | None = None,
        top_p: float = 1.0,
        min_p: float = 0.0,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        generator: torch.Generator | None = None,
        stop_ids: Sequence[int] = (),
    ) -> Iterator[Tensor]:
        """Yields the continuation of `input_ids` (B, T) token by token, each (B,).

        temperature: 0 always takes the most likely token; above 0, tokens are sampled: see
            `token_probabilities` for this and for top_k, top_p and min_p.
        mask: (B, S) booleans, False for padding, which must be on the left.
        cache: keys and values of earlier tokens, with room for T + max_new_tokens more.
        generator: for sampling; by default torch's global one.
        stop_ids: a row that has reached one repeats it; once all rows have, the stream ends.
        Raises ValueError for a prompt, a mask or a number that does not fit, and names it.
        """
        B, T = input_ids.shape
        self._check_prompt(input_ids, max_new_tokens, mask, cache)
        check_sampling(temperature, top_k, top_p, min_p)
        cache = cache or KVCache(self.config, B, T + max_new_tokens, like=self.norm.weight)
        stops = torch.tensor(stop_ids, device=input_ids.device, dtype=input_ids.dtype)
        done, token, next_ids = torch.zeros_like(input_ids[:, 0]).bool(), None, input_ids
        for _ in range(max_new_tokens):
            logits = self.lm_head(self.hidden(next_ids, mask=mask, cache=cache)[:, -1])
            if temperature == 0:
                chosen = logits.argmax(dim=-1)
            else:
                p = token_probabilities(logits, temperature, top_k, top_p, min_p)
                chosen = torch.multinomial(p, 1, generator=generator).squeeze(-1)
            token = chosen if token is None else torch.where(done, token, chosen)
            yield token
            done |= torch.isin(token, stops)
            if done.all():
                return
            next_ids = token[:, None]
            if mask is not None:
                mask = F.pad(mask, (0, 1), value=True)

    def _check_prompt(
        self, input_ids: Tensor, max_new_tokens: int, mask: Tensor | None, cache: KVCache | None
    ) -> None:
        (B, T), context = input_ids.shape, self.config.max_position_embeddings
        start, room = (cache.length, cache.max_length) if cache else (0, context)
        if input_ids.numel() == 0:
            raise ValueError("the prompt is empty, give at least one token")
        low, high, last = input_ids.min(), input_ids.max(), self.config.vocab_size - 1
        if low < 0 or high > last:
            raise ValueError(f"token ids go from {low} to {high}, the vocabulary from 0 to {last}")
        if not 0 <= max_new_tokens <= min(context, room) - start - T:
            sizes = f"the context is {context}, the prompt {T}"
            sizes += f", the cache has {start} of {room} positions" if cache else ""
            raise ValueError(f"{max_new_tokens} new tokens do not fit: {sizes}")
        if mask is not None and mask.shape != (B, start + T):
            raise ValueError(f"the mask must be {(B, start + T)}, not {tuple(mask.shape)}")
        if mask is not None and not (mask[:, -1].all() and (mask[:, :-1] <= mask[:, 1:]).all()):
            raise ValueError("the mask hides a later token: padding must be on the left")


def visible_positions(
    mask: Tensor | None, start: int, T: int, device: torch.device
) -> Tensor | None:
    """Which of S = start + T positions each new one sees: booleans, (T, S) or (B, 1, T, S).

    None if plain causal attention is enough. A padding position sees itself, because a softmax over
    nothing is NaN.
    """
    if mask is None and (start == 0 or T == 1):
        return None
    key = torch.arange(start + T, device=device)
    query = key[start:, None]
    allowed = key <= query
    if mask is not None:
        allowed = allowed & (mask.bool()[:, None, None, :] | (key == query))
    return allowed


def check_sampling(temperature: float, top_k: int | None, top_p: float, min_p: float) -> None:
    """Raises ValueError for a number out of its range, and names it."""
    for name, value, fits, range_ in (
        ("temperature", temperature, 0 <= temperature < math.inf, "0 or more"),
        ("top_k", top_k, top_k is None or top_k >= 1, "1 or more"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1"),
        ("min_p", min_p, 0 <= min_p <= 1, "from 0 to 1"),
    ):
        if not fits:
            raise ValueError(f"{name} is {value}, it must be {range_}")


def token_probabilities(
    logits: Tensor,
    temperature: float,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:
    """Probabilities (B, V), float32, of the next token: softmax(logits / temperature), filtered.

    logits: (B, V). top_k: keep the k most likely tokens, and ties with the last of them.
    top_p: then keep the most likely ones that together reach this sum (arXiv:1904.09751).
    min_p: then keep those at least this many times as likely as the best (arXiv:2407.01082).
    """
    logits = (logits.float() - logits.amax(dim=-1, keepdim=True)) / temperature  # no overflow
    if top_k is not None:
        last = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < last, -math.inf)
    if top_p < 1:
        ascending, order = logits.sort()
        drop = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        drop[:, -1] = False  # the most likely token always stays
        logits = logits.masked_fill(drop.scatter(-1, order, drop), -math.inf)
    probabilities = logits.softmax(dim=-1)
    keep = probabilities >= min_p * probabilities.amax(dim=-1, keepdim=True)
    return F.normalize(probabilities * keep, p=1, dim=-1)


# --- layer, attention, MLP, norm ------------------------------------------------------------------


class LlamaDecoderLayer(nn.Module):
    """Attention, then MLP: each reads the normed residual stream and adds its output to it."""

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        self.self_attn = LlamaAttention(config, index)
        self.mlp = LlamaMLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], visible: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, visible, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaAttention(nn.Module):
    """Causal grouped-query attention: H / K neighbouring query heads share a key/value head."""

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.index, self.head_dim = index, D
        self.uses_rope = config.no_rope_layers is None or bool(config.no_rope_layers[index])
        self.q_proj = nn.Linear(C, H * D, bias=False)
        self.k_proj = nn.Linear(C, K * D, bias=False)
        self.v_proj = nn.Linear(C, K * D, bias=False)
        self.o_proj = nn.Linear(H * D, C, bias=False)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], visible: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (
            proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H or K, T, D)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.uses_rope:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.append(self.index, k, v)  # (B, K, S, D)
        causal = T > 1 and visible is None  # one new token sees all; torch.export needs T first
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, is_causal=causal, enable_gqa=True
        )
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class LlamaMLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202): down(SiLU(gate(x)) × up(x))."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaRMSNorm(nn.Module):
    """x / RMS(x) × weight, RMS over the channels in float32 (arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.pow(2).mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


# --- rotation and cache ---------------------------------------------------------------------------


class RotaryPositionalEmbedding(nn.Module):
    """Angles of the rotary embedding (Su et al. 2021, arXiv:2104.09864).

    Pair i of D / 2 turns by position × theta^(-2i/D). The angles are computed in float32 on each
    call: a buffer would be rounded when the model is cast to bf16.
    """

    def __init__(self, head_dim: int, theta: float, scaling: dict | None = None):
        super().__init__()
        self.head_dim, self.theta, self.scaling = head_dim, theta, scaling

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, float32, each (1 or B, 1, T, D / 2), for positions (T,) or (B, T)."""
        power = torch.arange(0, self.head_dim, 2, device=positions.device).float() / self.head_dim
        frequency = 1.0 / self.theta**power  # radians per position
        if self.scaling:
            # pairs with fewer than `low` turns in the original context become slower by `factor`;
            # those with more than `high` turns stay as they are; in between, a linear blend
            factor, low, high, context = (self.scaling[name] for name in SCALING)
            turns = context / (2 * math.pi / frequency)
            blend = ((turns - low) / (high - low)).clamp(0, 1)
            frequency = (1 - blend) * frequency / factor + blend * frequency
        angle = positions.float()[..., None] * frequency
        angle = angle.view(-1, 1, *angle.shape[-2:])
        return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x (B, H, T, D) by the angles, in the half-split layout of Hugging Face's weights.

    Pair i is channels i and i + D/2, not the neighbours 2i and 2i + 1 of the paper. The rows of the
    released q and k projections are in this order; another pairing gives no error, but wrong text.
    """
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class KVCache:
    """Rotated keys, and values, of all layers: (layers, B, K, max_length, D) each, allocated once.

    The first `length` positions are filled. `LlamaModel.hidden` increases `length` once per call.
    like: a tensor with the dtype and device of the cache.
    """

    def __init__(self, config: ModelConfig, batch_size: int, max_length: int, *, like: Tensor):
        K, D = config.num_key_value_heads, config.head_dim
        shape = (config.num_hidden_layers, batch_size, K, max_length, D)
        self.keys, self.values = like.new_empty(shape), like.new_empty(shape)
        self.length, self.max_length = 0, max_length

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k and v (B, K, T, D) of one layer; returns all so far, (B, K, S, D)."""
        end = self.length + k.shape[2]
        if end > self.max_length:
            raise ValueError(f"{end} positions do not fit: the cache has {self.max_length}")
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


# --- weights --------------------------------------------------------------------------------------


def hf_name(name: str) -> str:
    """Hugging Face's name of a parameter of `LlamaModel`: all but the head start with `model.`."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def hf_state_dict(model: LlamaModel) -> dict[str, Tensor]:
    """The weights under Hugging Face's names, not copied; without the head if it is tied."""
    return {hf_name(name): parameter.detach() for name, parameter in model.named_parameters()}


@torch.no_grad()
def load_hf_weights(model: LlamaModel, state_dict: Mapping[str, Tensor]) -> None:
    """Copies weights by name, into the model's own dtype and device.

    Raises ValueError if a tensor is missing, extra or of another shape; it names all of them, and
    nothing is copied. If the head is tied, a `lm_head.weight` must equal the embedding.
    """
    ours, theirs = hf_state_dict(model), dict(state_dict)
    problems = []
    if model.config.tie_word_embeddings and "lm_head.weight" in theirs:
        head, embedding = theirs.pop("lm_head.weight"), theirs.get("model.embed_tokens.weight")
        if embedding is not None and not torch.equal(head, embedding):
            problems.append("lm_head.weight is tied, but differs from model.embed_tokens.weight")
    problems += [f"{name} is missing" for name in ours if name not in theirs]
    problems += [f"{name} is extra" for name in theirs if name not in ours]
    problems += [
        f"{name} has shape {tuple(theirs[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in ours.items()
        if name in theirs and theirs[name].shape != tensor.shape
    ]
    if problems:
        raise ValueError(f"weights do not fit the model: {'; '.join(problems)}")
    for name, tensor in ours.items():
        tensor.copy_(theirs[name])
