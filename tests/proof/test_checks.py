"""The ladder holds for the copy, and for no broken one."""

import json
import re

import pytest
import torch

import SmolLm3
from conftest import ROOT
from workflow.analysis import states as comparison
from workflow.config.load import load_config
from workflow.files import weights_sha256
from workflow.proof import checks as proof
from workflow.proof import mutations as breaking
from workflow.proof.bounds import BOUNDS, Check, as_json, failed, worst
from workflow.reference.load import load_reference

TEXT = "Once upon a time, 12 trees stood in a row.\n" * 30


@pytest.fixture
def lively(config):
    """A random reference whose layers matter: with the tiny initial std they hardly do."""
    architecture = config.member.architecture
    wide = SmolLm3.ModelConfig(**{**vars(architecture), "initializer_range": 0.3})
    return load_reference("random", config.member.model_copy(update={"architecture": wide}))


def climb(model, reference, config) -> list[Check]:
    return list(proof.climb(model, reference, config.proof, TEXT))


def test_the_copy_is_the_original(config, lively, capsys):
    rungs = proof.verify(proof.copy_reference(lively), lively, config.proof, TEXT)
    assert [rung.name for rung in rungs] == list(BOUNDS)
    assert failed(rungs) == []
    assert [rung.name for rung in rungs if rung.holds is None] == list(BOUNDS)[:4]
    assert {rung.name: rung.figure for rung in rungs}["logits"] == 0.0
    printed = capsys.readouterr().out
    assert "Model loaded. Total params: 26816\nHF model params: 26816\n" in printed
    assert "Missing keys: [], extra keys: []" in printed
    assert len(re.findall(r" holds\b", printed)) == len(BOUNDS) - 4 and "FAILS" not in printed


def test_quick_leaves_out_long_texts_and_few_bits(config, lively):
    quick = config.model_copy(update={"proof": config.proof.model_copy(update={"quick": True})})
    names = [rung.name for rung in climb(proof.copy_reference(lively), lively, quick)]
    assert names == list(BOUNDS)[: list(BOUNDS).index("logits, 2048 tokens")]


@pytest.mark.parametrize("name", [name for name in breaking.MISTAKES if name != breaking.TRUTH])
def test_no_broken_model_passes(config, lively, name):
    model = proof.copy_reference(lively)
    with breaking.MISTAKES[name](model):
        assert failed(climb(model, lively, config)) != []


def test_one_changed_weight_is_found_and_named(config, lively):
    model = proof.copy_reference(lively)
    with torch.no_grad():
        model.layers[1].self_attn.v_proj.weight[3, 5] += 1e-2
    rungs = {rung.name: rung for rung in climb(model, lively, config)}
    assert rungs["tensors that differ"].figure == 1
    assert rungs["tensors that differ"].detail == "model.layers.1.self_attn.v_proj.weight"
    states = rungs["hidden state after each layer"]
    assert states.first == "layers.1" and states.detail.startswith("first: layers.1, by ")
    assert states.parts["layers.0"] == 0.0
    assert rungs["gradient of each parameter"].holds is False


def test_a_greedy_token_that_differs_is_told_with_the_references_doubt(config, lively, monkeypatch):
    theirs = proof.generate_theirs

    def one_other(*arguments):
        tokens = theirs(*arguments)
        tokens[0, 2] = (tokens[0, 2] + 1) % 257
        return tokens

    monkeypatch.setattr(proof, "generate_theirs", one_other)
    rungs = {rung.name: rung for rung in climb(proof.copy_reference(lively), lively, config)}
    told = rungs["greedy tokens that differ"]
    assert told.figure == 2  # once in the batch, once in the long prompt
    assert told.detail.startswith("first: prose, token 3, where transformers' best two are ")


def test_a_logit_that_is_no_number_fails(config, lively):
    model = proof.copy_reference(lively)
    with torch.no_grad():
        model.embed_tokens.weight[300 % 257] = float("nan")
    assert "logits" in failed(climb(model, lively, config))


def test_the_reference_is_as_before_afterwards(config, lively):
    before = lively.provenance.weights_sha256
    climb(proof.copy_reference(lively), lively, config)
    assert weights_sha256(dict(lively.model.named_parameters())) == before
    assert lively.model.config._attn_implementation == "sdpa"
    assert not any(parameter.requires_grad for parameter in lively.model.parameters())


# --- rungs and comparisons ---


def test_a_rung_is_told_for_people_and_for_machines():
    good, bad = Check("logits", 1e-5), Check("loss", 0.5, "too far")
    out = Check("argmax like llama.cpp's", None, "no such file")
    assert [rung.holds for rung in (good, bad, out)] == [True, False, None]
    assert "FAILS    too far" in str(bad) and "left out no such file" in str(out)
    told = json.loads(json.dumps(as_json([good, bad, out]), allow_nan=False))
    assert [row["holds"] for row in told] == [True, False, None]
    assert (told[0]["sign"], told[0]["bound"]) == ("<=", 1e-4)
    assert Check("argmax like llama.cpp's", 0.94).holds is False
    assert as_json([worst("logits", {"a": float("inf")})])[0]["figure"] == "inf"


