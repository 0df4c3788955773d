"""The machine: its allocator, its C++ compiler, its names, and what a GPU can do at most."""

import ctypes
import os
import platform
import shutil
import sys
from pathlib import Path

import torch

from SmolLm3 import ModelConfig

# bf16 tensor cores, without sparsity, TFLOP/s, from data sheets; the first match counts
PEAKS = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L4": 121}
PEAKS |= {"A10G": 70, "A10": 125, "RTX 4090": 165, "RTX 3090": 71}
M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1  # of glibc's malloc.h


def prepare(device: torch.device) -> None:
    """For training: makes a GPU deterministic; on a CPU, lets glibc keep memory that is freed.

    By default the kernel maps each large tensor anew and clears its pages first: a quarter of the
    time of a step of 1 x 128 tokens. Other systems and allocators are left alone.
    """
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)  # the price of a bit-exact resume on a GPU
        torch.utils.deterministic.fill_uninitialized_memory = False  # we read none
    elif sys.platform == "linux" and not os.environ.get("LD_PRELOAD"):
        if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
            mallopt(M_MMAP_MAX, 0)
            mallopt(M_TRIM_THRESHOLD, -1)


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
    """bf16 FLOP/s of a GPU by its maker's data sheet; None if it is not in `PEAKS`."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tera * 1e12 for known, tera in PEAKS.items() if known in name), None)


def machine(device: torch.device) -> str:
    """The name of a GPU, or of the CPU with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info, name = Path("/proc/cpuinfo"), platform.processor() or platform.machine()
    for line in info.read_text().splitlines() if info.is_file() else ():
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
    kind, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    return f"{name} ({kind}), {threads} threads"
