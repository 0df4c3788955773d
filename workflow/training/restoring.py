"""What a checkpoint holds goes back into fresh objects, after all of it was compared."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from SmolLm3 import LlamaModel, hf_state_dict, load_hf_weights
from workflow.errors import CheckpointError, ConfigError
from workflow.training import checkpoint, randomness
from workflow.training.step import check_alike, load_optimizer

MOST_FAULTS = 6  # that one line names


def check_allowed(names: Collection[str]) -> None:
    """Raises ConfigError for what no resume may change.

    Keys of `train` may, as the YAML names them ("train.learning_rate"), and missing random states.
    """
    for name in names:
        if name != "random" and not name.startswith("train."):
            do = "name a key such as train.learning_rate, or random"
            raise ConfigError(f"--allow {name}", "this must be as it was", do)


def restore(
    path: Path,
    state: dict[str, Any],
    now: dict[str, Any],
    model: LlamaModel,
    optimizer: torch.optim.AdamW,
    allowed: Collection[str],
) -> list[str]:
    """Fills model, optimizer and random states; returns what is not as it was, but allowed.

    state: of the file `path`. now: what must be in it alike. Raises CheckpointError.
    """
    inexact = compare(path, {part: state[part] for part in now}, now, allowed)
    missing = [name for name in randomness.SOURCES if name not in state["random"]]
    if missing and "random" not in allowed:
        what = f"the random states {', '.join(missing)} are missing"
        raise CheckpointError(path, what, "choose another, or, inexactly: --allow random")
    weights = checkpoint.canonical(state["model"], path)
    try:
        for name, tensor in hf_state_dict(model).items():
            if name in weights:
                check_alike(name, weights[name], tensor)
        load_optimizer(optimizer, state["optimizer"])
        fill(model, weights, path)
        randomness.restore_random_states(state["random"])
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        what = f"it does not fit ({type(error).__name__}: {error})"
        raise CheckpointError(path, what, "choose another") from error
    return inexact + missing


def compare(
    path: Path, saved: dict[str, Any], now: dict[str, Any], allowed: Collection[str] = ()
) -> list[str]:
    """Prints a table of what differs, and returns the keys that may: those in `allowed`.

    Raises CheckpointError, with both values, where a resume would use something else.
    """
    before, after = dict(checkpoint.leaves(saved)), dict(checkpoint.leaves(now))
    differ = [name for name in before | after if before.get(name) != after.get(name)]
    if not differ:
        return []
    rows = [("setting", "checkpoint", "now")]
    rows += [(name, f"{before.get(name)!r:.70}", f"{after.get(name)!r:.70}") for name in differ]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    keys = [name.removeprefix("config.") for name in differ]
    forbidden = [key for key in keys if not any(f"{key}.".startswith(f"{a}.") for a in allowed)]
    told = [f"{name} is {old} in the checkpoint and {new} now" for name, old, new in rows[1:]]
    if forbidden:
        may = [key for key in keys if key.startswith("train.")]
        more = f", or allow each: --allow {may[0]}" if may == keys else ""
        do = f"give the settings and files it was made with{more}"
        raise CheckpointError(path, ", ".join(told), do)
    return keys


def fill(model: LlamaModel, weights: Mapping[str, Tensor], path: Path) -> None:
    """Copies the weights of the file `path`. Raises CheckpointError, naming what does not fit."""
    weights = checkpoint.canonical(weights, path)
    faults = [f"{name} holds NaN or inf" for name in checkpoint.not_finite(weights)]
    faults += [
        f"{n} is {t.dtype}, no float" for n, t in weights.items() if not t.is_floating_point()
    ]
    try:
        if not faults:
            load_hf_weights(model, weights)
    except ValueError as error:
        faults = str(error).split("; ")
    if faults:
        more = f", and {len(faults) - MOST_FAULTS} more" if len(faults) > MOST_FAULTS else ""
        what, do = ", ".join(faults[:MOST_FAULTS]) + more, "or name their model: --set model=NAME"
        raise CheckpointError(path, what, f"choose another file, {do}")
