"""The trainer: a model, its optimizer and the data. It has no folder and no logger; `run.py` has.

To follow one step, read `train_step` here, `workflow/data/batches.py`, `step.py`, `SmolLm3.py`.
"""

from collections.abc import Callable, Iterator
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
from workflow.training import distributed, hardware, resume
from workflow.training.metrics import StepTrace
from workflow.training.resume import Names, State, code_sha256
from workflow.training.step import TrainStep, eval_mode


class Trainer:
    """Trains a model, which starts with random weights at step 0.

    global_step: steps done. losses: step -> loss, for the steps that this object has trained.
    step_unfinished: whether a step stopped in the middle; the state is then refused.
    """

    def __init__(self, config: Config, corpus: Corpus):
        self.config, self.corpus = config, corpus
        self.device = distributed.device_of_process(config.device)
        hardware.prepare_device(self.device)
        resume.seed_random_states(config.run.seed)
        self.model = LlamaModel(config.train_architecture).to(self.device)
        self.step_function = TrainStep(self.model, config.train, self.device)
        self.optimizer = self.step_function.optimizer
        self.global_step = 0
        self.losses: dict[int, float] = {}
        self.step_unfinished = False

    def train_step(self) -> None:
        """Starts one step on the device; `metrics` waits for its results."""
        inputs, targets = self.batch(self.global_step)
        with self.critical_section(), distributed.translate_errors():
            self.step_function(self.global_step, inputs, targets)
            self.global_step += 1

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets (b, T) of step 0, 1, …: this process's slice of the batch."""
        settings = self.config.train
        size = settings.batch_size, settings.sequence_length
        batch = batch_at(self.corpus.train, step, *size, self.config.run.seed)
        inputs, targets = (part[self.step_function.slice] for part in batch)
        if self.device.type == "cuda":  # a copy from pinned memory does not wait for the GPU
            inputs, targets = inputs.pin_memory(), targets.pin_memory()
        return tuple(part.to(self.device, non_blocking=True) for part in (inputs, targets))

    def metrics(self) -> list[dict[str, Any]]:
        """A row for each step since the last call; see `TrainStep.metrics`."""
        try:
            rows = self.step_function.metrics()
        except NonFiniteError as error:
            self.global_step = error.step
            raise
        self.losses |= {row["step"]: row["loss"] for row in rows}
        return rows

    @torch.no_grad()
    def validation_loss(self, after_batch: Callable[[], None]) -> float:
        """The mean loss of the held-out tokens, in nats per token."""
        settings, total, count = self.config.train, 0.0, 0
        loss_of = self.step_function.loss_module
        size = settings.micro_batch_size or settings.batch_size, settings.sequence_length
        held_out = validation_batches(self.corpus.validation, settings.validation_tokens, *size)
        with eval_mode(self.model):
            for inputs, targets in held_out:
                loss = loss_of(inputs.to(self.device), targets.to(self.device))
                total += loss.item() * inputs.numel()
                count += inputs.numel()
                after_batch()
        return total / count

    def state_dict(self) -> State:
        """All that the next step depends on, except settings and data."""
        self.check_usable()
        return {
            "step": self.global_step,
            "model": hf_state_dict(self.model),
            "optimizer": resume.optimizer_state(self.optimizer),
            "random": resume.random_states(),
        }

    def load_state_dict(self, state: State, path: Path, expected: State, allowed: Names) -> None:
        """Loads the `state` read from the checkpoint `path`; see `resume.restore`."""
        resume.restore(path, state, expected, self.model, self.optimizer, allowed)
        self.global_step = state["step"]

    def weights_sha256(self) -> str:
        return weights_sha256(hf_state_dict(self.model))

    def trace(self, first_step: int) -> StepTrace:
        """The losses from `first_step` on, and the hash of the current weights."""
        losses = (self.losses[step] for step in range(first_step, self.global_step + 1))
        return StepTrace(first_step, tuple(losses), self.weights_sha256(), code_sha256())

    def free(self) -> None:
        """Frees the memory of weights, gradients and moments."""
        self.model.to("meta").zero_grad()
        self.optimizer.state.clear()

    @contextmanager
    def critical_section(self) -> Iterator[None]:
        """If the block does not reach its end, the state is refused from then on."""
        self.check_usable()
        self.step_unfinished = True
        yield
        self.step_unfinished = False

    def check_usable(self) -> None:
        """Raises CheckpointError if a step stopped in the middle."""
        if self.step_unfinished:
            what = "it was stopped in the middle of a step"
            raise CheckpointError("this run", what, "open it again: open_run(…)")
