"""What is measured against transformers, and how: in one process, interleaved, medians."""

from __future__ import annotations

import copy
import datetime
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from torch import nn

from SmolLm3 import LlamaModel, load_hf_weights

from .reference import Reference
from .settings import TrainSettings
from .update import NextTokenLoss, make_optimizer


@dataclass(frozen=True)
class Row:
    """Seconds of ours and of transformers', one pair a round."""

    name: str
    tokens: int  # that one measured call handles
    ours: list[float]
    theirs: list[float]

    @property
    def ratio(self) -> float:
        """Their time over ours, the median of the pairs: above 1, ours is faster."""
        return statistics.median(t / o for o, t in zip(self.ours, self.theirs, strict=True))

    def __str__(self) -> str:
        figures = [
            f"{self.tokens / statistics.median(side):.1f}" for side in (self.ours, self.theirs)
        ]
        spread = sorted(t / o for o, t in zip(self.ours, self.theirs, strict=True))
        pairs = f"{self.ratio:.2f} ({spread[0]:.2f} to {spread[-1]:.2f})"
        return f"| {self.name} | {figures[0]} | {figures[1]} | {pairs} |"


def interleaved(
    name: str, tokens: int, ours: Callable[[], None], theirs: Callable[[], None], rounds: int
) -> Row:
    """Times both in turn, after one call of each that does not count."""
    row = Row(name, tokens, [], [])
    for counted in range(-1, rounds):
        for call, times in ((ours, row.ours), (theirs, row.theirs)):
            began = time.perf_counter()
            call()
            if counted >= 0:
                times.append(time.perf_counter() - began)
    return row


def training_step(
    reference: Reference, settings: TrainSettings, batch_size: int, length: int, rounds: int
) -> Row:
    """One update of each model from the same weights, with the same tokens, loss and optimizer."""
    model = LlamaModel(reference.config)
    load_hf_weights(model, reference.state_dict)
    theirs = copy.deepcopy(reference.model).requires_grad_(True)
    tokens = torch.randint(reference.config.vocab_size, (batch_size, length + 1))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    loss = NextTokenLoss(model)

    def their_loss() -> torch.Tensor:
        return theirs(input_ids=inputs, labels=inputs, shift_labels=targets).loss

    def updater(model: nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
        optimizer = make_optimizer(model, settings)

        def update() -> None:
            optimizer.zero_grad()
            loss().backward()
            nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
            optimizer.step()

        return update

    mine = updater(model, lambda: loss(inputs, targets))
    size = f"training step, {batch_size} × {length} tokens"
    return interleaved(size, inputs.numel(), mine, updater(theirs, their_loss), rounds)


def generation(reference: Reference, new_tokens: int, rounds: int) -> Row:
    """Greedy generation after a prompt of 16 tokens, batch 1, without stop tokens."""
    model = LlamaModel(reference.config)
    load_hf_weights(model, reference.state_dict)
    prompt = torch.randint(reference.config.vocab_size, (1, 16))
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def theirs() -> None:
        mask = torch.ones_like(prompt)
        reference.model.generate(prompt, attention_mask=mask, max_new_tokens=new_tokens, **options)

    name = f"greedy generation, {new_tokens} tokens"
    return interleaved(name, new_tokens, lambda: model.generate(prompt, new_tokens), theirs, rounds)


def table(rows: list[Row]) -> str:
    """The rows as Markdown, under a line that says where and when they were measured."""
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, float32"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    head = (
        "| | ours, tokens/s | transformers, tokens/s | ratio, median of pairs |\n|---|---|---|---|"
    )
    lines = [f"{datetime.date.today()}; {machine}; {versions}", "", head, *map(str, rows)]
    return "\n".join(lines)
