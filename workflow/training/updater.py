"""Update after update, on this process's share of each batch, without waiting for the device."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from SmolLm3 import LlamaModel
from workflow.config.settings import TrainSettings
from workflow.errors import NonFiniteError, WorkflowError
from workflow.training import hardware, processes
from workflow.training.update import NextTokenLoss, learning_rate, make_optimizer


class Updater:
    """Launches updates; their numbers stay on the device until `rows` is called.

    Once a loss or a gradient is not finite, that update and the later ones change nothing.
    Raises WorkflowError where the batch cannot be shared out evenly.
    """

    def __init__(self, model: LlamaModel, settings: TrainSettings, device: torch.device):
        self.settings, self.device = settings, device
        self.loss = NextTokenLoss(model, getattr(torch, settings.precision))
        self.optimizer = make_optimizer(model, settings)
        self.share = share_of(settings.batch_size, settings.micro_batch_size, processes.count())
        self.at_once = settings.micro_batch_size or self.share.stop - self.share.start
        self._failed = torch.zeros((), device=device)
        self._launched, self._began = [], 0.0  # rows with their numbers, and when the first began
        self._trained = None  # `loss` as it is trained: compiled, and one of several processes'
        if settings.recompute:
            for layer in model.layers:
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)

    def __call__(self, step: int, inputs: Tensor, targets: Tensor) -> None:
        """Update `step` (0, 1, …) on this share of its batch, (b, T)."""
        rate = learning_rate(step, self.settings)
        if not self._launched:
            self._began = time.perf_counter()
        parts = list(zip(inputs.split(self.at_once), targets.split(self.at_once)))
        if self._trained is None:
            self._trained = self._wrap(*parts[0])
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        for number, part in enumerate(parts, 1):
            with nullcontext() if number == len(parts) else self._alone():
                loss = self._trained(*part) / len(parts)
                loss.backward()
            total += loss.detach()
        named = list(self.loss.model.named_parameters())
        bare = [name for name, parameter in named if parameter.grad is None]
        assert not bare, f"no gradient reaches {', '.join(bare)}"
        norm = nn.utils.clip_grad_norm_([p for _, p in named], self.settings.clip_norm)
        self._failed = torch.where(torch.isfinite(total + norm), self._failed, 1.0)
        self.optimizer.found_inf = self._failed  # fused AdamW then leaves everything as it is
        self.optimizer.step()
        row = {"step": step + 1, "learning_rate": rate}
        self._launched.append((row, torch.stack([total, norm])))

    def rows(self, run: str) -> list[dict[str, Any]]:
        """The rows of the updates since the last call; waits until they are done.

        Raises NonFiniteError at the first whose loss or gradient norm is not finite.
        """
        if not self._launched:
            return []
        settings, (rows, numbers) = self.settings, zip(*self._launched)
        values = processes.averaged(torch.stack(numbers)).tolist()
        tokens = len(rows) * settings.batch_size * settings.sequence_length
        pace, self._launched = tokens / (time.perf_counter() - self._began), []
        for row, (loss, norm) in zip(rows, values):
            row |= {"loss": loss, "gradient_norm": norm, "tokens_per_second": pace}
            if not (math.isfinite(loss) and math.isfinite(norm)):
                what = f"loss {loss} and gradient norm {norm} at step {row['step']}"
                error = NonFiniteError(f"run {run}", what, "lower train.learning_rate")
                error.step = row["step"] - 1
                self._failed.zero_()
                raise error
            if peak := hardware.peak_flops(self.device):
                config = self.loss.model.config
                flops = hardware.flops_per_token(config, settings.sequence_length)
                row["flops_utilisation"] = pace / processes.count() * flops / peak
        return list(rows)

    @property
    def waiting(self) -> int:
        """How many updates are launched whose rows were not asked for."""
        return len(self._launched)

    def _wrap(self, inputs: Tensor, targets: Tensor) -> nn.Module:
        trained = self.loss
        if processes.count() > 1:
            trained = DistributedDataParallel(trained, gradient_as_bucket_view=True)
        if self.settings.compile and hardware.compiler():
            trained = torch.compile(trained)
        elif self.settings.compile:
            print("Note: no C++ compiler here (CXX, g++ or clang++): the steps are not compiled")
        if processes.count() > 1:
            # the first backward decides in which order gradients are added up from then on: it
            # must be over before the first update of a resume as of a run that never stopped
            trained(inputs, targets).backward()
        return trained

    def _alone(self):
        """Gradients are added up here; other processes get the sum with the last part."""
        parallel = getattr(self._trained, "_orig_mod", self._trained)
        return parallel.no_sync() if processes.count() > 1 else nullcontext()


def share_of(batch_size: int, at_once: int | None, count: int) -> slice:
    """Which sequences of the whole batch are this process's."""
    if batch_size % (count * (at_once or 1)):
        what = f"{batch_size} is not a multiple of {count} processes"
        what += f" times micro_batch_size {at_once}" if at_once else ""
        raise WorkflowError("train.batch_size", what, "change one of them")
    size = batch_size // count
    return slice(processes.rank() * size, (processes.rank() + 1) * size)
