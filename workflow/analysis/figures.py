"""The figures of the notebook. Every axis has a unit; all can be read without colours."""

import io
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise, product

import matplotlib.figure
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Circle, Rectangle
from PIL import Image

from SmolLm3 import ModelConfig

Rows = Sequence[Mapping]
Curves = Mapping[str, Sequence[float]]
SMOOTHING = 50  # steps, of the moving average of the training loss
STEPS_BEFORE = 60  # steps before the resume, in the panel around it
CENTERED = {"ha": "center", "va": "center", "fontsize": 8}


class Figure(matplotlib.figure.Figure):
    """A figure 850 pixels wide. Jupyter shows it without pyplot."""

    def __init__(self, height: float):
        super().__init__(figsize=(10, height), dpi=85, layout="constrained")

    def _repr_png_(self) -> bytes:
        self.savefig(full := io.BytesIO(), format="png")
        # 256 colours need a third of the bytes: an executed notebook stays small
        Image.open(full).convert("RGB").quantize().save(png := io.BytesIO(), format="png")
        return png.getvalue()


def values_by_step(rows: Rows, name: str) -> pd.Series:
    """One value of the log, indexed by step; rows without it are skipped."""
    return pd.Series({row["step"]: row[name] for row in rows if name in row}, dtype=float)


def training_curves(
    rows: Rows, *, title: str, resumed_at: int, baselines: Mapping, differences: list[float]
) -> Figure:
    """Loss, learning rate and gradient norm by step. On the right: the steps around the resume.

    baselines: losses to compare with. differences: resumed minus uninterrupted losses, by step.
    """
    figure = Figure(8)
    left, right = figure.subfigures(1, 2, width_ratios=(3, 1.3))
    loss, rate, norm = left.subplots(3, 1, sharex=True, height_ratios=(2.4, 1, 1))
    resume, difference = right.subplots(2, 1, sharex=True, height_ratios=(3.4, 1))
    plot_losses(loss, rows, resumed_at)
    # a line far above the losses would make their curve flat: it is only in the legend
    highest = loss.dataLim.y1
    shown = [value for value in baselines.values() if value < 1.5 * highest]
    for style, (name, value) in zip(("--", "-.", ":"), baselines.items()):
        label = f"{name}: {value:.2f}" + ("" if value in shown else " (above)")
        loss.axhline(value, color="k", linewidth=1, linestyle=style, label=label)
    loss.set_ylim(top=1.25 * max([highest, *shown]))  # leaves room for the legend
    loss.legend(fontsize=8, loc="upper right", ncols=2)
    loss.set_title(title)
    rate.plot(values_by_step(rows, "learning_rate"), "k")
    rate.set_ylabel("learning rate")
    norm.semilogy(values_by_step(rows, "gradient_norm"), color="0.4", linewidth=0.6)
    norm.set(xlabel="step (updates)", ylabel="gradient norm\nbefore clipping")

    plot_losses(resume, rows, resumed_at)
    near = values_by_step(rows, "loss").loc[resumed_at - STEPS_BEFORE :]
    resume.set_xlim(resumed_at - STEPS_BEFORE, resumed_at + len(differences) + 5)
    resume.set(ylim=(near.min() - 0.2, near.max() + 0.2), title="around the resume")
    steps = range(resumed_at + 1, resumed_at + 1 + len(differences))
    difference.plot(steps, differences, "r.-", markersize=3)
    difference.set(xlabel="step (updates)", ylabel="loss, resumed minus\nuninterrupted (nats)")
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.axvline(resumed_at, color="0.4", linewidth=0.8, linestyle=":")
    return figure


def plot_losses(axes: Axes, rows: Rows, resumed_at: int) -> None:
    """The training loss of each step and its moving average, and the held-out loss."""
    losses = values_by_step(rows, "loss")
    mean = losses.rolling(SMOOTHING, min_periods=1).mean().loc[:resumed_at]
    axes.plot(losses, color="0.75", linewidth=0.6, label="training, each step")
    axes.plot(mean, color="tab:blue", label=f"training, mean of {SMOOTHING}")
    axes.plot(losses.loc[resumed_at + 1 :], color="tab:red", label="resumed, each step")
    held_out = values_by_step(rows, "validation_loss")
    axes.plot(held_out, "ko--", linewidth=1, markersize=4, label="held out")
    axes.set_ylabel("loss (nats per token)")


