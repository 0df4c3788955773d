"""Checkpoints: one torch zip file each, with everything that the next step depends on.

Written next to its name, read back, synced and only then renamed. Reading checks the archive's
directory, every record's CRC (torch checks none), `torch.load` with `weights_only=True`, the
contents, a digest over all of them, and NaN.
"""

import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from workflow.config.settings import RENAMED_KEYS
from workflow.errors import CheckpointError, DamagedError, ForeignError, NonFiniteError
from workflow.files import atomic_write, sha256_of

FORMAT = "smollm-workflow checkpoint"
FORMAT_VERSION = 3  # 2, which is also read, has other names of settings
# What a checkpoint must hold to be resumed.
CONTENTS = {
    "format": str,
    "format_version": int,
    "step": int,
    "model": dict,  # Hugging Face's name -> tensor
    "optimizer": dict,  # its kind, and torch's own state dict, with the parameters' names
    "random": dict,  # every random state
    "data": dict,  # hash and sizes of the text; with config's seed, the order of the data
    "config": dict,  # the settings of the run, as plain values
    "tokenizer": dict,  # end of text, vocabulary, sha256
    "reference": dict,  # provenance of the weights and the text that the run started from
    "environment": dict,  # where it was written: exact resume is promised only there
    "digest": str,  # sha256 over all of the above
}
# All that a pickle of tensors calls. torch's own allow-list has bytearray, too, of any size.
CALLS = re.compile(
    r"collections OrderedDict|torch._utils _rebuild_(tensor_v2|parameter)|torch \w+Storage"
)
MAX_VALUES = 200_000  # of nested contents; aliases can make endless ones of a small file
SETTING = "paths.checkpoints"  # the key of the YAML that says where checkpoints are
LOOKS_LIKE = (  # how a file that is no archive starts, and what it then is
    (rb"$", "it is empty"),
    (rb"version https://git-lfs", "it is a git-LFS pointer, not the file: type git lfs pull"),
    (rb"(?i)\s*<(!doctype|html|head|\?xml)", "it is an HTML page, perhaps of a failed download"),
    (rb"\x80[\x02-\x05]", "it is a plain pickle, which could run any code"),
    (rb"[\t\n\r -~]{4,64}$", "it is a text file"),
)


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes `state` atomically. Raises NonFiniteError or DiskError; the file before stays."""
    if names := not_finite(state):
        what = f"{names[0]} is not finite at step {state['step']}, nothing is saved"
        raise NonFiniteError(path, what, "lower train.learning_rate")
    state = {"format": FORMAT, "format_version": FORMAT_VERSION, **state}
    state["digest"] = sha256_of(flatten(state))
    size = sum(value.nbytes for _, value in flatten(state) if isinstance(value, Tensor))
    with atomic_write(path, SETTING, size) as temporary:
        with open(temporary, "wb") as file:  # given a path, torch.save would store its name
            torch.save(state, file)
        check_archive(temporary)


def flatten(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested dicts and sequences, with its dotted name."""
    if not isinstance(value, (Mapping, list, tuple)) or not value:
        yield name, value
        return
    for key, part in value.items() if isinstance(value, Mapping) else enumerate(value):
        yield from flatten(part, f"{name}.{key}" if name else str(key))


def not_finite(state: Any) -> list[str]:
    """The names of the tensors that hold NaN or inf."""
    tensors = ((name, value) for name, value in flatten(state) if isinstance(value, Tensor))
    return [name for name, t in tensors if t.is_floating_point() and not t.isfinite().all()]


def load(path: Path) -> dict[str, Any]:
    """The verified contents, on the CPU.

    Raises CheckpointError; of a damaged file, it names the newest good one next to it.
    """
    try:
        return _load(path)
    except DamagedError as error:
        others = (checkpoint_path(path.parent, step) for step in steps_in(path.parent))
        good = next((other.name for other in others if other != path and is_valid(other)), None)
        fix = f"resume from {good}, the newest good one" if good else "no good one is next to it"
        raise DamagedError(path, error.what, fix) from None


def _load(path: Path) -> dict[str, Any]:
    state = read(path)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise foreign_error(path, state)
    if state.get("format_version") not in (2, FORMAT_VERSION):
        what = f"its format is version {state.get('format_version')}, this code's {FORMAT_VERSION}"
        raise CheckpointError(path, what, "use the release that wrote it")
    missing = [name for name, kind in CONTENTS.items() if not isinstance(state.get(name), kind)]
    if missing:
        what = f"it lacks {', '.join(missing)}"
        raise CheckpointError(path, what, "it cannot be resumed, choose another")
    if state.pop("digest") != sha256_of(flatten(state)):
        raise DamagedError(path, "its contents do not match its digest", "choose another")
    if names := not_finite(state):
        raise CheckpointError(path, f"{names[0]} holds NaN or inf", "choose an older one")
    settings = state["config"].get("train", {})
    for old in settings.keys() & RENAMED_KEYS:
        settings[RENAMED_KEYS[old]] = settings.pop(old)
    return state


