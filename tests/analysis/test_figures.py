"""Every picture has labelled axes and shows what it was given."""

import subprocess
import sys

import numpy as np
import pytest
from matplotlib.quiver import Quiver

from conftest import ROOT
from workflow.analysis import figures

ROWS = [
    {"step": step, "loss": 5 - step / 50, "learning_rate": 0.1, "gradient_norm": 1.0 + step}
    for step in range(1, 121)
] + [{"step": step, "validation_loss": 5.0} for step in (0, 60, 120)]


def test_the_training_curves_show_losses_resume_lines_and_difference():
    figure = figures.training_curves(
        ROWS, title="t", resumed_at=100, lines={"uniform": 5.5}, differences=[0.0] * 20
    )
    whole, rate, norm, stop, difference = figure.axes
    labels = whole.get_legend_handles_labels()[1]
    assert labels == [
        "training, each step",
        "training, mean of 50",
        "resumed, each step",
        "held out",
        "uniform: 5.50",
    ]
    mean, resumed = (whole.lines[i].get_ydata() for i in (1, 2))
    assert mean[0] == pytest.approx(4.98) and mean[1] == pytest.approx(4.97)  # of those so far
    assert mean[-1] == pytest.approx(5 - 75.5 / 50) and len(mean) == 100  # of 51 to 100
    assert list(whole.lines[2].get_xdata()) == list(range(101, 121))
    assert resumed[0] == 5 - 101 / 50
    assert stop.get_xlim() == (40, 125)
    assert whole.get_ylabel() == stop.get_ylabel() == "loss (nats a token)"
    assert rate.get_ylabel() == "learning rate"
    assert norm.get_ylabel() == "gradient norm\nbefore clipping"
    assert list(difference.lines[0].get_xdata()) == list(range(101, 121))
    assert "(nats)" in difference.get_ylabel()
    assert norm.get_xlabel() == difference.get_xlabel() == "step (updates)"


def test_the_bars_have_counts():
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


def labelled(figure) -> bool:
    """Whether every axis that shows ticks is named; a grid's inner ones are not."""
    plots = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    return all(axes.get_xlabel() for axes in plots) and any(axes.get_ylabel() for axes in plots)


def test_the_rotation_is_drawn_with_its_positions():
    arrows = {"pair i = 0": np.array([(1.0, 0.0), (0.0, 1.0)])}
    figure = figures.rotation(arrows, np.array([6.0, 60.0]), np.eye(5), context=30)
    circle, waves, image, bar = figure.axes
    assert [text.get_text() for text in circle.texts] == ["0", "1"]
    (quiver,) = circle.findobj(Quiver)
    assert list(zip(quiver.U, quiver.V)) == [(1.0, 0.0), (0.0, 1.0)]
    assert list(waves.lines[0].get_ydata()) == [6.0, 60.0]
    assert "context: 30" in waves.get_legend_handles_labels()[1]
    assert image.images[0].get_array().shape == (5, 5)
    assert labelled(figure) and bar.get_ylabel() == "score of one query with one key"


def test_shared_heads_are_drawn_with_what_they_save():
    (axes,) = figures.shared_heads(9, 3, 64).axes
    names = [text.get_text() for text in axes.texts]
    assert names.count("q 8") == 1 and [n for n in names if n[0] == "k"][-1] == "k, v 2"
    assert [text.xy[0] for text in axes.texts if text.get_text() == "q 8"] == [
        7.5
    ]  # that of k, v 2
    assert "384 cached numbers" in axes.get_xlabel() and "not 1152" in axes.get_xlabel()


def test_the_lens_shows_words_where_they_belong():
    words, shares = [["a", " b"], ["c", "\n"]], np.array([[0.1, 0.2], [0.9, 0.4]])
    readings = {"before": (words, shares), "after": (words, shares)}
    figure = figures.logit_lens(["x", "y"], readings, {"before": [5.0, 1.0], "after": [4.0, 2.0]})
    before, after = figure.axes[:2]
    found = {text.get_position(): text.get_text() for text in before.texts}
    assert found == {(0, 0): "a", (1, 0): "␣b", (0, 1): "c", (1, 1): "\\n"}
    assert "after training" in after.get_title()
    assert list(figure.axes[-1].lines[1].get_ydata()) == [4.0, 2.0]
    assert labelled(figure)


def test_attention_is_drawn_for_each_model_and_head():
    maps = {name: {"h1": np.eye(4), "h2": np.eye(4)} for name in ("before", "after")}
    figure = figures.attention_maps(maps, {"before": [0.1, 0.2], "after": [0.3, 0.4]})
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[:4] == [f"{h}\n{n} training" for n in maps for h in ("h1", "h2")]
    assert list(figure.axes[-1].lines[1].get_ydata()) == [0.3, 0.4]
    assert labelled(figure)


def test_tokens_make_labels_that_can_be_read():
    assert figures.printable(" the") == "␣the"
    assert figures.printable("$x") == r"\$x"
    assert figures.printable("ééé") == "···"
    assert figures.printable("a" * 20) == "aaaaaaa~"


def test_a_figure_draws_itself_850_pixels_wide_without_pyplot():
    script = (
        "import struct, sys; from workflow.analysis import figures;"
        "png = figures.shared_heads(9, 3, 64)._repr_png_();"
        "print(struct.unpack('>I', png[16:20])[0], 'matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["850", "False"]
