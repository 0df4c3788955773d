"""Random YAML, texts, prompts and token ids give a result, or an error of one line.

Each function tries `cases` inputs and returns the number it tried.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import ROOT
from workflow.analysis import prepare_for_generation, prompt_ids, stream_text
from workflow.config.load import load_config
from workflow.data import Source, load_corpus
from workflow.errors import WorkflowError
from workflow.proof import copy_reference

YAML = ROOT / "SmolLm3_Config.yaml"
SECONDS = 20  # limit for one case, to detect hangs
VALID = yaml.safe_load(YAML.read_text())
PATHS = [("model",), ("profile",), ("profiles", "ci", "train"), ("models", "tiny", "architecture")]
PATHS += [(table, key) for table in ("train", "data", "sample", "run") for key in VALID[table]]
PATHS += [(*PATHS[3], key) for key in VALID["models"]["tiny"]["architecture"]]
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.sampled_from([0, -1, 2**70])
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(scalars, inner, max_size=3),
    max_leaves=6,
)


def run(check: Callable, cases: int, *strategies: st.SearchStrategy) -> int:
    """Calls a check with random values of the strategies; returns the number of calls."""
    options = {"database": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}
    limits = settings(max_examples=cases, deadline=SECONDS * 1000, **options)
    count = 0

    def counted(case) -> None:
        nonlocal count
        count += 1
        check(*case)

    limits(given(st.tuples(*strategies))(counted))()
    return count


def write(file: Path, content: bytes | str) -> None:
    data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    file.write_bytes(data)


def assert_one_line(error: WorkflowError | ValueError) -> None:
    text = str(error)
    assert text and "\n" not in text and len(text) < 2000, text


def fuzz_yaml(folder: Path, cases: int) -> int:
    """Random bytes as the file, random values for its keys, and random overrides."""
    file = folder / "fuzz.yaml"

    def any_file(content) -> None:
        write(file, content)
        load(file)

    def any_value(path, value) -> None:
        table = changed = copy.deepcopy(VALID)
        for key in path[:-1]:
            table = table[key]
        table[path[-1]] = value
        file.write_text(yaml.safe_dump(changed, allow_unicode=False))
        load(file)

    def any_override(key, value) -> None:
        load(YAML, f"{key}={value}")

    def load(path: Path, *overrides: str) -> None:
        try:
            load_config(path, "ci", overrides)
        except WorkflowError as error:
            assert_one_line(error)

    files = st.one_of(st.binary(max_size=200), st.text(max_size=200))
    keys = st.one_of(st.text(max_size=60), st.sampled_from(PATHS).map(".".join))
    third = cases // 3 + 1
    done = run(any_file, third, files) + run(any_value, third, st.sampled_from(PATHS), values)
    return done + run(any_override, third, keys, st.text())


def fuzz_text(folder: Path, reference, cases: int) -> int:
    """Random bytes as the training text."""
    file, tokenizer = folder / "fuzz.txt", reference.tokenizer.backend_tokenizer
    short = ("data.validation_fraction=0.3", "train.sequence_length=4", f"paths.cache={folder}")
    config = load_config(YAML, "ci", short)

    def any_text(content) -> None:
        write(file, content)
        try:
            corpus = load_corpus(config, tokenizer, 0, Source(file.name, (file,)))
        except WorkflowError as error:
            assert_one_line(error)
        else:
            assert np.concatenate([corpus.train, corpus.validation]).max() < 257

    parts = ["\ufeff", " = A = \n", " = = B = = \n", "\r\n", "\n", "words and more", "\0", " = \n"]
    headings = st.lists(st.sampled_from(parts), max_size=12).map("".join)
    return run(any_text, cases, st.one_of(st.binary(max_size=300), st.text(max_size=300), headings))


def fuzz_prompts(reference, cases: int) -> int:
    """Random prompts, then random token ids."""
    model = prepare_for_generation(copy_reference(reference))

    def any_prompt(prompt, new_tokens) -> None:
        try:
            ids = prompt_ids(reference.tokenizer, prompt, chat=False)
            "".join(stream_text(model, reference.tokenizer, ids, min(new_tokens, 3), {}))
        except (WorkflowError, ValueError) as error:
            assert_one_line(error)

    def any_ids(ids) -> None:
        try:
            assert model.generate(torch.tensor([ids], dtype=torch.long), 2).shape[1] == len(ids) + 2
        except ValueError as error:
            assert_one_line(error)

    half = cases // 2 + 1
    characters = st.characters(exclude_categories=())  # with lone surrogates
    done = run(any_prompt, half, st.text(characters, max_size=600), st.integers(-2, 600))
    number = st.one_of(st.integers(0, 300), st.integers(-(2**63), 2**63 - 1))
    return done + run(any_ids, half, st.lists(number, max_size=9))
