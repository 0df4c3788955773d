"""The checks of torture.py, a few of each."""

import pytest

import torture

pytestmark = pytest.mark.slow


def test_runs_killed_at_any_event_lose_nothing_and_damaged_checkpoints_are_refused():
    with torture.open_workspace(steps=8) as workspace:
        done = torture.kill_runs(workspace, 16)
        (path,) = workspace.folder.glob("undisturbed/checkpoints/*/checkpoint_8.pt")
        damage = torture.flip_bits(path, 100)
    assert done["kills"] >= 16 and done["kinds of event"] == 11
    assert 75 < damage["refused"] <= 100


def test_hostile_files_are_refused_and_run_nothing_and_need_little_memory(tmp_path):
    assert torture.load_hostile_files(tmp_path)["hostile files"] > 35
