"""Each mistake breaks what it says, can be undone, and is told with its curve."""

import pytest
import torch

import SmolLm3
from SmolLm3 import hf_state_dict
from workflow.files import weights_sha256
from workflow.proof import mutations as breaking
from workflow.proof.checks import copy_reference, loss_of
from workflow.training.step import NextTokenLoss

IDS = torch.arange(3, 43)[None]


@pytest.mark.parametrize("name", list(breaking.MISTAKES))
def test_a_mistake_is_undone_afterwards(name, reference):
    model = copy_reference(reference)
    before = weights_sha256(hf_state_dict(model))
    parts = (SmolLm3.rotate, SmolLm3.visible_positions, SmolLm3.F, NextTokenLoss.forward)
    with torch.no_grad():
        right = model(IDS), loss_of(model, IDS)
        with breaking.MISTAKES[name](model):
            wrong = model(IDS), loss_of(model, IDS)
        again = model(IDS), loss_of(model, IDS)
    same = all(map(torch.equal, right, wrong))
    assert same == (name == breaking.TRUTH)
    assert all(map(torch.equal, right, again))
    assert parts == (SmolLm3.rotate, SmolLm3.visible_positions, SmolLm3.F, NextTokenLoss.forward)
    assert weights_sha256(hf_state_dict(model)) == before
    assert model.lm_head.weight is model.embed_tokens.weight


def test_every_mistake_says_what_it_is():
    for name, mistake in breaking.MISTAKES.items():
        assert name == breaking.TRUTH or mistake.__doc__


def test_positions_over_the_heads_know_no_order(reference):
    """All positions are turned alike: with the mask open, a shuffled text is the same text."""
    model = copy_reference(reference)
    order = torch.randperm(IDS.shape[1])
    opened = breaking.MISTAKES["no causal mask"](model)
    with torch.no_grad(), opened, breaking.MISTAKES["positions over the heads"](model):
        shuffled = model(IDS[:, order])
        torch.testing.assert_close(shuffled, model(IDS)[:, order], rtol=0, atol=1e-5)


@pytest.fixture
def short(config, tmp_path):
    settings = config.breaking.model_copy(
        update={"steps": 3, "tokens": 40, "record": tmp_path / "record.json", "other_rates": (0.1,)}
    )
    return config.model_copy(update={"breaking": settings})


def test_the_study_is_kept_and_told_again(short, reference, capsys):
    model = copy_reference(reference)
    before = weights_sha256(hf_state_dict(model))
    broken, curves = breaking.study(model, reference, short)
    assert weights_sha256(hf_state_dict(model)) == before
    assert [row.name for row in broken] == list(breaking.MISTAKES)
    assert [row.name for row in broken if row.rung is None] == [breaking.TRUTH]
    assert len(curves) == len(breaking.MISTAKES) + 3
    assert all(len(curve.losses) == 3 for curve in curves)
    truth = curves[0]
    assert truth.name == breaking.TRUTH and truth.losses[-1] < truth.losses[0]

    settings = short.breaking.model_copy(update={"steps": 0})
    told = breaking.study(model, reference, short.model_copy(update={"breaking": settings}))[1]
    assert [(curve.name, curve.rate, curve.after) for curve in told] == [
        (curve.name, curve.rate, curve.after) for curve in curves
    ]
    assert "Curves told from" in capsys.readouterr().out
    lines = breaking.table(broken, told, settings).splitlines()
    assert len(lines) == 1 + len(breaking.MISTAKES)
    assert lines[1].split()[:3] == ["nothing", "broken", "none"]
    assert lines[1].endswith(f"{truth.after:.3f}")
    assert len(breaking.curve_table(told).splitlines()) == 1 + len(told)


def test_a_record_of_other_weights_or_text_is_not_told(short):
    file, made_of = short.breaking.record, {"weights_sha256": "a", "text_sha256": "b"}
    curve = breaking.Curve("x", 1e-4, [1.0], 1.0)
    breaking.keep([curve], file, made_of)
    assert breaking.told(file, made_of) == [curve]
    assert breaking.told(file, made_of | {"weights_sha256": "c"}) == []
    assert breaking.told(file, made_of | {"text_sha256": "c"}) == []
    assert breaking.told(file.with_name("none.json"), made_of) == []
