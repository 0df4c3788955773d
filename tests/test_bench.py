"""What is measured is the same on both sides."""

import re

import pytest
import torch

from workflow import bench, weights_sha256


def test_both_sides_are_timed_in_turn_after_a_call_that_does_not_count():
    calls = []
    row = bench.interleaved("x", 10, lambda: calls.append("a"), lambda: calls.append("b"), 3)
    assert calls == ["a", "b"] * 4
    assert len(row.ours) == len(row.theirs) == 3


def test_the_ratio_is_the_median_of_pairs_and_above_1_when_ours_is_faster():
    row = bench.Row("x", 100, ours=[1.0, 2.0, 4.0], theirs=[2.0, 2.0, 5.0])
    assert row.ratio == 1.25
    assert str(row) == "| x | 50.0 | 50.0 | 1.25 (1.00 to 2.00) |"


def test_the_table_has_a_row_for_each_and_the_reference_stays_as_it_was(config, reference):
    before = weights_sha256(reference.state_dict)
    torch.manual_seed(0)
    row = bench.training_step(reference, config.train, 2, 16, rounds=2)
    assert row.tokens == 32
    assert weights_sha256(reference.state_dict) == before
    assert "training step, 2 × 16 tokens" in bench.table([row])
    assert re.search(r"\| \d+\.\d{2} \(", bench.table([bench.generation(reference, 4, 2)]))


def test_both_losses_are_equal(config, reference, monkeypatch):
    losses = []
    original = torch.Tensor.backward
    monkeypatch.setattr(
        torch.Tensor, "backward", lambda self: (losses.append(self.item()), original(self))[1]
    )
    bench.training_step(reference, config.train, 2, 16, rounds=3)
    assert losses[::2] == pytest.approx(losses[1::2], abs=1e-5)
    assert len(losses) == 8
