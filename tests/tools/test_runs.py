"""Runs are listed and compared. What is no run, or is damaged, takes one line."""

import json
import shutil
import struct

from conftest import SHORT
from workflow.config.load import read_yaml


def test_runs_are_listed_with_what_differs_and_damaged_folders_in_one_line(here, trained, project):
    run, runs = trained.parent.name, project / "runs"
    settings = read_yaml(runs / run / "settings.yaml")
    assert settings["train"]["steps"] == 20 and list(settings["models"]) == ["tiny"]
    changes = ("train.learning_rate=1e-4", "data.source=input.txt", "run.name=other")
    assert here("train", settings=(*SHORT, *changes))[0] == 0
    row = {"step": 1, "loss": "x", "began": "2020"}
    (runs / "empty").mkdir()
    for name, content in (("line", "{"), ("value", json.dumps(row))):
        shutil.copytree(runs / run, runs / name)
        (runs / name / "metrics.jsonl").write_text(content + "\n")
    code, printed, _ = here("runs")
    heading, first, second, *problems = printed.splitlines()
    assert code == 0 and heading.split()[:3] == ["run", "began", "(UTC)"]
    log = [json.loads(line) for line in (runs / run / "metrics.jsonl").open()]
    values = ([row[key] for row in log if key in row] for key in ("loss", "validation_loss"))
    last = [f"{found[-1]:.4f}" for found in values]
    assert first.split()[3:] == ["tiny", "input.txt", "20", *last, "(the", "first)"]
    difference = "train.learning_rate 0.003 → 0.0001, run.name auto → other"
    difference += ", train.min_learning_rate 0.0003 → 1e-05"
    assert second.startswith("other") and second.endswith(difference)
    found = [problem.partition(": ")[2].split(": ")[0] for problem in problems]
    assert found == [f"runs/{name}" for name in ("empty", "line/metrics.jsonl", "value")]


def test_two_runs_are_compared_in_a_picture_and_a_table(here, refused, trained, project):
    assert here("train", settings=(*SHORT, "run.seed=5", "run.name=other"))[0] == 0
    run = trained.parent.name
    *_, held_out, name, seed, path = here("runs", run, "checkpoints/other")[1].splitlines()
    assert held_out.startswith("last held-out loss  ") and len(held_out.split()) == 5
    assert name.split() == ["run.name", "auto", "other"]
    assert seed.split() == ["run.seed", "1234", "5"]
    picture = (project / path.removeprefix("Wrote ")).read_bytes()
    assert picture[:4] == b"\x89PNG" and struct.unpack(">I", picture[16:20]) == (850,)
    assert "there is no such run; see: main.py runs" in refused(2, "runs", run, "absent")
    assert "name two, or none for the list" in refused(2, "runs", run)
