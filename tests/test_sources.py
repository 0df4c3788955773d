"""Where the text comes from: files, folders, and the Hub, played on loopback for `datasets`."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from loopback import COMMIT, Fault, serve
from pyarrow import parquet
from test_documents import ARTICLES, LINES

from conftest import ROOT
from workflow.config import load_config
from workflow.documents import DataError
from workflow.sources import find_source

CARD = """\
---
configs:
- config_name: wikitext-103-raw-v1
  data_files:
  - {split: train, path: wikitext-103-raw-v1/train-*}
- config_name: wikitext-2-v1
  data_files:
  - {split: train, path: wikitext-2-v1/train-*}
- config_name: wikitext-2-raw-v1
  data_files:
  - {split: test, path: wikitext-2-raw-v1/test-*}
  - {split: train, path: wikitext-2-raw-v1/train-*}
  - {split: validation, path: wikitext-2-raw-v1/validation-*}
---
# A small wikitext
"""
TRAIN = [*LINES, " = Three = \n", *[f" line {number} \n" for number in range(60)]]
HELD_OUT = [" = Held out = \n", *[f" row {number} \n" for number in range(60)]]


def settings(**changed):
    data = load_config(ROOT / "SmolLm3_Config.yaml", "quick").data
    return data.model_copy(update=changed)


# --- files and folders ----------------------------------------------------------------------------


def test_a_folder_is_read_as_datasets_splits_it_and_what_is_left_out_is_said(tmp_path, capsys):
    for name in ("train-2.txt", "train-1.txt", "valid.txt", "test.txt", "other.jsonl"):
        (tmp_path / name).write_text("x")
    source = find_source(settings(source=str(tmp_path)))
    assert [file.name for file in source.train] == ["train-1.txt", "train-2.txt"]
    assert [file.name for file in source.validation] == ["valid.txt"]
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"Note: {tmp_path / 'other.jsonl'} is of another kind")


def test_a_folder_without_names_of_splits_is_all_trained_on(tmp_path):
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text("x")
    source = find_source(settings(source=str(tmp_path)))
    assert [file.name for file in source.train] == ["a.txt", "b.txt"]
    assert source.validation == ()


def test_an_empty_folder_and_one_without_a_training_part_are_refused_in_one_line(tmp_path):
    with pytest.raises(DataError) as caught:
        find_source(settings(source=str(tmp_path)))
    assert str(tmp_path) in str(caught.value)
    (tmp_path / "test.txt").write_text("x")
    with pytest.raises(DataError, match="no files to train on, but of: test"):
        find_source(settings(source=str(tmp_path)))


# --- the Hub --------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path):
    """A server with a small wikitext, in the layout of the real one."""
    files = {"README.md": CARD.encode(), ".gitattributes": b"x"}
    rows = {"train": TRAIN, "validation": HELD_OUT, "test": ["x"]}
    path = tmp_path / "part.parquet"
    for split, lines in rows.items():
        parquet.write_table(pyarrow.table({"text": lines}), path)
        files[f"wikitext-2-raw-v1/{split}-00000-of-00001.parquet"] = path.read_bytes()
    files["wikitext-103-raw-v1/train-00000-of-00001.parquet"] = path.read_bytes()
    with serve({"datasets/Salesforce/wikitext": files}) as hub:
        yield hub


@pytest.fixture
def train(hub, command, tmp_path):
    """`python main.py train` for a few steps, with a client that knows only this server."""
    client = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "NO_PROXY": "127.0.0.1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "1",
        "HF_HUB_ETAG_TIMEOUT": "1",
    }
    chosen = ("train.steps=2", "train.validation_tokens=32", f"data.revision={COMMIT}")

    def run(*sets: str, source: str = "auto", **environment: str):
        parts = (f"data.source={source}", *chosen, *sets)
        options = [word for part in parts for word in ("--set", part)]
        return command("train", *options, **client | environment)

    run.client = client
    return run


def data_line(result) -> str:
    assert result.returncode == 0, result.stderr
    return next(line for line in result.stdout.splitlines() if line.startswith("Data: "))


def test_wikitext_comes_from_the_hub_and_then_from_its_cache(hub, train, story):
    told = data_line(train())
    assert told.startswith("Data: Salesforce/wikitext wikitext-2-raw-v1, 4 documents, ")
    assert f"(revision {COMMIT}, text sha256 " in told
    texts = ["".join(ARTICLES), "".join(TRAIN[len(LINES) :]), "".join(HELD_OUT)]
    one, two = ARTICLES
    assert (
        f"{len(one) + len(two) + len(texts[1])} tokens to train on, " in told
    )  # bytes, ends for \n
    assert f"{len(texts[2])} held out" in told
    (made_of,) = (story / "runs").glob("*/made_of.json")
    assert f'"text_revision": "{COMMIT}"' in made_of.read_text()

    hub.asked.clear()
    assert data_line(train(HF_HUB_OFFLINE="1")) == told
    assert hub.asked == []


def test_what_datasets_has_in_its_cache_is_found_there(hub, train):
    code = "from datasets import load_dataset\n"
    code += f"load_dataset('Salesforce/wikitext', 'wikitext-2-raw-v1', revision='{COMMIT}')"
    environment = os.environ | train.client
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)
    hub.asked.clear()
    told = data_line(train(HF_HUB_OFFLINE="1"))
    assert told.startswith("Data: Salesforce/wikitext wikitext-2-raw-v1, 4 documents, ")
    assert hub.asked == []


def test_offline_with_an_empty_cache_the_commands_that_are_given_fetch_all(hub, train):
    result = train(source="hub", HF_HUB_OFFLINE="1")
    assert result.returncode == 5
    (line,) = result.stderr.splitlines()
    typed = shlex.split(line.partition("type: ")[2])
    typed[0] = str(Path(sys.executable).with_name(typed[0]))
    subprocess.run(typed, env=os.environ | train.client, check=True, capture_output=True)
    hub.asked.clear()
    assert data_line(train(source="hub", HF_HUB_OFFLINE="1")).startswith("Data: Salesforce/wiki")
    assert hub.asked == []


def test_without_the_hub_the_projects_own_text_is_taken_and_the_reason_given(hub, train):
    hub.fault = Fault(503)
    result = train()
    assert data_line(result).startswith("Data: input.txt, ")
    why = "the Hub answered 503 Service Unavailable"
    passed = f"The Hub is passed over: Salesforce/wikitext: {why}. Data: input.txt"
    assert result.stdout.count(passed) == result.stdout.count("passed over") == 1


@pytest.mark.parametrize(
    ("fault", "sets", "code", "words"),
    [
        (None, ["data.name=wikitext-9"], 2, "no configuration 'wikitext-9', but wikitext-103-raw"),
        (None, ["data.name=wikitext-2-v1"], 2, "no files to train on"),
        (None, ["data.column=content"], 2, "no column 'content', but text"),
        (None, ["data.dataset=Salesforce/absent"], 5, "the Hub answered 404 Not Found; mend its"),
        (None, ["data.dataset=no id at all"], 5, "no id at all: "),
        (Fault("wrong", "train-.*parquet"), [], 5, "arrived with another sha256 than the Hub's"),
        (Fault("cut", "parquet"), [], 5, "the download failed (peer closed connection"),
    ],
)
def test_each_trouble_is_one_line(hub, train, fault, sets, code, words):
    hub.fault = fault
    result = train(*sets, source="hub")
    assert result.returncode == code, result.stdout + result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and words in line


def test_a_damaged_parquet_is_one_line(hub, train):
    files = hub.repositories["datasets/Salesforce/wikitext"]
    name = "wikitext-2-raw-v1/train-00000-of-00001.parquet"
    files[name] = files[name][:-20]
    result = train(source="hub")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "train-00000-of-00001.parquet: it cannot be read as parquet" in line
