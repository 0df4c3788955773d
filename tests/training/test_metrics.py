"""What a run logs."""

import time

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from workflow.errors import CheckpointError
from workflow.training.metrics import MetricsLogger, StepTrace, read_rows

OF = {"name": "weights", "text": "a text"}, {"seed": 1}


def rows(first: int, last: int) -> list[dict]:
    return [{"step": step, "loss": step / 7, "learning_rate": 0.1} for step in range(first, last)]


def without_began(logger: MetricsLogger) -> list[dict]:
    return [row for row in logger.rows if "began" not in row]


def test_a_continued_log_is_cut_back_to_its_step_in_both_places(tmp_path):
    logger = MetricsLogger(tmp_path, 0, *OF)
    for row in rows(1, 31):
        logger.log(row)
    logger.close()  # killed at 30; the newest checkpoint is of step 20
    time.sleep(1.1)  # TensorBoard orders files by the second in their names
    logger = MetricsLogger(tmp_path, 20, *OF)
    assert without_began(logger) == rows(1, 21)
    for row in rows(21, 26):
        logger.log(row)
    logger.close()
    time.sleep(1.1)
    logger = MetricsLogger(tmp_path, 25, *OF)
    assert without_began(logger) == rows(1, 26)
    assert [row["step"] for row in logger.rows if "began" in row] == [0, 20]
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0}).Reload()
    points = [(event.step, event.value) for event in events.Scalars("loss/train")]
    assert [step for step, _ in points] == list(range(1, 26))
    assert all(abs(value - step / 7) < 1e-6 for step, value in points)


def test_a_partial_line_left_by_a_kill_is_ignored(tmp_path):
    logger = MetricsLogger(tmp_path, 0, *OF)
    logger.log({"step": 1, "loss": 2.0})
    logger.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    assert without_began(MetricsLogger(tmp_path, 5, *OF)) == [{"step": 1, "loss": 2.0}]


def test_a_start_at_step_0_has_an_empty_log_and_keeps_the_old_one(tmp_path):
    logger = MetricsLogger(tmp_path, 0, *OF)
    logger.log({"step": 1, "loss": 2.0})
    logger.close()
    assert MetricsLogger(tmp_path, 0, *OF).rows == []
    (kept,) = tmp_path.glob("metrics-until-*.jsonl")
    assert kept.read_text().endswith('{"step": 1, "loss": 2.0}\n')


def test_histograms_and_the_config_can_be_looked_at(tmp_path):
    logger, model = MetricsLogger(tmp_path, 0, *OF), nn.Linear(30, 20)
    nn.init.zeros_(model.bias)  # all values the same
    model.weight.grad = torch.randn(20, 30)
    logger.log_histograms(500, model)
    logger.close()
    sizes = {"histograms": 0, "tensors": 0}
    events = EventAccumulator(str(tmp_path), size_guidance=sizes).Reload()
    assert set(events.Tags()["histograms"]) == {
        "weights/weight",
        "weights/bias",
        "gradients/weight",
    }
    (shown,) = events.Histograms("gradients/weight")
    values = model.weight.grad.flatten().double()
    assert shown.step == 500
    assert shown.histogram_value.num == sum(shown.histogram_value.bucket) == 600
    assert shown.histogram_value.min == values.min().item()
    assert abs(shown.histogram_value.sum - values.sum().item()) < 1e-4
    counts, _ = np.histogram(values, 64)
    assert list(shown.histogram_value.bucket) == [0, *counts]  # the first marks the left edge
    (config,) = events.Tensors("config/text_summary")
    assert b'"seed": 1' in config.tensor_proto.string_val[0]


def test_a_sample_is_found_by_step_and_prompt(tmp_path):
    logger = MetricsLogger(tmp_path, 0, *OF)
    logger.log({"step": 5, "prompt": "Once", "sample": "Once more"})
    assert logger.sample(5, "Once") == "Once more"
    assert logger.sample(5, "Twice") is None
    assert logger.sample(4, "Once") is None


def test_a_trace_comes_back_bit_for_bit(tmp_path):
    trace = StepTrace(3, (0.1 + 0.2, 1 / 3), "abc")
    trace.write(tmp_path / "trace.json")
    assert StepTrace.read(tmp_path / "trace.json") == trace


def test_a_damaged_line_is_named_by_its_number(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"loss": 2.0}\n')
    with pytest.raises(CheckpointError, match="line 2 is damaged; move the file away"):
        read_rows(tmp_path / "metrics.jsonl")
