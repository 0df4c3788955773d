"""What is measured against transformers, and how.

Each side has a process of its own, so that its peak memory is its own, and neither works on what
the other has left in the allocator. One waits while the other works: call by call, in turn. Both
have the same weights, tokens, loss, optimizer and precision. What the machine can do at best is
measured in the same run.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import transformers
from torch import nn

from SmolLm3 import LlamaModel, load_hf_weights
from workflow.analysis.generation import Decoder
from workflow.config.settings import Config
from workflow.reference.load import Reference, load_reference
from workflow.training import hardware
from workflow.training.step import TrainStep, make_optimizer

OURS, THEIRS = "ours", "transformers"
COMPILED, RECOMPUTED, LOW = "compiled", "recomputed", "bfloat16 weights"
COLUMNS = (
    "",
    "tokens/s",
    "transformers, tokens/s",
    "ratio, median of pairs",
    "share of the machine's best",
    "peak GB",
    "transformers, peak GB",
)


@dataclass(frozen=True)
class Case:
    """One row: what is measured, at which size, and in which way by ours; theirs is plain."""

    work: str  # a function of `WORKS`
    batch_size: int
    length: int
    side: str = OURS  # what is held against plain transformers
    way: str = ""  # COMPILED, RECOMPUTED or LOW

    def __str__(self) -> str:
        size = f"{self.batch_size} × {self.length} tokens"
        side = self.side if self.side == THEIRS else ""
        return ", ".join(filter(None, [f"{self.work}, {size}", side, self.way]))


@dataclass(frozen=True)
class Row:
    """Seconds of a case and of transformers', one pair a round; GB of memory at the most."""

    case: Case
    ours: list[float]
    theirs: list[float]
    memory: tuple[float, float]
    ceiling: float  # seconds in which the machine at its best would be done

    @property
    def ratio(self) -> float:
        """Their time over ours, the median of the pairs: above 1, ours is faster."""
        return statistics.median(t / o for o, t in zip(self.ours, self.theirs, strict=True))

    def __str__(self) -> str:
        tokens, times = self.case.batch_size * self.case.length, (self.ours, self.theirs)
        pace = [f"{tokens / statistics.median(side):.1f}" for side in times]
        spread = sorted(t / o for o, t in zip(*times, strict=True))
        pairs = f"{self.ratio:.2f} ({spread[0]:.2f} to {spread[-1]:.2f})"
        share = f"{self.ceiling / statistics.median(self.ours):.0%}"
        memory = [f"{gigabytes:.2f}" for gigabytes in self.memory]
        return f"| {self.case} | {' | '.join([*pace, pairs, share, *memory])} |"


def cases(device: torch.device) -> list[Case]:
    """All rows, on this kind of device."""
    sizes = [(1, 128), (4, 256), (1, 1024)] + [(32, 1024)] * (device.type == "cuda")
    steps = [
        Case("training step", *size, side, way)
        for size in sizes
        for side, way in ((OURS, ""), (OURS, COMPILED), (THEIRS, COMPILED))
    ]
    return [
        *steps,
        Case("training step", 4, 256, OURS, RECOMPUTED),
        Case("greedy generation", 1, 128),
        Case("greedy generation", 1, 128, OURS, LOW),
        Case("greedy generation", 8, 128),
        Case("prefill", 1, 1024),
    ]


# --- one side: its process builds a call, and times it when told ---


