"""Kills, damage and hostile files: `make torture` does many, the tests a few.

Processes really get SIGKILL in the middle of their work, and bits really flip on disk. Each process
of a run is a fork, which need not import torch again. The model has dropout: if a random state is
not restored, every later loss differs.
"""

from __future__ import annotations

import builtins
import io
import itertools
import logging
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import conftest
from workflow.config.load import load_config
from workflow.data import load_corpus
from workflow.errors import CheckpointError
from workflow.files import flatten, sha256_of
from workflow.reference.load import load_reference
from workflow.training import checkpoint, open_run
from workflow.training.metrics import read_log

logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it reports every purge
STEPS = 14
SETTINGS = [
    "train.resume_steps=1",
    "train.checkpoint_every=3",
    "train.validate_every=4",
    "train.validation_tokens=64",
    "sample.new_tokens=4",
    "data.validation_fraction=0.5",
]


@dataclass(frozen=True)
class Workspace:
    """A folder with one run, and what a process needs to open it."""

    folder: Path
    text: Path
    reference: object
    steps: int

    def config(self):
        source = f"data.source={self.text}", f"train.steps={self.steps}"
        settings = conftest.overrides(self.folder, *source, *SETTINGS)
        return load_config(conftest.ROOT / "SmolLm3_Config.yaml", "ci", settings)

    def open_run(self):
        config, tokenizer = self.config(), self.reference.tokenizer.backend_tokenizer
        corpus = load_corpus(config, tokenizer, self.reference.end_of_text)
        return open_run(config, self.reference, corpus)

    def subfolder(self, name: str) -> Workspace:
        """An empty folder inside this one."""
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return replace(self, folder=folder)


@contextmanager
def open_workspace(steps: int = STEPS) -> Iterator[Workspace]:
    """A temporary folder, in memory if possible: each process syncs a dozen files."""
    shared = Path("/dev/shm")
    hook = torch.nn.modules.module.register_module_forward_hook(dropout_after_mlp)
    torch.set_num_threads(1)  # forks of a process with several threads would hang
    entry = load_config(conftest.ROOT / "SmolLm3_Config.yaml", "ci").model_entry
    with hook, tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as name:
        text = Path(name) / "text.txt"  # 14 steps of 32 tokens are more than two epochs of it
        text.write_text((conftest.ROOT / "input.txt").read_text()[:360])
        yield Workspace(Path(name), text, load_reference("random", entry), steps)


def dropout_after_mlp(module, _, output):
    if type(module).__name__ == "LlamaMLP":
        return F.dropout(output, 0.1, module.training)
    return None


# --- one process of a run -------------------------------------------------------------------------


def train_in_fork(workspace: Workspace, on_event: Callable, process: int = 0) -> tuple[int, str]:
    """Forks a process that opens the run, trains to the end, and saves.

    on_event: called at each event with its number and name. process: 0, 1, … for the first, second,
    … process of a run. Returns the exit code, negative for a signal, and what was printed.
    """

    def train() -> None:
        clock = time.time
        time.time = lambda: clock() + 2 * process  # TensorBoard's files need a second each
        report_events(on_event)
        run = workspace.open_run()
        for step in run.train(workspace.steps):
            if step % 5 == 0:
                run.sample("A short")
        run.save_and_close()

    code, printed = conftest.fork(train).finish()
    assert code in (0, -signal.SIGKILL), printed
    return code, printed


def report_events(on_event: Callable) -> None:
    """Calls `on_event` before, during or after each write, sync, rename, backward and update."""
    numbers = itertools.count(1)

    def event(name: str) -> None:
        on_event(next(numbers), name)

    def wrap(owner, name: str) -> None:
        original = getattr(owner, name)

        def wrapped(*arguments, **options):
            event(f"before {name}")
            result = original(*arguments, **options)
            event(f"after {name}")
            return result

        setattr(owner, name, wrapped)

    class FileWithEvents(io.FileIO):
        def write(self, data) -> int:
            half = len(data) // 2
            done = super().write(data[:half])
            if half > 32:  # smaller writes are only the padding of records
                event("middle of a write")
            return done + super().write(data[half:])

    original_open = builtins.open

    def open_with_events(file, mode="r", *arguments, **options):
        if mode in ("wb", "ab") and not isinstance(file, int):
            return FileWithEvents(file, mode)
        return original_open(file, mode, *arguments, **options)

    builtins.open = open_with_events
    wrap(torch.Tensor, "backward")
    wrap(torch.optim.AdamW, "step")
    for name in ("fsync", "replace", "unlink"):
        wrap(os, name)


