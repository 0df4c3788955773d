"""What is wrong with somebody else's model: where it first differs, and which mistake that is."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from SmolLm3 import LlamaModel
from workflow.analysis.states import INPUT, difference_by_position, record
from workflow.config import ProofSettings
from workflow.errors import ConfigError
from workflow.proof import mistakes as m
from workflow.proof.bounds import Check, checks_to_json, failed_checks
from workflow.proof.candidate import RecordedLogits, load_candidate, logit_inputs
from workflow.proof.checks import print_checks
from workflow.proof.compared import STATES, CheckedModel, Comparison, OurModel, load_copy
from workflow.reference import Reference

INSIDE = (  # the states inside a layer, in the order in which it computes
    "{}.input_layernorm",
    "{}.self_attn.q_proj",
    "{}.self_attn.k_proj",
    "{}.self_attn.v_proj",
    INPUT + "{}.self_attn.o_proj",
    "{}.self_attn.o_proj",
    INPUT + "{}.post_attention_layernorm",
    "{}.post_attention_layernorm",
    "{}.mlp.gate_proj",
    "{}.mlp.up_proj",
    INPUT + "{}.mlp.down_proj",
    "{}.mlp.down_proj",
)
ROTATIONS = ((m.INTERLEAVED, m.NEIGHBOURS), (m.OVER_HEADS,), (m.THETA,))
ATTENTION = (m.UNSCALED, m.SCALED_BY_ALL, m.REPEAT, m.NO_MASK, m.ADDED_MASK)
NOT_BY_STATE = (m.BASELINE, m.RANDOM_HEAD, m.DROPOUT, m.SHIFTED_TWICE)
FIXES = {
    m.INTERLEAVED: "rotate channels i and i + D/2, not 2i and 2i + 1",
    m.NEIGHBOURS: "rotate channels i and i + D/2",
    m.OVER_HEADS: "let positions run over tokens: rotate queries and keys of shape (B, H, T, D)",
    m.THETA: "take rope_theta from the config",
    m.NO_ROPE: "rotate queries and keys before their product",
    m.UNSCALED: "divide the scores by the square root of head_dim",
    m.SCALED_BY_ALL: "divide the scores by the square root of head_dim, of one head",
    m.REPEAT: "use repeat_interleave: neighbouring query heads share a key/value head",
    m.NO_MASK: "let position t see only positions up to t",
    m.ADDED_MASK: "add 0 and -infinity, or fill with -infinity where the mask is 0",
    m.EPS: "take rms_norm_eps from the config",
    m.MEAN: "divide by the root of the mean square; subtract nothing",
    m.NORM_AFTER: "x + attention(norm(x)), then x + mlp(norm(x))",
    m.SILU: "down_proj(silu(gate_proj(x)) * up_proj(x))",
    m.DROPOUT: "it differs from itself: switch dropout off, and keep no state between calls",
}


@dataclass(frozen=True)
class Difference:
    """The first state that differs from the original's. All numbers count from 0."""

    state: str  # the name of a module, `input of ` a module, or logits
    position: int
    after: str | None  # the last state before it that was compared: it is equal

    def __str__(self) -> str:
        return f"{self.place()}, from position {self.position} on"

    def place(self) -> str:
        """For example: layers.0, inside self_attn, between v_proj and o_proj."""
        (layer, parts), (after_layer, after) = split_name(self.state), split_name(self.after or "")
        if not layer:  # the end of a layer, or a module outside the layers
            known = after_layer == self.state or (self.state == "logits" and self.after)
            return f"{self.state}, after {'.'.join(after)}" if known else self.state
        where = f"{layer}, inside {parts[0]}" if len(parts) > 1 else layer
        if self.state.startswith(INPUT):
            last = after[-1] if after_layer == layer else "its start"
            return f"{where}, between {last} and {parts[-1]}"
        names = inside(layer)
        place = names.index(self.state)
        known = place == 0 or self.after == names[place - 1]
        return f"{where}, {'in' if known else 'up to'} {parts[-1]}"


