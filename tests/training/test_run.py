"""The run: a stop leaves no trace, and nothing is trained twice."""

import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch

from conftest import ROOT, overrides
from workflow.config.load import load_config
from workflow.data import load_corpus
from workflow.errors import CheckpointError, NonFiniteError
from workflow.training import (
    Run,
    Trainer,
    checkpoint,
    continue_uninterrupted,
    open_run,
    resume_run,
    smoke_test,
)


def corpus_of(config, reference):
    return load_corpus(config, reference.tokenizer.backend_tokenizer, reference.end_of_text)


def opened(config, reference) -> Run:
    return open_run(config, reference, corpus_of(config, reference))


def finished(run: Run, max_steps: int) -> Run:
    list(run.train(max_steps))
    return run


def losses(run: Run) -> list[float]:
    return [row["loss"] for row in run.history if "loss" in row]


def beside(tmp_path, *more):
    """The same settings in another folder."""
    return load_config(ROOT / "SmolLm3_Config.yaml", "ci", overrides(tmp_path / "beside", *more))


def test_sampling_between_steps_changes_nothing(config, reference, tmp_path):
    quiet = finished(opened(config, reference), 20)
    talking = opened(beside(tmp_path), reference)
    for _ in talking.train(20):
        talking.sample("Once")
    assert losses(talking) == losses(quiet)
    assert talking.trainer.weights_sha256() == quiet.trainer.weights_sha256()


def test_uninterrupted_and_resumed_steps_have_the_same_trace(config, reference, capsys):
    run = finished(opened(config, reference), 20)
    run.save()
    uninterrupted = continue_uninterrupted(run, 25)
    run.close()
    run = finished(resume_run(run.directory.checkpoint(20), config), 25)
    run.save()
    assert run.trace(21) == uninterrupted
    assert len(uninterrupted.losses) == 5
    printed = capsys.readouterr().out
    for words in (
        "Step: 20, Train Loss: ",
        "Saved checkpoint_20.pt",
        "Loaded checkpoint_20.pt",
        "Step: 5, Resume Loss: ",
        "(global step 25)",
        "Saved checkpoint_25.pt",
    ):
        assert words in printed


TRAIN_STEP = Trainer.train_step


class Interrupt:
    """In place of `Trainer.train_step`: Ctrl-C comes once, in the middle of a step."""

    def __init__(self, step: int):
        self.step, self.done = step, False

    def __get__(self, trainer, kind):
        def train_step():
            if trainer.global_step == self.step and not self.done:
                self.done = True
                signal.raise_signal(signal.SIGINT)
            return TRAIN_STEP(trainer)

        return train_step


@pytest.mark.parametrize("step", [3, 22])
def test_uninterrupted_and_resumed_steps_continue_after_an_interrupt(
    config, reference, monkeypatch, step
):
    """Each cell of the notebook is interrupted once, and everything is run again."""
    monkeypatch.setattr(Trainer, "train_step", Interrupt(step))
    run = opened(config, reference)
    with pytest.raises(KeyboardInterrupt) if step == 3 else nullcontext():
        finished(run, 20)
    finished(run, 20).save()
    if step == 22:
        with pytest.raises(KeyboardInterrupt):
            continue_uninterrupted(run, 25)
        run.save()  # the cell before, run again: there is nothing to save
        assert sorted(checkpoint.steps_in(run.directory.folder)) == [10, 20]
    uninterrupted = continue_uninterrupted(run, 25)
    run.close()
    assert (uninterrupted.first_step, len(uninterrupted.losses)) == (21, 5)

    monkeypatch.setattr(Trainer, "train_step", Interrupt(23))
    run = resume_run(run.directory.checkpoint(20), config)
    with pytest.raises(KeyboardInterrupt):
        finished(run, 25)
    run = opened(config, reference)  # Run All
    assert run.global_step == 24
    assert continue_uninterrupted(run, 25) == uninterrupted
    run.close()
    run = finished(resume_run(run.directory.checkpoint(20), config), 25)
    assert run.trace(21) == uninterrupted


def test_a_real_interrupt_waits_until_the_update_is_done_and_recorded(config, reference):
    run = opened(config, reference)
    train_step = run.trainer.train_step

    def pressed():
        if run.global_step == 4:
            signal.raise_signal(signal.SIGINT)
        return train_step()

    run.trainer.train_step = pressed
    with pytest.raises(KeyboardInterrupt):
        finished(run, 20)
    assert run.global_step == len(losses(run)) == 5


def test_a_closed_run_says_so(config, reference):
    run = finished(opened(config, reference), 3)
    run.close()
    run.close()
    with pytest.raises(CheckpointError, match="it is closed; open it again"):
        run.sample("Once")
    with pytest.raises(CheckpointError, match="it is closed; open it again"):
        finished(run, 20)
    run.save()
    assert checkpoint.steps_in(run.directory.folder) == []


def test_a_checkpoint_elsewhere_does_not_touch_the_run(config, reference, tmp_path):
    run = finished(opened(config, reference), 10)
    run.save()
    run.close()
    folder = shutil.copytree(run.directory.folder, tmp_path / "backup" / run.name)
    with pytest.raises(CheckpointError, match=r"--set paths\.checkpoints="):
        resume_run(folder / "checkpoint_10.pt", config)


