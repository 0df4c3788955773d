"""Everything is compared before anything is filled."""

import pytest
import torch

from SmolLm3 import LlamaModel, hf_state_dict
from workflow.errors import CheckpointError, ConfigError
from workflow.training.restoring import check_allowed, compare, fill


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
    with pytest.raises(CheckpointError, match="a is 1 in the checkpoint and 2 now; give the"):
        compare(tmp_path, saved, saved | {"data": {"a": 2}}, ["train", "data"][:1])


def test_only_training_keys_and_random_states_can_be_allowed():
    check_allowed(["train.learning_rate", "random"])
    for name in ("data.text_sha256", "train", "architecture.rope_theta"):
        with pytest.raises(ConfigError, match=f"--allow {name}: this must be as it was"):
            check_allowed([name])


def test_weights_that_do_not_fit_are_named_and_none_is_copied(config, tmp_path):
    model = LlamaModel(config.trained)
    good = {name: tensor.clone() for name, tensor in hf_state_dict(model).items()}
    first, *_ = good
    for change, words in (
        ({first: torch.full_like(good[first], float("nan"))}, f"{first} holds NaN or inf"),
        ({first: good[first].int()}, f"{first} is torch.int32, no float"),
        ({first: good[first][:3]}, f"{first} has shape"),
        ({"extra": good[first]}, "extra is extra"),
    ):
        with pytest.raises(CheckpointError, match=words):
            fill(model, {name: tensor + 1 for name, tensor in good.items()} | change, tmp_path)
        assert all(torch.equal(good[name], now) for name, now in hf_state_dict(model).items())
    with pytest.raises(CheckpointError, match="is missing, and 14 more; choose another file"):
        fill(model, {}, tmp_path)