@dataclass(frozen=True)
class Verdict:
    """The result for a candidate. It is the original if all checks that it answered passed."""

    name: str
    checks: list[Check]
    difference: Difference | None = None
    mistakes: tuple[str, ...] = ()  # names of mutations; together they give the different state
    only: bool = False  # with them, the original has the same logits, within rounding

    @property
    def passed(self) -> bool:
        return not failed_checks(self.checks)

    @property
    def mistake(self) -> str | None:
        return " + ".join(self.mistakes) or None

    @property
    def fix(self) -> str | None:
        return "; ".join(FIXES[name] for name in self.mistakes) or None

    def __str__(self) -> str:
        failed, skipped = failed_checks(self.checks), [c for c in self.checks if c.passed is None]
        reasons = ", ".join(dict.fromkeys(check.detail for check in skipped))
        answered = len(self.checks) - len(skipped)
        counts = f"{len(skipped)} skipped" + (f" ({reasons})" if skipped else "")
        if not failed:
            return f"Candidate {self.name}: the original. {answered} checks passed, {counts}."
        failed = f"{len(failed)} of {answered} checks failed"
        lines = [f"Candidate {self.name}: NOT the original. {failed}, {counts}."]
        other = "not in the states and logits of the first text, see the failed checks"
        lines.append(f"First difference: {self.difference or other}.")
        if self.mistakes:
            words = "mistake" if len(self.mistakes) == 1 else "mistakes"
            names = " and ".join(f'"{name}"' for name in self.mistakes)
            lines.append(f"Same as the known {words} {names}. Fix: {self.fix}.")
            more = "This is all: the original with it gives the same logits."
            lines.append(more if self.only else "Check again after the fix: there may be more.")
        elif self.difference:
            lines.append("No known mistake gives this state.")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        verdict = "the original" if self.passed else "not the original"
        first = self.difference and asdict(self.difference) | {"text": str(self.difference)}
        return {
            "candidate": self.name,
            "verdict": verdict,
            "mistake": self.mistake,
            "fix": self.fix,
            "first_difference": first,
            "checks": checks_to_json(self.checks),
        }


def judge(file: Path | str, reference: Reference, settings: ProofSettings, text: str) -> Verdict:
    """Runs all checks on a candidate, a Python file or logits in an .npz file; prints the verdict.

    text: for the long texts. Raises WorkflowError if the file cannot be used.
    """
    copy, file = load_copy(reference), Path(file)
    if not file.is_file() or file.suffix not in (".py", ".npz"):
        what = "this is not a .py or .npz file" if file.exists() else "there is no such file"
        raise ConfigError(file, what, "name your model's file")
    if file.suffix == ".npz":
        inputs = logit_inputs(reference, copy, settings)
        subject = RecordedLogits(file, inputs, reference.config.vocab_size)
    else:
        longest = 512 if settings.quick else 2048  # tokens that the checks need
        subject = load_candidate(file, reference, longest)
    comparison = Comparison(subject, reference, copy, settings, text)
    verdict = Verdict(str(file), print_checks(comparison))
    if not verdict.passed:
        verdict = replace(verdict, **diagnose(comparison))
    print(f"\n{verdict}")
    return verdict


@torch.no_grad()
def diagnose(c: Comparison) -> dict[str, Any]:
    """The first difference and the mistakes, as fields of a `Verdict`."""
    again = differs(c, "logits", *(c.subject.logits(c.ids) for _ in range(2))).any()
    found = first_difference(c, c.subject if again else c.original)
    if found is None:
        return {}
    difference, state = found
    mistakes = {"mistakes": (m.DROPOUT,)} if again else find_mistakes(c, difference, state)
    return {"difference": difference} | mistakes


