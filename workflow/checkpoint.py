"""Write whole, read verified, one writer at a time.

A checkpoint is one torch zip file with everything that the next step depends on. It is written
beside its name, synced, read back and only then renamed, so that under its name there is always a
whole file, old or new. It is read only after the CRC of every record was checked, which torch.load
never does, and with `weights_only=True`.
"""

from __future__ import annotations

import fcntl
import os
import platform
import random
import re
import shutil
import socket
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from tokenizers import Tokenizer

from . import WorkflowError

FORMAT = "smollm-workflow checkpoint"
FORMAT_VERSION = 1
# What the next step depends on. A file that lacks any of it cannot be resumed.
CONTENTS = {
    "format": str,
    "format_version": int,
    "step": int,
    "model": dict,  # Hugging Face's name -> tensor
    "optimizer": dict,  # torch's own state dict, with the parameters' names
    "random": dict,  # every random state
    "data": dict,  # hash and sizes of the text; with config's seed, the order of the data
    "config": dict,  # the settings of the run, as plain values
    "tokenizer": dict,  # end of text, vocabulary, sha256
    "reference": dict,  # what the weights started from, honestly named
    "environment": dict,  # where it was written: bit-exact resume is promised only there
}


class CheckpointError(WorkflowError):
    """The checkpoint is damaged, foreign, or not of this run."""

    exit_code = 3


class DiskError(WorkflowError):
    """There is not enough room, or no permission."""

    exit_code = 6


class BusyError(WorkflowError):
    """Another process works in this folder."""

    exit_code = 7


# --- write ----------------------------------------------------------------------------------------


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes `state` under `path`, whole or not at all.

    Raises DiskError; what was there before stays.
    """
    state = {"format": FORMAT, "format_version": FORMAT_VERSION, **state}
    unfinished = path.with_name(f"{path.name}.tmp.{os.getpid()}")
    try:
        with open(unfinished, "wb") as file:  # given a path, torch.save would store its name
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        check_archive(unfinished)
        os.replace(unfinished, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # of a full disk, torch makes a RuntimeError
        raise disk_error(path, state, error) from error
    finally:
        unfinished.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def disk_error(path: Path, state: dict[str, Any], error: Exception) -> DiskError:
    needed, free = state_bytes(state) / 1e6, shutil.disk_usage(path.parent).free / 1e6
    what = f"it cannot be written ({error}), it takes {needed:.1f} MB, {free:.1f} MB are free"
    return DiskError(path, what, "free some room or set paths.checkpoints")


def state_bytes(value: Any) -> int:
    """Bytes of all tensors in nested dicts and sequences."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, dict):
        value = list(value.values())
    return sum(map(state_bytes, value)) if isinstance(value, (list, tuple)) else 0


def remove_unfinished(folder: Path) -> None:
    """Removes what a killed process left half written; the folder must be locked."""
    for file in folder.glob("*.tmp.*"):
        print(f"Removed {file.name}, which a killed process left half written")
        file.unlink()


def prune(folder: Path, keep: int, milestones: set[int]) -> None:
    """Deletes all but the newest `keep` checkpoints and those at `milestones`."""
    steps = sorted(found(folder), reverse=True)
    for step in steps[keep:]:
        if step not in milestones:
            path_of(folder, step).unlink()


# --- read -----------------------------------------------------------------------------------------


def load(path: Path) -> dict[str, Any]:
    """The verified contents, on the CPU.

    Raises CheckpointError, before anything is used, for all that is not whole.
    """
    if not path.is_file():
        raise CheckpointError(path, "there is no such file", f"look in {path.parent}")
    check_archive(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling a file that is not ours can fail in any way
        what = f"it is not a checkpoint of this project ({type(error).__name__})"
        raise CheckpointError(path, what, "choose another") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(path, "it is not a checkpoint of this project", "choose another")
    wrong = [name for name, kind in CONTENTS.items() if not isinstance(state.get(name), kind)]
    if wrong:
        what = f"it lacks {', '.join(wrong)}"
        raise CheckpointError(path, what, "it cannot be resumed, choose another")
    if state["format_version"] != FORMAT_VERSION:
        what = f"its format is version {state['format_version']}, this code reads {FORMAT_VERSION}"
        raise CheckpointError(path, what, "use the release that wrote it")
    return state


def check_archive(path: Path) -> None:
    """Reads every record of the zip file and compares its CRC.

    Raises CheckpointError with the damaged record.
    """
    do = "delete it and run again: the newest whole checkpoint is taken up"
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, OverflowError) as error:
        raise CheckpointError(path, f"it is damaged or no checkpoint ({error})", do) from None
    if damaged:
        raise CheckpointError(path, f"record {damaged} is damaged", do)


