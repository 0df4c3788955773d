"""Speed and memory, compared with transformers on the same weights, tokens and loss.

Each side has its own process, to measure its peak memory. While one works, the other waits.
"""

import datetime
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
import transformers
from torch import nn

from SmolLm3 import LlamaModel
from workflow.analysis import prepare_for_generation
from workflow.config import Config
from workflow.errors import WorkflowError
from workflow.proof.compared import load_copy
from workflow.reference import Reference
from workflow.tools.models import open_reference
from workflow.training import TrainStep, hardware, make_optimizer

OURS, THEIRS, COMPILED, BF16 = "this project", "transformers", ", compiled", ", bfloat16"
HEADER = "| | tokens/s | compared with | tokens/s | ratio, median of pairs | peak GB | peak GB |"


@dataclass(frozen=True)
class Case:
    """One side of a row: the task, its size, and which code does it."""

    task: str  # a key of `TASKS`
    batch_size: int
    length: int  # tokens
    variant: str = OURS  # or THEIRS; then COMPILED, or BF16: other precision than the settings'

    def __str__(self) -> str:
        return f"{self.task}, {self.batch_size} × {self.length} tokens, {self.variant}"


def cases(config: Config) -> list[tuple[Case, Case]]:
    """The rows of the report: what is measured, and what it is compared with."""
    sizes = [(1, 128), (4, 256), (1, 1024)]
    if config.device.type == "cuda":
        sizes.append((32, 1024))
    pairs = [(OURS, THEIRS), (OURS + COMPILED, THEIRS + COMPILED), (OURS + COMPILED, OURS)]
    if config.train.precision == "float32" and hardware.has_fast_bf16(config.device):
        pairs += [(OURS + BF16, OURS), (OURS + BF16, THEIRS + BF16)]
    rows = [("training step", *size, pair) for size in sizes for pair in pairs]
    rows += [("greedy generation", *size, (OURS, THEIRS)) for size in ((1, 128), (8, 128))]
    rows.append(("greedy generation", 1, 128, (OURS + BF16, THEIRS)))
    rows.append(("prefill", 1, 1024, (OURS, THEIRS)))
    return [tuple(Case(*row, variant) for variant in pair) for *row, pair in rows]


