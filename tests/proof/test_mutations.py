"""Each mutation changes what it says, is undone afterwards, and has its curve."""

import json

import pytest
import torch

import SmolLm3
from conftest import ROOT
from SmolLm3 import hf_state_dict
from workflow.files import weights_sha256
from workflow.proof import copy_reference, mutations
from workflow.proof.checks import training_loss
from workflow.training import NextTokenLoss

IDS = torch.arange(3, 43)[None]


@pytest.mark.parametrize("name", list(mutations.MUTATIONS))
def test_a_mutation_is_undone_afterwards(name, reference):
    assert mutations.MUTATIONS[name].__doc__
    model = copy_reference(reference)
    before = weights_sha256(hf_state_dict(model))
    parts = (SmolLm3.rotate, SmolLm3.visible_positions, SmolLm3.F, NextTokenLoss.forward)
    with torch.no_grad():
        right = model(IDS), training_loss(model, IDS)
        with mutations.MUTATIONS[name](model):
            wrong = model(IDS), training_loss(model, IDS)
        again = model(IDS), training_loss(model, IDS)
    same = all(map(torch.equal, right, wrong))
    assert same == (name == mutations.BASELINE)
    assert all(map(torch.equal, right, again))
    assert parts == (SmolLm3.rotate, SmolLm3.visible_positions, SmolLm3.F, NextTokenLoss.forward)
    assert weights_sha256(hf_state_dict(model)) == before
    assert model.lm_head.weight is model.embed_tokens.weight


def test_positions_over_the_heads_know_no_order(reference):
    """All positions are turned alike: with the mask open, a shuffled text is the same text."""
    model = copy_reference(reference)
    order = torch.randperm(IDS.shape[1])
    opened = mutations.MUTATIONS["no causal mask"](model)
    with torch.no_grad(), opened, mutations.MUTATIONS["positions over heads"](model):
        shuffled = model(IDS[:, order])
        torch.testing.assert_close(shuffled, model(IDS)[:, order], rtol=0, atol=1e-5)


@pytest.fixture
def short(config, tmp_path):
    settings = config.mutations.model_copy(
        update={
            "steps": 3,
            "tokens": 40,
            "record": tmp_path / "record.json",
            "other_learning_rates": (0.1,),
        }
    )
    return config.model_copy(update={"mutations": settings})


def test_the_study_is_saved_and_read_again(short, reference, capsys):
    model = copy_reference(reference)
    before = weights_sha256(hf_state_dict(model))
    results, curves = mutations.study(model, reference, short)
    assert weights_sha256(hf_state_dict(model)) == before
    assert [row.name for row in results] == list(mutations.MUTATIONS)
    assert [row.name for row in results if row.failed_check is None] == [mutations.BASELINE]
    assert len(curves) == len(mutations.MUTATIONS) + 3
    assert all(len(curve.losses) == 3 for curve in curves)
    baseline = curves[0]
    assert baseline.name == mutations.BASELINE and baseline.losses[-1] < baseline.losses[0]

    settings = short.mutations.model_copy(update={"steps": 0})
    read = mutations.study(model, reference, short.model_copy(update={"mutations": settings}))[1]
    assert [(curve.name, curve.rate, curve.after) for curve in read] == [
        (curve.name, curve.rate, curve.after) for curve in curves
    ]
    assert "Curves read from" in capsys.readouterr().out
    table = mutations.table(results, read, settings)
    assert list(table.index) == list(mutations.MUTATIONS)
    assert table.loc[mutations.BASELINE, "failed_check"] == "none"
    assert table.loc[mutations.BASELINE, "trained"] == round(baseline.after, 3)
    assert mutations.table(results, [], settings)["trained"].isna().all()
    lowest = [min(curve.losses) for curve in read]
    assert list(mutations.curve_table(read)["lowest"]) == pytest.approx(lowest, abs=1e-3)
    assert mutations.curve_table([]).empty


def test_a_record_of_other_weights_or_text_is_not_read(short):
    file, origin = short.mutations.curves_file, {"weights_sha256": "a", "text_sha256": "b"}
    curve = mutations.Curve("x", 1e-4, [1.0], 1.0)
    mutations.save_curves([curve], file, origin)
    assert mutations.load_curves(file, origin) == [curve]
    assert mutations.load_curves(file, origin | {"weights_sha256": "c"}) == []
    assert mutations.load_curves(file, origin | {"text_sha256": "c"}) == []
    assert mutations.load_curves(file.with_name("none.json"), origin) == []


def test_the_committed_record_can_be_read():
    file = ROOT / "docs" / "mutations.json"
    record = json.loads(file.read_text("utf-8"))
    origin = {key: record[key] for key in ("weights_sha256", "text_sha256", "batch")}
    curves = mutations.load_curves(file, origin)
    assert list(dict.fromkeys(curve.name for curve in curves)) == list(mutations.MUTATIONS)
