"""Arrays in, a figure out.

Nothing here knows of runs or models; every axis has its unit, nothing needs colour alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

Rows = Sequence[Mapping[str, Any]]
plt.rcParams["figure.dpi"] = 85  # 850 pixels wide, which pages show as they are


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


def training_curves(
    rows: Rows,
    *,
    title: str,
    resumed_at: int,
    lines: Mapping[str, float],
    differences: Sequence[float] = (),
    width: int = 50,
) -> Figure:
    """Loss (raw, mean of `width` steps, held out), learning rate and gradient norm, by step.

    lines: losses to compare with. Beside it, the steps around `resumed_at`, and how far the losses
    after it are from those of a run that never stopped.
    """
    figure, axes = plt.subplot_mosaic(
        [["whole", "end"], ["rate", "end"], ["norm", "difference"]],
        figsize=(10, 8),
        width_ratios=(3, 1.2),
        height_ratios=(2.4, 1, 1),
        layout="constrained",
    )
    whole, end, rate, norm, difference = axes.values()
    for above, below in ((whole, rate), (rate, norm), (end, difference)):
        below.sharex(above)
        above.tick_params(labelbottom=False)
    norm.set_xlabel("step (updates)")
    difference.set_xlabel("step (updates)")
    losses_by_step(whole, rows, resumed_at, width)
    for style, (name, value) in zip(("--", "-.", ":"), lines.items()):
        whole.axhline(value, color="k", linewidth=1, linestyle=style, label=f"{name}: {value:.2f}")
    whole.legend(fontsize=8, loc="upper right", bbox_to_anchor=(1, 0.93))
    whole.set_title(title)
    rate_and_norm(rate, norm, rows)

    losses_by_step(end, rows, resumed_at, 1)
    around_the_stop(end, rows, resumed_at)
    steps = resumed_at + 1 + np.arange(len(differences))
    difference.plot(steps, differences, color="tab:red", marker=".", markersize=3)
    difference.set_ylabel("loss, resumed less\nnever stopped (nats)", fontsize=8)
    for each in axes.values():
        each.grid(alpha=0.3)
        each.axvline(resumed_at, color="0.4", linewidth=0.8, linestyle=":")
    plt.close(figure)
    return figure


def rate_and_norm(rate: Axes, norm: Axes, rows: Rows) -> None:
    rate.plot(*column(rows, "learning_rate"), color="k", linewidth=1.2)
    rate.set_ylabel("learning rate")
    norm.semilogy(*column(rows, "gradient_norm"), color="0.4", linewidth=0.6)
    norm.set_ylabel("gradient norm\nbefore clipping")


def losses_by_step(axes: Axes, rows: Rows, resumed_at: int, width: int) -> None:
    """The training loss, raw and smoothed; in another colour after the stop; and held out."""
    steps, losses = column(rows, "loss")
    resumed, mean = steps > resumed_at, smoothed(losses, width)
    if width > 1:
        axes.plot(steps, losses, color="0.8", linewidth=0.6, label="training, each step")
    label = f"training, mean of {width}" if width > 1 else "training, each step"
    axes.plot(steps[~resumed], mean[~resumed], color="tab:blue", linewidth=1.4, label=label)
    axes.plot(steps[resumed], losses[resumed], color="tab:red", label="resumed, each step")
    held_out = column(rows, "validation_loss")
    axes.plot(*held_out, "ko--", linewidth=1, markersize=4, label="held out")
    axes.set_ylabel("loss (nats a token)")


def around_the_stop(axes: Axes, rows: Rows, resumed_at: int, width: int = 60) -> None:
    steps, losses = column(rows, "loss")
    near = losses[steps > resumed_at - width]
    axes.set_xlim(resumed_at - width, max(steps.max(initial=0), resumed_at + 1) + 5)
    if len(near):
        axes.set_ylim(near.min() - 0.2, near.max() + 0.2)
    axes.set_title("around the stop")


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


def rotation(
    turned: Mapping[str, np.ndarray], wavelengths: np.ndarray, scores: np.ndarray, context: int
) -> Figure:
    """How rotary embedding works, in three pictures.

    turned: for some pairs of channels, where (1, 0) lies at each position, (P, 2). wavelengths: of
    every pair, in positions. scores: of a query at each position (rows) with a key at each.
    """
    figure, (circle, waves, image) = plt.subplots(
        1, 3, figsize=(10, 3.6), width_ratios=(1, 1, 1.1), layout="constrained"
    )
    circle.add_patch(plt.Circle((0, 0), 1, fill=False, color="0.8"))
    looks = ({"color": "k", "linewidth": 1.2}, {"color": "tab:red", "linestyle": "--"})
    for (name, points), look, size in zip(turned.items(), looks, (1.0, 0.6)):
        for place, (x, y) in enumerate(points):
            arrow = {"arrowstyle": "->", **look}
            circle.annotate("", (x * size, y * size), (0, 0), arrowprops=arrow)
            if size == 1:
                circle.annotate(place, (1.13 * x, 1.13 * y), ha="center", va="center", fontsize=8)
        circle.plot([], [], label=name, **look)
    circle.set(xlim=(-1.5, 1.5), ylim=(-1.7, 1.3), aspect="equal")
    circle.set_xlabel("channel i")
    circle.set_ylabel("channel i + D/2")
    circle.set_title("a pair turns with the position", fontsize=10)
    circle.legend(fontsize=7, loc="lower center", ncols=2)
    waves.semilogy(wavelengths, "k.-", label="a full turn")
    waves.axhline(context, color="0.4", linestyle="--", label=f"context: {context}")
    waves.set_xlabel("pair of channels")
    waves.set_ylabel("positions for a full turn")
    waves.set_title("fast pairs and slow ones", fontsize=10)
    waves.legend(fontsize=7)
    shown = image.imshow(scores, cmap="gray")
    image.set_xlabel("position of the key")
    image.set_ylabel("position of the query")
    image.set_title("only the distance counts", fontsize=10)
    figure.colorbar(shown, ax=image, label="score of one query with one key", shrink=0.85)
    plt.close(figure)
    return figure


def shared_heads(query_heads: int, key_value_heads: int, head_dim: int) -> Figure:
    """Grouped-query attention: which query heads share which head of keys and values."""
    figure, axes = plt.subplots(figsize=(10, 2.8), layout="constrained")
    group = query_heads // key_value_heads
    shades, hatches = ("0.95", "0.7", "0.85"), ("", "//", "..", "xx")
    for head in range(query_heads):
        shared = head // group
        look = {"facecolor": shades[shared % 3], "hatch": hatches[shared % 4], "edgecolor": "k"}
        axes.add_patch(Rectangle((head + 0.1, 2), 0.8, 0.7, **look))
        name = {"ha": "center", "va": "center", "bbox": {"facecolor": "w", "edgecolor": "none"}}
        axes.text(head + 0.5, 2.35, f"q {head}", fontsize=8, **name)
        middle = (shared + 0.5) * group
        axes.plot([head + 0.5, middle], [2, 0.9], color="k", linewidth=0.9)
        if head % group == 0:
            axes.add_patch(Rectangle((middle - 0.7, 0.2), 1.4, 0.7, **look))
            axes.text(middle, 0.55, f"k, v {shared}", fontsize=9, **name)
    axes.set(xlim=(0, query_heads), ylim=(0, 2.9), yticks=[0.55, 2.35], xticks=[])
    axes.set_yticklabels(["keys and values,\ncached", "queries"])
    cached, all_heads = 2 * key_value_heads * head_dim, 2 * query_heads * head_dim
    axes.set_xlabel(
        f"{query_heads} query heads share {key_value_heads} heads of keys and values, {head_dim} "
        f"channels each: {cached} cached numbers a token and layer, not {all_heads}"
    )
    axes.spines[:].set_visible(False)
    plt.close(figure)
    return figure


def lens(
    prompt: Sequence[str],
    readings: Mapping[str, tuple[Sequence[Sequence[str]], np.ndarray]],
    losses: Mapping[str, Sequence[float]],
    rows: int = 12,
) -> Figure:
    """What each layer would answer after each token of `prompt`, and how good that is.

    readings: by model, the likeliest tokens and their shares, (layers + 1, T). losses: by model,
    nats a token after the embedding and each layer.
    """
    figure = plt.figure(figsize=(10, 8), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(2, 1))
    panels = above.subplots(1, len(readings), sharey=True, squeeze=False)[0]
    for axes, (name, (words, shares)) in zip(panels, readings.items()):
        layers = np.unique(np.linspace(0, len(words) - 1, rows).round().astype(int))
        shown = axes.imshow(shares[layers], cmap="Greys", vmin=0, vmax=1, aspect="auto")
        for row, layer in enumerate(layers):
            for place, word in enumerate(words[layer]):
                look = {"color": "w" if shares[layer][place] > 0.6 else "k", "fontsize": 8}
                axes.text(place, row, printable(word), ha="center", va="center", **look)
        axes.set_xticks(range(len(prompt)), [printable(word) for word in prompt], fontsize=8)
        axes.set_yticks(range(len(layers)), layers)
        axes.set_title(f"{name} training: likeliest next token")
        axes.set_xlabel("token of the prompt")
    panels[0].set_ylabel("after layer (0: embedding)")
    above.colorbar(shown, ax=list(panels), label="its probability")
    axes = below.subplots()
    for style, (name, values) in zip(("k.-", "r.--"), losses.items()):
        axes.semilogy(values, style, label=f"{name} training")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("after layer (0: embedding)")
    axes.set_ylabel("loss on held-out text\n(nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    plt.close(figure)
    return figure


def printable(word: str, longest: int = 8) -> str:
    """A token as a label: white space can be seen, and a dollar sign is no formula."""
    word = "".join(c if c.isprintable() and c.isascii() else "·" for c in word.replace("\n", "\\n"))
    word = word if len(word) <= longest else word[: longest - 1] + "~"
    return word.replace(" ", "␣").replace("$", r"\$")


def attention(
    maps: Mapping[str, Mapping[str, np.ndarray]], scores: Mapping[str, Sequence[float]]
) -> Figure:
    """Where chosen heads look, before and after training, and an induction score by layer.

    maps: by model and head, (T, T), rows sum to 1. scores: by model, the best head of each layer.
    """
    figure = plt.figure(figsize=(10, 9), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(2.2, 1))
    grid = above.subplots(len(maps), len(next(iter(maps.values()))), sharex=True, sharey=True)
    for line, (name, heads) in zip(grid, maps.items()):
        for axes, (head, weights) in zip(line, heads.items()):
            shown = axes.imshow(weights**0.5, cmap="Greys", vmin=0, vmax=1)
            axes.set_title(f"{head}\n{name} training", fontsize=9)
            axes.set_xlabel("position looked at", fontsize=8)
        line[0].set_ylabel("position that looks", fontsize=8)
    above.colorbar(shown, ax=grid, label="square root of the attention", shrink=0.8)
    axes = below.subplots()
    for style, (name, values) in zip(("ko-", "r^--"), scores.items()):
        axes.plot(range(1, len(values) + 1), values, style, markersize=5, label=f"{name} training")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer")
    axes.set_ylabel("induction score of its best head\n(share of the attention)")
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    axes.legend()
    plt.close(figure)
    return figure
