"""The figures show their input, and can be read without colours."""

import importlib
import struct
import sys

import numpy as np
import pytest

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
    options = {"baselines": {"uniform": 5.5}, "differences": [0.0] * 20}
    figure = figures.training_curves(ROWS, title="t", resumed_at=100, **options)
    loss, _, _, resume, difference = figure.axes
    labels = loss.get_legend_handles_labels()[1]
    names = ["training, each step", "training, mean of 50", "resumed, each step", "held out"]
    assert labels == [*names, "uniform: 5.50"]
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


def test_lines_by_layer_can_be_read_without_colours(figures):
    (axes,) = figures.error_by_layer({"eps": [1e-3, 1e-2], "no mask": [0.5, 0.7]}).axes
    assert [line.get_label() for line in axes.lines] == ["eps", "no mask"]
    assert list(axes.lines[1].get_ydata()) == [0.5, 0.7]
    assert len({line.get_marker() for line in axes.lines}) == 2
    assert axes.get_yscale() == "log" and axes.get_xlabel() and axes.get_ylabel()


def test_the_logit_lens_shows_a_token_for_each_layer_and_position(figures):
    words, probabilities = [["a", " b"], ["c", "\n"]], np.array([[0.1, 0.2], [0.9, 0.4]])
    figure = figures.logit_lens(["x", "y"], {"after": (words, probabilities)}, {"after": [5.0]})
    found = {text.get_position(): text.get_text() for text in figure.axes[0].texts}
    assert found == {(0, 0): "a", (1, 0): "␣b", (0, 1): "c", (1, 1): "\\n"}


@pytest.mark.parametrize(
    ("token", "label"), [(" the", "␣the"), ("$x", r"\$x"), ("ééé", "···"), ("a" * 20, "aaaaaaa~")]
)
def test_token_labels(figures, token, label):
    assert figures.token_label(token) == label


def test_a_figure_is_850_pixels_wide_and_needs_no_pyplot(figures, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # an import would fail
    figure = importlib.reload(figures).grouped_query_attention(9, 3, 64)
    assert struct.unpack(">I", figure._repr_png_()[16:20]) == (850,)
