"""Text from a model: prompts as text or as chat, tokens shown as they come."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from SmolLm3 import KVCache, LlamaModel
from workflow.errors import WorkflowError

HALF = "\N{REPLACEMENT CHARACTER}"  # what a part of a character is decoded to
# Where a text or an answer ends, in the members' vocabularies.
STOPS = ("<|endoftext|>", "<|im_end|>", "<|end_of_text|>", "<|eot_id|>")


class Decoder:
    """A model, prepared to generate: one token after the other, which reads all weights each time.

    In float32 on a CPU, its matrices are laid out column by column, in place: torch's BLAS reads
    them so on all cores, and as they were on one. In bfloat16 there is half as much to read; the
    prompt is still taken in float32, which a CPU without bfloat16 instructions does faster.
    """

    def __init__(self, model: LlamaModel, precision: torch.dtype = torch.float32):
        self.model, self.low = model, model
        if precision != torch.float32:
            self.low = copy.deepcopy(model).to(precision)
        elif self.device.type == "cpu":
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.data = parameter.data.t().contiguous().t()

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @torch.no_grad()
    def stream(self, input_ids: Tensor, new_tokens: int, **options) -> Iterator[Tensor]:
        """As `LlamaModel.stream`; a mask, in float32 only."""
        if self.low is self.model or input_ids.shape[1] < 2:
            return self.low.stream(input_ids, new_tokens, **options)
        (B, T), weight = input_ids.shape, self.model.embed_tokens.weight
        cache = KVCache(self.model.config, B, T + new_tokens, like=weight)
        self.model.hidden(input_ids[:, :-1], cache=cache)
        dtype = self.low.embed_tokens.weight.dtype
        cache.keys, cache.values = cache.keys.to(dtype), cache.values.to(dtype)
        return self.low.stream(input_ids[:, -1:], new_tokens, cache=cache, **options)


def prompt_ids(tokenizer, prompt: str, chat: bool) -> list[int]:
    """The ids of a prompt; with `chat`, of a user's turn in the tokenizer's own chat template.

    tokenizer: transformers'. Raises WorkflowError where it has no template (base models were not
    trained on turns), and for a half character, which the terminal makes of bytes that are no text.
    """
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        what = f"character {error.start} of the prompt is half a character (a lone surrogate)"
        raise WorkflowError("generate", what, "give it as UTF-8") from None
    if chat and not tokenizer.chat_template:
        what = "this tokenizer has no chat template"
        raise WorkflowError("generate", what, "take an Instruct member, or omit --chat")
    if chat:
        turns = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return tokenizer.backend_tokenizer.encode(prompt, add_special_tokens=False).ids


def sampling(
    temperature: float | None, top_k: int | None, top_p: float, min_p: float
) -> dict[str, Any]:
    """Options of `LlamaModel.stream`: greedy, unless something says that tokens are to be drawn."""
    if temperature is None:
        temperature = 1.0 if top_k is not None or top_p != 1.0 or min_p != 0.0 else 0.0
    return {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}


def text_pieces(
    decoder: Decoder,
    tokenizer,
    ids: list[int],
    new_tokens: int,
    options: Mapping[str, Any],
) -> Iterator[str]:
    """The continuation of `ids`, piece by piece, until a token of `STOPS`.

    A token can be a part of a character; it is held back until the character is whole. tokenizer:
    transformers'. options: of `LlamaModel.stream`.
    """
    tokenizer = tokenizer.backend_tokenizer
    stops = [tokenizer.token_to_id(word) for word in STOPS]
    stops = [number for number in stops if number is not None]
    ids, shown = list(ids), tokenizer.decode(ids, skip_special_tokens=False)
    prompt = torch.tensor([ids], dtype=torch.long, device=decoder.device)
    text = shown
    for token in decoder.stream(prompt, new_tokens, stop_ids=stops, **options):
        if token.item() in stops:
            break
        ids.append(token.item())
        text = tokenizer.decode(ids, skip_special_tokens=False)
        if not text.endswith(HALF):
            yield text.removeprefix(shown)
            shown = text
    if rest := text.removeprefix(shown).rstrip(HALF):  # whole characters before a half one
        yield rest
