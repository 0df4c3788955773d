"""Exact resume: compares a checkpoint with the current run, then loads it into a new trainer."""

import ast
import hashlib
import json
import os
import platform
import random
import re
import shlex
from collections.abc import Collection, Mapping
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import AdamW

from SmolLm3 import LlamaModel, ModelConfig, hf_name, load_hf_weights
from workflow.config.settings import TrainSettings
from workflow.errors import CheckpointError, ConfigError, ForeignError
from workflow.files import flatten
from workflow.training import checkpoint, distributed

State = dict[str, Any]  # a checkpoint or a part of it; see `checkpoint.CONTENTS`
Names = Collection[str]
RANDOM_STATES = ("torch", "cuda", "numpy", "python")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # dtypes of other programs' weights


def random_states() -> State:
    """All random states of the process, in types that `torch.load(weights_only=True)` accepts."""
    kind, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),  # empty without a GPU
        "numpy": (str(kind), torch.from_numpy(keys.astype(np.int64)), *map(float, rest)),
        "python": random.getstate(),
    }


def seed_random_states(seed: int) -> None:
    torch.manual_seed(seed)  # CPU and GPUs
    np.random.seed(seed)
    random.seed(seed)


def restore_random_states(states: State) -> None:
    """Restores the given states; those of GPUs only if the machine has the same number of GPUs."""
    if "python" in states:
        random.setstate(states["python"])
    if "torch" in states:
        torch.set_rng_state(states["torch"])
    if "numpy" in states:
        kind, keys, position, has_gauss, gauss = states["numpy"]
        np.random.set_state((kind, keys.numpy(), int(position), int(has_gauss), gauss))
    if len(states.get("cuda", [])) == torch.cuda.device_count() > 0:
        torch.cuda.set_rng_state_all(states["cuda"])


