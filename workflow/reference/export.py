"""The way back: a model as a Hugging Face folder, which transformers loads without our code."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import GenerationConfig, PreTrainedTokenizerFast

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

Written by `python main.py export`. transformers loads this folder without any further code:

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained("{folder}")
    tokenizer = AutoTokenizer.from_pretrained("{folder}")

| | |
|---|---|
{rows}

The licence is that of the weights and the text that this was made from.
"""


def export(
    model: LlamaModel,
    tokenizer: PreTrainedTokenizerFast,
    folder: str | Path,
    provenance: Mapping[str, object] | None = None,
    gguf: str | None = None,
) -> Path:
    """Writes weights, configs, tokenizer and a model card into `folder`, whole or not at all.

    A tied head is stored once, as the embedding. provenance: what the weights are, by name, for the
    card. gguf: F32, F16 or Q8_0, to write `<folder>-<gguf>.gguf` beside them, too.
    Raises WorkflowError when the folder exists and is not empty.
    """
    folder, provenance = Path(folder), {"name": "A Llama", **(provenance or {})}
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise WorkflowError(folder, "it exists and is not an empty folder", "name a new one")
    unfinished = folder.with_name(f"{folder.name}.tmp.{os.getpid()}")
    try:
        unfinished.mkdir(parents=True)
        write_folder(model, tokenizer, unfinished, {**provenance, "folder": folder.name})
        if gguf:
            name = str(provenance["name"])
            write_gguf(model, tokenizer, unfinished / f"{folder.name}-{gguf}.gguf", gguf, name)
        unfinished.replace(folder)
    except (OSError, SafetensorError) as error:
        raise DiskError(folder, f"it cannot be written ({error})", "free some room") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def write_folder(
    model: LlamaModel,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    provenance: Mapping[str, object],
) -> None:
    weights = {name: tensor.contiguous() for name, tensor in hf_state_dict(model).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = hf_config(model.config)
    kind = {"llama": "LlamaForCausalLM", "smollm3": "SmolLM3ForCausalLM"}[config.model_type]
    config.architectures, config.dtype = [kind], model.embed_tokens.weight.dtype
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    config.save_pretrained(folder)
    name_rotation_as_before(folder / "config.json")
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = {**provenance, "weights_sha256": weights_sha256(weights)}
    card = CARD.format(
        name=rows.pop("name"),
        folder=rows.pop("folder"),
        rows="\n".join(f"| {name.replace('_', ' ')} | {value} |" for name, value in rows.items()),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def name_rotation_as_before(file: Path) -> None:
    """Repeats the rotation in a config.json under the names that transformers 4 reads.

    It would pass over `rope_parameters` and turn by theta 10000 without a word.
    """
    config = json.loads(file.read_text(encoding="utf-8"))
    rope = dict(config["rope_parameters"])
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