def training_step(case: Case, reference: Reference, config: Config) -> Callable:
    """A function that does one training step: forward, backward, clipping, fused AdamW."""
    settings, device = config.train, config.device
    if BF16 in case.variant:
        settings = settings.model_copy(update={"precision": "bfloat16"})
    tokens = random_tokens(reference.config.vocab_size, case.batch_size, case.length + 1).to(device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    if THEIRS not in case.variant:
        changes = {"batch_size": case.batch_size, "micro_batch_size": None, "warmup_steps": 0}
        changes |= {"compile": COMPILED in case.variant}
        hardware.prepare_device(device)
        step = TrainStep(our_model(reference), settings.model_copy(update=changes), device)
        return lambda: (step(0, inputs, targets), step.metrics())
    model = reference.model.requires_grad_(True)
    trained = torch.compile(model) if COMPILED in case.variant else model
    optimizer, precision = make_optimizer(model, settings), getattr(torch, settings.precision)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            loss = trained(input_ids=inputs, labels=inputs, shift_labels=targets).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()

    return step


def generation(case: Case, reference: Reference, config: Config) -> Callable:
    """A function that generates greedily after a prompt of 16 tokens, without stop tokens."""
    prompt = random_tokens(reference.config.vocab_size, case.batch_size, 16).to(config.device)
    if THEIRS not in case.variant:
        precision = torch.bfloat16 if BF16 in case.variant else torch.float32
        model = prepare_for_generation(our_model(reference), precision)
        return lambda: list(model.stream(prompt, case.length))
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options |= {"attention_mask": torch.ones_like(prompt), "max_new_tokens": case.length}
    return lambda: reference.model.generate(prompt, **options)


def prefill(case: Case, reference: Reference, config: Config) -> Callable:
    """A function that computes the logits after a prompt, and caches its keys and values."""
    vocab_size = reference.config.vocab_size
    prompt = random_tokens(vocab_size, case.batch_size, case.length).to(config.device)
    if THEIRS not in case.variant:
        model = our_model(reference)
        return lambda: model.generate(prompt, 1)
    return torch.no_grad()(lambda: reference.model(prompt, use_cache=True, logits_to_keep=1))


TASKS = {"training step": training_step, "greedy generation": generation, "prefill": prefill}


def our_model(reference: Reference) -> LlamaModel:
    """Our model with the reference's weights; the memory of transformers' model is freed."""
    model, device = load_copy(reference), reference.model.device
    reference.model.to("meta")
    return model.to(device)


def random_tokens(vocab_size: int, batch_size: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (batch_size, length), generator=generator)


def prepare(case: Case, config: Config) -> Callable:
    """The function of a case, with the reference's weights."""
    reference = open_reference(config)
    reference.model.to(config.device)
    return TASKS[case.task](case, reference, config)


def worker(pipe: Connection, prepare: Callable, case: Any, config: Config) -> None:
    """Runs in its own process: one warm-up call, then sends the time of a call for each True.

    prepare: returns the function to call. When the worker receives False, it sends its peak memory
    in GB (of the GPU, if there is one) and ends.
    """
    sys.stdout = open(os.devnull, "w", encoding="utf-8")
    run_task = prepare(case, config)
    synchronize = torch.cuda.synchronize if config.device.type == "cuda" else lambda: None
    again = True
    while again:
        start = time.perf_counter()
        run_task()
        synchronize()
        pipe.send(time.perf_counter() - start)
        again = pipe.recv()
    pipe.send(hardware.peak_memory(config.device) or math.nan)


@contextmanager
def worker_process(
    case: Any, config: Config, prepare: Callable = prepare
) -> Iterator[Callable[[bool], float]]:
    """Starts a worker. Gives a function: True → time of one more call, False → peak memory."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=worker, args=(there, prepare, case, config), daemon=True)
    process.start()
    there.close()
    try:
        here.recv()
        yield lambda again: (here.send(again), here.recv())[1]
    finally:
        process.kill()
        process.join()


def measure(case: Case, other: Case, config: Config, rounds: int) -> str:
    """The Markdown row of a case and what it is compared with."""
    print(f"measuring {case}", file=sys.stderr)
    with worker_process(case, config) as call, worker_process(other, config) as call_other:
        return compare(case, other, call, call_other, rounds)


def compare(case: Case, other: Case, call: Callable, call_other: Callable, rounds: int) -> str:
    """The Markdown row of two workers, which take turns. call: see `worker_process`."""
    pairs = [(call(True), call_other(True)) for _ in range(rounds)]
    memory = f"{call(False):.2f} | {call_other(False):.2f}"
    ratios = sorted(b / a for a, b in pairs)  # above 1: the case is faster
    ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    tokens = case.batch_size * case.length
    speed, other_speed = (f"{tokens / statistics.median(times):.1f}" for times in zip(*pairs))
    return f"| {case} | {speed} | {other.variant} | {other_speed} | {ratio} | {memory} |"


def heading(config: Config) -> list[str]:
    """Date, machine and versions."""
    machine = hardware.describe_device(config.device)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return [f"{datetime.date.today()}; {machine}; {config.train.precision}", versions, ""]


def report(config: Config, rounds: int, only: str = "") -> str:
    """Date, machine, versions, and a Markdown table of all rows whose name contains `only`.

    Raises WorkflowError if there is no such row, or SourceError if the weights are missing.
    """
    rows = cases(config)
    if not (chosen := [row for row in rows if only in str(row[0])]):
        names = "; ".join(dict.fromkeys(str(case) for case, _ in rows))
        raise WorkflowError(f"bench --only {only}", "no row has this name", f"rows: {names}")
    open_reference(config)  # an error now is one line; an error in a worker is a traceback
    lines = [*heading(config), HEADER, "|---" * 7 + "|"]
    return "\n".join([*lines, *(measure(*pair, config, rounds) for pair in chosen)])
