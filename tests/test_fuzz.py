"""Random YAML, overrides and texts give a result, or an error of one line.

FUZZ_CASES is the number of cases of each test: `make torture` tries a thousand.
"""

import copy
import os
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from conftest import ROOT
from workflow.config.load import load_config
from workflow.data import Source, load_corpus
from workflow.errors import WorkflowError

pytestmark = pytest.mark.slow
YAML = ROOT / "SmolLm3_Config.yaml"
ONE_LINE = re.compile(".{1,2000}")
VALID = yaml.safe_load(YAML.read_text())
PATHS = [("model",), ("profile",), ("profiles", "ci", "train"), ("models", "tiny", "architecture")]
PATHS += [(table, key) for table in ("train", "data", "sample", "run") for key in VALID[table]]
PATHS += [(*PATHS[3], key) for key in VALID["models"]["tiny"]["architecture"]]

fuzzed = settings(
    max_examples=int(os.environ.get("FUZZ_CASES", "100")),
    deadline=20_000,  # milliseconds for one case, to detect hangs
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.sampled_from([0, -1, 2**70])
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(scalars, inner, max_size=3),
    max_leaves=6,
)
files = st.one_of(st.binary(max_size=200), st.text(max_size=200))
keys = st.one_of(st.text(max_size=60), st.sampled_from(PATHS).map(".".join))
parts = ["\ufeff", " = A = \n", " = = B = = \n", "\r\n", "\n", "words and more", "\0", " = \n"]
headings = st.lists(st.sampled_from(parts), max_size=12).map("".join)


def write(file: Path, content: bytes | str) -> None:
    data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    file.write_bytes(data)


def outcome(path: Path, *overrides: str) -> str:
    """The error of a configuration, or "accepted". Any other error than ours is raised."""
    try:
        load_config(path, "ci", overrides)
    except WorkflowError as error:
        return str(error)
    return "accepted"


@fuzzed
@given(content=files)
@example(content=":")  # a key that is no text
def test_any_file_is_a_configuration_or_refused(tmp_path, content):
    write(tmp_path / "fuzz.yaml", content)
    assert ONE_LINE.fullmatch(outcome(tmp_path / "fuzz.yaml"))


@fuzzed
@given(path=st.sampled_from(PATHS), value=values)
def test_any_value_of_a_key_is_accepted_or_refused(tmp_path, path, value):
    table = changed = copy.deepcopy(VALID)
    for key in path[:-1]:
        table = table[key]
    table[path[-1]] = value
    (tmp_path / "fuzz.yaml").write_text(yaml.safe_dump(changed, allow_unicode=False))
    assert ONE_LINE.fullmatch(outcome(tmp_path / "fuzz.yaml"))


@fuzzed
@given(key=keys, value=st.text())
def test_any_override_is_accepted_or_refused(key, value):
    assert ONE_LINE.fullmatch(outcome(YAML, f"{key}={value}"))


@pytest.fixture
def short(tmp_path):
    changes = ("data.validation_fraction=0.3", "train.sequence_length=4", f"paths.cache={tmp_path}")
    return load_config(YAML, "ci", changes)


@fuzzed
@given(content=st.one_of(st.binary(max_size=300), st.text(max_size=300), headings))
def test_any_text_is_trained_on_or_refused(tmp_path, reference, short, content):
    file, tokenizer = tmp_path / "fuzz.txt", reference.tokenizer.backend_tokenizer
    write(file, content)
    try:
        corpus = load_corpus(short, tokenizer, 0, Source(file.name, (file,)))
    except WorkflowError as error:
        assert ONE_LINE.fullmatch(str(error))
    else:
        assert np.concatenate([corpus.train, corpus.validation]).max() < 257
