"""Atomic writes, locked folders, free space, flat names, hashes. Disk errors are one line."""

import hashlib
import os
import shutil
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import BaseFileLock, FileLock, Timeout

from workflow.errors import BusyError, DiskError, WorkflowError

if TYPE_CHECKING:
    import torch

DAY = 86_400.0  # seconds
PROJECT = Path(__file__).resolve().parent.parent  # the folder of the code
SPACE_FIX = "free disk space, or choose another folder: --set {}=PATH"


def project_file(name: str) -> Path:
    """A file next to the code, from any working directory; in that of the code, just its name."""
    return Path(name) if Path.cwd() == PROJECT else PROJECT / name


@contextmanager
def atomic_write(path: Path, setting: str, needed: int = 0) -> Iterator[Path]:
    """Gives a temporary file next to `path`, and renames it to `path` after a successful write.

    setting: the YAML key that sets the folder. needed: the size in bytes, if known.
    Raises DiskError. After an error, the old file is unchanged and the temporary one is removed.
    """
    temporary = path.with_name(f"{path.name}.tmp.{os.getpid()}")
    try:
        with disk_errors(path, setting, needed):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with open(temporary, "r+b") as file:  # Windows cannot fsync a file opened for reading
                os.fsync(file.fileno())
            os.replace(temporary, path)
            if os.name == "posix":  # the rename then survives a power failure, except on Windows
                folder = os.open(path.parent, os.O_RDONLY)
                os.fsync(folder)
                os.close(folder)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text_atomic(path: Path, text: str, setting: str) -> None:
    with atomic_write(path, setting) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def disk_errors(path: Path, setting: str, needed: int = 0) -> Iterator[None]:
    """Turns an error of the disk into a DiskError. setting and needed: see `atomic_write`."""
    try:
        yield
    except Exception as error:
        if isinstance(error, WorkflowError) or not is_disk_error(error):
            raise
        raise disk_error(path, setting, error, needed) from error


def is_disk_error(error: BaseException | None) -> bool:
    """Whether the system refused to write; torch, tokenizers and safetensors hide its error."""
    found = any(words in str(error) for words in ("inline_container", "os error"))
    return isinstance(error, OSError) or found or (error and is_disk_error(error.__context__))


def disk_error(path: Path, setting: str, error: Exception, needed: int) -> DiskError:
    existing = next((folder for folder in path.absolute().parents if folder.is_dir()), Path("/"))
    reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
    size = f", it takes {needed / 1e6:.1f} MB" if needed else ""
    free = f"{shutil.disk_usage(existing).free / 1e6:.1f} MB are free"
    what = f"it cannot be written ({reason}){size}, {free}"
    return DiskError(path, what, SPACE_FIX.format(setting))


def remove_temporary_files(folder: Path, min_age: float = 0) -> None:
    """Removes the partial files that a killed process left.

    min_age: seconds since the last write. In a folder without a lock, a new file may be in use.
    """
    for path in folder.glob("*.tmp.*"):
        if time.time() - path.stat().st_mtime >= min_age:
            print(f"Removed {path.name}, the partial file of a killed process")
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def lock_folder(folder: Path, setting: str) -> BaseFileLock:
    """Creates a folder and locks it for this process until `release` or the process ends.

    The same process may lock it again, because a notebook cell can run twice.
    Raises BusyError with the process and host that have the lock, or DiskError.
    """
    lock = FileLock(folder.resolve() / ".lock", timeout=0, is_singleton=True)
    holder = folder / ".holder"
    with disk_errors(folder, setting):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            who = holder.read_text("utf-8") if holder.is_file() else "another process"
            raise BusyError(folder, f"in use by {who}", "wait for it, or stop it") from None
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}", "utf-8")
    return lock


def flatten(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested dicts and sequences, with dotted names: {"a": [5]} gives ("a.0", 5)."""
    if not isinstance(value, (Mapping, list, tuple)) or not value:
        yield name, value
        return
    for key, part in value.items() if isinstance(value, Mapping) else enumerate(value):
        yield from flatten(part, f"{name}.{key}" if name else str(key))


def sha256_of(values: Iterable[tuple[str, Any]]) -> str:
    """One hash of all names and values. A tensor counts with its dtype, shape and bytes."""
    import torch  # takes seconds, and the settings are read without it

    digest = hashlib.sha256()
    for name, value in values:
        if isinstance(value, torch.Tensor):
            tensor = value.detach().cpu().contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy())
        else:
            digest.update(f"{name} {value!r}".encode())
    return digest.hexdigest()


def weights_sha256(tensors: Mapping[str, "torch.Tensor"]) -> str:
    """The hash of a set of weights; the order does not matter."""
    return sha256_of(sorted(tensors.items()))
