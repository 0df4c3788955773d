"""A run: resume is exact, and no step is trained twice."""

import shutil
import signal
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from conftest import ROOT, overrides
from workflow.config import load_config
from workflow.data import load_corpus
from workflow.errors import CheckpointError, NonFiniteError
from workflow.reference import load_reference
from workflow.training import (
    Run,
    Trainer,
    checkpoint,
    continue_uninterrupted,
    initial_model,
    open_run,
    resume_run,
    smoke_test,
    uninterrupted,
)
from workflow.training.metrics import StepTrace
from workflow.training.resume import code_sha256
from workflow.training.signals import DeferredSignals


def corpus_of(config, reference):
    return load_corpus(config, reference.tokenizer.backend_tokenizer, reference.end_of_text)


def opened(config, reference) -> Run:
    return open_run(config, reference, corpus_of(config, reference))


def trained(run: Run, max_steps: int) -> Run:
    list(run.train(max_steps))
    return run


def rows(run: Run, *keys: str) -> list[dict]:
    """The rows of the log with one of these keys, without times."""
    chosen = [row for row in run.history if any(key in row for key in keys)]
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in chosen]


@dataclass(frozen=True)
class Finished:
    """A run of 20 steps, then 5 steps without a stop, and the same 5 steps resumed."""

    folder: Path
    rows: list[dict]  # losses and validation losses of 25 steps
    sample: str  # at step 20
    weights: dict[int, str]  # step -> hash
    uninterrupted: StepTrace
    resumed: StepTrace


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Finished:
    folder = tmp_path_factory.mktemp("finished")
    config = load_config(ROOT / "SmolLm3_Config.yaml", "ci", overrides(folder))
    run = trained(opened(config, load_reference("random", config.model_entry)), 20)
    sample, weights = run.sample("Once upon"), {20: run.trainer.weights_sha256()}
    run.save()
    uninterrupted = continue_uninterrupted(run, 25)
    run = trained(resume_run(run.directory.checkpoint(20), config), 25)
    run.save_and_close()
    weights[25], resumed = run.trainer.weights_sha256(), run.trace(21)
    logged = rows(run, "loss", "validation_loss")
    return Finished(folder, logged, sample, weights, uninterrupted, resumed)


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """The folder of checkpoints in a copy of the finished run, where `config` expects it."""
    ignore = shutil.ignore_patterns("events.*")
    shutil.copytree(finished.folder, tmp_path, dirs_exist_ok=True, ignore=ignore)
    (folder,) = tmp_path.glob("checkpoints/*")
    return folder


@pytest.fixture(autouse=True)
def no_wait(monkeypatch):
    """The clock jumps where TensorBoard would wait for the next second."""
    skipped, clock = [], time.time
    monkeypatch.setattr(time, "time", lambda: clock() + sum(skipped))
    monkeypatch.setattr(time, "sleep", skipped.append)


def test_resumed_steps_equal_uninterrupted_steps(finished):
    assert finished.resumed == finished.uninterrupted
    assert (finished.resumed.first_step, len(finished.resumed.losses)) == (21, 5)


def test_a_finished_run_is_replayed_and_not_trained_again(
    config, reference, copied, finished, capsys, monkeypatch
):
    monkeypatch.setattr(Trainer, "train_step", None)  # a step would fail
    run = trained(opened(config, reference), 20)
    run.save()
    assert continue_uninterrupted(run, 25) == finished.uninterrupted
    run = trained(resume_run(run.directory.checkpoint(20), config), 25)
    run.save_and_close()
    assert rows(run, "loss", "validation_loss") == finished.rows
    assert run.trainer.weights_sha256() == finished.weights[25]
    assert finished.sample in capsys.readouterr().out


def test_a_run_starts_with_the_initial_model(config, reference):
    state = torch.get_rng_state()
    model = initial_model(config, reference)
    assert torch.equal(state, torch.get_rng_state())
    run = opened(config, reference)
    assert all(map(torch.equal, model.parameters(), run.trainer.model.parameters()))
    run.close()


def interrupt(monkeypatch, step: int) -> None:
    """Ctrl-C will be pressed once, in the middle of this step."""
    train_step, due = Trainer.train_step, [step]

    def interrupted(trainer):
        if trainer.global_step in due:
            due.clear()
            signal.raise_signal(signal.SIGINT)
        train_step(trainer)

    monkeypatch.setattr(Trainer, "train_step", interrupted)


def test_settings_that_change_no_numbers_may_change_in_a_run(config, reference, capsys):
    trained(opened(config, reference), 10).save_and_close()
    changes = {
        "train": {"micro_batch_size": 1, "validate_every": 3, "activation_checkpointing": True},
        "sample": {"temperature": 0.0, "every": 5},
        "run": {"device": "auto"},
    }
    other = {name: getattr(config, name).model_copy(update=new) for name, new in changes.items()}
    run = opened(config.model_copy(update=other), reference)
    words = "Note: saved on {'micro_batch_size': None}, now on {'micro_batch_size': 1}: no longer"
    assert run.global_step == 10 and words in capsys.readouterr().out
    run.close()


