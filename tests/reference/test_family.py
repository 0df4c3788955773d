"""Each model's architecture, shrunk, against transformers; any other one is refused."""

from dataclasses import asdict

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import ROOT
from SmolLm3 import LlamaModel, ModelConfig, hf_state_dict, load_hf_weights
from workflow.config.load import load_config
from workflow.reference.load import hf_config

MODELS = load_config(ROOT / "SmolLm3_Config.yaml", "ci").models
FAMILY = [name for name, entry in MODELS.items() if entry.hub_id]
LAYERS = 5  # one more than it takes to meet SmolLM3's first layer without rotation


def shrunk(architecture: ModelConfig, **changes) -> ModelConfig:
    """The same in all that matters for what is computed, with few heads, layers and words."""
    ratio = architecture.num_attention_heads // architecture.num_key_value_heads
    layers = architecture.no_rope_layers
    small = {
        "vocab_size": 101,
        "hidden_size": 2 * ratio * architecture.head_dim,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2 * ratio,
        "num_key_value_heads": 2,
        "no_rope_layers": layers and layers[:LAYERS],
        "initializer_range": 0.05,
    }
    return ModelConfig(**asdict(architecture) | small | changes)


def both(config: ModelConfig):
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(hf_config(config)).eval()
    ours = LlamaModel(ModelConfig.from_hf(theirs.config))
    load_hf_weights(ours, dict(theirs.named_parameters()))
    return ours, theirs


@torch.no_grad()
def assert_same_logits(config: ModelConfig):
    ours, theirs = both(config)
    ids = torch.randint(config.vocab_size, (2, 24))
    for first in (0, 1500):  # the rotation of long texts differs most far from the start
        positions = torch.arange(first, first + 24)
        expected = theirs(ids, position_ids=positions[None].expand(2, -1)).logits
        torch.testing.assert_close(ours(ids, positions=positions), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", FAMILY)
def test_a_member_gives_transformers_logits(name):
    config = shrunk(MODELS[name].architecture)
    assert ModelConfig.from_hf(hf_config(config)) == config
    assert_same_logits(config)


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": False},
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 6},
        {"head_dim": 32},  # hidden / heads is 64
    ],
)
def test_so_do_unusual_shapes(changes):
    assert_same_logits(shrunk(MODELS["SmolLM2-135M"].architecture, **changes))


def test_a_layer_without_rotation_does_not_know_positions():
    config = shrunk(MODELS["SmolLM3-3B"].architecture)
    assert [layer.self_attn.rotates for layer in both(config)[0].layers] == [1, 1, 1, 0, 1]
    still = ModelConfig(**asdict(config) | {"no_rope_layers": (0,) * LAYERS})
    model, ids = LlamaModel(still), torch.randint(101, (1, 9))
    with torch.no_grad():
        assert torch.equal(model(ids), model(ids, positions=torch.arange(9) * 7))


def test_llama3_scaling_changes_the_logits():
    config = shrunk(MODELS["Llama-3.2-1B"].architecture)
    plain = ModelConfig(**asdict(config) | {"rope_scaling": None})
    scaled, unscaled = LlamaModel(config), LlamaModel(plain)
    load_hf_weights(unscaled, hf_state_dict(scaled))
    ids = torch.randint(101, (1, 24))
    with torch.no_grad():
        assert (scaled(ids) - unscaled(ids)).abs().max() > 1e-4


def config_json(name: str, **changes) -> dict:
    return hf_config(shrunk(MODELS[name].architecture)).to_dict() | changes


LLAMA3 = {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("SmolLM2-135M", {"model_type": "qwen3"}, "model_type is 'qwen3'"),
        ("SmolLM2-135M", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("SmolLM2-135M", {"attention_bias": True}, "attention_bias is True"),
        ("SmolLM2-135M", {"mlp_bias": True}, "mlp_bias is True"),
        ("SmolLM2-135M", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("SmolLM3-3B", {"use_sliding_window": True}, "use_sliding_window is True"),
        ("SmolLM3-3B", {"sliding_window": 4096}, "sliding_window is 4096"),
        ("SmolLM3-3B", {"layer_types": ["sliding_attention"] * LAYERS}, "layer_types has other"),
        ("SmolLM3-3B", {"no_rope_layers": None}, "the config lacks no_rope_layers"),
        ("SmolLM3-3B", {"no_rope_layers": [1, 0]}, "no_rope_layers is not of 5 layers"),
        ("Llama-3.2-1B", {"rope_parameters": LLAMA3}, "rope_scaling must have factor, low_freq"),
        (
            "SmolLM2-135M",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
            "rope_type is 'yarn'",
        ),
        (
            "SmolLM2-135M",
            {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_type is 'linear'",
        ),
    ],
)
def test_what_the_model_cannot_represent_is_refused_by_name(name, changes, words):
    with pytest.raises(ValueError, match=f"^{words}"):
        ModelConfig.from_hf(config_json(name, **changes))


def test_norms_of_queries_and_keys_are_refused_as_tensors():
    ours, theirs = both(shrunk(MODELS["SmolLM2-135M"].architecture))
    state = dict(theirs.named_parameters())
    state["model.layers.0.self_attn.q_norm.weight"] = torch.ones(64)
    with pytest.raises(ValueError, match=r"self_attn\.q_norm\.weight is extra"):
        load_hf_weights(ours, state)


def test_an_old_config_json_is_read_as_well():
    new = config_json("Llama-3.2-1B")
    rope = new.pop("rope_parameters")
    old = new | {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    assert ModelConfig.from_hf(old) == shrunk(MODELS["Llama-3.2-1B"].architecture)
