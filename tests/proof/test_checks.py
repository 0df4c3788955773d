"""All checks pass for the copy; a changed model fails, and the check says where."""

import json
import math
import re

import pytest
import torch

from conftest import ROOT
from SmolLm3 import ModelConfig
from workflow import proof
from workflow.analysis import states
from workflow.config import load_config
from workflow.files import weights_sha256
from workflow.proof import BOUNDS, Check, checks_to_json, copy_reference, failed_checks
from workflow.proof.bounds import max_check
from workflow.proof.checks import config_check, run_checks
from workflow.proof.compared import Comparison, OurModel

TEXT = "Once upon a time, 12 trees stood in a row.\n" * 30
INF, NAN = math.inf, math.nan


def quick_checks(model, reference, config) -> dict[str, Check]:
    settings = config.proof.model_copy(update={"quick": True, "new_tokens": 4})
    comparison = Comparison(OurModel(model), reference, model, settings, TEXT)
    return {check.name: check for check in run_checks(comparison)}


def test_all_checks_pass_for_the_copy_and_leave_the_reference_unchanged(
    config, wide_reference, capsys
):
    before = wide_reference.provenance.weights_sha256
    checks = proof.verify(copy_reference(wide_reference), wide_reference, config.proof, TEXT)
    assert [check.name for check in checks] == list(BOUNDS)
    assert failed_checks(checks) == []
    assert [check.name for check in checks if check.passed is None] == list(BOUNDS)[:4]
    assert {check.name: check.value for check in checks}["logits match"] == 0.0
    printed = capsys.readouterr().out
    assert "Model loaded. Total params: 26816\nHF model params: 26816\n" in printed
    assert "Missing keys: [], extra keys: []" in printed
    assert re.search(r"\n23 of 27 checks passed, 4 skipped, in \d+ s\n$", printed)
    model = wide_reference.model
    assert weights_sha256(dict(model.named_parameters())) == before
    assert model.config._attn_implementation == "sdpa"
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_one_changed_weight_is_found_and_named(config, wide_reference):
    model = copy_reference(wide_reference)
    with torch.no_grad():
        model.layers[1].self_attn.v_proj.weight[3, 5] += 1e-2
    checks = quick_checks(model, wide_reference, config)
    assert list(checks) == list(BOUNDS)[: list(BOUNDS).index("logits match, 2048 tokens")]
    assert checks["tensor values match"].value == 1
    assert checks["tensor values match"].detail == "model.layers.1.self_attn.v_proj.weight"
    layers = checks["hidden states match, layer by layer"]
    assert layers.first_failure == "layers.1"
    assert layers.detail.startswith("first above the bound: layers.1, ")
    assert layers.parts["layers.0"] == 0.0
    assert checks["gradients match"].passed is False


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("batch matches single prompts", lambda ids, cache: len(ids) == 2),
        ("logits match with and without cache", lambda ids, cache: cache and cache.length > 64),
        ("gradients match", None),
    ],
)
def test_a_mistake_in_batches_in_the_cache_or_in_training_is_found(
    config, wide_reference, monkeypatch, name, wrong
):
    model = copy_reference(wide_reference)
    hidden = model.hidden

    def wrong_hidden(ids, **options):
        is_wrong = wrong(ids, options.get("cache")) if wrong else model.training
        return hidden(ids, **options) * (1.01 if is_wrong else 1)

    monkeypatch.setattr(model, "hidden", wrong_hidden)
    assert failed_checks(quick_checks(model, wide_reference, config).values()) == [name]


def test_a_wrong_greedy_token_is_named(config, wide_reference, monkeypatch):
    model = copy_reference(wide_reference)
    generate = model.generate

    def with_a_wrong_last_token(batch, *arguments, **options):
        tokens = generate(batch, *arguments, **options)
        tokens[0, -1] = (tokens[0, -1] + 1) % 257
        return tokens

    monkeypatch.setattr(model, "generate", with_a_wrong_last_token)
    check = quick_checks(model, wide_reference, config)["greedy tokens match"]
    assert check.value == 2  # one in each of the two batches
    words = r"first: prose, token 4, where transformers' best two logits differ by \d\.\d\de"
    assert re.match(words, check.detail)


