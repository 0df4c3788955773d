"""Somebody else's model: right ones pass; for wrong ones, place and mistake are named."""

import ast
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import variants

from conftest import ROOT
from SmolLm3 import ModelConfig
from workflow import proof
from workflow.config import load_config
from workflow.proof import mistakes as m
from workflow.proof.diagnosis import FIXES, NOT_BY_STATE
from workflow.proof.names import match_names, suggest_names
from workflow.reference import load_reference

ATTENTION = "layers.0, inside self_attn, between v_proj and o_proj, from position"
MLP = "layers.0, inside mlp, between up_proj and down_proj, from position"
NORM = "layers.0, in input_layernorm, from position"
EXAMPLE = (ROOT / "docs" / "examples" / "wrong_model.py").read_text("utf-8")
MISTAKE = "torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)"
FIX = "torch.cat([-x[..., self.D // 2 :], x[..., : self.D // 2]], dim=-1)"


def variant(*changes: tuple[str, str]) -> str:
    """The source of the example with its mistake fixed, and more changes: (old text, new text)."""
    source = EXAMPLE
    for old, new in ((MISTAKE, FIX), *changes):
        assert old in source, old
        source = source.replace(old, new)
    return source


def before_the_norm(line: str) -> tuple[str, str]:
    """Adds a line to the model's `__init__`."""
    return "        self.norm = ", f"        {line}\n        self.norm = "


UNTIED = (
    before_the_norm('self.head = nn.Linear(C, config["vocab_size"], bias=False)'),
    ("self.wte.weight.T", "self.head.weight.T"),
    ("NAMES = {", 'NAMES = {"lm_head": "head", '),
)
TIED = (*UNTIED, before_the_norm("self.head.weight = self.wte.weight"))
OTHER_SUMS = (
    (
        "F.scaled_dot_product_attention(q, k, v, is_causal=True)",
        "(q @ k.mT / self.D**0.5 + torch.full((T, T), -torch.inf).triu(1)).softmax(dim=-1) @ v",
    ),
    ("torch.arange(x.shape[2])", "torch.arange(x.shape[2]) + 1"),  # a rotation cannot see that
    ("@ self.wte.weight.T", "@ self.wte.weight.T, None"),
)
IN_PLACE = ("x = x + self.attn(self.norm1(x))", "x += self.attn(self.norm1(x))")
CONV1D = """class Conv1D(nn.Linear):
    def __init__(self, inputs, outputs, bias):
        super().__init__(outputs, inputs, bias)

    def forward(self, x):
        return x @ self.weight


class MLP"""
TRANSPOSED = (
    ("self.qkv = nn.Linear", "self.qkv = Conv1D"),
    ("self.out = nn.Linear", "self.out = Conv1D"),
    ("class MLP", CONV1D),
    ('"qkv"', '("qkv", "transposed")'),
    ('"out"', '("out", "transposed")'),
)
FUSED = "from variants import NAMES, Fused as build"
RIGHT = {  # (source, words about the head)
    "fixed": (variant(), "the head has no tensor of its own"),
    "other sums, positions from 1, a tuple": (variant(*OTHER_SUMS), "no tensor of its own"),
    "tied head": (variant(*TIED), "the head is tied"),
    "untied head": (variant(*UNTIED), "the head is NOT tied"),
    "in place, without a gradient": (variant(IN_PLACE), "no tensor of its own"),
    "fused and transposed": (variant(*TRANSPOSED), "no tensor of its own"),
    "without modules": (FUSED, "no tensor of its own"),
}

ROTATION, CAUSAL = "q, k = self.rotate(q), self.rotate(k)", "is_causal=True"
TURNED = "q, k = (self.rotate(y.transpose(1, 2)).transpose(1, 2) for y in (q, k))"
GATE, UP, EPS = "self.gate_proj(x)", "self.up_proj(x)", 'config["rms_norm_eps"]'
CENTRED = """class Centred(nn.RMSNorm):
    def forward(self, x):
        return super().forward(x - x.mean(dim=-1, keepdim=True))


class MLP"""
WRONG = {  # where it shows first, and the changes of the example
    m.INTERLEAVED: (
        f"{ATTENTION} 1",
        (FIX, MISTAKE),
        ("torch.cat([angle, angle], dim=-1)", "angle.repeat_interleave(2, dim=-1)"),
    ),
    m.NEIGHBOURS: (f"{ATTENTION} 1", (FIX, MISTAKE)),
    m.OVER_HEADS: (f"{ATTENTION} 1", (ROTATION, TURNED)),
    m.THETA: (f"{ATTENTION} 1", ('config["rope_theta"]', "1e5")),
    m.NO_ROPE: (f"{ATTENTION} 1", (ROTATION, "")),
    m.UNSCALED: (f"{ATTENTION} 1", (CAUSAL, f"{CAUSAL}, scale=1.0")),
    m.SCALED_BY_ALL: (f"{ATTENTION} 1", (CAUSAL, f"{CAUSAL}, scale=(self.H * self.D) ** -0.5")),
    m.REPEAT: (
        f"{ATTENTION} 0",
        ("repeat_interleave(self.H // self.K, dim=1)", "repeat(1, self.H // self.K, 1, 1)"),
    ),
    m.NO_MASK: (f"{ATTENTION} 0", (CAUSAL, "is_causal=False")),
    m.ADDED_MASK: (f"{ATTENTION} 0", (CAUSAL, "attn_mask=torch.ones(T, T).tril()")),
    m.DROPOUT: (ATTENTION, (CAUSAL, f"{CAUSAL}, dropout_p=0.1")),  # another position each time
    m.EPS: (f"{NORM} 0", (EPS, "1e-6")),
    m.MEAN: (f"{NORM} 0", ("nn.RMSNorm", "Centred"), ("class MLP", CENTRED)),
    m.NORM_AFTER: (
        f"{NORM} 0",
        ("x + self.attn(self.norm1(x))", "self.norm1(x + self.attn(x))"),
        ("x + self.mlp(self.norm2(x))", "self.norm2(x + self.mlp(x))"),
    ),
    m.SILU: (f"{MLP} 0", (f"F.silu({GATE}) * {UP}", f"{GATE} * F.silu({UP})")),
    "unknown": (f"{NORM} 0", (EPS, "1e-2")),
}
SEVERAL = [(m.INTERLEAVED, m.OVER_HEADS, other) for other in (m.THETA, m.UNSCALED)]


@pytest.fixture
def candidate(tmp_path):
    """Writes a candidate's file next to variants.py."""
    shutil.copy(Path(variants.__file__), tmp_path)

    def write(source: str, name: str = "my_model.py") -> Path:
        (tmp_path / name).write_text(source, "utf-8")
        return tmp_path / name

    return write


@pytest.fixture
def judge(candidate, config):
    """Judges a source, by a random reference whose layers do much, so that mistakes show."""
    architecture = ModelConfig(**vars(config.model_entry.architecture) | {"initializer_range": 0.2})
    entry = config.model_entry.model_copy(update={"architecture": architecture})
    settings = config.proof.model_copy(update={"quick": True, "new_tokens": 4})

    def run(source: str, **update) -> proof.Verdict:
        file = source if isinstance(source, Path) else candidate(source)
        reference = load_reference("random", entry)
        return proof.judge(file, reference, settings.model_copy(update=update), "Some text. " * 300)

    return run


