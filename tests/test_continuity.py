"""The story's own claim, in separate processes: 5000 steps, a stop and 50 more are 5050 steps."""

import json
import os
import subprocess
import sys

import torch

from workflow import checkpoint

ONE_PROCESS = """
import sys
from workflow.config import load_config
from workflow.reference import load_reference
from workflow.training import Run

config = load_config(profile="ci", overrides=["paths.checkpoints=straight", "paths.runs=straight"])
run = Run(config, load_reference("random", config.member))
list(run.until(5050))
run.save()
run.close()
"""


def same(a, b) -> bool:
    """Whether two checkpoints hold the same: weights, moments, random states and all else."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_5050_steps_with_a_stop_equal_5050_steps_without(story, command):
    straight = subprocess.Popen([sys.executable, "-c", ONE_PROCESS], cwd=story, env=os.environ)
    trained = command("train")
    assert trained.returncode == 0, trained.stderr
    (path,) = story.glob("checkpoints/*/checkpoint_5000.pt")
    resumed = command("resume", str(path))
    assert resumed.returncode == 0, resumed.stderr
    assert straight.wait(300) == 0

    def losses(folder: str) -> list[float]:
        (file,) = story.glob(f"{folder}/*/metrics.jsonl")
        rows = map(json.loads, file.read_text().splitlines())
        return [row["loss"] for row in rows if "loss" in row]

    assert len(losses("runs")) == 5050
    assert losses("runs") == losses("straight")
    (stopped,) = story.glob("checkpoints/*/checkpoint_5050.pt")
    (unstopped,) = story.glob("straight/*/checkpoint_5050.pt")
    assert same(checkpoint.load(stopped), checkpoint.load(unstopped))
