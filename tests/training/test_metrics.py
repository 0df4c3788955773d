"""The log of a run, in metrics.jsonl and TensorBoard."""

import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from workflow.errors import CheckpointError
from workflow.training.hardware import peak_flops
from workflow.training.metrics import MetricsLogger, loss_summary, read_log, summary_writer

PROVENANCE_AND_SETTINGS = {"name": "weights", "text": "a text"}, {"seed": 1}


def rows(first: int, last: int) -> list[dict]:
    return [{"step": step, "loss": step / 7, "learning_rate": 0.1} for step in range(first, last)]


def log(folder, step: int, new_rows: list[dict]) -> MetricsLogger:
    """Opens the log at `step`, adds rows, and closes it."""
    logger = MetricsLogger(folder, step, *PROVENANCE_AND_SETTINGS)
    for row in new_rows:
        logger.log(row)
    logger.close()
    return logger


def without_began(logger: MetricsLogger) -> list[dict]:
    return [row for row in logger.rows if "began" not in row]


def test_rows_after_the_checkpoint_are_removed_from_log_and_tensorboard(tmp_path):
    log(tmp_path, 0, rows(1, 31))  # killed after step 30; the newest checkpoint is of step 20
    assert without_began(log(tmp_path, 20, rows(21, 26))) == rows(1, 26)
    logger = log(tmp_path, 25, [])
    assert without_began(logger) == rows(1, 26)
    assert [row["step"] for row in logger.rows if "began" in row] == [0, 20]
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0}).Reload()
    points = [(event.step, event.value) for event in events.Scalars("loss/train")]
    assert [step for step, _ in points] == list(range(1, 26))
    assert all(abs(value - step / 7) < 1e-6 for step, value in points)


def test_the_wait_for_the_next_second_may_find_that_it_has_begun(tmp_path, monkeypatch):
    second = 1_000_000_000
    (tmp_path / f"events.out.tfevents.{second}.host").touch()
    times = iter([second + 0.99])
    monkeypatch.setattr(time, "time", lambda: next(times, second + 1.01))
    summary_writer(tmp_path, 0).close()
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 2


def test_tensorboard_shows_histograms_the_config_and_both_losses_in_one_chart(tmp_path):
    logger, model = MetricsLogger(tmp_path, 0, *PROVENANCE_AND_SETTINGS), nn.Linear(30, 20)
    model.register_parameter("large", nn.Parameter(torch.linspace(0, 1, 2**19)))
    nn.init.zeros_(model.bias)  # all values the same
    model.weight.grad = torch.randn(20, 30)
    logger.log_histograms(500, model)
    logger.close()
    sizes = {"histograms": 0, "tensors": 0}
    events = EventAccumulator(str(tmp_path), size_guidance=sizes).Reload()
    names = {f"tensor weights/{name}" for name in ("weight", "bias", "large")}
    assert set(events.Tags()["histograms"]) == names | {"tensor gradients/weight"}
    (shown,) = events.Histograms("tensor gradients/weight")
    assert (shown.step, shown.histogram_value.num) == (500, 600)
    (sample,) = events.Histograms("tensor weights/large")
    assert sample.histogram_value.num == -(-(2**19) // 9)
    (config,) = events.Tensors("config/text_summary")
    assert b'"seed": 1' in config.tensor_proto.string_val[0]
    (charts,) = events.Tensors("custom_scalars__config__")
    for name in (b"loss/train", b"loss/validation"):
        assert name in charts.tensor_proto.string_val[0]


def test_a_partial_last_line_of_a_kill_is_ignored_and_a_damaged_one_is_refused(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_log(file) == [{"step": 1, "loss": 2.0}]
    file.write_text('{"step": 1, "loss": 2.0}\n{"loss": 2.0}\n')
    with pytest.raises(CheckpointError, match="line 2 is damaged; move the file away"):
        read_log(file)


@pytest.mark.parametrize(("end", "side"), [(2.5, "0.5000 below"), (3.5, "0.5000 above")])
def test_the_summary_of_a_short_run_counts_its_steps(end, side):
    losses = [{"step": step, "loss": float(step)} for step in (1, 2, 3)]
    held_out = [{"step": 0, "validation_loss": 4.0}, {"step": 3, "validation_loss": end}]
    summary = loss_summary(losses + held_out, unigram=3.0)
    assert "mean of the first 3 steps 2.0000, of the last 2.0000" in summary
    assert f"best {end:.4f} at step 3" in summary and summary.endswith(f"{side} the unigram model")


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", None),
        ("NVIDIA RTX A1000", None),
    ],
)
def test_the_peak_speed_is_that_of_the_gpu_with_this_name(name, peak, monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak
