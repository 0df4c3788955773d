"""All checks pass for the copy, and for no mutation of it."""

import json
import re

import pytest
import torch

import SmolLm3
from conftest import ROOT
from workflow.analysis import states
from workflow.config import load_config
from workflow.files import weights_sha256
from workflow.proof import BOUNDS, Check, as_json, copy_reference, failed_checks, mutations, verify
from workflow.proof.bounds import largest
from workflow.proof.checks import PROMPTS, copied, encode, pad, reference_loss, run_checks
from workflow.proof.prompts import LONG_PROMPT
from workflow.reference import load_reference
from workflow.training import NextTokenLoss

TEXT = "Once upon a time, 12 trees stood in a row.\n" * 30


@pytest.fixture
def lively(config):
    """A random reference whose layers matter: with the tiny initial std they hardly do."""
    architecture = config.model_entry.architecture
    wide = SmolLm3.ModelConfig(**{**vars(architecture), "initializer_range": 0.3})
    return load_reference("random", config.model_entry.model_copy(update={"architecture": wide}))


def checks_of(model, reference, config) -> dict[str, Check]:
    return {check.name: check for check in run_checks(model, reference, config.proof, TEXT)}


def test_the_copy_is_the_original(config, lively, capsys):
    checks = verify(copy_reference(lively), lively, config.proof, TEXT)
    assert [check.name for check in checks] == list(BOUNDS)
    assert failed_checks(checks) == []
    assert [check.name for check in checks if check.passed is None] == list(BOUNDS)[:4]
    assert {check.name: check.value for check in checks}["logits match"] == 0.0
    printed = capsys.readouterr().out
    assert "Model loaded. Total params: 26816\nHF model params: 26816\n" in printed
    assert "Missing keys: [], extra keys: []" in printed
    assert len(re.findall(r"\d +passed\b", printed)) == len(BOUNDS) - 4 and "FAILED" not in printed
    assert re.search(r"\n24 of 28 checks passed, 4 skipped, in \d+ s\n$", printed)


def test_quick_skips_long_texts_and_bf16(config, lively):
    quick = config.model_copy(update={"proof": config.proof.model_copy(update={"quick": True})})
    names = list(checks_of(copy_reference(lively), lively, quick))
    assert names == list(BOUNDS)[: list(BOUNDS).index("logits match, 2048 tokens")]


@pytest.mark.parametrize("name", [x for x in mutations.MUTATIONS if x != mutations.BASELINE])
def test_no_mutation_passes(config, lively, name):
    model = copy_reference(lively)
    with mutations.MUTATIONS[name](model):
        assert failed_checks(list(checks_of(model, lively, config).values())) != []


def test_one_changed_weight_is_found_and_named(config, lively):
    model = copy_reference(lively)
    with torch.no_grad():
        model.layers[1].self_attn.v_proj.weight[3, 5] += 1e-2
    checks = checks_of(model, lively, config)
    assert checks["tensor values match"].value == 1
    assert checks["tensor values match"].detail == "model.layers.1.self_attn.v_proj.weight"
    layers = checks["hidden states match, layer by layer"]
    assert layers.first_failure == "layers.1" and layers.detail.startswith("first: layers.1, by ")
    assert layers.parts["layers.0"] == 0.0
    assert checks["gradients match"].passed is False


def test_a_greedy_token_that_differs_is_reported_with_its_margin(config, lively, monkeypatch):
    generate = lively.model.generate

    def one_other(batch, **options):
        tokens = generate(batch, **options)
        tokens[0, batch.shape[1] + 2] = (tokens[0, batch.shape[1] + 2] + 1) % 257
        return tokens

    monkeypatch.setattr(lively.model, "generate", one_other)
    check = checks_of(copy_reference(lively), lively, config)["greedy tokens match"]
    assert check.value == 2  # once in the batch, once in the long prompt
    assert check.detail.startswith("first: prose, token 3, where transformers' best two are ")


def test_a_logit_that_is_nan_fails(config, lively):
    model = copy_reference(lively)
    with torch.no_grad():
        model.embed_tokens.weight[300 % 257] = float("nan")
    assert checks_of(model, lively, config)["logits match"].passed is False


def test_the_reference_is_unchanged_afterwards(config, lively):
    before = lively.provenance.weights_sha256
    checks_of(copy_reference(lively), lively, config)
    assert weights_sha256(dict(lively.model.named_parameters())) == before
    assert lively.model.config._attn_implementation == "sdpa"
    assert not any(parameter.requires_grad for parameter in lively.model.parameters())


def test_the_references_loss_of_a_batch_is_the_training_steps(lively):
    ids = torch.randint(0, 257, (3, 33), generator=torch.Generator().manual_seed(0))
    batch = ids[:, :-1], ids[:, 1:]
    ours = NextTokenLoss(copy_reference(lively))(*batch).item()
    assert reference_loss(lively, *batch) == pytest.approx(ours, abs=1e-5)


# --- a check, and the measures that it uses ---


def test_a_check_is_printed_and_is_plain_json():
    good, bad = Check("logits match", 1e-5), Check("loss matches", 0.5, "too far")
    out = Check("argmax agrees with llama.cpp", None, "no such file")
    assert [check.passed for check in (good, bad, out)] == [True, False, None]
    assert "FAILED   too far" in str(bad) and "skipped  no such file" in str(out)
    rows = json.loads(json.dumps(as_json([good, bad, out]), allow_nan=False))
    assert [row["passed"] for row in rows] == [True, False, None]
    assert (rows[0]["sign"], rows[0]["bound"]) == ("<=", 1e-4)
    assert Check("argmax agrees with llama.cpp", 0.94).passed is False
    assert Check("logits match", float("nan")).passed is False
    assert as_json([largest("logits match", {"a": float("inf")})])[0]["value"] == "inf"


