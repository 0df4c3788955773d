"""What a run leaves to look at."""

import time

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from workflow.record import Record, Trace

MADE_OF = {"name": "weights", "text": "a text"}


def rows(first: int, last: int) -> list[dict]:
    return [{"step": step, "loss": step / 7, "learning_rate": 0.1} for step in range(first, last)]


def test_a_record_taken_up_is_cut_back_to_its_step_in_both_places(tmp_path):
    record = Record(tmp_path, 0, MADE_OF)
    for row in rows(1, 31):
        record.add(row)
    record.close()  # killed at 30; the newest checkpoint is of step 20
    time.sleep(1.1)  # TensorBoard orders files by the second in their names
    record = Record(tmp_path, 20, MADE_OF)
    assert record.rows == rows(1, 21)
    for row in rows(21, 26):
        record.add(row)
    record.close()
    time.sleep(1.1)
    assert Record(tmp_path, 25, MADE_OF).rows == rows(1, 26)
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0}).Reload()
    points = [(event.step, event.value) for event in events.Scalars("loss/train")]
    assert [step for step, _ in points] == list(range(1, 26))
    assert all(abs(value - step / 7) < 1e-6 for step, value in points)


def test_half_a_line_left_by_a_kill_is_passed_over(tmp_path):
    record = Record(tmp_path, 0, MADE_OF)
    record.add({"step": 1, "loss": 2.0})
    record.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    assert Record(tmp_path, 5, MADE_OF).rows == [{"step": 1, "loss": 2.0}]


def test_a_start_at_step_0_has_an_empty_record_and_keeps_the_old_one(tmp_path):
    record = Record(tmp_path, 0, MADE_OF)
    record.add({"step": 1, "loss": 2.0})
    record.close()
    assert Record(tmp_path, 0, MADE_OF).rows == []
    (kept,) = tmp_path.glob("metrics-until-*.jsonl")
    assert kept.read_text() == '{"step": 1, "loss": 2.0}\n'


def test_a_sample_is_found_by_step_and_prompt(tmp_path):
    record = Record(tmp_path, 0, MADE_OF)
    record.add({"step": 5, "prompt": "Once", "sample": "Once more"})
    assert record.sample(5, "Once") == "Once more"
    assert record.sample(5, "Twice") is None
    assert record.sample(4, "Once") is None


def test_a_trace_comes_back_bit_for_bit(tmp_path):
    trace = Trace(3, (0.1 + 0.2, 1 / 3), "abc")
    trace.write(tmp_path / "trace.json")
    assert Trace.read(tmp_path / "trace.json") == trace
