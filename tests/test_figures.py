"""Every picture has labelled axes and shows what it was given."""

import numpy as np
import pytest

from workflow import figures

ROWS = [
    {"step": step, "loss": 5 - step / 50, "learning_rate": 0.1, "gradient_norm": 1.0 + step}
    for step in range(1, 121)
] + [{"step": step, "validation_loss": 5.0} for step in (0, 60, 120)]


def test_the_loss_curve_shows_training_held_out_resume_and_lines():
    figure = figures.loss_curve(ROWS, title="t", resumed_at=100, lines={"uniform": 5.5})
    whole, end = figure.axes
    labels = whole.get_legend_handles_labels()[1]
    assert labels == [
        "training, each step",
        "training, mean of 50",
        "resumed, each step",
        "held out",
        "uniform: 5.50",
    ]
    assert list(whole.lines[2].get_xdata()) == list(range(101, 121))
    assert whole.get_ylabel() == "loss (nats a token)"
    assert all(axes.get_xlabel() == "step (updates)" for axes in (whole, end))


def test_smoothing_is_the_mean_of_the_values_before():
    assert figures.smoothed(np.array([1.0, 2.0, 3.0, 4.0]), 2) == pytest.approx([1, 1.5, 2.5, 3.5])


def test_the_schedule_has_units_and_the_bars_have_counts():
    assert [axes.get_ylabel() for axes in figures.schedule_curve(ROWS).axes] == [
        "learning rate",
        "gradient norm,\nbefore clipping",
    ]
    (axes,) = figures.parameter_bars({"a": 3_000_000, "b": 1_000_000}, title="t").axes
    assert [bar.get_width() for bar in axes.patches] == [3.0, 1.0]
    assert "3,000,000 (75.0%)" in [text.get_text() for text in axes.texts]
    assert axes.get_xlabel() == "parameters (millions)"


def test_errors_by_layer_are_drawn_one_line_each():
    (axes,) = figures.error_by_layer({"eps 1e-6": [1e-3, 1e-2], "no mask": [0.5, 0.7]}).axes
    assert [line.get_label() for line in axes.lines] == ["eps 1e-6", "no mask"]
    assert list(axes.lines[1].get_ydata()) == [0.5, 0.7]
    assert len({line.get_marker() for line in axes.lines}) == 2  # readable without colours
    assert axes.get_yscale() == "log"
    assert axes.get_xlabel() == "layer" and "largest error" in axes.get_ylabel()
