"""Reads and writes GGUF, the format of llama.cpp, with the `gguf` library.

llama.cpp rotates neighbouring channels; Hugging Face's weights are for the half-split layout. So
GGUF stores the rows of q and k permuted (llama.cpp, convert_hf_to_gguf.py, `LlamaModel.permute`).
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from unittest.mock import patch

import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quantize
from torch import Tensor

from SmolLm3 import LlamaModel, ModelConfig, hf_state_dict
from workflow.errors import WorkflowError
from workflow.reference.folder import empty_model


def gguf_names(model: LlamaModel) -> dict[str, str]:
    """Maps Hugging Face's tensor names to GGUF's."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    return {key: names.get_name(key, try_suffixes=(".weight",)) for key in hf_state_dict(model)}


def permute_qk(name: str, weight: np.ndarray, config: ModelConfig, *, inverse: bool) -> np.ndarray:
    """Reorders the rows (heads × D, C) of q and k for llama.cpp, or back. Others: unchanged."""
    heads_of = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    if (heads := heads_of.get(name.split(".")[-2])) is None:
        return weight
    pairs = (config.head_dim // 2, 2) if inverse else (2, config.head_dim // 2)
    return weight.reshape(heads, *pairs, -1).swapaxes(1, 2).reshape(weight.shape)


@contextmanager
def parse_once() -> Iterator[None]:
    """In this block, each file is parsed once. transformers parses it three times, 4 s each."""
    with ExitStack() as patches:
        for function in (gguf.GGUFReader, gguf.get_tensor_name_map):
            patches.enter_context(patch.object(gguf, function.__name__, cache(function)))
        yield


def read_gguf(path: Path, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Yields Hugging Face's name and float32 values of each tensor, dequantised by `gguf`.

    A tensor that `LlamaModel` does not have is yielded empty, under its name in the file.
    """
    names = {stored: name for name, stored in gguf_names(empty_model(config)).items()}
    for tensor in gguf.GGUFReader(str(path)).tensors:
        if name := names.get(tensor.name):
            values = dequantize(tensor.data, tensor.tensor_type)
            yield name, torch.tensor(permute_qk(name, values, config, inverse=True))
        else:
            yield tensor.name, torch.empty(0)


def write_gguf(model: LlamaModel, tokenizer, path: Path, kind: str, name: str) -> None:
    """Writes weights and tokenizer. The tokenizer's files must be in the folder of `path`.

    tokenizer: a PreTrainedTokenizerFast. kind: F32, F16 or Q8_0. name: of the weights.
    Raises WorkflowError if GGUF cannot describe the architecture or the tokenizer.
    """
    check_supported(model.config, tokenizer)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])
    add_architecture(writer, model.config)
    add_tokenizer(writer, tokenizer, path.parent, model.config.vocab_size)
    names = gguf_names(model)
    for key, weight in hf_state_dict(model).items():
        values = permute_qk(key, weight.float().cpu().numpy(), model.config, inverse=False)
        dtype = gguf.GGMLQuantizationType[storage_type(kind, weight)]
        writer.add_tensor(names[key], quantize(values, dtype), raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check_supported(config: ModelConfig, tokenizer) -> None:
    for field in ("no_rope_layers", "rope_scaling"):
        if getattr(config, field):
            raise WorkflowError("GGUF", f"it cannot describe a model with {field}", "omit --gguf")
    steps = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] or {}
    if [step["type"] for step in steps.get("pretokenizers", [])] != ["Digits", "ByteLevel"]:
        what = "it has no name for this tokenizer's pre-tokenizer, which is not SmolLM's"
        raise WorkflowError("GGUF", what, "omit --gguf")


def storage_type(kind: str, weight: Tensor) -> str:
    """Vectors stay F32. Q8_0 needs rows of a multiple of 32 values; other matrices get F16."""
    if weight.ndim == 1:
        return "F32"
    return "F16" if kind == "Q8_0" and weight.shape[-1] % 32 else kind


def add_architecture(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer, folder: Path, vocab_size: int) -> None:
    """Adds a byte-level BPE. The `gguf` library reads merges and chat template from `folder`."""
    words = tokenizer.convert_ids_to_tokens(list(range(vocab_size)))
    types = dict.fromkeys(range(vocab_size), gguf.TokenType.NORMAL)
    for i, token in tokenizer.added_tokens_decoder.items():
        types[i] = gguf.TokenType.CONTROL if token.special else types[i]
    for i in (i for i, word in enumerate(words) if word is None):  # rows added for a round size
        words[i], types[i] = f"[PAD{i}]", gguf.TokenType.UNUSED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")  # llama.cpp's name for the pre-tokenizer of SmolLM
    writer.add_token_list(words)
    writer.add_token_types(list(types.values()))
    special = ("bos", "eos", "pad", "unk")
    vocabulary = gguf.SpecialVocab(folder, load_merges=True, special_token_types=special)
    vocabulary.add_special_token = {"bos": False}
    vocabulary.add_to_gguf(writer, quiet=True)
