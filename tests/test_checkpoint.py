"""Write whole, read verified, one writer at a time."""

import os
import subprocess
import sys
import zipfile

import pytest
import torch

from conftest import ROOT
from workflow import checkpoint
from workflow.checkpoint import BusyError, CheckpointError, DiskError


@pytest.fixture
def state() -> dict:
    return {
        "step": 7,
        "model": {"weight": torch.randn(64, 64)},
        "optimizer": {"state": {}, "param_groups": []},
        "random": checkpoint.random_states(),
        "data": {"text_sha256": "ab"},
        "config": {"seed": 1},
        "tokenizer": {"end_of_text": 0},
        "reference": {"name": "random"},
        "environment": checkpoint.environment(torch.device("cpu")),
    }


def test_what_is_written_is_read(tmp_path, state):
    checkpoint.save(tmp_path / "checkpoint_7.pt", state)
    read = checkpoint.load(tmp_path / "checkpoint_7.pt")
    assert torch.equal(read["model"]["weight"], state["model"]["weight"])
    assert {key: read[key] for key in ("step", "data", "config", "environment")} == {
        key: state[key] for key in ("step", "data", "config", "environment")
    }
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint_7.pt"]


def test_every_flipped_bit_and_every_truncation_is_refused_or_harmless(tmp_path, state):
    path = tmp_path / "checkpoint_7.pt"
    checkpoint.save(path, state)
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(3)
    refused = 0
    for _ in range(200):
        place = int(torch.randint(len(whole), (1,), generator=generator))
        bit = int(torch.randint(8, (1,), generator=generator))
        damaged = bytearray(whole)
        damaged[place] ^= 1 << bit
        path.write_bytes(damaged)
        try:
            read = checkpoint.load(path)
        except CheckpointError:
            refused += 1
        else:  # padding between records, or a field of the archive that nothing uses
            assert torch.equal(read["model"]["weight"], state["model"]["weight"])
            assert read["random"]["python"] == state["random"]["python"]
            assert read["data"] == state["data"]
    assert refused > 150
    for size in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            checkpoint.load(path)


def test_a_damaged_record_is_named(tmp_path, state):
    path = tmp_path / "checkpoint_7.pt"
    checkpoint.save(path, state)
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda record: record.file_size)
    damaged = bytearray(path.read_bytes())
    damaged[largest.header_offset + largest.file_size // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=f"record {largest.filename} is damaged"):
        checkpoint.load(path)


@pytest.mark.parametrize("lost", list(checkpoint.CONTENTS))
def test_a_checkpoint_that_lacks_anything_is_refused(tmp_path, state, lost):
    whole = {"format": checkpoint.FORMAT, "format_version": 1, **state}
    del whole[lost]
    torch.save(whole, tmp_path / "checkpoint_7.pt")
    words = "not a checkpoint of this project" if lost == "format" else f"it lacks {lost}"
    with pytest.raises(CheckpointError, match=words):
        checkpoint.load(tmp_path / "checkpoint_7.pt")


def test_foreign_files_are_refused_and_run_nothing(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save({"format": checkpoint.FORMAT, "step": Trap()}, tmp_path / "trap.pt")
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "weights.pt")
    (tmp_path / "text.pt").write_text("version https://git-lfs.github.com/spec/v1")
    for name in ("trap", "weights", "text", "absent"):
        with pytest.raises(CheckpointError):
            checkpoint.load(tmp_path / f"{name}.pt")
    assert not (tmp_path / "sprung").exists()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, state):
    path = tmp_path / "checkpoint_7.pt"
    checkpoint.save(path, state)
    before = path.read_bytes()
    program = (
        "import resource, sys, torch; from pathlib import Path; from workflow import checkpoint;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000));"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "checkpoint.save(Path(sys.argv[1]), {'model': {'w': torch.zeros(9999)}})"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", program, str(path)], env=environment, capture_output=True, text=True
    )
    assert "DiskError" in result.stderr
    assert "MB are free" in result.stderr
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint_7.pt"]


def test_the_newest_whole_checkpoint_is_found(tmp_path, state, capsys):
    for step in (900, 1000, 95):
        checkpoint.save(tmp_path / f"checkpoint_{step}.pt", state | {"step": step})
    (tmp_path / "checkpoint_1000.pt").write_bytes(b"half")
    path, found = checkpoint.newest(tmp_path)
    assert (path.name, found["step"]) == ("checkpoint_900.pt", 900)
    assert "passed over" in capsys.readouterr().out
    assert checkpoint.newest(tmp_path / "absent") is None


def test_old_checkpoints_go_milestones_stay(tmp_path):
    for step in range(1000, 6000, 1000):
        checkpoint.path_of(tmp_path, step).touch()
    checkpoint.prune(tmp_path, keep=2, milestones={1000})
    assert sorted(checkpoint.found(tmp_path)) == [1000, 4000, 5000]


def test_random_states_come_back():
    saved = checkpoint.random_states()
    first = torch.rand(3)
    checkpoint.restore_random_states(saved)
    assert torch.equal(torch.rand(3), first)
    for lost in saved:
        with pytest.raises(KeyError):
            checkpoint.restore_random_states({k: v for k, v in saved.items() if k != lost})


def test_a_folder_has_one_writer_at_a_time(tmp_path):
    held = checkpoint.lock(tmp_path / "run")
    with pytest.raises(BusyError, match=f"process {os.getpid()} on"):
        checkpoint.lock(tmp_path / "run")
    held.close()
    checkpoint.lock(tmp_path / "run").close()


def test_a_folder_that_cannot_be_made_is_said_with_its_path(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DiskError, match="file/run: it cannot be written"):
        checkpoint.lock(tmp_path / "file" / "run")
