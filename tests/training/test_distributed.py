"""Training in several processes: the same losses as in one, exact resume, signals, a lost process.

One test starts torchrun; the others fork, so that no process has to import torch again.
"""

import re
import shutil
import signal
import socket
import sys
from pathlib import Path

import pytest
import torch

from conftest import ROOT, Fork, fork_main, options, overrides, popen, read_losses
from workflow.errors import WorkflowError
from workflow.files import flatten, sha256_of
from workflow.training import checkpoint, distributed
from workflow.training.step import batch_slice


def command(name: str, folder: Path, *more: str) -> list[str]:
    """`main.py train` or `resume`, with all files in `folder`."""
    short = ("train.batch_size=8", "train.log_every=1", "train.checkpoint_every=5")
    words = [name, *map(str, folder.glob("checkpoints/*"))] if name == "resume" else [name]
    return [*words, *options(*overrides(folder, *short, *more))]


def fork_ranks(count: int, arguments: list[str]) -> list[Fork]:
    """Starts the processes of one run, as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    address["WORLD_SIZE"] = str(count)
    return [
        fork_main(ROOT, *arguments, settings=(), RANK=str(rank), **address) for rank in range(count)
    ]


def finish(ranks: list[Fork]) -> str:
    """The output of the main process, if all exit with 0."""
    (code, printed), *others = [rank.finish() for rank in ranks]
    assert {code, *(code for code, _ in others)} == {0}, printed
    return printed


def load(folder: Path) -> dict:
    (file,) = folder.glob("checkpoints/*/checkpoint_20.pt")
    state = checkpoint.load(file)
    del state["settings"]  # has the folders, which differ
    return state


def test_each_process_has_its_own_gpu(monkeypatch):
    device = torch.device("cuda:0")
    assert distributed.device_of_process(device) == device
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert distributed.device_of_process(device) == torch.device("cuda:1")
    assert distributed.device_of_process(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.slow
def test_torchrun_with_two_processes_has_the_losses_of_one(tmp_path, reference):
    """Both resume a run at step 10: `resume` does not import transformers."""
    folders = [tmp_path / "one", tmp_path / "two"]
    settings = ("train.steps=10", "train.resume_steps=10")
    finish(fork_ranks(1, command("train", folders[0], *settings)))
    shutil.copytree(*folders, ignore=shutil.ignore_patterns("events.*"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    torchrun += ["main.py", *command("resume", folders[1], *settings)]
    two = popen(ROOT, torchrun)
    finish(fork_ranks(1, command("resume", folders[0], *settings)))
    printed, errors = two.communicate(timeout=300)
    assert two.returncode == 0, errors
    losses = read_losses(folders[1])
    assert losses == pytest.approx(read_losses(folders[0]), rel=1e-5) and len(losses) == 20
    for words in ("Profile ci", "no longer bit-exact", "Saved checkpoint_20.pt"):
        assert (printed + errors).count(words) == 1
    assert len(list(folders[1].glob("runs/*/events.out.tfevents.*"))) == 1
    one, other = map(load, folders)
    assert one["config"] == other["config"]
    assert [state["environment"]["processes"] for state in (one, other)] == [1, 2]


@pytest.mark.slow
def test_after_a_killed_process_all_end_and_the_resume_is_exact(tmp_path, reference):
    """With four processes and two micro-batches each, the order of sums matters."""
    micro_batches = "train.micro_batch_size=1"
    finish(fork_ranks(4, command("train", tmp_path / "expected", micro_batches)))
    arguments = command("train", tmp_path / "killed", micro_batches)
    *ranks, killed = fork_ranks(4, arguments)
    ranks[0].wait_for("Saved checkpoint_10.pt")
    killed.send_signal(signal.SIGKILL)
    assert killed.finish()[0] == -signal.SIGKILL
    for rank in ranks:
        code, printed = rank.finish()
        assert code == 1
        assert "another process of this run has ended; start the same command again" in printed
    assert "resuming from checkpoint_1" in finish(fork_ranks(4, arguments))
    assert read_losses(tmp_path / "killed") == read_losses(tmp_path / "expected")
    states = [load(tmp_path / name) for name in ("killed", "expected")]
    for state in states:
        del state["log"]  # it has times
    assert sha256_of(flatten(states[0])) == sha256_of(flatten(states[1]))


def test_a_signal_to_one_process_stops_all_at_the_same_step(tmp_path, reference):
    endless = "train.steps=4000", "train.checkpoint_every=4000"
    ranks = fork_ranks(2, command("train", tmp_path, *endless))
    ranks[0].wait_for("Step: 3,")
    ranks[1].send_signal(signal.SIGTERM)
    (code, printed), (other_code, _) = [rank.finish() for rank in ranks]
    assert code == other_code == 143
    (step,) = re.findall(r"Saved checkpoint_(\d+)\.pt", printed)
    assert len(read_losses(tmp_path)) == int(step) >= 3


def test_a_command_for_one_process_refuses_torchrun(refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "torchrun has started several processes; start it" in refused(2, "verify")


def test_a_batch_that_cannot_be_divided_evenly_is_refused():
    with pytest.raises(WorkflowError, match="12 is not a multiple of 4 processes times micro_b"):
        batch_slice(12, 2, 4)
