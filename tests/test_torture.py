"""The checks of torture.py, a few of each."""

import lies
import pytest

import fuzz
import torture

pytestmark = pytest.mark.slow


def test_runs_killed_at_any_event_lose_nothing_and_damaged_checkpoints_are_refused():
    with torture.open_workspace(steps=8) as workspace:
        done = torture.kill_runs(workspace, 16)
        (path,) = workspace.folder.glob("undisturbed/checkpoints/*/checkpoint_8.pt")
        damage = torture.flip_bits(path, 100)
    assert done["kills"] >= 16 and done["kinds of event"] == 11
    assert 75 < damage["refused"] <= 100


def test_a_run_stopped_after_each_step_equals_one_without_stops():
    with torture.open_workspace() as workspace:
        torture.stop_after_each_step(workspace, 6)


def test_any_input_gives_a_result_or_one_line(reference, tmp_path):
    assert fuzz.fuzz_yaml(tmp_path, 90) >= 90
    assert fuzz.fuzz_text(tmp_path, reference, 200) >= 200
    assert fuzz.fuzz_prompts(reference, 200) >= 200


def test_hostile_files_are_refused_and_run_nothing_and_need_little_memory(tmp_path):
    assert torture.load_hostile_files(tmp_path)["hostile files"] > 40


def test_lies_are_refused_or_are_the_truth():
    counts = lies.try_lies(every=12)
    assert sum(counts.values()) > 25
    assert {kind.partition(":")[0] for kind in counts} >= {"tensors", "bits"}
