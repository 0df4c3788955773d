"""What is shown of a model's insides is what the model itself computes."""

import math

import pytest
import torch

from SmolLm3 import LlamaModel, hf_state_dict
from workflow.analysis import interpretability as insides
from workflow.proof.checks import copy_reference


@pytest.fixture
def model(config):
    torch.manual_seed(0)
    model = LlamaModel(config.train_architecture)
    for parameter in model.parameters():
        parameter.data.mul_(20 if parameter.ndim == 2 else 1)  # heads that choose
    return model


@pytest.fixture
def ids(config):
    return insides.repeated_tokens(config.train_architecture.vocab_size, length=12)


def test_the_counts_add_up_and_the_map_finds_every_tensor_equal_until_one_differs(model):
    assert sum(insides.parameter_counts(model).values()) == sum(
        p.numel() for p in model.parameters()
    )
    weights = {name: tensor.clone() for name, tensor in hf_state_dict(model).items()}
    table = insides.weight_map(model, weights)
    assert len(table) == 11 and (table["equal"] == table["tensors"]).all()
    row = table.set_index("original").loc["model.layers.N.mlp.up_proj.weight"]
    assert (row["ours"], row["tensors"]) == ("layers.N.mlp.up_proj.weight", 2)
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    assert insides.weight_map(model, weights)["equal"].sum() == table["tensors"].sum() - 1


def test_a_pair_turns_by_its_wavelength_and_scores_know_only_the_distance(model):
    rotary, D = model.rotary, model.config.head_dim
    waves = insides.wavelengths(rotary)
    expected = [2 * math.pi * rotary.theta ** (2 * pair / D) for pair in range(D // 2)]
    assert waves.tolist() == pytest.approx(expected, rel=1e-5)
    (points,) = insides.rotated_pairs(rotary, [1], positions=4)
    angles = [2 * math.pi * place / waves[1].item() for place in range(4)]
    assert torch.allclose(points, torch.tensor([(math.cos(a), math.sin(a)) for a in angles]))
    scores = insides.scores_by_position(rotary, positions=20)
    assert torch.allclose(scores[1:, 1:], scores[:-1, :-1], atol=1e-4)
    assert not torch.allclose(scores[0, 1:], scores[0, :-1], atol=1e-2)


def test_the_last_layer_of_the_lens_is_the_models_own_answer(model, ids, reference):
    answers = torch.stack(list(insides.logit_lens(model, ids)))
    assert answers.shape == (3, 24, model.config.vocab_size)
    with torch.no_grad():
        logits = model(ids)[0]
    assert torch.equal(answers[-1], logits)
    losses = insides.loss_by_layer(model, ids)
    expected = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:]).item()
    assert len(losses) == 3 and losses[-1] == pytest.approx(expected, abs=1e-5)
    words, shares = insides.logit_lens_tokens(model, ids, reference.tokenizer)
    assert words[-1][0] == reference.tokenizer.decode(logits[0].argmax())
    assert shares[-1, 0].item() == pytest.approx(logits[0].softmax(-1).max().item())


def test_attention_is_what_the_layers_compute(model, ids):
    """Its weights, applied to the values by hand, make what each attention gives out."""
    seen = {}
    layers = [layer.self_attn for layer in model.layers]
    hooks = [
        layer.register_forward_hook(lambda m, given, made: seen.update({m.index: (given[0], made)}))
        for layer in layers
    ]
    weights = insides.attention_weights(model, ids)
    for hook in hooks:
        hook.remove()
    assert torch.allclose(weights.sum(dim=-1), torch.ones(()))
    assert weights.triu(1).abs().max() == 0
    for layer in layers:
        x, made = seen[layer.index]
        v = layer.v_proj(x).view(1, 24, -1, layer.head_dim).transpose(1, 2)
        v = v.repeat_interleave(weights.shape[1] // v.shape[1], dim=1)
        y = layer.o_proj((weights[layer.index] @ v).transpose(1, 2).reshape(1, 24, -1))
        assert (y - made).abs().max() < 1e-3 * made.abs().max()
    assert weights.amax() > 0.5  # not all alike


def test_each_kind_of_head_is_recognised():
    half, n = 6, 12
    first = torch.zeros(n, n)
    first[:, 0] = 1
    previous = torch.zeros(n, n)
    previous[range(1, n), range(n - 1)] = 1
    copying = torch.zeros(n, n)
    copying[range(half, n), range(1, half + 1)] = 1
    weights = torch.stack([torch.stack([first, previous]), torch.stack([copying, first / 2])])
    scores = insides.head_scores(weights)
    assert scores["induction"][1, 0] == scores["previous token"][0, 1] == 1
    assert scores["first token"][0, 0] == 1
    assert insides.top_heads(scores) == {
        "induction: layer 2, head 0": (1, 0),
        "previous token: layer 1, head 1": (0, 1),
        "first token: layer 1, head 0": (0, 0),
    }


@pytest.mark.slow
def test_the_released_weights_have_induction_heads(smollm2):
    """Without rotation over positions no head could find the token that followed."""
    weights = insides.attention_weights(copy_reference(smollm2), insides.repeated_tokens(49152))
    scores = insides.head_scores(weights)
    assert scores["induction"].max() > 0.8
    assert scores["previous token"].max() > 0.9
