"""What an update is made of: the loss, the rate, the optimizer."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from SmolLm3 import LlamaModel

from .settings import TrainSettings

MOMENTS = {"step", "exp_avg", "exp_avg_sq"}  # what AdamW keeps of each parameter


class NextTokenLoss(nn.Module):
    """Mean cross entropy of the next token, in nats: inputs and targets (B, T) to a scalar.

    Takes the normed states, not the logits, so that torch is free not to hold the logits of a whole
    batch.
    """

    def __init__(self, model: LlamaModel):
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        hidden = self.model.hidden(inputs)
        return F.linear_cross_entropy(
            hidden.flatten(0, 1), self.model.lm_head.weight, targets.flatten()
        )


def learning_rate(step: int, settings: TrainSettings) -> float:
    """The rate of update `step` (0, 1, …): linear warm-up, cosine, then the least rate."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    span = max(settings.schedule_steps - settings.warmup_steps, 1)
    done = min((step - settings.warmup_steps) / span, 1.0)
    height = (1 + math.cos(math.pi * done)) / 2
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


def load_optimizer(optimizer: torch.optim.AdamW, saved: dict[str, Any]) -> None:
    """Fills a new optimizer with saved moments. Raises ValueError where they are not its own.

    The groups stay the new one's: torch would silently take rate and decay from the file.
    """
    groups = optimizer.state_dict()["param_groups"]
    names = [group["param_names"] for group in groups]
    if [group.get("param_names") for group in saved["param_groups"]] != names:
        raise ValueError("its optimizer has other parameters, or the same in another order")
    places = [place for group in groups for place in group["params"]]
    lacking = [p for p in places if saved["state"].get(p, {}).keys() != MOMENTS]
    if lacking:
        raise ValueError(f"its optimizer lacks moments of {len(lacking)} parameters")
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Ctrl-C waits until the block is done, so that no update is half made or half recorded."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed = []
    usual = signal.signal(signal.SIGINT, lambda *received: pressed.append(received))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
        if pressed:
            raise KeyboardInterrupt
