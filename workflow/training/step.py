"""One training step: loss, learning rate, optimizer, and `TrainStep`, which uses them."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import LinearCrossEntropyOptions
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from SmolLm3 import LlamaModel
from workflow.config.settings import TrainSettings
from workflow.errors import NonFiniteError, WorkflowError
from workflow.training import distributed, hardware

CHUNK, BF16_CHUNK = 512, 4096  # tokens whose logits are in memory at once, float32 and bfloat16


class NextTokenLoss(nn.Module):
    """Mean cross entropy of the next token: inputs and targets (B, T) -> scalar, nats, float32.

    The logits of a whole batch would be the largest tensor of a step. They are computed from the
    model's normed states for some tokens at a time. precision: of the matrix products; sums and
    losses are float32.
    """

    def __init__(self, model: LlamaModel, precision: torch.dtype = torch.float32):
        super().__init__()
        self.model, self.precision = model, precision

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        bf16 = self.precision != torch.float32
        with torch.autocast(inputs.device.type, self.precision, enabled=bf16):
            hidden, weight = self.model.hidden(inputs).flatten(0, 1), self.model.lm_head.weight
            targets = targets.flatten()
            if not bf16:
                options = LinearCrossEntropyOptions(batch_chunk_size=CHUNK)
                options = options if len(targets) > CHUNK else None
                return F.linear_cross_entropy(hidden, weight, targets, options=options)
            # linear_cross_entropy would round the loss to bfloat16: 3.0117 becomes 3.0156
            if len(targets) <= BF16_CHUNK:
                return summed_loss(hidden, weight, targets) / len(targets)
            chunks = zip(hidden.split(BF16_CHUNK), targets.split(BF16_CHUNK))
            losses = [checkpoint(summed_loss, h, weight, t, use_reentrant=False) for h, t in chunks]
            return torch.stack(losses).sum() / len(targets)


def summed_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The summed loss of n tokens, from their states (n, C)."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


def learning_rate(step: int, settings: TrainSettings) -> float:
    """The rate of step 0, 1, …: linear warm-up, constant, decay, then `min_learning_rate`."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    after_warmup = max(settings.schedule_steps - settings.warmup_steps, 1)
    decay_steps = settings.decay_steps or after_warmup
    progress = (step - (settings.schedule_steps - decay_steps)) / decay_steps
    progress = min(max(progress, 0.0), 1.0)
    height = 1 - progress if settings.decay == "linear" else (1 + math.cos(math.pi * progress)) / 2
    span = settings.learning_rate - settings.min_learning_rate
    return settings.min_learning_rate + height * span


