"""What the machine can do, and how it is asked to: allocator, compiler, its best figures."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from SmolLm3 import ModelConfig

# bf16 tensor-core peak without sparsity, TFLOP/s, from the makers' data sheets; the first match
# counts
PEAKS = {
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "A10G": 70,
    "A10": 125,
    "RTX 4090": 165,
    "RTX 3090": 71,
}
M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1  # of glibc's malloc.h


def prepare(device: torch.device) -> None:
    """For training: on a CPU memory is kept, on a GPU the same sums are made in the same order."""
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)  # the price of a bit-exact resume on a GPU
        torch.utils.deterministic.fill_uninitialized_memory = False  # we read none


def keep_freed_memory() -> bool:
    """Lets glibc keep what a step frees for the next step; whether it does.

    By default each large tensor is mapped anew from the kernel, which must clear its pages first: a
    quarter of the time of a training step of 1 x 128 tokens on a CPU. On other systems than Linux
    with glibc, or under another allocator, nothing is done.
    """
    if sys.platform != "linux" or os.environ.get("LD_PRELOAD"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))


def compiler() -> str | None:
    """The C++ compiler that `torch.compile` needs, if there is one."""
    names = (os.environ.get("CXX"), "g++", "clang++", "cl" if sys.platform == "win32" else None)
    return next((path for name in names if name and (path := shutil.which(name))), None)


def flops_per_token(config: ModelConfig, length: int) -> int:
    """Floating-point operations of training on one token, in sequences of `length`: 6 N + 6 L T C.

    Each of the N parameters that are multiplied (a tied embedding once, as the head; an untied one
    not at all) costs 2 forward and 4 backward; each of L layers 12 T C for the scores and the
    values (T length, C heads x head size), halved because a token sees only those before it
    (Chowdhery et al. 2022, arXiv:2204.02311, appendix B). Recomputed ones do not count.
    """
    C, D = config.hidden_size, config.head_dim
    wide, narrow = config.num_attention_heads * D, config.num_key_value_heads * D
    layer = 2 * C * wide + 2 * C * narrow + 3 * C * config.intermediate_size + 2 * C
    multiplied = config.vocab_size * C + config.num_hidden_layers * layer + C
    return 6 * multiplied + 6 * config.num_hidden_layers * length * wide


def peak_flops(device: torch.device) -> float | None:
    """bf16 FLOP/s of a GPU by its maker's data sheet; None where it is not in `PEAKS`."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tera * 1e12 for known, tera in PEAKS.items() if known in name), None)


@dataclass(frozen=True)
class Ceiling:
    """What the machine does at best: products in FLOP/s, reading in bytes/s."""

    flops: float
    bandwidth: float

    @classmethod
    def of(cls, device: torch.device, precision: torch.dtype) -> Ceiling:
        size = 8192 if device.type == "cuda" else 2048
        square = torch.randn(size, size, device=device).to(precision)
        large = torch.ones(250_000_000, device=device)  # 1 GB
        product = fastest(lambda: square @ square, device)
        return cls(2 * size**3 / product, large.nbytes / fastest(large.sum, device))

    def __str__(self) -> str:
        products, reading = f"{self.flops / 1e9:.0f} GFLOP/s", f"{self.bandwidth / 1e9:.0f} GB/s"
        return f"the machine at its best: {products} in matrix products, {reading} read from memory"


def fastest(call: Callable[[], Any], device: torch.device, rounds: int = 20) -> float:
    """Seconds of the fastest of some calls."""
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times)


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def cpu_name() -> str:
    """As Linux calls it; elsewhere, what Python knows."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    kind = torch.backends.cpu.get_cpu_capability()
    return f"{names[0] if names else platform.processor() or platform.machine()} ({kind})"
