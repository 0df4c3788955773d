"""Training steps on a quiet machine, and beside a busy program, with other OpenMP settings.

Linux gives the programs of each terminal and desktop session an equal share of the cores. So the
busy program has its own session. Needs 10 GB of memory: .venv/bin/python tests/peers/busy.py
"""

import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from SmolLm3 import LlamaModel
from workflow import OPENMP_VARIABLES, SHORT_SPIN
from workflow.config import Config, load_config
from workflow.tools.bench import heading, random_tokens, worker_process
from workflow.tools.terminal import raise_on_signals
from workflow.training import TrainStep, hardware

# The second row has what libgomp and LLVM's library do if nothing is set.
SETTINGS = {
    "short spin (this project)": SHORT_SPIN,
    "torch's default": {"GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"},
    "no spin": {"OMP_WAIT_POLICY": "PASSIVE"},
}
MODELS = {None: (128, 1), "small": (64, 20)}  # train.model -> tokens, steps per measurement
HEADER = "| model, threads | quiet, ms | busy, ms | busy / quiet | quiet / torch's default, quiet |"


def training_steps(model: str | None, config: Config) -> Callable:
    """A function that does some training steps of a model with random weights."""
    length, count = MODELS[model]
    architecture = config.models[model or config.model].architecture
    changes = {"batch_size": 1, "micro_batch_size": None, "compile": False}
    hardware.prepare_device(config.device)
    settings = config.train.model_copy(update=changes)
    step = TrainStep(LlamaModel(architecture), settings, config.device)
    tokens = random_tokens(architecture.vocab_size, 1, length + 1)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    return lambda: [(step(0, inputs, targets), step.metrics()) for _ in range(count)]


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Processes that are started in the block have these OpenMP variables and no others."""
    with mock.patch.dict(os.environ, variables):
        for name in OPENMP_VARIABLES - variables.keys():
            os.environ.pop(name, None)
        yield


@contextmanager
def busy_program() -> Iterator[None]:
    """A program that uses a core, in its own session."""
    loop = [sys.executable, "-c", "while True: pass"]
    process = subprocess.Popen(loop, start_new_session=True)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def measure(model: str | None, config: Config, rounds: int) -> Iterator[str]:
    """The Markdown rows of a model. All settings take turns, quiet and busy."""
    print(f"measuring {model or config.model}", file=sys.stderr)
    quiet, busy = {name: [] for name in SETTINGS}, {name: [] for name in SETTINGS}
    with ExitStack() as processes:
        workers = {}
        for name, variables in SETTINGS.items():
            with environment(variables):
                started = worker_process(model, config, training_steps)
                workers[name] = processes.enter_context(started)
        for _ in range(rounds):
            for name, call in workers.items():
                quiet[name].append(call(True))
                with busy_program():
                    busy[name].append(call(True))
    default, (_, steps) = quiet["torch's default"], MODELS[model]
    for name in SETTINGS:
        times = [f"{1000 * statistics.median(t[name]) / steps:.0f}" for t in (quiet, busy)]
        ratios = (zip(busy[name], quiet[name]), zip(quiet[name], default))
        ratios = [f"{statistics.median(a / b for a, b in pairs):.2f}" for pairs in ratios]
        label = f"{model or config.model}, {name}"
        yield f"| {label} | {' | '.join(times)} | {' | '.join(ratios)} |"


def report(config: Config, rounds: int) -> str:
    """Date, machine, versions, and a Markdown table."""
    lines = [*heading(config), HEADER, "|---" * 5 + "|"]
    return "\n".join([*lines, *(row for m in MODELS for row in measure(m, config, rounds))])


if __name__ == "__main__":
    raise_on_signals()  # a stop also ends the busy program
    print(report(load_config(profile="cpu"), rounds=7))
