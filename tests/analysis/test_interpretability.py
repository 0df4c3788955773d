"""The analysis shows what the model itself computes."""

import math

import pytest
import torch

from SmolLm3 import LlamaModel, hf_state_dict
from workflow.analysis import interpretability
from workflow.proof import copy_reference


@pytest.fixture
def model(reference) -> LlamaModel:
    """A copy of the reference; weights are large in both, so that heads attend to few tokens."""
    for parameter in reference.model.parameters():
        parameter.data.mul_(20 if parameter.ndim == 2 else 1)
    return copy_reference(reference)


@pytest.fixture
def ids(model):
    return interpretability.repeated_tokens(model.config.vocab_size, length=12)


def test_the_weight_map_counts_equal_tensors(model):
    weights = {name: tensor.clone() for name, tensor in hf_state_dict(model).items()}
    table = interpretability.weight_map(model, weights)
    assert len(table) == 11 and (table["equal"] == table["tensors"]).all()
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    assert interpretability.weight_map(model, weights)["equal"].sum() == table["tensors"].sum() - 1


def test_the_steps_of_the_first_layer_add_up_to_its_output(model, ids):
    states = interpretability.first_layer(model, ids)
    after_attention = states["embed_tokens"] + states["o_proj"]
    assert torch.equal(states["input of post_attention_layernorm"], after_attention)
    assert torch.equal(states["layers.0"], after_attention + states["down_proj"])
    with torch.no_grad():
        assert torch.equal(states["lm_head"], model(ids))
    values = states["v_proj"].view(1, 24, 2, 8).transpose(1, 2).repeat_interleave(2, dim=1)
    heads = (states[interpretability.WEIGHTS] @ values).transpose(1, 2).flatten(2)
    torch.testing.assert_close(heads, states["input of o_proj"], atol=1e-4, rtol=1e-4)
    table = interpretability.shape_table(states, model.config)
    rows = table.data.set_index("step")
    assert "text-align: left" in table.to_html()
    assert list(rows.index) == list(interpretability.STEPS)
    assert rows.loc["k_proj"].tolist() == ["24 × 16", "keys: 2 heads of 8 channels"]
    assert rows.loc[interpretability.WEIGHTS, "shape"] == "4 × 24 × 24"
    assert rows.loc["lm_head", "shape"] == "24 × 257"


@pytest.mark.parametrize(("last", "layer"), [("aabb", 2), ("abab", 3), ("bbbb", 0)])
def test_the_layer_from_which_on_the_answer_is_given(last, layer):
    assert interpretability.layer_of_answer([["x", guess] for guess in last]) == layer


def test_wavelengths_and_angles_of_rotary_embedding(model):
    rotary, D = model.rotary, model.config.head_dim
    waves = interpretability.wavelengths(rotary)
    expected = [2 * math.pi * rotary.theta ** (2 * pair / D) for pair in range(D // 2)]
    assert waves.tolist() == pytest.approx(expected, rel=1e-5)
    (points,) = interpretability.rotated_pairs(rotary, [1], positions=4)
    angles = [2 * math.pi * place / waves[1].item() for place in range(4)]
    assert torch.allclose(points, torch.tensor([(math.cos(a), math.sin(a)) for a in angles]))


def test_after_the_last_layer_the_logit_lens_is_the_output_of_the_model(model, ids, reference):
    lens = interpretability.logit_lens(model, ids)
    assert lens.shape == (3, 24, model.config.vocab_size)
    with torch.no_grad():
        logits = model(ids)[0]
    torch.testing.assert_close(lens[-1], logits)
    expected = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:]).item()
    assert interpretability.loss_by_layer(model, ids)[-1] == pytest.approx(expected, abs=1e-5)
    words, probabilities = interpretability.logit_lens_tokens(model, ids, reference.tokenizer)
    assert words[-1][0] == reference.tokenizer.decode(logits[0].argmax())
    assert probabilities[-1, 0].item() == pytest.approx(logits[0].softmax(-1).max().item())


def test_attention_weights_equal_those_of_transformers(model, ids, reference):
    reference.model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = reference.model(ids, output_attentions=True).attentions
    weights = interpretability.attention_weights(model, ids)
    torch.testing.assert_close(weights, torch.cat(expected), rtol=0, atol=1e-5)
    assert weights[:, :, 5:].amax() > 0.5  # they differ


def test_head_scores_and_top_heads():
    half, n = 6, 12
    first, previous, copying = torch.zeros(3, n, n)
    first[:, 0] = 1
    previous[range(1, n), range(n - 1)] = 1
    copying[range(half, n), range(1, half + 1)] = 1
    weights = torch.stack([torch.stack([first, previous]), torch.stack([copying, first / 2])])
    scores = interpretability.head_scores(weights)
    assert scores["induction"][1, 0] == scores["previous token"][0, 1] == 1
    assert scores["first token"][0, 0] == 1
    assert interpretability.top_heads(scores) == {
        "induction: layer 2, head 0": (1, 0),
        "previous token: layer 1, head 1": (0, 1),
        "first token: layer 1, head 0": (0, 0),
    }