def test_a_wrong_config_is_named(wide_reference):
    model = copy_reference(wide_reference)
    model.config = ModelConfig(**{**vars(model.config), "rope_theta": 777.0})
    check = next(config_check(OurModel(model), wide_reference))
    assert check.value == 1 and "rope_theta 777.0 is not 10000.0" in check.detail


# --- results ---


@pytest.mark.parametrize(
    ("check", "passed", "value", "line"),
    [
        (Check("logits match", 1e-5), True, 1e-5, "1.00e-05  <= 0.0001  passed"),
        (Check("loss matches", 0.5, "too far"), False, 0.5, "FAILED   too far"),
        (Check("argmax agrees with llama.cpp", None, "no file"), None, None, "skipped  no file"),
        (Check("argmax agrees with llama.cpp", 0.94), False, 0.94, ">= 0.95"),
        (Check("logits match", NAN), False, "nan", "nan"),
        (max_check("logits match", {"b": 2e-4, "c": 3e-4}), False, 3e-4, "bound: b, 2.00e-04;"),
    ],
)
def test_a_result_as_value_line_and_json(check, passed, value, line):
    assert check.passed is passed
    assert line in " ".join(str(check).split("\n" + " " * 69))
    (row,) = json.loads(json.dumps(checks_to_json([check]), allow_nan=False))
    assert (row["passed"], row["value"], row["bound"]) == (passed, value, BOUNDS[check.name][1])


# --- differences ---

ONE, LOGITS = torch.ones(1, 2), torch.tensor([[[0.0, math.log(3)]]])


@pytest.mark.parametrize(
    ("difference", "ours", "theirs", "expected"),
    [
        (states.max_difference, ONE, torch.ones(3), INF),  # another shape
        (states.relative_difference, ONE * 3, ONE * 2, 0.5),
        (states.relative_difference, ONE * 0, ONE * 0, 0.0),
        (states.relative_difference_by_position, ONE * NAN, ONE, INF),
        # huge values at one position do not hide an error at another one
        (
            states.relative_difference_by_position,
            torch.tensor([[[2e4, 1.0], [1.5, 2.0], [0.0, 0.0]]]),
            torch.tensor([[[2e4, 1.0], [1.0, 2.0], [0.0, 0.0]]]),
            0.25,
        ),
        # probabilities 3/4 and 1/4 instead of 1/4 and 3/4
        (states.kl_divergence, -LOGITS, LOGITS, math.log(3) / 2),
    ],
)
def test_differences(difference, ours, theirs, expected):
    assert difference(ours, theirs) == pytest.approx(expected, abs=1e-6)


def test_a_bf16_copy_of_transformers_has_exact_angles(reference):
    rounded, angles = states.in_bf16(reference.model), reference.model.model.rotary_emb.inv_freq
    assert rounded.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(rounded.model.rotary_emb.inv_freq, angles)
    assert reference.model.lm_head.weight.dtype == torch.float32


# --- the real weights ---


@pytest.mark.slow
def test_the_real_weights_pass_the_quick_checks(smollm2):
    config = load_config(ROOT / "SmolLm3_Config.yaml", "quick")
    text = (ROOT / "input.txt").read_text("utf-8")
    checks = proof.verify(copy_reference(smollm2), smollm2, config.proof, text)
    assert failed_checks(checks) == []
    by_name = {check.name: check for check in checks}
    skipped = [name for name, check in by_name.items() if check.passed is None]
    assert skipped == ["perplexity matches the stored value"]
    assert by_name["parameter counts match"].detail == "134515008 parameters"
    assert len(by_name["gradients match"].parts) == 272
