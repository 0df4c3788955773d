"""Several processes, as torchrun starts them: the curve, the resume, a process that is lost."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from workflow.errors import WorkflowError
from workflow.training import distributed
from workflow.training.step import slice_of_batch

SHORT = (
    "train.batch_size=4",
    "train.steps=40",
    "train.log_every=10",
    "train.validate_every=20",
    "train.validation_tokens=320",
    "train.checkpoint_every=10",
)
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


@pytest.fixture
def torchrun(story):
    """Starts `main.py train` of the ci profile in some processes; its files lie in `name`."""
    started = []

    def start(count: int, name: str, *more: str, command: str = "train") -> subprocess.Popen:
        folders = [f"paths.checkpoints={name}/checkpoints", f"paths.runs={name}/runs"]
        settings = [f"--set={word}" for word in (*SHORT, *folders, *more)]
        launch = [*LAUNCH, str(count)] if count > 1 else [sys.executable]
        arguments = settings if command == "train" else []
        started.append(
            subprocess.Popen(
                [*launch, "main.py", command, "--profile", "ci", *arguments],
                cwd=story,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def ended(process: subprocess.Popen) -> str:
    """What it has printed, when it is done."""
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    return printed


def seen(process: subprocess.Popen, words: str) -> None:
    """Waits until these words are printed."""
    assert any(words in line for line in process.stdout)


def losses(story, name: str) -> list[float]:
    (file,) = story.glob(f"{name}/runs/*/metrics.jsonl")
    rows = map(json.loads, file.read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def state(story, name: str, step: int = 40) -> dict:
    (file,) = story.glob(f"{name}/checkpoints/*/checkpoint_{step}.pt")
    return torch.load(file, weights_only=True)


def same(one: dict, other: dict) -> bool:
    """Whether weights and moments are equal, bit for bit."""
    moments = [torch.cat([m["exp_avg_sq"].flatten() for m in s["optimizer"]["state"].values()])
               for s in (one, other)]  # fmt: skip
    weights = all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])
    return weights and torch.equal(*moments)


def test_two_processes_have_the_curve_of_one_and_only_the_first_writes(torchrun, story):
    printed = ended(torchrun(2, "two"))
    ended(torchrun(1, "one"))
    assert losses(story, "two") == pytest.approx(losses(story, "one"), rel=1e-5)
    assert len(losses(story, "two")) == 40
    assert printed.count("Saved checkpoint_40.pt") == printed.count("Profile ci") == 1
    assert len(list(story.glob("two/runs/*/events.out.tfevents.*"))) == 1
    assert state(story, "two")["environment"]["processes"] == 2
    assert state(story, "two")["config"] == state(story, "one")["config"]


@pytest.mark.parametrize(
    "count", [2, pytest.param(4, marks=pytest.mark.slow, id="4")], ids=lambda count: str(count)
)
def test_a_killed_process_ends_the_run_at_once_and_the_resume_is_exact(torchrun, story, count):
    accumulated = "train.micro_batch_size=1"  # with two processes, two parts each
    ended(torchrun(count, "whole", accumulated))
    process = torchrun(count, "cut", accumulated, "train.steps=40")
    seen(process, "Saved checkpoint_20.pt")
    killed, began = psutil.Process(process.pid).children()[-1], time.monotonic()
    killed.kill()
    printed, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert time.monotonic() - began < 20
    told = "another process of this run has ended; start the same command again" in printed
    assert told or "exitcode  : 143" in printed  # torchrun's own SIGTERM can come before
    assert "resuming from checkpoint_" in ended(torchrun(count, "cut", accumulated))
    assert losses(story, "cut") == losses(story, "whole")
    assert same(state(story, "cut"), state(story, "whole"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_all_at_the_same_step_and_another_count_goes_on(torchrun, story, number):
    more = ("train.steps=4000", "train.schedule_steps=4000", "train.checkpoint_every=4000")
    process = torchrun(2, "cut", *more)
    seen(process, "Step: 20,")
    os.killpg(process.pid, number)  # as Ctrl-C in a terminal
    printed, _ = process.communicate(timeout=60)
    assert "another process" not in printed
    (saved,) = re.findall(r"Saved (checkpoint_\d+\.pt)", printed)
    again = torchrun(1, "cut", *more)
    seen(again, f"resuming from {saved}")
    seen(again, "no longer bit-exact")


@pytest.mark.parametrize(
    ("command", "setting", "words"),
    [
        ("verify", "", "this command: torchrun has started several processes"),
        ("train", "train.batch_size=3", "3 is not a multiple of 2 processes"),
    ],
)
def test_what_cannot_be_shared_is_told_in_one_line(torchrun, command, setting, words):
    process = torchrun(2, "x", *filter(None, [setting]), command=command)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert words in printed


def test_the_shares_make_up_the_batch(monkeypatch):
    shares = []
    for rank in range(4):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares += list(range(12))[slice_of_batch(12, 3, 4)]
    assert shares == list(range(12))
    with pytest.raises(WorkflowError, match="12 is not a multiple of 4 processes times micro_"):
        slice_of_batch(12, 2, 4)
