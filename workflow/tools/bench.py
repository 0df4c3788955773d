"""Speed and memory, compared with transformers on the same weights, tokens, loss and precision.

Each model has its own process, to measure its peak memory. While one works, the other waits.
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

import torch
import transformers
from torch import nn

from SmolLm3 import LlamaModel, load_hf_weights
from workflow.analysis import prepare_for_generation
from workflow.config import Config
from workflow.reference import Reference, load_reference
from workflow.training import TrainStep, hardware, make_optimizer

THEIRS, COMPILED, BF16 = "transformers", "compiled", "bfloat16 weights"  # variants
HEADER = (
    "| | tokens/s | transformers, tokens/s | ratio, median of pairs | peak GB | transformers, GB |"
)


@dataclass(frozen=True)
class Case:
    """One row of the report: the task, its size, and what is compared with plain transformers."""

    task: str  # a key of `TASKS`
    batch_size: int
    length: int  # tokens
    variant: str = ""  # "": our model in float32, not compiled

    def __str__(self) -> str:
        name = f"{self.task}, {self.batch_size} × {self.length} tokens"
        return f"{name}, {self.variant}" if self.variant else name


def cases(device: torch.device) -> list[Case]:
    sizes = [(1, 128), (4, 256), (1, 1024)] + [(32, 1024)] * (device.type == "cuda")
    variants = ("", COMPILED, f"{THEIRS}, {COMPILED}")
    return [
        *(Case("training step", *size, variant) for size in sizes for variant in variants),
        Case("greedy generation", 1, 128),
        Case("greedy generation", 1, 128, BF16),
        Case("greedy generation", 8, 128),
        Case("prefill", 1, 1024),
    ]


def training_step(case: Case, reference: Reference, config: Config) -> Callable:
    """A function that does one training step: forward, backward, clipping, fused AdamW."""
    settings, device = config.train, config.device
    tokens = random_tokens(reference, case.batch_size, case.length + 1).to(device)
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
    prompt = random_tokens(reference, case.batch_size, 16).to(config.device)
    if THEIRS not in case.variant:
        precision = torch.bfloat16 if case.variant == BF16 else torch.float32
        model = prepare_for_generation(our_model(reference), precision)
        return lambda: list(model.stream(prompt, case.length))
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options |= {"attention_mask": torch.ones_like(prompt), "max_new_tokens": case.length}
    return lambda: reference.model.generate(prompt, **options)


def prefill(case: Case, reference: Reference, config: Config) -> Callable:
    """A function that computes the logits after a prompt, and caches its keys and values."""
    prompt = random_tokens(reference, case.batch_size, case.length).to(config.device)
    if THEIRS not in case.variant:
        model = our_model(reference)
        return lambda: model.generate(prompt, 1)
    return torch.no_grad()(lambda: reference.model(prompt, use_cache=True, logits_to_keep=1))


TASKS = {"training step": training_step, "greedy generation": generation, "prefill": prefill}


def our_model(reference: Reference) -> LlamaModel:
    """Our model with the reference's weights; the memory of transformers' model is freed."""
    model, device = LlamaModel(reference.config), reference.model.device
    load_hf_weights(model, reference.state_dict)
    reference.model.to("meta")
    return model.to(device)


def random_tokens(reference: Reference, batch_size: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(reference.config.vocab_size, (batch_size, length), generator=generator)


def worker(pipe: Connection, case: Case, config: Config) -> None:
    """Runs in its own process: one warm-up call, then sends the time of a call for each True.

    When it receives False, it sends its peak memory in GB (of the GPU, if there is one) and ends.
    """
    sys.stdout = open(os.devnull, "w")
    reference = load_reference(
        config.reference.source, config.model_entry, cache=config.paths.cache
    )
    reference.model.to(config.device)
    run_task = TASKS[case.task](case, reference, config)
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
def worker_process(case: Case, config: Config) -> Iterator[Callable[[bool], float]]:
    """Starts a worker. Gives a function: True → time of one more call, False → peak memory."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=worker, args=(there, case, config), daemon=True)
    process.start()
    there.close()
    try:
        here.recv()
        yield lambda again: (here.send(again), here.recv())[1]
    finally:
        process.kill()
        process.join()


def measure(case: Case, config: Config, rounds: int) -> str:
    """The Markdown row of a case; our model and transformers take turns."""
    plain = Case(case.task, case.batch_size, case.length, THEIRS)
    with worker_process(case, config) as call_ours, worker_process(plain, config) as call_theirs:
        pairs = [(call_ours(True), call_theirs(True)) for _ in range(rounds)]
        memory = f"{call_ours(False):.2f} | {call_theirs(False):.2f}"
    ratios = sorted(t / o for o, t in pairs)  # above 1: ours is faster
    ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    ours, theirs = (statistics.median(times) for times in zip(*pairs))
    tokens = case.batch_size * case.length
    return f"| {case} | {tokens / ours:.1f} | {tokens / theirs:.1f} | {ratio} | {memory} |"


def report(config: Config, rounds: int, only: str = "") -> str:
    """Date, machine, versions, and a Markdown table of all cases whose name contains `only`."""
    device, precision = config.device, config.train.precision
    lines = [f"{datetime.date.today()}; {hardware.describe_device(device)}; {precision}"]
    lines += [f"torch {torch.__version__}, transformers {transformers.__version__}", ""]
    lines += [HEADER, "|---" * 6 + "|"]
    for case in cases(device):
        if only in str(case):
            print(f"measuring {case}", file=sys.stderr)
            lines.append(measure(case, config, rounds))
    return "\n".join(lines)