def results(workspace: Workspace) -> tuple[str, list[dict], dict[str, list[int]]]:
    """Of a finished run: hash of the last checkpoint, rows of the log, steps by TensorBoard tag."""
    config = workspace.config()
    folders = config.paths.checkpoints, config.paths.runs
    left = [file for folder in folders for file in folder.glob("*/*.tmp.*")]
    assert not left, f"temporary files were left: {left}"
    (folder,) = config.paths.checkpoints.iterdir()
    state = checkpoint.load(checkpoint.checkpoint_path(folder, workspace.steps))
    del state["log"], state["settings"]  # they have times, and folders, which differ
    (runs,) = config.paths.runs.iterdir()
    rows = [row for row in read_log(runs / "metrics.jsonl") if "began" not in row]
    for row in rows:
        row.pop("tokens_per_second", None)
    board = EventAccumulator(str(runs), size_guidance={"scalars": 0}).Reload()
    tags = {tag: [e.step for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]}
    return sha256_of(flatten(state)), rows, tags


# --- kills ----------------------------------------------------------------------------------------


def kill_runs(workspace: Workspace, count: int, seed: int = 0) -> dict[str, int]:
    """Kills runs `count` times, resumes each, and compares the results with an undisturbed run.

    The first 70% of the kills are one in each run, at evenly spaced events. The others are up to
    four in each run, at random events or at random times.
    """
    rng = random.Random(seed)
    undisturbed, started = workspace.subfolder("undisturbed"), time.perf_counter()
    _, printed = train_in_fork(undisturbed, lambda _, name: print(f"event: {name}"))
    seconds, events = time.perf_counter() - started, re.findall(r"event: (.*)", printed)
    expected = results(undisturbed)
    spacing = max(1, round(len(events) / (count * 0.7)))
    plans, done = [[event] for event in range(1, len(events) + 1, spacing)], 0
    while done < count:
        moments = [(rng.randint(1, len(events)), seconds * rng.random()) for _ in range(4)]
        kills = plans.pop(0) if plans else list(map(rng.choice, moments))[: count - done]
        run, newest = workspace.subfolder("killed"), 0
        for process, moment in enumerate([*kills, None]):
            code, printed = train_in_fork(run, kill_at(moment), process)
            saved = re.findall(r"^Saved checkpoint_(\d+)\.pt", printed, re.MULTILINE)
            newest = newest_step(run, at_least=max(newest, *map(int, saved), 0))
            if code == 0:
                break
            done += 1
        assert results(run) == expected, f"after {process} kills"
    return {"kills": done, "kinds of event": len(set(events)), "events": len(events)}


def kill_at(moment: int | float | None) -> Callable:
    """Kills the process that calls it at this event, or this many seconds after the first one."""

    def on_event(number: int, _: str) -> None:
        if number == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 1 and isinstance(moment, float):
            subprocess.Popen(["sh", "-c", f"sleep {moment}; kill -KILL {os.getpid()}"])

    return on_event


def newest_step(workspace: Workspace, at_least: int) -> int:
    """The step of the newest checkpoint. Fails if one is damaged, or if step `at_least` is lost."""
    files = list(workspace.folder.glob("checkpoints/*/checkpoint_*.pt"))
    steps = [checkpoint.load(file)["step"] for file in files]
    assert max(steps, default=0) >= at_least, "a checkpoint was lost"
    return max(steps, default=0)


# --- damage ---------------------------------------------------------------------------------------


