"""The stop and the resume in small, on the reference's own weights, before the long run."""

from __future__ import annotations

import shutil
from dataclasses import dataclass

from torch import Tensor

from workflow.config.settings import Config
from workflow.data.corpus import batch_at
from workflow.training.origin import Origin, identify
from workflow.training.record import Trace
from workflow.training.run import Run


@dataclass(frozen=True)
class Rehearsal:
    """A few steps: never stopped, and stopped and resumed in fresh objects."""

    batches: list[tuple[Tensor, Tensor]]  # inputs and targets (B, T) of each step
    never_stopped: Trace  # the steps after the stop
    recorded: Trace  # all steps; those after the stop are resumed

    @property
    def exact(self) -> bool:
        """Whether the stop left no trace: losses and weights are the same, bit for bit."""
        after = self.recorded.losses[self.never_stopped.first_step - 1 :]
        resumed = Trace(self.never_stopped.first_step, after, self.recorded.weights_sha256)
        return resumed == self.never_stopped


def rehearse(config: Config, reference) -> Rehearsal:
    """Does the rehearsal once; afterwards its record is told.

    Its checkpoints, 1.6 GB each for the 135M, are deleted once they have shown what they were for.
    """
    config = config.for_rehearsal()
    stop, end = config.train.steps, config.last_step
    corpus, name = identify(config, Origin.of(reference))
    told = config.paths.runs / name / "recorded.json"
    if told.is_file():
        print(f"Rehearsal {name}: told from the record")
    else:
        run = Run(config, reference)
        list(run.until(stop))
        run.save()
        run.carry_on(end)
        run.close()
        run = Run.resume(run.checkpoint(stop), config)
        list(run.until(end))
        run.trace(1).write(told)
        run.close()
    settings, seed = config.train, config.run.seed
    size = settings.batch_size, settings.sequence_length
    batches = [batch_at(corpus.train, step, *size, seed) for step in range(end)]
    never_stopped = Trace.read(told.with_name("never_stopped.json"))
    rehearsal = Rehearsal(batches, never_stopped, Trace.read(told))
    if rehearsal.exact:
        shutil.rmtree(config.paths.checkpoints / name, ignore_errors=True)
    return rehearsal
