"""What an update is made of: the loss, the rate, the optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import LinearCrossEntropyOptions
from torch.utils.checkpoint import checkpoint

from SmolLm3 import LlamaModel
from workflow.config.settings import TrainSettings

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
