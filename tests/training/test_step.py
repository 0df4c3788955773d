"""One training step: loss, rate, optimizer; micro-batches, bfloat16, numbers not finite."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from conftest import ROOT
from SmolLm3 import LlamaModel
from workflow.config.load import load_config
from workflow.errors import NonFiniteError
from workflow.training import hardware
from workflow.training.step import (
    CHUNK,
    NextTokenLoss,
    TrainStep,
    evaluating,
    learning_rate,
    make_optimizer,
)


@pytest.fixture
def model(config) -> LlamaModel:
    torch.manual_seed(0)
    return LlamaModel(config.train_architecture)


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
    assert (train.weight_decay, train.betas, train.max_grad_norm) == (0.01, (0.9, 0.95), 1.0)
    assert config.train_architecture.initializer_range == pytest.approx(1 / 24)
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


def test_dropout_is_off_while_evaluating_and_comes_back(model):
    model.train()
    with pytest.raises(KeyboardInterrupt), evaluating(model):
        assert not model.training
        raise KeyboardInterrupt
    assert model.training


CPU = torch.device("cpu")


@pytest.fixture
def updates(config):
    """Some updates with these settings: the model afterwards, and the rows."""
    tokens = torch.randint(257, (3, 4, 33), generator=torch.Generator().manual_seed(0))

    def run(**settings) -> tuple[LlamaModel, list[dict]]:
        torch.manual_seed(0)
        model = LlamaModel(config.train_architecture)
        train = config.train.model_copy(update={"batch_size": 4, **settings})
        train_step = TrainStep(model, train, CPU)
        for step, rows in enumerate(tokens):
            train_step(step, rows[:, :-1], rows[:, 1:])
        return model, train_step.metrics()

    return run


def distance(one: LlamaModel, other: LlamaModel) -> float:
    return max((a - b).abs().max().item() for a, b in zip(one.parameters(), other.parameters()))


def test_parts_of_a_batch_add_up_to_it(updates):
    (whole, rows), (parts, other) = updates(), updates(micro_batch_size=1)
    assert [row["loss"] for row in other] == pytest.approx([row["loss"] for row in rows], rel=1e-6)
    norms = [[row["gradient_norm"] for row in side] for side in (rows, other)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert distance(whole, parts) < 1e-6


def test_recomputed_layers_change_no_bit(updates):
    (kept, rows), (recomputed, other) = updates(), updates(activation_checkpointing=True)
    assert distance(kept, recomputed) == 0
    assert [row["loss"] for row in rows] == [row["loss"] for row in other]


@pytest.mark.slow
def test_compiled_updates_are_the_same_but_for_rounding(updates):
    (eager, rows), (compiled, other) = updates(), updates(compile=True)
    assert [row["loss"] for row in other] == pytest.approx([row["loss"] for row in rows], rel=1e-6)
    assert distance(eager, compiled) < 1e-5


def test_without_a_compiler_the_steps_are_not_compiled_and_it_is_said(updates, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert hardware.compiler() is None
    assert distance(updates()[0], updates(compile=True)[0]) == 0
    assert capsys.readouterr().out.count("Note: no C++ compiler here") == 1


def test_in_bfloat16_weights_and_loss_stay_float32(updates):
    (exact, rows), (rounded, other) = updates(), updates(precision="bfloat16")
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in rounded.parameters())
    for row, low in zip(rows, other):
        assert 0 < abs(row["loss"] - low["loss"]) < 3e-3
        assert torch.tensor(low["loss"]).bfloat16().item() != low["loss"]
    assert 0 < distance(exact, rounded) < 3e-3  # three updates at a rate of up to 1e-4


def test_logits_in_chunks_give_the_same_loss_and_gradient(config):
    torch.manual_seed(0)
    model = LlamaModel(config.train_architecture)
    inputs, targets = torch.randint(257, (2, 5, CHUNK // 4))
    assert inputs.numel() > CHUNK
    NextTokenLoss(model)(inputs, targets).backward()
    gradient = model.embed_tokens.weight.grad.clone()
    model.zero_grad()
    expected = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    expected.backward()
    torch.testing.assert_close(NextTokenLoss(model)(inputs, targets), expected)
    torch.testing.assert_close(gradient, model.embed_tokens.weight.grad)


def test_after_numbers_that_are_not_finite_nothing_changes_any_more(config):
    torch.manual_seed(0)
    model = LlamaModel(config.train_architecture)
    train_step = TrainStep(model, config.train, CPU)
    batch = torch.ones(2, 1, 8, dtype=torch.long)
    train_step(0, *batch)
    before = copy.deepcopy((model.state_dict(), train_step.optimizer.state_dict()["state"]))
    scale = model.norm.weight.data
    scale[0] = math.nan
    train_step(1, *batch)
    scale[0] = before[0]["norm.weight"][0]
    train_step(2, *batch)  # its own numbers are good
    torch.testing.assert_close(model.state_dict(), before[0], rtol=0, atol=0)
    now = train_step.optimizer.state_dict()["state"]
    torch.testing.assert_close(now, before[1], rtol=0, atol=0)
    with pytest.raises(NonFiniteError, match="loss nan and gradient norm nan at step 2") as caught:
        train_step.metrics()
    assert caught.value.step == 1


def test_the_operations_of_a_token_are_6_n_and_6_l_t_c():
    config = load_config(ROOT / "SmolLm3_Config.yaml", "cpu").train_architecture
    assert hardware.flops_per_token(config, 1024) == 6 * 134_515_008 + 6 * 30 * 1024 * 576
    untied = config.__class__(**{**vars(config), "tie_word_embeddings": False})
    assert hardware.flops_per_token(untied, 1024) == hardware.flops_per_token(config, 1024)


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA GeForce", None)],
)
def test_the_peak_is_that_of_the_card(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert hardware.peak_flops(torch.device("cuda")) == peak
    assert hardware.peak_flops(CPU) is None
