"""Kills, damage, hostile files and fuzz, counted: `make torture` does at length what the tests do
in small. Everything is real: SIGKILL to a process in the middle of its work, bits flipped on disk.

A process is forked for each life of a run, so that it need not import torch again. It has dropout,
so that a random state that is not restored shows in every loss.
"""

from __future__ import annotations

import builtins
import io
import json
import logging
import os
import pickle
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import conftest
import fuzz
from workflow.config.load import load_config
from workflow.data import load_corpus
from workflow.errors import CheckpointError
from workflow.files import sha256_of
from workflow.reference.load import load_reference
from workflow.training import checkpoint, open_run

logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of every purge
LAST = 14
SETTINGS = [
    "train.resume_steps=1",
    "train.checkpoint_every=3",
    "train.validate_every=4",
    "train.validation_tokens=64",
    "sample.new_tokens=4",
    "data.validation_fraction=0.5",
]


@dataclass(frozen=True)
class World:
    """A folder of runs, and what a life in it needs."""

    folder: Path
    reference: object
    last: int = LAST

    def config(self):
        text = self.folder / "text.txt"
        if not text.is_file():  # 14 steps of 32 tokens are over two epochs of it
            text.write_text((conftest.ROOT / "input.txt").read_text()[:360])
        settings = [s for s in conftest.overrides(self.folder) if not s.startswith("data.")]
        settings += [f"data.source={text}", f"train.steps={self.last}", *SETTINGS]
        return load_config(conftest.ROOT / "SmolLm3_Config.yaml", "ci", settings)

    def open_run(self):
        config, tokenizer = self.config(), self.reference.tokenizer.backend_tokenizer
        corpus = load_corpus(config, tokenizer, self.reference.end_of_text)
        return open_run(config, self.reference, corpus)

    def fresh(self, name: str, last: int = LAST) -> World:
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return World(folder, self.reference, last)


@contextmanager
def world() -> Iterator[World]:
    """In memory where there is some, since each life syncs a dozen files."""
    shared = Path("/dev/shm")
    torch.nn.modules.module.register_module_forward_hook(drop)
    torch.set_num_threads(1)  # a child of a process with more would hang
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        entry = load_config(conftest.ROOT / "SmolLm3_Config.yaml", "ci").model_entry
        yield World(Path(folder), load_reference("random", entry))
    torch.nn.modules.module._global_forward_hooks.popitem()


def drop(module, _, output):
    """Dropout, wherever the model has an MLP."""
    if type(module).__name__ == "LlamaMLP":
        return F.dropout(output, 0.1, module.training)
    return None


# --- one life of a run ----------------------------------------------------------------------------


def live(
    world: World, act: Callable | None = None, life: int = 0, until: int | None = None
) -> tuple[int, int | None]:
    """A process that opens the run of `world`, goes on to its end, or step `until`, and saves.

    act: called at each event with its number and name. Returns the exit status, negative for a
    signal, and the step of the last checkpoint that it said it had saved.
    """
    log = world.folder / f"life-{life}.txt"
    child = os.fork()
    if child == 0:
        status = 1
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
            os.dup2(descriptor, 1), os.dup2(descriptor, 2)
            sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))
            clock = time.time
            time.time = lambda: clock() + 2 * life  # TensorBoard's files need a second each
            watch(act or (lambda *_: None))
            run = world.open_run()
            for step in run.train(until or world.last):
                if step % 5 == 0:
                    run.sample("A short")
            run.save()
            run.close()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    code, told = os.waitstatus_to_exitcode(status), log.read_text() if log.is_file() else ""
    assert code <= 0, told
    saved = re.findall(r"^Saved checkpoint_(\d+)\.pt", told, re.MULTILINE)
    return code, int(saved[-1]) if saved else None