def make_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """Fused AdamW over all parameters of the model. Only matrices have weight decay."""
    named = list(model.named_parameters())
    matrices = [(name, parameter) for name, parameter in named if parameter.ndim >= 2]
    scales = [(name, parameter) for name, parameter in named if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": scales, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps, fused=True
    )


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all gradients together, as a float32 scalar.

    On a CPU, torch's own norm of a large tensor takes twice as long and rounds more (3e-4).
    """
    if gradients[0].is_cuda:
        return nn.utils.get_total_norm(gradients)
    flat = [gradient.flatten() for gradient in gradients]
    return torch.stack([torch.dot(gradient, gradient) for gradient in flat]).sum().sqrt()


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode for the block. `LlamaModel` has no dropout, but somebody may add it."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


class TrainStep:
    """Updates the model with this process's slice of a batch. Does not wait for the device.

    The metrics of a step stay on the device until `metrics` is called. From the first loss or
    gradient on that is not finite, steps change nothing.
    Raises WorkflowError if the batch cannot be divided evenly.
    """

    def __init__(self, model: LlamaModel, settings: TrainSettings, device: torch.device):
        self.settings, self.device = settings, device
        self.loss_module = NextTokenLoss(model, getattr(torch, settings.precision))
        self.optimizer = make_optimizer(model, settings)
        size, count = settings.batch_size, distributed.world_size()
        self.slice = batch_slice(size, settings.micro_batch_size, count)
        self.micro_batch_size = settings.micro_batch_size or size // count
        self._non_finite = torch.zeros((), device=device)
        self.pending: list[tuple[dict[str, Any], Tensor]] = []  # row; loss and norm on the device
        self._start_time = 0.0
        if settings.activation_checkpointing:
            for layer in model.layers:
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)

    def __call__(self, step: int, inputs: Tensor, targets: Tensor) -> None:
        """Does step 0, 1, … on inputs and targets (b, T), this process's slice of the batch."""
        rate = learning_rate(step, self.settings)
        if not self.pending:
            self._start_time = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        loss = self._backward(inputs, targets)
        named = list(self.loss_module.model.named_parameters())
        missing = [name for name, parameter in named if parameter.grad is None]
        if missing:
            raise RuntimeError(f"no gradient reaches {', '.join(missing)}")
        norm = gradient_norm([p.grad for _, p in named])
        # fused AdamW divides the gradients by this: clipping in the same pass over memory
        self.optimizer.grad_scale = (norm / self.settings.max_grad_norm).clamp(min=1)
        self._non_finite = torch.where(torch.isfinite(loss + norm), self._non_finite, 1.0)
        self.optimizer.found_inf = self._non_finite  # if 1, fused AdamW changes nothing
        self.optimizer.step()
        row = {"step": step + 1, "learning_rate": rate}
        self.pending.append((row, torch.stack([loss, norm])))

    def metrics(self) -> list[dict[str, Any]]:
        """Waits for the steps since the last call; a row for each (see `InMemoryLogger`).

        Raises NonFiniteError at the first loss or gradient norm that is not finite; its `step` is
        the last good step.
        """
        if not self.pending:
            return []
        settings, (rows, numbers) = self.settings, zip(*self.pending)
        values = distributed.all_reduce_mean(torch.stack(numbers)).tolist()
        tokens = len(rows) * settings.batch_size * settings.sequence_length
        speed, self.pending = tokens / (time.perf_counter() - self._start_time), []
        for row, (loss, norm) in zip(rows, values):
            row |= {"loss": loss, "gradient_norm": norm, "tokens_per_second": speed}
            if not (math.isfinite(loss) and math.isfinite(norm)):
                what = f"loss {loss} and gradient norm {norm} at step {row['step']}"
                error = NonFiniteError("training", what, "lower train.learning_rate")
                error.step = row["step"] - 1
                raise error
            if peak := hardware.peak_flops(self.device):
                config = self.loss_module.model.config
                flops = hardware.flops_per_token(config, settings.sequence_length)
                row["flops_utilisation"] = speed / distributed.world_size() * flops / peak
        return list(rows)

    def _backward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss. Gradients are accumulated over micro-batches."""
        parts = list(zip(*(x.split(self.micro_batch_size) for x in (inputs, targets))))
        total = torch.zeros((), device=self.device)
        for number, part in enumerate(parts, 1):
            with nullcontext() if number == len(parts) else self._no_sync():
                loss = self._wrapped_loss(*part) / len(parts)
                loss.backward()
            total += loss.detach()
        return total

    @cached_property
    def _wrapped_loss(self) -> nn.Module:
        """`loss`, wrapped for several processes, and compiled if the settings say so."""
        trained = self.loss_module
        if distributed.world_size() > 1:
            trained = DistributedDataParallel(trained, gradient_as_bucket_view=True)
        if self.settings.compile and hardware.find_cpp_compiler():
            trained = torch.compile(trained)
        elif self.settings.compile:
            print("Note: no C++ compiler here (CXX, g++ or clang++): the steps are not compiled")
        if distributed.world_size() > 1:
            # the first backward decides the order in which later ones sum gradients: without this
            # one, the first step of a resumed run would sum in another order
            size = self.micro_batch_size, self.settings.sequence_length
            trained(*torch.zeros(2, *size, dtype=torch.long, device=self.device)).backward()
            self.optimizer.zero_grad()
        return trained

    def _no_sync(self):
        """Lets processes exchange gradients only once, with the last micro-batch."""
        parallel = getattr(self._wrapped_loss, "_orig_mod", self._wrapped_loss)
        return parallel.no_sync() if distributed.world_size() > 1 else nullcontext()


def batch_slice(batch_size: int, micro_batch_size: int | None, world_size: int) -> slice:
    """The sequences of the batch that this process trains on."""
    if batch_size % (world_size * (micro_batch_size or 1)):
        what = f"{batch_size} is not a multiple of {world_size} processes"
        what += f" times micro_batch_size {micro_batch_size}" if micro_batch_size else ""
        raise WorkflowError("train.batch_size", what, "change one of them")
    size, rank = batch_size // world_size, distributed.rank()
    return slice(rank * size, (rank + 1) * size)
