"""The programs of `make bench-peers` compute the same; a row of another model is refused."""

import dataclasses
import math
import os
import re

import pytest

import busy
import clients
import compare
from SmolLm3 import LlamaModel, load_hf_weights
from workflow import OPENMP_VARIABLES
from workflow.errors import WorkflowError
from workflow.reference import load_exported
from workflow.tools.bench import OURS, Case, random_tokens


@pytest.mark.slow
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
    assert "skipped: litgpt is not installed" in err


def test_results_of_another_model_are_refused(config, reference):
    load_hf_weights(model := LlamaModel(reference.config), reference.state_dict)
    model.embed_tokens.weight.data *= 30  # else all tokens are about as likely
    prompt = random_tokens(reference.config.vocab_size, 1, compare.PROMPT)
    space = compare.Workspace(None, config, model, prompt[0].tolist())
    (best,) = model.generate(prompt, 4)[:, compare.PROMPT :].tolist()
    generation, step = (Case(task, 1, 4) for task in (compare.GENERATION, compare.STEP))
    compare.check_results(generation, space, [best], [best])
    compare.check_results(step, space, [4.0, 3.5], [4.0009, 3.5])
    other = [*best[:3], (best[3] + 1) % 50]
    refused = [(generation, [best], [best[:3]]), (generation, [best], [other])]
    refused += [(step, [4.0, 3.5], [4.0, other]) for other in (3.5011, math.nan)]
    for case, *results in refused:
        with pytest.raises(WorkflowError, match="the results differ"):
            compare.check_results(case, space, *results)


def test_a_client_with_other_logits_fails(config, monkeypatch, capsys):
    def client(error: float) -> tuple:
        return "here", lambda folder, ids: load_exported(folder)[0](ids) + error, "logits"

    with compare.workspace(config) as space:
        clients.write_ours(space)
        monkeypatch.setitem(clients.CLIENTS, "torch", client(0.0))
        clients.compare_with_ours("torch", space.folder)
        assert re.match(r"torch 2\..*: logits differ by .*: passed\n", capsys.readouterr().out)
        for error in (2e-4, math.nan):
            monkeypatch.setitem(clients.CLIENTS, "torch", client(error))
            with pytest.raises(SystemExit, match=r"torch .* differ by .*: FAILED"):
                clients.compare_with_ours("torch", space.folder)


@pytest.mark.slow
def test_steps_are_measured_quiet_and_beside_a_busy_program(config, monkeypatch):
    monkeypatch.setitem(busy.MODELS, "small", (64, 2))
    report = busy.report(config, rounds=1)
    rows = re.findall(r"^\| (\w+), (.+?) \| (\d+) \| (\d+) \| ([\d.]+) \| ([\d.]+)", report, re.M)
    assert [row[:2] for row in rows] == [(m, s) for m in ("tiny", "small") for s in busy.SETTINGS]
    assert [row[5] for row in rows if row[1] == "torch's default"] == ["1.00"] * 2
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    with busy.environment({"OMP_WAIT_POLICY": "PASSIVE"}):
        assert os.environ.keys() & OPENMP_VARIABLES == {"OMP_WAIT_POLICY"}
    assert os.environ["GOMP_SPINCOUNT"] == "7"