@cache
def code_sha256(*more: str) -> str:
    """The hash of the code that computes a run's numbers, without comments and docstrings.

    It is that of `SmolLm3.py`, the folders of training and data, and `more` files.
    """
    root, digest = Path(__file__).parents[2], hashlib.sha256()
    folders = (root / "workflow" / name for name in ("data", "training"))
    files = [file for folder in folders for file in sorted(folder.glob("*.py"))]
    for file in (root / "SmolLm3.py", *files, *(root / name for name in more)):
        tree = ast.parse(file.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                node.value.value = ""
        digest.update(ast.unparse(tree).encode())
    return digest.hexdigest()


code_sha256()  # now, because somebody can edit the files while this process runs


def environment(device: torch.device, settings: TrainSettings) -> State:
    """What must be equal for a bit-exact resume."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "torch": str(torch.__version__),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "device": name,
        "threads": torch.get_num_threads(),
        "processes": distributed.world_size(),
        "micro_batch_size": settings.micro_batch_size,
        "compile": settings.compile,
        "code": code_sha256()[:12],
    }


def check_allowed(names: Names) -> None:
    """Raises ConfigError unless each name is a key of `train`, or "random" (missing states)."""
    for name in names:
        if name != "random" and not name.startswith("train."):
            fix = "name a key such as train.learning_rate, or random"
            raise ConfigError(f"--allow {name}", "this must be as in the checkpoint", fix)


def compare(path: Path, saved: State, now: State, allowed: Names = ()) -> list[str]:
    """Prints a table of the differences between two nested dicts, and returns their keys.

    Raises CheckpointError, with both values, if a key differs that is not in `allowed`.
    """
    before, after = dict(flatten(saved)), dict(flatten(now))
    differ = [name for name in before | after if before.get(name) != after.get(name)]
    if not differ:
        return []
    rows = [(name, f"{before.get(name)!r:.70}", f"{after.get(name)!r:.70}") for name in differ]
    for name, old, new in [("setting", "checkpoint", "now"), *rows]:
        print(f"{name:<{max(map(len, differ))}}  {old}  {new}")
    keys = [name.removeprefix("config.") for name in differ]
    forbidden = [key for key in keys if not any(f"{key}.".startswith(f"{a}.") for a in allowed)]
    if forbidden:
        fix = "use the settings and files of the checkpoint"
        if all(key.startswith("train.") for key in keys):
            fix += f", or type: {allowing_command(path, keys, now['config']['train'])}"
        both = [f"{name} is {old} in the checkpoint and {new} now" for name, old, new in rows[:3]]
        more = f", and {len(rows) - 3} more" if len(rows) > 3 else ""
        raise CheckpointError(path, ", ".join(both) + more, fix)
    return keys


def allowing_command(path: Path, keys: Names, train: State) -> str:
    """The command that resumes with other values of these keys of `train`."""
    words = ["main.py", "resume", os.path.relpath(path.parent)]
    for name in dict.fromkeys(key.split(".")[1] for key in keys):  # train.betas.0 is of betas
        value = train[name] if isinstance(train[name], str) else json.dumps(train[name])
        words += ["--set", f"train.{name}={value}", "--allow", f"train.{name}"]
    return shlex.join(words)


def restore(
    path: Path, state: State, expected: State, model: LlamaModel, optimizer: AdamW, allowed: Names
) -> None:
    """Loads the `state` read from `path` into model, optimizer and random states.

    expected: parts that the state must equal; keys in `allowed` may differ, which is printed.
    Raises CheckpointError. The trainer must not be used after that.
    """
    inexact = compare(path, {part: state[part] for part in expected}, expected, allowed)
    missing = [name for name in RANDOM_STATES if name not in state["random"]]
    if missing and "random" not in allowed:
        what = f"the random states {', '.join(missing)} are missing"
        fix = "choose another file, or resume inexactly with --allow random"
        raise CheckpointError(path, what, fix)
    try:
        load_optimizer(optimizer, state["optimizer"])
        load_weights(model, state["model"], path, [torch.float32])
        restore_random_states(state["random"])
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        what = f"it does not fit ({type(error).__name__}: {error})"
        raise CheckpointError(path, what, "choose another file") from error
    if inexact + missing:
        print(f"Note: {', '.join(inexact + missing)} as allowed: the resume is not exact")


def optimizer_state(optimizer: AdamW) -> State:
    return {"kind": type(optimizer).__name__, **optimizer.state_dict()}


def load_optimizer(optimizer: AdamW, saved: State) -> None:
    """Loads saved moments into a new optimizer, which keeps its own learning rate and weight decay.

    Raises ValueError if the moments belong to another optimizer or to other parameters.
    """
    kind, groups = type(optimizer).__name__, optimizer.state_dict()["param_groups"]
    if saved["kind"] != kind:
        raise ValueError(f"its optimizer is {saved['kind']}, not {kind}")
    names = [name for group in groups for name in group["param_names"]]
    theirs = [name for group in saved["param_groups"] for name in group.get("param_names", [])]
    if theirs != names:
        ours, other = next((a, b) for a, b in zip_longest(names, theirs) if a != b)
        raise ValueError(f"its optimizer has the parameter {other} instead of {ours}")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, (name, parameter) in enumerate(zip(names, parameters)):
        moments = saved["state"].get(index, {})
        if moments.keys() != {"step", "exp_avg", "exp_avg_sq"}:
            raise ValueError(f"its optimizer has {sorted(moments) or 'no moments'} of {name}")
        for moment in ("exp_avg", "exp_avg_sq"):
            check_dtype_and_shape(f"{moment} of {name}", moments[moment], parameter)
    # with the saved groups, torch would silently use their learning rate and weight decay
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})


def check_dtype_and_shape(name: str, saved: Tensor, now: Tensor) -> None:
    """Raises ValueError if dtype or shape differs: torch would cast or broadcast."""
    kinds = [f"{t.dtype} {tuple(t.shape)}".removeprefix("torch.") for t in (saved, now)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"{name} is {kinds[0]}, expected {kinds[1]}")


def normalize_weight_names(weights: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The weights under Hugging Face's names. Prints a note if it removes prefixes of wrappers."""
    prefixes = r"^(_orig_mod\.|module\.)+"  # from torch.compile, DistributedDataParallel
    named = {re.sub(prefixes, "", name): tensor for name, tensor in weights.items()}
    if named.keys() != weights.keys():
        print(f"Note: the prefixes `module.` and `_orig_mod.` in {path.name} are ignored")
    ours = "embed_tokens.weight" in named  # the names in LlamaModel
    return {hf_name(name) if ours else name: tensor for name, tensor in named.items()}


def load_weights(
    model: LlamaModel,
    weights: Mapping[str, Tensor],
    path: Path,
    dtypes: Collection[torch.dtype] = FLOATS,
) -> None:
    """Copies the weights of the file `path`. Raises CheckpointError with those that do not fit."""
    weights = normalize_weight_names(weights, path)
    expected = " or ".join(map(str, dtypes))
    wrong = [(name, tensor.dtype) for name, tensor in weights.items() if tensor.dtype not in dtypes]
    problems = [f"{name} is {dtype}, expected {expected}" for name, dtype in wrong]
    try:
        if not problems:
            load_hf_weights(model, weights)
    except ValueError as error:
        problems = str(error).split("; ")
    if problems:
        more = f", and {len(problems) - 6} more" if len(problems) > 6 else ""
        fix = "choose another file, or name the model of these weights: --set model=NAME"
        raise CheckpointError(path, ", ".join(problems[:6]) + more, fix)


def load_model(
    path: Path, checkpoints: Path = Path("checkpoints")
) -> tuple[LlamaModel, Any, dict[str, Any]]:
    """The model of a checkpoint, its tokenizer (from transformers) and their provenance.

    path and checkpoints: see `checkpoint.find`.
    """
    from transformers import PreTrainedTokenizerFast  # takes 3 s, and training does not need it

    path, state = checkpoint.find(path, checkpoints)
    model = LlamaModel(ModelConfig(**state["config"]["architecture"]))
    load_weights(model, state["model"], path, [torch.float32])
    checkpoint.load_tokenizer(path.parent)  # checks the file first: its errors are one line
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path.parent, local_files_only=True)
    text = tokenizer.backend_tokenizer.to_str()
    if hashlib.sha256(text.encode()).hexdigest() != state["tokenizer"]["sha256"]:
        what = "this is not the tokenizer that the run was trained with"
        raise CheckpointError(path.parent / "tokenizer.json", what, "restore the run's files")
    source, name = state["reference"], f"{path.parent.name}, {state['step']} steps"
    text = {key: source[key] for key in ("text", "text_revision") if key in source}
    return model, tokenizer, {"name": name, "started_from": source["name"], **text, **state["data"]}


def load_foreign_model(error: ForeignError, reference) -> tuple[LlamaModel, Any, dict[str, Any]]:
    """The same for the weights that a ForeignError carries; raises `error` if it has none."""
    if error.weights is None:
        raise error
    model, path = LlamaModel(reference.config), Path(error.where)
    load_weights(model, error.weights, path)
    provenance = {"name": path.name, "architecture_and_tokenizer": reference.provenance.name}
    return model, reference.tokenizer, provenance
