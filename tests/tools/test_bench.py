"""What is measured is the same on both sides."""

import copy
import dataclasses
import re

import pytest
import torch

from workflow.tools import bench
from workflow.tools.bench import LOW, OURS, RECOMPUTED, THEIRS, Case, Row
from workflow.training import hardware


@pytest.fixture
def side(config, reference):
    """What a side's process times, here: how to call it once."""

    def make(case: Case, name: str, way: str = ""):
        fresh = dataclasses.replace(reference, model=copy.deepcopy(reference.model))
        return bench.WORKS[case.work](case, name, way, fresh, config)

    return make


def test_both_sides_are_called_in_turn():
    calls = []
    pairs = bench.interleaved(lambda: calls.append(1) or 1.0, lambda: calls.append(2) or 2.0, 3)
    assert calls == [1, 2] * 3
    assert pairs == ([1.0] * 3, [2.0] * 3)


def test_a_row_has_the_median_of_pairs_above_1_when_ours_is_faster():
    case = Case("training step", 2, 50)
    row = Row(case, [1.0, 2.0, 4.0], [2.0, 2.0, 5.0], (1.234, 2.0), ceiling=1.5)
    assert row.ratio == 1.25
    name = "training step, 2 × 50 tokens"
    assert str(row) == f"| {name} | 50.0 | 50.0 | 1.25 (1.00 to 2.00) | 75% | 1.23 | 2.00 |"
    assert str(Case("x", 1, 2, THEIRS, "compiled")) == "x, 1 × 2 tokens, transformers, compiled"


def test_both_sides_train_on_the_same_loss(side, monkeypatch):
    losses, original = [], torch.Tensor.backward
    monkeypatch.setattr(
        torch.Tensor, "backward", lambda self: (losses.append(self.item()), original(self))[1]
    )
    case = Case("training step", 2, 16)
    ours, recomputed = side(case, OURS), side(case, OURS, RECOMPUTED)
    theirs = side(case, THEIRS)
    for _ in range(3):
        ours(), recomputed(), theirs()
    assert losses[::3] == pytest.approx(losses[2::3], abs=1e-5)
    assert losses[::3] == losses[1::3]
    assert len(losses) == 9 and len(set(losses[::3])) == 3


def test_both_sides_generate_as_many_tokens(side, monkeypatch):
    case = Case("greedy generation", 2, 5)
    theirs = side(case, THEIRS)()[:, 16:]
    ours = torch.stack(side(case, OURS)(), dim=1)
    assert torch.equal(ours, theirs)
    assert len(side(case, OURS, LOW)()) == 5


def test_the_machine_at_its_best_is_a_product_and_a_read(config):
    ceiling = hardware.Ceiling(flops=1e9, bandwidth=1e9)
    model = config.member.architecture
    step = bench.at_best(Case("training step", 2, 16), config, ceiling)
    assert step == hardware.flops_per_token(model, 16) * 32 / 1e9
    read = bench.at_best(Case("greedy generation", 8, 10), config, ceiling)
    assert read == pytest.approx(26816 * 4 * 10 / 1e9)
    assert bench.at_best(Case("greedy generation", 1, 10, OURS, LOW), config, ceiling) == read / 2
    assert bench.at_best(Case("prefill", 1, 16), config, ceiling) < step / 6


@pytest.mark.slow
def test_the_report_is_a_table_with_machine_versions_and_date(here):
    code, out, err = here("bench", "--rounds", "2", "--only", "greedy generation, 1")
    assert code == 0, err
    assert re.search(r"\n20\d\d-\d\d-\d\d; .* threads; float32\ntorch 2\.", out)
    rows = re.findall(r"^\| greedy generation, 1 × 128 tokens.*%", out, re.MULTILINE)
    assert len(rows) == 2
    assert re.search(r"Loading the reference again: \d\.\d\d s, .* `import SmolLm3`: \d+ ms", out)
