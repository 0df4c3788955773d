"""The benchmark measures the same work for our model and for transformers."""

import contextlib
import copy
import dataclasses
import re

import pytest
import torch

from workflow.tools import bench
from workflow.tools.bench import BF16, OURS, THEIRS, Case


@pytest.fixture
def task(config, reference):
    """The function that a worker measures."""

    def make(*case):
        fresh = dataclasses.replace(reference, model=copy.deepcopy(reference.model))
        return bench.TASKS[case[0]](Case(*case), fresh, config)

    return make


def test_workers_take_turns_and_a_row_has_the_median_of_pairs(config, monkeypatch):
    calls = []
    fast, plain = Case("greedy generation", 2, 50, OURS + BF16), Case("", 2, 50, THEIRS)
    results = {fast: iter([1.0, 2.0, 4.0, 1.234]), plain: iter([2.0, 2.0, 5.0, 2.0])}

    @contextlib.contextmanager
    def fake_worker(case, config):
        yield lambda again: (calls.append((case, again)), next(results[case]))[1]

    monkeypatch.setattr(bench, "worker_process", fake_worker)
    row = bench.measure(fast, plain, config, 3)
    assert calls == [(fast, True), (plain, True)] * 3 + [(fast, False), (plain, False)]
    name = "greedy generation, 2 × 50 tokens, this project, bfloat16"
    numbers = "50.0 | transformers | 50.0 | 1.25 (1.00 to 2.00) | 1.23 | 2.00"
    assert row == f"| {name} | {numbers} |"


def test_both_models_train_with_the_same_loss(task, monkeypatch):
    losses, backward = [], torch.Tensor.backward

    def backward_and_log(loss):
        losses.append(loss.item())
        backward(loss)

    monkeypatch.setattr(torch.Tensor, "backward", backward_and_log)
    case = ("training step", 2, 16)
    ours, theirs = task(*case), task(*case, THEIRS)
    for _ in range(3):
        ours(), theirs()
    assert losses[::2] == pytest.approx(losses[1::2], abs=1e-5)
    assert len(losses) == 6 and len(set(losses[::2])) == 3


def test_both_models_generate_the_same_tokens(task):
    case = ("greedy generation", 2, 5)
    ours, theirs = torch.stack(task(*case)(), dim=1), task(*case, THEIRS)()[:, 16:]
    assert torch.equal(ours, theirs)
    assert len(task(*case, OURS + BF16)()) == 5


@pytest.mark.parametrize("fast", [False, True])
def test_only_a_cpu_with_bfloat16_instructions_trains_in_it(config, monkeypatch, fast):
    monkeypatch.setattr(bench.hardware, "has_fast_bf16", lambda device: fast)
    training = [ours for ours, _ in bench.cases(config) if ours.task == "training step"]
    assert any(BF16 in case.variant for case in training) == fast


@pytest.mark.slow
def test_the_report_has_date_machine_versions_and_rows(here):
    code, out, err = here("bench", "--rounds", "2", "--only", "greedy generation, 1")
    assert code == 0, err
    assert re.match(r"20\d\d-\d\d-\d\d; .* threads; float32\ntorch 2\.", out)
    rows = re.findall(r"^\| greedy generation, 1 × 128 tokens.*\(.* to .*\)", out, re.MULTILINE)
    assert len(rows) == 2
