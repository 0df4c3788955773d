"""The figures show their input, and can be read without colours."""

import importlib
import math
import struct
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from conftest import ROOT
from SmolLm3 import LlamaModel
from workflow.config import load_config

ROWS = [
    {"step": step, "loss": 5 - step / 50, "learning_rate": 0.1, "gradient_norm": 1.0 + step}
    for step in range(1, 121)
] + [{"step": step, "validation_loss": 5.0} for step in (0, 60, 120)]
LINES = ("training, mean of 4", "held out")


@pytest.fixture(scope="module")
def figures():
    from workflow.analysis import figures  # matplotlib takes seconds

    return figures


def test_training_curves_show_losses_resume_baselines_and_differences(figures):
    options = {"baselines": {"uniform": 10.8, "unigram": 5.5}, "differences": [0.0] * 20}
    figure = figures.training_curves(ROWS, title="t", resumed_at=100, **options)
    loss, _, _, resume, difference = figure.axes
    labels = loss.get_legend_handles_labels()[1]
    names = ["training, each step", "training, mean of 50", "resumed, each step", "held out"]
    assert labels == [*names, "uniform: 10.80 (above)", "unigram: 5.50"]
    assert 5.5 < loss.get_ylim()[1] < 7  # a line at 10.8 would make the losses flat
    options["baselines"] = {"uniform": 10.8, "unigram": 8.4}
    figure = figures.training_curves(ROWS, title="t", resumed_at=100, **options)
    assert 5 < figure.axes[0].get_ylim()[1] < 6.5
    mean, resumed = (loss.lines[i].get_ydata() for i in (1, 2))
    assert mean[0] == pytest.approx(4.98) and mean[1] == pytest.approx(4.97)  # fewer than 50 steps
    assert mean[-1] == pytest.approx(5 - 75.5 / 50) and len(mean) == 100  # steps 51 to 100
    assert resumed[0] == 5 - 101 / 50 and resume.get_xlim() == (40, 125)
    for line in (loss.lines[2], difference.lines[0]):
        assert list(line.get_xdata()) == list(range(101, 121))
    assert all(axes.get_ylabel() for axes in figure.axes)


def test_runs_of_different_lengths_have_the_same_moving_average(figures):
    (axes,) = figures.compared_losses({"short": ROWS[:40], "long": ROWS}).axes
    labels = axes.get_legend_handles_labels()[1]
    assert labels == [f"{run}: {kind}" for run in ("short", "long") for kind in LINES]
    assert axes.lines[4].get_ydata()[-1] == pytest.approx(5 - 118.5 / 50)  # steps 117 to 120


@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": False, "num_key_value_heads": 1, "head_dim": 80}]
)
def test_the_diagram_has_the_shape_and_the_size_of_every_weight(figures, changes):
    entry = load_config(ROOT / "SmolLm3_Config.yaml", "cpu").model_entry
    config = replace(entry.architecture, **changes)
    with torch.device("meta"):
        model = LlamaModel(config)
    boxes = [
        text.get_text().split("\n") for text in figures.architecture(config, title="").axes[0].texts
    ]
    sizes = {"".join(name): (shape, n) for *name, shape, n in (b for b in boxes if len(b) > 2)}
    layers = sizes.pop("30 layers")
    expected = {
        name.split(".")[-2]: (" × ".join(f"{n:,}" for n in weight.shape), f"{weight.numel():,}")
        for name, weight in model.named_parameters()
    }
    assert {name: sizes[name] for name in expected} == expected
    per_layer = sum(p.numel() for p in model.layers[0].parameters())
    assert layers == (f"30 × {per_layer:,} =", f"{30 * per_layer:,}")


def test_lines_by_layer_can_be_read_without_colours(figures):
    errors = {f"mutation {i}": [1e-3 * i, 0.5] for i in range(1, 18)}
    (axes,) = figures.error_by_layer(errors).axes
    assert [line.get_label() for line in axes.lines] == list(errors)  # all are drawn
    assert list(axes.lines[16].get_ydata()) == [0.017, 0.5]
    assert len({(line.get_marker(), line.get_linestyle()) for line in axes.lines}) == 17
    assert axes.get_yscale() == "log" and axes.get_xlabel() and axes.get_ylabel()


def test_the_logit_lens_shows_a_token_for_each_layer_and_position(figures):
    words, probabilities = [["a", " b"], ["c", "\n"]], np.array([[0.1, 0.2], [0.9, 0.4]])
    deep = [["d", "e"]] * 31, np.zeros((31, 2))  # another number of layers
    tokens = {"original": deep, "small": (words, probabilities)}
    figure = figures.logit_lens(["x", "y"], tokens, {"original": [5.0] * 31, "small": [5.0, 4.0]})
    found = {text.get_position(): text.get_text() for text in figure.axes[1].texts}
    assert found == {(0, 0): "a", (1, 0): "␣b", (0, 1): "c", (1, 1): "\\n"}
    rows = [[label.get_text() for label in axes.get_yticklabels()] for axes in figure.axes[:2]]
    assert rows[0][::11] == ["0", "30"] and rows[1] == ["0", "1"]
    assert figure.axes[1].get_title() == "small: most likely next token"


def test_attention_maps_name_each_model_and_its_heads(figures):
    weights = np.array([[1.0, 0.0], [0.75, 0.25]])
    maps = {"original": {"a": weights, "b": weights / 4}, "small": {"c": weights / 9, "d": weights}}
    figure = figures.attention_maps(maps, {"original": [0.1] * 30, "small": [0.2, 0.3]})
    largest = {axes.get_title(): axes.images[0].get_array().max() for axes in figure.axes[:4]}
    assert largest == {"original\na": 1, "original\nb": 1 / 2, "small\nc": 1 / 3, "small\nd": 1}
    assert [list(line.get_xdata())[-1] for line in figure.axes[-1].lines] == [30, 2]

    (axes, *_) = figures.sentence_attention(["the", " cat"], {"layer 19": weights}).axes
    assert axes.images[0].get_array().tolist() == [[1, 0], [math.sqrt(0.75), 0.5]]
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == ["the", "␣cat"]


@pytest.mark.parametrize(
    ("token", "label"), [(" the", "␣the"), ("$x", r"\$x"), ("ééé", "···"), ("a" * 20, "aaaaaaa~")]
)
def test_token_labels(figures, token, label):
    assert figures.token_label(token) == label


def test_a_figure_is_850_pixels_wide_and_needs_no_pyplot(figures, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # an import would fail
    figure = importlib.reload(figures).grouped_query_attention(9, 3, 64)
    assert struct.unpack(">I", figure._repr_png_()[16:20]) == (850,)