def test_interrupted_cells_of_the_notebook_can_be_run_again(
    config, reference, finished, monkeypatch, capsys
):
    run = opened(config, reference)
    interrupt(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        trained(run, 20)
    assert run.global_step == len(rows(run, "loss")) == 4  # the step was finished and logged first
    stopped = "Stopped at step 4, saved. To continue, run the same command or cell again.\n"
    assert stopped in capsys.readouterr().out
    trained(run, 20).save()

    interrupt(monkeypatch, 22)
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        continue_uninterrupted(run, 25)
    run.save()  # the cell before, run again: there is nothing to save
    assert checkpoint.steps_in(run.directory.folder) == [20, 10]
    assert continue_uninterrupted(run, 25) == finished.uninterrupted

    interrupt(monkeypatch, 23)
    run = resume_run(run.directory.checkpoint(20), config)
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        trained(run, 25)
    run = opened(config, reference)  # all cells are run again
    assert run.global_step == 24
    assert continue_uninterrupted(run, 25) == finished.uninterrupted
    run = trained(resume_run(run.directory.checkpoint(20), config), 25)
    assert run.trace(21) == finished.uninterrupted
    run.close()


@pytest.mark.parametrize(("then", "saved"), [("save", [5]), ("close", []), ("train", [6])])
def test_ctrl_c_before_a_break_is_raised_by_the_next_call(config, reference, then, saved):
    run = opened(config, reference)
    for step in run.train(20):
        if step == 5:
            signal.raise_signal(signal.SIGINT)
            break
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        trained(run, 20) if then == "train" else getattr(run, then)()
    assert checkpoint.steps_in(run.directory.folder) == saved
    run.close()  # only once


def test_a_second_signal_does_not_wait():
    with DeferredSignals() as signals:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt, match=r"^$"):
            signal.raise_signal(signal.SIGINT)
    assert not signals.pending


def test_a_run_opened_twice_in_one_process_is_saved_closed_and_continued(
    config, reference, finished
):
    first = opened(config, reference)
    for stop in (5, 7):  # a loop that was left with `break` can be started again
        for step in first.train(20):
            if step == stop:
                break
    again = opened(config, reference)
    assert again.global_step == 7
    first.close()
    assert again.directory._lock.is_locked  # the lock now belongs to the other object
    for use in (lambda: trained(first, 20), lambda: first.sample("Once")):
        with pytest.raises(CheckpointError, match="it is closed; open it again"):
            use()
    first.directory.checkpoint(7).unlink()
    first.save()
    assert checkpoint.steps_in(first.directory.folder) == []
    expected = [row for row in finished.rows if row["step"] <= 20]
    assert rows(trained(again, 20), "loss", "validation_loss") == expected
    again.close()


def test_a_checkpoint_outside_the_folder_of_runs_is_refused(config, copied, tmp_path):
    folder = shutil.copytree(copied, tmp_path / "backup" / copied.name)
    with pytest.raises(CheckpointError, match=r"move its folder there, or add --set paths\.check"):
        resume_run(folder / "checkpoint_20.pt", config)


def test_a_damaged_checkpoint_is_skipped_and_written_again(config, reference, copied, finished):
    path = copied / "checkpoint_25.pt"
    path.write_bytes(path.read_bytes()[:-1])
    run = opened(config, reference)
    assert run.global_step == 20
    trained(run, 25).save_and_close()
    assert run.trainer.weights_sha256() == finished.weights[25]
    assert checkpoint.load(path)["step"] == 25


@pytest.fixture
def late_metrics(monkeypatch):
    """As on a GPU: steps are started before the metrics of earlier steps have arrived."""
    due = lambda run, n: run.global_step % 7 == 0 or run._is_validation_step(n)  # noqa: E731
    monkeypatch.setattr(Run, "_metrics_due", due)


def test_late_metrics_make_the_same_log_and_samples_do_not_change_training(
    config, reference, finished, late_metrics
):
    run = opened(config, reference)
    for step in run.train(20):
        if step == 12:
            assert run.history[-1]["step"] == 12  # reading the log waits for the metrics
            break
    for step in run.train(20):
        if step in (13, 16, 17):
            run.sample("Once")
    expected = [row for row in finished.rows if row["step"] <= 20]
    assert rows(run, "loss", "validation_loss") == expected
    assert run.trainer.weights_sha256() == finished.weights[20]
    run.save_and_close()


