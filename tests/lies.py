"""Lies: altered folders of a model. None may be believed.

Each is refused, in one line that names the file, the tensor or the key, or it is the truth: a
folder is what its files say. Then the model and its export have exactly these tensors, and its
logits are those of transformers. `python tests/lies.py` tries all.
"""

from __future__ import annotations

import io
import json
import math
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import conftest
from SmolLm3 import LlamaModel, ModelConfig
from workflow.config.load import load_config
from workflow.errors import WorkflowError
from workflow.proof import copy_reference
from workflow.reference import Reference, export, load_reference, unequal_tensors

Lie = tuple[str, Callable[[Path], object]]  # what must be named, and what changes a folder
WEIGHTS = "model.safetensors"
IDS = torch.tensor([[5, 80, 81, 200, 3, 3, 90, 17, 256, 0, 44, 45]])
# other values of the keys that a config has
OTHER = json.loads("""{"vocab_size": 256, "hidden_size": 64, "intermediate_size": 32,
"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 4, "head_dim": 16,
"max_position_embeddings": 256, "rms_norm_eps": 1e-6, "rope_theta": 500.0, "hidden_act": "gelu",
"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
"rope_scaling": {"type": "dynamic", "factor": 4.0}, "attention_bias": true, "mlp_bias": true,
"tie_word_embeddings": false, "attention_dropout": 0.5, "model_type": "qwen3",
"architectures": ["MistralForCausalLM"], "dtype": "bfloat16", "use_cache": false,
"initializer_range": 0.5, "pretraining_tp": 2, "eos_token_id": 7}""")


def tensor_lies(tensors: dict[str, Tensor]) -> Iterator[Lie]:
    """Wrong names, shapes, dtypes and values of each tensor."""
    for name, tensor in tensors.items():
        other = next(k for k, v in tensors.items() if k != name and v.ndim == tensor.ndim)
        nan, infinite, nudged = (tensor.clone() for _ in range(3))
        nan.view(-1)[-1], infinite.view(-1)[0], nudged.view(-1)[1] = math.nan, -math.inf, 0.5
        changes = [{other: tensor, name: tensors[other]}, {name: None, f"module.{name}": tensor}]
        changes += [{name: None, name.replace("weight", "gamma"): tensor}]
        changes += [{f"{name}.other": tensor}, {"lm_head.weight": tensor}]
        transposed = tensor.mT if tensor.ndim == 2 else tensor.flip(0)
        values = [None, transposed, tensor[:-1], tensor[None], torch.zeros_like(tensor), -tensor]
        values += [nan, infinite, nudged, tensor.bfloat16(), tensor.half()]
        values += [tensor.double(), tensor.int(), tensor.to(torch.float8_e4m3fn)]
        for change in changes + [{name: value} for value in values]:
            kept = {k: v.contiguous() for k, v in (tensors | change).items() if v is not None}
            words = name if "lm_head.weight" not in change else "lm_head.weight"
            yield words, partial(write_weights, kept)


def write_weights(tensors: dict[str, Tensor], folder: Path) -> None:
    copies = {name: tensor.clone() for name, tensor in tensors.items()}  # none may share memory
    save_file(copies, folder / WEIGHTS, metadata={"format": "pt"})


def config_lies(values: dict[str, list]) -> Iterator[Lie]:
    """Each key with each of its values; ... deletes it."""
    for key, choices in values.items():
        for value in choices:
            yield f"{key}|config.json|rope_type", partial(edit_config, **{key: value})


def edit_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


def flips(file: str, times: int) -> Iterator[Lie]:
    """Single bits of a file, half of them in its first 3000 bytes; then a cut."""
    rng = random.Random(0)
    for number in range(times):
        end = 3000 if number % 2 else None
        yield f"{file}|altered", lambda folder, end=end: flip(folder / file, rng, end)
    for _ in range(times // 10):
        yield f"{file}|altered", lambda folder: cut(folder / file, rng)


def flip(file: Path, rng: random.Random, end: int | None) -> None:
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content[:end]))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def cut(file: Path, rng: random.Random) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: rng.randrange(len(content))])


