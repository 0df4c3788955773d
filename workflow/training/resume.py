"""Exact resume: a checkpoint's contents are compared, then loaded into a new trainer."""

import platform
import random
import re
from collections.abc import Collection, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import AdamW

from SmolLm3 import LlamaModel, ModelConfig, hf_name, hf_state_dict, load_hf_weights
from workflow.errors import CheckpointError, ConfigError, ForeignError
from workflow.training import checkpoint, distributed

State = dict[str, Any]  # of a checkpoint, or a part of it; see `checkpoint.CONTENTS`
RANDOM_STATES = ("torch", "cuda", "numpy", "python")


def random_states() -> State:
    """Every random state of the process, as tensors and tuples that `weights_only=True` reads."""
    kind, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),  # empty without a GPU
        "numpy": (str(kind), torch.from_numpy(keys.astype(np.int64)), *map(float, rest)),
        "python": random.getstate(),
    }


def seed_random_states(seed: int) -> None:
    torch.manual_seed(seed)  # GPUs, too
    np.random.seed(seed)
    random.seed(seed)


def restore_random_states(states: State) -> None:
    """Restores those that are there; the GPUs' only on a machine with as many."""
    if "python" in states:
        random.setstate(states["python"])
    if "torch" in states:
        torch.set_rng_state(states["torch"])
    if "numpy" in states:
        kind, keys, position, has_gauss, gauss = states["numpy"]
        np.random.set_state((kind, keys.numpy(), int(position), int(has_gauss), gauss))
    if len(states.get("cuda", [])) == torch.cuda.device_count() > 0:
        torch.cuda.set_rng_state_all(states["cuda"])


def environment(device: torch.device) -> State:
    """Where a checkpoint is written: exact resume is promised only where all this is equal."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "torch": str(torch.__version__),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "device": name,
        "threads": torch.get_num_threads(),
        "processes": distributed.world_size(),
    }


def check_allowed(names: Collection[str]) -> None:
    """Raises ConfigError for names that are neither a key of `train` nor "random" (states)."""
    for name in names:
        if name != "random" and not name.startswith("train."):
            fix = "name a key such as train.learning_rate, or random"
            raise ConfigError(f"--allow {name}", "this must be as in the checkpoint", fix)


def compare(path: Path, saved: State, now: State, allowed: Collection[str] = ()) -> list[str]:
    """Prints a table of what differs, and returns its keys, if all are in `allowed`.

    Raises CheckpointError, with both values, if a key that is not allowed differs.
    """
    before, after = dict(checkpoint.flatten(saved)), dict(checkpoint.flatten(now))
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
            fix += f", or allow each: --allow {keys[0]}"
        both = [f"{name} is {old} in the checkpoint and {new} now" for name, old, new in rows]
        raise CheckpointError(path, ", ".join(both), fix)
    return keys


def restore(
    path: Path, state: State, fixed: State, model: LlamaModel, optimizer: AdamW, allowed: Collection
) -> None:
    """Loads the checkpoint `path` with this `state` into model, optimizer and random states.

    fixed: the parts of it that must be equal, but for what is `allowed`; a line says what makes the
    resume inexact. Raises CheckpointError; then the trainer must not be used.
    """
    inexact = compare(path, {part: state[part] for part in fixed}, fixed, allowed)
    missing = [name for name in RANDOM_STATES if name not in state["random"]]
    if missing and "random" not in allowed:
        what = f"the random states {', '.join(missing)} are missing"
        raise CheckpointError(path, what, "choose another, or, inexactly: --allow random")
    weights = normalize_names(state["model"], path)
    try:
        for name, tensor in hf_state_dict(model).items():
            check_alike(name, weights.get(name, tensor), tensor)
        load_optimizer(optimizer, state["optimizer"])
        load_weights(model, weights, path)
        restore_random_states(state["random"])
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        what = f"it does not fit ({type(error).__name__}: {error})"
        raise CheckpointError(path, what, "choose another") from error
    if inexact + missing:
        print(f"Note: {', '.join(inexact + missing)} as allowed: the resume is not exact")


def optimizer_state(optimizer: AdamW) -> State:
    return {"kind": type(optimizer).__name__, **optimizer.state_dict()}


def load_optimizer(optimizer: AdamW, saved: State) -> None:
    """Loads saved moments into a new optimizer. Raises ValueError if they are not its own.

    The groups stay the new one's: torch would silently take rate and decay from the file.
    """
    kind, groups = type(optimizer).__name__, optimizer.state_dict()["param_groups"]
    if saved["kind"] != kind:
        raise ValueError(f"its optimizer is {saved['kind']}, not {kind}")
    names = [name for group in groups for name in group["param_names"]]
    theirs = [name for group in saved["param_groups"] for name in group.get("param_names", [])]
    if theirs != names:
        ours, other = next((a, b) for a, b in zip_longest(names, theirs) if a != b)
        raise ValueError(f"its optimizer has the parameter {other} where this one has {ours}")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, (name, parameter) in enumerate(zip(names, parameters)):
        moments = saved["state"].get(index, {})
        if moments.keys() != {"step", "exp_avg", "exp_avg_sq"}:
            raise ValueError(f"its optimizer has {sorted(moments) or 'no moments'} of {name}")
        for moment in ("exp_avg", "exp_avg_sq"):
            check_alike(f"{moment} of {name}", moments[moment], parameter)
    # with the saved groups, torch would silently take rate and decay from the file
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})


def check_alike(name: str, saved: Tensor, now: Tensor) -> None:
    """Raises ValueError if dtype or shape differ: torch would cast or broadcast."""
    kinds = [f"{t.dtype} {tuple(t.shape)}".removeprefix("torch.") for t in (saved, now)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"{name} is {kinds[0]}, expected {kinds[1]}")


def normalize_names(weights: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The same under Hugging Face's names; a line says if a wrapper's prefix was removed."""
    prefixes = r"^(_orig_mod\.|module\.)+"  # of torch.compile, of DistributedDataParallel
    named = {re.sub(prefixes, "", name): tensor for name, tensor in weights.items()}
    if named.keys() != weights.keys():
        print(f"Note: the prefixes `module.` and `_orig_mod.` in {path.name} are ignored")
    bare = "embed_tokens.weight" in named  # LlamaModel's own names
    return {hf_name(name) if bare else name: tensor for name, tensor in named.items()}


