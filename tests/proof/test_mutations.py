"""Each mutation changes the model, a check finds it, and it is removed again."""

import json

import pytest
import torch

import SmolLm3
from conftest import ROOT
from SmolLm3 import hf_state_dict
from workflow.analysis.states import state_names
from workflow.errors import WorkflowError
from workflow.files import weights_sha256
from workflow.proof import copy_reference, mutations
from workflow.proof.compared import Original, OurModel, encode_prompt
from workflow.proof.mistakes import BASELINE, MUTATIONS, RANDOM_HEAD, SHIFTED_TWICE
from workflow.proof.prompts import LONG_PROMPT
from workflow.training import NextTokenLoss

IDS = torch.arange(3, 43)[None]


def patched_parts() -> list:
    classes = SmolLm3.LlamaDecoderLayer, SmolLm3.LlamaMLP, SmolLm3.LlamaRMSNorm, NextTokenLoss
    functions = [SmolLm3.rotate, SmolLm3.visible_positions, SmolLm3.F]
    return functions + [owner.forward for owner in classes]


@pytest.mark.parametrize("name", list(MUTATIONS))
def test_a_mutation_changes_the_model_and_is_removed_again(name, reference):
    model = copy_reference(reference)
    before = weights_sha256(hf_state_dict(model))
    parts = patched_parts()
    with torch.no_grad():
        original = model(IDS), OurModel(model).loss(IDS)
        with MUTATIONS[name](model):
            mutated = model(IDS), OurModel(model).loss(IDS)
        again = model(IDS), OurModel(model).loss(IDS)
    assert all(map(torch.equal, original, mutated)) == (name == BASELINE)
    assert all(map(torch.equal, original, again))
    assert parts == patched_parts()
    assert weights_sha256(hf_state_dict(model)) == before
    assert model.lm_head.weight is model.embed_tokens.weight


def test_results_and_curves_are_computed_saved_and_loaded_also_after_an_interrupt(
    config, reference, tmp_path, capsys, monkeypatch
):
    settings = {"tokens": 40, "steps": 3, "other_learning_rates": (0.1,)}
    settings["curves_file"] = tmp_path / "curves.json"
    config = config.model_copy(update={"mutations": config.mutations.model_copy(update=settings)})
    model = copy_reference(reference)
    before = weights_sha256(hf_state_dict(model))
    train, trained = mutations.train_mutation, []

    def train_until_interrupted(name, rate, *rest):
        trained.append((name, rate))
        if len(trained) == 4:
            raise KeyboardInterrupt("in the fourth")
        return train(name, rate, *rest)

    monkeypatch.setattr(mutations, "train_mutation", train_until_interrupted)
    with pytest.raises(KeyboardInterrupt, match="in the fourth"):
        mutations.run_mutations(model, reference, config)
    partial = json.loads((tmp_path / "curves.json.partial").read_text("utf-8"))
    assert (partial["seed"], partial["eps"]) == (config.run.seed, config.mutations.eps)
    results, curves = mutations.run_mutations(model, reference, config)
    assert len(trained) == len(curves) + 1 and trained[3] == trained[4]
    assert [path.name for path in tmp_path.glob("curves*")] == ["curves.json"]
    assert weights_sha256(hf_state_dict(model)) == before
    assert [result.name for result in results] == list(MUTATIONS)
    passed = [result.name for result in results if result.failed_check is None]
    assert passed == [BASELINE] == [curves[0].name]
    assert [len(curve.losses) for curve in curves] == [3] * (len(MUTATIONS) + 4)
    assert curves[0].losses[-1] < curves[0].losses[0]

    settings = config.mutations.model_copy(update={"steps": 0})
    config = config.model_copy(update={"mutations": settings})
    assert mutations.run_mutations(model, reference, config)[1] == curves
    assert "Curves read from" in capsys.readouterr().out
    table = mutations.result_table(results, curves, config.mutations.learning_rate)
    assert table["loss_after_training"].iloc[0] == round(curves[0].held_out_loss, 3)
    assert mutations.result_table(results, [], 1.0)["loss_after_training"].isna().all()
    assert mutations.curve_table([]).empty


def test_curves_are_loaded_only_for_the_same_weights_and_text(tmp_path):
    file = ROOT / "docs" / "mutations.json"
    content = json.loads(file.read_text("utf-8"))
    provenance = {key: content[key] for key in ("weights_sha256", "text_sha256", "batch")}
    curves = mutations.load_curves(file, provenance)
    recorded = list(dict.fromkeys(curve.name for curve in curves))
    assert recorded == list(MUTATIONS)
    for key in provenance:
        assert mutations.load_curves(file, provenance | {key: "another"}) == []
    assert mutations.load_curves(tmp_path / "absent.json", provenance) == []
    damaged = tmp_path / "damaged.json"
    damaged.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(WorkflowError, match=r"damaged\.json: .*; remove it, or name another"):
        mutations.load_curves(damaged, provenance)


@pytest.mark.slow
def test_each_mutation_of_the_real_weights_fails_in_the_right_place(smollm2):
    model, ids = copy_reference(smollm2), encode_prompt(smollm2, LONG_PROMPT)[:, :48]
    with torch.no_grad():
        theirs = Original(smollm2.model).states(ids, state_names(30))
    found = {
        name: mutations.check_mutation(name, model, smollm2, smollm2.state_dict, ids, theirs)
        for name in MUTATIONS
    }
    assert found[BASELINE].failed_check is None
    assert found[RANDOM_HEAD].where == "lm_head.weight"
    assert found[SHIFTED_TWICE].failed_check == "loss matches"
    others = set(found) - {BASELINE, RANDOM_HEAD, SHIFTED_TWICE}
    assert {found[name].where for name in others} == {"layers.0"}
    # a low loss is no proof
    assert found["no causal mask"].loss < found[BASELINE].loss
