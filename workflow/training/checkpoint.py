"""Checkpoints: one torch file (a zip archive) each, with all that the next step depends on.

Writing is atomic: a temporary file is written, checked, synced and then renamed. This check reads
what the system still has in memory: it finds a partial file, not a bad disk. Reading checks the
list of the archive's records, the CRC of each record (torch checks none), what the pickle calls,
the contents, their digest, and NaN. `torch.load` runs with `weights_only=True`.
"""

import os
import pickletools
import re
import zipfile
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from workflow.errors import (
    CheckpointError,
    DamagedError,
    ForeignError,
    MissingError,
    NonFiniteError,
)
from workflow.files import atomic_write, flatten, sha256_of

FORMAT = "smollm-workflow checkpoint"
FORMAT_VERSION = 3
# The contents that a resume needs, with their types.
CONTENTS = {
    "format": str,
    "format_version": int,
    "step": int,
    "model": dict,  # Hugging Face's name -> tensor
    "optimizer": dict,  # its class, and torch's state dict with the names of the parameters
    "random": dict,  # all random states
    "data": dict,  # hash and size of the text; data and seed determine every batch
    "config": dict,  # the settings that change numbers, as numbers, strings and lists
    "settings": dict,  # all settings
    "log": dict,  # number and hash of the log's rows
    "tokenizer": dict,  # sha256, size of the vocabulary, end-of-text token
    "reference": dict,  # provenance of the first weights and of the text
    "environment": dict,  # torch, device, threads; the resume is bit-exact if they are equal
    "digest": str,  # sha256 of all of the above
}
# The functions that a pickle of tensors calls. torch also allows bytearray, of any size.
ALLOWED_CALLS = re.compile(
    r"collections OrderedDict|torch._utils _rebuild_(tensor_v2|parameter)|torch \w+Storage"
)
MAX_VALUES = 200_000  # a small file can contain lists of lists with billions of values
FOLDER_KEY = "paths.checkpoints"  # the configuration key of the folder
TOKENIZER = "tokenizer.json"  # in the folder of a run
FILE_KINDS = (  # of files that are no archives: how they start, and a description
    (rb"$", "it is empty"),
    (rb"version https://git-lfs", "it is a git-LFS pointer, not the file: type git lfs pull"),
    (rb"(?i)\s*<(!doctype|html|head|\?xml)", "it is an HTML page, perhaps of a failed download"),
    (rb"\x80[\x02-\x05]", "it is a plain pickle, which could run any code"),
    (rb"[\t\n\r -~]{4,64}$", "it is a text file"),
)


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes `state` atomically. After NonFiniteError or DiskError, an older file is unchanged."""
    if names := non_finite_tensors(state):
        what = f"{names[0]} is not finite at step {state['step']}, nothing is saved"
        raise NonFiniteError(path, what, "lower train.learning_rate")
    state = {"format": FORMAT, "format_version": FORMAT_VERSION, **state}
    state["digest"] = sha256_of(flatten(state))
    size = sum(value.nbytes for _, value in flatten(state) if isinstance(value, Tensor))
    with atomic_write(path, FOLDER_KEY, size) as temporary:
        with open(temporary, "wb") as file:  # given a path, torch.save would store its name
            torch.save(state, file)
        check_archive(temporary)


def non_finite_tensors(state: Any) -> list[str]:
    """The names of the tensors with NaN or inf."""
    tensors = ((name, value) for name, value in flatten(state) if isinstance(value, Tensor))
    return [name for name, t in tensors if t.is_floating_point() and not t.isfinite().all()]


def load(path: Path) -> dict[str, Any]:
    """Reads and verifies a checkpoint; its tensors are on the CPU.

    Raises CheckpointError. If the file is damaged, it names the newest undamaged one of the folder.
    """
    try:
        return _load(path)
    except DamagedError as error:
        others = (checkpoint_path(path.parent, step) for step in steps_in(path.parent))
        good = next((other.name for other in others if other != path and is_valid(other)), None)
        fix = f"resume from {good}, the newest good one" if good else "its folder has no good one"
        raise DamagedError(path, error.what, fix) from None


def _load(path: Path) -> dict[str, Any]:
    state = read_torch_file(path)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise foreign_error(path, state)
    if (version := state.get("format_version")) != FORMAT_VERSION:
        what = f"its format is version {version}, this code reads version {FORMAT_VERSION}"
        raise CheckpointError(path, what, "use the release that wrote it")
    missing = [name for name, kind in CONTENTS.items() if not isinstance(state.get(name), kind)]
    if missing:
        what = f"it has no {', '.join(missing)}"
        raise CheckpointError(path, what, "it cannot be resumed, choose another file")
    if state.pop("digest") != sha256_of(flatten(state)):
        raise DamagedError(path, "its contents do not match its digest", "choose another file")
    if step_in(path) not in (None, state["step"]):  # a copy over another checkpoint
        raise DamagedError(path, f"it is the checkpoint of step {state['step']}", "rename it")
    if names := non_finite_tensors(state):
        raise CheckpointError(path, f"{names[0]} contains NaN or inf", "choose an older one")
    return state


def read_torch_file(path: Path) -> Any:
    """The contents of any torch file, on the CPU. Raises CheckpointError."""
    check_archive(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        values = list(islice(flatten(content), MAX_VALUES + 1))
    except Exception as error:  # a file of another program can cause any error
        what = f"it cannot be read as a checkpoint ({type(error).__name__})"
        raise DamagedError(path, what, "choose another file") from None
    for name, t in ((name, value) for name, value in values if isinstance(value, Tensor)):
        if t.layout != torch.strided or t.nbytes > t.untyped_storage().nbytes():
            raise DamagedError(path, f"{name} is larger than its record", "choose another file")
    if len(values) > MAX_VALUES:
        raise DamagedError(path, f"it has over {MAX_VALUES} values", "choose another file")
    return content


def foreign_error(path: Path, content: Any) -> ForeignError:
    """The error for a valid torch file of another program, with its weights if it has some."""
    keys = ("model", "state_dict", "model_state_dict", "module")  # used by other programs
    places = [content, *map(content.get, keys)] if isinstance(content, dict) else []
    for weights in places:
        items = weights.items() if isinstance(weights, dict) else ()
        if items and all(isinstance(k, str) and isinstance(t, Tensor) for k, t in items):
            if names := non_finite_tensors(weights):
                what = f"{names[0]} contains NaN or inf"
                raise CheckpointError(path, what, "choose an older one")
            what = f"it has {len(items)} weights, but no moments, step and random states"
            fix = f"it can be evaluated, not resumed: main.py evaluate {path} --data TEXT"
            error = ForeignError(path, what, fix)
            error.weights = weights
            return error
    found = ", ".join(map(str, islice(content, 5))) if places else "no keys"
    what = f"it is not a checkpoint of this project (a {type(content).__name__} with {found})"
    return ForeignError(path, what, "choose another file")


def check_archive(path: Path) -> None:
    """Raises CheckpointError if a file is unreadable, damaged or unsafe; unpickles nothing."""
    try:
        with zipfile.ZipFile(path) as archive:
            if problem := archive_problem(archive, path.stat().st_size):
                raise DamagedError(path, problem, "choose another file")
    except FileNotFoundError:
        raise MissingError(path, "there is no such file", "see: main.py runs") from None
    except OSError as error:
        what = f"it cannot be read ({error.strerror or error})"
        raise CheckpointError(path, what, "choose another file") from None
    except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, OverflowError) as error:
        with open(path, "rb") as file:
            start = file.read(64)
        kinds = (kind for pattern, kind in FILE_KINDS if re.match(pattern, start))
        what = next(kinds, f"it is damaged ({error})")
        raise DamagedError(path, what, "choose another file") from None


def archive_problem(archive: zipfile.ZipFile, size: int) -> str | None:
    """The first thing in an archive that `torch.save` never writes. `size`: of the file, bytes."""
    names: set[str] = set()
    for record in archive.infolist():
        name = record.filename
        if name in names:
            return f"record {name!r} appears twice"
        if ".." in name or not re.fullmatch(r"[\w.-]+(/[\w.-]+)+", name):
            return f"record {name!r} has a name that torch never uses"
        if record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size:
            return f"record {name!r} is compressed, which torch never does"
        names.add(name)
    if len({name.partition("/")[0] for name in names}) > 1:
        return "its records are in more than one folder"
    total = sum(record.file_size for record in archive.infolist())
    if total > size:
        return f"its records claim {total} bytes, the file has {size}"
    if damaged := archive.testzip():
        return f"record {damaged} is damaged"
    calls = (forbidden_call(archive.read(name)) for name in names if name.endswith(".pkl"))
    return next((f"its pickle calls {call}" for call in calls if call), None)


def forbidden_call(pickle: bytes) -> str | None:
    """The first function that a pickle calls although tensors do not need it."""
    operations = pickletools.genops(pickle)
    calls = (argument for operation, argument, _ in operations if operation.name == "GLOBAL")
    forbidden = (call for call in calls if not ALLOWED_CALLS.fullmatch(call))
    return next((call.replace(" ", ".") for call in forbidden), None)


def is_valid(path: Path) -> bool:
    """Whether the archive is undamaged; its contents are not checked."""
    with suppress(CheckpointError):
        check_archive(path)
        return True
    return False


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"checkpoint_{step}.pt"


def steps_in(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, the newest first."""
    steps = map(step_in, folder.glob("*.pt"))
    return sorted((step for step in steps if step is not None), reverse=True)


