"""The proof of exact resume: the same steps without a stop, and resumed in new objects."""

import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from workflow.config.settings import Config
from workflow.data import Corpus, batch_at
from workflow.errors import CheckpointError
from workflow.training.metrics import StepTrace
from workflow.training.open import open_run, resume_run, run_name
from workflow.training.resume import code_sha256
from workflow.training.run import UNINTERRUPTED_FILE, Run
from workflow.training.signals import DeferredSignals


def continue_uninterrupted(run: Run, max_steps: int) -> StepTrace:
    """Trains the steps after `train.steps`, up to `max_steps`, without a stop and without a log.

    The run is closed first; only its trainer continues, in memory. The trace is written next to the
    log. If that file exists, it is read, and nothing is trained. At the end the trainer's memory is
    freed. Raises CheckpointError if the run was already resumed.
    """
    run.close()
    file = run.folder / UNINTERRUPTED_FILE
    if not file.is_file():
        train_uninterrupted(run, max_steps).write(file)
    run.trainer.free()  # the resume can use nothing but the checkpoint
    return StepTrace.read(file)


def train_uninterrupted(run: Run, max_steps: int) -> StepTrace:
    trainer, first_step = run.trainer, run.config.train.steps + 1
    if trainer.global_step >= first_step and first_step not in trainer.losses:
        what = "it was resumed before its uninterrupted steps were trained"
        raise CheckpointError(run.folder, what, "start a new run next to it with FRESH=1")
    if run.loaded_step == trainer.global_step:
        print(f"Note: these steps follow a checkpoint, loaded at step {run.loaded_step}")
    with DeferredSignals() as signals:
        while trainer.global_step < max_steps:
            trainer.train_step()
            trainer.metrics()
            signals.safe_point()
    return trainer.trace(first_step)


@dataclass(frozen=True)
class SmokeTest:
    """A few steps with the original's weights: without a stop, and stopped and resumed."""

    batches: list[tuple[Tensor, Tensor]]  # inputs and targets (B, T) of each step
    uninterrupted: StepTrace  # the steps after the stop
    logged: StepTrace  # all steps, with a stop and a resume

    @property
    def exact(self) -> bool:
        """Whether the resumed losses and weights equal the uninterrupted ones, bit for bit."""
        first = self.uninterrupted.first_step
        resumed = StepTrace(first, self.logged.losses[first - 1 :], self.logged.weights_sha256)
        return resumed == self.uninterrupted


def smoke_test(config: Config, reference, corpus: Corpus) -> SmokeTest:
    """Trains, stops and resumes for a few steps. With the same code, the result is read from files.

    A result that is not exact is not kept. Nor are the checkpoints, 1.6 GB each for the 135M model.
    """
    config = config.for_smoke_test()
    corpus.check_length(config.train.sequence_length)
    stop, end = config.train.steps, config.last_step
    name = run_name(config, reference, corpus)
    folder, checkpoints = config.paths.runs / name, config.paths.checkpoints / name
    files = folder / UNINTERRUPTED_FILE, folder / "smoke_test.json"
    if all(map(is_current, files)):
        print(f"Smoke test {name}: read from its log")
    else:
        if files[1].is_file():
            print(f"Smoke test {name}: it is of other code, or damaged, and is repeated")
            files[1].unlink()
            shutil.rmtree(checkpoints, ignore_errors=True)
        run = open_run(config, reference, corpus)
        list(run.train(stop))
        run.save()
        continue_uninterrupted(run, end)
        run = resume_run(run.directory.checkpoint(stop), config, corpus=corpus)
        list(run.train(end))
        run.trace(1).write(files[1])
        run.close()
    size = config.train.batch_size, config.train.sequence_length
    batches = [batch_at(corpus.train, step, *size, config.run.seed) for step in range(end)]
    result = SmokeTest(batches, *map(StepTrace.read, files))
    shutil.rmtree(checkpoints, ignore_errors=True)
    if not result.exact:
        files[1].unlink()
    return result


def is_current(file: Path) -> bool:
    """Whether the record in a file is undamaged, and of this code."""
    with suppress(CheckpointError):
        return StepTrace.read(file).code == code_sha256()
    return False
