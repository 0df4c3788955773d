"""The proof of exact resume: the same steps without a stop, and after one in new objects."""

import shutil
from dataclasses import dataclass

from torch import Tensor

from workflow.config.settings import Config
from workflow.data import Corpus, batch_at
from workflow.errors import CheckpointError
from workflow.training import distributed
from workflow.training.metrics import StepTrace
from workflow.training.open import open_run, resume_run, run_name
from workflow.training.run import UNINTERRUPTED, Run
from workflow.training.signals import deferred_signals


def continue_uninterrupted(run: Run, max_steps: int) -> StepTrace:
    """The steps after `train.steps`, up to `max_steps`, as if the run had never stopped.

    Closes the run first: its trainer goes on in memory, without a folder and without a log. The
    trace is kept next to the log and, if it is there, only read. At the end the trainer's memory is
    freed. Raises CheckpointError if the steps can no longer be computed.
    """
    run.close()
    file = run.folder / UNINTERRUPTED
    if not file.is_file():
        train_uninterrupted(run, max_steps).write(file)
    run.trainer.free()  # from here on there is only the checkpoint
    return StepTrace.read(file)


def train_uninterrupted(run: Run, max_steps: int) -> StepTrace:
    trainer, first_step = run.trainer, run.config.train.steps + 1
    if trainer.global_step >= first_step and first_step not in trainer.losses:
        what = "this run did not continue without a stop before its resume"
        raise CheckpointError(run.folder, what, "start a new run next to it with FRESH=1")
    if run.loaded_step == trainer.global_step:
        print(f"Note: at step {run.loaded_step} this run was itself loaded from a checkpoint")
    with deferred_signals(distributed.all_reduce_max) as safe_point:
        while trainer.global_step < max_steps:
            trainer.train_step()
            trainer.metrics()
            safe_point()
    return trainer.trace(first_step)


@dataclass(frozen=True)
class SmokeTest:
    """A few steps with the reference's weights: without a stop, and stopped and resumed."""

    batches: list[tuple[Tensor, Tensor]]  # inputs and targets (B, T) of each step
    uninterrupted: StepTrace  # the steps after the stop
    logged: StepTrace  # all steps; those after the stop are resumed

    @property
    def exact(self) -> bool:
        """Whether losses and weights after the stop are the same, bit for bit."""
        first = self.uninterrupted.first_step
        resumed = StepTrace(first, self.logged.losses[first - 1 :], self.logged.weights_sha256)
        return resumed == self.uninterrupted


def smoke_test(config: Config, reference, corpus: Corpus) -> SmokeTest:
    """Stop and resume in small, before the long run; the second time it is read from its log.

    Its checkpoints, 1.6 GB each for the 135M, are deleted if the resume was exact.
    """
    config = config.for_smoke_test()
    corpus.check_length(config.train.sequence_length)
    stop, end = config.train.steps, config.last_step
    name = run_name(config, reference, corpus)
    uninterrupted, logged = (
        config.paths.runs / name / f for f in (UNINTERRUPTED, "smoke_test.json")
    )
    if logged.is_file():
        print(f"Smoke test {name}: read from its log")
    else:
        run = open_run(config, reference, corpus)
        list(run.train(stop))
        run.save()
        continue_uninterrupted(run, end)
        run = resume_run(run.directory.checkpoint(stop), config, corpus=corpus)
        list(run.train(end))
        run.trace(1).write(logged)
        run.close()
    size = config.train.batch_size, config.train.sequence_length
    batches = [batch_at(corpus.train, step, *size, config.run.seed) for step in range(end)]
    result = SmokeTest(batches, StepTrace.read(uninterrupted), StepTrace.read(logged))
    if result.exact:
        shutil.rmtree(config.paths.checkpoints / name, ignore_errors=True)
    return result