def test_a_late_number_that_is_not_finite_stops_the_run_and_nothing_is_saved(
    config, reference, late_metrics, monkeypatch
):
    run, batch = opened(config, reference), Trainer.batch

    def poisoned_batch(trainer, step):
        if step in (3, 4):  # NaN for one step only
            trainer.model.norm.weight.data[0] = float("nan") if step == 3 else 1.0
        return batch(trainer, step)

    monkeypatch.setattr(Trainer, "batch", poisoned_batch)
    with pytest.raises(NonFiniteError, match="at step 4"):
        trained(run, 20)
    assert run.global_step == 3
    with pytest.raises(CheckpointError, match="it was stopped in the middle of a step"):
        run.save()
    run.save_and_close()
    assert not checkpoint.steps_in(run.directory.folder)


def test_the_smoke_test_starts_at_the_loss_of_the_original_and_is_exact(config, reference):
    corpus = corpus_of(config, reference)
    test = smoke_test(config, reference, corpus)
    inputs, targets = test.batches[0]
    expected = reference.model(inputs, labels=inputs, shift_labels=targets).loss.item()
    assert abs(test.logged.losses[0] - expected) < 1e-5
    assert test.exact
    train = config.train.model_copy(update={"precision": "bfloat16"})  # as in `full`
    for same in (config, config.model_copy(update={"train": train})):
        assert smoke_test(same, reference, corpus).logged == test.logged
    assert not list(config.paths.checkpoints.glob("*smoke-test*"))
    (folder,) = config.paths.runs.glob("*smoke-test*")
    assert not list(folder.glob("events*"))  # TensorBoard shows only runs


@pytest.mark.slow
def test_the_smoke_test_of_the_real_model_is_exact(tmp_path, smollm2):
    config = load_config(ROOT / "SmolLm3_Config.yaml", "cpu", overrides(tmp_path))
    assert smoke_test(config, smollm2, corpus_of(config, smollm2)).exact


def test_a_smoke_test_of_other_code_or_with_a_difference_is_repeated(
    config, reference, monkeypatch, capsys
):
    corpus = corpus_of(config, reference)
    train = uninterrupted.train_uninterrupted
    with monkeypatch.context() as patch:
        wrong = {"weights_sha256": "wrong"}
        patch.setattr(uninterrupted, "train_uninterrupted", lambda *a: replace(train(*a), **wrong))
        assert not smoke_test(config, reference, corpus).exact
    assert smoke_test(config, reference, corpus).exact  # the wrong result was not kept
    (file,) = config.paths.runs.glob("*/smoke_test.json")
    replace(StepTrace.read(file), code="other").write(file)
    for words in ("it is of other code, or damaged, and is repeated", "read from its log"):
        capsys.readouterr()
        assert smoke_test(config, reference, corpus).exact
        assert words in capsys.readouterr().out
    file.write_text(file.read_text().replace("4.", "3."))
    with pytest.raises(CheckpointError, match="this record is missing or damaged"):
        StepTrace.read(file)


def test_a_log_that_was_changed_since_the_checkpoint_is_refused(config, reference, capsys):
    trained(opened(config, reference), 10).save_and_close()
    (file,) = config.paths.runs.glob("*/metrics.jsonl")
    text, changed = file.read_text(), r"its rows up to step 10 were changed after checkpoint_10"
    for other, message in (
        (text.replace('"loss": 5.', '"loss": 4.', 1), changed),
        (text + '{"step": 7, "validation_loss": 0.1}\n', changed),
        (text + '{"step": "7", "loss": 0.1}\n', r"line \d+ is damaged"),
    ):
        file.write_text(other)
        with pytest.raises(CheckpointError, match=message):
            opened(config, reference)
    file.unlink()
    for words in (f"Note: {file} is missing: a new log starts at step 10", "resuming from"):
        opened(config, reference).close()
        assert words in capsys.readouterr().out


def test_records_name_the_code_that_made_them(config, reference, monkeypatch, capsys):
    run = trained(opened(config, reference), 20)
    run.save()
    assert run.trace(1).origin == continue_uninterrupted(run, 25).origin == "recorded by this code"
    monkeypatch.setattr("workflow.training.metrics.code_sha256", lambda: "of an edited file")
    capsys.readouterr()
    run = trained(opened(config, reference), 20)
    fresh = "recorded by other code (FRESH=1 make run trains a new run)"
    assert f"replaying its log (it is at step 20, {fresh}):" in capsys.readouterr().out
    assert run.trace(1).origin == continue_uninterrupted(run, 25).origin == fresh


def test_comments_and_docstrings_are_not_part_of_the_code(tmp_path):
    file, code = tmp_path / "code.py", 'def f(x):\n    """A."""\n    return "B"\n'
    hashes = []
    for text in (code, code.replace("A", "C") + "# D\n", code.replace("B", "C")):
        file.write_text(text)
        code_sha256.cache_clear()
        hashes.append(code_sha256(str(file)))
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_run_trains_in_another_thread(config, reference):
    """Signals cannot be deferred there."""
    run = opened(config, reference)
    thread = threading.Thread(target=trained, args=(run, 3))
    thread.start()
    thread.join()
    assert run.global_step == 3
    run.close()
