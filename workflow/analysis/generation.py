"""Text from a model: prompts as plain text or as chat, and the continuation piece by piece."""

import copy
from collections.abc import Iterator, Mapping

import torch
from tokenizers.decoders import DecodeStream

from SmolLm3 import LlamaModel
from workflow.errors import WorkflowError

# These tokens end a text or an answer. Each vocabulary has some of them.
STOP_TOKENS = ("<|endoftext|>", "<|im_end|>", "<|end_of_text|>", "<|eot_id|>")


def prepare_for_generation(model: LlamaModel, precision: torch.dtype = torch.float32) -> LlamaModel:
    """The model in the form that generates fastest. Each new token reads all weights once.

    bfloat16: a copy with half the bytes. float32 on a CPU: the same model and results, but the
    matrices are stored column by column: then BLAS uses all cores even for one token.
    """
    if precision != torch.float32:
        return copy.deepcopy(model).to(precision)
    for parameter in model.parameters():
        if parameter.ndim == 2 and parameter.device.type == "cpu":
            parameter.data = parameter.data.t().contiguous().t()
    return model


def prompt_ids(tokenizer, prompt: str, chat: bool) -> list[int]:
    """The ids of a prompt. chat: as the user's turn in the chat template of the tokenizer.

    tokenizer: from transformers. Raises WorkflowError if its chat template is missing (as in base
    models) or invalid, or for a lone surrogate: a terminal makes it from bytes that are not UTF-8.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        what = f"character {error.start} of the prompt is half a character (a lone surrogate)"
        raise WorkflowError("generate", what, "give it as UTF-8") from None
    if chat and not tokenizer.chat_template:
        what = "this tokenizer has no chat template"
        raise WorkflowError("generate", what, "choose an Instruct model, or omit --chat")
    if chat:
        turns = [{"role": "user", "content": prompt}]
        options = {"add_generation_prompt": True, "tokenize": False}
        try:
            prompt = tokenizer.apply_chat_template(turns, **options)
        except Exception as error:  # a template is a program
            what = f"the tokenizer's chat template cannot be used ({error})"
            raise WorkflowError("generate", what, "omit --chat") from error
    return tokenizer.backend_tokenizer.encode(prompt, add_special_tokens=False).ids


def sampling_options(temperature: float | None, top_k: int | None, top_p: float, min_p: float):
    """The options of `LlamaModel.stream`, as a dict; greedy without a temperature or a filter.

    Raises WorkflowError for a filter with temperature 0, where it would do nothing.
    """
    filters = top_k is not None or top_p != 1.0 or min_p != 0.0
    if filters and temperature == 0:
        what = "temperature 0 is greedy, and needs no top-k, top-p or min-p"
        raise WorkflowError("generate", what, "omit one of them")
    if temperature is None:
        temperature = 1.0 if filters else 0.0
    return {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}


def stream_text(
    model: LlamaModel, tokenizer, ids: list[int], new_tokens: int, options: Mapping
) -> Iterator[str]:
    """Yields the continuation of `ids` in pieces of complete characters, up to a stop token.

    tokenizer: from transformers. options: those of `LlamaModel.stream`.
    """
    tokenizer = tokenizer.backend_tokenizer
    stops = [id for id in map(tokenizer.token_to_id, STOP_TOKENS) if id is not None]
    prompt = torch.tensor([ids], dtype=torch.long, device=model.embed_tokens.weight.device)
    decoder, pending = DecodeStream(skip_special_tokens=False), []
    for token in map(int, model.stream(prompt, new_tokens, stop_ids=stops, **options)):
        if token in stops:
            break
        pending.append(token)
        if piece := decoder.step(tokenizer, token):
            yield piece
            pending.clear()
    rest = tokenizer.decode(pending, skip_special_tokens=False)
    if text := rest.rstrip("\N{REPLACEMENT CHARACTER}"):  # without an incomplete last character
        yield text