def training(case: Case, side: str, way: str, reference: Reference, config: Config) -> Callable:
    """An update: forward, backward, clipping, fused AdamW."""
    settings, device = config.train.model_copy(update={"warmup_steps": 0}), config.device
    tokens = random_tokens(reference, case.batch_size, case.length + 1).to(device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    if side == OURS:
        size = {"batch_size": case.batch_size, "micro_batch_size": None}
        ways = {"compile": way == COMPILED, "recompute": way == RECOMPUTED}
        hardware.prepare(device)
        updater = TrainStep(ours_of(reference), settings.model_copy(update=size | ways), device)
        return lambda: (updater(0, inputs, targets), updater.rows("bench"))
    model = reference.model.requires_grad_(True)
    trained = torch.compile(model) if way == COMPILED else model
    optimizer, precision = make_optimizer(model, settings), getattr(torch, settings.precision)

    def update() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            loss = trained(input_ids=inputs, labels=inputs, shift_labels=targets).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()

    return update


def generation(case: Case, side: str, way: str, reference: Reference, config: Config) -> Callable:
    """Greedy generation after a prompt of 16 tokens, without stop tokens."""
    prompt = random_tokens(reference, case.batch_size, 16).to(config.device)
    if side == OURS:
        low = way == LOW
        decoder = Decoder(ours_of(reference), torch.bfloat16 if low else torch.float32)
        return lambda: list(decoder.stream(prompt, case.length))
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options |= {"attention_mask": torch.ones_like(prompt), "max_new_tokens": case.length}
    return lambda: reference.model.generate(prompt, **options)


def prefill(case: Case, side: str, way: str, reference: Reference, config: Config) -> Callable:
    """The logits after a prompt, whose keys and values are kept."""
    prompt = random_tokens(reference, case.batch_size, case.length).to(config.device)
    if side == OURS:
        model = ours_of(reference)
        return lambda: model.generate(prompt, 1)
    return torch.no_grad()(lambda: reference.model(prompt, use_cache=True, logits_to_keep=1))


WORKS = {"training step": training, "greedy generation": generation, "prefill": prefill}


def ours_of(reference: Reference) -> LlamaModel:
    """Our model in place of transformers', which then takes no memory."""
    model = LlamaModel(reference.config)
    load_hf_weights(model, reference.state_dict)
    device = reference.model.device
    reference.model.to("meta")
    return model.to(device)


def random_tokens(reference: Reference, batch_size: int, length: int) -> torch.Tensor:
    chance = torch.Generator().manual_seed(0)
    return torch.randint(reference.config.vocab_size, (batch_size, length), generator=chance)


def serve(pipe: Connection, case: Case, side: str, way: str, config: Config) -> None:
    """The process of one side: a call that does not count, then one for each True."""
    sys.stdout = open(os.devnull, "w")
    reference = load_reference(config.reference.source, config.member, cache=config.paths.cache)
    reference.model.to(config.device)
    call = WORKS[case.work](case, side, way, reference, config)
    wait = torch.cuda.synchronize if config.device.type == "cuda" else lambda: None
    call()
    wait()
    pipe.send(0.0)
    while pipe.recv():
        began = time.perf_counter()
        call()
        wait()
        pipe.send(time.perf_counter() - began)
    pipe.send(peak_memory(config.device))


def peak_memory(device: torch.device) -> float:
    """GB that this process had at the most, on a GPU or in all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


# --- both sides, and the machine ---


@contextmanager
def started(case: Case, side: str, way: str, config: Config) -> Iterator[Callable[[bool], float]]:
    """A side's process, ready: True gives the seconds of one more call, False its peak memory."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there, case, side, way, config), daemon=True)
    process.start()
    there.close()
    try:
        here.recv()
        yield lambda again: (here.send(again), here.recv())[1]
    finally:
        process.kill()
        process.join()


def interleaved(first: Callable[[], float], second: Callable[[], float], rounds: int):
    """What both return, called in turn."""
    pairs = [(first(), second()) for _ in range(rounds)]
    return tuple(map(list, zip(*pairs)))


def measure(case: Case, config: Config, ceiling: hardware.Ceiling, rounds: int) -> Row:
    """Both sides of a case in turn, after one call of each that does not count."""
    plain = started(case, THEIRS, "", config)
    with started(case, case.side, case.way, config) as one, plain as other:
        times = interleaved(lambda: one(True), lambda: other(True), rounds)
        return Row(case, *times, (one(False), other(False)), at_best(case, config, ceiling))


def at_best(case: Case, config: Config, ceiling: hardware.Ceiling) -> float:
    """Seconds it would take the machine: its products, or in generation, to read the weights."""
    model, tokens = config.member.architecture, case.batch_size * case.length
    flops = hardware.flops_per_token(model, case.length) * tokens
    if case.work == "training step":
        return flops / ceiling.flops
    multiplied = hardware.flops_per_token(model, 0) // 6
    if case.work == "prefill":  # a third, and the head for one token only
        head = model.vocab_size * model.hidden_size
        return (flops / 3 - 2 * head * (tokens - 1)) / ceiling.flops
    return (2 if case.way == LOW else 4) * multiplied * case.length / ceiling.bandwidth


# --- what is only waited for ---

IMPORT = """
import time, torch
began = time.perf_counter()
import SmolLm3
print(time.perf_counter() - began)
"""


def loading_seconds(config: Config) -> float:
    """How long the reference takes to load once it is in the cache, imports aside."""
    began = time.perf_counter()
    with redirect_stdout(None):
        load_reference(config.reference.source, config.member, cache=config.paths.cache)
    return time.perf_counter() - began


def import_seconds() -> float:
    """How much longer `import SmolLm3` takes than `import torch`."""
    command, root = [sys.executable, "-c", IMPORT], Path(__file__).parent.parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)  # noqa: S603
    return float(done.stdout)


def waited(config: Config, rounds: int) -> str:
    """Both, as a line; each measured in new processes."""
    context = multiprocessing.get_context("spawn")
    loads = []
    for _ in range(rounds):
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            loads.append(pool.submit(loading_seconds, config).result())
    imports = statistics.median(import_seconds() for _ in range(rounds))
    return (
        f"Loading the reference again: {statistics.median(loads):.2f} s, imports aside; "
        f"`import SmolLm3`: {imports * 1000:.0f} ms after `import torch`"
    )


def report(config: Config, rounds: int, only: str = "") -> str:
    """All rows whose name has `only`, as Markdown, under where and when they were measured."""
    device, precision = config.device, config.train.precision
    ceiling = hardware.Ceiling.of(device, getattr(torch, precision))
    lines = [f"{datetime.date.today()}; {hardware.machine(device)}; {precision}"]
    lines += [f"torch {torch.__version__}, transformers {transformers.__version__}; {ceiling}", ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for case in cases(device):
        if only in str(case):
            print(f"measuring {case}", file=sys.stderr)
            lines.append(str(measure(case, config, ceiling, rounds)))
    return "\n".join([*lines, "", waited(config, rounds)])