def test_what_a_kill_left_half_written_is_removed(config, reference, capsys):
    run = opened(config, reference)
    (run.directory.folder / "checkpoint_5.pt.tmp.123").write_bytes(b"half")
    run.close()
    opened(config, reference).close()
    assert "Removed checkpoint_5.pt.tmp.123" in capsys.readouterr().out
    assert not list(run.directory.folder.glob("*.tmp.*"))


def test_weights_that_are_not_finite_are_not_saved(config, reference):
    run = finished(opened(config, reference), 3)
    with torch.no_grad():
        run.trainer.model.layers[0].mlp.up_proj.weight[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match="nothing is saved"):
        run.save()
    assert checkpoint.steps_in(run.directory.folder) == []


def test_run_again_after_the_end_nothing_is_trained(config, reference, capsys, monkeypatch):
    run = finished(opened(config, reference), 20)
    text = run.sample("Once upon")
    run.save()
    uninterrupted = continue_uninterrupted(run, 25)
    run.close()
    run = finished(resume_run(run.directory.checkpoint(20), config), 25)
    run.save()
    history, weights = list(run.history), run.trainer.weights_sha256()
    run.close()
    capsys.readouterr()

    monkeypatch.setattr(Trainer, "train_step", None)  # from here on a step would fail
    run = finished(opened(config, reference), 20)
    run.save()
    assert continue_uninterrupted(run, 25) == uninterrupted
    run.close()
    run = finished(resume_run(run.directory.checkpoint(20), config), 25)
    run.save()
    assert (run.history, run.trainer.weights_sha256()) == (history, weights)
    printed = capsys.readouterr().out
    assert "resuming from checkpoint_25.pt" in printed
    assert "already at step 25" in printed
    assert "Step: 20, Train Loss: " in printed
    assert text in printed
    assert "Step: 5, Resume Loss: " in printed


def test_a_broken_off_loop_goes_on_where_it_was(config, reference, tmp_path):
    straight = finished(opened(beside(tmp_path), reference), 20)
    run = opened(config, reference)
    for step in run.train(20):
        if step == 7:
            break
    assert run.global_step == 7
    assert losses(finished(run, 20)) == losses(straight)


def test_a_run_opened_again_in_the_same_process_goes_on(config, reference, tmp_path):
    straight = finished(opened(beside(tmp_path), reference), 20)
    first = opened(config, reference)
    for step in first.train(20):
        if step == 7:
            break
    again = opened(config, reference)  # the cell was run twice; the first run is saved and closed
    assert again.global_step == 7
    first.close()  # leaves the lock to the other
    in_other_process = "import sys, filelock; filelock.FileLock(sys.argv[1], timeout=0).acquire()"
    lock = str(again.directory.folder / ".lock")
    refused = subprocess.run([sys.executable, "-c", in_other_process, lock], capture_output=True)
    assert b"Timeout" in refused.stderr
    with pytest.raises(CheckpointError, match="it is closed"):
        finished(first, 20)
    assert losses(finished(again, 20)) == losses(straight)


def test_a_damaged_checkpoint_is_passed_over_and_written_anew(config, reference, tmp_path):
    straight = finished(opened(beside(tmp_path), reference), 20)
    run = finished(opened(config, reference), 20)
    run.save()
    path = run.directory.checkpoint(20)
    run.close()
    path.write_bytes(path.read_bytes()[:-1])
    run = opened(config, reference)
    assert run.global_step == 10
    finished(run, 20).save()
    assert run.trainer.weights_sha256() == straight.trainer.weights_sha256()
    assert checkpoint.load(path)["step"] == 20


def test_a_run_killed_between_checkpoints_repeats_the_steps_since(config, reference, tmp_path):
    straight = finished(opened(beside(tmp_path), reference), 20)
    run = opened(config, reference)
    for step in run.train(20):
        if step == 17:
            break
    run.close()  # as a kill would: step 10 is the newest checkpoint
    run = opened(config, reference)
    assert run.global_step == 10
    assert losses(finished(run, 20)) == losses(straight)
    assert run.trainer.weights_sha256() == straight.trainer.weights_sha256()


def change(config, reference, tmp_path, mutate) -> Run:
    """A run of 10 steps whose checkpoint is changed by `mutate` before the resume."""
    run = finished(opened(config, reference), 10)
    run.save()
    path = run.directory.checkpoint(10)
    run.close()
    state = checkpoint.load(path)
    mutate(state)
    checkpoint.save(path, state)
    return finished(resume_run(path, config), 20)


@pytest.mark.parametrize("part", list(checkpoint.CONTENTS))
def test_without_any_part_of_the_checkpoint_the_resume_is_refused(
    config, reference, tmp_path, part
):
    run = finished(opened(config, reference), 10)
    run.save()
    path = run.directory.checkpoint(10)
    run.close()
    state = torch.load(path, weights_only=True)
    del state[part]
    torch.save(state, path)
    with pytest.raises(CheckpointError):
        resume_run(path, config)


