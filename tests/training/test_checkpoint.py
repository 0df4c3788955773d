"""Write whole, read verified."""

import zipfile

import pytest
import torch

from workflow.errors import CheckpointError, DamagedError
from workflow.training import checkpoint, randomness


@pytest.fixture
def state() -> dict:
    return {
        "step": 7,
        "model": {"weight": torch.randn(64, 64)},
        "optimizer": {"state": {}, "param_groups": []},
        "random": randomness.random_states(),
        "data": {"text_sha256": "ab"},
        "config": {"seed": 1},
        "tokenizer": {"end_of_text": 0},
        "reference": {"name": "random"},
        "environment": randomness.environment(torch.device("cpu")),
    }


def test_what_is_written_is_read(tmp_path, state):
    checkpoint.save(tmp_path / "checkpoint_7.pt", state)
    read = checkpoint.load(tmp_path / "checkpoint_7.pt")
    assert torch.equal(read["model"]["weight"], state["model"]["weight"])
    assert {key: read[key] for key in ("step", "data", "config", "environment")} == {
        key: state[key] for key in ("step", "data", "config", "environment")
    }
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint_7.pt"]


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
        with pytest.raises(DamagedError, match="not those of its digest"):
            checkpoint.load(path)


def test_numbers_that_are_not_finite_are_refused_by_name(tmp_path, state):
    state["model"]["weight"][3, 4] = float("inf")
    checkpoint.save(tmp_path / "checkpoint_7.pt", state)
    with pytest.raises(CheckpointError, match=r"model\.weight holds NaN or inf"):
        checkpoint.load(tmp_path / "checkpoint_7.pt")


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
        assert checkpoint.weights_in(checkpoint.read(path)).keys() == weights.keys()
    torch.save({"epoch": 3, "args": [1]}, path)
    with pytest.raises(CheckpointError, match=r"not a checkpoint .*\(a dict with epoch, args\)"):
        checkpoint.load(path)


def test_names_lose_what_wrappers_put_before_them_with_one_note(tmp_path, capsys):
    weight = torch.zeros(1)
    for prefix in ("_orig_mod.", "module.", "module._orig_mod."):
        named = checkpoint.canonical({f"{prefix}embed_tokens.weight": weight}, tmp_path)
        assert list(named) == ["model.embed_tokens.weight"]
        assert capsys.readouterr().out.count("Note: ") == 1
    assert list(checkpoint.canonical({"model.norm.weight": weight}, tmp_path)) == [
        "model.norm.weight"
    ]
    assert capsys.readouterr().out == ""


def test_the_newest_whole_checkpoint_is_found(tmp_path, state, capsys):
    for step in (900, 1000, 95):
        checkpoint.save(tmp_path / f"checkpoint_{step}.pt", state | {"step": step})
    (tmp_path / "checkpoint_1000.pt").write_bytes(b"half")
    path, found = checkpoint.newest(tmp_path)
    assert (path.name, found["step"]) == ("checkpoint_900.pt", 900)
    assert "passed over" in capsys.readouterr().out
    assert checkpoint.newest(tmp_path / "absent") is None
    with pytest.raises(CheckpointError, match=r"resume from checkpoint_900\.pt"):
        checkpoint.load(tmp_path / "checkpoint_1000.pt")
    for step in (95, 900):
        (tmp_path / f"checkpoint_{step}.pt").write_bytes(b"half")
    with pytest.raises(CheckpointError, match="none of its 3 checkpoints is whole"):
        checkpoint.newest(tmp_path)


def test_old_checkpoints_go_the_newest_and_milestones_stay(tmp_path):
    for step in (*range(1000, 6000, 1000), 9000):
        checkpoint.path_of(tmp_path, step).touch()
    checkpoint.prune(tmp_path, step=5000, keep=2, kept={1000, None})
    # 9000, whatever it is, counts for nothing and is left alone
    assert sorted(checkpoint.found(tmp_path)) == [1000, 4000, 5000, 9000]
