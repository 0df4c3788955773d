"""Loss, rate and optimizer."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from conftest import ROOT
from SmolLm3 import LlamaModel
from workflow.config.load import load_config
from workflow.training.step import (
    NextTokenLoss,
    evaluating,
    learning_rate,
    load_optimizer,
    make_optimizer,
    optimizer_state,
)


@pytest.fixture
def model(config) -> LlamaModel:
    torch.manual_seed(0)
    return LlamaModel(config.trained)


def test_loss_and_gradient_equal_cross_entropy_on_the_logits(model):
    tokens = torch.randint(257, (2, 17))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    loss = NextTokenLoss(model)(inputs, targets)
    loss.backward()
    gradient = model.embed_tokens.weight.grad.clone()
    model.zero_grad()
    expected = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, model.embed_tokens.weight.grad)


def test_the_rate_warms_up_falls_and_stays(config):
    settings = config.train.model_copy(
        update={
            "learning_rate": 1.0,
            "min_learning_rate": 0.1,
            "warmup_steps": 10,
            "schedule_steps": 110,
        }
    )
    rates = [learning_rate(step, settings) for step in range(200)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55)
    assert rates[110:] == [pytest.approx(0.1)] * 90
    assert all(a > b for a, b in itertools.pairwise(rates[10:111]))


def test_the_published_recipe_is_constant_until_its_last_fifth():
    """huggingface/smollm, text/pretraining/smollm2: 3e-3 for 1.05 M tokens an update."""
    config = load_config(ROOT / "SmolLm3_Config.yaml", "pretrain")
    train = config.train
    rates = [learning_rate(step, train) for step in range(5100)]
    share = train.batch_size * train.sequence_length / 2**20
    assert rates[5] == pytest.approx(3e-3 * share**0.5, rel=1e-2)
    assert set(rates[5:4041]) == {rates[5]}
    assert rates[4545] == pytest.approx(rates[5] / 2) and set(rates[5050:]) == {0.0}
    assert (train.weight_decay, train.betas, train.clip_norm) == (0.01, (0.9, 0.95), 1.0)
    assert config.trained.initializer_range == pytest.approx(1 / 24)
    assert train.warmup_steps / train.schedule_steps == pytest.approx(2000 / 2e6, rel=0.02)


def test_the_rate_does_not_depend_on_where_the_run_stops(config):
    longer = config.train.model_copy(update={"steps": 9999, "resume_steps": 1})
    assert [learning_rate(s, longer) for s in range(30)] == [
        learning_rate(s, config.train) for s in range(30)
    ]


def test_the_optimizer_has_every_parameter_once_and_only_matrices_decay(model, config):
    optimizer = make_optimizer(model, config.train)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, model.parameters()))
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert (group["weight_decay"] > 0) == (parameter.ndim >= 2)


def test_loading_moments_keeps_the_settings_of_the_new_optimizer(model, config):
    optimizer = make_optimizer(model, config.train)
    NextTokenLoss(model)(torch.ones(1, 4, dtype=torch.long), torch.ones(1, 4).long()).backward()
    optimizer.step()
    other = config.train.model_copy(update={"weight_decay": 0.7, "learning_rate": 0.5})
    fresh = make_optimizer(model, other)
    load_optimizer(fresh, optimizer_state(optimizer))
    assert fresh.param_groups[0]["weight_decay"] == 0.7
    assert fresh.param_groups[0]["lr"] == 0.5
    for parameter in model.parameters():
        assert torch.equal(fresh.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg"])
    assert math.isfinite(fresh.state[parameter]["step"].item())


def test_moments_of_another_optimizer_are_refused(model, config):
    optimizer = make_optimizer(model, config.train)
    NextTokenLoss(model)(torch.ones(1, 4, dtype=torch.long), torch.ones(1, 4).long()).backward()
    optimizer.step()
    for change, words in (
        (lambda saved: saved.update(kind="SGD"), "its optimizer is SGD, not AdamW"),
        (
            lambda saved: saved["param_groups"][0]["param_names"].reverse(),
            r"has the parameter \S+down_proj.weight where this one has embed_tokens.weight",
        ),
        (
            lambda saved: saved["param_groups"][1]["param_names"].pop(),
            "has the parameter None where this one has norm.weight",
        ),
        (lambda saved: saved["state"].pop(0), "has no moments of embed_tokens.weight"),
        (
            lambda saved: saved["state"][0].pop("exp_avg_sq"),
            r"has \['exp_avg', 'step'\] of embed_tokens.weight",
        ),
        (
            lambda saved: saved["state"][0].update(exp_avg=torch.zeros(3)),
            r"exp_avg of embed_tokens.weight is float32 \(3,\), expected float32 \(257, 32\)",
        ),
        (
            lambda saved: saved["state"][0].update(exp_avg=torch.zeros(257, 32).double()),
            r"exp_avg of embed_tokens.weight is float64 .*, expected float32",
        ),
    ):
        saved = copy.deepcopy(optimizer_state(optimizer))
        change(saved)
        with pytest.raises(ValueError, match=words):
            load_optimizer(make_optimizer(model, config.train), saved)


def test_dropout_is_off_while_evaluating_and_comes_back(model):
    model.train()
    with pytest.raises(KeyboardInterrupt), evaluating(model):
        assert not model.training
        raise KeyboardInterrupt
    assert model.training
