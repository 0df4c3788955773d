"""The programs of `make bench-peers` compute the same; a row of another model is refused."""

import dataclasses
import re

import pytest
import torch

import compare
import plain
from SmolLm3 import LlamaModel, load_hf_weights
from workflow.errors import WorkflowError
from workflow.tools.bench import OURS, Case, random_tokens
from workflow.training import TrainStep

STEPS = 3


def test_the_plain_loop_has_the_losses_of_our_training_step(config, reference):
    tokens = random_tokens(reference.config.vocab_size, 2, 17)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    changes = {"batch_size": 2, "sequence_length": 16, "warmup_steps": 0}
    settings, losses = config.train.model_copy(update=changes), []

    def turn(loss: torch.Tensor) -> None:
        losses.append(loss.item())
        if len(losses) == STEPS:
            raise StopIteration

    model = plain.GPT(vars(reference.config), reference.state_dict)
    with pytest.raises(StopIteration):
        plain.train(lambda: model(inputs, targets), model, settings.model_dump(), turn)
    load_hf_weights(copy := LlamaModel(reference.config), reference.state_dict)
    step = TrainStep(copy, settings, torch.device("cpu"))
    ours = [(step(0, inputs, targets), step.metrics()[0]["loss"])[1] for _ in range(STEPS)]
    assert losses == pytest.approx(ours, abs=1e-5) and losses[-1] < losses[0]


def test_a_program_that_computes_something_else_or_is_missing_has_no_row(
    config, tmp_path, monkeypatch, capsys
):
    ours, same = (Case(compare.STEP, 2, 16, name) for name in (OURS, compare.PLAIN))
    shorter, missing = dataclasses.replace(same, length=8), Case("", 1, 8, compare.LITGPT)
    monkeypatch.setattr(compare, "cases", lambda: [(ours, x) for x in (same, shorter, missing)])
    monkeypatch.setattr(compare, "PEERS", tmp_path)
    assert compare.report(config, 2, "") == 1
    out, err = capsys.readouterr()
    assert re.match(r"20\d\d-\d\d-\d\d; .* threads; float32\ntorch .*, litgpt [\d.]+", out)
    numbers = (
        r"[\d.]+ \| plain loop \| [\d.]+ \| [\d.]+ \([\d.]+ to [\d.]+\) \| [\d.]+ \| [\d.]+ \|"
    )
    *_, row = out.splitlines()
    assert re.fullmatch(rf"\| training step, 2 × 16 tokens, this project \| {numbers}", row)
    assert "8 tokens, plain loop: the results differ by" in err
    assert "skipped: litgpt: its environment is not installed" in err


def test_greedy_tokens_may_differ_only_where_two_are_close(config, reference):
    load_hf_weights(model := LlamaModel(reference.config), reference.state_dict)
    model.embed_tokens.weight.data *= 30  # else all tokens are about as likely
    prompt = random_tokens(reference.config.vocab_size, 1, compare.PROMPT)
    space = compare.Workspace(None, config, model, prompt[0].tolist())
    best = model.generate(prompt, 4)[:, compare.PROMPT :].tolist()
    case = Case(compare.GENERATION, 1, 4)
    compare.check_results(case, space, best, best)
    for other in ([best[0][:3]], [[*best[0][:3], (best[0][3] + 1) % 50]]):
        with pytest.raises(WorkflowError, match="the results differ"):
            compare.check_results(case, space, best, other)
