"""The trainer: model, optimizer and data, one step after the other.

It has no folder, no lock and no logger: `run.py` adds those. A step is `train_step` here, its batch
`workflow/data/batches.py`, its update `step.py`, its model `SmolLm3.py`.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from SmolLm3 import LlamaModel, hf_state_dict
from workflow.config.settings import Config
from workflow.data import Corpus, batch_at, validation_batches
from workflow.errors import CheckpointError, NonFiniteError
from workflow.files import weights_sha256
from workflow.training import distributed, hardware
from workflow.training.metrics import StepTrace
from workflow.training.resume import optimizer_state, random_states, restore, seed_random_states
from workflow.training.step import TrainStep, evaluating


class Trainer:
    """A model with random weights, its optimizer and the data, at step 0.

    global_step: steps done. losses: step -> loss, of the steps that this object has trained.
    broken: whether the state is that of an unfinished step.
    """

    def __init__(self, config: Config, corpus: Corpus):
        self.config, self.corpus, self.device = config, corpus, config.device
        hardware.prepare(self.device)
        seed_random_states(config.run.seed)
        self.model = LlamaModel(config.train_architecture).to(self.device)
        self.update = TrainStep(self.model, config.train, self.device)
        self.optimizer = self.update.optimizer
        self.global_step = 0
        self.losses: dict[int, float] = {}
        self.unusable = False

    def train_step(self) -> None:
        """Launches one step; `metrics` waits for its numbers."""
        inputs, targets = self.batch(self.global_step)
        with self.step_in_flight(), distributed.translate_errors():
            self.update(self.global_step, inputs, targets)
            self.global_step += 1

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets (b, T) of step 0, 1, …: this process's slice of the batch."""
        settings = self.config.train
        size = settings.batch_size, settings.sequence_length
        batch = batch_at(self.corpus.train, step, *size, self.config.run.seed)
        inputs, targets = (part[self.update.slice] for part in batch)
        if self.device.type == "cuda":  # from pinned memory, the copy does not wait for the GPU
            inputs, targets = inputs.pin_memory(), targets.pin_memory()
        return tuple(part.to(self.device, non_blocking=True) for part in (inputs, targets))

    def metrics(self) -> list[dict[str, Any]]:
        """A row for each step since the last call; see `TrainStep.metrics`."""
        try:
            rows = self.update.metrics()
        except NonFiniteError as error:
            self.global_step = error.step
            raise
        self.losses |= {row["step"]: row["loss"] for row in rows}
        return rows

    @torch.no_grad()
    def validation_loss(self, after_batch: Callable[[], None]) -> float:
        """The mean loss of the held-out tokens, nats a token."""
        settings, total, count = self.config.train, 0.0, 0
        size = settings.micro_batch_size or settings.batch_size, settings.sequence_length
        held_out = validation_batches(self.corpus.validation, settings.validation_tokens, *size)
        with evaluating(self.model):
            for inputs, targets in held_out:
                loss = self.update.loss(inputs.to(self.device), targets.to(self.device))
                total += loss.item() * inputs.numel()
                count += inputs.numel()
                after_batch()
        return total / count

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, but for settings and data."""
        self.check_usable()
        return {
            "step": self.global_step,
            "model": hf_state_dict(self.model),
            "optimizer": optimizer_state(self.optimizer),
            "random": random_states(),
        }

    def load_state_dict(
        self,
        state: dict[str, Any],
        path: Path,
        expected: dict[str, Any],
        allowed: Collection[str] = (),
    ) -> None:
        """Loads the checkpoint `path` with this `state`; see `resume.restore`."""
        restore(path, state, expected, self.model, self.optimizer, allowed)
        self.global_step = state["step"]

    def weights_sha256(self) -> str:
        return weights_sha256(hf_state_dict(self.model))

    def trace(self, first_step: int) -> StepTrace:
        """The losses from `first_step` on, and the weights as they are now."""
        losses = (self.losses[step] for step in range(first_step, self.global_step + 1))
        return StepTrace(first_step, tuple(losses), self.weights_sha256())

    def free(self) -> None:
        """Frees the memory of weights, gradients and moments."""
        self.model.to("meta").zero_grad()
        self.optimizer.state.clear()

    @contextmanager
    def step_in_flight(self) -> Iterator[None]:
        """An error inside, or a second Ctrl-C, leaves a state that is not used any more."""
        self.check_usable()
        self.unusable = True
        yield
        self.unusable = False

    def check_usable(self) -> None:
        """Raises CheckpointError if the state is that of an unfinished step."""
        if self.unusable:
            what = "it was stopped in the middle of a step"
            raise CheckpointError("this run", what, "open it again: open_run(…)")