def compared_losses(runs: Mapping[str, Rows]) -> Figure:
    """The losses of some runs by step: training as lines, held out as markers.

    All have the moving average of the shortest, so that their lines can be compared.
    """
    figure = Figure(5)
    axes = figure.subplots()
    shortest = min(len(values_by_step(rows, "loss")) for rows in runs.values())
    count = max(min(SMOOTHING, shortest // 10), 1)
    looks = zip(("tab:blue", "tab:red", "0.4"), ("-", "--", ":"), "os^")
    for (name, rows), (color, style, marker) in zip(runs.items(), looks):
        losses, held_out = (values_by_step(rows, key) for key in ("loss", "validation_loss"))
        mean = losses.rolling(count, min_periods=1).mean()
        axes.plot(losses, color=color, linewidth=0.5, alpha=0.3)
        axes.plot(mean, style, color=color, label=f"{name}: training, mean of {count}")
        look = {"linestyle": "none", "markerfacecolor": "none", "label": f"{name}: held out"}
        axes.plot(held_out, color=color, marker=marker, **look)
    axes.set(xlabel="step (updates)", ylabel="loss (nats per token)")
    axes.set_title("Thin lines: the training loss of each step")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def architecture(config: ModelConfig, *, title: str) -> Figure:
    """A model and one of its layers, from top to bottom: weights, their shapes, their parameters.

    Grey boxes have weights, white ones have none.
    """
    figure = Figure(7)
    axes = figure.subplots()
    axes.set(xlim=(0, 100), ylim=(0, 100), title=title)
    axes.set_axis_off()
    axes.add_patch(Rectangle((30, 1), 69.5, 98, fill=False, linestyle="--", color="0.6"))
    axes.text(31, 95.5, "one layer: attention, then MLP", fontsize=9, style="italic")
    boxes, patches = architecture_boxes(config), {}
    for name, (x, y, text) in boxes.items():
        color = "0.85" if text.split("\n")[-1].replace(",", "").isdigit() else "white"
        look = {"boxstyle": "round,pad=0.4", "facecolor": color, "edgecolor": "0.3"}
        patches[name] = axes.text(
            x, y, text, bbox=look, **CENTERED | {"fontsize": 9}
        ).get_bbox_patch()
    for path in ARROWS.split("; "):
        for start, end in pairwise(path.split()):
            ends = {"patchA": patches[start], "patchB": patches[end]}
            arrow = {"arrowstyle": "->", "shrinkA": 0, "shrinkB": 0, **ends}
            axes.annotate("", boxes[end][:2], boxes[start][:2], arrowprops=arrow)
    return figure


ARROWS = "ids embed layers norm head logits; in + ++ out; in norm1 q rope attention o +; "
ARROWS += "norm1 k rope; norm1 v attention; + norm2 gate times down ++; norm2 up times"


def architecture_boxes(config: ModelConfig) -> dict[str, tuple[float, float, str]]:
    """The boxes of `architecture`: name → x, y, and text, which ends in the parameters."""
    C, F, D = config.hidden_size, config.intermediate_size, config.head_dim
    H, K, V = config.num_attention_heads, config.num_key_value_heads, config.vocab_size
    layers, tied = config.num_hidden_layers, config.tie_word_embeddings
    layer = 2 * C + 2 * C * (H + K) * D + 3 * C * F

    def weight(name: str, *shape: int) -> str:
        return f"{name}\n{' × '.join(f'{n:,}' for n in shape)}\n{math.prod(shape):,}"

    return {
        "ids": (13, 95, "T token ids"),
        "embed": (13, 79, weight("embed_tokens", V, C)),
        "layers": (13, 55, f"{layers} layers\n{layers} × {layer:,} =\n{layers * layer:,}"),
        "norm": (13, 36, weight("norm", C)),
        "head": (13, 19, "lm_head\ntied: it is\nembed_tokens" if tied else weight("lm_head", V, C)),
        "logits": (13, 4, f"logits: T × {V:,}"),
        "in": (38, 87, f"residual stream\nT × {C:,}"),
        "+": (38, 55, "+"),
        "++": (38, 14, "+"),
        "out": (38, 4, "next layer"),
        "norm1": (53, 78, weight("input_layernorm", C)),
        "q": (67, 91, weight("q_proj", H * D, C)),
        "k": (67, 78, weight("k_proj", K * D, C)),
        "v": (67, 65, weight("v_proj", K * D, C)),
        "rope": (79, 85, "RoPE"),
        "attention": (91, 73, f"causal\nattention:\n{H} heads of q,\n{K} of k and v"),
        "o": (91, 55, weight("o_proj", C, H * D)),
        "norm2": (53, 32, weight("post_attention_\nlayernorm", C)),
        "gate": (67, 39, weight("gate_proj", F, C)),
        "up": (67, 25, weight("up_proj", F, C)),
        "times": (81, 32, "SiLU(gate)\n× up"),
        "down": (91, 14, weight("down_proj", C, F)),
    }


def rotary_embedding(
    arrows: Mapping[str, np.ndarray], wavelengths: np.ndarray, scores: np.ndarray, context: int
) -> Figure:
    """How rotary position embedding works, in three pictures.

    arrows: for two pairs of channels, the vector (1, 0) rotated to each position, (P, 2).
    wavelengths: of every pair, in positions. scores: of a query at each position (rows) and a key
    at each position (columns).
    """
    figure = Figure(3.6)
    circle, waves, image = figure.subplots(1, 3, width_ratios=(1, 1, 1.1))
    circle.add_patch(Circle((0, 0), 1, fill=False, color="0.8"))
    for (name, points), color, size in zip(arrows.items(), ("k", "tab:red"), (1, 0.6)):
        scale = {"angles": "xy", "scale_units": "xy", "scale": 1 / size}
        circle.quiver(*np.zeros_like(points.T), *points.T, color=color, label=name, **scale)
    for position, (x, y) in enumerate(next(iter(arrows.values()))):
        circle.text(1.13 * x, 1.13 * y, position, **CENTERED)
    circle.set(xlim=(-1.5, 1.5), ylim=(-1.7, 1.3), aspect="equal")
    circle.set(xlabel="channel i", ylabel="channel i + D/2", title="position = angle of a pair")
    circle.legend(fontsize=7, loc="lower center", ncols=2)
    waves.semilogy(wavelengths, "k.-", label="wavelength")
    waves.axhline(context, color="0.4", linestyle="--", label=f"context: {context}")
    waves.set(xlabel="pair of channels", ylabel="wavelength (positions)")
    waves.set_title("wavelength of each pair")
    waves.legend(fontsize=7)
    shown = image.imshow(scores, cmap="gray")
    image.set(xlabel="position of the key", ylabel="position of the query")
    image.set_title("only the distance matters")
    figure.colorbar(shown, ax=image, label="score of one query and one key", shrink=0.85)
    return figure


def grouped_query_attention(query_heads: int, key_value_heads: int, head_dim: int) -> Figure:
    """Which query heads share which head of keys and values."""
    figure = Figure(3)
    axes, group = figure.subplots(), query_heads // key_value_heads
    for shared in range(key_value_heads):
        middle = (shared + 0.5) * group
        box = {"boxstyle": "square,pad=0.8", "facecolor": ("0.95", "0.7", "0.85")[shared % 3]}
        look = {"bbox": box, "arrowprops": {"arrowstyle": "-"}, **CENTERED}
        for head in range(shared * group, (shared + 1) * group):
            axes.annotate(f"q {head}", (middle, 0), (head + 0.5, 1), **look)
        axes.annotate(f"k, v {shared}", (middle, 0), (middle, 0), **look)
    axes.set(xlim=(0, query_heads), ylim=(-0.3, 1.3), xticks=[])
    axes.set_yticks([0, 1], ["keys and values,\ncached", "queries"])
    cached, separate = 2 * key_value_heads * head_dim, 2 * query_heads * head_dim
    axes.set_xlabel(
        f"{query_heads} query heads share {key_value_heads} heads of keys and values, {head_dim} "
        f"channels each:\nthe cache has {cached} numbers per token and layer, not {separate}"
    )
    axes.spines[:].set_visible(False)
    return figure


def plot_by_layer(axes: Axes, curves: Curves, first: int, **texts) -> None:
    """One line per curve, each with another look; the first value is that of layer `first`."""
    for look, (name, values) in zip(product(("-", "--", ":"), "osv^D*Px"), curves.items()):
        layers = range(first, first + len(values))
        axes.plot(layers, values, "".join(look), markersize=5, linewidth=1, label=name)
    axes.locator_params(axis="x", integer=True)
    axes.grid(alpha=0.3)
    axes.set(**texts)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def error_by_layer(errors: Curves) -> Figure:
    """The error of the hidden states after each layer, for each mutation."""
    figure = Figure(4.5)
    axes, label = figure.subplots(), "largest error, relative to the\nlargest value of its position"
    plot_by_layer(axes, errors, 1, xlabel="layer", ylabel=label, yscale="log")
    axes.set_title("Hidden states with a mutation, compared with the original")
    return figure


def logit_lens(prompt: Sequence[str], tokens: Mapping[str, tuple], losses: Curves) -> Figure:
    """The most likely next token after each layer, for each token of `prompt`, and the loss.

    tokens: for each model, the tokens and their probabilities, each (layers + 1, T); 12 layers at
    most are shown. losses: for each model, nats per token after the embedding and each layer.
    """
    figure = Figure(8)
    above, below = figure.subfigures(2, 1, height_ratios=(2, 1))
    panels = above.subplots(1, len(tokens), squeeze=False)[0]
    for axes, (name, (words, probabilities)) in zip(panels, tokens.items()):
        layers = np.unique(np.linspace(0, len(words) - 1, 12).round().astype(int))
        grey = {"cmap": "Greys", "vmin": 0, "vmax": 1, "alpha": 0.5, "aspect": "auto"}
        shown = axes.imshow(probabilities[layers], **grey)
        for (row, place), word in np.ndenumerate(np.array(words, dtype=object)[layers]):
            axes.text(place, row, token_label(word), **CENTERED)
        axes.set_xticks(range(len(prompt)), map(token_label, prompt), fontsize=8)
        axes.set_yticks(range(len(layers)), layers)
        axes.set(title=f"{name}: most likely next token", xlabel="token of the sentence")
    panels[0].set_ylabel("after layer (0: embedding)")
    above.colorbar(shown, ax=list(panels), label="its probability")
    label = "loss on held-out text\n(nats per token)"
    texts = {"xlabel": "after layer (0: embedding)", "ylabel": label, "yscale": "log"}
    plot_by_layer(below.subplots(), losses, 0, **texts)
    return figure


def token_label(word: str) -> str:
    """A token as a label: at most 8 characters, visible white space, `$` without formulas."""
    word = "".join(c if c.isprintable() and c.isascii() else "·" for c in word.replace("\n", "\\n"))
    word = word if len(word) <= 8 else word[:7] + "~"
    return word.replace(" ", "␣").replace("$", r"\$")


def attention_maps(maps: Mapping[str, Mapping[str, np.ndarray]], scores: Curves) -> Figure:
    """Attention weights of some heads, and the highest induction score of each layer.

    maps: for each model and head, (T, T); rows sum to 1. scores: for each model, one per layer.
    """
    figure = Figure(9)
    above, below = figure.subfigures(2, 1, height_ratios=(2.2, 1))
    grid = above.subplots(len(maps), len(next(iter(maps.values()))), sharex=True, sharey=True)
    for line, (name, heads) in zip(grid, maps.items()):
        for axes, (head, weights) in zip(line, heads.items()):
            shown = axes.imshow(weights**0.5, cmap="Greys", vmin=0, vmax=1)
            axes.set_title(f"{name}\n{head}", fontsize=9)
            axes.set_xlabel("position of the key", fontsize=8)
        line[0].set_ylabel("position of the query", fontsize=8)
    above.colorbar(shown, ax=grid, label="square root of the attention weight", shrink=0.8)
    label = "highest induction score\n(share of the attention)"
    plot_by_layer(below.subplots(), scores, 1, xlabel="layer", ylabel=label, ylim=(0, 1))
    return figure


def sentence_attention(words: Sequence[str], maps: Mapping[str, np.ndarray]) -> Figure:
    """The attention weights of some heads on a sentence, (T, T) each; its tokens are the labels."""
    figure = Figure(3.4)
    for axes, (head, weights) in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps.items()):
        shown = axes.imshow(weights**0.5, cmap="Greys", vmin=0, vmax=1)
        labels = [token_label(word) for word in words]
        axes.set_xticks(range(len(words)), labels, rotation=90, fontsize=8)
        axes.set_yticks(range(len(words)), labels, fontsize=8)
        axes.set_title(head, fontsize=9)
        axes.set(xlabel="key", ylabel="query")
    figure.colorbar(shown, ax=figure.axes, label="square root of the\nattention weight", shrink=0.6)
    return figure
