"""Random states come back; everything is compared before anything is loaded."""

import copy
import math
import random

import numpy as np
import pytest
import torch

from SmolLm3 import LlamaModel, hf_state_dict
from workflow.errors import CheckpointError, ConfigError
from workflow.training import resume
from workflow.training.resume import (
    check_allowed,
    compare,
    load_optimizer,
    load_weights,
    normalize_names,
    optimizer_state,
)
from workflow.training.step import NextTokenLoss, make_optimizer


@pytest.fixture
def model(config) -> LlamaModel:
    torch.manual_seed(0)
    return LlamaModel(config.train_architecture)


def draws() -> list[float]:
    return [torch.rand(1).item(), np.random.random(), random.random(), np.random.standard_normal()]


def test_random_states_come_back():
    resume.seed_random_states(5)
    np.random.standard_normal()  # it draws two and keeps one
    saved = resume.random_states()
    first = draws()
    resume.restore_random_states(saved)
    assert draws() == first
    assert set(saved) == set(resume.RANDOM_STATES)


@pytest.mark.parametrize(("lost", "place"), [("torch", 0), ("numpy", 1), ("python", 2)])
def test_a_state_that_is_not_there_is_left_alone(lost, place):
    resume.seed_random_states(5)
    saved = resume.random_states()
    first = draws()
    resume.restore_random_states({k: v for k, v in saved.items() if k != lost})
    assert [a != b for a, b in zip(draws()[:3], first[:3])] == [i == place for i in range(3)]


def test_a_seed_starts_all_of_them():
    for seed in (0, 2**32 - 1):
        resume.seed_random_states(seed)
        first = draws()
        resume.seed_random_states(seed)
        assert draws() == first


def test_states_of_gpus_are_ignored_without_one():
    resume.restore_random_states({**resume.random_states(), "cuda": [torch.zeros(16)] * 3})
    here = resume.environment(torch.device("cpu"))
    assert here["threads"] == torch.get_num_threads() and here["torch"] == torch.__version__


def test_differences_are_a_table_and_can_be_allowed_by_name(tmp_path, capsys):
    saved = {"config": {"train": {"learning_rate": 0.1, "betas": [0.9, 0.95]}}, "data": {"a": 1}}
    now = {"config": {"train": {"learning_rate": 0.2, "betas": [0.9, 0.99]}}, "data": {"a": 1}}
    compare(tmp_path, saved, saved)
    compare(tmp_path, saved, now, ["train.learning_rate", "train.betas"])
    with pytest.raises(CheckpointError, match=r"or allow each: --allow train\.learning_rate"):
        compare(tmp_path, saved, now, ["train.betas"])
    table = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split() for line in table] == [
        ["setting", "checkpoint", "now"],
        ["config.train.learning_rate", "0.1", "0.2"],
        ["config.train.betas.1", "0.95", "0.99"],
    ]
    with pytest.raises(CheckpointError, match="a is 1 in the checkpoint and 2 now; use the"):
        compare(tmp_path, saved, saved | {"data": {"a": 2}}, ["train", "data"][:1])


def test_only_training_keys_and_random_states_can_be_allowed():
    check_allowed(["train.learning_rate", "random"])
    for name in ("data.text_sha256", "train", "architecture.rope_theta"):
        with pytest.raises(ConfigError, match=f"--allow {name}: this must be as in the checkpoint"):
            check_allowed([name])


def test_weights_that_do_not_fit_are_named_and_none_is_copied(config, tmp_path):
    model = LlamaModel(config.train_architecture)
    good = {name: tensor.clone() for name, tensor in hf_state_dict(model).items()}
    first, *_ = good
    for change, words in (
        ({first: good[first].int()}, f"{first} is torch.int32, no float"),
        ({first: good[first][:3]}, f"{first} has shape"),
        ({"extra": good[first]}, "extra is extra"),
    ):
        with pytest.raises(CheckpointError, match=words):
            load_weights(
                model, {name: tensor + 1 for name, tensor in good.items()} | change, tmp_path
            )
        assert all(torch.equal(good[name], now) for name, now in hf_state_dict(model).items())
    with pytest.raises(CheckpointError, match="is missing, and 14 more; choose another file"):
        load_weights(model, {}, tmp_path)


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


def test_names_lose_what_wrappers_put_before_them_with_one_note(tmp_path, capsys):
    weight = torch.zeros(1)
    for prefix in ("_orig_mod.", "module.", "module._orig_mod."):
        named = normalize_names({f"{prefix}embed_tokens.weight": weight}, tmp_path)
        assert list(named) == ["model.embed_tokens.weight"]
        assert capsys.readouterr().out.count("Note: ") == 1
    assert list(normalize_names({"model.norm.weight": weight}, tmp_path)) == ["model.norm.weight"]
    assert capsys.readouterr().out == ""