@torch.no_grad()
def folder_is_refused(folder: Path, words: str, original: Reference) -> bool:
    """Whether loading is refused. If not, model, logits and export must be what the files say."""
    try:
        loaded = load_reference(str(folder), original.entry)
    except WorkflowError as error:
        named = any(word in str(error) for word in words.split("|"))
        if error.exit_code not in (2, 5) or not named or "\n" in str(error):
            raise AssertionError(f"{words}: exit code {error.exit_code}, {error}") from error
        return True
    stored = {name: tensor.float() for name, tensor in load_file(folder / WEIGHTS).items()}
    if torch.equal(stored.get("lm_head.weight", IDS), stored["model.embed_tokens.weight"]):
        del stored["lm_head.weight"]
    assert stored.keys() == original.state_dict.keys(), words
    assert all(tensor.isfinite().all() for tensor in stored.values()), words
    model, expected = copy_reference(loaded), LlamaModel(original.config)
    for name, parameter in expected.named_parameters():
        parameter.copy_(stored[f"model.{name}"])
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name, logits in {"our": model(IDS), "transformers'": theirs(IDS).logits}.items():
        assert torch.allclose(logits, expected(IDS), atol=1e-4), f"{words}: {name} logits"
    with tempfile.TemporaryDirectory(dir=folder) as again:
        export(model, loaded.tokenizer, Path(again) / "exported")
        for tensors in (loaded.state_dict, load_file(Path(again) / "exported" / WEIGHTS)):
            assert not unequal_tensors(tensors, stored), words
    return False


def all_lies(original: Path) -> Iterator[tuple[str, Lie]]:
    """The kind of each lie, and the lie. original: the folder that they are about."""
    tensors, config = (
        load_file(original / WEIGHTS),
        json.loads((original / "config.json").read_text()),
    )
    kinds = {"tensors": tensor_lies(tensors), "bits": flips(WEIGHTS, 60)}
    values = {key: [..., OTHER.get(key, "other"), None, -1, "8"] for key in config}
    kinds["values in config.json"] = config_lies(values)
    yield from ((kind, lie) for kind, lies in kinds.items() for lie in lies)


def wide_reference() -> Reference:
    """A random reference where each layer and each norm counts."""
    row = load_config(conftest.ROOT / "SmolLm3_Config.yaml", "ci").model_entry
    wide = ModelConfig(**{**vars(row.architecture), "initializer_range": 0.3})
    reference = load_reference("random", row.model_copy(update={"architecture": wide}))
    norms = [parameter for parameter in reference.model.parameters() if parameter.ndim == 1]
    for scale, norm in enumerate(norms, start=1):  # otherwise they are all 1
        norm += torch.linspace(0, 1, len(norm)) * scale
    return reference


def try_lies(every: int = 1) -> dict[str, int]:
    """Tries one in `every` lies: how many of each kind were refused, or were the truth.

    Raises AssertionError, with all of them, if lies were believed.
    """
    counts, errors = Counter(), []
    memory = Path("/dev/shm")
    with (
        redirect_stdout(io.StringIO()),
        redirect_stderr(io.StringIO()),
        tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder,
    ):
        reference, altered = wide_reference(), Path(folder) / "altered"
        original = export(copy_reference(reference), reference.tokenizer, Path(folder) / "original")
        for kind, (words, change) in islice(all_lies(original), 0, None, every):
            change(shutil.copytree(original, altered))
            try:
                refused = folder_is_refused(altered, words, reference)
                counts[f"{kind}: {'refused' if refused else 'true'}"] += 1
            except AssertionError as error:
                errors.append(f"{kind}: {error}")
            shutil.rmtree(altered)
    assert not errors, "\n".join(["lies were believed:", *errors])
    return dict(counts)


if __name__ == "__main__":
    started = time.perf_counter()
    print(try_lies(), f"{time.perf_counter() - started:.0f} s")
