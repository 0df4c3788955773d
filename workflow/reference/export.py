"""Exports a model as a Hugging Face folder, which transformers loads without our code."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from SmolLm3 import LlamaModel, hf_state_dict
from workflow.errors import DiskError, WorkflowError
from workflow.files import weights_sha256
from workflow.reference.gguf_file import write_gguf
from workflow.reference.load import hf_config

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

The licence is that of the original weights and of the training text.
"""


def export(
    model: LlamaModel,
    tokenizer,
    folder: str | Path,
    provenance: Mapping[str, object] | None = None,
    gguf: str | None = None,
) -> Path:
    """Writes weights, configs, tokenizer and a model card. `folder` appears only when complete.

    tokenizer: a PreTrainedTokenizerFast. provenance: rows of the model card; `name` is its title.
    gguf: F32, F16 or Q8_0 adds `<folder>-<gguf>.gguf`. Tied embeddings are stored once.
    Raises WorkflowError if the folder exists and is not empty, or DiskError.
    """
    folder, provenance = Path(folder), {"name": "A Llama", **(provenance or {})}
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise WorkflowError(folder, "it exists and is not an empty folder", "name a new one")
    partial = folder.with_name(f"{folder.name}.tmp.{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        write_folder(model, tokenizer, partial)
        write_card(model, partial / "README.md", provenance)
        if gguf:
            file = partial / f"{folder.name}-{gguf}.gguf"
            write_gguf(model, tokenizer, file, gguf, str(provenance["name"]))
        partial.replace(folder)
    except (OSError, SafetensorError) as error:
        raise DiskError(folder, f"it cannot be written ({error})", "free disk space") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


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


def write_card(model: LlamaModel, file: Path, provenance: Mapping[str, object]) -> None:
    table = {**provenance, "weights_sha256": weights_sha256(hf_state_dict(model))}
    name = table.pop("name")
    rows = "\n".join(f"| {key.replace('_', ' ')} | {value} |" for key, value in table.items())
    file.write_text(CARD.format(name=name, rows=rows), encoding="utf-8")
