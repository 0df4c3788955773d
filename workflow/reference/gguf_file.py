"""GGUF, the format of llama.cpp: weights read and written with the `gguf` library.

llama.cpp turns neighbouring channels, Hugging Face's weights are for the half-split layout, so the
rows of q and k are stored permuted (llama.cpp, convert_hf_to_gguf.py, `LlamaModel.permute`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quantize
from torch import Tensor

from SmolLm3 import LlamaModel, ModelConfig, hf_state_dict
from workflow.errors import WorkflowError

PRE_TOKENIZER = "smollm"  # llama.cpp's name for how SmolLM's tokenizer cuts a text
KINDS = {  # tensors of one dimension stay float32 in each
    "F32": gguf.LlamaFileType.ALL_F32,
    "F16": gguf.LlamaFileType.MOSTLY_F16,
    "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}


def gguf_names(model: LlamaModel) -> dict[str, str]:
    """GGUF's name of each of Hugging Face's tensors."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    return {key: names.get_name(key, try_suffixes=(".weight",)) for key in hf_state_dict(model)}


def permuted(name: str, weight: np.ndarray, config: ModelConfig, *, back: bool) -> np.ndarray:
    """Rows (heads × D, C) of q and k in llama.cpp's order, or `back`; other tensors as they are."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for projection, number in heads.items():
        if projection in name:
            halves = (config.head_dim // 2, 2) if back else (2, config.head_dim // 2)
            split = weight.reshape(number, *halves, -1)
            return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(weight.shape)
    return weight


def read_tensors(path: Path, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face's names and float32 values of a file, as the gguf library dequantises them."""
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    with torch.device("meta"):
        names = gguf_names(LlamaModel(config))
    for name, stored_name in names.items():
        tensor = stored.pop(stored_name, None)
        if tensor is not None:
            values = dequantize(tensor.data, tensor.tensor_type)
            yield name, torch.from_numpy(permuted(name, values, config, back=True).copy())
    yield from ((name, torch.empty(0)) for name in stored)  # what no tensor of ours answers to


def write_gguf(model: LlamaModel, tokenizer, path: Path, kind: str, name: str) -> None:
    """Writes weights and tokenizer (transformers' fast one); `export` sees to it that it is whole.

    kind: one of `KINDS`. name: what the weights honestly are. Raises WorkflowError for an
    architecture that GGUF's `llama` does not have.
    """
    config = model.config
    if config.no_rope_layers or config.rope_scaling:
        what = "no_rope_layers" if config.no_rope_layers else "rope_scaling"
        raise WorkflowError(path, f"GGUF cannot be written of a model with {what}", "omit --gguf")
    cuts = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] or {}
    if [part["type"] for part in cuts.get("pretokenizers", [])] != ["Digits", "ByteLevel"]:
        what = "GGUF cannot name how this tokenizer cuts a text: it is not SmolLM's"
        raise WorkflowError(path, what, "omit --gguf")
    writer = gguf.GGUFWriter(path, "llama")
    add_metadata(writer, config, KINDS[kind], name)
    add_tokenizer(writer, tokenizer, config.vocab_size)
    names = gguf_names(model)
    for key, weight in hf_state_dict(model).items():
        values = permuted(key, weight.float().cpu().numpy(), config, back=False)
        wanted = gguf.GGMLQuantizationType[stored_kind(kind, weight)]
        writer.add_tensor(names[key], quantize(values, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def stored_kind(kind: str, weight: Tensor) -> str:
    """How one tensor is stored: Q8_0 has blocks of 32 values of a row, else F16 must do."""
    if weight.ndim == 1:
        return "F32"
    return "F16" if kind == "Q8_0" and weight.shape[-1] % 32 else kind


def add_metadata(writer: gguf.GGUFWriter, config: ModelConfig, kind: int, name: str) -> None:
    writer.add_name(name)
    writer.add_file_type(kind)
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


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer, vocab_size: int) -> None:
    """The byte-level BPE of a fast tokenizer: words, which of them are special, and merges."""
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    special = {added["id"] for added in description["added_tokens"] if added["special"]}
    words = tokenizer.convert_ids_to_tokens(list(range(vocab_size)))
    kinds = [
        gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL for i in range(vocab_size)
    ]
    merges = description["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_TOKENIZER)
    writer.add_token_list(words)
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_add_bos_token(False)
    for add, number in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
    ):
        if number is not None:
            add(number)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