def is_whole(path: Path) -> bool:
    """Whether there is an undamaged archive."""
    try:
        check_archive(path)
    except (CheckpointError, FileNotFoundError):
        return False
    return True


def differences(saved: Any, now: Any, name: str) -> Iterator[str]:
    """In words, where two nested plain values differ."""
    if isinstance(saved, dict) and isinstance(now, dict):
        for key in [*saved, *(key for key in now if key not in saved)]:
            yield from differences(saved.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif saved != now:
        yield f"{name} is {saved!r} in the checkpoint and {now!r} now"


def compare(path: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises CheckpointError, with both values, where a resume would use something else."""
    found = list(differences(saved, now, ""))
    if found:
        raise CheckpointError(
            path, ", ".join(found), "give the profile and settings it was made with"
        )


def path_of(folder: Path, step: int) -> Path:
    return folder / f"checkpoint_{step}.pt"


def found(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder."""
    names = (
        re.fullmatch(r"checkpoint_(\d+)\.pt", file.name) for file in folder.glob("checkpoint_*.pt")
    )
    return [int(match[1]) for match in names if match]


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint of a folder; damaged ones are passed over, each with one line."""
    for step in sorted(found(folder), reverse=True):
        try:
            return path_of(folder, step), load(path_of(folder, step))
        except CheckpointError as error:
            print(f"passed over: {error}")
    return None


def load_tokenizer(folder: Path) -> Tokenizer:
    """The run's tokenizer, which lies beside its checkpoints."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(file, "the run's tokenizer is missing", "put it back")
    return Tokenizer.from_file(str(file))


# --- random states, environment, lock -------------------------------------------------------------


def random_states() -> dict[str, Any]:
    """Every random state of the process, as tensors and tuples that `weights_only=True` reads."""
    kind, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (str(kind), torch.from_numpy(keys.astype(np.int64)), *map(float, rest)),
        "python": random.getstate(),
    }


def seed_random_states(seed: int) -> None:
    """Starts every random state of the process from `seed`, so that two runs start alike."""
    torch.manual_seed(seed)  # seeds the GPUs too
    np.random.seed(seed)
    random.seed(seed)


def restore_random_states(states: dict[str, Any]) -> None:
    """The inverse. Raises KeyError when one is missing; other machines' GPUs are passed over."""
    kind, keys, position, has_gauss, gauss = states["numpy"]
    keys = keys.numpy().astype(np.uint32)
    random.setstate(states["python"])
    torch.set_rng_state(states["torch"])
    np.random.set_state((kind, keys, int(position), int(has_gauss), gauss))
    if len(states["cuda"]) == torch.cuda.device_count() > 0:
        torch.cuda.set_rng_state_all(states["cuda"])


def environment(device: torch.device) -> dict[str, Any]:
    """What bit-exact resume depends on, beside the checkpoint."""
    gpu = device.type == "cuda"
    return {
        "torch": str(torch.__version__),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name(device) if gpu else platform.machine(),
        "threads": torch.get_num_threads(),
    }


def lock(folder: Path) -> BinaryIO:
    """Locks a run's folder for this process until the file returned is closed.

    Raises BusyError, naming the holder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+b")
    except OSError as error:
        what = f"it cannot be written ({error.strerror})"
        raise DiskError(folder, what, "set paths.checkpoints") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        holder = file.read().decode() or "another process"
        file.close()
        raise BusyError(folder, f"in use by {holder}", "wait for it, or stop it") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
    file.flush()
    return file
