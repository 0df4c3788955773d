"""Reads a Hugging Face folder without transformers: the files decide what the model is.

transformers fills missing tensors with random values, and ignores extra tensors and unknown keys of
the config. Here all of these are errors.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from SmolLm3 import (
    ALLOWED_HF_VALUES,
    SCALING,
    LlamaModel,
    ModelConfig,
    hf_name,
    load_hf_weights,
)
from workflow.errors import SourceError

LFS_POINTER = b"version https://git-lfs"
FIX = "get the files again, or choose another source"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Keys of a config that have no effect, or that `ModelConfig.from_hf` reads or checks: those of
# transformers' configs, which need not be imported for this (a test compares them), and older ones.
KNOWN_KEYS = {*ALLOWED_HF_VALUES, *SCALING} | set(
    """
    _attn_implementation _flash_attn_2_enabled _model_name_or_path _name_or_path architectures
    bos_token_id chunk_size_feed_forward dtype eos_token_id head_dim hidden_size id2label
    initializer_range intermediate_size is_encoder_decoder is_llama_config label2id layer_types
    max_position_embeddings max_window_layers no_rope_layer_interval no_rope_layers
    num_attention_heads num_hidden_layers num_key_value_heads output_attentions
    output_hidden_states pad_token_id pretraining_tp problem_type return_dict rms_norm_eps
    rope_parameters rope_scaling rope_theta tie_word_embeddings torch_dtype transformers.js_config
    transformers_version type use_cache vocab_size
    """.split()
)
# Parts of names that speak of another computation: caps, norms, scales, windows, experts, …
COMPUTATION = re.compile(
    r"cap|clip|clamp|norm|scal|mult|factor|alpha|mup|pct|window|sliding|chunk|local|global"
    r"|sparse|dilat|expert|moe|router|mixture|dense|rotary|rope|position|alibi|yarn|bias|drop"
    r"|resid|embed|embd|temperature_|_temperature|skip|parallel|activation|_act|gate|mlp|ffn|attn"
    r"|attention|qk|softmax|logit|sink"
    r"|lora|latent|share|recur|loop|mask|causal|mamba|ssm|conv_|_conv|quant|compress",
    re.IGNORECASE,
)
SCALE = re.compile("scal|mult|factor|alpha|pct", re.IGNORECASE)  # 1 has no effect; else 0


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns any error of the libraries that read a file into a SourceError."""
    try:
        yield
    except Exception as error:  # tokenizers raises plain Exceptions
        what = f"it cannot be read ({(str(error).strip() or repr(error)).splitlines()[0]})"
        fix = "get it again, or choose another source"
        if not path.exists():
            what = "there is no such file"
        elif path.is_file() and path.read_bytes()[: len(LFS_POINTER)] == LFS_POINTER:
            what, fix = "it is a git-LFS pointer, not the file itself", "type: git lfs pull"
        raise SourceError(path, what, fix) from error


def read_json(file: Path) -> dict[str, Any]:
    with readable(file):
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not an object")
    return content


def check_config(file: Path) -> None:
    """Refuses a config.json with a key that changes the computation and that LlamaModel lacks.

    Other unknown keys are printed in one line.
    """
    config = read_json(file)
    kinds = ALLOWED_HF_VALUES["model_type"]
    if (kind := config.get("model_type")) not in kinds:
        what = f"model_type is {kind!r}: LlamaModel supports only {' or '.join(map(repr, kinds))}"
        raise SourceError(file, what, "choose a Llama model")
    for name in ("rope_parameters", "rope_scaling"):
        config |= config[name] if isinstance(config.get(name), dict) else {}
    unknown = [name for name in config if not (name in KNOWN_KEYS or name.endswith("_token_id"))]
    suspect = [name for name in unknown if COMPUTATION.search(name)]
    if refused := [name for name in suspect if not has_no_effect(name, config[name])]:
        what = ", ".join(f"{name} is {config[name]!r}" for name in refused)
        fix = "choose another model, or remove a key that is not used"
        raise SourceError(file, f"{what}: LlamaModel does not compute this", fix)
    if others := [name for name in unknown if name not in suspect]:
        print(f"Note: unknown keys in {file} are ignored: {', '.join(others)}")


def has_no_effect(name: str, value: Any) -> bool:
    """Whether this value of a key switches it off. For a scale this is 1, otherwise 0."""
    if "causal" in name:
        return name == "is_causal" and value is True
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value == (1 if SCALE.search(name) else 0)
    return not value


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that its index names. transformers has the same order."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if index.exists():
        shards = read_json(index).get("weight_map", {})
        with readable(index):
            return [folder / shard for shard in sorted(set(shards.values()))]
    what = "there is no model.safetensors in this folder"
    raise SourceError(folder, what, "name a Hugging Face model folder")


def read_weights(folder: Path, config: ModelConfig) -> dict[str, Tensor]:
    """The tensors in the files of a folder, in float32; a head that equals the embedding only once.

    Raises SourceError for a file that cannot be read, and for a tensor of an unknown dtype.
    """
    tensors = {}
    for file in weight_files(folder):
        with readable(file):
            tensors |= load_file(file)
    wrong = [f"{k} has dtype {v.dtype}" for k, v in tensors.items() if v.dtype not in DTYPES]
    refuse(wrong, folder, FIX)
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    if config.tie_word_embeddings and (head := tensors.get("lm_head.weight")) is not None:
        if torch.equal(head, tensors.get("model.embed_tokens.weight", torch.empty(0))):
            del tensors["lm_head.weight"]
    return tensors


def check_weights(tensors: Mapping[str, Tensor], config: ModelConfig, folder: Path) -> LlamaModel:
    """Raises SourceError, with the first names, if they are not finite, or not `LlamaModel`'s.

    Returns a model on the device `meta`: its weights have shapes, but no values and no memory.
    """
    problems = [
        f"{name} has NaN or infinite values"
        for name, tensor in tensors.items()
        if not tensor.sum().isfinite()  # ten times as fast as looking at each value
    ]
    model = empty_model(config)
    try:
        load_hf_weights(model, tensors)  # copies nothing to the device `meta`
    except ValueError as error:
        problems += str(error).partition(": ")[2].split("; ")
    refuse(problems, folder, FIX)
    return model


def empty_model(config: ModelConfig) -> LlamaModel:
    """A model on the device `meta`."""
    # there, `normal_` has nothing to do, but imports torch's compiler, which takes two seconds
    with torch.device("meta"), patch.object(nn.init, "normal_"):
        return LlamaModel(config)


def load_model(folder: Path, config: ModelConfig) -> LlamaModel:
    """The model in a folder. Its weights are not copied, and it has no random ones before."""
    tensors = read_weights(folder, config)
    model = check_weights(tensors, config, folder)
    if config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(
        {name: tensors[hf_name(name)] for name in model.state_dict()}, assign=True
    )
    if config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    return model.eval()


def unequal_tensors(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors that differ, or that only one model has."""
    return [
        name
        for name in {**ours, **theirs}
        if name not in ours or name not in theirs or not torch.equal(ours[name], theirs[name])
    ]


def check_equal(loaded: nn.Module, stored: Mapping[str, Tensor], file: Path) -> None:
    """Raises SourceError if transformers loaded other tensors or values than the file has."""
    names = unequal_tensors(dict(loaded.named_parameters()), stored)
    problems = [f"transformers loaded another {name}" for name in names]
    refuse(problems, file, "install the versions in requirements.txt")


def refuse(problems: list[str], file: Path, fix: str) -> None:
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise SourceError(file, ", ".join(problems[:3]) + more, fix)
