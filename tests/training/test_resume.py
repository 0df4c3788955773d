"""Exact resume: the checkpoint is compared with the run first, then everything is loaded."""

import copy
import random

import numpy as np
import pytest
import torch

from conftest import ROOT
from SmolLm3 import LlamaModel, hf_state_dict
from workflow.config import load_config
from workflow.errors import CheckpointError, ConfigError
from workflow.training import resume
from workflow.training.resume import check_allowed, load_weights
from workflow.training.step import NextTokenLoss, make_optimizer

CONFIG = load_config(ROOT / "SmolLm3_Config.yaml", "ci")
EXPECTED = {  # the parts of a checkpoint that must equal those of the run
    "config": {"train": {"learning_rate": 0.1}, "architecture": {"rope_theta": 1e4}},
    "data": {"text_sha256": "ab"},
    "tokenizer": {"sha256": "cd"},
}


def new_model() -> LlamaModel:
    torch.manual_seed(0)
    return LlamaModel(CONFIG.train_architecture)


@pytest.fixture(scope="module")
def saved() -> dict:
    """The state after one step."""
    model = new_model()
    optimizer = make_optimizer(model, CONFIG.train)
    NextTokenLoss(model)(*torch.ones(2, 1, 4, dtype=torch.long)).backward()
    optimizer.step()
    return copy.deepcopy(EXPECTED) | {
        "model": hf_state_dict(model),
        "optimizer": resume.optimizer_state(optimizer),
        "random": resume.random_states(),
    }


def draw() -> list[float]:
    return [torch.rand(1).item(), np.random.random(), random.random(), np.random.standard_normal()]


def test_given_random_states_are_restored_and_a_seed_determines_all():
    resume.seed_random_states(5)
    np.random.standard_normal()  # numpy draws two numbers and stores the second
    states = resume.random_states()
    assert set(states) == set(resume.RANDOM_STATES)
    first = draw()
    resume.restore_random_states(states | {"cuda": [torch.zeros(16)] * 3})  # of other GPUs: unused
    assert draw() == first
    for place, missing in enumerate(("torch", "numpy", "python")):
        resume.restore_random_states({k: v for k, v in states.items() if k != missing})
        assert [a == b for a, b in zip(draw()[:3], first[:3])] == [i != place for i in range(3)]
    for _ in range(2):
        resume.seed_random_states(5)
        np.random.standard_normal()
        assert draw() == first


def test_only_training_keys_and_random_states_can_be_allowed():
    check_allowed(["train.learning_rate", "random"])
    for name in ("data.text_sha256", "train", "architecture.rope_theta"):
        with pytest.raises(ConfigError, match=f"--allow {name}: this must be as in the checkpoint"):
            check_allowed([name])


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("optimizer/kind", "SGD", "its optimizer is SGD, not AdamW"),
        ("optimizer/param_groups/1/param_names", [], "the parameter None instead of layers.0"),
        ("optimizer/state/0", {}, "has no moments of embed_tokens.weight"),
        (
            "optimizer/state/0/exp_avg",
            torch.zeros(3),
            r"exp_avg .*\(3,\), expected .*\(257, 32\)",
        ),
        ("model/more", torch.zeros(1), "more is extra"),
        (
            "model/model.norm.weight",
            torch.ones(32).half(),
            "weight is torch.float16, expected",
        ),
        ("random", {}, "random states torch, cuda, numpy, python are missing; .* --allow random"),
        ("data/text_sha256", "x", "text_sha256 is 'x' in the checkpoint and 'ab' now; use the"),
        ("config/architecture/rope_theta", 5.0, "rope_theta is 5.0 in the checkpoint and 10000.0"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(saved, tmp_path, place, value, message):
    state, model = copy.deepcopy(saved), new_model()
    *path, last = place.split("/")
    part = state
    for key in path:
        part = part[int(key) if key.isdigit() else key]
    part[int(last) if last.isdigit() else last] = value
    with pytest.raises(CheckpointError, match=message):
        resume.restore(tmp_path, state, EXPECTED, model, make_optimizer(model, CONFIG.train), ())


def test_weights_moments_and_random_states_are_restored_and_the_optimizer_keeps_its_settings(
    saved, tmp_path
):
    model = new_model()
    model.norm.weight.data.zero_()
    torch.rand(1)
    changes = {"weight_decay": 0.7, "learning_rate": 0.5}
    optimizer = make_optimizer(model, CONFIG.train.model_copy(update=changes))
    resume.restore(tmp_path, saved, EXPECTED, model, optimizer, ())
    assert torch.equal(torch.get_rng_state(), saved["random"]["torch"])
    assert all(torch.equal(saved["model"][name], t) for name, t in hf_state_dict(model).items())
    group = optimizer.param_groups[0]
    assert (group["weight_decay"], group["lr"]) == (0.7, 0.5)
    moments = saved["optimizer"]["state"]
    for index, parameter in enumerate(p for g in optimizer.param_groups for p in g["params"]):
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[parameter][key], moments[index][key])


def test_allowed_differences_are_a_table_and_prefixes_of_wrappers_are_ignored(
    saved, tmp_path, capsys
):
    state, model = copy.deepcopy(saved), new_model()
    weights = state["model"].items()
    state["model"] = {f"module._orig_mod.{n.removeprefix('model.')}": t for n, t in weights}
    state["config"]["train"]["learning_rate"] = 0.2
    del state["random"]["python"]
    optimizer, allowed = make_optimizer(model, CONFIG.train), ["train.learning_rate", "random"]
    resume.restore(tmp_path, state, EXPECTED, model, optimizer, allowed)
    assert all(torch.equal(saved["model"][name], t) for name, t in hf_state_dict(model).items())
    printed = capsys.readouterr().out
    assert "config.train.learning_rate  0.2  0.1\n" in printed
    assert "Note: the prefixes `module.` and `_orig_mod.` in " in printed
    assert "Note: train.learning_rate, python as allowed: the resume is not exact" in printed


def test_all_problems_of_weights_are_one_line(tmp_path):
    model = new_model()
    first, *_ = hf_state_dict(model)
    with pytest.raises(CheckpointError, match=f"{first} is torch.int32, expected torch.float32 or"):
        load_weights(model, hf_state_dict(model) | {first: torch.ones(3).int()}, tmp_path)
    with pytest.raises(CheckpointError, match="is missing, and 14 more; choose another file"):
        load_weights(model, {}, tmp_path)
