"""Anything at all as YAML, text, prompt or token ids: a result, or one line about what is wrong.

Each takes how many cases to try, and returns how many it tried.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import ROOT
from SmolLm3 import LlamaModel
from workflow.analysis import prepare_for_generation, prompt_ids, stream_text
from workflow.config.load import load_config
from workflow.data import Source, load_corpus
from workflow.errors import WorkflowError
from workflow.proof import copy_reference

YAML = ROOT / "SmolLm3_Config.yaml"
SECONDS = 20  # that one case may take; a hang is an error
PATHS = [
    ("model",),
    ("profile",),
    ("profiles", "ci", "train"),
    *(("train", key) for key in yaml.safe_load(YAML.read_text())["train"]),
    ("data", "text"),
    ("data", "source"),
    ("data", "column"),
    ("sample", "prompt"),
    ("run", "name"),
    ("run", "seed"),
    ("run", "device"),
    ("models", "tiny", "architecture"),
    *(
        ("models", "tiny", "architecture", key)
        for key in ("vocab_size", "hidden_size", "head_dim", "num_attention_heads", "rope_theta")
    ),
]
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.sampled_from([0, -1, 2**70])
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(scalars, inner, max_size=3),
    max_leaves=6,
)


def run(check: Callable, cases: int, *strategies: st.SearchStrategy) -> int:
    """Calls a check with what the strategies draw; returns how often."""
    limits = settings(
        max_examples=cases,
        deadline=SECONDS * 1000,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    count = 0

    def counted(case) -> None:
        nonlocal count
        count += 1
        check(*case)

    limits(given(st.tuples(*strategies))(counted))()
    return count


def one_line(error: WorkflowError | ValueError) -> None:
    text = str(error)
    assert text and "\n" not in text and len(text) < 2000, text


def fuzz_yaml(folder: Path, cases: int) -> int:
    """Any bytes as the file, and any value at any of its places."""
    file, good = folder / "fuzz.yaml", yaml.safe_load(YAML.read_text())

    def any_file(content) -> None:
        data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
        file.write_bytes(data)
        accept(file)

    def any_value(path, value) -> None:
        changed = yaml.safe_load(yaml.safe_dump(good))
        here = changed
        for key in path[:-1]:
            here = here[key]
        here[path[-1]] = value
        file.write_text(yaml.safe_dump(changed, allow_unicode=False))
        accept(file)

    def any_override(key, value) -> None:
        accept(YAML, f"{key}={value}")

    def accept(path: Path, *overrides: str) -> None:
        try:
            load_config(path, "ci", overrides)
        except WorkflowError as error:
            one_line(error)

    files = st.one_of(st.binary(max_size=200), st.text(max_size=200))
    keys = st.one_of(st.text(max_size=60), st.sampled_from(PATHS).map(".".join))
    third = cases // 3 + 1
    done = run(any_file, third, files) + run(any_value, third, st.sampled_from(PATHS), values)
    return done + run(any_override, third, keys, st.text())


def fuzz_text(folder: Path, reference, cases: int) -> int:
    """Any bytes as the text that is trained on."""
    file, tokenizer = folder / "fuzz.txt", reference.tokenizer.backend_tokenizer
    short = ("data.validation_fraction=0.3", "train.sequence_length=4", f"paths.cache={folder}")
    config = load_config(YAML, "ci", short)

    def any_text(content) -> None:
        data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
        file.write_bytes(data)
        try:
            corpus = load_corpus(config, tokenizer, 0, Source(file.name, (file,)))
        except WorkflowError as error:
            one_line(error)
        else:
            assert np.concatenate([corpus.train, corpus.validation]).max() < 257

    texts = st.one_of(st.binary(max_size=300), st.text(max_size=300), headings())
    return run(any_text, cases, texts)


def headings() -> st.SearchStrategy:
    """Texts of what makes documents: headings, line ends, marks at the start."""
    parts = ["\ufeff", " = A = \n", " = = B = = \n", "\r\n", "\n", "words and more", "\0", " = \n"]
    return st.lists(st.sampled_from(parts), max_size=12).map("".join)


def fuzz_prompts(reference, cases: int) -> int:
    """Any prompt, then any token ids."""
    model: LlamaModel = prepare_for_generation(copy_reference(reference))

    def any_prompt(prompt, new_tokens) -> None:
        try:
            ids = prompt_ids(reference.tokenizer, prompt, chat=False)
            "".join(stream_text(model, reference.tokenizer, ids, min(new_tokens, 3), {}))
        except (WorkflowError, ValueError) as error:
            one_line(error)

    def any_ids(ids) -> None:
        try:
            assert model.generate(torch.tensor([ids], dtype=torch.long), 2).shape[1] == len(ids) + 2
        except ValueError as error:
            one_line(error)

    half = cases // 2 + 1
    every = st.characters(exclude_categories=())  # half characters (surrogates) too
    done = run(any_prompt, half, st.text(every, max_size=600), st.integers(-2, 600))
    number = st.one_of(st.integers(0, 300), st.integers(-(2**63), 2**63 - 1))
    return done + run(any_ids, half, st.lists(number, max_size=9))
