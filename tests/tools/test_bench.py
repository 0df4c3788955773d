"""What is measured is the same on both sides."""

import contextlib
import copy
import dataclasses
import re

import pytest
import torch

from workflow.tools import bench
from workflow.tools.bench import BF16, COMPILED, RECOMPUTED, THEIRS, Case


@pytest.fixture
def side(config, reference):
    """What the process of one side times, in this process."""

    def make(*case):
        fresh = dataclasses.replace(reference, model=copy.deepcopy(reference.model))
        return bench.WORKS[case[0]](Case(*case), fresh, config)

    return make


def test_both_sides_are_called_in_turn_and_a_row_has_the_median_of_pairs(config, monkeypatch):
    calls = []
    results = {
        RECOMPUTED: iter([1.0, 2.0, 4.0, 1.234]),
        THEIRS: iter([2.0, 2.0, 5.0, 2.0]),
    }

    @contextlib.contextmanager
    def started(case, config):
        yield lambda again: (calls.append((case.variant, again)), next(results[case.variant]))[1]

    monkeypatch.setattr(bench, "started", started)
    row = bench.measure(Case("training step", 2, 50, RECOMPUTED), config, 3)
    turn = [(RECOMPUTED, True), (THEIRS, True)]
    assert calls == turn * 3 + [(RECOMPUTED, False), (THEIRS, False)]
    name = "training step, 2 × 50 tokens, recomputed"
    assert row == f"| {name} | 50.0 | 50.0 | 1.25 (1.00 to 2.00) | 1.23 | 2.00 |"
    assert (
        str(Case("x", 1, 2, f"{THEIRS}, {COMPILED}")) == "x, 1 × 2 tokens, transformers, compiled"
    )


def test_both_sides_train_on_the_same_loss(side, monkeypatch):
    losses, original = [], torch.Tensor.backward
    monkeypatch.setattr(
        torch.Tensor, "backward", lambda self: (losses.append(self.item()), original(self))[1]
    )
    work = ("training step", 2, 16)
    ours, recomputed, theirs = side(*work), side(*work, RECOMPUTED), side(*work, THEIRS)
    for _ in range(3):
        ours(), recomputed(), theirs()
    assert losses[::3] == pytest.approx(losses[2::3], abs=1e-5)
    assert losses[::3] == losses[1::3]
    assert len(losses) == 9 and len(set(losses[::3])) == 3


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