@pytest.mark.parametrize(("source", "head"), RIGHT.values(), ids=RIGHT)
def test_a_right_model_passes(source, head, judge, capsys):
    verdict = judge(source, quick=False)
    assert verdict.passed and verdict.mistake is None, str(verdict)
    assert "my_model.py: the original. " in str(verdict) and "no cache" in str(verdict)
    results = {check.name: check.passed for check in verdict.checks}
    assert list(results) == list(proof.BOUNDS)
    passed = "tensor values match", "logits match", "greedy tokens match"
    for name in (*passed, "batch matches single prompts"):
        assert results[name] is True
    assert results["gradients match"] is (None if "x +=" in source else True)
    assert results["logits match, 2048 tokens"] is True
    assert head in capsys.readouterr().out


@pytest.mark.parametrize("names", [*((name,) for name in WRONG), *SEVERAL], ids=" + ".join)
def test_a_mistake_is_found_and_named(names, judge):
    verdict = judge(variant(*(change for name in names for change in WRONG[name][1:])))
    assert "NOT the original" in str(verdict)
    assert str(verdict.difference).startswith(WRONG[names[0]][0])
    mistakes = tuple(name for name in names if name != "unknown")
    assert verdict.mistakes == mistakes
    skipped = {check.name: check.detail for check in verdict.checks if check.passed is None}
    for name in ("gradients match", "greedy tokens match"):  # they would show nothing new
        assert skipped[name] == "its logits differ already"
    assert verdict.only == (bool(mistakes) and mistakes != (m.DROPOUT,))
    assert ("No known mistake gives this state." in str(verdict)) == (not mistakes)


def test_a_mistake_is_named_by_the_logits_if_no_module_can_be_compared(judge):
    build = "build = lambda c: Fused({**c, 'rope_theta': 1e5})"
    verdict = judge(f"from variants import NAMES, Fused\n{build}")
    assert verdict.mistakes == (m.THETA,) and verdict.only
    assert str(verdict.difference).startswith("logits, after embed_tokens, from position 1 on")


@pytest.mark.parametrize("calls", range(3, 9))
def test_a_model_that_becomes_wrong_later_does_not_pass(calls, judge):
    lines = "n = 0", "def logits(model, ids):", "    global n", "    n, y = n + 1, model(ids)"
    source = "\n".join((variant(), *lines, f"    return y if n <= {calls} else y + y.flip(-1)"))
    assert not judge(source).passed


def test_a_model_that_is_wrong_only_in_a_batch_does_not_pass(judge):
    verdict = judge(f"{variant()}\ndef logits(model, ids): return model(ids).roll(1, 0)")
    (check,) = [check for check in verdict.checks if check.passed is False]
    assert check.name == "batch matches single prompts" and not verdict.passed
    assert check.detail.endswith("two without padding; it has no padding mask")


def test_a_model_of_single_texts_is_not_compared_in_a_batch(judge):
    lines = "def logits(model, ids):", "    assert len(ids) == 1", "    return model(ids)"
    verdict = judge("\n".join((variant(), *lines)))
    assert verdict.passed and "it accepts only one text at a time" in str(verdict)


@pytest.mark.parametrize("value", ["nan", "-inf"])
def test_nan_and_infinity_are_not_taken_for_dropout(value, judge):
    logits = f"def logits(model, ids):\n    return model(ids) + float('{value}')"
    verdict = judge(f"{variant()}\n{logits}")
    assert verdict.mistakes == () and verdict.difference.state == "logits"


def test_every_mutation_that_a_state_can_show_has_a_fix():
    assert set(FIXES) == set(m.MUTATIONS) - set(NOT_BY_STATE) | {m.DROPOUT}


# --- names ---


