"""Batches: each token once an epoch, targets one token on, and always the same for a step."""

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workflow.data.batches import batch_at, validation_batches

sizes = {
    "total": st.integers(2, 400),
    "length": st.integers(1, 30),
    "batch": st.integers(1, 5),
    "seed": st.integers(0, 2**32 - 1),
}


@settings(max_examples=200, deadline=None)
@given(**sizes)
def test_each_sequence_is_an_input_once_an_epoch(total, length, batch, seed):
    """Over so many epochs that they end with a sequence, and within each."""
    epochs = length // math.gcd(total, length)
    count = epochs * total // length
    tokens = np.arange(total)  # a token's value is its position
    rows = [
        batch_at(tokens, step, batch, length, seed)[0][:, 0] for step in range(-(-count // batch))
    ]
    seen = torch.cat(rows)[:count].tolist()
    numbers = range(count)
    for epoch in range(epochs):
        starts = [n * length for n in numbers if n * length // total == epoch]
        drawn = [seen[n] for n in numbers if n * length // total == epoch]
        assert sorted(drawn) == [start % total for start in starts]


@settings(max_examples=200, deadline=None)
@given(**sizes, step=st.integers(0, 10**6))
def test_targets_are_the_next_tokens_across_every_boundary(total, length, batch, seed, step):
    tokens = np.arange(total)  # a token's value is its position
    inputs, targets = batch_at(tokens, step, batch, length, seed)
    assert inputs.shape == targets.shape == (batch, length)
    assert torch.equal(targets, (inputs + 1) % total)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_an_epoch_of_whole_sequences_has_every_token_exactly_once():
    tokens = np.arange(960)
    for epoch in range(3):
        steps = range(epoch * 30, (epoch + 1) * 30)
        seen = torch.cat([batch_at(tokens, step, 2, 16, seed=1)[0].flatten() for step in steps])
        assert sorted(seen.tolist()) == list(range(960))


def test_a_batch_is_a_pure_function_of_seed_and_step():
    tokens = np.arange(1000)
    forward = [batch_at(tokens, step, 2, 16, seed=1)[0] for step in range(80)]
    backward = [batch_at(tokens, step, 2, 16, seed=1)[0] for step in reversed(range(80))]
    assert all(torch.equal(a, b) for a, b in zip(forward, reversed(backward), strict=True))
    assert not torch.equal(batch_at(tokens, 0, 2, 16, seed=2)[0], forward[0])
    # another size of batch cuts the same order of sequences
    assert torch.equal(batch_at(tokens, 0, 4, 16, seed=1)[0], torch.cat(forward[:2]))


def test_validation_covers_the_held_out_tokens_in_order_without_padding():
    batches = list(validation_batches(np.arange(100), 1000, 4, 16))
    inputs = torch.cat([inputs for inputs, _ in batches])
    assert inputs.flatten().tolist() == list(range(96))
    assert all(torch.equal(targets, inputs + 1) for inputs, targets in batches)
    assert len(list(validation_batches(np.arange(100), 32, 1, 16))) == 2


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((5003, 4, 16, 0), ["c2800ca061f34b24", "50faacbd1fa10c13", "32de880a5321d5ac"]),
        ((5003, 3, 17, 1234), ["21803d94e8d77599", "69cba24323cea936", "7fd0a73dae499092"]),
        ((40, 5, 16, 7), ["76ab5172d4c4f3ce", "3e26aa95e2de84e3", "e900b8b4a1837497"]),
        ((10, 3, 25, 9), ["3ca6b8f06ee6582b", "3ca6b8f06ee6582b", "3ca6b8f06ee6582b"]),
    ],
)
def test_the_batches_of_earlier_versions_stay_the_same(shape, expected):
    """So that a run that began with one resumes; a batch may touch several epochs."""
    total, batch, length, seed = shape
    tokens = (np.arange(total) * 7919 % 4999).astype(np.uint16)
    for step, digest in zip((0, 78, 5000), expected, strict=True):
        rows = batch_at(tokens, step, batch, length, seed)
        assert hashlib.sha256(b"".join(row.numpy() for row in rows)).hexdigest()[:16] == digest