def load_weights(model: LlamaModel, weights: Mapping[str, Tensor], path: Path) -> None:
    """Copies the weights of the file `path`. Raises CheckpointError, naming what does not fit."""
    weights = normalize_names(weights, path)
    odd = [(name, t.dtype) for name, t in weights.items() if not t.is_floating_point()]
    faults = [f"{name} is {dtype}, no float" for name, dtype in odd]
    try:
        if not faults:
            load_hf_weights(model, weights)
    except ValueError as error:
        faults = str(error).split("; ")
    if faults:
        more = f", and {len(faults) - 6} more" if len(faults) > 6 else ""
        fix = "choose another file, or name their model: --set model=NAME"
        raise CheckpointError(path, ", ".join(faults[:6]) + more, fix)


def load_model(path: Path) -> tuple[LlamaModel, Any, dict[str, Any]]:
    """A checkpoint's model, its tokenizer (transformers') and their provenance."""
    from transformers import PreTrainedTokenizerFast  # 3 s that training does not need

    state = checkpoint.load(path)
    model = LlamaModel(ModelConfig(**state["config"]["architecture"]))
    load_weights(model, state["model"], path)
    checkpoint.load_tokenizer(path.parent)  # checked first: its errors are one line
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path.parent, local_files_only=True)
    source, name = state["reference"], f"{path.parent.name}, {state['step']} steps"
    text = {key: source[key] for key in ("text", "text_revision") if key in source}
    return model, tokenizer, {"name": name, "started_from": source["name"], **text, **state["data"]}


def load_foreign_model(error: ForeignError, reference) -> tuple[LlamaModel, Any, dict[str, Any]]:
    """The same for another program's weights; raises `error` itself if it has found none."""
    if error.weights is None:
        raise error
    model, path = LlamaModel(reference.config), Path(error.where)
    load_weights(model, error.weights, path)
    provenance = {"name": path.name, "architecture_and_tokenizer": reference.provenance.name}
    return model, reference.tokenizer, provenance