def test_what_does_not_fit_is_listed_and_a_names_is_suggested_but_not_used(candidate, here):
    buffer = before_the_norm('self.register_buffer("a_mask", torch.ones(4))')
    source = variant(*TIED, buffer) + "\ndel NAMES\nprint('from the file')"
    code, printed, error = here("verify", "--candidate", str(candidate(source)))
    assert code == 2 and f"{candidate(source)} is executed now" in printed
    assert "missing model.layers.N.self_attn.q_proj.weight (2 times)" in printed
    assert "extra blocks.N.attn.qkv.weight (2 times)" in printed and "1 buffers, a_mask" in printed
    *_, line = error.splitlines()
    assert "from the file" in error.splitlines() and "from the file" not in printed
    assert re.fullmatch(r"error: \S+my_model.py: the weights do not fit: 19 tensors .*; .*", line)
    suggested = re.search(r"NAMES = (\{.*\})", printed)[1]
    names = ast.literal_eval(suggested)
    assert names["layers"] == "blocks" and names["self_attn.o_proj"] == "attn.out"
    assert names["lm_head"] == "head"
    file = candidate(f"{source}\nNAMES = {suggested}")
    code, printed, _ = here("verify", "--quick", "--candidate", str(file))
    assert code == 0 and "my_model.py: the original." in printed


def test_a_names_is_suggested_by_equal_names_then_by_shapes():
    def tensors(stack: str, shapes: dict) -> dict:
        return {f"{stack}.0.mlp.{name}": torch.zeros(shape) for name, shape in shapes.items()}

    theirs = {"gate_proj.weight": (6, 4), "up_proj.weight": (6, 4), "down_proj.weight": (4, 6)}
    theirs = {"model.embed_tokens.weight": torch.zeros(9, 4)} | tensors("model.layers", theirs)
    embedding = {"embed_tokens.weight": torch.zeros(9, 4)}
    # a tensor of its own comes first in a module
    own = {"w": (6, 4), "gate_proj.weight": (6, 4), "up_proj.weight": (6, 4)}
    own = embedding | tensors("blocks", own)
    names = suggest_names(match_names(theirs, own, {}), theirs, own)
    assert names == {"layers": "blocks", "mlp.down_proj": ("mlp.w", "transposed")}
    own = embedding | tensors("blocks", {"gu.weight": (12, 4), "out.weight": (4, 6)})
    names = suggest_names(match_names(theirs, own, {}), theirs, own)
    fused = {("mlp.gate_proj", "mlp.up_proj"): "mlp.gu"}
    assert names == {"layers": "blocks", **fused, "mlp.down_proj": "mlp.out"}


T, Q = torch.zeros, "layers.0.self_attn.q_proj.weight"
S = {f"model.{Q}": torch.zeros(4, 6)}
S |= {"model.layers.0.self_attn.k_proj.weight": torch.zeros(2, 6)}


@pytest.mark.parametrize(
    ("names", "own", "problem"),
    [
        ({("q_proj", "k_proj"): "qk"}, {"model.layers.0.self_attn.qk.weight": T(6, 6)}, None),
        (
            {("q_proj", "k_proj"): "qk"},
            {"layers.0.self_attn.qk.weight": T(5, 6)},
            "layers.N.self_attn.qk.weight has shape (5, 6), model.layers.N.self_attn.q_proj.weight "
            "needs (6, 6)",
        ),
        ({"q_proj": ("q_proj", "transposed")}, {Q: T(4, 6)}, "needs (6, 4): the other way round"),
        ({"k_proj": "q_proj"}, {Q: T(4, 6)}, "are both in"),
        ({"mlp": "ff"}, {}, "no tensor has mlp, a key of NAMES"),
    ],
)
def test_names(names, own, problem):
    problems = match_names(S, own, names).problems
    assert not problems if problem is None else any(problem in line for line in problems)


# --- files that cannot be used ---