def step_in(path: Path) -> int | None:
    """The step in the name of a checkpoint; None if it has another name."""
    match = re.fullmatch(r"checkpoint_(\d+)\.pt", path.name)
    return int(match[1]) if match else None


def load_newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest undamaged checkpoint, as path and state; None if there is none.

    Raises CheckpointError if all are damaged, or if one is from another program or version.
    """
    steps = steps_in(folder)
    for step in steps:
        try:
            return checkpoint_path(folder, step), _load(checkpoint_path(folder, step))
        except (DamagedError, MissingError) as error:  # missing: a broken link
            print(f"Skipped a damaged checkpoint: {error.where}: {error.what}")
    if steps:
        what = f"all of its {len(steps)} checkpoints are damaged"
        raise CheckpointError(folder, what, "move them away to start a new run")
    return None


def find(path: Path, checkpoints: Path) -> tuple[Path, dict[str, Any]]:
    """The checkpoint `path`, or the newest one of a run: its path and state.

    A run is a folder with checkpoints, the folder of its log, or its name: then the run's folder
    is in `checkpoints`. The path is that of a file next to the run's tokenizer, not of a link to
    it. Raises CheckpointError.
    """
    if not os.path.isfile(path):  # Path.is_file can raise for an invalid name
        for folder in filter(os.path.isdir, (path, checkpoints / path.name)):
            if found := load_newest(folder):
                return found
        if os.path.isdir(path):
            raise MissingError(path, "no checkpoint in this folder", "choose another folder")
    while os.path.islink(path) and not (path.parent / TOKENIZER).is_file() and path.is_file():
        path = path.parent / path.readlink()
    return path, load(path)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of the run in this folder. Raises CheckpointError."""
    file = folder / TOKENIZER
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the tokenizers library raises nothing more specific
        what = f"the run's tokenizer is missing or damaged ({error})"
        raise CheckpointError(file, what, "restore the file") from None
