"""The machine: memory allocator, C++ compiler, device names, peak speed of GPUs."""

import ctypes
import os
import platform
import re
import shutil
import sys
from pathlib import Path

import torch

from SmolLm3 import ModelConfig

# bf16 TFLOP/s without sparsity, from data sheets; the first name that matches counts
PEAK_TFLOPS = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L4": 121}
PEAK_TFLOPS |= {"A10G": 70, "A10": 125, "RTX 4090": 165, "RTX 3090": 71}
M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1  # from glibc's malloc.h


def prepare_device(device: torch.device) -> None:
    """Prepares training: makes a GPU deterministic; on a Linux CPU, lets glibc reuse freed memory.

    By default glibc returns large tensors to the kernel, which clears the pages again: a quarter
    of the time of a step of 1 x 128 tokens. Other allocators stay as they are.
    """
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)  # slower, but the resume is bit-exact
        torch.utils.deterministic.fill_uninitialized_memory = False  # none is read
    elif sys.platform == "linux" and not os.environ.get("LD_PRELOAD"):
        if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
            mallopt(M_MMAP_MAX, 0)
            mallopt(M_TRIM_THRESHOLD, -1)


def find_cpp_compiler() -> str | None:
    """The path of a C++ compiler for `torch.compile`, or None."""
    names = (os.environ.get("CXX"), "g++", "clang++", "cl" if sys.platform == "win32" else None)
    return next((path for name in names if name and (path := shutil.which(name))), None)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether this is a CPU with instructions for products of bfloat16 matrices."""
    instructions = torch.cpu.get_capabilities()
    found = instructions.get("amx_bf16") or instructions.get("avx512_bf16")
    return device.type == "cpu" and bool(found)


def precision_hint(device: torch.device, precision: str, parameters: int) -> str | None:
    """What another `train.precision` would gain on this CPU, if it is much."""
    fast = has_fast_bf16(device)
    if precision == "float32" and fast and parameters > 50e6:  # small models become slower
        gain = "steps of 4 × 256 tokens about 1.5 times as fast"
        return f"Note: this CPU has bfloat16 instructions; train.precision=bfloat16 makes {gain}"
    if precision == "bfloat16" and device.type == "cpu" and not fast:
        slow = "train.precision=float32 is about 8 times as fast"
        return f"Warning: this CPU has no bfloat16 instructions: {slow}"
    return None


def flops_per_token(config: ModelConfig, length: int) -> int:
    """The operations to train on one token, in sequences of `length`: 6 N + 6 L T H D.

    N: parameters that are multiplied, with 2 operations forward and 4 backward. A tied embedding
    counts once, as the head; an untied one does not count. L: layers, with 12 T H D for scores,
    values (T: length; H D: query heads × size), halved by the causal mask (Chowdhery et al. 2022,
    arXiv:2204.02311, appendix B). Operations repeated by activation checkpointing do not count.
    """
    C, D = config.hidden_size, config.head_dim
    query_size, kv_size = config.num_attention_heads * D, config.num_key_value_heads * D
    layer = 2 * C * query_size + 2 * C * kv_size + 3 * C * config.intermediate_size + 2 * C
    matmul_parameters = config.vocab_size * C + config.num_hidden_layers * layer + C
    return 6 * matmul_parameters + 6 * config.num_hidden_layers * length * query_size


def peak_flops(device: torch.device) -> float | None:
    """The bf16 FLOP/s in a GPU's data sheet; None if it is not in `PEAK_TFLOPS`."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    matching = (tera for known, tera in PEAK_TFLOPS.items() if re.search(rf"\b{known}\b", name))
    return next((tera * 1e12 for tera in matching), None)


def peak_memory(device: torch.device) -> float | None:
    """The largest memory so far, in GB: of a GPU, or of this process. None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes per unit of `ru_maxrss`
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def describe_device(device: torch.device) -> str:
    """The name of the GPU; or of the CPU, with its instruction set and number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info, name = Path("/proc/cpuinfo"), platform.processor() or platform.machine()
    for line in info.read_text("utf-8", "replace").splitlines() if info.is_file() else ():
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
    kind, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    return f"{name} ({kind}), {threads} threads"
