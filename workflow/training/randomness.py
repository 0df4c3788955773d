"""The random states of a process, and what else bit-exact resume depends on."""

from __future__ import annotations

import platform
import random
from typing import Any

import numpy as np
import torch

from workflow.training import distributed

SOURCES = ("torch", "cuda", "numpy", "python")


def random_states() -> dict[str, Any]:
    """Every random state of the process, as tensors and tuples that `weights_only=True` reads."""
    kind, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (str(kind), torch.from_numpy(keys.astype(np.int64)), *map(float, rest)),
        "python": random.getstate(),
    }


def seed_random_states(seed: int) -> None:
    """Starts every random state of the process from `seed`, so that two runs start alike."""
    torch.manual_seed(seed)  # seeds the GPUs too
    np.random.seed(seed)
    random.seed(seed)


def restore_random_states(states: dict[str, Any]) -> None:
    """The inverse, of those that are there; other machines' GPUs are passed over."""
    if "python" in states:
        random.setstate(states["python"])
    if "torch" in states:
        torch.set_rng_state(states["torch"])
    if "numpy" in states:
        kind, keys, position, has_gauss, gauss = states["numpy"]
        keys = keys.numpy().astype(np.uint32)
        np.random.set_state((kind, keys, int(position), int(has_gauss), gauss))
    if len(states.get("cuda", [])) == torch.cuda.device_count() > 0:
        torch.cuda.set_rng_state_all(states["cuda"])


def environment(device: torch.device) -> dict[str, Any]:
    """Where a checkpoint is written: bit-exact resume is promised only where all this is equal."""
    gpu = device.type == "cuda"
    return {
        "torch": str(torch.__version__),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name(device) if gpu else platform.machine(),
        "threads": torch.get_num_threads(),
        "processes": distributed.count(),
    }
