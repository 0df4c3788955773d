"""Where the time of a training step goes. The gradients are clipped inside AdamW."""

import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from unittest.mock import patch

import torch

from workflow.config import Config
from workflow.tools.bench import heading
from workflow.tools.busy import MODELS, train_step
from workflow.training import step as step_module

PHASES = ("forward", "backward", "gradient norm", "AdamW", "step")
HEADER = f"| model | {', ms | '.join(PHASES)}, ms | norm and AdamW |"


def timed(function: Callable, times: list[float]) -> Callable:
    """The function; it also appends the seconds of each call to `times`."""

    @wraps(function)
    def measured(*arguments, **options):
        start = time.perf_counter()
        result = function(*arguments, **options)
        times.append(time.perf_counter() - start)
        return result

    return measured


def measure(model: str | None, config: Config, rounds: int) -> str:
    """The Markdown row of a model: medians over all steps, without the first ones."""
    step, inputs, targets = train_step(model, config)
    times = {phase: [] for phase in PHASES}
    functions = [
        (step.loss_module, "forward", "forward"),
        (torch.Tensor, "backward", "backward"),
        (step_module, "gradient_norm", "gradient norm"),
        (step.optimizer, "step", "AdamW"),
    ]
    with ExitStack() as patches:
        for owner, name, phase in functions:
            function = timed(getattr(owner, name), times[phase])
            patches.enter_context(patch.object(owner, name, function))
        run = timed(lambda: (step(0, inputs, targets), step.metrics()), times["step"])
        for _ in range(warm_up := 3):
            run()
        for _ in range(rounds * MODELS[model][1]):
            run()
    medians = {phase: statistics.median(values[warm_up:]) for phase, values in times.items()}
    share = (medians["gradient norm"] + medians["AdamW"]) / medians["step"]
    milliseconds = " | ".join(f"{1000 * value:.1f}" for value in medians.values())
    return f"| {model or config.model} | {milliseconds} | {share:.1%} |"


def report(config: Config, rounds: int) -> str:
    """Date, machine, versions, and a Markdown table."""
    lines = [*heading(config), HEADER, "|---" * 7 + "|"]
    for model in MODELS:
        print(f"measuring {model or config.model}", file=sys.stderr)
        lines.append(measure(model, config, rounds))
    return "\n".join(lines)