def read(path: Path) -> Any:
    """What a torch file holds, ours or not, on the CPU. Raises CheckpointError."""
    check_archive(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        values = list(islice(flatten(content), MAX_VALUES + 1))
    except Exception as error:  # reading a file that is not ours can fail in any way
        what = f"it cannot be read as a checkpoint ({type(error).__name__})"
        raise DamagedError(path, what, "choose another") from None
    for name, t in ((name, value) for name, value in values if isinstance(value, Tensor)):
        if t.layout != torch.strided or t.nbytes > t.untyped_storage().nbytes():
            raise DamagedError(path, f"{name} is larger than its record", "choose another")
    if len(values) > MAX_VALUES:
        raise DamagedError(path, "its contents have no end", "choose another")
    return content


def foreign_error(path: Path, content: Any) -> ForeignError:
    """Why a valid torch file of another program cannot be resumed; with its weights, if any."""
    keys = ("model", "state_dict", "model_state_dict", "module")  # of others' checkpoints
    places = [content, *map(content.get, keys)] if isinstance(content, dict) else []
    for weights in places:
        items = weights.items() if isinstance(weights, dict) else ()
        if items and all(isinstance(k, str) and isinstance(t, Tensor) for k, t in items):
            if names := not_finite(weights):
                raise CheckpointError(path, f"{names[0]} holds NaN or inf", "choose an older one")
            what = f"it has {len(items)} weights, but no moments, step or random states of a run"
            fix = f"it can be evaluated, not resumed: main.py evaluate {path} --data TEXT"
            error = ForeignError(path, what, fix)
            error.weights = weights
            return error
    found = ", ".join(map(str, islice(content, 5))) if places else "no keys"
    what = f"it is not a checkpoint of this project (a {type(content).__name__} with {found})"
    return ForeignError(path, what, "choose another")


def check_archive(path: Path) -> None:
    """Raises CheckpointError if a torch file cannot be read or is damaged; unpacks nothing."""
    try:
        with zipfile.ZipFile(path) as archive:
            if wrong := suspicious(archive.infolist(), path.stat().st_size):
                raise DamagedError(path, f"{wrong}, nothing was unpacked", "choose another")
            if record := archive.testzip():
                raise DamagedError(path, f"record {record} is damaged", "choose another")
            for record in archive.namelist():
                if record.endswith(".pkl") and (call := odd_call(archive.read(record))):
                    what = f"its pickle calls {call}, nothing of it was run"
                    raise DamagedError(path, what, "choose another")
    except FileNotFoundError:
        raise CheckpointError(path, "there is no such file", "choose another") from None
    except OSError as error:
        what = f"it cannot be read ({error.strerror or error})"
        raise CheckpointError(path, what, "choose another") from None
    except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, OverflowError) as error:
        with open(path, "rb") as file:
            start = file.read(64)
        kinds = (words for pattern, words in LOOKS_LIKE if re.match(pattern, start))
        what = next(kinds, f"it is damaged ({error})")
        raise DamagedError(path, what, "choose another") from None


def suspicious(records: list[zipfile.ZipInfo], size: int) -> str | None:
    """What in an archive's directory torch.save never writes, in words."""
    names: set[str] = set()
    for record in records:
        name = record.filename
        if name in names:
            return f"record {name!r} appears twice"
        if ".." in name or not re.fullmatch(r"[\w.-]+(/[\w.-]+)+", name):
            return f"record {name!r} has a name that torch never gives"
        if record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size:
            return f"record {name!r} is compressed, which torch never does"
        names.add(name)
    if len({name.partition("/")[0] for name in names}) > 1:
        return "its records are in more than one folder"
    total = sum(record.file_size for record in records)
    return f"its records claim {total} bytes, the file has {size}" if total > size else None


def odd_call(pickle: bytes) -> str | None:
    """What a pickle calls, if that is more than tensors need."""
    operations = pickletools.genops(pickle)
    calls = [argument for operation, argument, _ in operations if operation.name == "GLOBAL"]
    return next((call.replace(" ", ".") for call in calls if not CALLS.fullmatch(call)), None)


def is_valid(path: Path) -> bool:
    """Whether the archive is undamaged; its contents are not looked at."""
    with suppress(CheckpointError):
        check_archive(path)
        return True
    return False


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"checkpoint_{step}.pt"


def steps_in(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, the newest first."""
    matches = [re.fullmatch(r"checkpoint_(\d+)\.pt", file.name) for file in folder.glob("*.pt")]
    return sorted((int(match[1]) for match in matches if match), reverse=True)


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest good checkpoint. Raises CheckpointError if all are damaged, or one is foreign."""
    steps = steps_in(folder)
    for step in steps:
        try:
            return checkpoint_path(folder, step), _load(checkpoint_path(folder, step))
        except DamagedError as error:
            print(f"Skipped a damaged checkpoint: {error.where}: {error.what}")
    if steps:
        what = f"all of its {len(steps)} checkpoints are damaged"
        raise CheckpointError(folder, what, "move them away to start a new run")
    return None


def load_tokenizer(folder: Path) -> Tokenizer:
    """The run's tokenizer. Raises CheckpointError."""
    file = folder / "tokenizer.json"
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the tokenizers library raises nothing more specific
        what = f"the run's tokenizer is missing or damaged ({error})"
        raise CheckpointError(file, what, "put it back") from None