def watch(act: Callable) -> None:
    """Has `act` called around each thing in this process that a kill could come between."""
    count = 0

    def event(name: str) -> None:
        nonlocal count
        count += 1
        act(count, name)

    def around(owner, name: str) -> None:
        original = getattr(owner, name)

        def watched(*arguments, **options):
            event(f"before {name}")
            result = original(*arguments, **options)
            event(f"after {name}")
            return result

        setattr(owner, name, watched)

    class Watched(io.FileIO):
        def write(self, data) -> int:
            half = len(data) // 2
            done = super().write(data[:half])
            if half > 32:  # not in each record's padding
                event("middle of a write")
            return done + super().write(data[half:])

    original_open = builtins.open

    def watched_open(file, mode="r", *arguments, **options):
        if mode in ("wb", "ab") and not isinstance(file, int):
            return Watched(file, mode)
        return original_open(file, mode, *arguments, **options)

    builtins.open = watched_open
    for owner, name in (
        (torch.Tensor, "backward"),
        (torch.optim.AdamW, "step"),
        (os, "fsync"),
        (os, "replace"),
        (os, "unlink"),
    ):
        around(owner, name)


def outcome(world: World) -> tuple[str, list[dict], dict[str, list[int]]]:
    """What a finished run is: its last checkpoint, its record, steps by TensorBoard's tags."""
    config = world.config()
    left = [*world.folder.glob("checkpoints/*/*.tmp.*"), *world.folder.glob("runs/*/*.tmp.*")]
    assert not left, f"temporary files were left: {left}"
    (folder,) = config.paths.checkpoints.iterdir()
    state = checkpoint.load(checkpoint.checkpoint_path(folder, world.last))
    (runs,) = config.paths.runs.iterdir()
    rows = [json.loads(line) for line in (runs / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "began" not in row]  # each life has its own
    for row in rows:
        row.pop("tokens_per_second", None)
    board = EventAccumulator(str(runs), size_guidance={"scalars": 0}).Reload()
    tags = {tag: [e.step for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]}
    return sha256_of(checkpoint.flatten(state)), rows, tags


# --- kills ----------------------------------------------------------------------------------------


def kills(world: World, count: int, seed: int = 0) -> dict[str, int]:
    """Kills runs `count` times, resumes each, and holds each end against a run left alone.

    At first every so many events of a run, all if there are few, then at random ones, by
    themselves and by the clock, several times in the life of one run.
    """
    chance = random.Random(seed)
    left_alone = world.fresh("left-alone")
    events: list[str] = []
    pipe_in, pipe_out = os.pipe()
    began = time.perf_counter()
    assert live(left_alone, lambda _, name: os.write(pipe_out, f"{name}\n".encode()))[0] == 0
    lasted = time.perf_counter() - began
    os.close(pipe_out)
    with open(pipe_in) as names:
        events = names.read().splitlines()
    expected = outcome(left_alone)
    steps = max(1, round(len(events) / (count * 0.7)))
    planned = list(range(1, len(events) + 1, steps))[:count]
    done = by_clock = 0
    while done < count:
        at = planned.pop(0) if planned else chance.randint(1, len(events))
        run, lives, newest = world.fresh("killed"), 0, 0
        while True:
            timed = not planned and chance.random() < 0.5
            status, saved = live(
                run, killer(at, lasted * chance.random() if timed else None), lives
            )
            lives += 1
            newest = whole_checkpoints(run, at_least=max(newest, saved or 0))
            if status == 0:
                break
            assert status == -signal.SIGKILL, (run.folder / f"life-{lives - 1}.txt").read_text()
            done, by_clock = done + 1, by_clock + timed
            # one kill each where events are tried in turn, else up to five
            more = not planned and lives < 5 and done < count
            at = chance.randint(1, len(events)) if more else len(events) + 1
        assert outcome(run) == expected, f"after {lives - 1} kills"
    return {"kills": done, "kinds of event": len(set(events)), "events": len(events)}


def killer(at: int, seconds: float | None) -> Callable:
    """Kills the process it is called in at event `at`, or some seconds after the first."""

    def act(number: int, _: str) -> None:
        if seconds is not None and number == 1:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            parent = os.getpid()
            if os.fork() == 0:
                time.sleep(seconds)
                os.kill(parent, signal.SIGKILL)
                os._exit(0)
        if seconds is None and number == at:
            os.kill(os.getpid(), signal.SIGKILL)

    return act


def whole_checkpoints(world: World, at_least: int) -> int:
    """The step of the newest one; all must be whole, and none that was saved be lost."""
    files = list(world.folder.glob("checkpoints/*/checkpoint_*.pt"))
    steps = [checkpoint.load(file)["step"] for file in files]
    assert max(steps, default=0) >= at_least, "a checkpoint was lost"
    return max(steps, default=0)


def chain(world: World, resumes: int = 25) -> None:
    """A run of so many steps, stopped and resumed in a new process after each, leaves no trace."""
    straight, stopped = (world.fresh(name, resumes + 1) for name in ("straight", "stopped"))
    live(straight)
    for life in range(resumes + 1):
        live(stopped, life=life, until=life + 1)
    (a, rows, tags), (b, their_rows, their_tags) = outcome(straight), outcome(stopped)
    assert (a, tags["loss/train"]) == (b, their_tags["loss/train"])
    assert [r for r in rows if "loss" in r] == [r for r in their_rows if "loss" in r]


# --- damage ---------------------------------------------------------------------------------------


def flips(path: Path, count: int, seed: int = 0) -> dict[str, int]:
    """Flips one bit at a time of a checkpoint, and cuts it short: refused, or read unchanged."""
    chance, whole, refused = random.Random(seed), path.read_bytes(), 0
    expected = sha256_of(checkpoint.flatten(checkpoint.load(path)))
    lone = path.parent / "alone"  # beside no other checkpoint, which an error would look through
    lone.mkdir()
    damaged = lone / path.name

    def is_refused() -> bool:
        try:
            state = checkpoint.load(damaged)
        except CheckpointError:
            return True
        assert sha256_of(checkpoint.flatten(state)) == expected, "damage was read"
        return False

    damaged.write_bytes(whole)
    for _ in range(count):
        place, bit = chance.randrange(len(whole)), 1 << chance.randrange(8)
        with open(damaged, "r+b") as file:
            file.seek(place)
            file.write(bytes([whole[place] ^ bit]))
        refused += is_refused()
        with open(damaged, "r+b") as file:
            file.seek(place)
            file.write(whole[place : place + 1])
    assert not is_refused()
    sizes = [0, 1, len(whole) // 2, len(whole) - 1]
    sizes += [chance.randrange(len(whole)) for _ in range(count // 50)]
    for size in sizes:
        damaged.write_bytes(whole[:size])
        assert is_refused(), f"cut to {size} bytes"
    shutil.rmtree(lone)
    return {"flips": count, "refused": refused, "truncations": len(sizes)}


# --- hostile files --------------------------------------------------------------------------------


class Call:
    """Pickled, it is a call of `function` when it is read."""

    def __init__(self, function: Callable, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile_files(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Files made to run something, or to take all memory, by name. None may be read."""
    sprung, huge = str(folder / "sprung"), 10**11
    nested: list = []
    for _ in range(40):
        nested = [nested] * 9  # 9 to the 40th values, in a small file
    deep: list = []
    for _ in range(300):
        deep = [deep]
    for name, content in (
        ("call of mkdir", Call(os.mkdir, sprung)),
        ("call of eval", Call(eval, f"__import__('os').mkdir({sprung!r})")),
        ("call of getattr", Call(getattr, Call(__import__, "os"), "system")),
        ("huge bytearray", Call(bytearray, huge)),
        ("huge tensor", Call(torch.Tensor, huge)),
        ("huge view", torch.zeros(1).expand(huge)),
        (
            "sparse tensor",
            torch.sparse_coo_tensor([[0], [0]], [1.0], (huge, 9), check_invariants=False),
        ),
        ("endless aliases", nested),
        ("deep nesting", deep),
        ("many small objects", [{} for _ in range(200_000)]),
    ):
        for format in ({"format": checkpoint.FORMAT, "format_version": 2}, {}):
            buffer = io.BytesIO()
            torch.save({**format, "step": content, "model": {"w": content}}, buffer)
            yield name, buffer.getvalue()
        yield f"{name}, without zip", pickled(content)
    good = io.BytesIO()
    torch.save({"w": torch.zeros(1000)}, good)
    for name, change in ARCHIVES.items():
        yield name, changed(good.getvalue(), *change)
    for name, start in (
        ("text", b"step 5000, loss 3.1\n"),
        ("HTML", b"<!DOCTYPE html><html>"),
        ("git-LFS pointer", b"version https://git-lfs.github.com/spec/v1\n"),
        ("GGUF", b"GGUF\3\0\0\0"),
        ("safetensors", b'\x40\0\0\0\0\0\0\0{"__metadata__":{}}'),
        ("gzip", b"\x1f\x8b\x08\0"),
        ("nothing", b""),
        ("zeros", bytes(100_000)),
        ("noise", random.Random(1).randbytes(100_000)),
    ):
        yield name, start


def pickled(content) -> bytes:
    try:
        return pickle.dumps(content)
    except RecursionError:
        return b"\x80\x04" + b"]" * 100_000 + b"."


ARCHIVES = {  # name: (name and content of a record that is added, how it is packed)
    "zip bomb": ("archive/data/9", bytes(200_000_000), zipfile.ZIP_DEFLATED),
    "record twice": ("archive/data/0", bytes(4000), zipfile.ZIP_STORED),
    "record above": ("archive/../../sprung", b"x", zipfile.ZIP_STORED),
    "absolute record": ("/tmp/sprung", b"x", zipfile.ZIP_STORED),
    "backslashes": ("archive\\..\\sprung", b"x", zipfile.ZIP_STORED),
    "second folder": ("other/data.pkl", b"x", zipfile.ZIP_STORED),
}


def changed(archive: bytes, name: str, content: bytes, packed: int) -> bytes:
    buffer = io.BytesIO(archive)
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "a", packed) as file:
        warnings.simplefilter("ignore")  # zipfile's own, of a name that stands twice
        file.writestr(name, content)
    return buffer.getvalue()


def hostile(folder: Path) -> dict[str, int]:
    """Each file is refused in one line, runs nothing, and takes little more than twice its size."""
    count = 0
    for name, content in hostile_files(folder):
        path = folder / "hostile.pt"
        path.write_bytes(content)
        pipe_in, pipe_out = os.pipe()
        if (child := os.fork()) == 0:
            os.write(pipe_out, refusal(path).encode())
            os._exit(0)
        os.close(pipe_out)
        _, status = os.waitpid(child, 0)
        with open(pipe_in) as told:
            line = told.read()
        assert status == 0 and re.match(r"(Checkpoint|Damaged|Foreign)Error", line), (name, line)
        assert "MemoryError" not in line and "weights_only" not in line, (name, line)
        assert line.count("\n") == 0, (name, line)
        taken = int(line.rpartition(" ")[2])
        assert taken < 2 * len(content) + 64_000_000, (name, taken)
        assert not (folder / "sprung").exists(), name
        count += 1
    return {"hostile files": count}


def refusal(path: Path) -> str:
    """The error of loading a file, and the bytes by which the process grew at most."""
    try:
        resource.setrlimit(resource.RLIMIT_AS, (60 * 10**9, 60 * 10**9))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        signal.alarm(60)
        checkpoint.load(path)
        return "it was read"
    except Exception as error:
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        return f"{type(error).__name__}: {error} {1000 * grown}"


# --- all of it ------------------------------------------------------------------------------------


def main() -> None:
    began, counts = time.perf_counter(), {}

    def tell(done: dict[str, int]) -> None:
        counts.update(done)
        print(f"{time.perf_counter() - began:.0f} s", done, flush=True)

    with world() as place:
        tell(kills(place, 1000))
        (path,) = place.folder.glob(f"left-alone/checkpoints/*/checkpoint_{LAST}.pt")
        tell(flips(path, 10_000))
        chain(place, 25)
        tell({"chained resumes": 25})
        tell(hostile(place.fresh("hostile").folder))
        folder, reference = place.fresh("fuzz").folder, place.reference
        done = fuzz.fuzz_yaml(folder, 3000) + fuzz.fuzz_text(folder, reference, 3000)
        tell({"fuzz cases": done + fuzz.fuzz_prompts(reference, 3000)})
    counts["seconds"] = round(time.perf_counter() - began)
    print(", ".join(f"{name}: {value}" for name, value in counts.items()))


if __name__ == "__main__":
    main()
