"""Updates in parts, recomputed, in bfloat16, compiled; and after numbers that are not finite."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from conftest import ROOT
from SmolLm3 import LlamaModel
from workflow.config.load import load_config
from workflow.errors import NonFiniteError
from workflow.training import hardware
from workflow.training.step import CHUNK, NextTokenLoss, TrainStep

CPU = torch.device("cpu")


@pytest.fixture
def updates(config):
    """Some updates with these settings: the model afterwards, and the rows."""
    tokens = torch.randint(257, (3, 4, 33), generator=torch.Generator().manual_seed(0))

    def run(**settings) -> tuple[LlamaModel, list[dict]]:
        torch.manual_seed(0)
        model = LlamaModel(config.trained)
        train = config.train.model_copy(update={"batch_size": 4, **settings})
        updater = TrainStep(model, train, CPU)
        for step, rows in enumerate(tokens):
            updater(step, rows[:, :-1], rows[:, 1:])
        return model, updater.rows("x")

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
    (kept, rows), (recomputed, other) = updates(), updates(recompute=True)
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
    model = LlamaModel(config.trained)
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
    model = LlamaModel(config.trained)
    updater = TrainStep(model, config.train, CPU)
    batch = torch.ones(2, 1, 8, dtype=torch.long)
    updater(0, *batch)
    before = copy.deepcopy((model.state_dict(), updater.optimizer.state_dict()["state"]))
    scale = model.norm.weight.data
    scale[0] = math.nan
    updater(1, *batch)
    scale[0] = before[0]["norm.weight"][0]
    updater(2, *batch)  # its own numbers are good
    torch.testing.assert_close(model.state_dict(), before[0], rtol=0, atol=0)
    now = updater.optimizer.state_dict()["state"]
    torch.testing.assert_close(now, before[1], rtol=0, atol=0)
    with pytest.raises(NonFiniteError, match="loss nan and gradient norm nan at step 2") as caught:
        updater.rows("x")
    assert caught.value.step == 1


def test_the_operations_of_a_token_are_6_n_and_6_l_t_c():
    config = load_config(ROOT / "SmolLm3_Config.yaml", "cpu").trained
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