LOGITS = f"{variant()}\ndef logits(model, ids): return model(ids)"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("build = 1 / 0", r"my_model.py:1: the file raised ZeroDivisionError: .*"),
        ("\ndef build(:", r"my_model.py:2: the file raised SyntaxError: .*"),
        ("import sys\nsys.exit(0)", r"my_model.py:2: the file raised SystemExit: 0"),
        ("import variants", r"my_model.py: it has no function build\(config\)"),
        ("def build(c):\n  return c['x']", r"my_model.py:2: build\(config\) raised KeyError: 'x'"),
        ("build = lambda c: 1", r"my_model.py: build\(config\) raised TypeError: it returns int.*"),
        (variant() + "\nNAMES = {'a': 1}", r"my_model.py: NAMES\['a'\] is 1, not a name .*"),
        (f"{LOGITS}[:, -1]", r"my_model.py: the logits are \(1, 257\), not \(1, 16, 257\): .*"),
        (f"{LOGITS}.half()", r"my_model.py: the logits are torch.float16, not torch.float32; .*"),
        (
            f"{FUSED}\nlogits = lambda model, ids: model('no')",
            r"variants.py:\d+: the model raised TypeError: .*",
        ),
    ],
)
def test_an_error_of_the_candidate_is_one_line(source, message, candidate, refused):
    line = refused(2, "verify", "--candidate", str(candidate(source)))
    assert re.fullmatch(rf"error: \S*{message}; .*docs/how-to.md", line)


def test_its_modules_hide_ours_and_only_while_it_runs(judge, candidate, capsys):
    ours = sys.modules["SmolLm3"]
    candidate("from variants import Fused as Thing", "SmolLm3.py")
    source = "def build(config):\n    from SmolLm3 import Thing\n    print('building')\n"
    verdict = judge(source + "    return Thing(config)\nfrom variants import NAMES")
    assert verdict.passed and sys.modules["SmolLm3"] is ours and "variants" in sys.modules
    printed, errors = capsys.readouterr()
    assert errors == "building\n" and "building" not in printed
    assert str(candidate("")) not in sys.path


@pytest.mark.parametrize("factor", [1, 1.002])
def test_it_does_not_change_the_precision_of_the_original(factor, judge):
    lines = "import torch", "torch.set_float32_matmul_precision('medium')"
    logits = f"def logits(model, ids): return model(ids) * {factor}"
    verdict = judge("\n".join((variant(), *lines, logits)))
    assert verdict.passed == (factor == 1) and torch.get_float32_matmul_precision() == "highest"


def test_a_candidate_may_accept_few_tokens(judge):
    refuses = "\ndef logits(model, ids):\n    assert ids.shape[1] <= 300\n    return model(ids)"
    verdict = judge(variant() + refuses)
    assert verdict.passed and "19 prompts" in verdict.checks[-6].detail


# --- logits of another program, and the command ---


def test_logits_from_a_file_are_judged(here, tmp_path, project):
    inputs, outputs = tmp_path / "inputs.npz", tmp_path / "logits.npz"
    assert here("verify", "--write-inputs", str(inputs))[0] == 0
    config = load_config(ROOT / "SmolLm3_Config.yaml", "ci")
    model = load_reference("random", config.model_entry).model
    with torch.no_grad():
        logits = {name: model(torch.tensor(ids)).logits[0] for name, ids in np.load(inputs).items()}
    assert list(logits) == ["text", "greedy_prose", "greedy_code", "greedy_fact"]
    np.savez(outputs, **logits)
    code, printed, _ = here("verify", "--candidate-logits", str(outputs), "--json", "--quick")
    verdict = json.loads(printed)
    passed = {row["name"]: row["detail"] for row in verdict["checks"] if row["passed"]}
    assert (code, verdict["verdict"], verdict["mistake"]) == (0, "the original", None)
    assert passed["greedy tokens match"] == "3 prompts, 32 new tokens each"  # of 64 in the file
    assert "embeddings match" not in passed
    np.savez(outputs, text=logits["text"].roll(1, 0))
    code, printed, _ = here("verify", "--candidate-logits", str(outputs), "--json")
    verdict = json.loads(printed)
    assert (code, verdict["verdict"]) == (1, "not the original")
    assert verdict["first_difference"]["state"] == "logits"
    np.savez(outputs, text=logits["text"][1:])
    assert (
        "text has shape (299, 257), not (300, 257)"
        in here("verify", "--candidate-logits", str(outputs))[2]
    )
