"""Exports a model as a Hugging Face folder, which transformers loads without our code."""

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from SmolLm3 import LlamaModel, hf_state_dict
from workflow.errors import DiskError, WorkflowError
from workflow.files import weights_sha256
from workflow.reference.gguf_file import write_gguf
from workflow.reference.load import hf_config

LOCAL_KEYS = ("is_local", "local_files_only")  # how this process loaded the tokenizer
CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
---
# {name}

Written by `python main.py export`. transformers loads this folder without any further code.

| | |
|---|---|
{rows}

The licence is that of the weights it started from and of the training text.
"""


def export(
    model: LlamaModel,
    tokenizer,
    folder: str | Path,
    provenance: Mapping[str, object] | None = None,
    gguf: str | None = None,
) -> Path:
    """Writes weights, configs, tokenizer and a model card, only if all can be written.

    tokenizer: a PreTrainedTokenizerFast. provenance: rows of the model card; `name` is its title.
    gguf: F32, F16 or Q8_0 adds `<folder>-<gguf>.gguf`. Tied embeddings are stored once.
    Raises WorkflowError if the folder exists and is not empty, or DiskError.
    """
    folder = Path(folder)
    check_folder(folder)
    provenance = {"name": "A Llama", **(provenance or {})}
    place, exists = Path(os.path.realpath(folder)), os.path.exists(folder)  # it can be a link
    # a folder that exists can be a mount, which nothing can replace: the files are moved into it
    partial = (place if exists else place.parent) / f"{place.name}.tmp.{os.getpid()}"
    try:
        partial.mkdir(parents=True)
        write_folder(model, tokenizer, partial)
        write_card(model, partial / "README.md", provenance)
        if gguf:
            file = partial / f"{folder.absolute().name}-{gguf}.gguf"
            write_gguf(model, tokenizer, file, gguf, str(provenance["name"]))
        if exists:
            for file in sorted(partial.iterdir(), key=lambda file: file.name == "config.json"):
                file.replace(place / file.name)
        else:
            partial.replace(place)
    except (OSError, SafetensorError) as error:
        fix = "free disk space, or choose another folder"
        raise DiskError(folder, f"it cannot be written ({error})", fix) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def check_folder(folder: Path) -> None:
    """Raises WorkflowError if the folder exists and is not empty."""
    with suppress(OSError):  # it is a file, or cannot be read
        if not os.path.exists(folder) or not any(folder.iterdir()):
            return
    raise WorkflowError(folder, "it exists and is not an empty folder", "name a new one")


def write_folder(model: LlamaModel, tokenizer, folder: Path) -> None:
    from transformers import GenerationConfig  # takes seconds

    weights = {name: tensor.contiguous() for name, tensor in hf_state_dict(model).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = hf_config(model.config)
    kind = {"llama": "LlamaForCausalLM", "smollm3": "SmolLM3ForCausalLM"}[config.model_type]
    config.architectures, config.dtype = [kind], model.embed_tokens.weight.dtype
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    # also with the keys of transformers 4, which otherwise uses theta 10000 without a warning
    rope = dict(config.rope_parameters)
    theta, scaling = rope.pop("rope_theta"), rope if rope["rope_type"] != "default" else None
    vars(config).update(rope_theta=theta, rope_scaling=scaling)
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text("utf-8"))
    settings = {key: settings[key] for key in settings if key not in LOCAL_KEYS}
    # transformers 4 does not know the class that transformers 5 writes; 5 knows both
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    # by default, transformers 4 adds token_type_ids, which `generate` of a Llama refuses
    settings["model_input_names"] = ["input_ids", "attention_mask"]
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    shutil.copymode(file, folder / "model.safetensors")  # safetensors ignores the umask


def write_card(model: LlamaModel, file: Path, provenance: Mapping[str, object]) -> None:
    table = {**provenance, "weights_sha256": weights_sha256(hf_state_dict(model))}
    name = table.pop("name")
    rows = "\n".join(f"| {key.replace('_', ' ')} | {value} |" for key, value in table.items())
    file.write_text(CARD.format(name=name, rows=rows), encoding="utf-8")
