"""A small version of each supported architecture gives the logits of transformers."""

from dataclasses import asdict

import pytest
import torch

from conftest import ROOT
from SmolLm3 import LlamaModel, ModelConfig, load_hf_weights
from workflow.config.load import load_config
from workflow.reference.load import hf_config

MODELS = load_config(ROOT / "SmolLm3_Config.yaml", "ci").models
# by architecture, because most Instruct models share the one of the base model
FAMILY = {repr(row.architecture): name for name, row in MODELS.items() if row.hub_id}
LAYERS = 5  # SmolLM3's fourth layer is the first one without rotation


def shrunk(architecture: ModelConfig, **changes) -> ModelConfig:
    """The same architecture with fewer heads, layers and tokens."""
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


@torch.no_grad()
@pytest.mark.parametrize("name", list(FAMILY.values()))
def test_architecture_gives_the_logits_of_transformers(name):
    from transformers import AutoModelForCausalLM

    config = shrunk(MODELS[name].architecture)
    assert ModelConfig.from_hf(hf_config(config)) == config
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(hf_config(config)).eval()
    ours = LlamaModel(config)
    load_hf_weights(ours, dict(theirs.named_parameters()))
    ids = torch.randint(config.vocab_size, (2, 24))
    for first in (0, 1500):  # scaled rotations differ most at high positions
        positions = torch.arange(first, first + 24)
        expected = theirs(ids, position_ids=positions[None].expand(2, -1)).logits
        torch.testing.assert_close(ours(ids, positions=positions), expected, rtol=0, atol=2e-5)


LLAMA3 = {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("SmolLM2-135M", {"model_type": "qwen3"}, "model_type is 'qwen3'"),
        ("SmolLM2-135M", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("SmolLM2-135M", {"attention_bias": True}, "attention_bias is True"),
        ("SmolLM2-135M", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("SmolLM3-3B", {"use_sliding_window": True}, "use_sliding_window is True"),
        ("SmolLM3-3B", {"layer_types": ["sliding_attention"]}, "layer_types: LlamaModel"),
        ("SmolLM3-3B", {"no_rope_layers": None}, "the config lacks no_rope_layers"),
        ("SmolLM3-3B", {"no_rope_layers": [1, 0]}, "no_rope_layers needs 5 entries"),
        ("Llama-3.2-1B", {"rope_parameters": LLAMA3}, "rope_scaling must have exactly factor, low"),
        ("SmolLM2-135M", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'"),
        ("SmolLM2-135M", {"rope_parameters": {"type": "linear"}}, "rope_type is 'linear'"),
    ],
)
def test_unsupported_architecture_is_refused_with_the_key(name, changes, message):
    config = hf_config(shrunk(MODELS[name].architecture)).to_dict()
    with pytest.raises(ValueError, match=f"^{message}"):
        ModelConfig.from_hf(config | changes)