@pytest.mark.parametrize(
    "mutate",
    [
        lambda state: state["optimizer"]["state"].pop(3),
        lambda state: state["optimizer"]["state"][3].pop("exp_avg"),
        lambda state: state["optimizer"]["state"][3].pop("step"),
        lambda state: state["optimizer"].pop("param_groups"),
        lambda state: state["model"].pop("model.norm.weight"),
        lambda state: state["random"].pop("torch"),
        lambda state: state["random"].pop("python"),
        lambda state: state["data"].pop("text_sha256"),
        lambda state: state["data"].update(text_sha256="other"),
        lambda state: state["tokenizer"].update(sha256="other"),
        lambda state: state["config"]["train"].update(learning_rate=1.0),
        lambda state: state["config"]["run"].pop("seed"),
    ],
)
def test_a_checkpoint_without_an_item_or_with_another_is_refused(
    config, reference, tmp_path, mutate
):
    with pytest.raises(CheckpointError):
        change(config, reference, tmp_path, mutate)


@pytest.mark.parametrize(
    "mutate",
    [
        lambda state: state.update(step=9),
        lambda state: state["optimizer"]["state"][0]["exp_avg"].zero_(),
        lambda state: state["optimizer"]["state"][0]["exp_avg_sq"].mul_(2),
        lambda state: state["optimizer"]["state"][0]["step"].zero_(),
        lambda state: state["model"]["model.norm.weight"].add_(1e-3),
    ],
)
def test_an_item_of_another_value_changes_the_result(config, reference, tmp_path, mutate):
    straight = finished(opened(beside(tmp_path), reference), 20)
    changed = change(config, reference, tmp_path, mutate)
    assert changed.trainer.weights_sha256() != straight.trainer.weights_sha256()


def test_an_edited_setting_is_refused_with_both_values(config, reference, tmp_path):
    run = finished(opened(config, reference), 10)
    run.save()
    run.close()
    path = ROOT / "SmolLm3_Config.yaml"
    edited = load_config(path, "ci", overrides(tmp_path, "train.learning_rate=1e-4"))
    words = "train.learning_rate is 0.003 in the checkpoint and 0.0001 now"
    with pytest.raises(CheckpointError, match=words):
        resume_run(run.directory.checkpoint(10), edited)
    assert opened(edited, reference).name != run.name


def test_numbers_that_are_not_finite_stop_the_run_before_the_update(config, reference):
    run = finished(opened(config, reference), 3)
    with torch.no_grad():
        run.trainer.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    before = run.trainer.weights_sha256()
    with pytest.raises(NonFiniteError, match="at step 4"):
        finished(run, 5)
    assert run.global_step == 3
    assert run.trainer.weights_sha256() == before


@pytest.fixture
def ahead(monkeypatch):
    """As on a GPU, where updates are launched before the numbers of earlier ones are there."""
    monkeypatch.setattr(
        Run, "_metrics_due", lambda run, n: run.global_step % 7 == 0 or run._validation_step(n)
    )


def rows(run: Run) -> list[dict]:
    return [{**row, "tokens_per_second": 0} for row in run.history if "began" not in row]


def test_numbers_that_come_later_make_the_same_record(config, reference, tmp_path, request):
    at_once = finished(opened(config, reference), 20)
    request.getfixturevalue("ahead")
    run = opened(beside(tmp_path), reference)
    for step in run.train(20):
        if step == 12:
            assert run.history[-1]["step"] == 12  # who looks, waits
            break
    for step in run.train(20):
        if step == 16:
            run.sample("Once")
    assert [row for row in rows(run) if "sample" not in row] == rows(at_once)
    assert run.trainer.weights_sha256() == at_once.trainer.weights_sha256()
    run.save()
    assert [row["step"] for row in run.history[-2:]] == [20, 20]


def test_a_number_that_comes_later_and_is_not_finite_stops_the_run_where_it_was(
    config, reference, ahead, monkeypatch
):
    run = opened(config, reference)
    batch = Trainer.batch

    def poisoned(trainer, step):
        if step == 3:  # for one step
            trainer.model.norm.weight.data[0] = float("nan")
        if step == 4:
            trainer.model.norm.weight.data[0] = 1.0
        return batch(trainer, step)

    monkeypatch.setattr(Trainer, "batch", poisoned)
    with pytest.raises(NonFiniteError, match="at step 4"):
        finished(run, 20)
    assert run.global_step == 3
    with pytest.raises(CheckpointError, match="it was stopped in the middle of a step"):
        run.save()
    run.save_and_close()
    assert not checkpoint.steps_in(run.directory.folder)


def test_loss_starts_at_the_references_own_and_falls(config, reference, tmp_path):
    corpus = corpus_of(config, reference)
    test = smoke_test(config, reference, corpus)
    inputs, targets = test.batches[0]
    with torch.no_grad():
        logits = reference.model(inputs).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    assert abs(test.logged.losses[0] - expected) < 1e-5
    assert test.exact
    assert smoke_test(config, reference, corpus).logged == test.logged
    assert not list((tmp_path / "checkpoints").glob("*smoke-test*"))
