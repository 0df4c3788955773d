"""What is measured is the same on both sides."""

import contextlib
import copy
import dataclasses
import re

import pytest
import torch

from workflow.tools import bench
from workflow.tools.bench import BF16, COMPILED, THEIRS, Case


@pytest.fixture
def side(config, reference):
    """What the process of one side times, in this process."""

    def make(*case):
        fresh = dataclasses.replace(reference, model=copy.deepcopy(reference.model))
        return bench.WORKS[case[0]](Case(*case), fresh, config)

    return make


def test_both_sides_are_called_in_turn_and_a_row_has_the_median_of_pairs(config, monkeypatch):
    calls = []
    results = {BF16: iter([1.0, 2.0, 4.0, 1.234]), THEIRS: iter([2.0, 2.0, 5.0, 2.0])}

    @contextlib.contextmanager
    def started(case, config):
        yield lambda again: (calls.append((case.variant, again)), next(results[case.variant]))[1]

    monkeypatch.setattr(bench, "started", started)
    row = bench.measure(Case("greedy generation", 2, 50, BF16), config, 3)
    turn = [(BF16, True), (THEIRS, True)]
    assert calls == turn * 3 + [(BF16, False), (THEIRS, False)]
    name = "greedy generation, 2 × 50 tokens, bfloat16 weights"
    assert row == f"| {name} | 50.0 | 50.0 | 1.25 (1.00 to 2.00) | 1.23 | 2.00 |"
    case = Case("x", 1, 2, f"{THEIRS}, {COMPILED}")
    assert str(case) == "x, 1 × 2 tokens, transformers, compiled"


def test_both_sides_train_on_the_same_loss(side, monkeypatch):
    losses, original = [], torch.Tensor.backward
    monkeypatch.setattr(
        torch.Tensor, "backward", lambda self: (losses.append(self.item()), original(self))[1]
    )
    work = ("training step", 2, 16)
    ours, theirs = side(*work), side(*work, THEIRS)
    for _ in range(3):
        ours(), theirs()
    assert losses[::2] == pytest.approx(losses[1::2], abs=1e-5)
    assert len(losses) == 6 and len(set(losses[::2])) == 3


def test_both_sides_generate_the_same_tokens(side):
    work = ("greedy generation", 2, 5)
    theirs = side(*work, THEIRS)()[:, 16:]
    ours = torch.stack(side(*work)(), dim=1)
    assert torch.equal(ours, theirs)
    assert len(side(*work, BF16)()) == 5


@pytest.mark.slow
def test_the_report_is_a_table_with_machine_versions_and_date(here):
    code, out, err = here("bench", "--rounds", "2", "--only", "greedy generation, 1")
    assert code == 0, err
    assert re.search(r"\n20\d\d-\d\d-\d\d; .* threads; float32\ntorch 2\.", out)
    rows = re.findall(r"^\| greedy generation, 1 × 128 tokens.*\(.* to .*\)", out, re.MULTILINE)
    assert len(rows) == 2