def first_difference(c: Comparison, other: CheckedModel) -> tuple[Difference, Tensor] | None:
    """The first state of the candidate that is not that of `other`, and this state."""
    names = [name for end in c.names for name in (*inside(end), end)]
    ours, after = c.subject.states(c.ids, names), None
    theirs = other.states(c.ids, [name for name in names if name in ours])
    ours = {n: x for n, x in ours.items() if n in theirs and x.shape == theirs[n].shape}
    for end in (*c.names, "logits"):
        # a layer whose end is equal is right; inside, its modules may have other borders
        right = end in ours and not differs(c, end, ours[end], theirs[end]).any()
        for name in (end,) if right else (*inside(end), end):
            if name in ours:
                wrong = differs(c, name, ours[name], theirs[name])[0].any(dim=-1)  # (T,)
                if wrong.any():
                    return Difference(name, int(wrong.nonzero()[0]), after), ours[name]
                after = name
    return None


def differs(c: Comparison, name: str, ours: Tensor, theirs: Tensor) -> Tensor:
    """Where two states differ by more than rounding."""
    if name == "logits":
        wrong = ~((ours - theirs).abs() <= c.limits["logits match"])
    else:
        wrong = difference_by_position(ours, theirs) > c.limits[STATES[0]]
    # a state with NaN or infinity equals itself
    return wrong & (ours != theirs) & ~(ours.isnan() & theirs.isnan())


def find_mistakes(c: Comparison, difference: Difference, state: Tensor) -> dict[str, Any]:
    """The mutations that give this state in our model, and whether they explain the logits."""
    for names in combinations(c.copy, difference):
        mutated = mutated_state(c.copy, names, c.ids, difference.state)
        if not differs(c, difference.state, state, mutated).any():
            logits = c.subject.logits(c.ids), mutated_state(c.copy, names, c.ids, "logits")
            return {"mistakes": names, "only": not differs(c, "logits", *logits).any()}
    return {}


def combinations(model: LlamaModel, difference: Difference) -> list[tuple[str, ...]]:
    """Single mutations, then rotation mistakes together: real attempts have three at once.

    If it costs only one layer, also with another mistake of attention.
    """
    layer = split_name(difference.state)[0] or difference.state
    if difference.after not in (None, "embed_tokens") and not layer.startswith("layers."):
        return []  # the layers are right; every known mistake is in them
    single = [name for name in m.mutations_of(model) if name not in NOT_BY_STATE]
    options = product(*((None, *names) for names in ROTATIONS))
    rotations = [tuple(name for name in names if name) for names in options]
    found = [*((name,) for name in single), *(names for names in rotations if len(names) > 1)]
    if layer == "layers.0":
        others = [name for name in ATTENTION if name in single]
        found += [(*names, other) for names in (*rotations[1:], (m.NO_ROPE,)) for other in others]
    return found


def mutated_state(model: LlamaModel, names: Sequence[str], ids: Tensor, state: str) -> Tensor:
    """A state of our model with these mutations; later layers do not run."""
    layer = split_name(state)[0] or state
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(m.MUTATIONS[name](model))
        if state == "logits":
            return model(ids)
        if layer.startswith("layers."):
            needed = list(model.layers.named_children())[: int(layer.split(".")[1]) + 1]
            stack.enter_context(patch.object(model.layers, "_modules", dict(needed)))
        return record(OurModel(model).modules([state]), lambda: model.hidden(ids))[1][state]


def inside(layer: str) -> list[str]:
    """The states inside layers.0 …; none for other modules."""
    return [name.format(layer) for name in INSIDE if layer.startswith("layers.")]


def split_name(state: str) -> tuple[str, list[str]]:
    """("layers.0", ["mlp", "up_proj"]) for layers.0.mlp.up_proj, also for `input of …`.

    The layer is empty for a whole layer, and for a module outside the layers.
    """
    parts = state.removeprefix(INPUT).split(".")
    inner = parts[0] == "layers" and len(parts) > 2
    return (".".join(parts[:2]), parts[2:]) if inner else ("", parts)
