"""Arrays in, a figure out.

Nothing here knows of runs or models; every axis has its unit, nothing needs colour alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]


def column(rows: Rows, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the rows that have `name`."""
    pairs = [(row["step"], row[name]) for row in rows if name in row]
    return np.array([step for step, _ in pairs]), np.array([value for _, value in pairs])


def smoothed(values: np.ndarray, width: int) -> np.ndarray:
    """The mean of each value and up to `width` - 1 before it."""
    total = np.concatenate(([0.0], np.cumsum(values)))
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - width, 0)
    return (total[end] - total[start]) / (end - start)


def loss_curve(
    rows: Rows, *, title: str, resumed_at: int, lines: Mapping[str, float], width: int = 50
) -> Figure:
    """Training loss, raw and smoothed over `width` steps, and held-out loss, by step.

    `lines` are losses to compare with. The steps after `resumed_at` are enlarged beside it.
    """
    figure, (whole, end) = plt.subplots(
        1, 2, figsize=(10, 4), width_ratios=(3, 1), layout="constrained"
    )
    steps, losses = column(rows, "loss")
    resumed = steps > resumed_at
    whole.plot(steps, losses, color="0.8", linewidth=0.6, label="training, each step")
    mean = smoothed(losses, width)
    whole.plot(
        steps[~resumed], mean[~resumed], color="tab:blue", label=f"training, mean of {width}"
    )
    end.plot(steps[~resumed], losses[~resumed], color="0.5", linewidth=1)
    for axes in (whole, end):
        axes.plot(steps[resumed], losses[resumed], color="tab:red", label="resumed, each step")
        axes.plot(*column(rows, "validation_loss"), "ko-", markersize=3, label="held out")
        axes.axvline(resumed_at, color="0.4", linewidth=0.8, linestyle=":")
        axes.set_xlabel("step (updates)")
        axes.grid(alpha=0.3)
    for style, (name, value) in zip(("--", "-.", ":"), lines.items()):
        whole.axhline(
            value, color="k", linewidth=0.9, linestyle=style, label=f"{name}: {value:.2f}"
        )
    whole.set_ylabel("loss (nats a token)")
    whole.set_title(title)
    whole.legend(fontsize=8, loc="upper right")
    end.set_xlim(resumed_at - 60, max(steps.max(initial=0), resumed_at + 1) + 5)
    near = losses[steps > resumed_at - 60]
    if len(near):
        end.set_ylim(near.min() - 0.2, near.max() + 0.2)
    end.set_title("around the stop")
    plt.close(figure)
    return figure


def schedule_curve(rows: Rows) -> Figure:
    """Learning rate and gradient norm by step."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(10, 4), sharex=True, layout="constrained")
    above.plot(*column(rows, "learning_rate"), color="k", linewidth=1.2)
    above.set_ylabel("learning rate")
    below.semilogy(*column(rows, "gradient_norm"), color="0.4", linewidth=0.6)
    below.set_ylabel("gradient norm,\nbefore clipping")
    below.set_xlabel("step (updates)")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    plt.close(figure)
    return figure


def parameter_bars(parts: Mapping[str, int], *, title: str) -> Figure:
    """How many parameters each part of a model has."""
    figure, axes = plt.subplots(figsize=(10, 0.4 * len(parts) + 1.2), layout="constrained")
    total = sum(parts.values())
    bars = axes.barh(
        list(parts), [size / 1e6 for size in parts.values()], color="0.6", edgecolor="k"
    )
    axes.bar_label(
        bars, [f"{size:,} ({size / total:.1%})" for size in parts.values()], padding=4, fontsize=8
    )
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set_xlabel("parameters (millions)")
    axes.set_title(title)
    plt.close(figure)
    return figure


def error_by_layer(errors: Mapping[str, Sequence[float]]) -> Figure:
    """How far each wrong model's states are from the right ones, after each layer."""
    figure, axes = plt.subplots(figsize=(10, 4.5), layout="constrained")
    for marker, (name, values) in zip("osv^D*Px", errors.items()):
        layers = range(1, len(values) + 1)
        axes.semilogy(layers, values, marker=marker, markersize=5, linewidth=1, label=name)
    axes.set_xlabel("layer")
    axes.set_ylabel("largest error, share of the\nposition's largest value")
    axes.set_title("States of broken models against the original")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    plt.close(figure)
    return figure
