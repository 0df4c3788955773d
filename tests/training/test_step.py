"""One training step: loss, learning rate, optimizer, micro-batches, bfloat16, NaN."""

import copy
import itertools
import math
from dataclasses import replace

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
    eval_mode,
    learning_rate,
    make_optimizer,
)


@pytest.mark.parametrize("shape", [(2, 16), (5, CHUNK // 4)])  # one chunk of logits, and two
def test_loss_and_gradient_equal_cross_entropy_on_the_logits(model, shape):
    inputs, targets = torch.randint(257, (2, *shape))
    loss = NextTokenLoss(model)(inputs, targets)
    loss.backward()
    gradient = model.embed_tokens.weight.grad.clone()
    model.zero_grad()
    expected = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, model.embed_tokens.weight.grad)


def test_a_parameter_without_a_gradient_is_named(model, config):
    step = TrainStep(model, config.train, torch.device("cpu"))
    model.norm.weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"no gradient reaches norm\.weight"):
        step(0, *torch.randint(257, (2, 2, 8)))


def test_a_step_equals_clipping_and_then_adamw(model, config):
    settings = config.train.model_copy(update={"max_grad_norm": 0.1, "compile": False})
    plain = copy.deepcopy(model)
    optimizer = make_optimizer(plain, settings)
    step = TrainStep(model, settings, torch.device("cpu"))
    size = settings.batch_size, settings.sequence_length
    for number in range(4):
        inputs, targets = torch.randint(257, (2, *size))
        step(number, inputs, targets)
        optimizer.zero_grad()
        NextTokenLoss(plain)(inputs, targets).backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(number, settings)
        optimizer.step()
        assert norm > 0.1
        assert step.metrics()[0]["gradient_norm"] == pytest.approx(norm.item(), rel=1e-4)
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-8)
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("precision", "instruction", "parameters", "hint"),
    [
        ("float32", "avx512_bf16", 10**8, "Note: this CPU has bfloat16 instructions"),
        ("float32", "avx512_bf16", 10**6, None),
        ("float32", "avx2", 10**8, None),
        ("bfloat16", "avx2", 10**6, "Warning: this CPU has no bfloat16 instructions"),
        ("bfloat16", "amx_bf16", 10**8, None),
    ],
)
def test_a_better_precision_for_this_cpu_is_named(
    monkeypatch, precision, instruction, parameters, hint
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {instruction: True})
    found = hardware.precision_hint(torch.device("cpu"), precision, parameters)
    assert found is hint or found.startswith(hint)
    assert hardware.precision_hint(torch.device("meta"), precision, parameters) is None


def test_the_learning_rate_warms_up_decays_and_then_stays(config):
    rates = {"learning_rate": 1.0, "min_learning_rate": 0.1}
    schedule = {"warmup_steps": 10, "schedule_steps": 110}
    settings = config.train.model_copy(update=rates | schedule)
    rates = [learning_rate(step, settings) for step in range(200)]
    other_stop = settings.model_copy(update={"steps": 9999, "resume_steps": 1})
    assert rates == [learning_rate(step, other_stop) for step in range(200)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55)
    assert rates[110:] == [pytest.approx(0.1)] * 90
    assert all(a > b for a, b in itertools.pairwise(rates[10:111]))


def test_the_learning_rate_of_the_published_recipe_is_constant_until_the_last_fifth():
    """huggingface/smollm, text/pretraining/smollm2: 3e-3 for 1.05 M tokens an update."""
    config = load_config(ROOT / "SmolLm3_Config.yaml", "pretrain")
    train = config.train
    rates = [learning_rate(step, train) for step in range(5100)]
    share = train.batch_size * train.sequence_length / 2**20
    assert rates[5] == pytest.approx(3e-3 * share**0.5, rel=1e-2)
    assert set(rates[5:4041]) == {rates[5]}
    assert rates[4545] == pytest.approx(rates[5] / 2) and set(rates[5050:]) == {0.0}


def test_the_optimizer_has_each_parameter_once_and_weight_decay_only_on_matrices(model, config):
    optimizer = make_optimizer(model, config.train)
    found = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, found)) == sorted(map(id, model.parameters()))
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert (group["weight_decay"] > 0) == (parameter.ndim >= 2)


def test_eval_mode_ends_with_its_block(model):
    model.train()
    with pytest.raises(KeyboardInterrupt, match=r"^$"), eval_mode(model):
        assert not model.training
        raise KeyboardInterrupt
    assert model.training


CPU = torch.device("cpu")


@pytest.fixture
def train_steps(config):
    """Does three steps with these settings; gives the model and the rows."""
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


@pytest.mark.parametrize(
    ("settings", "largest"),
    [
        ({"micro_batch_size": 1}, 1e-6),
        ({"activation_checkpointing": True}, 0),
        pytest.param({"compile": True}, 1e-5, marks=pytest.mark.slow),
    ],
)
def test_ways_to_compute_a_step_differ_only_by_rounding(train_steps, settings, largest):
    (model, rows), (other_model, other_rows) = train_steps(), train_steps(**settings)
    assert distance(model, other_model) <= largest
    for row, other in zip(rows, other_rows):
        assert other["loss"] == pytest.approx(row["loss"], rel=largest)
        assert other["gradient_norm"] == pytest.approx(row["gradient_norm"], rel=10 * largest)


def test_without_a_compiler_steps_are_not_compiled_and_a_note_is_printed(
    train_steps, monkeypatch, capsys
):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert hardware.find_cpp_compiler() is None
    assert distance(train_steps()[0], train_steps(compile=True)[0]) == 0
    assert capsys.readouterr().out.count("Note: no C++ compiler here") == 1


def test_in_bfloat16_weights_and_loss_stay_float32(train_steps):
    (exact, rows), (rounded, other) = train_steps(), train_steps(precision="bfloat16")
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in rounded.parameters())
    for row, low in zip(rows, other):
        assert 0 < abs(row["loss"] - low["loss"]) < 3e-3
        assert torch.tensor(low["loss"]).bfloat16().item() != low["loss"]
    assert 0 < distance(exact, rounded) < 3e-3


def test_after_a_number_that_is_not_finite_steps_change_nothing(config, model):
    train_step = TrainStep(model, config.train, CPU)
    batch = torch.ones(2, 1, 8, dtype=torch.long)
    train_step(0, *batch)
    before = copy.deepcopy((model.state_dict(), train_step.optimizer.state_dict()["state"]))
    scale = model.norm.weight.data
    scale[0] = math.nan
    train_step(1, *batch)
    scale[0] = before[0]["norm.weight"][0]
    train_step(2, *batch)  # the numbers of this step are finite
    torch.testing.assert_close(model.state_dict(), before[0], rtol=0, atol=0)
    now = train_step.optimizer.state_dict()["state"]
    torch.testing.assert_close(now, before[1], rtol=0, atol=0)
    with pytest.raises(NonFiniteError, match="loss nan and gradient norm nan at step 2") as caught:
        train_step.metrics()
    assert caught.value.step == 1


def test_operations_per_token_are_6_n_plus_6_l_t_c():
    config = load_config(ROOT / "SmolLm3_Config.yaml", "cpu").train_architecture
    assert hardware.flops_per_token(config, 1024) == 6 * 134_515_008 + 6 * 30 * 1024 * 576
    untied = replace(config, tie_word_embeddings=False)
    assert hardware.flops_per_token(untied, 1024) == hardware.flops_per_token(config, 1024)
