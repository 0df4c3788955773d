"""One training step: the loss, the learning rate, the optimizer, and the step itself."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import zip_longest
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

MOMENTS = {"step", "exp_avg", "exp_avg_sq"}  # what AdamW keeps of each parameter
CHUNK, LOW_CHUNK = 512, 4096  # tokens whose logits are made at once, in float32 and in bfloat16


class NextTokenLoss(nn.Module):
    """Mean cross entropy of the next token, nats, float32: inputs and targets (B, T) to a scalar.

    Takes the normed states, not the logits: those of a whole batch would be the largest tensor of
    a step, and are made for `CHUNK` tokens at a time. precision: of the products; the rest, sums
    and losses, is float32.
    """

    def __init__(self, model: LlamaModel, precision: torch.dtype = torch.float32):
        super().__init__()
        self.model, self.precision = model, precision

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        low = self.precision != torch.float32
        with torch.autocast(inputs.device.type, self.precision, enabled=low):
            hidden, weight = self.model.hidden(inputs).flatten(0, 1), self.model.lm_head.weight
            targets = targets.flatten()
            if not low:
                options = LinearCrossEntropyOptions(batch_chunk_size=CHUNK)
                options = options if len(targets) > CHUNK else None
                return F.linear_cross_entropy(hidden, weight, targets, options=options)
            # linear_cross_entropy would round the loss itself to bfloat16: 3.0117 is 3.0156 there
            chunks = zip(hidden.split(LOW_CHUNK), targets.split(LOW_CHUNK))
            losses = [checkpoint(summed_loss, h, weight, t, use_reentrant=False) for h, t in chunks]
            return torch.stack(losses).sum() / len(targets)


def summed_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The loss of some tokens (n, C); under `checkpoint`, only their states are kept for it."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


def learning_rate(step: int, settings: TrainSettings) -> float:
    """The rate of update `step` (0, 1, …): linear warm-up, constant, decay, then the least rate."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    most = max(settings.schedule_steps - settings.warmup_steps, 1)
    span = settings.decay_steps or most  # without a constant part, the decay follows the warm-up
    done = min(max((step - (settings.schedule_steps - span)) / span, 0.0), 1.0)
    height = 1 - done if settings.decay == "linear" else (1 + math.cos(math.pi * done)) / 2
    return settings.min_learning_rate + height * (
        settings.learning_rate - settings.min_learning_rate
    )


def make_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """Fused AdamW over exactly the model's parameters; matrices decay, the norms' scales do not."""
    named = list(model.named_parameters())
    groups = [
        {
            "params": [(name, p) for name, p in named if p.ndim >= 2],
            "weight_decay": settings.weight_decay,
        },
        {"params": [(name, p) for name, p in named if p.ndim < 2], "weight_decay": 0.0},
    ]
    covered = [name for group in groups for name, _ in group["params"]]
    assert sorted(covered) == sorted(name for name, _ in named), (
        "the optimizer misses or repeats a parameter"
    )
    return torch.optim.AdamW(
        groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps, fused=True
    )


def optimizer_state(optimizer: torch.optim.AdamW) -> dict[str, Any]:
    """What a checkpoint keeps of it: its kind beside torch's own state dict."""
    return {"kind": type(optimizer).__name__, **optimizer.state_dict()}


def load_optimizer(optimizer: torch.optim.AdamW, saved: dict[str, Any]) -> None:
    """Fills a new optimizer with saved moments. Raises ValueError where they are not its own.

    The groups stay the new one's: torch would silently take rate and decay from the file.
    """
    kind, groups = type(optimizer).__name__, optimizer.state_dict()["param_groups"]
    if saved["kind"] != kind:
        raise ValueError(f"its optimizer is {saved['kind']}, not {kind}")
    names = [name for group in groups for name in group["param_names"]]
    theirs = [name for group in saved["param_groups"] for name in group.get("param_names", [])]
    if theirs != names:
        mine, other = next((a, b) for a, b in zip_longest(names, theirs) if a != b)
        raise ValueError(f"its optimizer has the parameter {other} where this one has {mine}")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    places = [place for group in groups for place in group["params"]]
    for name, place, parameter in zip(names, places, parameters):
        moments = saved["state"].get(place, {})
        if moments.keys() != MOMENTS:
            raise ValueError(f"its optimizer has {sorted(moments) or 'no moments'} of {name}")
        for moment in ("exp_avg", "exp_avg_sq"):
            check_alike(f"{moment} of {name}", moments[moment], parameter)
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})


def check_alike(name: str, saved: Tensor, now: Tensor) -> None:
    """Raises ValueError, with both, where dtype or shape differ: torch would cast or broadcast."""
    kinds = [f"{t.dtype} {tuple(t.shape)}".removeprefix("torch.") for t in (saved, now)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"{name} is {kinds[0]}, expected {kinds[1]}")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout, whose draws would move the random states; then as it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


class TrainStep:
    """Launches updates; their numbers stay on the device until `rows` is called.

    Once a loss or a gradient is not finite, that update and the later ones change nothing.
    Raises WorkflowError where the batch cannot be shared out evenly.
    """

    def __init__(self, model: LlamaModel, settings: TrainSettings, device: torch.device):
        self.settings, self.device = settings, device
        self.loss = NextTokenLoss(model, getattr(torch, settings.precision))
        self.optimizer = make_optimizer(model, settings)
        self.share = share_of(settings.batch_size, settings.micro_batch_size, distributed.count())
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
        values = distributed.averaged(torch.stack(numbers)).tolist()
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
                row["flops_utilisation"] = pace / distributed.count() * flops / peak
        return list(rows)

    @property
    def waiting(self) -> int:
        """How many updates are launched whose rows were not asked for."""
        return len(self._launched)

    def _wrap(self, inputs: Tensor, targets: Tensor) -> nn.Module:
        trained = self.loss
        if distributed.count() > 1:
            trained = DistributedDataParallel(trained, gradient_as_bucket_view=True)
        if self.settings.compile and hardware.compiler():
            trained = torch.compile(trained)
        elif self.settings.compile:
            print("Note: no C++ compiler here (CXX, g++ or clang++): the steps are not compiled")
        if distributed.count() > 1:
            # the first backward decides in which order gradients are added up from then on: it
            # must be over before the first update of a resume as of a run that never stopped
            trained(inputs, targets).backward()
        return trained

    def _alone(self):
        """Gradients are added up here; other processes get the sum with the last part."""
        parallel = getattr(self._trained, "_orig_mod", self._trained)
        return parallel.no_sync() if distributed.count() > 1 else nullcontext()


def share_of(batch_size: int, at_once: int | None, count: int) -> slice:
    """Which sequences of the whole batch are this process's."""
    if batch_size % (count * (at_once or 1)):
        what = f"{batch_size} is not a multiple of {count} processes"
        what += f" times micro_batch_size {at_once}" if at_once else ""
        raise WorkflowError("train.batch_size", what, "change one of them")
    size = batch_size // count
    return slice(distributed.rank() * size, (distributed.rank() + 1) * size)
