"""Random states come back."""

import random

import numpy as np
import pytest
import torch

from workflow.training import randomness


def draws() -> list[float]:
    return [torch.rand(1).item(), np.random.random(), random.random(), np.random.standard_normal()]


def test_random_states_come_back():
    randomness.seed_random_states(5)
    np.random.standard_normal()  # it draws two and keeps one
    saved = randomness.random_states()
    first = draws()
    randomness.restore_random_states(saved)
    assert draws() == first
    assert set(saved) == set(randomness.SOURCES)


@pytest.mark.parametrize(("lost", "place"), [("torch", 0), ("numpy", 1), ("python", 2)])
def test_a_state_that_is_not_there_is_left_alone(lost, place):
    randomness.seed_random_states(5)
    saved = randomness.random_states()
    first = draws()
    randomness.restore_random_states({k: v for k, v in saved.items() if k != lost})
    assert [a != b for a, b in zip(draws()[:3], first[:3])] == [i == place for i in range(3)]


def test_a_seed_starts_all_of_them():
    for seed in (0, 2**32 - 1):
        randomness.seed_random_states(seed)
        first = draws()
        randomness.seed_random_states(seed)
        assert draws() == first


def test_states_of_gpus_are_passed_over_without_one():
    randomness.restore_random_states({**randomness.random_states(), "cuda": [torch.zeros(16)] * 3})
    here = randomness.environment(torch.device("cpu"))
    assert here["threads"] == torch.get_num_threads() and here["torch"] == torch.__version__
