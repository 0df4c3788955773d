"""Checkpoints: written atomically, read only when undamaged."""

import zipfile

import pytest
import torch

import torture
from workflow.errors import CheckpointError, DamagedError, NonFiniteError
from workflow.training import checkpoint, resume
from workflow.training.directory import RunDirectory


@pytest.fixture
def state() -> dict:
    return {
        "step": 7,
        "model": {"weight": torch.randn(64, 64)},
        "optimizer": {"state": {}, "param_groups": []},
        "random": resume.random_states(),
        "data": {"text_sha256": "ab"},
        "config": {"seed": 1},
        "tokenizer": {"end_of_text": 0},
        "reference": {"name": "random"},
        "environment": resume.environment(torch.device("cpu")),
    }


def test_what_is_written_is_read(tmp_path, state):
    checkpoint.save(tmp_path / "checkpoint_7.pt", state)
    read = checkpoint.load(tmp_path / "checkpoint_7.pt")
    assert torch.equal(read["model"]["weight"], state["model"]["weight"])
    assert {key: read[key] for key in ("step", "data", "config", "environment")} == {
        key: state[key] for key in ("step", "data", "config", "environment")
    }
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint_7.pt"]


def test_a_checkpoint_of_an_earlier_version_is_read_under_the_new_names(tmp_path, state):
    state["config"] = {"train": {"clip_norm": 1.0, "recompute": False, "steps": 20}}
    old = {"format": checkpoint.FORMAT, "format_version": 2, **state}
    old["digest"] = checkpoint.sha256_of(checkpoint.flatten(old))
    torch.save(old, tmp_path / "checkpoint_7.pt")
    settings = {"steps": 20, "max_grad_norm": 1.0, "activation_checkpointing": False}
    assert checkpoint.load(tmp_path / "checkpoint_7.pt")["config"] == {"train": settings}


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
    checkpoint.save(tmp_path / "checkpoint_7.pt", state)
    whole = torch.load(tmp_path / "checkpoint_7.pt", weights_only=True)
    del whole[lost]
    torch.save(whole, tmp_path / "checkpoint_7.pt")
    words = {"format": "it has 1 weights, but no moments", "format_version": "version None"}
    with pytest.raises(CheckpointError, match=words.get(lost, f"it lacks {lost}")):
        checkpoint.load(tmp_path / "checkpoint_7.pt")


def test_a_changed_value_is_told_by_the_digest(tmp_path, state):
    path = tmp_path / "checkpoint_7.pt"
    for part, value in (("step", 8), ("data", {"text_sha256": "cd"})):
        checkpoint.save(path, state)
        whole = torch.load(path, weights_only=True)
        torch.save(whole | {part: value}, path)
        with pytest.raises(DamagedError, match="do not match its digest"):
            checkpoint.load(path)


def test_numbers_that_are_not_finite_are_refused_by_name(tmp_path, state, monkeypatch):
    state["model"]["weight"][3, 4] = float("inf")
    path = tmp_path / "checkpoint_7.pt"
    with pytest.raises(NonFiniteError, match=r"model\.weight is not finite at step 7, nothing is"):
        checkpoint.save(path, state)
    assert not path.exists()
    monkeypatch.setattr(checkpoint, "not_finite", lambda state: [])
    checkpoint.save(path, state)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"model\.weight holds NaN or inf"):
        checkpoint.load(path)


def test_a_format_of_another_release_is_no_reason_to_start_anew(tmp_path, state, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 99)
    checkpoint.save(tmp_path / "checkpoint_7.pt", state)
    monkeypatch.undo()
    for read in (
        lambda: checkpoint.newest(tmp_path),
        lambda: checkpoint.load(tmp_path / "checkpoint_7.pt"),
    ):
        with pytest.raises(CheckpointError, match="its format is version 99"):
            read()


def test_foreign_weights_say_what_they_can_be_used_for(tmp_path):
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


def test_the_newest_whole_checkpoint_is_found(tmp_path, state, capsys):
    for step in (900, 1000, 95):
        checkpoint.save(tmp_path / f"checkpoint_{step}.pt", state | {"step": step})
    (tmp_path / "checkpoint_1000.pt").write_bytes(b"half")
    path, found = checkpoint.newest(tmp_path)
    assert (path.name, found["step"]) == ("checkpoint_900.pt", 900)
    assert "Skipped a damaged checkpoint" in capsys.readouterr().out
    assert checkpoint.newest(tmp_path / "absent") is None
    with pytest.raises(CheckpointError, match=r"resume from checkpoint_900\.pt"):
        checkpoint.load(tmp_path / "checkpoint_1000.pt")
    for step in (95, 900):
        (tmp_path / f"checkpoint_{step}.pt").write_bytes(b"half")
    with pytest.raises(CheckpointError, match="all of its 3 checkpoints are damaged"):
        checkpoint.newest(tmp_path)


def test_old_checkpoints_go_the_newest_and_milestones_stay(tmp_path, state):
    for step in (*range(1000, 5000, 1000), 9000):
        checkpoint.checkpoint_path(tmp_path, step).touch()
    directory = RunDirectory(tmp_path)
    directory.save(state | {"step": 5000}, keep=2, milestones={1000})
    directory.close()
    # 9000, whatever it is, does not count and is left alone
    assert checkpoint.steps_in(tmp_path) == [9000, 5000, 4000, 1000]


def test_files_that_torch_writes_pass(tmp_path):
    path = tmp_path / "file.pt"
    parameter = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    for content in ({"w": parameter}, [torch.zeros(2, 0), 1, "x", None, 2.5], torch.arange(3)):
        torch.save(content, path)
        assert checkpoint.check_archive(path) is None


def test_hostile_files_are_refused_run_nothing_and_take_no_memory(tmp_path):
    assert torture.hostile(tmp_path)["hostile files"] > 40


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it is empty"),
        (b"step 5000\n", "it is a text file"),
        (b"  <!DOCTYPE html>", "it is an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1", "type git lfs pull"),
        (b"\x80\x04]", "it is a plain pickle"),
        (b"PK\x03\x04 and no more", "it is damaged"),
    ],
)
def test_what_a_file_looks_like_is_said(tmp_path, content, words):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(DamagedError, match=words):
        checkpoint.check_archive(tmp_path / "x.pt")


def test_what_is_not_there_or_no_file_is_said(tmp_path):
    with pytest.raises(CheckpointError, match="there is no such file"):
        checkpoint.check_archive(tmp_path / "absent.pt")
    with pytest.raises(CheckpointError, match="it cannot be read"):
        checkpoint.check_archive(tmp_path)


def test_a_size_that_the_file_cannot_have_is_refused(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"w": torch.zeros(1000)}, path)
    with zipfile.ZipFile(path) as archive:
        place = archive.start_dir
        (record,) = [r for r in archive.infolist() if r.filename.endswith("data/0")]
        size = record.file_size.to_bytes(4, "little")
    raw = bytearray(path.read_bytes())
    while (place := raw.find(size + size, place)) > 0:  # both sizes, in the directory
        raw[place : place + 8] = (2_000_000_000).to_bytes(4, "little") * 2
    path.write_bytes(raw)
    with pytest.raises(DamagedError, match="its records claim"):
        checkpoint.check_archive(path)
