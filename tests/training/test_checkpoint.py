"""Checkpoints are written atomically and verified when they are read."""

import os
from unittest.mock import Mock

import pytest
import torch

from workflow.errors import CheckpointError, DamagedError, NonFiniteError
from workflow.training import checkpoint
from workflow.training.directory import RunDirectory


@pytest.fixture
def state(finished_run) -> dict:
    (path,) = finished_run.glob("checkpoints/*/checkpoint_20.pt")
    return checkpoint.load(path)


def test_a_checkpoint_is_synced_and_renamed_and_its_folder_is_synced(tmp_path, state, monkeypatch):
    calls = Mock()
    for name in ("fsync", "replace"):
        getattr(calls, name).side_effect = getattr(os, name)
        monkeypatch.setattr(os, name, getattr(calls, name))
    checkpoint.save(tmp_path / "checkpoint_20.pt", state)
    expected = ["fsync", "replace", "fsync"][: 3 if os.name == "posix" else 2]
    assert [name for name, *_ in calls.mock_calls] == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *[({name: None}, f"it has no {name}") for name in list(checkpoint.CONTENTS)[2:]],
        ({"data": {"text_sha256": "cd"}}, "do not match its digest"),
    ],
)
def test_a_checkpoint_with_changed_contents_is_refused(tmp_path, state, change, message):
    path = tmp_path / "checkpoint_20.pt"
    checkpoint.save(path, state)
    torch.save(torch.load(path, weights_only=True) | change, path)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(path)


def test_a_copy_under_the_name_of_another_step_is_refused(tmp_path, state):
    checkpoint.save(tmp_path / "checkpoint_20.pt", state)
    (tmp_path / "checkpoint_20.pt").rename(tmp_path / "checkpoint_80.pt")
    with pytest.raises(DamagedError, match="it is the checkpoint of step 20"):
        checkpoint.load(tmp_path / "checkpoint_80.pt")


def test_numbers_that_are_not_finite_are_neither_saved_nor_loaded(tmp_path, state, monkeypatch):
    state["model"]["model.norm.weight"][4] = float("inf")
    path = tmp_path / "checkpoint_20.pt"
    with pytest.raises(NonFiniteError, match=r"norm\.weight is not finite at step 20, nothing is"):
        checkpoint.save(path, state)
    assert not path.exists()
    monkeypatch.setattr(checkpoint, "non_finite_tensors", lambda state: [])
    checkpoint.save(path, state)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"norm\.weight contains NaN or inf"):
        checkpoint.load(path)


@pytest.mark.parametrize("version", [2, 99])
def test_a_checkpoint_of_another_version_does_not_lead_to_a_new_start(tmp_path, state, version):
    checkpoint.save(tmp_path / "checkpoint_20.pt", state | {"format_version": version})
    with pytest.raises(CheckpointError, match=f"its format is version {version}, this code reads"):
        checkpoint.load_newest(tmp_path)


def test_weights_of_another_program_can_be_evaluated_but_not_resumed(tmp_path):
    path, weights = tmp_path / "weights.pt", torch.nn.Linear(2, 2).state_dict()
    for content in (weights, {"model": weights, "iter_num": 5}, {"state_dict": weights}):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match="it has 2 weights, but no moments") as caught:
            checkpoint.load(path)
        assert "evaluated, not resumed: main.py evaluate" in str(caught.value)
        assert caught.value.weights.keys() == weights.keys()
    torch.save({"epoch": 3, "args": [1]}, path)
    with pytest.raises(CheckpointError, match=r"not a checkpoint .*\(a dict with epoch, args\)"):
        checkpoint.load(path)


def test_the_newest_undamaged_checkpoint_is_loaded(tmp_path, state, capsys):
    for step in (900, 1000, 95):
        checkpoint.save(tmp_path / f"checkpoint_{step}.pt", state | {"step": step})
    content = bytearray((tmp_path / "checkpoint_1000.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "checkpoint_1000.pt").write_bytes(content)
    (tmp_path / "checkpoint_1100.pt").symlink_to("absent.pt")
    path, found = checkpoint.load_newest(tmp_path)
    assert (path.name, found["step"]) == ("checkpoint_900.pt", 900)
    assert "Skipped a damaged checkpoint" in capsys.readouterr().out
    assert checkpoint.load_newest(tmp_path / "absent") is None
    words = r": record \S+ is damaged; resume from checkpoint_900\.pt, the newest good"
    with pytest.raises(CheckpointError, match=words):
        checkpoint.load(tmp_path / "checkpoint_1000.pt")
    for step in (95, 900):
        (tmp_path / f"checkpoint_{step}.pt").write_bytes(b"half")
    with pytest.raises(CheckpointError, match="all of its 4 checkpoints are damaged"):
        checkpoint.load_newest(tmp_path)


def test_only_the_newest_checkpoints_and_milestones_are_kept(tmp_path, state):
    for step in (*range(1000, 5000, 1000), 9000):
        checkpoint.checkpoint_path(tmp_path, step).touch()
    directory = RunDirectory(tmp_path)
    directory.save(state | {"step": 5000}, keep=2, milestones={1000})
    directory.close()
    # later steps, here 9000, do not count and stay
    assert checkpoint.steps_in(tmp_path) == [9000, 5000, 4000, 1000]


def test_files_that_torch_writes_are_accepted(tmp_path):
    path = tmp_path / "file.pt"
    parameter = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    for content in ({"w": parameter}, [torch.zeros(2, 0), 1, "x", None, 2.5], torch.arange(3)):
        torch.save(content, path)
        assert checkpoint.is_valid(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such file"),
        ("folder", "it cannot be read"),
        (b"", "it is empty"),
        (b"step 5000\n", "it is a text file"),
        (b"  <!DOCTYPE html>", "it is an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1", "type git lfs pull"),
        (b"\x80\x04]", "it is a plain pickle"),
        (b"PK\x03\x04 and no more", "it is damaged"),
    ],
)
def test_a_file_of_another_kind_is_refused_by_its_kind(tmp_path, content, message):
    path = tmp_path / "x.pt"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.check_archive(path)
