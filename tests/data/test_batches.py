"""Batches: each token once per epoch, targets shifted by one token, the same batch for a step."""

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
def test_each_sequence_is_an_input_once_per_epoch(total, length, batch, seed):
    """For as many epochs as it takes until an epoch ends together with a sequence."""
    epochs = length // math.gcd(total, length)
    count = epochs * total // length
    tokens = np.arange(total)  # a token's value is its position
    steps = range(-(-count // batch))
    rows = [batch_at(tokens, step, batch, length, seed)[0][:, 0] for step in steps]
    starts = torch.cat(rows)[:count].tolist()
    for epoch in range(epochs):
        sequences = [n for n in range(count) if n * length // total == epoch]
        assert sorted(starts[n] for n in sequences) == sorted(n * length % total for n in sequences)


@settings(max_examples=200, deadline=None)
@given(**sizes, step=st.integers(0, 10**6))
def test_targets_are_the_next_tokens(total, length, batch, seed, step):
    tokens = np.arange(total)  # a token's value is its position
    inputs, targets = batch_at(tokens, step, batch, length, seed)
    assert inputs.shape == targets.shape == (batch, length)
    assert torch.equal(targets, (inputs + 1) % total)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_validation_reads_the_held_out_tokens_in_order_without_padding():
    batches = list(validation_batches(np.arange(100), 1000, 4, 16))
    inputs = torch.cat([inputs for inputs, _ in batches])
    assert inputs.flatten().tolist() == list(range(96))
    assert all(torch.equal(targets, inputs + 1) for inputs, targets in batches)
    assert len(list(validation_batches(np.arange(100), 32, 1, 16))) == 2


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((5003, 4, 16, 0), ["c2800ca061f34b24", "50faacbd1fa10c13", "32de880a5321d5ac"]),
        ((40, 5, 16, 7), ["76ab5172d4c4f3ce", "3e26aa95e2de84e3", "e900b8b4a1837497"]),
    ],
)
def test_batches_are_the_same_as_in_earlier_versions(shape, expected):
    """Old runs can then be resumed. In the small text, a batch spans several epochs."""
    total, batch, length, seed = shape
    tokens = (np.arange(total) * 7919 % 4999).astype(np.uint16)
    for step, digest in zip((0, 78, 5000), expected, strict=True):
        rows = batch_at(tokens, step, batch, length, seed)
        assert hashlib.sha256(b"".join(row.numpy() for row in rows)).hexdigest()[:16] == digest