def test_the_worst_part_and_the_first_beyond_the_bound_are_named():
    rung = worst("logits", {"a": 0.0, "b": 2e-4, "c": 3e-4})
    assert (rung.figure, rung.first) == (3e-4, "b")
    assert rung.detail == "first: b, by 2.00e-04; largest of 3: c"


def test_what_cannot_be_compared_is_infinitely_far():
    one = torch.ones(2)
    assert comparison.max_difference(one, torch.ones(3)) == float("inf")
    assert comparison.max_difference(one * float("nan"), one) == float("inf")
    assert comparison.relative_difference(one * 3, one * 2) == 0.5
    assert comparison.relative_difference(one * 0, one * 0) == 0.0
    assert worst("logits", {"a": float("inf")}).holds is False
    assert comparison.relative_difference_by_position(one, torch.ones(3)) == float("inf")
    assert comparison.relative_difference_by_position(one[None] * float("nan"), one[None]) == float(
        "inf"
    )


def test_a_position_with_huge_values_hides_no_error_of_another():
    theirs = torch.tensor([[[2e4, 1.0], [1.0, 2.0], [0.0, 0.0]]])
    ours = theirs + torch.tensor([[[0.0, 0.0], [0.5, 0.0], [0.0, 0.0]]])
    assert comparison.relative_difference_by_position(ours, theirs) == 0.25
    assert comparison.relative_difference(ours, theirs) < 1e-4


def test_divergence_is_zero_only_of_equals():
    logits = torch.randn(1, 4, 9)
    assert comparison.kl_divergence(logits, logits + 3) == pytest.approx(0.0, abs=1e-6)
    assert comparison.kl_divergence(logits, -logits) > 0.1


def test_in_bf16_transformers_keeps_its_angles_exact(lively):
    rounded = comparison.in_bf16(lively.model)
    assert rounded.lm_head.weight.dtype == torch.bfloat16
    angles = rounded.model.rotary_emb.inv_freq
    assert angles.dtype == torch.float32
    assert torch.equal(angles, lively.model.model.rotary_emb.inv_freq)
    assert lively.model.lm_head.weight.dtype == torch.float32


def test_a_config_that_is_not_the_sources_fails(config, lively):
    model = proof.copy_reference(lively)
    model.config = SmolLm3.ModelConfig(**{**vars(model.config), "rope_theta": 777.0})
    rungs = {rung.name: rung for rung in proof.copied(model, lively)}
    assert rungs["config keys that differ"].figure == 1
    assert "rope_theta 777.0 is not 10000.0" in rungs["config keys that differ"].detail


def test_long_logits_are_those_of_one_pass(lively):
    ids = torch.arange(257)[None].repeat(1, 2)[:, :500]
    with torch.no_grad():
        for model in (lively.model, proof.copy_reference(lively)):
            whole = comparison.logits(model, ids)
            torch.testing.assert_close(comparison.long_logits(model, ids), whole, rtol=0, atol=1e-5)


def test_the_prompts_are_of_different_kinds():
    assert len(proof.PROMPTS) == len({kind for kind, _ in proof.PROMPTS}) == 20


# --- the real weights ---


def test_the_real_weights_give_the_references_logits(smollm2):
    model = proof.copy_reference(smollm2)
    ids = torch.cat([proof.encode(smollm2, text)[:, :40] for _, text in proof.PROMPTS[:3]], dim=1)
    with torch.no_grad():
        difference = (model(ids) - smollm2.model(ids).logits).abs().max().item()
    assert difference <= 1e-4


def test_the_real_weights_broken_fail_where_they_are_broken(smollm2):
    model, ids = proof.copy_reference(smollm2), proof.encode(smollm2, proof.LONG_PROMPT)[:, :48]
    with torch.no_grad():
        theirs = comparison.hidden_states(smollm2.model, ids)
    found = {
        name: breaking.break_with(name, model, smollm2, ids, theirs) for name in breaking.MISTAKES
    }
    assert found[breaking.TRUTH].rung is None
    assert found[breaking.RANDOM_HEAD].where == "lm_head.weight"
    assert found["targets shifted twice"].rung == "loss"
    inside = set(found) - {breaking.TRUTH, breaking.RANDOM_HEAD, "targets shifted twice"}
    assert {found[name].where for name in inside} == {"layers.0"}
    assert found["no causal mask"].loss < found[breaking.TRUTH].loss  # a loss is no proof


@pytest.mark.slow
def test_the_real_weights_pass_the_quick_ladder(smollm2):
    config = load_config(ROOT / "SmolLm3_Config.yaml", "quick")
    text = (ROOT / "input.txt").read_text("utf-8")
    rungs = proof.verify(proof.copy_reference(smollm2), smollm2, config.proof, text)
    assert failed(rungs) == []
    by_name = {rung.name: rung for rung in rungs}
    assert [name for name, rung in by_name.items() if rung.holds is None] == [
        "perplexity off the stored one"
    ]
    assert by_name["parameters missing"].detail == "134515008 parameters"
    assert len(by_name["gradient of each parameter"].parts) == 272