def flip_bits(path: Path, count: int, seed: int = 0) -> dict[str, int]:
    """Flips single bits of a checkpoint, then truncates it: it is refused, or loads unchanged."""
    rng, content = random.Random(seed), path.read_bytes()
    expected = sha256_of(flatten(checkpoint.load(path)))
    damaged = path.parent / "alone" / path.name  # with other checkpoints, an error searches them
    damaged.parent.mkdir()

    def is_refused(content: bytes) -> bool:
        damaged.write_bytes(content)
        try:
            state = checkpoint.load(damaged)
        except CheckpointError:
            return True
        assert sha256_of(flatten(state)) == expected, "damage was loaded"
        return False

    assert not is_refused(content)
    refused = 0
    for _ in range(count):
        flipped = bytearray(content)
        flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        refused += is_refused(bytes(flipped))
    sizes = [0, 1, len(content) // 2, len(content) - 1]
    sizes += [rng.randrange(len(content)) for _ in range(count // 50)]
    for size in sizes:
        assert is_refused(content[:size]), f"truncated to {size} bytes"
    shutil.rmtree(damaged.parent)
    return {"flips": count, "refused": refused, "truncations": len(sizes)}


# --- hostile files --------------------------------------------------------------------------------


class Call:
    """Unpickling this object calls `function`."""

    def __init__(self, function: Callable, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile_files(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Files that try to run code or to fill the memory: name and content. None may be loaded."""
    created, huge = str(folder / "created"), 10**11
    nested: list = []
    for _ in range(40):
        nested = [nested] * 9  # 9 to the 40th values, in a small file
    deep: list = []
    for _ in range(300):
        deep = [deep]
    place, value = [[0], [0]], [1.0]
    contents = {
        "call of mkdir": Call(os.mkdir, created),
        "call of eval": Call(eval, f"__import__('os').mkdir({created!r})"),
        "call of getattr": Call(getattr, Call(__import__, "os"), "system"),
        "huge bytearray": Call(bytearray, huge),
        "huge tensor": Call(torch.Tensor, huge),
        "huge view": torch.zeros(1).expand(huge),
        "sparse tensor": torch.sparse_coo_tensor(place, value, (huge, 9), check_invariants=False),
        "endless aliases": nested,
        "deep nesting": deep,
        "many small objects": [{} for _ in range(200_000)],
    }
    for name, content in contents.items():
        for format in ({"format": checkpoint.FORMAT, "format_version": 3}, {}):
            yield name, saved({**format, "step": content, "model": {"w": content}})
        yield f"{name}, without zip", pickle.dumps(content)
    good = saved({"w": torch.zeros(1000)})
    yield "zip bomb", with_record(good, "archive/data/9", bytes(20_000_000), zipfile.ZIP_DEFLATED)
    yield "record twice", with_record(good, "archive/data/0", bytes(4000))
    sizes = (4000).to_bytes(4, "little") * 2  # compressed and not, in the list of records
    yield "records of 2 GB", good.replace(sizes, (2 * 10**9).to_bytes(4, "little") * 2)
    names = "archive/../../created", "/tmp/created", "archive\\..\\created", "other/data.pkl"
    for name in names:
        yield f"record {name}", with_record(good, name)


def saved(content) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def with_record(
    archive: bytes, name: str, content: bytes = b"x", compression: int = zipfile.ZIP_STORED
) -> bytes:
    buffer = io.BytesIO(archive)
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "a", compression) as file:
        warnings.simplefilter("ignore")  # zipfile warns of a name that appears twice
        file.writestr(name, content)
    return buffer.getvalue()


def load_hostile_files(folder: Path) -> dict[str, int]:
    """Each is refused with one line, runs nothing, and needs twice its size in memory at most."""
    path = folder / "hostile.pt"
    for count, (name, content) in enumerate(hostile_files(folder), 1):  # noqa: B007
        path.write_bytes(content)
        status, line = conftest.fork(lambda: print_refusal(path)).finish()
        assert status == 0 and re.match(r"(Checkpoint|Damaged|Foreign)Error", line), (name, line)
        assert "MemoryError" not in line and "weights_only" not in line, (name, line)
        assert line.count("\n") == 1, (name, line)
        memory = int(line.rpartition(" ")[2])
        assert memory < 2 * len(content) + 64_000_000, (name, memory)
        assert not (folder / "created").exists(), name
    return {"hostile files": count}


def print_refusal(path: Path) -> None:
    """Prints the error of loading a file, and the memory that loading needed, in bytes."""
    import resource  # not on Windows

    resource.setrlimit(resource.RLIMIT_AS, (60 * 10**9, 60 * 10**9))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        checkpoint.load(path)
    except Exception as error:
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print(f"{type(error).__name__}: {error} {1000 * grown}")


# --- all of it ------------------------------------------------------------------------------------


def main() -> None:
    started, counts = time.perf_counter(), {}

    def report(done: dict[str, int]) -> None:
        counts.update(done)
        print(f"{time.perf_counter() - started:.0f} s", done, flush=True)

    with open_workspace() as workspace:
        report(kill_runs(workspace, 1000))
        (path,) = workspace.folder.glob(f"undisturbed/checkpoints/*/checkpoint_{STEPS}.pt")
        report(flip_bits(path, 10_000))
        report(load_hostile_files(workspace.subfolder("hostile").folder))
    counts["seconds"] = round(time.perf_counter() - started)
    print(", ".join(f"{name}: {value}" for name, value in counts.items()))


if __name__ == "__main__":
    main()