def test_the_worst_part_and_the_first_beyond_the_bound_are_named():
    check = largest("logits match", {"a": 0.0, "b": 2e-4, "c": 3e-4})
    assert (check.value, check.first_failure) == (3e-4, "b")
    assert check.detail == "first: b, by 2.00e-04; largest of 3: c"


def test_what_cannot_be_compared_is_infinitely_far():
    one = torch.ones(2)
    assert states.max_difference(one, torch.ones(3)) == float("inf")
    assert states.max_difference(one * float("nan"), one) == float("inf")
    assert states.relative_difference(one * 3, one * 2) == 0.5
    assert states.relative_difference(one * 0, one * 0) == 0.0
    assert largest("logits match", {"a": float("inf")}).passed is False
    assert states.relative_difference_by_position(one, torch.ones(3)) == float("inf")
    assert states.relative_difference_by_position(one[None] * float("nan"), one[None]) == float(
        "inf"
    )


def test_a_position_with_huge_values_hides_no_error_of_another():
    theirs = torch.tensor([[[2e4, 1.0], [1.0, 2.0], [0.0, 0.0]]])
    ours = theirs + torch.tensor([[[0.0, 0.0], [0.5, 0.0], [0.0, 0.0]]])
    assert states.relative_difference_by_position(ours, theirs) == 0.25
    assert states.relative_difference(ours, theirs) < 1e-4


def test_divergence_is_zero_only_of_equals():
    logits = torch.randn(1, 4, 9)
    assert states.kl_divergence(logits, logits + 3) == pytest.approx(0.0, abs=1e-6)
    assert states.kl_divergence(logits, -logits) > 0.1


def test_in_bf16_transformers_keeps_its_angles_exact(lively):
    rounded = states.in_bf16(lively.model)
    assert rounded.lm_head.weight.dtype == torch.bfloat16
    angles = rounded.model.rotary_emb.inv_freq
    assert angles.dtype == torch.float32
    assert torch.equal(angles, lively.model.model.rotary_emb.inv_freq)
    assert lively.model.lm_head.weight.dtype == torch.float32


def test_a_config_that_is_not_the_sources_fails(config, lively):
    model = copy_reference(lively)
    model.config = SmolLm3.ModelConfig(**{**vars(model.config), "rope_theta": 777.0})
    checks = {check.name: check for check in copied(model, lively)}
    assert checks["config matches the source"].value == 1
    assert "rope_theta 777.0 is not 10000.0" in checks["config matches the source"].detail


def test_logits_in_chunks_are_those_of_one_pass(lively):
    ids = torch.arange(257)[None].repeat(1, 2)[:, :500]
    with torch.no_grad():
        for model in (lively.model, copy_reference(lively)):
            whole = states.logits(model, ids)
            chunks = torch.cat(list(states.logits_in_chunks(model, ids)), dim=1)
            torch.testing.assert_close(chunks, whole, rtol=0, atol=1e-5)


def test_the_prompts_are_of_different_kinds():
    assert len(PROMPTS) == len({kind for kind, _ in PROMPTS}) == 20


def test_prompts_are_padded_on_the_left():
    batch, mask = pad([torch.tensor([[5, 6, 7]]), torch.tensor([[8]])])
    assert batch.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[True, True, True], [False, False, True]]


# --- the real weights ---


def test_the_real_weights_give_the_references_logits(smollm2):
    model = copy_reference(smollm2)
    ids = torch.cat([encode(smollm2, text)[:, :40] for _, text in PROMPTS[:3]], dim=1)
    with torch.no_grad():
        difference = (model(ids) - smollm2.model(ids).logits).abs().max().item()
    assert difference <= 1e-4


def test_mutations_of_the_real_weights_fail_where_they_are(smollm2):
    model, ids = copy_reference(smollm2), encode(smollm2, LONG_PROMPT)[:, :48]
    with torch.no_grad():
        theirs = states.hidden_states(smollm2.model, ids)
    found = {
        name: mutations.check_mutation(name, model, smollm2, ids, theirs)
        for name in mutations.MUTATIONS
    }
    assert found[mutations.BASELINE].failed_check is None
    assert found[mutations.RANDOM_HEAD].where == "lm_head.weight"
    assert found[mutations.SHIFTED_TWICE].failed_check == "loss matches"
    inside = set(found) - {mutations.BASELINE, mutations.RANDOM_HEAD, mutations.SHIFTED_TWICE}
    assert {found[name].where for name in inside} == {"layers.0"}
    assert found["no causal mask"].loss < found[mutations.BASELINE].loss  # a loss is no proof


@pytest.mark.slow
def test_the_real_weights_pass_the_quick_checks(smollm2):
    config = load_config(ROOT / "SmolLm3_Config.yaml", "quick")
    text = (ROOT / "input.txt").read_text("utf-8")
    checks = verify(copy_reference(smollm2), smollm2, config.proof, text)
    assert failed_checks(checks) == []
    by_name = {check.name: check for check in checks}
    assert [name for name, check in by_name.items() if check.passed is None] == [
        "perplexity matches the stored value"
    ]
    assert by_name["parameter counts match"].detail == "134515008 parameters"
    assert len(by_name["gradients match"].parts) == 272
